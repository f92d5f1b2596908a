"Several containers and users on one runs folder: real PID namespaces, a hidden /proc, and a second user."

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache

import psutil
import pytest
from conftest import PATIENCE, ROOT, finish, read_line, until

from modelfactory.configuration import SettingsError, ignored_variables, settings
from modelfactory.runs import environment, executors, run_folder
from modelfactory.runs.engine import MAX_SOCKET_BYTES, socket_folder
from modelfactory.runs.run_folder import PARTIAL_FOLDER, STALE_SECONDS, clear_partial, is_alive, start_attempt

pytestmark = [pytest.mark.faults, pytest.mark.slow]

CONTAINER = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
HOLD = """
import sys, time
from pathlib import Path
from modelfactory.runs.run_folder import start_attempt
print(start_attempt(Path(sys.argv[1]), dict(model="svm", horizon=5)), flush=True)
time.sleep(10_000)
"""
CLEAR = """
import sys
import tempfile
from pathlib import Path
from modelfactory.runs.run_folder import clear_partial
print(clear_partial(Path(sys.argv[1])))
"""


@cache
def require(*command):
    "Skips a test, in words, where the system does not permit a command."
    is_installed = os.name == "posix" and shutil.which(command[0]) is not None
    if not is_installed or subprocess.run([*command, "true"], timeout=PATIENCE).returncode:
        pytest.skip(f"NOT CHECKED: this system does not permit `{' '.join(command)}`")


