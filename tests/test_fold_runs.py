"Folds as a coordinate of a run: what a fold trains on, what it never sees, and how folds are joined and resumed."

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE, until
from fabricate import fitted_run
from quick import quick_models, small_splits
from test_folds import label_ends, panel
from test_splits_time import SESSIONS

from modelfactory.configuration import ConfigError
from modelfactory.data.dataset import DatasetConfig, FoldConfig, Windows
from modelfactory.data.fold_data import fold_datasets, fold_paths, parse_length, scored_rows
from modelfactory.data.folds import FoldsError
from modelfactory.data.splits import NO_TARGET, SplitsError
from modelfactory.evaluation.significance import prior_gains
from modelfactory.figures.folds import plot_fold_scores
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.attempt import prediction_frame, run_identity
from modelfactory.runs.comparison import _early_stopping, comparison, failed_runs
from modelfactory.runs.export import model_card
from modelfactory.runs.fold_comparison import fold_claims, fold_decay, fold_ranks, path_overfitting
from modelfactory.runs.grid import GridConfig, grid_config, grid_jobs, run_grid
from modelfactory.runs.report import fold_summary
from modelfactory.runs.rescore import rescore, score_without_data
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import PARTIAL_FOLDER, RunError
from modelfactory.runs.sentences import fold_sentences, summary_sentences
from modelfactory.runs.stitch import fold_groups, publish_stitched, stitch, stitch_finished
from modelfactory.runs.stored import RunList
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    folds = sorted((run for run in runs if not run.is_stitched), key=lambda run: run.fold)
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
    assert "market, walk-forward, 3 folds, horizon 5: directional skill in single folds is not tested" in text


def has_reached(process, folder, stage):
    "Whether an attempt has written a certain file, or the grid has ended."
    return not process.is_alive() or any((folder / PARTIAL_FOLDER).glob(f"*/**/{stage}"))


def grid_in_process(grid, folder, plugins):
    os.environ["MODELFACTORY_PLUGINS"] = plugins
    os.setsid()
    run_grid(grid, folder)


N_KILLS = int(os.environ.get("FOLD_TEST_KILLS", 4))


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


def fold_runs(folder, model="nearest", numbers=(1, 2, 3), **folds):
    "Runs on folds of a small market, fitted in this process; the runs folder lies beside the market."
    data = folder / "market"
    if not data.is_dir():
        small_splits(data)
    task = dict(model=model, horizon=5, data=str(data), seed=1)
    schemes = [(folds or dict(n=3)) | dict(fold=number) for number in numbers]
    return [fitted_run(folder / "runs", task | dict(dataset=dict(folds=s)), scored=True) for s in schemes]


_folded: list = []


@pytest.fixture
def folded(plugin, tmp_path, tmp_path_factory):
    "A copy of three runs on folds and their record; the market lies beside the runs folder."
    if not _folded:
        folder = tmp_path_factory.mktemp("folded")
        fold_runs(folder)
        assert len(stitch_finished(folder / "runs")) == 1
        _folded.append(folder)
    return shutil.copytree(_folded[0], tmp_path / "folded")


def members_and_record(folder):
    runs = list_runs(folder / "runs")
    members = sorted((run for run in runs if run.fold), key=lambda run: run.fold)
    return members, next(run for run in runs if run.is_stitched)


@pytest.mark.slow
def test_a_fold_that_is_trained_again_gets_a_new_record(folded):
    tmp_path, (first, old) = folded, members_and_record(folded)
    shutil.rmtree(first[1].path)
    (task,) = comparison(tmp_path / "runs")["tasks"]
    assert f"its run {first[1].path.name} is missing" in task["folds"]["why"]
    (again,) = fold_runs(tmp_path, numbers=[2])
    assert again.identity == first[1].identity
    (new,) = stitch_finished(tmp_path / "runs")
    assert new != old.path and load_run(new).manifest["stitched"][1] == again.path.name
    (task,) = comparison(tmp_path / "runs")["tasks"]
    assert not task["folds"]["why"] and task["trials"] == 3
    assert stitch_finished(tmp_path / "runs") == []


