"Faults are injected into real processes of runs; outcomes, messages and leftover processes are checked."

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

import nbformat
import psutil
import pytest
from conftest import PATIENCE, ROOT, finish, interruptible, until
from fabricate import bars, make_run
from quick import quick_models, small_splits

from modelfactory.configuration import ConfigError
from modelfactory.runs import engine
from modelfactory.runs.engine import RUN_ENV_VAR, Limits, run_notebook
from modelfactory.runs.executors import RayEngine
from modelfactory.runs.grid import grid_config, grid_status, plan_grid, run_grid
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import PARTIAL_FOLDER

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture
def faulty(data):
    return lambda fault, **more: dict(
        model="faulty", horizon=5, data=str(data), preset=None, config=dict(fault=fault) | more
    )


@pytest.fixture(autouse=True)
def process_mark(monkeypatch, tmp_path_factory):
    "Marks the processes of this test, since other tests run at the same time, and adds the models of the tests."
    monkeypatch.setenv("ENGINE_TEST", uuid.uuid4().hex)
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path_factory.mktemp("models")))


def run_processes():
    "Numbers of the living processes of this test's runs."
    pids = set()
    for p in psutil.process_iter():
        try:
            environment = p.environ()
            is_own = environment.get(RUN_ENV_VAR) and environment.get("ENGINE_TEST") == os.environ["ENGINE_TEST"]
            if is_own and p.status() != psutil.STATUS_ZOMBIE:
                pids.add(p.pid)
        except (psutil.Error, OSError):
            pass
    return pids


def all_ended(before):
    "Waits until no process of a run is alive except those in `before`; a leftover process would sleep longer."
    return until(lambda: not run_processes() - before, "the processes of a run to end")


@pytest.mark.parametrize(
    "fault, limits, status, reason",
    [
        ("hang", Limits(seconds=9), "timeout", "not done after 9 s"),
        ("children", Limits(seconds=9), "timeout", "not done after 9 s"),
        ("grow", Limits(PATIENCE, memory_gb=0.9), "killed", "out of memory"),
        ("kill kernel", Limits(PATIENCE), "killed", "kernel died"),
    ],
)
def test_a_fault_is_reported_and_no_process_remains(faulty, tmp_path, fault, limits, status, reason):
    before = run_processes()
    outcome = run_notebook(faulty(fault), tmp_path / "runs", limits)
    assert outcome.status == status and reason in outcome.reason and (outcome.path / "run.log").is_file()
    assert json.loads((outcome.path / "outcome.json").read_text())["status"] == status
    assert list_runs(tmp_path / "runs") == [] and list((tmp_path / "runs" / PARTIAL_FOLDER).iterdir()) == []
    assert all_ended(before)


def test_a_failed_kernel_start_is_repeated_and_a_failed_model_is_not(tmp_path, monkeypatch):
    reasons = []

    def attempt_with(reason):
        def attempt(parameters, *args):
            reasons.append(reason)
            return engine.Outcome("x", "failed" if len(reasons) < 3 else "ok", reason)

        return attempt

    monkeypatch.setattr(engine, "_attempt", attempt_with("RuntimeError: Kernel died before replying to kernel_info"))
    assert run_notebook(dict(model="svm", horizon=5), tmp_path).status == "ok" and len(reasons) == 3
    reasons.clear()
    monkeypatch.setattr(engine, "_attempt", attempt_with("ValueError: C must be positive (cell 4)"))
    assert run_notebook(dict(model="svm", horizon=5), tmp_path).status == "failed" and len(reasons) == 1


def test_stop_ends_a_run_and_its_child_processes(faulty, tmp_path):
    before, stop, flag = run_processes(), threading.Event(), tmp_path / "started"
    parameters = faulty("children", flag=str(flag))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_notebook, parameters, tmp_path / "runs", Limits(PATIENCE), stop)
        until(lambda: flag.exists() or future.done(), "the run to start a process")
        stop.set()
        outcome = future.result(PATIENCE)
    assert outcome.status == "interrupted" and all_ended(before), outcome


def start(tmp_path, data, seeds, *args):
    "Starts a grid with one run for each seed."
    (tmp_path / "grid.yaml").write_text(f"data: {data}\nmodels: [nearest]\nhorizons: [5]\nseeds: {seeds}\n")
    command = [Path(sys.executable).with_name("modelfactory"), "experiment", tmp_path / "grid.yaml"]
    return interruptible([*command, "--output", tmp_path / "runs", *args], start_new_session=True)


