import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


PATIENCE = 600  # seconds a test waits for one event: a limit that is met only where the event never comes


def until(holds, event, seconds=PATIENCE):
    "The value of `holds()` as soon as it is true; fails with the name of the event that it waited for."
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"waited {seconds} s for {event}"
        time.sleep(0.05)
    return value


def interruptible(command, **options):
    """Starts a process that Ctrl-C interrupts.

    A shell's background jobs ignore Ctrl-C, and what they start inherits that; a signal that is handled is not inherited.
    `preexec_fn` would do it too, but the child of a process with threads may wait there for a lock that nobody holds any more."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    try:
        return subprocess.Popen([str(word) for word in command], **options)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process, seconds=PATIENCE):
    "What a process wrote; one that does not end is killed, and named with what it wrote until then."
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as e:
        process.kill()
        pytest.fail(f"{process.args} did not end within {seconds} s; it wrote {e.stdout} {e.stderr}")


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node):
    "pytest stops its clock when a test fails, but the fixtures that end after it can hang as well."
    limit, stderr = float(node.config.getini("faulthandler_timeout")), node.config.stash[fault_handler_stderr_fd_key]
    if limit and isinstance(node, pytest.Item):
        faulthandler.dump_traceback_later(limit, exit=True, file=stderr)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    "Registry, environment, logging and working folder are after a test what they were before."
    from modelfactory.models.registry import ModelRegistry

    monkeypatch.chdir(ROOT)
    ModelRegistry.discover()
    models, broken, environment = dict(ModelRegistry._models), dict(ModelRegistry._broken), dict(os.environ)
    yield
    ModelRegistry._models.clear(), ModelRegistry._models.update(models)
    ModelRegistry._broken.clear(), ModelRegistry._broken.update(broken)
    os.environ.clear(), os.environ.update(environment)
    logging.disable(logging.NOTSET)


def pytest_terminal_summary(terminalreporter):
    "What could not be tested here is said aloud."
    for reason in dict.fromkeys(
        str(r.longrepr[2])
        for r in terminalreporter.stats.get("skipped", [])
        if isinstance(r.longrepr, tuple) and "NOT " in str(r.longrepr[2])
    ):
        terminalreporter.write_line(reason, yellow=True, bold=True)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip(
            "NOT CHECKED IN A BROWSER: no Chromium is installed (Debian's package is chromium; CHROMIUM=/path names another)"
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("NOT CHECKED IN A BROWSER: playwright is not installed (pip install playwright)")
    with sync_playwright() as p:
        opened = p.chromium.launch(
            executable_path=CHROMIUM, timeout=PATIENCE * 1000, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()