def test_finished_records_are_found_without_reading_the_folder_for_each(folded, monkeypatch):
    listed = []
    monkeypatch.setattr("modelfactory.runs.stitch.list_runs", lambda folder: listed.append(1) or list_runs(folder))
    assert stitch_finished(folded / "runs") == [] and len(listed) == 1


def test_a_record_has_the_class_shares_of_each_fold(folded):
    members, record = members_and_record(folded)
    assert record.manifest["code"] == members[0].manifest["code"]
    parts = [(run.predictions(), run.manifest["train_shares"]) for run in members]
    for table, shares in parts:
        assert np.allclose(record.class_shares(table.datetime), shares)
    assert not np.allclose(parts[0][1], parts[2][1])
    weights = [len(table) for table, _ in parts]
    assert np.allclose(record.manifest["train_shares"], np.average([s for _, s in parts], axis=0, weights=weights))
    # a model that knows nothing but the class shares of its fold gains nothing
    frame = pd.concat([table for table, _ in parts], ignore_index=True)
    p = np.repeat([shares for _, shares in parts], weights, axis=0)
    columns = dict(zip(["m_p_down", "m_p_flat", "m_p_up"], p.T, strict=True))
    stacked = frame[["datetime", "symbol", "y_true"]].assign(**columns)
    assert np.allclose(prior_gains(stacked, record.class_shares(frame.datetime)), 0)
    assert not np.allclose(prior_gains(stacked, parts[0][1]), 0)
    _, baselines = score_without_data(record, record.predictions(), nulls=False)
    assert baselines["prior"]["log_loss"] == pytest.approx(record.baselines["prior"]["log_loss"])


def test_a_damaged_record_is_left_out_of_the_comparison(folded):
    _, record = members_and_record(folded)
    for damage in ({"yesterday": [0.2, 0.3, 0.5]}, {"2020-01-01": [0.5]}):
        edited = json.loads((record.path / "manifest.json").read_text()) | dict(fold_shares=damage)
        (record.path / "manifest.json").write_text(json.dumps(edited))
        result = comparison(folded / "runs")
        assert not result["tasks"] and "no valid class shares" in result["unread"][0]["reason"]


def test_runs_of_two_versions_of_code_or_data_are_not_joined():
    def run(number, **manifest):
        config = dict(data=dict(data="x", folds=dict(n=2, fold=number)))
        about = dict(fold=number, scored=True, path=Path("x"))
        return SimpleNamespace(config=config, manifest=dict(code="a") | manifest, **about)

    assert [list(group) for group in fold_groups([run(2), run(1)])] == [[1, 2]]
    assert len(fold_groups([run(1), run(2, code="b")])) == len(fold_groups([run(1), run(2, data_fingerprint="b")])) == 2


def test_unfinished_folds_of_earlier_code_are_not_reported(folded):
    members, _ = members_and_record(folded)
    for run, code in ((members[2], "later"), (members[1], "earlier")):
        file = run.path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(code=code)))
    warnings = []
    assert stitch_finished(folded / "runs", warnings) == []
    assert warnings == ["nearest h5 seed 1: 1 of 3 folds are finished; its record is not stitched"]
    for damage in ("folds: 3", "folds: {shape: round}"):
        file = members[2].path / "config.yaml"
        file.write_text(re.sub(r"folds:\n(    .*\n)+", damage + "\n", file.read_text()))
        warnings = []
        assert stitch_finished(folded / "runs", warnings) == [] and len(warnings) == 1


def test_runs_on_folds_do_not_hide_that_another_run_stopped_on_validation():
    def run(folds, stop_on):
        config = dict(config=dict(model_name="lightgbm", early_stopping=True, stop_on=stop_on))
        return SimpleNamespace(key=folds, folds=folds, manifest=dict(model="lightgbm"), config=config)

    (note,) = _early_stopping(RunList([run("", "val"), run("walk-forward, 3 folds", "train_tail")]))
    assert note["models"] == ["lightgbm"]


