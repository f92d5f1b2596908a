"All models are scored on the same rows: the first windows of a later split take context from earlier splits."

import numpy as np
import pandas as pd
import pytest
from fabricate import fitted_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_foundation import checkpoints, market  # noqa: F401, checkpoints is a fixture
from test_windows import naive, tables

from modelfactory.data.bundled import resolve_data
from modelfactory.data.dataset import DatasetConfig, TimeSeriesDataset, history_windows, last_rows, load_datasets
from modelfactory.data.splits import BadDatetime, FeatureSetsDiffer, SplitOverlap, SplitsError, read_split
from modelfactory.runs.predict import predict_run
from modelfactory.training.selftest import future_perturbation, prefix_test
from modelfactory.training.trainer import Trainer
from modelfactory.tuning.study import Objective

pytestmark = pytest.mark.slow


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def cut(frame, shares):
    "Parts of the frame by time, oldest first."
    times = np.sort(frame.datetime.unique())
    edges = [times[int(share * len(times))] for share in shares]
    part = np.searchsorted(edges, frame.datetime.to_numpy(), side="right")
    return [frame[part == k].reset_index(drop=True) for k in range(len(shares) + 1)]


def cut_and_purge(frame, share, horizon=5):
    "Train and val; the last labels of each symbol in train are null, since bars of val decide them."
    train, val = cut(frame.sort_values(["symbol", "datetime"]), [share])
    return purged(train, horizon), val


def purged(frame, horizon=5):
    "The frame with null for the last labels of each symbol, which later bars decide."
    last = frame.sort_values("datetime").groupby("symbol").cumcount(ascending=False) < horizon
    return frame.assign(label_h5=frame.label_h5.where(~last))


def last_part_of(samples, frame, late):
    "The naive samples of the full frame with their label in the late part, in the order of its symbols."
    X, y, meta = samples
    order = {symbol: i for i, symbol in enumerate(dict.fromkeys(late.symbol))}
    start = late.datetime.min()
    rows = [i for i, m in enumerate(meta) if m[0] >= start]
    rows.sort(key=lambda i: order[meta[i][1]])
    return [X[i] for i in rows], [y[i] for i in rows], [meta[i] for i in rows]


@pytest.mark.no_cover
@examples(120)
@given(tables(), st.integers(1, 12), st.integers(0, 1), st.lists(st.floats(0.1, 0.9), min_size=1, max_size=2))
def test_samples_equal_those_of_one_concatenated_frame(frame, seq_len, gap, shares):
    "Symbols may be missing in any part; rows are in any order; labels may be missing."
    *early, late = cut(frame, sorted(shares))
    early = [part for part in early if len(part)]
    X, y, meta = last_part_of(naive(frame, seq_len, gap), frame, late)
    context = [read_split(part) for part in early]
    if not y:
        with pytest.raises(SplitsError, match="no sample"):
            TimeSeriesDataset(read_split(late), 3, seq_len, gap, context)
        return
    ds = TimeSeriesDataset(read_split(late), 3, seq_len, gap, context)
    expected = np.stack(X)[:, 0] if seq_len == 1 else np.stack(X)
    assert np.array_equal(np.asarray(ds.X), expected) and ds.y.tolist() == y
    names = ["datetime", "symbol", "horizon", "sample_weight", "close"]
    assert list(ds.metadata[names].itertuples(index=False, name=None)) == meta
    assert np.array_equal(ds.split.labels[3][ds.rows], ds.y)
    assert ds.context is None or ds.context.datetimes.max() < late.datetime.min()


@pytest.mark.no_cover
@examples(60)
@given(tables(), st.integers(1, 6), st.integers(1, 20), st.floats(0.2, 0.8))
def test_history_windows_have_the_requested_length(frame, seq_len, length, share):
    early, late = cut(frame, [share])
    if not len(early):
        return
    gap = 1
    try:
        ds = TimeSeriesDataset(read_split(late), 3, seq_len, gap, read_split(early), context_rows=length + gap - 1)
    except SplitsError:
        return
    joined = TimeSeriesDataset(read_split(pd.concat([early, late])), 3, seq_len, gap)
    keys = pd.MultiIndex.from_frame(joined.metadata[["datetime", "symbol"]])
    rows = keys.get_indexer(pd.MultiIndex.from_frame(ds.metadata[["datetime", "symbol"]]))
    assert (rows >= 0).all()
    expected = np.asarray(history_windows(joined.X, "close", length))[rows]
    assert np.array_equal(np.asarray(history_windows(ds.X, "close", length)), expected)


