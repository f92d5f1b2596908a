"User reports on training, each as a test: weights lost after a fit, and errors that were found too late."

import errno
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from modelfactory.data.splits import SplitsError
from modelfactory.evaluation.metrics import EvaluationError
from modelfactory.figures import tear_sheet
from modelfactory.models import loading
from modelfactory.runs import attempt as attempts
from modelfactory.runs import engine, rescore, run_folder
from modelfactory.runs.compare import write_comparison
from modelfactory.runs.comparison import comparison
from modelfactory.runs.grid import grid_status, run_grid
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import PARTIAL_FOLDER, UNSCORED, RunError, start_attempt, write_json
from modelfactory.training import trainer

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def split_frame(n, start, classes=(-1, 0, 1), symbols=("A", "B"), seed=0, shares=None):
    "Hourly bars with closes and three features, of which the first predicts the label."
    rng = np.random.default_rng(seed)
    parts = []
    for symbol in symbols:
        y = rng.choice(classes, size=n, p=shares)
        times = pd.date_range(start, periods=n, freq="h")
        features = {f"f{i}": rng.normal(size=n).astype(np.float32) for i in range(3)}
        features["f0"] += y.astype(np.float32)
        close = 100 * np.exp(0.001 * rng.normal(size=n).cumsum())
        parts.append(
            pd.DataFrame(dict(datetime=times, symbol=symbol, label_h5=y.astype(np.int8), close=close, **features))
        )
    return pd.concat(parts, ignore_index=True)


SIZES = dict(train=300, val=150, test=150)


def write_folder(folder, sizes=None, **kw):
    "Three splits in a folder, a month apart."
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, n) in enumerate((sizes or SIZES).items()):
        frame = split_frame(n, pd.Timestamp("2024-01-01") + pd.Timedelta(days=30 * i), seed=i, **kw)
        frame.to_parquet(folder / f"{name}_scaled.parquet", index=False)
    return folder


def notebook_cells(name="train"):
    "Sources of the code cells of a notebook that papermill runs."
    cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def run_here(runs, parameters):
    "Runs the cells of train.ipynb in this process and ends the attempt as the parent of a run does."
    attempt = start_attempt(runs, parameters)
    write_json(attempt / "job.json", dict(grid="nightly", parameters=parameters))
    (attempt / "train.ipynb").write_text("{}")
    space, code = {}, 0
    try:
        for source in notebook_cells():
            exec(source, space)
            if source.startswith("model = "):
                space.update(parameters | dict(output=str(attempt)))
        attempts.close_attempt(attempt, runs / attempt.name)
    except BaseException as e:
        write_json(attempt / "error.json", engine._error_values(e))
        code = 1
    status_and_reason = engine._failure_reason(code, attempt) if attempt.is_dir() else ("", "")
    return engine._attempt_outcome(attempt, runs, *status_and_reason, time.monotonic())


def make_task(folder, **kw):
    "A runs folder, and parameters of train.ipynb for a small data set with a price file."
    data, prices = write_folder(folder / "data", **kw), folder / "prices.parquet"
    splits = pd.concat(pd.read_parquet(f) for f in sorted(data.glob("*.parquet")))
    splits[["datetime", "symbol", "close"]].to_parquet(prices, index=False)
    dataset = dict(prices=str(prices))
    return folder / "runs", dict(model="logistic_regression", horizon=5, data=str(data), preset=None, dataset=dataset)


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path)


def raising(error):
    def fails(*args, **kw):
        raise error

    return fails


FULL = OSError(errno.ENOSPC, "No space left on device")
LOGISTIC = "modelfactory.models.classical.logistic_regression.LogisticRegressionModel"


def after_fit(monkeypatch, damage):
    "Calls `damage` as soon as the model is fitted."
    fit = trainer.Trainer.train

    def fit_then_damage(self):
        history = fit(self)
        damage()
        return history

    monkeypatch.setattr(trainer.Trainer, "train", fit_then_damage)


def broken_prices(change):
    def fault(monkeypatch, parameters):
        file = Path(parameters["dataset"]["prices"])
        after_fit(monkeypatch, lambda: change(file))

    return fault