@pytest.mark.slow
def test_paths_are_records_of_single_fits_and_overfitting_is_tested_within_each(tmp_path):
    members = fold_runs(tmp_path, numbers=range(1, 4), kind="combinatorial", n=3, test=2)
    record = stitch(members)
    assert len(record.paths) == 2 and list(record.path_profit) == ["path_1", "path_2"]
    for path, folds in zip(record.paths, fold_paths(3, 2), strict=True):
        parts = [members[number - 1].predictions() for number in dict.fromkeys(folds)]
        found = prediction_frame(path, (-1, 0, 1)).merge(pd.concat(parts), on=["datetime", "symbol"])
        same = (found.p_up_x == found.p_up_y) & (found.prediction_x == found.prediction_y)
        assert same.groupby([found.datetime, found.symbol]).any().all()
    stored = load_run(publish_stitched(record, tmp_path / "runs"))
    pd.testing.assert_frame_equal(
        stored.daily_pnl("paths"), record.path_profit, check_names=False, check_freq=False, check_index_type=False
    )
    (task,) = comparison(tmp_path / "runs")["tasks"]
    assert task["folds"]["ranks"]["log_loss"] is None and len(task["folds"]["paths"]["nearest"]) == 2


def test_lucky_models_are_as_overfitted_on_paths_that_share_their_rows():
    rng, values = np.random.default_rng(0), []
    for _ in range(40):
        luck = rng.normal(size=(64, 5))  # the same on all paths
        values.append(path_overfitting([pd.DataFrame(luck + rng.normal(0, 0.2, luck.shape)) for _ in range(3)]))
    assert 0.4 < np.mean(values) < 0.6
    assert np.isnan(path_overfitting([])) and np.isnan(path_overfitting([pd.DataFrame(np.ones((4, 2)))]))


def test_ranks_of_folds_that_share_rows_are_not_tested():
    rng = np.random.default_rng(0)
    rows = [dict(model=m, seed=1, fold=f, log_loss=rng.normal()) for m in "abc" for f in range(1, 7)]
    tested, shared = (fold_ranks(pd.DataFrame(rows), is_independent=i) for i in (True, False))
    assert tested["mean_ranks"] == shared["mean_ranks"] and tested["p"] > 0
    assert shared["p"] is None and shared["critical_difference"] is None


def test_decay_after_a_single_fit_is_measured_over_all_test_parts():
    times = pd.date_range("2024-01-01", periods=400, freq="h")
    rng = np.random.default_rng(0)
    p = np.linspace(0.8, 0.4, len(times)) + rng.normal(0, 0.01, len(times))  # the gain falls over the whole time
    frame = pd.DataFrame(dict(datetime=times, symbol="A", y_true=1, p_down=(1 - p) / 2, p_flat=(1 - p) / 2, p_up=p))
    frame["prediction"] = 1
    task = SimpleNamespace(classes=(-1, 0, 1), horizon=1, models=dict(m=[]), predictions=dict(m=frame))
    edges = [(times[100 * k], times[100 * k + 99]) for k in range(4)]
    late = times[-1] + pd.Timedelta(days=1)  # no row of the task lies in the last fold
    spans = pd.DataFrame([dict(fold=f, start=str(a), end=str(b)) for f, (a, b) in enumerate([*edges, (late, late)], 1)])
    shares = dict.fromkeys(range(1, 6), [1 / 3] * 3)
    each, once = (fold_decay(task, spans, shares, trained_once)["m"] for trained_once in (False, True))
    expected = np.log(3 * p).reshape(4, 100).mean(1)
    assert once["gains"] == pytest.approx(expected) and each["first_half"] - each["second_half"] < 0.1
    assert once["first_half"] - once["second_half"] > 0.2
    assert fold_claims(task, spans)["m"] == []
    decay = dict(m=once | dict(p=0.001))
    folds = dict(why="", lead=None, skilled_folds={}, decay=decay, path_overfitting=None, trained_once=True)
    (sentence,) = fold_sentences(dict(data="x", horizon=1, folds=folds))
    assert "second half of the scored period" in sentence and "retrain: each" in sentence


