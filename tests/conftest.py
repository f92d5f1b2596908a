import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("MODELFACTORY_TRACKING", "")  # importing MLflow and creating a database take seconds

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


PATIENCE = 600  # seconds a test waits for one event; reached only when the event never happens


def until(condition, event, seconds=PATIENCE):
    "The value of `condition()` as soon as it is true; fails with the name of the event after `seconds`."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {event}"
        time.sleep(0.05)
    return value


def interruptible(command, **options):
    """Starts a process that Ctrl-C interrupts.

    Background jobs of a shell ignore Ctrl-C, and so do the processes that they start. A handled signal is not
    inherited. `preexec_fn` is not used, because a child of a process with threads may wait there for a lock that is
    never released."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    try:
        return subprocess.Popen([str(word) for word in command], **options)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process, seconds=PATIENCE):
    "The output of a process; a process that does not end is killed, and its output is reported."
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as e:
        process.kill()
        pytest.fail(f"{process.args} did not end within {seconds} s; it wrote {e.stdout} {e.stderr}")


def read_line(process, seconds=PATIENCE):
    "The next line that a process writes; a process that writes none within `seconds` is killed, which ends the wait."
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    try:
        return process.stdout.readline()
    finally:
        limit.cancel()


NOT_TRACED = ("test_docs", "test_install", "test_lab", "test_null_worlds", "test_onnx", "test_permutation")


def pytest_collection_modifyitems(items):
    "Leaves slow tests out of the coverage if other tests execute the same lines."
    for item in items:
        if item.path.stem in NOT_TRACED and item.get_closest_marker("slow"):
            item.add_marker("no_cover")


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node):
    "Starts the time limit again after a failed test, because its fixtures can hang when they end."
    limit, stderr = float(node.config.getini("faulthandler_timeout")), node.config.stash[fault_handler_stderr_fd_key]
    if limit and isinstance(node, pytest.Item):
        faulthandler.dump_traceback_later(limit, exit=True, file=stderr)


@pytest.fixture(autouse=True)
def restored_state(monkeypatch):
    "Restores registry, environment, logging and working folder after each test."
    from modelfactory.models.registry import ModelRegistry

    monkeypatch.chdir(ROOT)
    ModelRegistry.discover()
    models, broken, environment = dict(ModelRegistry._models), dict(ModelRegistry._broken), dict(os.environ)
    yield
    for current, before in (
        (ModelRegistry._models, models),
        (ModelRegistry._broken, broken),
        (os.environ, environment),
    ):
        current.clear()
        current.update(before)
    logging.disable(logging.NOTSET)


@pytest.fixture
def always_mapped(monkeypatch, tmp_path):
    "Every matrix is mapped from a file in an empty folder, which is returned."
    from modelfactory.data import matrix

    monkeypatch.setattr(matrix, "MIN_MAPPED_BYTES", 0)
    monkeypatch.setenv("MODELFACTORY_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("MODELFACTORY_MEMORY_SHARE", "0")
    return tmp_path / "scratch"


def pytest_terminal_summary(terminalreporter):
    "Lists the reasons of skipped tests that start with NOT, once each."
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(r.longrepr[2]) for r in skipped if isinstance(r.longrepr, tuple)]
    for reason in dict.fromkeys(reasons):
        if "NOT " in reason:
            terminalreporter.write_line(reason, yellow=True, bold=True)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip(
            "NOT CHECKED IN A BROWSER: no Chromium is installed "
            "(Debian's package is chromium; CHROMIUM=/path sets another one)"
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("NOT CHECKED IN A BROWSER: playwright is not installed (pip install playwright)")
    with sync_playwright() as p:
        chromium = p.chromium.launch(
            executable_path=CHROMIUM, timeout=PATIENCE * 1000, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()
