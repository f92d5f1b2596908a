"Runs that survive: faults injected into real processes, and what a person is told of them."

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, ROOT, finish, interruptible, until
from fabricate import bars, make_run

from modelfactory.configuration import ConfigError
from modelfactory.runs import engine
from modelfactory.runs.engine import RUN_ENV_VAR, Limits, run_notebook
from modelfactory.runs.executors import RayEngine
from modelfactory.runs.grid import grid_config, grid_status, plan_grid, run_grid
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import PARTIAL_FOLDER

PLUGIN = """
import os, signal, subprocess, sys, time
import numpy as np
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.classical.logistic_regression import LogisticRegressionConfig, LogisticRegressionModel
from dataclasses import dataclass

@dataclass
class FaultyConfig(LogisticRegressionConfig):
    fault: str = ""
    flag: str = ""

@ModelRegistry.register("faulty", family="examples")
class Faulty(LogisticRegressionModel):
    "Goes wrong in the way it is told to."
    Config = FaultyConfig
    def fit(self, *args, **kw):
        fault = self.config.fault
        if fault == "hang": time.sleep(3600)
        if fault == "grow":
            kept = []
            while True: kept.append(np.ones(4_000_000)); time.sleep(.02)
        if fault == "kill kernel": os.kill(os.getpid(), signal.SIGKILL)
        if fault == "children":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
            if self.config.flag: open(self.config.flag, "w").close()
            time.sleep(3600)
        if fault == "poison" or fault == "once" and not os.path.exists(self.config.flag):
            if self.config.flag: open(self.config.flag, "w").close()
            import psutil
            worker = psutil.Process(os.getppid()).parent()  # a kernel's parent is the run, and its parent the worker
            if "ray::" in " ".join(worker.cmdline()): worker.kill()  # else the worker is gone, and this its grandparent
        return super().fit(*args, **kw)
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(PLUGIN)
    monkeypatch.setenv("MODELFACTORY_PLUGINS", str(tmp_path / "faulty.py"))
    return lambda fault, **more: dict(
        model="faulty", horizon=5, data="planted", preset=None, config=dict(fault=fault) | more
    )


@pytest.fixture(autouse=True)
def marked(monkeypatch):
    "Processes of other tests, which run at the same time, are not ours."
    monkeypatch.setenv("ENGINE_TEST", uuid.uuid4().hex)


def ours():
    "Processes of this test's runs that are alive."
    found = []
    for p in psutil.process_iter():
        try:
            environment = p.environ()
            if (
                environment.get(RUN_ENV_VAR)
                and environment.get("ENGINE_TEST") == os.environ["ENGINE_TEST"]
                and p.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(p.pid)
        except (psutil.Error, OSError):
            pass
    return set(found)


def gone(before):
    "Whether no process of a run is left but those that were there before; they sleep for longer than this waits."
    return until(lambda: not ours() - before, "the processes of a run to end")


@pytest.mark.parametrize(
    "fault, limits, status, reason",
    [
        ("hang", Limits(seconds=9), "timeout", "not done after 9 s"),
        ("children", Limits(seconds=9), "timeout", "not done after 9 s"),
        ("grow", Limits(PATIENCE, memory_gb=0.9), "killed", "out of memory"),
        ("kill kernel", Limits(PATIENCE), "killed", "kernel died"),
    ],
)
def test_what_goes_wrong_is_named_and_leaves_no_process(faulty, tmp_path, fault, limits, status, reason):
    before = ours()
    outcome = run_notebook(faulty(fault), tmp_path / "runs", limits)
    assert outcome.status == status and reason in outcome.reason and (outcome.path / "run.log").is_file()
    assert json.loads((outcome.path / "outcome.json").read_text())["status"] == status
    assert (
        list_runs(tmp_path / "runs") == []
        and list((tmp_path / "runs" / PARTIAL_FOLDER).iterdir()) == []
        and gone(before)
    )


def test_a_kernel_that_does_not_start_is_tried_again_and_a_model_that_fails_is_not(tmp_path, monkeypatch):
    asked = []

    def attempt(said):
        def made(parameters, *args):
            asked.append(said)
            return engine.Outcome("x", "failed" if len(asked) < 3 else "ok", said)

        return made

    monkeypatch.setattr(engine, "_attempt", attempt("RuntimeError: Kernel died before replying to kernel_info"))
    assert run_notebook(dict(model="svm", horizon=5), tmp_path).status == "ok" and len(asked) == 3
    asked.clear()
    monkeypatch.setattr(engine, "_attempt", attempt("ValueError: C must be positive (cell 4)"))
    assert run_notebook(dict(model="svm", horizon=5), tmp_path).status == "failed" and len(asked) == 1


def test_stopping_ends_a_run_and_what_it_started(faulty, tmp_path):
    before, stop, flag = ours(), threading.Event(), tmp_path / "started"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            run_notebook, faulty("children", flag=str(flag)), tmp_path / "runs", Limits(PATIENCE), stop
        )
        until(lambda: flag.exists() or future.done(), "the run to start a process")
        stop.set()
        outcome = future.result(PATIENCE)
    assert outcome.status == "interrupted" and gone(before), outcome


GRID = "data: planted\nmodels: [logistic_regression]\nhorizons: [5, 20]\nseeds: [1, 2]\npreset: quick\n"


def start(tmp_path, *args):
    (tmp_path / "grid.yaml").write_text(GRID)
    command = [Path(sys.executable).with_name("modelfactory"), "experiment", tmp_path / "grid.yaml"]
    return interruptible([*command, "--output", tmp_path / "runs", *args], start_new_session=True)


def test_ctrl_c_stops_and_says_how_to_go_on(tmp_path):
    before, runner = ours(), start(tmp_path)
    until(lambda: ours() - before or runner.poll() is not None, "a run")
    runner.send_signal(signal.SIGINT)
    out, err = finish(runner)
    assert runner.returncode == 130 and "goes on where it stopped" in err and gone(before), out + err
    assert len(list_runs(tmp_path / "runs")) < 4, "it waited for all runs instead of ending them"


def test_a_killed_runner_takes_its_runs_with_it_and_the_next_one_goes_on(tmp_path):
    before, runner = ours(), start(tmp_path, "--workers", "1")

    def scored():
        return [run for run in list_runs(tmp_path / "runs") if run.scored]

    until(lambda: (tmp_path / "runs").is_dir() and scored() or runner.poll() is not None, "a run that is scored")
    kept = scored()[0].path
    runner.kill(), runner.wait(PATIENCE)
    assert gone(before)
    status = grid_status(tmp_path / "grid.yaml", tmp_path / "runs")
    assert status.count("done") >= 1 and status.count("running") == 0
    assert run_grid(tmp_path / "grid.yaml", tmp_path / "runs", timeout=PATIENCE).ok
    runs = list_runs(tmp_path / "runs")
    assert len(runs) == 4 and kept in [r.path for r in runs] and len({r.identity for r in runs}) == 4


def test_two_grids_on_one_folder_train_each_run_once(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    said = [finish(p)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert len(list_runs(tmp_path / "runs")) == 4


def test_a_process_that_does_not_end_after_its_run_is_published_is_ended(tmp_path, monkeypatch):
    "Such as one whose interpreter waits for a socket at its exit: the run is whole, and nobody waits for ever."
    runs, real = tmp_path / "runs", subprocess.Popen
    made = make_run(tmp_path / "made", "svm", bars(n=300)).path

    def publishes(command, env, **options):
        shutil.copytree(made, runs / env[RUN_ENV_VAR])
        shutil.rmtree(runs / PARTIAL_FOLDER / env[RUN_ENV_VAR])
        return real([sys.executable, "-c", "import time; time.sleep(3600)"], env=env, **options)

    monkeypatch.setattr(engine, "EXIT_SECONDS", 0)
    monkeypatch.setattr(engine.subprocess, "Popen", publishes)
    before = ours()
    outcome = run_notebook(dict(model="svm", horizon=5), runs, Limits(PATIENCE))
    assert outcome.status == "ok" and outcome.path.parent == runs and gone(before)


def test_a_corrupt_file_in_mid_grid_costs_its_own_runs(tmp_path):
    from modelfactory.data.bundled import resolve_data

    data = shutil.copytree(resolve_data("planted"), tmp_path / "data")
    jobs = plan_grid(grid_config(dict(data=str(data), models=["logistic_regression"], horizons=[5], preset="quick")))
    file = data / "train_scaled.parquet"
    file.write_bytes(file.read_bytes()[:-2000])
    outcome = run_notebook(jobs[0].parameters, tmp_path / "runs", Limits(PATIENCE))
    assert (
        outcome.status == "failed" and "train_scaled.parquet" in outcome.reason and list_runs(tmp_path / "runs") == []
    )


def test_a_runs_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file stands where the folder should be")
    command = [Path(sys.executable).with_name("modelfactory"), "train", "--model", "svm", "--horizon", "5"]
    options = dict(cwd=ROOT, capture_output=True, text=True)
    done = subprocess.run(
        [*command, "--data", "planted", "--output", str(tmp_path / "runs")], timeout=PATIENCE, **options
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def on_ray(grid, runs):
    "A grid on a real cluster of this machine, if Ray can start one within the half minute it gives itself."
    try:
        return run_grid(grid, runs, engine="ray", workers=1, timeout=PATIENCE)
    except ConfigError as e:
        if "timed out during startup" not in str(e):
            raise
        pytest.skip(f"NOT TRIED on Ray, which could not start on this busy machine: {e}")


def test_ray_gives_a_lost_worker_s_run_to_another(faulty, tmp_path, monkeypatch):
    "A real cluster of this machine, whose worker is killed in the middle of a run."
    monkeypatch.setenv("MODELFACTORY_PARAMS", str(tmp_path))
    flag = tmp_path / "once"
    grid = dict(
        data="planted",
        models=["faulty"],
        horizons=[5],
        seeds=[1],
        overrides=dict(faulty=dict(fault="once", flag=str(flag))),
    )
    result = on_ray(grid, tmp_path / "runs")
    assert result.count("ok") == 1 and flag.is_file() and len(list_runs(tmp_path / "runs")) == 1, result


def test_a_model_that_always_kills_its_worker_is_given_up_and_the_others_are_made(faulty, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELFACTORY_PARAMS", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/logistic_regression.yaml").write_text(
        "model_name: logistic_regression\nmodel_family: classical\n"
    )
    grid = dict(
        data="planted",
        models=["faulty", "logistic_regression"],
        horizons=[5],
        overrides=dict(faulty=dict(fault="poison")),
    )
    result = on_ray(grid, tmp_path / "runs")
    assert [(o.name.split()[0], o.status) for o in sorted(result, key=lambda o: o.name)] == [
        ("faulty", "killed"),
        ("logistic_regression", "ok"),
    ], result
    assert (
        "its worker was lost" in str(result)
        and "Traceback" not in str(result)
        and len(list_runs(tmp_path / "runs")) == 1
    )


class SlowRay:
    "Gives its start up `n_late` times, and leaves a process of it behind each time."

    def __init__(self, n_late, folder):
        self.n_late, self.started, self.program = n_late, [], folder / "ray/raylet"

    def init(self, **options):
        self.program.parent.mkdir(exist_ok=True)
        shutil.copy(shutil.which("sleep"), self.program)
        self.started.append(subprocess.Popen([self.program, "3600"]))
        if len(self.started) <= self.n_late:
            raise Exception("The current node timed out during startup.\nThis could ...")

    def remote(self, function):
        return function


@pytest.mark.parametrize("n_late, starts", [(0, 1), (2, 3), (99, 5)])
def test_a_cluster_that_is_slow_to_start_is_tried_again_and_leaves_no_process(tmp_path, monkeypatch, n_late, starts):
    ray = SlowRay(n_late, tmp_path)
    monkeypatch.setattr("modelfactory.runs.executors._ray", lambda: ray)
    try:
        if n_late < 99:
            assert RayEngine().ray is ray
        else:
            with pytest.raises(ConfigError, match="no cluster at this machine .*timed out during startup.*$"):
                RayEngine()
        assert len(ray.started) == starts
        late = ray.started[:n_late]
        assert [p.wait(PATIENCE) for p in late] == [-signal.SIGKILL] * len(late)
        assert all(p.poll() is None for p in ray.started[n_late:]), "the cluster that did start"
    finally:
        for p in ray.started:
            p.kill()


def test_nothing_of_ray_is_imported_with_the_local_engine():
    code = "import modelfactory.runs.grid, sys; print('ray' in sys.modules)"
    options = dict(capture_output=True, text=True, cwd="/")
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE, **options).stdout.strip() == "False"


def test_an_address_without_a_cluster_is_one_line():
    with pytest.raises(ValueError, match="no cluster at"):
        RayEngine("127.0.0.1:1")