def test_missing_values_in_test_alone_are_filled_from_the_folds_training_rows(panels):
    frame = panels[1].copy()
    frame["rsi"] += np.arange(len(frame))
    data = in_two_files(frame[frame.datetime < frame.datetime.quantile(0.8)])
    data["test"] = frame[frame.datetime >= frame.datetime.quantile(0.8)].copy()
    data["test"].loc[data["test"].index[::5], "rsi"] = np.nan
    data["val"].loc[data["val"].groupby("symbol").cumcount(ascending=False) < 10, "label_h5"] = np.nan
    keys = dict(data="in memory", nan="median", folds=dict(n=3, fold=1))
    trainer = Trainer(dict(model="logistic_regression", horizon=5, data=keys), data=data)
    test = trainer._load(("test",))[0]["test"]
    rows = trainer.folds[0].train.metadata[["datetime", "symbol"]].merge(frame, on=["datetime", "symbol"])
    filled = test.X.base[np.isin(test.X.base[:, 0], frame.rsi.astype("f4"), invert=True), 0]
    assert np.isfinite(test.X.base).all() and len(filled)
    assert filled == pytest.approx(rows.rsi.astype("f4").median())


def test_a_scheme_without_a_fold_is_refused():
    for n in (1, 2):
        grid = GridConfig(("planted",), ("svm",), (5,), (1,), folds=FoldConfig("combinatorial", n=n, test=n + 1))
        with pytest.raises(ConfigError, match="expected at least one group left for training"):
            grid_jobs(grid)


@pytest.mark.slow
def test_a_run_of_another_scheme_does_not_hide_a_failure(folded):
    data = str(list_runs(folded / "runs")[0].manifest["data"])
    for k, folds in enumerate([None, dict(n=3, fold=1), dict(n=4, fold=1)]):
        failed = folded / f"runs/.failed/nearest_h5_20240101_00000{k}_abcdef"
        failed.mkdir(parents=True)
        dataset = dict(folds=folds) if folds else {}
        job = dict(model="nearest", horizon=5, seed=1, data=data, dataset=dataset)
        (failed / "job.json").write_text(json.dumps(dict(parameters=job)))
        (failed / "outcome.json").write_text(json.dumps(dict(status="failed", reason="no")))
    assert [row["run"] for row in failed_runs(folded / "runs")] == ["nearest h5 market", "nearest h5 market fold 1"]


def test_scores_are_drawn_over_times_whose_offset_or_precision_changes():
    starts = ["2024-01-01T00:00:00+01:00", "2024-05-01T00:00:00+02:00", "2024-09-01T00:00:00.500000+02:00"]
    scores = dict(model="a", log_loss=1.0, prior_log_loss=1.1, directional_skill=0.1, sharpe_net=None)
    rows = [dict(fold=i, start=start, end=start) | scores for i, start in enumerate(starts, 1)]
    for table in (rows, [row | {k: row[k][:-6] for k in ("start", "end")} for row in rows]):
        assert len(plot_fold_scores(table, "an example").axes) == 3


def test_the_card_of_a_fold_names_the_fold(folded):
    card = model_card(members_and_record(folded)[0][1])
    assert "Trained and scored on fold 2 of these rows (walk-forward, 3 folds)" in card
    assert "The scored rows were not used in training" in card


def test_folds_with_too_few_rows_are_named_and_do_not_count_as_folds_without_skill(folded):
    (task,) = comparison(folded / "runs")["tasks"]
    folds = task["folds"]
    assert folds["skilled_folds"] == dict(nearest=[]) and folds["untested_folds"] == dict(nearest=[1, 2, 3])
    assert "directional skill in single folds is not tested: each has too few rows." in " ".join(fold_sentences(task))
    assert fold_summary(dict(tasks=[task])).frame.skill_in.tolist() == ["–"]
    folds["skilled_folds"], folds["untested_folds"] = dict(nearest=[2], a=[]), dict(nearest=[1], a=[1, 3])
    folds["decay"]["nearest"]["second_half"] = None
    text = " ".join(fold_sentences(task))
    assert "nearest in fold 2 of 3; for a in none of 3 folds" in text and "fold 1 has too few rows for a test)" in text
    summary = fold_summary(dict(tasks=[task])).frame
    assert summary.skill_in.tolist() == ["1 of 2"] and summary.gain_by_half[0].endswith(", –")
