"A real PostgreSQL server holds the studies of two processes, one of which is killed, and the runs of MLflow."

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import PATIENCE, finish, until
from fabricate import bars, make_run
from test_tuner import at_home, forks, home, process, states, tuner  # noqa: F401  fixtures

from modelfactory.runs.tracking import track_runs, tracking_store
from modelfactory.tuning.storage import live_trials

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.network]


def server_folder():
    "The folder of the newest server; Debian does not put it on the path."
    if program := shutil.which("initdb"):
        return Path(program).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((f.parent for f in folders), key=lambda folder: float(folder.parent.name), default=None)


@pytest.fixture(scope="module")
def server():
    "The address of a new server on a socket in a temporary folder; `{}` stands for the name of a database."
    programs = server_folder()
    if programs is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip("NOT CHECKED: studies and MLflow in PostgreSQL: needs the package postgresql and psycopg[binary]")
    user, is_root = "postgres", os.name == "posix" and os.geteuid() == 0
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if is_root else []
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # short, because the path of a socket is limited
    if is_root:
        shutil.chown(folder, user)

    def call(program, *arguments):
        command = [*as_user, str(programs / program), *map(str, arguments)]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=PATIENCE)

    try:
        call("initdb", "-D", folder / "data", "-U", user, "-A", "trust", "--no-sync")
        options = f"-c listen_addresses= -c fsync=off -k {folder}"
        call("pg_ctl", "start", "-w", "-D", folder / "data", "-l", folder / "log", "-o", options)
        try:
            for name in ("studies", "mlflow"):
                call("createdb", "-h", folder, "-U", user, name)
            yield f"postgresql+psycopg://{user}@/{{}}?host={folder}"
        finally:
            call("pg_ctl", "stop", "-m", "immediate", "-D", folder / "data")
    finally:
        shutil.rmtree(folder)


def stored_trials(storage):
    "Number -> value of the finished trials, and whether a trial is running; nothing before the study exists."
    import optuna

    try:
        (name,) = optuna.get_all_study_names(storage)
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    except Exception:
        return {}, False  # the tables are being created
    finished = {t.number: t.value for t in trials if t.state.name in ("COMPLETE", "PRUNED")}
    return finished, any(t.state.name == "RUNNING" for t in trials)


def test_two_processes_tune_one_study_and_one_is_killed(server, forks, home, tmp_path):  # noqa: F811
    storage, slow, n = server.format("studies"), dict(pause=0.04), 8
    victim = process(forks, home, storage, n, slow)
    until(lambda: len(stored_trials(storage)[0]) >= 1 or victim.poll() is not None, "a finished trial")
    survivor = process(forks, home, storage, n, slow)

    def both_are_busy():
        finished, is_running = stored_trials(storage)
        return len(finished) >= 2 and is_running

    until(both_are_busy, "a trial that is running")
    victim.kill()
    victim.wait(PATIENCE)
    before, _ = stored_trials(storage)
    out, err = finish(survivor)
    assert survivor.returncode == 0 and "done" in out, err
    result = tuner(home, storage, n, slow).run()
    after, is_running = stored_trials(storage)
    assert before.items() <= after.items() and not is_running
    assert len(result.trials) == n and set(states(result)) <= {"COMPLETE", "PRUNED"}
    assert {t.number for t in live_trials(result.study)} == {t.number for t in result.trials}


def test_mlflow_keeps_runs_in_postgres(server, tmp_path):
    table, uri = bars(), server.format("mlflow")
    for model in ("svm", "gru"):
        make_run(tmp_path, model, table)
    first, second = (track_runs(tmp_path, uri) for _ in range(2))
    assert (first.added, first.failed) == (2, {}) and (second.added, second.unchanged) == (0, 2)
    assert tracking_store(uri, tmp_path).file is None
