"Tests wait for events, each with a limit; what hangs all the same is ended, named, and does not stop the others."

import ast
import re
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT

HANGS = """
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


def test_a_lock():
    with ThreadPoolExecutor(1) as pool: pool.submit(threading.Event().wait).result()


def test_a_search_that_holds_the_interpreter(): re.match("(a+)+$", "a" * 60 + "b")


@pytest.fixture
def never_done():
    yield
    threading.Event().wait()


def test_a_fixture_after_a_failure(never_done): assert False


@pytest.mark.parametrize("i", range(9))
def test_quick(i): pass
"""


def test_what_hangs_is_ended_and_named_and_the_others_go_on(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", "faulthandler_timeout=3", "-n", "2"]
    command = [sys.executable, "-m", "pytest", *options, "--dist", "worksteal", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "9 passed" in done.stdout, done.stdout + done.stderr
    for name in ("test_a_lock", "test_a_search_that_holds_the_interpreter", "test_a_fixture_after_a_failure"):
        assert f"crashed while running 'test_hangs.py::{name}'" in done.stdout
        assert 'test_hangs.py", line' in done.stderr, "the stacks of the threads"


def without_limit(call):
    "What is wrong with a call that waits; empty when nothing is."
    name, given = ast.unparse(call.func), {k.arg for k in call.keywords}
    method, limited = name.rpartition(".")[2], bool(call.args) or "timeout" in given
    if name == "time.sleep":
        return "waits for a time: wait for an event, by conftest.until"
    if "preexec_fn" in given:
        return "may hang before the process starts: see conftest.interruptible"
    if re.fullmatch(r"subprocess\.(run|call|check_\w+)", name) and "timeout" not in given:
        return "has no timeout"
    if method == "FileLock" and "timeout" not in given:
        return "has no timeout"
    if method in ("wait", "communicate", "result", "join", "acquire") and not limited:
        return "has no limit"
    return "has no limit" if method in ("readline", "waitpid", "as_completed") else ""


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda f: f.stem)
def test_nothing_is_waited_for_without_a_limit(file):
    calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
    wrong = [f"line {c.lineno}: {ast.unparse(c.func)} {why}" for c in calls if (why := without_limit(c))]
    if file.stem == "conftest":
        wrong = [w for w in wrong if "time.sleep" not in w]  # the one that looks again and again
    assert wrong == []


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
def test_a_wait_without_a_limit_is_seen(source):
    assert without_limit(ast.parse(source).body[0].value)
