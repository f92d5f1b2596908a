"Two containers run one grid on one runs folder, and one of them is killed: real PID namespaces, real runs."

import json
import os
import subprocess
import sys

import psutil
import pytest
from conftest import PATIENCE, ROOT, finish, until
from fabricate import bars, make_run
from quick import quick_models, small_splits
from test_contained import CONTAINER, make_old, require

from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import FAILED_FOLDER, PARTIAL_FOLDER, clear_partial

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture
def start(tmp_path):
    "A function that starts the grid in a new container, with seeds in an order; all containers end after the test."
    require(*CONTAINER)
    grid = dict(data=[str(small_splits(tmp_path / "data"))], models=["faulty"], horizons=[5], seeds=[0, 1])
    grid["overrides"] = dict(faulty=dict(fault="rounds", flag=str(tmp_path / "flag")))
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    variables = dict(PLUGINS=quick_models(tmp_path), TRACKING="")
    environment = os.environ | dict(PYTHONPATH=str(ROOT)) | {f"MODELFACTORY_{k}": v for k, v in variables.items()}
    command = [*CONTAINER, sys.executable, "-m", "modelfactory", "experiment", "grid.yaml", "--output", "runs"]
    started = []

    def start(seeds):
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment)
        started.append(subprocess.Popen([*command, "--workers", "1", "--seeds", seeds], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        finish(process)


def attempt_of(container, runs):
    "The attempt on which a container works; None if there is none. Fails if the container has ended."
    assert container.poll() is None, container.communicate(timeout=PATIENCE)
    for child in psutil.Process(container.pid).children():
        namespace = os.stat(f"/proc/{child.pid}/ns/pid").st_ino
        for file in (runs / PARTIAL_FOLDER).glob("faulty_*/pid"):
            if file.read_text().endswith(f"/{namespace}"):
                return file.parent
    return None


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_each_run_is_trained_once_though_one_of_two_containers_is_killed(start, tmp_path):
    "A fit lasts until the file `flag` exists, so both containers train when the first one is killed."
    runs = tmp_path / "runs"
    earlier = make_run(runs, "svm", bars()).path
    before = contents(earlier)
    victim, survivor = start("0,1"), start("1,0")
    attempt = until(lambda: attempt_of(victim, runs), "the first container to train")
    until(lambda: attempt_of(survivor, runs), "the second container to train")
    victim.kill()
    finish(victim)
    (tmp_path / "flag").touch()
    output, _ = finish(survivor)
    assert survivor.returncode == 0 and "2 done" in output, output

    stored = list_runs(runs)
    assert sorted(run.seed for run in stored if run.path != earlier) == [0, 1]
    assert len(stored) == 3 and all(run.scored for run in stored) and contents(earlier) == before
    assert not (runs / FAILED_FOLDER).exists()

    assert [folder.name for folder in (runs / PARTIAL_FOLDER).glob("faulty_*")] == [attempt.name]
    make_old(attempt / "pid")  # the processes of a container cannot be seen from outside, so the last update decides
    assert clear_partial(runs) == [attempt.name]
