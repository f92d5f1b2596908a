"Runs in real processes: killed at random moments, with a model from outside the package, failing next to others."

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, finish, interruptible, until
from quick import quick_models, small_bundled, small_splits

from modelfactory.cli import main
from modelfactory.runs.engine import Limits, run_notebook
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import PARTIAL_FOLDER, clear_partial, is_alive

pytestmark = [pytest.mark.faults, pytest.mark.slow]

MODELFACTORY = Path(sys.executable).with_name("modelfactory")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture
def parameters(data, monkeypatch, tmp_path_factory):
    "Parameters of a run of a few seconds."
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path_factory.mktemp("models")))
    return dict(model="nearest", horizon=5, data=str(data), preset=None)


def call(*args, cwd=ROOT, **env):
    command, options = [MODELFACTORY, *map(str, args)], dict(capture_output=True, text=True)
    return subprocess.run(command, cwd=cwd, env=os.environ | env, timeout=PATIENCE, **options)


def under_way(runs, starter, seed=None):
    "Number of the process and folder of a run, from its file `pid`; None before the run has its own process."
    for attempt in (runs / PARTIAL_FOLDER).glob("*"):
        try:
            job, pid = json.loads((attempt / "job.json").read_text()), int((attempt / "pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            continue
        if pid != starter and seed in (None, job["parameters"].get("seed")):
            return pid, attempt


def kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


STAGES = [  # in the order in which a run writes them
    *("pid", "train.ipynb", "checkpoints", "manifest.json"),
    *("predictions", "metrics/metrics.json", "plots", "no such file"),
]


def test_sigkill_at_any_moment_leaves_complete_runs_or_none(tmp_path, parameters):
    """Runs that are killed when a certain file exists or shortly after, from the start of the process to its end.

    The delays are stratified: one is in each eighth of 0.3 s."""
    rng = random.Random(7)
    delays = [0.3 * (part + rng.random()) / len(STAGES) for part in rng.sample(range(len(STAGES)), len(STAGES))]

    def killed(i):
        runs, stage, delay = tmp_path / f"runs_{i % 2}", STAGES[i], delays[i]

        def reached():
            "Whether the file is in the attempt, in the folder that will be published, or in the run."
            if not (run := under_way(runs, os.getpid(), i)):
                return False
            return any((folder / stage).exists() for folder in (run[1], run[1] / run[1].name, runs / run[1].name))

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run_notebook, parameters | dict(seed=i), runs, Limits(PATIENCE, threads=1))
            until(lambda: reached() or future.done(), f"{stage} of run {i}")
            wait([future], delay)
            if run := under_way(runs, os.getpid(), i):
                kill_group(run[0])
            return future.result(PATIENCE).status

    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(killed, range(len(STAGES))))
    folders = [tmp_path / f"runs_{k}" for k in (0, 1)]
    visible = [f for runs in folders for f in runs.iterdir() if not f.name.startswith(".")]
    n_published = statuses.count("ok") + statuses.count("not scored")
    assert len(visible) == sum(len(list_runs(runs)) for runs in folders) == n_published
    for folder in visible:
        load_run(folder).verify()
        load_run(folder).model()
    assert statuses.count("killed") + statuses.count("not scored") >= 4, statuses


def test_the_attempt_of_a_killed_runner_is_removed_later(tmp_path, parameters):
    code = f"from modelfactory.runs.engine import run_notebook; run_notebook({parameters!r}, {str(tmp_path)!r})"
    runner = interruptible([sys.executable, "-c", code], start_new_session=True)
    run = until(lambda: under_way(tmp_path, runner.pid) or runner.poll() is not None, "the process of the run")
    assert run is not True, finish(runner)
    process, attempt = run
    runner.kill()
    runner.wait(PATIENCE)
    kill_group(process)
    until(lambda: not is_alive(attempt), "the killed run to end")
    assert list_runs(tmp_path) == [] and clear_partial(tmp_path) == [attempt.name]
    assert list((tmp_path / PARTIAL_FOLDER).iterdir()) == []


