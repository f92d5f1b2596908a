"Tests wait for events with a time limit. A test that hangs is ended and reported, and the other tests run."

import ast
import re
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT

pytestmark = pytest.mark.slow

HANGS = """
import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


def test_a_lock():
    with ThreadPoolExecutor(1) as pool: pool.submit(threading.Event().wait).result()


def test_a_call_that_holds_the_interpreter(): ctypes.PyDLL(None).pause()


@pytest.fixture
def restored_state(): "Replaces the one of conftest.py, which imports the package."


@pytest.fixture
def never_done():
    yield
    threading.Event().wait()


def test_a_fixture_after_a_failure(never_done): assert False


@pytest.mark.parametrize("i", range(9))
def test_quick(i): pass
"""


def test_a_hanging_test_is_ended_and_reported_and_the_others_run(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", "faulthandler_timeout=3", "-n", "2"]
    command = [sys.executable, "-m", "pytest", *options, "--dist", "worksteal", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "9 passed" in done.stdout, done.stdout + done.stderr
    for name in ("test_a_lock", "test_a_call_that_holds_the_interpreter", "test_a_fixture_after_a_failure"):
        assert f"crashed while running 'test_hangs.py::{name}'" in done.stdout
        assert 'test_hangs.py", line' in done.stderr, "the stacks of the threads"


def missing_limit(call):
    "Why a call may wait without a limit; empty if it has a limit or does not wait."
    name, keywords = ast.unparse(call.func), {k.arg for k in call.keywords}
    method, limited = name.rpartition(".")[2], bool(call.args) or "timeout" in keywords
    if name == "time.sleep":
        return "waits for a fixed time: use conftest.until to wait for an event"
    if "preexec_fn" in keywords:
        return "may hang before the process starts: see conftest.interruptible"
    if re.fullmatch(r"subprocess\.(run|call|check_\w+)", name) and "timeout" not in keywords:
        return "has no timeout"
    if method == "FileLock" and "timeout" not in keywords:
        return "has no timeout"
    if method in ("wait", "communicate", "result", "join", "acquire") and not limited:
        return "has no limit"
    return "has no limit" if method in ("readline", "waitpid", "as_completed") else ""


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda f: f.stem)
def test_every_wait_has_a_limit(file):
    calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
    unlimited = [f"line {c.lineno}: {ast.unparse(c.func)} {why}" for c in calls if (why := missing_limit(c))]
    if file.stem in ("conftest", "quick_models"):  # `until`, `read_line` and models that hang on purpose
        unlimited = [line for line in unlimited if "time.sleep" not in line and "stdout.readline" not in line]
    assert unlimited == []


@pytest.mark.parametrize(
    "source",
    [
        "time.sleep(1)",
        "p.wait()",
        "p.communicate()",
        "f.result()",
        "FileLock('x')",
        "subprocess.run(['x'])",
        "subprocess.Popen(['x'], preexec_fn=f)",
    ],
)
def test_a_wait_without_a_limit_is_detected(source):
    assert missing_limit(ast.parse(source).body[0].value)
