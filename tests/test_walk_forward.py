"Folds as a coordinate of a run: what a fold trains on, what it never sees, and how folds are joined and resumed."

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE, until
from quick import quick_models, small_splits
from test_folds import label_ends, panel
from test_splits_time import SESSIONS

from modelfactory.configuration import ConfigError
from modelfactory.data.dataset import DatasetConfig, FoldConfig, Windows
from modelfactory.data.fold_data import fold_datasets, parse_length, scored_rows
from modelfactory.data.folds import FoldsError
from modelfactory.data.splits import NO_TARGET, SplitsError
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.attempt import run_identity
from modelfactory.runs.comparison import comparison
from modelfactory.runs.grid import GridConfig, grid_config, grid_jobs, run_grid
from modelfactory.runs.rescore import rescore
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import PARTIAL_FOLDER, RunError
from modelfactory.runs.sentences import summary_sentences
from modelfactory.runs.stitch import stitch, stitch_finished
from modelfactory.training.trainer import Trainer

SCHEMES = [
    FoldConfig(n=4),
    FoldConfig(n=3, test="3 days", window="8 days"),
    FoldConfig(n=3, test="40 bars", window=120, embargo="6 hours"),
    FoldConfig(n=3, retrain="first", embargo=2),
    FoldConfig("combinatorial", n=4, test=2),
]


def in_two_files(frame, share=0.7):
    "The bars as train and val, cut by time; labels that reach into val are removed."
    times = np.sort(frame.datetime.unique())
    cut = times[int(len(times) * share)]
    train, val = frame[frame.datetime < cut].copy(), frame[frame.datetime >= cut]
    late = train.groupby("symbol").cumcount(ascending=False) < 60
    train.loc[late, [c for c in train if c.startswith("label_h")]] = np.nan
    return dict(train=train, val=val)


@pytest.fixture(scope="module")
def panels():
    names = list(SESSIONS)
    chosen = [(names[0],), tuple(names[1:3]), tuple(names[:3])]
    frames = [panel(seed, sessions, 40, 5, seed > 0) for seed, sessions in enumerate(chosen)]
    return [frame.sort_values(["symbol", "datetime"], ignore_index=True) for frame in frames]


def label_spans(frame, ds):
    "First and last time of each label, in nanoseconds; a label that ends after the bars has no last time."
    ends = [pd.Timestamp.max.value if end is None else end for end in label_ends(frame, ds)]
    return ds.metadata.datetime.dt.as_unit("ns").astype("int64").to_numpy(), np.array(ends)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_no_label_of_a_fold_overlaps_its_scored_part_on_three_calendars(scheme, panels):
    for frame in panels:
        config = DatasetConfig("in memory", folds=scheme)
        folds, _ = fold_datasets(config, 5, seq_len=3, data=in_two_files(frame))
        assert len(folds) == scheme.n_folds
        for fold in folds:
            assert fold.train.X.base is fold.val.X.base and len(fold.train) and len(fold.val)
            starts, ends = label_spans(frame, fold.train)
            for start, end in zip(*label_spans(frame, fold.val), strict=True):
                assert not ((starts <= end) & (ends >= start)).any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_the_scored_rows_do_not_depend_on_the_length_of_the_windows(scheme, panels):
    config, data = DatasetConfig("in memory", folds=scheme), in_two_files(panels[1])
    short, long = (fold_datasets(config, 5, seq_len, data=data)[0] for seq_len in (1, 20))
    for a, b in zip(short, long, strict=True):
        keys, longer = (part.val.metadata[["datetime", "symbol"]] for part in (a, b))
        assert len(keys.merge(longer)) == len(longer)
        if scheme.kind == "walk_forward":  # only the first rows of a symbol lack a window of 20 rows
            assert keys.datetime.min() == longer.datetime.min() and keys.datetime.max() == longer.datetime.max()
    joined = scored_rows(short)
    tested = pd.concat([fold.val.metadata for fold in short]).drop_duplicates(["datetime", "symbol"])
    assert len(joined) == len(tested) and (joined.y != NO_TARGET).all()


def naive_folds(frame, n):
    "First and last time of each test part of n equal walk-forward folds, from the labelled times alone."
    symbol = frame.groupby("symbol").cumcount() >= 1  # gap 1: the first bar has no row before it
    times = np.sort(frame[frame.label_h5.notna() & symbol].datetime.unique())
    size = len(times) // (n + 1)
    return [(times[len(times) - size * k], times[len(times) - size * (k - 1) - 1]) for k in range(n, 0, -1)]


MODELS = dict(
    logistic_regression={},
    lightgbm=dict(n_rounds=30),
    gru=dict(hidden_size=8, max_epochs=3, sequence_length=8, threads=1),
)