def data_moved(monkeypatch, parameters):
    "Moves the data folder while the model is fitted; the test split is scored as well."
    folder = Path(parameters["data"])
    parameters["evaluate_test"] = True
    after_fit(monkeypatch, lambda: folder.rename(folder.with_name("moved")))


def patched(target, error):
    return lambda monkeypatch, parameters: monkeypatch.setattr(target, raising(error))


def nan_close(file):
    table = pd.read_parquet(file)
    table.loc[400:, "close"] = np.nan
    table.to_parquet(file)


PLOTS = "modelfactory.figures.tear_sheet"
FAULTS = dict(
    confusion=patched(f"{PLOTS}.plot_confusion", EvaluationError("classes (1, 2) do not fit 3 probability columns")),
    reliability=patched(f"{PLOTS}.plot_reliability", IndexError("index 3 is out of bounds")),
    precision_recall=patched(f"{PLOTS}.plot_precision_recall", ZeroDivisionError("division by zero")),
    equity=patched(f"{PLOTS}.plot_equity", ValueError("posx and posy should be finite values")),
    shares=patched(f"{PLOTS}.plot_probabilities", RuntimeError("Invalid DISPLAY variable")),
    robustness_picture=patched("modelfactory.training.trainer.plot_robustness", KeyError("regime")),
    importance=patched(f"{LOGISTIC}.feature_importance", ValueError("Failed to process string with tex")),
    disk_full_for_pictures=patched("modelfactory.runs.attempt._write_figure", FULL),
    disk_full_while_a_picture_is_drawn=patched("matplotlib.figure.Figure.savefig", FULL),
    disk_full_for_metrics=patched("modelfactory.runs.attempt.write_scores", FULL),
    disk_full_for_predictions=patched("modelfactory.runs.attempt._write_predictions", FULL),
    prices_gone=broken_prices(lambda file: file.unlink()),
    prices_cut_off=broken_prices(lambda file: file.write_bytes(file.read_bytes()[:100])),
    prices_nan=broken_prices(nan_close),
    data_moved=data_moved,
    metrics=patched("modelfactory.training.trainer.ModelEvaluator.compute_all_metrics", EvaluationError("no")),
    nulls=patched("modelfactory.training.trainer.null_metrics", MemoryError("Unable to allocate 4 GiB")),
    baselines=patched("modelfactory.training.trainer.all_baselines", SplitsError("no prior")),
    predicting=patched(f"{LOGISTIC}.predict", RuntimeError("CUDA error: out of memory")),
    interrupted=patched("modelfactory.training.trainer.null_metrics", KeyboardInterrupt()),
    other_runs_unreadable=patched("modelfactory.runs.task.trials_so_far", PermissionError(13, "mlflow.db")),
    page=patched("modelfactory.evaluation.tables.header_card", TypeError("not a number")),
    kernel_ends=patched("modelfactory.runs.attempt.write_scores", SystemExit(1)),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "The run of the same parameters without a fault."
    folder = tmp_path_factory.mktemp("reference")
    runs, parameters = make_task(folder)
    assert run_here(runs, parameters).status == "ok"
    return list_runs(runs)[0]


def comparable(run):
    "Metrics without timings."
    return {name: value for name, value in run.metrics.items() if not name.endswith("_seconds")}


def save_without_drawing(figure, file, **kw):
    "Stands for `Figure.savefig`, which takes most of the time of a run; `reference` is drawn by the latter."
    file.write(b"\x89PNG")


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_after_fitting_loses_the_weights(fault, reference, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_without_drawing)
    runs, parameters = make_task(tmp_path)
    backup = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_kept"))
    with monkeypatch.context() as patch:
        FAULTS[fault](patch, parameters)
        outcome = run_here(runs, parameters)
    (run,) = list_runs(runs)
    assert outcome.status == UNSCORED and outcome.path == run.path and "modelfactory rescore" in outcome.reason
    assert not run.scored and run.reason and list_runs(runs).to_frame().scored[0] == f"no: {run.reason}"
    assert run.manifest["grid"] == "nightly" and (run.path / "train.ipynb").is_file()
    assert list((runs / PARTIAL_FOLDER).iterdir()) == [] and "not scored" in repr(run)
    run.verify()
    with pytest.raises(RunError, match="modelfactory rescore"):
        _ = run.metrics
    assert run.manifest["files"]["checkpoints/model.json"] and run.model().fitted
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    shutil.copytree(backup, tmp_path, dirs_exist_ok=True)
    assert rescore.rescore([run.path]).scored.tolist() == ["all"]
    after = load_run(run.path)
    after.verify()
    assert after.scored and not after.reason and list_runs(runs).to_frame().scored[0] == "yes"
    pd.testing.assert_frame_equal(after.predictions(), reference.predictions())
    assert comparable(after) == pytest.approx(comparable(reference), nan_ok=True)
    assert after.baselines.keys() == reference.baselines.keys()

    def figures(run):
        return {f.name for f in (run.path / "plots").glob("*.png")}

    assert figures(after) == figures(reference) and set(after.manifest["files"]) == set(reference.manifest["files"])


@pytest.mark.parametrize(
    "classes, shares", [((0, 1, 2), (0.6, 0.39, 0.01)), ((-2, -1, 1, 2), (0.01, 0.49, 0.49, 0.01))]
)
def test_classes_come_from_the_config_when_one_is_never_predicted(tmp_path, classes, shares):
    runs, parameters = make_task(tmp_path, classes=classes, shares=shares)
    parameters["dataset"]["classes"] = list(classes)
    outcome = run_here(runs, parameters)
    (run,) = list_runs(runs)
    assert outcome.status == "ok" and run.scored, outcome
    assert set(run.predictions().prediction) < set(classes)
    figures = {f.stem for f in (run.path / "plots").iterdir()}
    assert {"confusion", "reliability", "precision_recall", "predictions"} <= figures


def test_a_figure_with_wrong_classes_is_an_error():
    from modelfactory.models.base import to_output

    table = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=4, freq="h"), symbol="A", horizon=5))
    output = to_output(np.eye(3)[[0, 1, 0, 1]], table, (1, 2, 3))
    with pytest.raises(EvaluationError, match="name them with classes="):
        tear_sheet.plot_confusion(output, np.array([1, 2, 1, 3]))
    figure = tear_sheet.plot_confusion(output, np.array([1, 2, 1, 3]), (1, 2, 3))
    assert figure.axes[0].get_xticks().tolist() == [0, 1, 2]


