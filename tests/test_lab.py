"""Notebooks in a browser: opened and run in a JupyterLab in Chromium.

`make browser` runs every tutorial. The suite runs the first page only, and opens the others."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, until

pytestmark = [pytest.mark.browser, pytest.mark.slow]

RUN_ALL = bool(os.environ.get("BROWSER_RUNS_ALL"))
PAGES = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "nbs/tutorials").glob("*.ipynb"))
CELLS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(c => ({
  prompt: (c.querySelector('.jp-InputPrompt') || {}).textContent || '',
  source: ((c.querySelector('.cm-content') || {}).innerText || '').trim(),
  error: [...c.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]')]
    .map(e => e.innerText.slice(-800)).join(),
  stderr: [...c.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')]
    .map(e => e.innerText.slice(0, 400)).join(),
  widget: /Error displaying widget|Loading widget/.test(c.innerText),
  images: [...c.querySelectorAll('.jp-RenderedImage img, .jp-RenderedHTMLCommon img')].map(m => m.naturalWidth)}))"""


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    "The address of a JupyterLab over a copy of the project with one run and a comparison."
    home = tmp_path_factory.mktemp("lab")
    for name in ("nbs", "params"):
        shutil.copytree(ROOT / name, home / "project" / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (home / "project/docs").mkdir()
    for name in ("settings.ini", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/comparison.png"):
        shutil.copy(ROOT / name, home / "project" / name)
    environment = dict(
        os.environ,
        MODELFACTORY_SETTINGS=str(home / "project/settings.ini"),
        MODELFACTORY_TRACKING="",
        MODELFACTORY_BUNDLED=str(_bundled()),
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        **{f"JUPYTER_{what}_DIR": str(home / what) for what in ("CONFIG", "DATA", "RUNTIME")},
        IPYTHONDIR=str(home / "ipython"),
        JUPYTERLAB_SETTINGS_DIR=str(home / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"),
    )
    tools = Path(sys.executable).parent
    train = ["train", "--model", "lightgbm", "--horizon", "5", "--data", "planted", "--preset", "quick"]
    options = dict(cwd=home / "project", env=environment, check=True, capture_output=True)
    for command in (train, ["compare"]):
        subprocess.run([tools / "modelfactory", *command], timeout=PATIENCE, **options)
    port, token = _free_port(), secrets.token_hex(16)
    setting = home / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    setting.parent.mkdir(parents=True)
    setting.write_text(json.dumps(dict(windowingMode="none")))
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(
            [
                *_lab_command(tools),
                "--no-browser",
                "--ip=127.0.0.1",
                f"--port={port}",
                f"--IdentityProvider.token={token}",
                "--allow-root",
                "--LabApp.expose_app_in_browser=True",
            ],
            cwd=home / "project",
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    base = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{base}/api/status?token={token}", server, home / "lab.log")
        yield f"{base}/lab?token={token}&reset"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _lab_command(tools):
    "The command of `make lab`."
    recipe = re.search(r"^lab:.*\n\t\$\(BIN\)/(jupyter lab .*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    program, *arguments = re.sub(r"\$\(if .*\) (?=--)", "", recipe).split()  # `--allow-root` is added below
    return [tools / program, *arguments]


def _bundled():
    from modelfactory.data.bundled import resolve_data

    return resolve_data("planted").parent


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(url, server, log):
    def has_answered():
        try:
            urllib.request.urlopen(url, timeout=20).close()
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
        else:
            return True

    until(has_answered, "JupyterLab to answer")


@pytest.fixture(scope="module")
def page(browser, lab):
    "A page with JupyterLab, which is loaded once."
    new_page = browser.new_page(viewport=dict(width=1440, height=1000))
    new_page.set_default_timeout(PATIENCE * 1000)
    new_page.goto(lab, wait_until="domcontentloaded")
    new_page.wait_for_function("() => window.jupyterapp")
    new_page.evaluate("() => jupyterapp.restored")
    yield new_page
    new_page.close()


SHOW = """async ([path, shouldStart]) => {
  [...jupyterapp.shell.widgets('main')].forEach(widget => widget.dispose());
  const widget = await jupyterapp.commands.execute(
    'docmanager:open', {path, factory: 'Notebook', kernelPreference: {shouldStart}});
  await widget.context.ready;
  await widget.revealed;
}"""


def show(page, path, kernel=False):
    "Opens a notebook as the only document, without a kernel unless its cells are to be run."
    page.evaluate(SHOW, [path, kernel])
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook .jp-Cell")
    page.wait_for_timeout(1500)


def run_all(page, seconds=PATIENCE):
    page.wait_for_selector("[data-status=idle]")
    page.click("text=Run >> nth=0")
    page.click("text='Run All Cells'")
    end = time.monotonic() + seconds
    while True:
        page.wait_for_timeout(700)
        cells = page.evaluate(CELLS)
        running = [c for c in cells if "*" in c["prompt"]]
        is_complete = all(c["prompt"].strip(" []:") or not c["source"] for c in cells)
        if not running and (is_complete or any(c["error"] for c in cells)):
            return
        assert time.monotonic() < end, running


def checked_images(page):
    "Number of images; raises `AssertionError` on an error, output on stderr, a broken widget or a missing image."
    cells = page.evaluate(CELLS)
    broken = [c for c in cells if c["error"] or c["stderr"] or c["widget"] or 0 in c["images"]]
    assert cells and not broken, broken
    return sum(len(c["images"]) for c in cells)


def test_errors_and_missing_images_are_detected(page, tmp_path_factory):
    "The check fails on an error output, and on an image that does not exist."
    import nbformat
    from nbformat import v4

    project = next(tmp_path_factory.getbasetemp().glob("lab*/project"))
    outputs = dict(
        error=v4.new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"]),
        picture=v4.new_output("display_data", {"text/html": "<img src='nowhere.png'>"}),
    )
    for name, output in outputs.items():
        cell = v4.new_code_cell("1", outputs=[output], execution_count=1)
        nbformat.write(v4.new_notebook(cells=[cell]), project / f"{name}.ipynb")
        show(page, f"{name}.ipynb")
        with pytest.raises(AssertionError):
            checked_images(page)


def test_the_first_page_shows_its_picture_and_links_to_files_of_the_project(page):
    "JupyterLab starts in the project folder, and does not ask a new user about news."
    show(page, "nbs/index.ipynb")
    widths = page.evaluate("() => [...document.querySelectorAll('.jp-MarkdownOutput img')].map(m => m.naturalWidth)")
    assert widths and all(widths)
    links = page.evaluate("() => [...document.querySelectorAll('.jp-MarkdownOutput a')].map(a => a.href)")
    paths = [link.split("/files/")[1].split("?")[0] for link in links if "/files/" in link]
    assert {"settings.ini", "CONTRIBUTING.md"} <= set(paths)
    listed = page.evaluate("async () => (await jupyterapp.serviceManager.contents.get('')).content.map(f => f.name)")
    assert {"nbs", "params", "runs", "settings.ini"} <= set(listed)
    assert "news" not in page.evaluate(
        "() => [...document.querySelectorAll('.jp-Dialog, .jp-toastContainer, .Toastify')].map(d => d.innerText).join()"
    )


def test_the_first_page_runs(page):
    show(page, "nbs/index.ipynb", kernel=True)
    run_all(page)
    checked_images(page)


@pytest.mark.parametrize("path", PAGES)
def test_tutorials_open_without_errors(page, path):
    show(page, path, kernel=RUN_ALL)
    if RUN_ALL:
        run_all(page)
    checked_images(page)


@pytest.mark.parametrize("pattern, n_images", [("runs/lightgbm_*/train.ipynb", 6), ("runs/compare.ipynb", 5)])
def test_notebooks_executed_by_papermill_show_images_and_tables(page, tmp_path_factory, pattern, n_images):
    files = tmp_path_factory.getbasetemp().glob(f"lab*/project/{pattern}")
    show(page, next(str(f).split("/project/")[1] for f in files))
    assert checked_images(page) >= n_images
    tables = page.evaluate("() => document.querySelectorAll('.jp-RenderedHTMLCommon table').length")
    assert tables >= 2, "tables of an untrusted notebook are shown as well"


@pytest.fixture
def explored(lab, tmp_path_factory):
    "A notebook that explores six runs: three models, two horizons, one figure."
    from fabricate import bars, make_run
    from nbformat import v4, write

    project = next(tmp_path_factory.getbasetemp().glob("lab*/project"))
    for horizon in (5, 20):
        for model, skill in (("gru", 1.0), ("lightgbm", 0.5), ("svm", 0.0)):
            run = make_run(project / "explored", model, bars(400, horizon=horizon), horizon=horizon, skill=skill)
            (run.path / "plots").mkdir()
            shutil.copy(project / "docs/comparison.png", run.path / "plots/equity.png")
    sources = ["from modelfactory import explore\n\nexplorer = explore('explored')\nexplorer", "explorer.selected_runs"]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    cells = [v4.new_code_cell(source) for source in sources]
    write(v4.new_notebook(cells=cells, metadata=kernel), project / "explored.ipynb")
    return project / "explored.ipynb"


def test_explore_filters_opens_and_compares_and_stays_a_table_without_a_kernel(page, explored):
    show(page, explored.name, kernel=True)
    run_all(page)
    page.wait_for_selector(".mfx-filters")
    rows = page.locator(".mfx tbody tr")
    assert rows.count() == 6

    page.click(".mfx-menu[data-column=horizon] summary")
    page.check(".mfx-menu[data-column=horizon] input[value='5']")
    page.click("th[data-column=log_loss] button")
    assert [row.split("\t")[3] for row in rows.all_inner_texts()] == ["gru", "lightgbm", "svm"]
    assert page.inner_text(".mfx-count") == "3 of 6 rows"
    page.click("th[data-column=log_loss] button")
    assert [row.split("\t")[3] for row in rows.all_inner_texts()] == ["svm", "lightgbm", "gru"]

    rows.nth(2).click()
    page.wait_for_selector(".mfx-sheet h4 >> text=gru, h5, bars, seed 42")
    page.wait_for_function("() => document.querySelector('.mfx-sheet img').naturalWidth > 0")
    for row in (2, 0):
        rows.nth(row).locator("input").check()
    page.wait_for_selector(".mfx-difference h4 >> text=svm, h5, bars, seed 42")
    assert page.locator(".mfx-difference tr", has_text="log_loss").inner_text().split()[-1].startswith("+")
    page.keyboard.press("d")
    page.keyboard.press("d")  # would delete the cell
    run_all(page)
    assert rows.count() == 6 and not page.locator(".mfx-panel:visible").count(), "a new explorer"

    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    outputs = json.loads(explored.read_text())["cells"][0]["outputs"]
    assert [sorted(output["data"]) for output in outputs] == [["text/html", "text/plain"]]
    page.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function("() => window.jupyterapp")
    page.evaluate("() => jupyterapp.restored")
    show(page, explored.name)
    checked_images(page)
    assert rows.count() == 6 and not page.locator(".mfx-filters").count()
    assert "run the cell in JupyterLab" in page.inner_text(".mfx")