def hand_written(name, config, frame, n):
    "Predictions of a plain loop over folds: cut by time, purge, standard windows, fit, predict."
    outputs = []
    frame = frame.reset_index(drop=True)
    position = frame.groupby("symbol").cumcount().to_numpy()
    labels, features = frame.label_h5.to_numpy(), frame[["rsi"]].to_numpy(np.float32)
    resolved = Trainer(dict(model=name, horizon=5, config=config, data=dict(data="x", folds=dict(n=n)))).model_config
    T = resolved["sequence_length"]
    ends = np.full(len(frame), np.iinfo(np.int64).max)
    for _, rows in frame.groupby("symbol"):
        times, index = rows.datetime.to_numpy("datetime64[ns]").astype("int64"), rows.index.to_numpy()
        ends[index[:-5]] = times[5:]
    times = frame.datetime.to_numpy("datetime64[ns]").astype("int64")
    bars_left = frame.groupby("symbol").cumcount(ascending=False).to_numpy()
    is_sample = (position >= T) & ~np.isnan(labels)
    for first, last in naive_folds(frame, n):
        first, last = (np.datetime64(t, "ns").astype("int64") for t in (first, last))
        scored = is_sample & (times >= first) & (times <= last)
        train = is_sample & (times < first) & (ends < first)
        for code in frame.symbol.unique():  # embargo: five bars of the symbol between the label's end and the part
            of_symbol = (frame.symbol == code).to_numpy()
            n_before = int((of_symbol & (times < first)).sum())
            end_position = position + 5
            train &= ~of_symbol | (n_before - end_position > 5)
        assert (bars_left[train] >= 5).all()

        def windows(mask):
            return Windows(features, np.flatnonzero(mask) - 1, T)

        def metadata(mask):
            part = frame.loc[mask, ["datetime", "symbol"]].assign(horizon=5, label_bars=5)
            return part.reset_index(drop=True)

        X = [windows(mask) for mask in (train, scored)]
        model = ModelRegistry.create(name, resolved, 5, ["rsi"])
        y = [labels[mask].astype(np.int8) for mask in (train, scored)]
        model.fit(X[0], y[0], X[0][:1], y[0][:1], metadata(train), metadata(train).iloc[:1])
        outputs.append(model.predict(X[1], metadata(scored)))
    return outputs


@pytest.mark.parametrize("name", MODELS)
def test_a_fold_equals_a_hand_written_loop(name):
    rng, times = np.random.default_rng(0), pd.date_range("2024-01-01", periods=420, freq="h")
    parts = []
    for symbol in "AB":
        rsi = rng.normal(size=len(times))
        noisy = np.r_[0, rsi[:-1]] + rng.normal(size=len(times))
        columns = dict(datetime=times, symbol=symbol, rsi=rsi, label_h5=np.digitize(noisy, [-0.5, 0.5]) - 1.0)
        parts.append(pd.DataFrame(columns))
    frame = pd.concat(parts, ignore_index=True)
    data = dict(train=frame[frame.datetime < times[300]], val=frame[frame.datetime >= times[300]])
    data["train"] = data["train"].assign(
        label_h5=data["train"].label_h5.where(data["train"].groupby("symbol").cumcount(ascending=False) >= 5)
    )
    whole = pd.concat(data.values()).sort_values(["symbol", "datetime"], kind="stable")
    expected = hand_written(name, MODELS[name], whole, 3)
    for number, output in enumerate(expected, 1):
        keys = dict(data="in memory", folds=dict(n=3, fold=number))
        trainer = Trainer(dict(model=name, horizon=5, config=MODELS[name], data=keys), data=data)
        trainer.train()
        predicted = trainer.predict()
        assert predicted.timestamps.equals(output.timestamps) and (predicted.symbols == output.symbols).all()
        assert np.abs(predicted.probabilities - output.probabilities).max() < 1e-6


@pytest.mark.parametrize("name", ["lightgbm", "gru"])
def test_neither_the_fit_nor_early_stopping_sees_the_scored_part_or_later_rows(name, panels):
    data = in_two_files(panels[2])
    keys = dict(data="in memory", folds=dict(n=3, fold=2))
    task = dict(model=name, horizon=5, config=MODELS[name] | dict(patience=1), data=keys)
    clean = Trainer(task, data=data)
    clean.train()
    start = clean.datasets["val"].metadata.datetime.min()
    for frame in data.values():
        late = frame.datetime >= start
        frame.loc[late, "rsi"] = 50.0
        frame.loc[late, "label_h5"] = frame.label_h5[late] * -1
    poisoned = Trainer(task, data=data)
    poisoned.train()
    assert clean.model_config["stop_on"] == "train_tail"
    assert clean.history["best_round"] == poisoned.history["best_round"]
    rows = clean.datasets["train"]
    p, q = (t.model.predict(rows.X, rows.metadata).probabilities for t in (clean, poisoned))
    assert np.array_equal(p, q)