def test_a_run_whose_process_and_its_parent_are_killed_is_finished_by_rescore(task):
    runs, parameters = task
    attempt = start_attempt(runs, dict(model="logistic_regression", horizon=5))
    space = {}
    for source in notebook_cells()[:7]:
        exec(source, space)
        if source.startswith("model = "):
            space.update(parameters | dict(output=str(attempt)))
    (run,) = list_runs(runs)
    assert not run.scored and run.reason == "its training is under way"
    assert rescore.rescore([run.path]).scored.tolist() == [rescore.NOT_SCORED]
    (attempt / "pid").write_text("999999999 0")
    assert list_runs(runs)[0].reason == "its training ended before it was scored"
    assert run_folder.clear_partial(runs) == [attempt.name] and load_run(run.path).model().fitted
    assert rescore.rescore([run.path]).scored.tolist() == ["all"] and list_runs(runs)[0].scored


def test_rescore_reads_the_weights_of_another_user_in_a_process_of_their_own(task, tmp_path, monkeypatch):
    runs, parameters = task
    with monkeypatch.context() as patch:
        FAULTS["predicting"](patch, parameters)
        assert run_here(runs, parameters).status == UNSCORED
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("read in the calling process"))
    (run,) = list_runs(runs)
    assert not run.is_own and rescore.rescore([run.path]).scored.tolist() == ["all"]
    after = load_run(run.path)
    assert after.scored and not after.is_own and "plots/importance.png" not in after.manifest["files"]
    assert "plots/confusion.png" in after.manifest["files"] and len(after.predictions())


PLUGIN = """
import os, signal
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.classical.logistic_regression import LogisticRegressionModel, LogisticRegressionConfig

@ModelRegistry.register("deadly", family="examples")
class Deadly(LogisticRegressionModel):
    "Kills its process after the fit, as long as a file exists."
    Config = LogisticRegressionConfig
    def predict(self, *args):
        if os.path.exists(os.environ["DEADLY"]): os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(*args)
"""