def test_a_model_from_outside_the_package(tmp_path, data, monkeypatch):
    "`new` writes a model into a separate folder, and a grid trains it; no file of the package changes."
    package_files = [f for folder in ("modelfactory", "nbs", "params") for f in (ROOT / folder).rglob("*")]
    before = {}
    for f in package_files:
        if f.is_file() and f.suffix in (".py", ".ipynb", ".yaml"):
            before[f] = sha256(f.read_bytes()).hexdigest()
    made = call("new", "mymodel", "--family", "myfamily", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "grid.yaml").write_text(f"data: {data}\nmodels: [mymodel, lightgbm]\nhorizons: [5]\npreset: quick\n")
    done = call("experiment", "grid.yaml", "--compare", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/model_comparison.html").is_file() and "model_comparison.html" in done.stdout
    runs = list_runs(tmp_path / "runs")
    assert {r.manifest["model"] for r in runs} == {"mymodel", "lightgbm"}
    run = next(r for r in runs if r.manifest["model"] == "mymodel")
    assert run.family == "myfamily" and (run.path / "train.ipynb").is_file()
    assert "mymodel" in call("models", cwd=tmp_path).stdout
    assert before == {f: sha256(f.read_bytes()).hexdigest() for f in before}


@pytest.fixture(scope="module")
def grid(tmp_path_factory, data):
    "The folder of a tracked grid in which one of two models cannot be trained, and the result of the command."
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(
        f"data: {data}\nmodels: [svm, lightgbm]\nhorizons: [5]\npreset: quick\n"
        "overrides: {svm: {exact: true, max_exact_rows: 10}}\n"
    )
    return folder, call("experiment", folder / "grid.yaml", "--output", folder / "runs", MODELFACTORY_TRACKING="sqlite")


def test_a_failed_run_does_not_stop_the_others(grid):
    folder, done = grid
    assert done.returncode == 1 and "1 done, 1 failed" in done.stdout.replace("1 failed, 1 done", "1 done, 1 failed")
    assert "at most 10" in done.stdout and len(list_runs(folder / "runs")) == 1
    assert (folder / "runs/mlflow.db").is_file(), "the grid was not tracked"


def test_a_run_is_not_trained_twice_and_is_reproduced_from_its_config(grid, data, tmp_path):
    (folder, first), again = grid, tmp_path / "again.yaml"
    again.write_text(f"data: {data}\nmodels: [lightgbm]\nhorizons: [5]\npreset: quick\n")
    second = call("experiment", again, "--output", folder / "runs")
    status = call("status", again, "--horizons", "5,20", "--output", folder / "runs")
    assert "1 done, 1 waiting" in status.stdout
    assert "1 done" in first.stdout and second.returncode == 0 and "1 skipped" in second.stdout
    (run,) = list_runs(folder / "runs")
    from modelfactory.training.trainer import Trainer

    trainer = Trainer(run.path / "config.yaml")
    trainer.run_full_pipeline()
    stored = run.predictions()[["p_down", "p_flat", "p_up"]].to_numpy()
    assert (trainer.predictions["val"].probabilities == stored).all()
    assert trainer.metrics["val"]["sharpe_net"] == pytest.approx(run.metrics["sharpe_net"])


def test_train_and_predict_by_command(tmp_path, data):
    task = f"--model xgboost --horizon 5 --data {data} --preset quick --set n_rounds=20".split()
    done = call("train", *task, "--output", tmp_path / "runs", "--test")
    assert done.returncode == 0, done.stderr
    run = list_runs(tmp_path / "runs")[0]
    assert run.config["config"]["n_rounds"] == 20 and run.manifest["splits"] == ["val", "test"]
    with pytest.raises(SystemExit) as end:
        main(["predict", str(run.path), str(data), "--output", str(tmp_path / "p.parquet")])
    assert end.value.code == 0
    import pandas as pd

    again = pd.read_parquet(tmp_path / "p.parquet")
    both = run.predictions("test").merge(again, on=["datetime", "symbol"], suffixes=("", "_again"))
    assert len(both) == len(run.predictions("test")) and (both.p_up - both.p_up_again).abs().max() < 1e-6


def test_training_does_not_read_the_test_split(tmp_path, data):
    "A training works without test_scaled.parquet; scoring test raises `MissingFile`."
    for f in data.iterdir():
        if f.is_file() and "test" not in f.name:
            shutil.copy(f, tmp_path)
    from modelfactory.data.splits import MissingFile
    from modelfactory.training.trainer import Trainer

    trainer = Trainer(dict(model="logistic_regression", horizon=5, data=str(tmp_path), preset="quick"))
    assert trainer.run_full_pipeline()["n_samples"] > 100
    with pytest.raises(MissingFile):
        trainer.evaluate("test")


def test_the_demo_grid_gives_a_sentence_for_each_data_set(parameters, tmp_path, monkeypatch):
    "A small grid over the three kinds of data gives three sentences."
    from modelfactory.runs.compare import compare
    from modelfactory.runs.comparison import comparison
    from modelfactory.runs.grid import run_grid
    from modelfactory.runs.sentences import conclusion

    names, runs = ["indices", "planted", "null"], tmp_path / "runs"
    monkeypatch.setenv("MODELFACTORY_BUNDLED", str(small_bundled(tmp_path / "bundled", names)))
    assert run_grid(dict(data=names, models=["nearest"], horizons=[5]), runs).ok
    sentences = conclusion(comparison(runs))
    assert [s.split(":")[0] for s in sentences] == ["planted", "null", "indices"]
    assert compare(runs).is_file()
    assert (runs / "model_comparison.md").read_text().count("nearest") >= 6
