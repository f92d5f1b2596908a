"""Purged folds against a slow search of every pair of rows, and against the library `purgedcv`.

The library is compared where its definitions are the same as ours. The differences:

- `purgedcv` takes a label as [start, end) and lets training begin at the bar on which a test label ends. Here a label
  uses the close of the bar on which it ends, so equal times overlap: its `end` is ours plus a nanosecond.
- It cuts at rows, so cuts are compared for one symbol only. On a panel, its `purge` and `apply_embargo` get our cuts.
- Its embargo is a time after the test. Here the embargo may be bars too. In a walk forward it applies before the test,
  where `purgedcv` ignores it.
"""

import itertools
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from purgedcv import CombinatorialPurgedCV, WalkForwardSplit, apply_embargo, purge
from test_splits_time import SESSIONS, calendar

from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.folds import FoldsError, LabelSpans, combinatorial_purged, take_samples, walk_forward
from modelfactory.data.splits import read_split

# Line coverage slows these thousands of small calls by half; the notebooks cover the same lines.
pytestmark = pytest.mark.no_cover

NS = pd.Timedelta(1, "ns")


def panel(seed, sessions, days, horizon, with_hits, undefined=0.1):
    "Symbols that start and end at different times, with bars and labels missing at random."
    rng, parts = np.random.default_rng(seed), []
    for k, session in enumerate(sessions):
        times = calendar(session, "2024-01-01", days)
        lo, hi = sorted(rng.choice(len(times) + 1, 2, replace=False)) if k else (0, len(times))
        times = times[lo:hi][rng.random(hi - lo) > rng.uniform(0, 0.3)]
        parts.append(pd.DataFrame(dict(datetime=times, symbol=f"S{k}", rsi=rng.normal(size=len(times)))))
    frame = pd.concat(parts, ignore_index=True)
    frame[f"label_h{horizon}"] = np.where(rng.random(len(frame)) < undefined, np.nan, rng.integers(-1, 2, len(frame)))
    if with_hits:
        frame[f"bars_to_hit_h{horizon}"] = np.where(
            rng.random(len(frame)) < 0.05, np.nan, rng.integers(1, horizon + 1, len(frame))
        )
    return frame.sample(frac=1, random_state=seed)


def label_ends(frame, ds):
    "End of each sample's label in nanoseconds, row by row; None if its last bar is not in the file."
    h, ends = ds.horizon, []
    bars_of = {}
    for s, bars in frame.groupby("symbol"):
        bars = bars.sort_values("datetime")
        hits = bars.get(f"bars_to_hit_h{h}", pd.Series(h, bars.index)).tolist()
        bars_of[s] = [t.value for t in bars.datetime.dt.as_unit("ns")], hits
    for t, s in zip(ds.metadata.datetime.dt.as_unit("ns"), ds.metadata.symbol, strict=True):
        times, hits = bars_of[s]
        k = times.index(t.value)
        k += h if np.isnan(hits[k]) else int(hits[k])
        ends.append(times[k] if k < len(times) else None)
    return ends


def overlapping(start, end, samples):
    "Whether the label of each sample overlaps a label of `samples`, by a comparison with each of them."
    return ((start[:, None] <= end[samples]) & (end[:, None] >= start[samples])).any(1)


def bars_between(times, after, before):
    "Number of a symbol's bars between two times, all in nanoseconds."
    return sum(after < t < before for t in times)


cases = given(
    seed=st.integers(0, 10**6),
    sessions=st.lists(st.sampled_from(sorted(set(SESSIONS) - {"five_minutes"})), min_size=1, max_size=3),
    horizon=st.integers(1, 9),
    with_hits=st.booleans(),
    embargo=st.sampled_from([0, 1, 4, None]),
    seq_len=st.sampled_from([1, 3]),
)