def test_the_number_of_samples_does_not_depend_on_the_window():
    "Without context, tabular models had 3,712 rows, and networks with 60 bars 3,653."
    for data in ("eurusd", "planted"):
        config = DatasetConfig(str(resolve_data(data)))
        short, long = (load_datasets(config, 5, seq_len, ("train", "val", "test"))[0] for seq_len in (1, 60))
        for split in ("val", "test"):
            assert short[split].metadata.equals(long[split].metadata) and np.array_equal(short[split].y, long[split].y)
            assert len(short[split]) == (short[split].split.labels[5] != -128).sum()
        assert len(long["train"]) < len(short["train"]) and long["train"].context is None


def test_only_a_symbol_without_earlier_rows_loses_its_first_samples():
    rng = np.random.default_rng(0)

    def bars(start, n, symbol):
        times = pd.date_range(start, periods=n, freq="h")
        columns = dict(f0=rng.normal(size=n), label_h3=rng.integers(-1, 2, n))
        return pd.DataFrame(dict(datetime=times, symbol=symbol, **columns))

    train = bars("2024-01-01", 50, "OLD")
    val = pd.concat([bars("2024-02-01", 30, "NEW"), bars("2024-02-01", 30, "OLD")])
    ds = TimeSeriesDataset(read_split(val), 3, 10, 1, read_split(train))
    assert ds.metadata.symbol.value_counts().to_dict() == dict(OLD=30, NEW=20)


def test_without_context_nothing_is_copied_and_context_keeps_few_rows():
    train, val = (read_split(part) for part in cut(market(400), [0.7]))
    alone, ds = TimeSeriesDataset(val, 5, 16), TimeSeriesDataset(val, 5, 16, 1, train)
    assert alone.X.base is val.matrix and ds.split is val
    assert len(ds.X.base) == len(val) + 16 * 2 and len(ds.context) == 16 * 2
    assert not np.shares_memory(ds.context.matrix, train.matrix)


def test_a_context_that_does_not_fit_the_split_raises_an_error():
    train, val = cut(market(200), [0.5])
    in_utc = train.assign(datetime=train.datetime.dt.tz_localize("UTC"))
    for context, words, error in (
        (val, "does not come after", SplitOverlap),
        (in_utc, "time zone", BadDatetime),
        (train.assign(extra=1.0), "extra", FeatureSetsDiffer),
    ):
        with pytest.raises(error, match=words):
            TimeSeriesDataset(read_split(val), 5, 4, 1, read_split(context))
    first, second = (read_split(part) for part in cut(train, [0.5]))
    with pytest.raises(SplitOverlap):
        TimeSeriesDataset(read_split(val), 5, 99, 1, [second, first])


def test_a_context_in_another_time_zone_gives_the_same_samples():
    "This once raised an AttributeError with train in UTC and val in New York."
    zones = ("UTC", "America/New_York", "Asia/Tokyo")
    parts = [part.assign(datetime=part.datetime.dt.tz_localize("UTC")) for part in cut(market(300), [0.3, 0.6])]
    moved = [part.assign(datetime=part.datetime.dt.tz_convert(zone)) for part, zone in zip(parts, zones, strict=True)]
    for k in (1, 2):
        same, other = [
            TimeSeriesDataset(read_split(p[k]), 5, 99, 1, [read_split(f) for f in p[:k]]) for p in (parts, moved)
        ]
        assert np.array_equal(np.asarray(same.X), np.asarray(other.X)) and np.array_equal(same.y, other.y)
        assert str(other.metadata.datetime.dt.tz) == zones[k]
        assert (same.metadata.datetime == other.metadata.datetime).all()
    without_zone = parts[0].assign(datetime=parts[0].datetime.dt.tz_localize(None))
    with pytest.raises(BadDatetime, match="time zone"):
        last_rows([read_split(without_zone), read_split(parts[1])], ["A", "B"], 200)
    frames = dict(train=purged(moved[0]), val=moved[1])
    read = load_datasets(DatasetConfig("frames"), 5, 16, ("train", "val"), frames)[0]
    assert read["val"].context is not None


# Models ---------------------------------------------------------------------------------------------------------------


def as_dict(*frames):
    "Frames by split name; test may be missing."
    return dict(zip(("train", "val", "test"), frames, strict=False))


@pytest.mark.parametrize("name, config", [("logistic_regression", {}), ("gru", dict(max_epochs=1))])
def test_predictions_equal_those_on_one_concatenated_frame(name, config):
    train, val = cut_and_purge(market(600), 0.6)
    task = dict(model=name, horizon=5, data="in memory", config=config | dict(sequence_length=12))
    trainer = Trainer(task, as_dict(train, val))
    trainer.run_full_pipeline()
    joined = TimeSeriesDataset(read_split(pd.concat([train, val])), 5, 12)
    late = np.flatnonzero(joined.metadata.datetime >= val.datetime.min())
    ds = trainer.datasets["val"]
    assert len(late) == len(ds) == len(val)
    expected = trainer.model.predict(joined.X.subset(late), joined.metadata.iloc[late].reset_index(drop=True))
    assert np.array_equal(expected.symbols, ds.metadata.symbol)
    predicted = trainer.model.predict(ds.X, ds.metadata)
    assert np.allclose(predicted.probabilities, expected.probabilities, rtol=0, atol=1e-6)
    assert future_perturbation(trainer).ok and prefix_test(trainer).ok


