"GridMonitor in a real JupyterLab: rows are updated, buttons pause the grid and cancel a run, the saved file is right."

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import PATIENCE, ROOT
from nbformat import v4
from quick import quick_models, small_splits
from test_lab import CELLS, _free_port, _lab_command, _wait_for, show

pytestmark = [pytest.mark.browser, pytest.mark.slow]

METADATA = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"))
SOURCE = """from modelfactory.runs.monitor import GridMonitor

grid = dict(models=["faulty", "nearest"], horizons=[5], data=["small"])
grid["overrides"] = dict(faulty=dict(fault="rounds", flag="never"))
monitor = GridMonitor(grid, "runs", every=0.3).start(workers=1)
monitor"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with small splits, the models of the tests, and a notebook with a monitor."
    home = tmp_path_factory.mktemp("monitor")
    (home / "project").mkdir()
    shutil.copy(ROOT / "settings.ini", home / "project")
    small_splits(home / "project/small")
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell(SOURCE)], metadata=METADATA), home / "project/monitor.ipynb")
    return home / "project"


@pytest.fixture(scope="module")
def page(browser, project):
    "A page with a JupyterLab in the project."
    home, port, token = project.parent, _free_port(), secrets.token_hex(16)
    environment = dict(
        os.environ,
        MODELFACTORY_SETTINGS=str(project / "settings.ini"),
        MODELFACTORY_TRACKING="",
        MODELFACTORY_PLUGINS=quick_models(home),
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **{f"JUPYTER_{what}_DIR": str(home / what) for what in ("CONFIG", "DATA", "RUNTIME")},
        IPYTHONDIR=str(home / "ipython"),
        JUPYTERLAB_SETTINGS_DIR=str(home / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"),
    )
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", "--allow-root"]
    lab = [word for word in _lab_command(Path(sys.executable).parent) if not str(word).endswith(".ipynb")]
    command = [*lab, *options, "--LabApp.expose_app_in_browser=True"]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True)
    base = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{base}/api/status?token={token}", server, home / "lab.log")
        page = browser.new_page(viewport=dict(width=1440, height=900))
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{base}/lab?token={token}&reset", wait_until="domcontentloaded")
        page.wait_for_function("() => window.jupyterapp")
        page.evaluate("() => jupyterapp.restored")
        yield page
        page.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


ROW = """name => {
  const rows = [...document.querySelectorAll('.jp-OutputArea-output tr')].filter(r => r.innerText.includes(name));
  return rows.length == 1 ? [...rows[0].cells].map(c => c.innerText.trim()) : null;
}"""


def row(page, name, condition):
    "The cells of a run's row, once they meet a condition in JavaScript."
    page.wait_for_function(f"name => {{ const row = ({ROW})(name); return row && ({condition})(row); }}", arg=name)
    return page.evaluate(ROW, name)


def click(page, action, name=None):
    "Clicks a button of a row, or the button above the table."
    where = f"tr:has-text('{name}') " if name else ""
    page.click(f"{where}button[data-action={action}]")


def saved_outputs(page, project):
    "HTML of the outputs in the file, after it was saved; fails if an output is a widget."
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    outputs = nbformat.read(project / "monitor.ipynb", 4).cells[0].outputs
    assert not any("widget" in json.dumps(list(output.get("data", {}))) for output in outputs)
    return "".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs)


def test_a_monitor_updates_its_rows_cancels_a_run_and_is_right_in_the_saved_file(page, project):
    show(page, "monitor.ipynb", kernel=True)
    page.wait_for_selector("[data-status=idle]")
    page.click("text=Run >> nth=0")
    page.click("text='Run All Cells'")
    first = row(page, "faulty h5", "row => /round [1-9]/.test(row[2])")[2]
    later = row(page, "faulty h5", f"row => row[2] != {json.dumps(first)} && row[2].startsWith('round')")
    assert (
        later[1] == "running"
        and later[3] == "val_loss 1.1000"
        and row(page, "nearest h5", "row => true")[1] == "waiting"
    )
    if folder := os.environ.get("MONITOR_PICTURES"):
        page.screenshot(path=f"{folder}/running.png")
    assert "running" in saved_outputs(page, project)

    click(page, "log", "faulty h5")
    page.wait_for_selector(
        ".jp-OutputArea-output pre:has-text('training rows'), .jp-OutputArea-output pre:has-text('faulty')"
    )
    click(page, "pause")
    row(page, "nearest h5", "row => row[1] == 'paused'")
    click(page, "cancel", "faulty h5")
    row(page, "faulty h5", "row => row[1] == 'cancelled'")
    assert row(page, "nearest h5", "row => true")[1] == "paused"
    if folder:
        page.screenshot(path=f"{folder}/paused.png")
    click(page, "resume")
    row(page, "nearest h5", "row => row[1] == 'done'")
    page.wait_for_selector("button[data-action=resume], button[data-action=pause]", state="detached")

    assert all(status in saved_outputs(page, project) for status in (">cancelled<", ">done<"))
    assert not [cell for cell in page.evaluate(CELLS) if cell["error"] or cell["stderr"] or cell["widget"]]
    show(page, "monitor.ipynb")
    assert (
        row(page, "faulty h5", "row => true")[1] == "cancelled" and row(page, "nearest h5", "row => true")[1] == "done"
    )
    page.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")
    page.reload()
    page.wait_for_function("() => window.jupyterapp")
    page.evaluate("() => jupyterapp.restored")
    show(page, "monitor.ipynb")
    assert row(page, "faulty h5", "row => true")[1] == "cancelled"
    assert not page.locator(".jp-OutputArea-output button").locator("visible=true").count()
    if folder:
        page.screenshot(path=f"{folder}/saved.png")