def test_a_grid_counts_a_run_whose_kernel_was_killed_after_the_fit_as_trained(task, reference, tmp_path, monkeypatch):
    runs, parameters = task
    flag = tmp_path / "flag"
    flag.touch()
    (tmp_path / "deadly.py").write_text(PLUGIN)
    monkeypatch.setenv("MODELFACTORY_PLUGINS", str(tmp_path / "deadly.py"))
    monkeypatch.setenv("DEADLY", str(flag))
    grid = dict(data=parameters["data"], models=["deadly"], horizons=[5], seeds=[42])
    result = run_grid(grid, runs, workers=1)
    (run,) = list_runs(runs)
    assert [o.status for o in result] == [UNSCORED] and not result.ok
    assert "trained, but its kernel died" in repr(result) and "modelfactory rescore" in repr(result)
    assert not run.scored and "its kernel died" in run.reason and (run.path / "train.ipynb").is_file()
    again = run_grid(grid, runs, workers=1)
    assert [o.status for o in again] == [UNSCORED], "killed again while it is scored"
    assert "its kernel died" in again[0].reason and len(list_runs(runs)) == 1
    assert grid_status(grid, runs)[0]["status"] == UNSCORED
    with pytest.raises(RunError, match="the only run is not scored"):
        write_comparison(runs)
    flag.unlink()
    shutil.copytree(reference.path, runs / reference.path.name)  # a comparison needs a run that is scored
    (row,) = comparison(runs)["failed"]
    assert row["status"] == UNSCORED and row["folder"] == run.path.name and "its kernel died" in row["reason"]
    assert [o.status for o in run_grid(grid, runs, workers=1)] == ["ok"], "the same command continues the grid"
    assert comparison(runs)["failed"] == [] and [o.status for o in run_grid(grid, runs, workers=1)] == ["skipped"]