def test_a_config_that_stops_on_the_scored_rows_is_refused():
    keys = dict(data="planted", folds=dict(n=3, fold=1))
    with pytest.raises(ConfigError, match="would stop on the rows that the fold scores"):
        Trainer(dict(model="lightgbm", horizon=5, config=dict(stop_on="val"), data=keys))


def test_a_trainer_without_a_single_fold_does_not_train(panels):
    trainer = Trainer(
        dict(model="logistic_regression", horizon=5, data=dict(data="in memory", folds=dict(n=3))),
        data=in_two_files(panels[0]),
    )
    with pytest.raises(ConfigError, match="expected a number from 1 to 3"):
        trainer.train()


@pytest.mark.parametrize(
    "folds, message",
    [
        (dict(n=3, test="3 moons"), "expected a number of bars, or a number and a unit"),
        (dict(n=3, fold=4), "expected a number from 1 to 3"),
        (dict(n=200), "n_folds = 200|do not fit"),
        (dict(n=3, test="20 years"), "do not fit"),
        (dict(n=2, embargo="2 months"), "expected bars, minutes, hours, days or weeks"),
        (dict(kind="combinatorial", n=4, window="3 days"), "for kind combinatorial"),
        (dict(kind="combinatorial", n=4, test=4), "n_test_groups = 4"),
    ],
)
def test_invalid_folds_are_refused_with_the_fix(folds, message, panels):
    frame = panels[0].groupby("symbol").head(150)
    with pytest.raises(SplitsError, match=message):
        fold_datasets(DatasetConfig("in memory", folds=FoldConfig(**folds)), 5, data=in_two_files(frame, 0.5))


def test_lengths_are_calendar_lengths():
    assert parse_length("2 weeks", "test") == pd.DateOffset(weeks=2)
    assert parse_length("1 month", "test") == pd.DateOffset(months=1)
    with pytest.raises(FoldsError):
        parse_length("-3 days", "test")


def test_missing_values_are_filled_with_the_median_of_the_folds_own_training_rows(panels):
    frame = panels[1].copy()
    frame["rsi"] += np.arange(len(frame))  # the median depends on the rows
    frame.loc[frame.index % 7 == 0, "rsi"] = np.nan
    fills = []
    for number in (1, 3):
        config = DatasetConfig("in memory", nan="median", folds=FoldConfig(n=3, fold=number))
        (fold,), report = fold_datasets(config, 5, data=in_two_files(frame))
        assert np.isfinite(fold.train.X.base).all() and np.isfinite(fold.val.X.base).all()
        keys = fold.train.metadata[["datetime", "symbol"]].merge(frame, on=["datetime", "symbol"])
        assert report.fills["rsi"] == pytest.approx(np.float32(keys.rsi.astype("f4").median()), rel=1e-6)
        fills.append(report.fills["rsi"])
    assert fills[0] != fills[1]


def test_a_run_without_folds_keeps_its_identity():
    resolved = Trainer(dict(model="svm", horizon=5, data="planted")).resolved_config()
    assert resolved["data"]["folds"] is None
    before = resolved | dict(data={k: v for k, v in resolved["data"].items() if k != "folds"})
    assert run_identity(resolved, "x", "y") == run_identity(before, "x", "y")


def walk_forward_grid(folder):
    "A grid of three folds on a small market in `folder`, which is written if it is missing."
    data = folder / "market"
    if not data.is_dir():
        small_splits(data)
    return dict(data=str(data), models=["nearest"], horizons=[5], seeds=[1], folds=dict(n=3))


@pytest.fixture(autouse=True)
def plugin(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path_factory.mktemp("models")))


def test_a_grid_has_one_job_for_each_fold_with_its_own_identity_and_name():
    config = grid_config("quick", models=["svm", "lightgbm"], seeds=[1, 2], folds=dict(kind="combinatorial", n=4))
    jobs = grid_jobs(config)
    assert len(jobs) == 2 * 2 * 2 * 6 == len({job.identity for job in jobs})
    assert jobs[0].title == "svm h5 planted fold 1" and isinstance(config, GridConfig)
    with pytest.raises(ConfigError, match="folds is also in dataset"):
        grid_config(dict(data="planted", folds=dict(n=3), dataset=dict(folds=dict(n=2))))


_finished: list = []


@pytest.fixture
def walk_forward_runs(plugin, tmp_path_factory):
    "The grid, run once to its end without interruption; tests may only read it."
    if not _finished:
        folder = tmp_path_factory.mktemp("walk_forward")
        result = run_grid(walk_forward_grid(folder), folder / "runs")
        assert result.ok and len(result.stitched) == 1, result
        _finished.append(folder / "runs")
    return _finished[0]


