"""Purged folds against a slow search of every pair of rows, and against the library `purgedcv`.

Where the definitions coincide. `purgedcv` takes a label as [start, end) and lets training begin at the very bar on which a test label ends; here a label
ends on a bar whose close it knows, so ends touch: its `end` is ours and a nanosecond. It cuts at rows and is asked for one symbol where cuts are compared; on a panel its `purge` and
`apply_embargo` are given our cuts. Its embargo is a time after the test; here it may be bars too, and in a walk forward it is kept before the test, where `purgedcv` ignores it."""

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

pytestmark = (
    pytest.mark.no_cover
)  # thousands of small calls, which counting lines slows by half: the notebooks go through the same lines

NS = pd.Timedelta(1, "ns")


def panel(seed, sessions, days, horizon, with_hits, undefined=0.1):
    "Symbols that start and end at different times, lose bars and labels at random."
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


def known_ends(frame, ds):
    "When each sample's label ends, told row by row; None where its bar is not in the file."
    h, found = ds.horizon, []
    bars = {s: f.sort_values("datetime").reset_index(drop=True) for s, f in frame.groupby("symbol")}
    for t, s in zip(ds.metadata.datetime, ds.metadata.symbol):
        mine = bars[s]
        k = int(mine.datetime.searchsorted(t))
        hits = mine.get(f"bars_to_hit_h{h}", pd.Series(h, mine.index))[k]
        k += h if np.isnan(hits) else int(hits)
        found.append(mine.datetime[k].value if k < len(mine) else None)
    return found


def overlap(start, end, i, others):
    return any(start[i] <= end[j] and end[i] >= start[j] for j in others)


def bars_between(frame, symbol, after, before):
    return int(((frame.symbol == symbol) & (frame.datetime > after) & (frame.datetime < before)).sum())


cases = given(
    seed=st.integers(0, 10**6),
    sessions=st.lists(st.sampled_from(sorted(set(SESSIONS) - {"five_minutes"})), min_size=1, max_size=3),
    horizon=st.integers(1, 9),
    with_hits=st.booleans(),
    embargo=st.sampled_from([0, 1, 4, None]),
    seq_len=st.sampled_from([1, 3]),
)


def build(seed, sessions, horizon, with_hits, seq_len):
    days = 60 if all(SESSIONS[s][0] == "1D" for s in sessions) else 8
    frame = panel(seed, sessions, days, horizon, with_hits)
    try:
        ds = TimeSeriesDataset(read_split(frame), horizon, seq_len)
    except ValueError:
        return frame, None, []
    made = []
    for make in (
        lambda e: walk_forward(ds, 3, e),
        lambda e: combinatorial_purged(ds, 4, 1, e),
        lambda e: combinatorial_purged(ds, 4, 2, e),
    ):
        made.append(make)
    return frame, ds, made


@settings(max_examples=60, deadline=None, derandomize=True)
@cases
def test_no_training_label_overlaps_a_test_label_and_none_is_purged_for_nothing(
    seed, sessions, horizon, with_hits, embargo, seq_len
):
    frame, ds, makers = build(seed, sessions, horizon, with_hits, seq_len)
    if ds is None:
        return
    labels, known = LabelSpans(ds), known_ends(frame, ds)
    assert labels.start.tolist() == [t.value for t in ds.metadata.datetime.dt.as_unit("ns")]
    assert all(
        e == k if k else e > frame.datetime[frame.symbol == s].max().value
        for e, k, s in zip(labels.end.tolist(), known, ds.metadata.symbol)
    )
    start, end, stamps = labels.start.tolist(), labels.end.tolist(), ds.metadata.datetime
    for k, make in enumerate(makers):
        try:
            folds = make(embargo)
        except FoldsError as e:
            assert "no training row is left" in str(e) or "timestamps" in str(e)
            continue
        assert len(folds) == (3, 4, 6)[k]
        for fold in folds:
            train, test = fold
            assert not any(overlap(start, end, i, test) for i in train) and all(
                overlap(start, end, i, test) for i in fold.purged
            )
            assert not any(overlap(start, end, i, test) for i in fold.embargoed)
            assert not set(stamps[test]) & set(stamps[np.r_[train, fold.purged, fold.embargoed]].to_list()), (
                "a timestamp is on both sides"
            )
            parts = np.r_[train, test, fold.purged, fold.embargoed]
            candidates = np.flatnonzero(stamps <= stamps[test].max()) if k == 0 else np.arange(len(ds))
            assert np.array_equal(np.sort(parts), candidates)
            if k == 0:
                assert stamps[train].max() < stamps[test].min()


@settings(max_examples=25, deadline=None, derandomize=True)
@cases
def test_the_embargo_is_counted_on_the_rows_own_bars(seed, sessions, horizon, with_hits, embargo, seq_len):
    frame, ds, makers = build(seed, sessions, horizon, with_hits, seq_len)
    if ds is None:
        return
    labels, known, asked = LabelSpans(ds), known_ends(frame, ds), horizon if embargo is None else embargo

    def when(ns):
        return pd.Timestamp(ns)

    for k, make in enumerate(makers[:2]):
        try:
            folds = make(embargo)
        except FoldsError:
            continue
        for fold in folds:
            begin, over = labels.start[fold.test].min(), labels.end[fold.test].max()
            for i in np.r_[fold.train, fold.embargoed]:
                if k == 0:
                    between = bars_between(frame, ds.metadata.symbol[i], when(known[i]), when(begin)) if known[i] else 0
                elif labels.start[i] > over:
                    between = bars_between(frame, ds.metadata.symbol[i], when(over), when(labels.start[i]))
                else:
                    between = asked
                assert (i in fold.embargoed) == (between < asked)