def python(code, *arguments, within=(), **options):
    "Starts Python code in the environment of this process, within a command such as `unshare`."
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    command = [*within, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


@pytest.fixture
def container(tmp_path):
    "An attempt in a container, and the container, which ends after the test."
    require(*CONTAINER)
    process = python(HOLD, tmp_path, within=CONTAINER)
    yield tmp_path / PARTIAL_FOLDER / os.path.basename(read_line(process).strip()), process
    process.kill()
    process.wait(PATIENCE)


def make_old(file):
    os.utime(file, (time.time() - STALE_SECONDS - 1,) * 2)


def test_an_attempt_in_a_container_is_kept_by_others_until_it_is_killed(container, tmp_path):
    attempt, process = container
    make_old(attempt / "pid")
    until(lambda: is_alive(attempt), "the container to update the file")
    assert clear_partial(tmp_path) == []
    out, _ = finish(python(CLEAR, tmp_path, within=CONTAINER))
    assert out == "[]\n" and (attempt / "pid").is_file()

    inside = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # --kill-child ends the container with it
    process.wait(PATIENCE)
    assert not psutil.wait_procs(inside, PATIENCE)[1]
    assert is_alive(attempt)  # its process cannot be seen from here, so its file decides
    make_old(attempt / "pid")
    out, _ = finish(python(CLEAR, tmp_path, within=CONTAINER))
    assert out == f"[{attempt.name!r}]\n" and not attempt.exists()


def test_containers_with_equal_process_ids_do_not_take_each_other_for_dead(container, tmp_path):
    "The first process of both containers is 1, and neither process runs in the namespace of this test."
    first, _ = container
    second = python(HOLD, tmp_path, within=CONTAINER)
    try:
        other = tmp_path / PARTIAL_FOLDER / os.path.basename(read_line(second).strip())
        ids = [(attempt / "pid").read_text().split()[0] for attempt in (first, other)]
        assert ids[0] == ids[1]
        assert clear_partial(tmp_path) == [] and first.is_dir() and other.is_dir()
    finally:
        second.kill()
        second.wait(PATIENCE)


def test_an_attempt_that_is_not_in_a_container_is_kept_by_a_container(tmp_path):
    require(*CONTAINER)
    attempt = start_attempt(tmp_path, dict(model="svm", horizon=5))
    assert finish(python(CLEAR, tmp_path, within=CONTAINER))[0] == "[]\n"
    assert attempt.is_dir()


@pytest.mark.parametrize("hidepid", [1, 2])
def test_an_attempt_of_a_user_whose_processes_are_hidden_is_kept(hidepid, tmp_path):
    user = pwd.getpwnam("nobody")
    as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    require(*as_user)
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -o remount,hidepid={hidepid} /proc && exec "$@"', "sh"]
    require(*hidden)
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    attempt = start_attempt(shared, dict(model="svm", horizon=5))
    code = "import sys; from pathlib import Path; from modelfactory.runs.run_folder import is_alive; "
    code += "print(is_alive(Path(sys.argv[1])))"
    within = [*hidden, *as_user]
    assert finish(python(code, attempt, within=within))[0] == "True\n"


def test_an_attempt_without_a_file_pid_is_kept_while_it_is_new(tmp_path):
    "It has just been created, or is about to be published."
    attempt = start_attempt(tmp_path, dict(model="svm", horizon=5))
    (attempt / "pid").unlink()
    assert is_alive(attempt) and clear_partial(tmp_path) == []
    make_old(attempt)
    assert not is_alive(attempt) and clear_partial(tmp_path) == [attempt.name]
    assert not is_alive(attempt)


def test_the_clock_of_the_file_system_decides(tmp_path, monkeypatch):
    "The clocks of two machines on a network folder may differ by more than `STALE_SECONDS`."
    attempt = start_attempt(tmp_path, dict(model="svm", horizon=5))
    (attempt / "pid").write_text("1 0 elsewhere")
    now = time.time()
    monkeypatch.setattr(run_folder.time, "time", lambda: now + 3600)
    assert is_alive(attempt) and clear_partial(tmp_path) == []


def test_an_attempt_is_updated_until_its_file_is_replaced(tmp_path):
    before = set(threading.enumerate())
    file = start_attempt(tmp_path, dict(model="svm", horizon=5)) / "pid"
    (thread,) = set(threading.enumerate()) - before
    make_old(file)
    until(lambda: time.time() - file.stat().st_mtime < STALE_SECONDS, "the update of the file")
    assert thread.is_alive()
    file.write_text("1 0 elsewhere")
    until(lambda: not thread.is_alive(), "the end of the updates")


def test_variables_of_kubernetes_are_ignored_and_reported_and_others_are_errors(monkeypatch):
    "Kubernetes sets them in each container beside a service named modelfactory or modelfactory-lab."
    before = settings()
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR")
    for name in (*names, "LAB_SERVICE_HOST", "LAB_PORT_8888_TCP_PROTO"):
        monkeypatch.setenv(f"MODELFACTORY_{name}", "tcp://10.0.0.1:80")
    assert settings() == before and "LAB_PORT_8888_TCP_PROTO and 7 more" in ignored_variables()
    (finding,) = environment._variables()
    assert finding.state == "warn" and "enableServiceLinks" in finding.fix
    monkeypatch.setenv("MODELFACTORY_SERVICE", "1")
    with pytest.raises(SettingsError, match="service"):
        settings()


@pytest.mark.parametrize("length", [60, 87, 88, 200])
def test_a_long_temporary_folder_leaves_room_for_sockets(length, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/".ljust(length, "x"))
    path = f"{socket_folder(len('/mf01234567/kernel'))}/mf01234567/kernel"
    assert len(path) <= MAX_SOCKET_BYTES
    assert path.startswith("/tmp/") == (length > 82)


def job_on_worker(root, worker, tmp_path, monkeypatch):
    "What a worker passes to `run_job`: its working folder, the environment, the data and the runs folder."
    seen = {}

    def run_job(job, runs, limits, stop, force):
        seen.update(cwd=os.getcwd(), data=job.parameters["data"], runs=str(runs), storage=os.environ["HF_HOME"])
        return executors.Outcome(job.title, "ok", path=runs / "svm_h5")

    monkeypatch.setattr(executors, "run_job", run_job)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", "")
    if worker:
        monkeypatch.setenv("MODELFACTORY_SETTINGS", str(worker / "settings.ini"))
    job = executors.Job(dict(model="svm", horizon=5, data=f"{root}/data"), "identity")
    environment = dict(HF_HOME=f"{root}/models", MODELFACTORY_SETTINGS=f"{root}/settings.ini")
    monkeypatch.setenv("MODELFACTORY_SETTINGS", os.environ.get("MODELFACTORY_SETTINGS", ""))
    outcome = executors._run_on_worker(
        (root, root), environment, job, f"{root}/runs", executors.NO_LIMITS, False, False
    )
    return outcome, seen


def test_a_worker_moves_the_paths_of_a_job_into_its_own_mount_of_the_project(tmp_path, monkeypatch):
    mount = tmp_path / "mount"
    mount.mkdir()
    outcome, seen = job_on_worker("/home/ann/project", mount, tmp_path, monkeypatch)
    parts = dict(data="data", runs="runs", storage="models")
    assert seen == dict(cwd=str(mount)) | {k: str(mount / v) for k, v in parts.items()}
    assert str(outcome.path) == "/home/ann/project/runs/svm_h5"


def test_a_worker_without_the_project_says_how_to_mount_it(tmp_path, monkeypatch):
    outcome, seen = job_on_worker("/home/ann/project", None, tmp_path, monkeypatch)
    assert outcome.status == "failed" and "MODELFACTORY_SETTINGS on the worker" in outcome.reason and not seen