def build(seed, sessions, horizon, with_hits, seq_len):
    "A panel, its dataset (None if it has no sample), and functions from an embargo to folds."
    days = 60 if all(SESSIONS[s][0] == "1D" for s in sessions) else 8
    frame = panel(seed, sessions, days, horizon, with_hits)
    try:
        ds = TimeSeriesDataset(read_split(frame), horizon, seq_len)
    except ValueError:
        return frame, None, []
    makers = [
        lambda e: walk_forward(ds, 3, e),
        lambda e: combinatorial_purged(ds, 4, 1, e),
        lambda e: combinatorial_purged(ds, 4, 2, e),
    ]
    return frame, ds, makers


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@cases
def test_no_training_label_overlaps_a_test_label_and_every_purged_label_does(
    seed, sessions, horizon, with_hits, embargo, seq_len
):
    frame, ds, makers = build(seed, sessions, horizon, with_hits, seq_len)
    if ds is None:
        return
    labels, ends = LabelSpans(ds), label_ends(frame, ds)
    assert labels.start.tolist() == [t.value for t in ds.metadata.datetime.dt.as_unit("ns")]
    last_bars = {symbol: t.value for symbol, t in frame.groupby("symbol").datetime.max().dt.as_unit("ns").items()}
    for label_end, true_end, symbol in zip(labels.end.tolist(), ends, ds.metadata.symbol, strict=True):
        assert label_end == true_end if true_end else label_end > last_bars[symbol]
    start, end, timestamps = labels.start, labels.end, ds.metadata.datetime.to_numpy()
    for k, make in enumerate(makers):
        try:
            folds = make(embargo)
        except FoldsError as e:
            assert "no training row is left" in str(e) or "timestamps" in str(e)
            continue
        assert len(folds) == (3, 4, 6)[k]
        for fold in folds:
            train, test = fold
            overlaps = overlapping(start, end, test)
            assert not overlaps[train].any()
            assert overlaps[fold.purged].all()
            assert not overlaps[fold.embargoed].any()
            not_test = np.r_[train, fold.purged, fold.embargoed]
            assert not np.isin(timestamps[test], timestamps[not_test]).any(), "a timestamp is on both sides"
            parts = np.r_[train, test, fold.purged, fold.embargoed]
            candidates = np.flatnonzero(timestamps <= timestamps[test].max()) if k == 0 else np.arange(len(ds))
            assert np.array_equal(np.sort(parts), candidates)
            if k == 0:
                assert timestamps[train].max() < timestamps[test].min()


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@cases
def test_the_embargo_is_counted_on_the_rows_own_bars(seed, sessions, horizon, with_hits, embargo, seq_len):
    frame, ds, makers = build(seed, sessions, horizon, with_hits, seq_len)
    if ds is None:
        return
    labels, ends = LabelSpans(ds), label_ends(frame, ds)
    starts, required = labels.start.tolist(), horizon if embargo is None else embargo
    times = {s: [t.value for t in bars.datetime.dt.as_unit("ns")] for s, bars in frame.groupby("symbol")}
    symbols = ds.metadata.symbol.tolist()
    for k, make in enumerate(makers[:2]):
        try:
            folds = make(embargo)
        except FoldsError:
            continue
        for fold in folds:
            test_start = int(labels.start[fold.test].min())
            test_end = int(labels.end[fold.test].max())
            embargoed = set(fold.embargoed.tolist())
            for i in np.r_[fold.train, fold.embargoed].tolist():
                bars = times[symbols[i]]
                if k == 0:
                    between = bars_between(bars, ends[i], test_start) if ends[i] else 0
                elif starts[i] > test_end:
                    between = bars_between(bars, test_end, starts[i])
                else:
                    between = required
                assert (i in embargoed) == (between < required)


def our_folds(folds):
    return [(f.train.tolist(), f.test.tolist()) for f in folds]


def library_folds(splitter, n):
    return [(a.tolist(), b.tolist()) for a, b in splitter.split(np.zeros((n, 1)))]