def ours(folds):
    return [(f.train.tolist(), f.test.tolist()) for f in folds]


def theirs(splitter, n):
    return [(a.tolist(), b.tolist()) for a, b in splitter.split(np.zeros((n, 1)))]


@pytest.mark.parametrize("session", ["around_the_clock", "day_session", "daily"])
@pytest.mark.parametrize("with_hits", [False, True], ids=["horizon", "bars_to_hit"])
def test_the_library_cuts_and_purges_one_symbol_alike(session, with_hits):
    for seed, hours in itertools.product(range(3), (0, 7, 50)):
        frame = panel(seed, [session], 90 if session == "daily" else 14, 6, with_hits)
        ds = TimeSeriesDataset(read_split(frame), 6)
        labels, gap = LabelSpans(ds), pd.Timedelta(hours=hours)
        times = dict(
            prediction_times=pd.Series(pd.to_datetime(labels.start)),
            evaluation_times=pd.Series(pd.to_datetime(labels.end) + NS),
        )
        assert ours(combinatorial_purged(ds, 5, 2, gap)) == theirs(
            CombinatorialPurgedCV(n_splits=5, n_test_groups=2, embargo=gap - NS if hours else gap, **times), len(ds)
        )
        assert ours(walk_forward(ds, 4, 0)) == theirs(
            WalkForwardSplit(n_splits=4, test_size=len(ds) // 5, window="expanding", **times), len(ds)
        )


def test_the_library_purges_a_panel_alike():
    "Given our cuts: rows of a timestamp stay together, which its own cuts at rows do not."
    for seed in range(6):
        ds = TimeSeriesDataset(
            read_split(panel(seed, ("around_the_clock", "day_session", "short_session"), 40, 8, True)), 8
        )
        labels, gap = LabelSpans(ds), pd.Timedelta("9h")
        starts, ends = pd.Series(pd.to_datetime(labels.start)), pd.Series(pd.to_datetime(labels.end) + NS)
        for fold in combinatorial_purged(ds, 5, 2, gap):
            rest = np.setdiff1d(np.arange(len(ds)), fold.test)
            kept = purge(rest, fold.test, starts, ends)
            assert np.array_equal(np.setdiff1d(rest, kept), fold.purged)
            assert np.array_equal(apply_embargo(kept, fold.test, starts, ends, gap - NS), fold.train)


def test_a_label_that_ends_after_the_file_is_never_taken_for_shorter_than_it_is():
    for session, seed in itertools.product(SESSIONS, range(4)):
        rng = np.random.default_rng(seed)
        times = calendar(session, "2024-01-01", 90)
        cut = int(rng.integers(len(times) // 2, len(times) - 20))
        frame = pd.DataFrame(dict(datetime=times[:cut], symbol="S", rsi=0.0, label_h9=np.arange(cut) % 3 - 1))
        ds = TimeSeriesDataset(read_split(frame), 9)
        true = times[ds.rows + 9].as_unit("ns").asi8
        assert (LabelSpans(ds).end >= true).all() and np.array_equal(LabelSpans(ds).end[:-9], true[:-9])


def test_order_of_rows_and_time_zone_change_nothing():
    frame = panel(5, ("day_session", "around_the_clock"), 12, 6, True)
    same = [
        frame.sort_values(["symbol", "datetime"]),
        frame.sort_values(["symbol", "datetime"]).assign(
            datetime=lambda f: f.datetime.dt.tz_localize("UTC").dt.tz_convert("America/New_York")
        ),
    ]
    a, b = (combinatorial_purged(TimeSeriesDataset(read_split(f), 6), 5, 2) for f in same)
    assert ours(a) == ours(b)
    mixed = TimeSeriesDataset(read_split(frame), 6)

    def keys(folds):
        return [set(zip(folds.ds.metadata.datetime[f.train], folds.ds.metadata.symbol[f.train])) for f in folds]

    assert keys(combinatorial_purged(mixed, 5, 2)) == keys(a)


def test_samples_are_what_a_model_is_fitted_on():
    ds = TimeSeriesDataset(read_split(panel(1, ("day_session", "around_the_clock"), 20, 4, True)), 4, seq_len=5)
    fold = walk_forward(ds, 2)[1]
    X, y, metadata = take_samples(ds, fold.train)
    assert (
        X.base is ds.X.base
        and np.array_equal(np.asarray(X), np.asarray(ds.X)[fold.train])
        and np.array_equal(y, ds.y[fold.train])
    )
    assert (
        metadata.index.tolist() == list(range(len(fold.train)))
        and metadata.datetime.tolist() == ds.metadata.datetime[fold.train].tolist()
    )


@pytest.mark.parametrize(
    "make, says",
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
def test_what_cannot_be_cut_is_refused_in_one_line(make, says):
    ds = TimeSeriesDataset(read_split(panel(0, ("day_session",), 20, 4, False)), 4)
    with pytest.raises(FoldsError, match=None) as e:
        make(ds)
    assert says in str(e.value) and "\n" not in str(e.value) and isinstance(e.value, ValueError)


def test_a_split_of_the_reference_size_is_cut_well_within_a_second():
    n = 43_547
    stamps = pd.bdate_range("2020-01-01 09:30", periods=n // 78 + 1).repeat(78)[:n] + pd.to_timedelta(
        np.arange(n) % 78 * 5, unit="min"
    )
    ds = TimeSeriesDataset(
        read_split(
            pd.concat(
                [pd.DataFrame(dict(datetime=stamps, symbol=s, rsi=0.0, label_h20=np.arange(n) % 3 - 1)) for s in "AB"]
            )
        ),
        20,
    )
    started = time.process_time()
    walk_forward(ds, 5)
    assert time.process_time() - started < 0.5
