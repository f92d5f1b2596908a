"The documentation builds without a warning, links work, nothing loads from outside, and reference pages are current."

import ast
import os
import re
import subprocess
import sys
from copy import deepcopy
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from conftest import PATIENCE, ROOT
from filelock import FileLock
from nbclient import NotebookClient

from modelfactory import PUBLIC_NAMES, __version__

pytestmark = [pytest.mark.browser, pytest.mark.slow]

REFERENCE = sorted((ROOT / "nbs/reference").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built as `make docs` does: once, however many workers ask for it."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs"
    with FileLock(f"{folder}.lock", timeout=PATIENCE):
        if not folder.exists():
            build(folder)
    return folder / "site"


def build(folder):
    run(sys.executable, ROOT / "docs/pages.py", folder / "pages", folder / "gallery")
    sphinx = [Path(sys.executable).parent / "sphinx-build", "-q", "-W", "--keep-going", "-c", ROOT / "docs"]
    run(*sphinx, folder / "pages", folder / "site")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


TAG = re.compile(r"<(\w+)\s([^<>]*)>")
ATTRIBUTE = re.compile(r"""(?<![\w-])(href|src|data|id|name)=("[^"]*"|'[^']*')""")


class Page:
    "Links, assets and anchors of a page."

    def __init__(self, file):
        self.links, self.assets, self.anchors = set(), set(), {""}
        for tag, text in TAG.findall(file.read_text()):
            for key, quoted in ATTRIBUTE.findall(text):
                kind = self.anchors if key in ("id", "name") else self.links if tag == "a" else self.assets
                kind.add(unescape(quoted[1:-1]))


@cache
def target(folder, path):
    return Path(os.path.normpath(folder / unquote(path)))


def test_every_link_leads_somewhere_and_nothing_comes_from_outside(site):
    pages = {file: Page(file) for file in site.rglob("*.html")}
    assert len(pages) > 300
    is_file = cache(Path.is_file)
    broken = []
    for file, page in pages.items():
        for link in page.links | page.assets:
            where = urlsplit(link)
            if where.scheme in ("https", "http", "mailto") and link in page.links or where.scheme == "data":
                continue
            to = target(file.parent, where.path) if where.path else file
            has_anchor = to not in pages or unquote(where.fragment) in pages[to].anchors
            if where.scheme or where.netloc or not is_file(to) or not has_anchor:
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []
    styles = "".join(f.read_text() for f in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//|@import", styles)


def test_the_link_checker_sees(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="b.html">b</a><script src="https://cdn.example.org/x.js"></script>'
    )
    page = Page(tmp_path / "a.html")
    assert (page.links, page.assets, page.anchors) == ({"b.html"}, {"https://cdn.example.org/x.js"}, {"", "here"})


def exported_names(file):
    "The names in the `__all__` of a module."
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_the_inventory_holds_each_exported_name(site):
    "Other projects can link to each public name, and to each name in the `__all__` of each module."
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    locations = {
        name: item.uri for kind in inventory if kind.startswith("py:") for name, item in inventory[kind].items()
    }
    expected = {f"modelfactory.{name}" for name in PUBLIC_NAMES} | {"modelfactory.Trainer.run_full_pipeline"}
    for file in (ROOT / "modelfactory").rglob("*.py"):
        if not file.name.startswith("_"):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            expected |= {module} | {f"{module}.{name}" for name in exported_names(file)}
    assert len(expected) > 1000 and sorted(expected - set(locations)) == []
    page, _, anchor = locations["modelfactory.Trainer"].partition("#")
    assert anchor.replace("$", "modelfactory.Trainer") in Page(site / page).anchors


def text_outside_code(file):
    "The text of a page without code, signatures, scripts and styles."
    html = re.sub(r"<(pre|code|dt|script|style)\b.*?</\1>", "", file.read_text(), flags=re.DOTALL)
    return re.sub(r"<[^>]+>", "", html)


def test_api_pages_describe_parameters_and_link_to_notebooks(site):
    trainer = Page(site / "api/modelfactory.training.trainer.html")
    assert (
        "split name -&gt; DataFrame, used instead of" in (site / "api/modelfactory.training.trainer.html").read_text()
    )
    assert "../nbs/training/00_trainer.html" in trainer.links
    assert any(
        "api/modelfactory.training.trainer.html" in link for link in Page(site / "nbs/training/00_trainer.html").links
    )
    marks = [f.name for f in site.glob("api/*.html") if re.search(r"`|:py:|:param", text_outside_code(f))]
    assert marks == []


def test_each_page_of_the_sidebar_is_marked_as_the_current_one(site):
    "The tree of the sidebar is made once for each folder, and the current page and its sections are marked in it."

    def sidebar(name):
        html = (site / f"{name}.html").read_text()
        return re.search(r'<div class="sidebar-tree">(.*?)</div>', html, re.DOTALL)[1]

    pages = re.findall(r'href="([^"]+)\.html"', sidebar("index"))
    assert len(pages) == len(set(pages)) > 150
    for name in pages:
        current = re.findall(r'current-page"><a class="current reference internal" href="([^"]+)"', sidebar(name))
        assert [target((site / name).parent, link) for link in current] == [site / f"{name}.html"]
    html = sidebar("api/modelfactory.data.splits")
    opened = re.findall(r'<li class="[^"]* current[^"]*"><a [^>]*href="([^"]+)"', html)
    assert opened == ["../api/index.html", "../api/data.html", "../api/modelfactory.data.splits.html"]
    assert len(re.findall('checked=""', html)) == 2
    assert 'current"><a class="reference internal" href="../../notebooks.html"' in sidebar("nbs/data/00_splits")


def test_each_figure_of_a_tutorial_has_an_alternative_text(site):
    pages = [file.read_text() for file in sorted(site.glob("nbs/tutorials/*.html"))]
    images = [image for page in pages for image in re.findall("<img [^>]+>", page)]
    without = [image for image in images if not re.search(r"""alt=(["'])\w+ [^"']+ [^"']+\1""", image)]
    assert len(images) >= 10 and without == [], "begin the cell with `#| fig-alt: text`"


def test_the_landing_page_leads_to_the_first_steps(site):
    text = (site / "index.html").read_text()
    assert f"modelfactory {__version__}" in text and 'href="CHANGELOG.html"' in text
    assert all(command in re.sub("<[^>]+>", "", text) for command in ("make demo", "make lab", "run_full_pipeline"))


def test_the_gallery_shows_executed_pages_and_no_page_names_paths_of_this_machine(site):
    for name, words in dict(tear_sheet="Directional skill", comparison="Verdicts").items():
        page = (site / f"gallery/{name}.html").read_text()
        assert words in page and len(re.findall(r"<img [^>]*_images/", page)) >= 5
    for file in [*site.glob("gallery/*.html"), *site.glob("api/*.html")]:
        assert not re.search(f"{ROOT}/|{site.parent}/| at 0x", file.read_text()), file.name


@pytest.fixture
def page(site, browser):
    "A page in a browser, and the addresses outside the site for which it asks."
    page = browser.new_page(viewport=dict(width=1440, height=900))
    page.asked = []
    page.on("request", lambda r: page.asked.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    yield page
    page.close()


@pytest.mark.parametrize("width", (1440, 390))
def test_a_page_fits_a_desk_and_a_phone(site, page, width):
    "Nothing wider than the screen, no missing picture, nothing asked from outside, as a browser sees it."
    page.set_viewport_size(dict(width=width, height=900))
    wrong = []
    patterns = ("*.html", "gallery/*.html", "nbs/[a-z]*.html", "nbs/tutorials/*.html", "nbs/reference/*.html")
    patterns += ("nbs/models/timeseries/t*.html", "api/index.html", "api/data.html", "api/modelfactory.data.s*.html")
    for file in [f for pattern in patterns for f in sorted(site.glob(pattern))]:
        page.goto(file.as_uri())
        wide, missing = page.evaluate(
            """[
                Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
                [...document.images].filter(i => !i.naturalWidth).length,
            ]"""
        )
        if wide > width or missing:
            wrong.append((file.name, wide, missing))
    assert (wrong, page.asked) == ([], [])


def test_search_from_files_finds_a_public_name(site, page):
    page.goto((site / "index.html").as_uri())
    page.fill("input.sidebar-search", "Trainer")
    page.press("input.sidebar-search", "Enter")
    link = page.locator("#search-results").get_by_role("link", name="modelfactory.Trainer", exact=True)
    link.wait_for()
    assert "modelfactory.Trainer" in page.locator("#search-results li a").all_text_contents()[:2]
    link.click()
    page.locator("dt[id='modelfactory.training.trainer.Trainer']").wait_for()
    assert page.asked == []


def test_a_section_of_the_sidebar_opens_and_closes(site, page):
    page.goto((site / "index.html").as_uri())
    tree = page.locator(".sidebar-tree")
    package = tree.get_by_role("link", name="evaluation", exact=True)
    section = tree.locator("li.toctree-l1", has=page.get_by_role("link", name="API", exact=True))
    assert not package.is_visible()
    section.locator("label").first.click()
    package.wait_for(state="visible")
    section.locator("label").first.click()
    package.wait_for(state="hidden")
    package_page = site / "api/modelfactory.data.splits.html"
    page.goto(package_page.as_uri())
    assert tree.get_by_role("link", name="splits", exact=True).is_visible()
    assert tree.locator("li.toctree-l1 > ul:visible").count() == 1


def test_a_button_copies_code(site, page):
    page.goto((site / "index.html").as_uri())
    block = page.locator("div.highlight", has_text="make demo")
    block.hover()
    block.locator("button.copybtn").click()
    page.locator("button.copybtn.success").wait_for()
    page.evaluate("document.body.prepend(document.createElement('textarea'))")
    page.focus("textarea")
    page.keyboard.press("Control+V")
    assert page.input_value("textarea").strip() == block.locator("pre").text_content().strip()


def shown_text(nb):
    "What each cell prints and shows, as text; the pieces of a stream are joined."

    def text(o):
        return o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain") or ""

    return {
        cell.id: "".join(text(o) for o in cell.outputs if o.get("name") != "stderr")
        for cell in nb.cells
        if cell.cell_type == "code"
    }


@pytest.mark.parametrize("file", REFERENCE, ids=lambda f: f.stem)
def test_a_reference_page_says_what_the_code_says(file, monkeypatch):
    monkeypatch.delenv("MODELFACTORY_TRACKING")  # errors name the variables that are set
    stored = nbformat.read(file, 4)
    fresh = deepcopy(stored)
    NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(file.parent)))
    ).execute()
    assert shown_text(fresh) == shown_text(stored), f"run {file.relative_to(ROOT)} again and commit it"
    assert any(shown_text(stored).values()) or file.stem == "coming_from"