@pytest.mark.parametrize("session", ["around_the_clock", "day_session", "daily"])
@pytest.mark.parametrize("with_hits", [False, True], ids=["horizon", "bars_to_hit"])
def test_folds_of_one_symbol_equal_those_of_the_library(session, with_hits):
    for seed, hours in itertools.product(range(3), (0, 7, 50)):
        frame = panel(seed, [session], 90 if session == "daily" else 14, 6, with_hits)
        ds = TimeSeriesDataset(read_split(frame), 6)
        labels, gap = LabelSpans(ds), pd.Timedelta(hours=hours)
        times = dict(
            prediction_times=pd.Series(pd.to_datetime(labels.start)),
            evaluation_times=pd.Series(pd.to_datetime(labels.end) + NS),
        )
        library_gap = gap - NS if hours else gap
        combinatorial = CombinatorialPurgedCV(n_splits=5, n_test_groups=2, embargo=library_gap, **times)
        assert our_folds(combinatorial_purged(ds, 5, 2, gap)) == library_folds(combinatorial, len(ds))
        forward = WalkForwardSplit(n_splits=4, test_size=len(ds) // 5, window="expanding", **times)
        assert our_folds(walk_forward(ds, 4, 0)) == library_folds(forward, len(ds))


def test_purging_of_a_panel_equals_that_of_the_library():
    "With our cuts, because its own cuts would separate rows of one timestamp."
    for seed in range(6):
        frame = panel(seed, ("around_the_clock", "day_session", "short_session"), 40, 8, True)
        ds = TimeSeriesDataset(read_split(frame), 8)
        labels, gap = LabelSpans(ds), pd.Timedelta("9h")
        starts, ends = pd.Series(pd.to_datetime(labels.start)), pd.Series(pd.to_datetime(labels.end) + NS)
        for fold in combinatorial_purged(ds, 5, 2, gap):
            not_test = np.setdiff1d(np.arange(len(ds)), fold.test)
            kept = purge(not_test, fold.test, starts, ends)
            assert np.array_equal(np.setdiff1d(not_test, kept), fold.purged)
            assert np.array_equal(apply_embargo(kept, fold.test, starts, ends, gap - NS), fold.train)


def test_labels_that_end_after_the_file_are_never_too_short():
    for session, seed in itertools.product(SESSIONS, range(4)):
        rng = np.random.default_rng(seed)
        times = calendar(session, "2024-01-01", 90)
        cut = int(rng.integers(len(times) // 2, len(times) - 20))
        frame = pd.DataFrame(dict(datetime=times[:cut], symbol="S", rsi=0.0, label_h9=np.arange(cut) % 3 - 1))
        ds = TimeSeriesDataset(read_split(frame), 9)
        true_end = times[ds.rows + 9].as_unit("ns").asi8
        end = LabelSpans(ds).end
        assert (end >= true_end).all() and np.array_equal(end[:-9], true_end[:-9])


def test_folds_do_not_depend_on_row_order_or_time_zone():
    frame = panel(5, ("day_session", "around_the_clock"), 12, 6, True)
    ordered = frame.sort_values(["symbol", "datetime"])
    new_york = ordered.datetime.dt.tz_localize("UTC").dt.tz_convert("America/New_York")
    frames = [ordered, ordered.assign(datetime=new_york)]
    a, b = (combinatorial_purged(TimeSeriesDataset(read_split(f), 6), 5, 2) for f in frames)
    assert our_folds(a) == our_folds(b)
    mixed = TimeSeriesDataset(read_split(frame), 6)

    def keys(folds):
        metadata = folds.ds.metadata
        return [set(zip(metadata.datetime[f.train], metadata.symbol[f.train], strict=True)) for f in folds]

    assert keys(combinatorial_purged(mixed, 5, 2)) == keys(a)


def test_take_samples_returns_rows_of_the_dataset():
    ds = TimeSeriesDataset(read_split(panel(1, ("day_session", "around_the_clock"), 20, 4, True)), 4, seq_len=5)
    fold = walk_forward(ds, 2)[1]
    X, y, metadata = take_samples(ds, fold.train)
    assert X.base is ds.X.base
    assert np.array_equal(np.asarray(X), np.asarray(ds.X)[fold.train])
    assert np.array_equal(y, ds.y[fold.train])
    assert metadata.index.tolist() == list(range(len(fold.train)))
    assert metadata.datetime.tolist() == ds.metadata.datetime[fold.train].tolist()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda ds: walk_forward(ds, 0), "n_folds = 0: expected a whole number from 1"),
        (lambda ds: walk_forward(ds, 2.5), "n_folds = 2.5"),
        (lambda ds: walk_forward(ds, True), "n_folds = True"),
        (lambda ds: walk_forward(ds, 10**6), "timestamps"),
        (lambda ds: walk_forward(ds, 3, -1), "embargo = -1"),
        (lambda ds: walk_forward(ds, 3, "1h"), "embargo = '1h'"),
        (lambda ds: walk_forward(ds, 3, pd.Timedelta("-1h")), "embargo = "),
        (lambda ds: walk_forward(ds, 3, pd.NaT), "embargo = "),
        (lambda ds: walk_forward(ds, 3, 10**6), "fold 1 of 3: no training row is left"),
        (lambda ds: walk_forward(ds, 3, pd.Timedelta("900D")), "no training row"),
        (lambda ds: combinatorial_purged(ds, 1, 1), "n_groups = 1"),
        (lambda ds: combinatorial_purged(ds, 4, 4), "n_test_groups = 4"),
        (lambda ds: combinatorial_purged(ds, 4, 0), "n_test_groups = 0"),
        (lambda ds: combinatorial_purged(ds, 100, 99), "no training row"),
    ],
)
def test_impossible_folds_raise_a_one_line_error(make, message):
    ds = TimeSeriesDataset(read_split(panel(0, ("day_session",), 20, 4, False)), 4)
    with pytest.raises(FoldsError, match=None) as e:
        make(ds)
    assert message in str(e.value) and "\n" not in str(e.value) and isinstance(e.value, ValueError)


def test_a_split_of_the_reference_size_takes_less_than_half_a_second():
    n = 43_547
    opening = pd.bdate_range("2020-01-01 09:30", periods=n // 78 + 1).repeat(78)[:n]
    timestamps = opening + pd.to_timedelta(np.arange(n) % 78 * 5, unit="min")
    columns = dict(datetime=timestamps, rsi=0.0, label_h20=np.arange(n) % 3 - 1)
    frame = pd.concat([pd.DataFrame(dict(columns, symbol=s)) for s in "AB"])
    ds = TimeSeriesDataset(read_split(frame), 20)
    start = time.process_time()
    walk_forward(ds, 5)
    assert time.process_time() - start < 0.5