def test_ctrl_c_ends_a_grid_and_prints_how_to_continue(tmp_path, data):
    before, runner = run_processes(), start(tmp_path, data, [1, 2, 3])
    until(lambda: run_processes() - before or runner.poll() is not None, "a run")
    runner.send_signal(signal.SIGINT)
    out, err = finish(runner)
    assert runner.returncode == 130 and "run the same command again" in err and all_ended(before), out + err
    assert len(list_runs(tmp_path / "runs")) < 3, "the runner waited for all runs"


def test_runs_of_a_killed_runner_end_and_the_next_grid_completes_them(tmp_path, data):
    "One run is complete when the runner is killed, and the other one is under way."
    before, runner = run_processes(), start(tmp_path, data, [1, 2], "--workers", "1")

    def scored():
        return [run for run in list_runs(tmp_path / "runs") if run.scored]

    until(lambda: (tmp_path / "runs").is_dir() and scored() or runner.poll() is not None, "a run that is scored")
    first_run = scored()[0].path
    runner.kill()
    runner.wait(PATIENCE)
    assert all_ended(before)
    status = grid_status(tmp_path / "grid.yaml", tmp_path / "runs")
    assert status.count("done") >= 1 and status.count("running") == 0
    assert run_grid(tmp_path / "grid.yaml", tmp_path / "runs", timeout=PATIENCE).ok
    runs = list_runs(tmp_path / "runs")
    assert len(runs) == 2 and len({r.identity for r in runs}) == 2 and first_run in [r.path for r in runs]


def test_two_grids_in_one_folder_train_each_run_once(tmp_path, data):
    grids = [start(tmp_path, data, [1, 2]) for _ in range(2)]
    outputs = [finish(grid)[0] for grid in grids]
    assert [grid.returncode for grid in grids] == [0, 0], outputs
    assert len(list_runs(tmp_path / "runs")) == 2


def test_a_process_that_does_not_exit_after_publishing_is_ended(tmp_path, monkeypatch):
    "Such as a process whose interpreter waits for a socket at its exit; the run is complete."
    runs, real = tmp_path / "runs", subprocess.Popen
    made = make_run(tmp_path / "made", "svm", bars(n=300)).path

    def publishes(command, env, **options):
        shutil.copytree(made, runs / env[RUN_ENV_VAR])
        shutil.rmtree(runs / PARTIAL_FOLDER / env[RUN_ENV_VAR])
        return real([sys.executable, "-c", "import time; time.sleep(3600)"], env=env, **options)

    monkeypatch.setattr(engine, "EXIT_SECONDS", 0)
    monkeypatch.setattr(engine.subprocess, "Popen", publishes)
    before = run_processes()
    outcome = run_notebook(dict(model="svm", horizon=5), runs, Limits(PATIENCE))
    assert outcome.status == "ok" and outcome.path.parent == runs and all_ended(before)


def test_a_file_that_becomes_corrupt_after_planning_fails_its_run(tmp_path, data):
    copy = shutil.copytree(data, tmp_path / "data")
    jobs = plan_grid(grid_config(dict(data=str(copy), models=["nearest"], horizons=[5])))
    file = copy / "train_scaled.parquet"
    file.write_bytes(file.read_bytes()[:-2000])
    outcome = run_notebook(jobs[0].parameters, tmp_path / "runs", Limits(PATIENCE))
    assert outcome.status == "failed" and "train_scaled.parquet" in outcome.reason
    assert list_runs(tmp_path / "runs") == []