def scores_by_fold(folder):
    return {run.fold: (run.predictions(), dict(run.metrics)) for run in list_runs(folder)}


@pytest.mark.slow
def test_a_stitched_record_is_a_run_and_is_written_once(walk_forward_runs):
    runs = list_runs(walk_forward_runs)
    record = next(run for run in runs if run.is_stitched)
    folds = [run for run in runs if not run.is_stitched]
    assert [run.fold for run in folds] == [1, 2, 3] and record.manifest["stitched"] == [r.path.name for r in folds]
    parts = pd.concat([run.predictions() for run in folds]).sort_values(["symbol", "datetime"], ignore_index=True)
    stored = record.predictions().sort_values(["symbol", "datetime"], ignore_index=True)
    pd.testing.assert_frame_equal(stored, parts, check_dtype=False, rtol=1e-6)
    again = stitch(walk_forward_runs)
    skill = again.metrics["directional_skill"]
    assert skill == pytest.approx(record.metrics["directional_skill"]) and "walk-forward, 3 folds" in repr(again)
    assert stitch_finished(walk_forward_runs) == [] and record.trials == 3
    record.verify()
    with pytest.raises(RunError, match="a stitched record has no model"):
        record.model()
    assert load_run(folds[-1].path).model().fitted


@pytest.mark.slow
def test_rescoring_a_stitched_record_changes_nothing(walk_forward_runs, tmp_path):
    shutil.copytree(walk_forward_runs, tmp_path / "runs")
    before = next(run for run in list_runs(tmp_path / "runs") if run.is_stitched)
    metrics, baselines = dict(before.metrics), before.baselines
    assert (rescore([before.path]).scored == "all").all()
    after = load_run(before.path)
    assert after.is_stitched and after.metrics == pytest.approx(metrics, nan_ok=True)
    assert after.baselines["prior"]["log_loss"] == pytest.approx(baselines["prior"]["log_loss"])


@pytest.mark.slow
def test_a_record_with_a_missing_fold_is_not_stitched(walk_forward_runs):
    folds = [run for run in list_runs(walk_forward_runs) if run.fold in (1, 3)]
    with pytest.raises(RunError, match="2 of 3 folds; fold 2 is missing"):
        stitch(folds)


@pytest.mark.slow
def test_the_comparison_compares_records_and_not_folds(walk_forward_runs):
    result = comparison(walk_forward_runs)
    (task,) = result["tasks"]
    assert task["data"] == "market, walk-forward, 3 folds" and task["trials"] == 3
    assert task["models"][0]["folds"] == 3 and len(task["folds"]["rows"]) == 3 and not result["unread"]
    text = " ".join(summary_sentences(result))
    assert (
        "market, walk-forward, 3 folds, horizon 5: directional skill in single folds is significant for nearest" in text
    )


def has_reached(process, folder, stage):
    "Whether an attempt has written a certain file, or the grid has ended."
    return not process.is_alive() or any((folder / PARTIAL_FOLDER).glob(f"*/**/{stage}"))


def grid_in_process(grid, folder, plugins):
    os.environ["MODELFACTORY_PLUGINS"] = plugins
    os.setsid()
    run_grid(grid, folder)


N_KILLS = int(os.environ.get("MODELFACTORY_TEST_KILLS", 4))


@pytest.mark.slow
@pytest.mark.faults
def test_a_walk_forward_grid_killed_at_random_moments_and_resumed_equals_an_uninterrupted_one(
    walk_forward_runs, tmp_path
):
    rng, context, folder = random.Random(5), multiprocessing.get_context("forkserver"), tmp_path / "runs"
    context.set_forkserver_preload(["modelfactory.runs.grid"])
    grid = walk_forward_grid(walk_forward_runs.parent)
    stages = ["pid", "train.ipynb", "checkpoints", "predictions", "metrics", "plots", "result.json"]
    for kill in range(N_KILLS):
        process = context.Process(target=grid_in_process, args=(grid, folder, os.environ["MODELFACTORY_PLUGINS"]))
        process.start()
        stage = stages[(kill * 2 + rng.randrange(2)) % len(stages)]
        until(partial(has_reached, process, folder, stage), f"{stage} or the end of the grid")
        process.join(rng.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join(PATIENCE)
    run_grid(grid, folder)
    whole, resumed = scores_by_fold(walk_forward_runs), scores_by_fold(folder)
    assert set(whole) == set(resumed) == {1, 2, 3, None}
    for fold, (predictions, metrics) in whole.items():
        pd.testing.assert_frame_equal(resumed[fold][0], predictions)
        for name in ("log_loss", "directional_skill", "sharpe_net", "directional_skill_ci_low"):
            assert resumed[fold][1][name] == pytest.approx(metrics[name], nan_ok=True)
