import logging
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def interruptible(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and what they start, ignore Ctrl-C


def until(found, seconds=40):
    "Waits until `found()` is true."
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(.05)


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
    for reason in dict.fromkeys(str(r.longrepr[2]) for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple) and "NOT " in str(r.longrepr[2])): terminalreporter.write_line(reason, yellow=True, bold=True)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM: pytest.skip("NOT CHECKED IN A BROWSER: no Chromium is installed (Debian's package is chromium; CHROMIUM=/path names another)")
    try: from playwright.sync_api import sync_playwright
    except ImportError: pytest.skip("NOT CHECKED IN A BROWSER: playwright is not installed (pip install playwright)")
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()