def test_a_runs_folder_that_cannot_be_written_is_a_one_line_error(tmp_path):
    (tmp_path / "runs").write_text("a file in place of the folder")
    command = [Path(sys.executable).with_name("modelfactory"), "train", "--model", "svm", "--horizon", "5"]
    command += ["--data", "planted", "--output", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def on_ray(grid, runs):
    "A grid on a real cluster of this machine; skips the test if Ray cannot start one within its limit of 30 s."
    try:
        return run_grid(grid, runs, engine="ray", workers=1, timeout=PATIENCE)
    except ConfigError as e:
        if "timed out during startup" not in str(e):
            raise
        pytest.skip(f"NOT TRIED: Ray could not start on this busy machine: {e}")


def test_ray_repeats_the_run_of_a_lost_worker_and_gives_up_a_model_that_always_kills_it(tmp_path, data, monkeypatch):
    "Workers of a real cluster are killed: by each run of one model, by the first run of another, never by a third."
    monkeypatch.setenv("MODELFACTORY_PARAMS", str(tmp_path))
    flag = tmp_path / "once"
    faults = dict(faulty=dict(fault="poison"), faulty_once=dict(fault="once", flag=str(flag)))
    models = [*faults, "nearest"]
    result = on_ray(dict(data=str(data), models=models, horizons=[5], overrides=faults), tmp_path / "runs")
    statuses = {o.name.split()[0]: o.status for o in result}
    assert len(result) == 3 and statuses == dict(faulty="killed", faulty_once="ok", nearest="ok"), result
    assert "its worker was lost" in str(result) and "Traceback" not in str(result) and flag.is_file()
    assert sorted(r.manifest["model"] for r in list_runs(tmp_path / "runs")) == ["faulty_once", "nearest"]


class SlowRay:
    "A stand-in for ray: its start fails `n_late` times, and each start leaves a process."

    def __init__(self, n_late, folder):
        self.n_late, self.started, self.program = n_late, [], folder / "ray/raylet"

    def init(self, **options):
        if not self.program.exists():  # a program that a process still executes cannot be written
            self.program.parent.mkdir()
            shutil.copy(shutil.which("sleep"), self.program)
        self.started.append(subprocess.Popen([self.program, "3600"]))
        if len(self.started) <= self.n_late:
            raise Exception("The current node timed out during startup.\nThis could ...")

    def remote(self, function):
        return function


@pytest.mark.parametrize("n_late, starts", [(0, 1), (2, 3), (99, 5)])
def test_a_slow_cluster_start_is_repeated_and_leaves_no_process(tmp_path, monkeypatch, n_late, starts):
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
        assert all(p.poll() is None for p in ray.started[n_late:]), "the cluster that started was killed"
    finally:
        for p in ray.started:
            p.kill()


@pytest.mark.parametrize("is_on_path", [True, False])
def test_a_kernel_imports_only_from_folders_of_pythonpath_and_does_not_report_its_own_interruption(
    tmp_path, is_on_path
):
    (tmp_path / "beside.py").write_text("")
    parameters = nbformat.v4.new_code_cell("x = 0", metadata=dict(tags=["parameters"]))
    check = nbformat.v4.new_code_cell(
        "import importlib.util\nassert bool(importlib.util.find_spec('beside')) == bool(x)"
    )
    logged = nbformat.v4.new_code_cell(
        "import logging\nlog = logging.getLogger('IPKernelApp')\n"
        "log.error('KeyboardInterrupt caught in kernel.')\nlog.error('another error')"
    )
    metadata = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    cells = [parameters, check, logged]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "in.ipynb")
    call = f"execute_notebook('in.ipynb', 'out.ipynb', dict(x={is_on_path:d}))"
    code = f"from modelfactory.runs.engine import execute_notebook; {call}"
    path = [str(tmp_path)] * is_on_path + [os.environ.get("PYTHONPATH", str(ROOT))]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(path))
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-P", "-c", code], timeout=PATIENCE, **options)
    assert done.returncode == 0
    assert "another error" in done.stderr and "KeyboardInterrupt" not in done.stderr


def test_a_grid_is_planned_and_started_without_the_slow_grammar_of_addresses():
    "jsonschema would build it when papermill is imported: five seconds of CPU time for each command."
    code = "from modelfactory.runs.engine import check_parameters, find_notebook; import sys; "
    code += "check_parameters(find_notebook('train.ipynb'), dict(model='svm')); "
    code += "print('jsonschema' in sys.modules, 'rfc3987_syntax' in sys.modules)"
    options = dict(capture_output=True, text=True, cwd="/")
    output = subprocess.run([sys.executable, "-c", code], timeout=PATIENCE, **options).stdout
    assert output == "True False\n"


def test_papermill_is_imported_without_a_grammar_of_addresses_that_is_installed(tmp_path):
    "The tested version of jsonschema does not import it, later ones do: stub modules stand for both."
    (tmp_path / "rfc3987_syntax.py").write_text("")
    stub = "try:\n    import rfc3987_syntax\nexcept ImportError:\n    print('not imported')\n"
    (tmp_path / "papermill.py").write_text(stub)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    code += "from modelfactory.runs.engine import import_papermill; import_papermill()"
    options = dict(capture_output=True, text=True, cwd="/")
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE, **options).stdout == "not imported\n"


def test_the_local_engine_does_not_import_ray():
    code = "import modelfactory.runs.grid, sys; print('ray' in sys.modules)"
    options = dict(capture_output=True, text=True, cwd="/")
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE, **options).stdout.strip() == "False"


def test_an_address_without_a_cluster_is_an_error():
    with pytest.raises(ValueError, match="no cluster at"):
        RayEngine("127.0.0.1:1")
