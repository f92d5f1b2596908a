"The documentation builds without a warning, links work, nothing loads from outside, and reference pages are current."

import importlib.util
import os
import re
import subprocess
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from conftest import PATIENCE, ROOT
from filelock import FileLock
from nbclient import NotebookClient

pytestmark = [pytest.mark.browser, pytest.mark.slow]

REFERENCE = sorted((ROOT / "nbs/reference").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built as `make docs` does: once, however many workers ask for it."
    base = tmp_path_factory.getbasetemp()
    there = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs"
    with FileLock(f"{there}.lock", timeout=PATIENCE):
        if not there.exists():
            build(there)
    return there / "site"


def build(there):
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/pages.py")
    spec.loader.exec_module(pages := importlib.util.module_from_spec(spec))
    pages.write_pages(there / "pages")
    tool = [Path(sys.executable).parent / "sphinx-build", "-q", "-W", "--keep-going", "-c", ROOT / "docs"]
    done = subprocess.run([*tool, there / "pages", there / "site"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


class Page(HTMLParser):
    "Links, assets and anchors of a page."

    def __init__(self, file):
        super().__init__()
        self.links, self.assets, self.anchors = [], [], {""}
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        a = {k: v or "" for k, v in attributes}
        self.anchors |= {a[k] for k in ("id", "name") if k in a}
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        self.assets += [a[k] for k in ("src", "data") if k in a] + (
            [a["href"]] if tag == "link" and "href" in a else []
        )


def test_every_link_leads_somewhere_and_nothing_comes_from_outside(site):
    pages = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    assert len(pages) > 80
    broken = []
    for file, page in pages.items():
        for link in [*page.links, *page.assets]:
            where = urlsplit(link)
            if where.scheme in ("https", "http", "mailto") and link in page.links:
                continue
            if where.scheme == "data":
                continue
            target = (file.parent / unquote(where.path)).resolve() if where.path else file
            anchor = unquote(where.fragment)
            if (
                where.scheme
                or where.netloc
                or not target.is_file()
                or target in pages
                and anchor not in pages[target].anchors
            ):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []
    styles = "".join(f.read_text() for f in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//|@import", styles)


def test_the_link_checker_sees(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="b.html">b</a><script src="https://cdn.example.org/x.js"></script>'
    )
    page = Page(tmp_path / "a.html")
    assert (page.links, page.assets, page.anchors) == (["b.html"], ["https://cdn.example.org/x.js"], {"", "here"})


def test_the_package_is_documented(site):
    "Every public name of the package is a heading of some page."
    anchors = set().union(*(Page(f).anchors for f in site.rglob("nbs/**/*.html")))
    for module in ("configuration.py", "data/splits.py", "models/registry.py", "training/trainer.py", "runs/grid.py"):
        names = re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", (ROOT / "modelfactory" / module).read_text(), re.M)
        missing = [n for n in names if not {n.lower().replace("_", "-"), n.lower()} & anchors]
        assert names and missing == [], module


def test_search_finds_a_function(site):
    assert "run_notebook" in (site / "searchindex.js").read_text()


@pytest.mark.parametrize("width", (1440, 390))
def test_a_page_fits_a_desk_and_a_phone(site, browser, width):
    "Nothing wider than the screen, no missing picture, nothing asked from outside, as a browser sees it."
    page, asked, wrong = browser.new_page(viewport=dict(width=width, height=900)), [], []
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    for file in [
        site / "index.html",
        *sorted(site.glob("nbs/*.html")),
        *(
            f
            for where in ("tutorials", "reference", "models/timeseries")
            for f in sorted(site.glob(f"nbs/{where}/*.html"))
        ),
    ]:
        page.goto(file.as_uri())
        wide, missing = page.evaluate(
            """[
                Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
                [...document.images].filter(i => !i.naturalWidth).length,
            ]"""
        )
        if wide > width or missing:
            wrong.append((file.name, wide, missing))
    page.close()
    assert (wrong, asked) == ([], [])


def told(nb):
    "What each cell prints and shows, as text: a stream comes in as many pieces as its timing wills."

    def text(o):
        return o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain") or ""

    return {
        cell.id: "".join(text(o) for o in cell.outputs if o.get("name") != "stderr")
        for cell in nb.cells
        if cell.cell_type == "code"
    }


@pytest.mark.parametrize("file", REFERENCE, ids=lambda f: f.stem)
def test_a_reference_page_says_what_the_code_says(file):
    stored = nbformat.read(file, 4)
    fresh = deepcopy(stored)
    NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(file.parent)))
    ).execute()
    assert told(fresh) == told(stored), f"run {file.relative_to(ROOT)} again and commit it"
    assert any(told(stored).values()) or file.stem == "coming_from"