def class_folder(folder, n=270, n_classes=9, seed=0):
    "A few hundred bars of many classes, with two features that separate the classes."
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("train", "val", "test")):
        y = rng.permutation(np.arange(n) % n_classes)
        features = {
            f"f{k}": (c[y] + 0.1 * rng.normal(size=n)).astype(np.float32)
            for k, c in enumerate((np.arange(n_classes) % 3.0, np.arange(n_classes) // 3.0))
        }
        times = pd.date_range(pd.Timestamp("2024-01-01") + pd.Timedelta(days=60 * i), periods=n, freq="h")
        pd.DataFrame(dict(datetime=times, symbol="A", label_h5=y, close=100.0, **features)).to_parquet(
            folder / f"{name}_scaled.parquet"
        )
    return folder


@pytest.mark.parametrize(
    "model, key, default",
    [
        ("xgboost", "min_child_weight", 20),
        ("random_forest", "min_samples_leaf", 20),
        ("lightgbm", "min_data_in_leaf", 50),
    ],
)
def test_defaults_follow_rows_and_classes_and_a_fit_without_a_split_says_so(tmp_path, model, key, default):
    data = dict(data=str(class_folder(tmp_path / "nine")), classes=list(range(9)), gap=0)
    small = trainer.Trainer(dict(model=model, horizon=5, data=data, preset="quick"))
    small.train()
    accuracy = (small.predict().predictions == small.datasets["val"].y).mean()
    assert accuracy > 0.85 and small.history[key] == 1 and small.learning_notes() == []
    config = {key: 200 if model != "xgboost" else 500}
    forced = trainer.Trainer(dict(model=model, horizon=5, data=data, preset="quick", config=config))
    forced.train()
    (note,) = forced.learning_notes()
    assert forced.history[key] > default and note in forced.notes()
    assert "The fit learnt nothing: it predicts the same probabilities for every row" in note and "9 classes" in note
    from modelfactory.models.registry import ModelRegistry
    from modelfactory.models.tabular import leaf_size

    three_classes = ModelRegistry.create(model, dict(), 5, ["f0"])
    assert leaf_size(three_classes, key, 87_094) == default and leaf_size(three_classes, key, 600) == 10


def test_a_fit_whose_loss_is_above_that_of_the_class_shares_warns(tmp_path):
    from modelfactory.models.base import to_output

    t = trainer.Trainer(dict(model="logistic_regression", horizon=5, data=str(write_folder(tmp_path / "data"))))
    t.train()
    assert t.learning_notes() == []

    def wrong(X, metadata):
        return to_output(np.random.default_rng(0).dirichlet([1, 1, 1], len(X)), metadata, t.model.classes)

    t.model.predict, t._learning = wrong, None
    (note,) = t.learning_notes()
    assert "its log loss on the training rows is" in note and "training rows, 3 classes" in note


def test_a_fit_that_learnt_nothing_is_named_by_run_grid_and_comparison(task):
    runs, parameters = task
    config = dict(min_samples_leaf=5000, n_estimators=5)
    parameters = parameters | dict(model="random_forest", config=config, dataset={})
    outcome = run_here(runs, parameters)
    (run,) = list_runs(runs)
    assert outcome.status == "ok" and "learnt nothing" in outcome.reason and "learnt nothing" in repr(run)
    overrides = dict(random_forest=parameters["config"])
    grid = dict(data=parameters["data"], models=["random_forest"], horizons=[5], overrides=overrides)
    again = run_grid(grid, runs)
    assert again.ok and [o.status for o in again] == ["skipped"] and "learnt nothing" in repr(again)
    from modelfactory.runs.sentences import summary_sentences

    sentences = summary_sentences(comparison(runs))
    assert any("learnt nothing" in sentence and run.path.name in sentence for sentence in sentences)


def set_close(folder, split, change):
    file = folder / f"{split}_scaled.parquet"
    table = pd.read_parquet(file)
    change(table)
    table.to_parquet(file, index=False)


def at_row(value, column="close", row=7):
    def change(table):
        table.loc[row, column] = value

    return change


def zoned(table):
    table["datetime"] = table["datetime"].dt.tz_localize("UTC")


BAD_PRICES = {
    "NaN": (at_row(np.nan), None, "close is NaN at 1 of 300 bars, first A 2024-01-31 07:00:00"),
    "zero": (at_row(0.0), None, "close is zero at 1 of 300 bars, first A 2024-01-31 07:00:00"),
    "negative": (at_row(-3.0), None, "close is negative at 1 of 300 bars, first A 2024-01-31 07:00:00"),
    "infinite": (at_row(np.inf), None, "close is infinite at 1 of 300 bars, first A 2024-01-31 07:00:00"),
    "file gone": (None, lambda file: file.unlink(), "no such price file"),
    "other zone": (None, lambda file: rewrite(file, zoned), "time zone UTC, the bars have None"),
    "bars missing": (
        None,
        lambda file: rewrite(file, lambda t: t.drop(index=t[t.datetime == "2024-01-31 20:00"].index, inplace=True)),
        "there is no close at 2 of 300 bars, first A 2024-01-31 20:00:00",
    ),
    "file NaN": (None, lambda file: rewrite(file, at_row(np.nan)), "prices.parquet: close is NaN at 1 of 1,200 bars"),
}


def rewrite(file, change):
    table = pd.read_parquet(file)
    change(table)
    table.to_parquet(file, index=False)


@pytest.mark.parametrize("case", BAD_PRICES)
def test_prices_that_cannot_be_traded_are_named_before_the_fit(case, tmp_path, capsys):
    from modelfactory.cli import main
    from modelfactory.runs.grid import grid_config, plan_grid

    in_split, in_file, message = BAD_PRICES[case]
    _, parameters = make_task(tmp_path)
    data, prices = Path(parameters["data"]), Path(parameters["dataset"]["prices"])
    if in_split:
        set_close(data, "val", in_split)
    if in_file:
        in_file(prices)
    dataset = dict(prices=str(prices)) if in_file else {}
    task = dict(model="logistic_regression", horizon=5, data=dict(data=str(data)) | dataset)
    with pytest.raises(SplitsError) as error:
        trainer.Trainer(task).prepare_data()
    assert message in str(error.value)
    with pytest.raises(SplitsError):
        plan_grid(grid_config(dict(data=str(data), models=["svm"], horizons=[5], dataset=dataset)))
    if in_split:
        assert "val_scaled.parquet" in str(error.value)
        with pytest.raises(SystemExit) as end:
            main(["check", str(data)])
        assert end.value.code == 2 and message in capsys.readouterr().err


def walk(n, seed=0, sigma=0.01, freq="h", symbol="A"):
    rng = np.random.default_rng(seed)
    close = 4000 * np.exp(sigma * rng.normal(size=n).cumsum())
    times = pd.date_range("2024-01-02", periods=n, freq=freq)
    return pd.DataFrame(dict(datetime=times, symbol=symbol, high=close + 7.5, low=close - 7.5, close=close))


def test_prices_that_cannot_be_right_are_named_with_symbol_and_time():
    from modelfactory.data.plausibility import price_warnings

    assert price_warnings(walk(1000), "train") == []
    stale = walk(1000)
    stale.loc[200:900, "close"] = 4000 * np.exp(1e-5 * np.random.default_rng(1).normal(size=701))
    (sentence,) = [w for w in price_warnings(stale, "train") if "stays within" in w]
    assert sentence.startswith("train: close stays within 0.1% for 100 bars or more")
    assert "A (from 2024-01-10 08:00:00)" in sentence
    still = walk(1000)
    moved = np.random.default_rng(2).random(1000) < 0.13
    still["close"] = still.close.where(moved).ffill().bfill()
    (sentence,) = [w for w in price_warnings(still, "val") if "equals" in w]
    share = (still.close.diff().dropna() == 0).mean()
    assert f"A {share:.0%} of its bars (from 2024-01-02 00:00:00)" in sentence and share > 0.85
    for factor, text in ((0.26, "-74% (near 4 for 1)"), (0.2, "-80% (near 5 for 1)"), (0.33, "-67% (near 3 for 1)")):
        split = pd.concat([walk(500), walk(500, symbol="B", sigma=1e-4)], ignore_index=True)
        split.loc[700:, "close"] *= factor
        (sentence,) = [w for w in price_warnings(split, "val") if "in one bar" in w]
        assert f"B 2024-01-10 08:00:00 {text}" in sentence


def test_warnings_on_prices_and_classes_reach_check_run_grid_and_comparison(tmp_path, capsys):
    from modelfactory.cli import main
    from modelfactory.runs.sentences import summary_sentences

    runs, parameters = make_task(tmp_path, sizes=dict(train=400, val=150, test=150), shares=(0.0075, 0.5, 0.4925))
    data = Path(parameters["data"])

    def spoil(table):
        table.loc[table.index[100] :, "close"] /= 4
        table.loc[5, "f1"] = 3870.0
        table["f2"] = np.float32(1)

    for name in ("train", "val", "test"):
        set_close(data, name, spoil)
    parameters = parameters | dict(dataset={})
    expected = ("in one bar", "f1 3,870 at A", "1 feature is constant in train: f2", "class -1 is")
    with pytest.raises(SystemExit) as end:
        main(["check", str(data)])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and all(text in printed for text in expected), printed
    result = run_grid(dict(data=str(data), models=["logistic_regression"], horizons=[5], seeds=[42]), runs, workers=1)
    assert result.ok
    for text in expected:
        assert any(text in line for line in result.warnings) and text in repr(result)
    (run,) = list_runs(runs)
    stored = json.loads((run.path / "splits.json").read_text())["warnings"]
    sentences = summary_sentences(comparison(runs))
    assert all(any(text in line for line in lines) for text in expected for lines in (stored, sentences))


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_times_whose_unit_was_forgotten_are_refused_with_the_unit(tmp_path, unit):
    from modelfactory.data.readers import BarsError, check_bars
    from modelfactory.data.splits import BadDatetime, read_splits

    scale = dict(s=1, ms=1000)[unit]

    def as_numbers(times):
        return (pd.DatetimeIndex(times).as_unit("ns").asi8 // 1_000_000_000) * scale

    numbers = as_numbers(pd.date_range("2024-01-02", periods=300, freq="h"))
    bars = walk(300).assign(open=lambda t: t.close, volume=1.0, datetime=pd.to_datetime(numbers))
    with pytest.raises(BarsError, match="before 1971.*unit='ms'"):
        check_bars(bars)
    data = write_folder(tmp_path / "data")
    set_close(data, "train", lambda t: t.__setitem__("datetime", pd.to_datetime(as_numbers(t.datetime))))
    with pytest.raises(BadDatetime, match="train_scaled.parquet.*before 1971.*unit='ms'"):
        read_splits(data)
    checked = check_bars(bars.assign(datetime=pd.to_datetime(numbers, unit=unit)))
    assert checked.datetime[0] == pd.Timestamp("2024-01-02")


def test_check_and_grid_read_the_same_splits_and_end_alike(tmp_path, capsys):
    from modelfactory.cli import main

    data = write_folder(tmp_path / "data", sizes=dict(train=600, val=200, test=200), symbols=tuple("ABCDEF"))
    for name in ("train", "val", "test"):
        set_close(data, name, lambda t: t.__setitem__("f1", t.label_h5.astype(np.float32) + np.float32(0.01) * t.f2))
    grid = tmp_path / "grid.yaml"
    grid.write_text(json.dumps(dict(data=[str(data)], models=["logistic_regression"], horizons=[5])))
    codes, errors = [], []
    for command in (["check", str(data)], ["experiment", str(grid), "--output", str(tmp_path / "runs")]):
        with pytest.raises(SystemExit) as end:
            main(command)
        codes.append(end.value.code)
        errors.append(capsys.readouterr().err)
    assert codes == [2, 2] and all("f1" in text and "may be computed from later bars" in text for text in errors)
    (data / "test_scaled.parquet").unlink()
    for name in ("train", "val"):
        set_close(data, name, lambda t: t.drop(columns=["f0", "f1"], inplace=True))
    with pytest.raises(SystemExit) as end:
        main(["check", str(data)])
    assert end.value.code == 0


def test_a_fit_that_diverges_at_once_says_what_to_lower_before_anything_is_predicted(tmp_path):
    from modelfactory.models.errors import DivergedError

    data = str(write_folder(tmp_path / "data"))
    small = dict(learning_rate=1e30, max_epochs=3, sequence_length=4, hidden_size=4)
    t = trainer.Trainer(dict(model="lstm", horizon=5, data=data, config=small))
    message = r"the loss is NaN or infinite in round 1: the fit diverged; lower learning_rate \(now {}\)"
    with pytest.raises(DivergedError, match="lstm: " + message.format(r"1e\+30")):
        t.train()
    assert t.predictions == {}
    t = trainer.Trainer(dict(model="xgboost", horizon=5, data=data))
    losses = [float("nan")] * 3  # as from a library that does not check its losses
    t.build_model().fit = lambda *args: dict(val_loss=losses, best_round=0)
    with pytest.raises(DivergedError, match="xgboost: " + message.format("0.05")):
        t.train()


@pytest.mark.parametrize("early_stopping", [True, False])
def test_the_best_round_is_never_one_whose_loss_is_nan(tmp_path, monkeypatch, early_stopping):
    import torch

    from modelfactory.models import sequence

    record = sequence.Training.record

    def third_epoch_diverges(self, train_loss, val_loss):
        if len(self.losses["val_loss"]) == 2:
            with torch.no_grad():
                next(iter(self.net.parameters())).fill_(float("nan"))
            train_loss = val_loss = float("nan")
        record(self, train_loss, val_loss)

    monkeypatch.setattr(sequence.Training, "record", third_epoch_diverges)
    config = dict(sequence_length=4, hidden_size=4, max_epochs=5, early_stopping=early_stopping)
    t = trainer.Trainer(dict(model="lstm", horizon=5, data=str(write_folder(tmp_path / "data")), config=config))
    history = t.train()
    assert len(history["val_loss"]) == 3 and np.isnan(history["val_loss"][2])
    assert history["best_round"] == int(np.nanargmin(history["val_loss"])) < 2
    assert np.isfinite(t.predict().probabilities).all()
    assert any("NaN or infinite in round 3" in note and "lower learning_rate" in note for note in t.learning_notes())
    figure = tear_sheet.plot_learning_curve(dict(val_loss=[float("nan"), 1.0, 0.9]))
    assert "round" in figure.axes[0].get_legend_handles_labels()[1][-1]


def test_a_nan_loss_in_the_first_round_does_not_stop_a_fit_and_is_not_the_best(tmp_path):
    from modelfactory.models.callbacks import EarlyStopping

    stop, losses = EarlyStopping(3), [float("nan"), 1.0, 0.9, 1.0, 1.1, 1.2]
    stop.on_fit_start(object(), 6)
    assert [stop.on_epoch_end(None, i, dict(val_loss=loss)) for i, loss in enumerate(losses)] == [False] * 5 + [True]