MODES = dict(probe=dict(mode="probe"), zero_shot=dict(mode="zero_shot", barrier_up=1.0, barrier_down=1.0))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_timesfm_uses_the_closes_of_earlier_splits(mode, checkpoints):  # noqa: F811
    train, val = cut_and_purge(market(600), 0.8)
    config = dict(checkpoint=str(checkpoints["timesfm"]), sequence_length=1, context_length=64, cache=False) | mode
    trainer = Trainer(dict(model="timesfm", horizon=5, data="in memory", config=config), as_dict(train, val))
    trainer.prepare_data()
    trainer.train()
    ds = trainer.datasets["val"]
    joined = TimeSeriesDataset(read_split(pd.concat([train, val])), 5)
    late = np.flatnonzero(joined.metadata.datetime >= val.datetime.min())
    keys = joined.metadata.iloc[late].reset_index(drop=True)
    expected = trainer.model.predict(joined.X.subset(late), keys).probabilities
    probabilities = trainer.model.predict(ds.X, ds.metadata).probabilities
    assert len(probabilities) == len(val) and np.allclose(probabilities, expected, rtol=0, atol=1e-4)
    alone = TimeSeriesDataset(ds.split, 5)
    without = trainer.model.predict(alone.X, alone.metadata).probabilities
    assert not np.allclose(without, probabilities[np.isin(ds.rows, alone.rows)], rtol=0, atol=1e-3)
    assert future_perturbation(trainer).ok and prefix_test(trainer).ok


@pytest.fixture(scope="module")
def linear_run(tmp_path_factory):
    task = dict(model="logistic_regression", horizon=5, data="planted", preset="quick")
    return fitted_run(tmp_path_factory.mktemp("linear"), task, ("val", "test"))


@pytest.mark.parametrize("seq_len", [1, 16])
def test_predictions_on_a_folder_equal_those_of_its_evaluation(seq_len, linear_run, tmp_path):
    run = linear_run
    if seq_len > 1:
        config = dict(max_epochs=1, sequence_length=seq_len, hidden_size=4, batch_size=512)
        task = dict(model="gru", horizon=5, data="planted", preset="quick", config=config)
        run = fitted_run(tmp_path, task, ("val", "test"))
    for split in ("val", "test"):
        stored, now = run.predictions(split), predict_run(run, "planted", split)
        both = stored.merge(now, on=["datetime", "symbol"], suffixes=("", "_now"))
        assert len(both) == len(stored)
        assert len(now) == len(pd.read_parquet(resolve_data("planted") / f"{split}_scaled.parquet"))
        assert np.allclose(both.p_up, both.p_up_now, rtol=0, atol=1e-6) and not now.attrs["skipped"]
    bars = pd.read_parquet(resolve_data("planted") / "test_scaled.parquet")
    assert len(predict_run(run, bars)) == len(bars) - seq_len * bars.symbol.nunique()


def test_predictions_on_a_folder_without_earlier_splits_equal_those_on_its_file(linear_run, tmp_path):
    bars = pd.read_parquet(resolve_data("planted") / "test_scaled.parquet")
    (tmp_path / "new").mkdir()
    bars.to_parquet(tmp_path / "new/test_scaled.parquet")
    assert predict_run(linear_run, tmp_path / "new").equals(predict_run(linear_run, bars))


@pytest.mark.parametrize("on", ["train", "val"])
def test_the_tuner_scores_windows_of_every_length_on_the_same_rows(on):
    trainer = Trainer(dict(model="gru", horizon=5, data="planted", config=dict(sequence_length=4)))
    objective = Objective(trainer, on=on)
    objective.prepare_data()
    short, long = (objective.fold_data(seq_len) for seq_len in (4, 60))
    assert len(short) == len(long)
    assert all(a.test[2].equals(b.test[2]) for a, b in zip(short, long, strict=True))


def test_an_ensemble_has_the_context_that_its_members_need(checkpoints):  # noqa: F811
    timesfm = dict(checkpoint=str(checkpoints["timesfm"]), context_length=512)
    config = dict(members=dict(logistic_regression={}, timesfm=timesfm))
    trainer = Trainer(dict(model="average", horizon=5, data="planted", config=config))
    assert trainer.context_rows == 512 + 32


def test_context_comes_from_several_earlier_splits():
    a, b, _ = cut(market(90, symbols=("A",)), [0.4, 0.45])
    rows = last_rows([read_split(a), read_split(b)], ["A"], 20)
    assert len(rows) == 20 and rows.datetimes.equals(pd.DatetimeIndex(np.sort(np.r_[a.datetime, b.datetime])[-20:]))
