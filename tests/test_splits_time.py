"""`read_splits` raises `SplitOverlap` exactly if labels of an earlier split depend on a later split.

The oracle has every bar of the calendar. A label is decided at the H-th next bar of its symbol, or at the
`bars_to_hit`-th. `read_splits` reads the cut files only, and estimates the bars in the gap from a symbol's hours.

A regular calendar has the same hours every day or every weekday. If train covers two weeks or more of it, the error
is exact: it is raised if and only if a label is decided at or after the first time of the later split. If train is
shorter, no leak is missed, but a gap over hours that train does not contain may raise an error although it is wide
enough. Holidays within the gap are not in the files: a label window that spans one may be missed, by the bars of the
holiday."""

import itertools

import numpy as np
import pandas as pd
import pytest

from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.splits import SplitOverlap, read_splits

# Line counting slows thousands of small calls by half; the notebooks run the same lines.
pytestmark = pytest.mark.no_cover

SESSIONS = dict(  # name -> (bar, weekdays, first hour, last hour) of a symbol's day
    around_the_clock=("1h", range(7), 0, 24),
    weekdays_around_the_clock=("1h", range(5), 0, 24),
    day_session=("30min", range(5), 9.5, 16),
    short_session=("15min", range(5), 10, 12),
    over_lunch=("1h", range(5), 8, 18),
    daily=("1D", range(5), 0, 24),
    every_day=("1D", range(7), 0, 24),
    five_minutes=("5min", range(5), 9, 11),
)


def calendar(session, start, days):
    "Every bar of a symbol."
    bar, weekdays, first, last = SESSIONS[session]
    times = pd.date_range(start, periods=int(pd.Timedelta(days=days) / pd.Timedelta(bar)), freq=bar)
    hour = times.hour + times.minute / 60
    return times[times.weekday.isin(list(weekdays)) & (hour >= first) & (hour < last)]


def market(rng, sessions, days, horizon, with_hits):
    "Bars of all symbols and the time at which each label is decided; the label is null if the calendar ends before."
    parts = []
    for k, session in enumerate(sessions):
        times = calendar(session, "2024-01-01", days)
        n = len(times)
        hits = rng.integers(1, horizon + 1, n) if with_hits else np.full(n, horizon)
        end = np.arange(n) + hits
        decided = end < n
        end_times = times[np.where(decided, end, n - 1)]
        frame = pd.DataFrame(dict(datetime=times, symbol=f"S{k}", feature=rng.normal(size=n), end=end_times))
        frame["label_h"] = np.where(decided, np.arange(n) % 3 - 1.0, np.nan)
        if with_hits:
            frame["bars_to_hit_h"] = hits
        parts.append(frame)
    columns = {c: f"{c}{horizon}" for c in ("label_h", "bars_to_hit_h")}
    return pd.concat(parts, ignore_index=True).rename(columns=columns)


def cut(frame, rng, horizon, weeks):
    "Train of at least `weeks` weeks, and val after a gap of a few bars to a few days."
    times = np.sort(frame.datetime.unique())
    minimum = np.searchsorted(times, times[0] + np.timedelta64(weeks * 7, "D"))
    i = rng.integers(minimum, len(times) - 3 * horizon - 10)
    wide = frame.symbol.nunique() ** 2 * (3 * horizon + 2)
    gaps = [0, 1, rng.integers(0, 2 * horizon + 2), rng.integers(0, wide), rng.integers(0, 2 * wide)]
    j = min(i + int(rng.choice(gaps)), len(times) - horizon - 5)
    return frame[frame.datetime < times[i]], frame[frame.datetime >= times[j]]


def leaks(train, val, horizon):
    "Mask of the labels of train that are decided at or after the start of val."
    return train[f"label_h{horizon}"].notna() & (train.end >= val.datetime.min())


def rows_in_error(train, val, horizon):
    "Number of rows in the error message; 0 without an error."
    frames = {s: f.drop(columns="end").sample(frac=1, random_state=0) for s, f in [("train", train), ("val", val)]}
    try:
        read_splits(frames, (horizon,))
    except SplitOverlap as e:
        return int(str(e).split(f"label_h{horizon}: ")[1].split(" row")[0].replace(",", ""))
    return 0


def cases(seed, sessions, weeks, with_hits, n):
    "Random (horizon, train, val)."
    rng = np.random.default_rng(seed)
    for _ in range(n):
        horizon = int(rng.integers(1, 10 if "1D" in {SESSIONS[s][0] for s in sessions} else 25))
        frame = market(rng, sessions, int(weeks * 7 + rng.integers(60, 90)), horizon, with_hits)
        train, val = cut(frame, rng, horizon, weeks)
        if train.symbol.nunique() == len(sessions):
            yield horizon, train, val


PANELS = [(s,) for s in SESSIONS] + [
    ("weekdays_around_the_clock",) * 3,
    ("day_session", "weekdays_around_the_clock"),
    ("around_the_clock", "day_session", "short_session"),
    ("daily", "daily"),
]
name = "+".join


@pytest.mark.parametrize("with_hits", [False, True], ids=["horizon", "bars_to_hit"])
@pytest.mark.parametrize("sessions", PANELS, ids=name)
def test_an_error_is_raised_if_and_only_if_a_label_crosses_the_boundary(sessions, with_hits):
    "On regular calendars the number of rows in the message is exact too."
    with_leak = []
    for horizon, train, val in cases(len(sessions) + with_hits, sessions, 2, with_hits, 15):
        truth = int(leaks(train, val, horizon).sum())
        assert rows_in_error(train, val, horizon) == truth, (horizon, train.datetime.max(), val.datetime.min())
        with_leak.append(truth > 0)
    assert len(with_leak) >= 12
    assert 2 <= sum(with_leak) <= len(with_leak) - 2, "both outcomes must occur"


@pytest.mark.parametrize("sessions", PANELS, ids=name)
def test_a_leak_is_never_missed_if_train_is_short(sessions):
    "Train of days instead of weeks: the number of rows may be too high, never too low."
    n_leaks = 0
    rng = np.random.default_rng(3)
    for weeks in np.repeat([2 / 7, 4 / 7, 1, 10 / 7], 7):
        horizon = int(rng.integers(1, 12))
        frame = market(rng, sessions, 30, horizon, False)
        times = np.sort(frame.datetime.unique())
        i = np.searchsorted(times, times[0] + np.timedelta64(int(weeks * 7 * 24 + rng.integers(0, 24)), "h"))
        j = min(i + int(rng.integers(0, 3 * horizon)), len(times) - 2)
        train, val = frame[frame.datetime < times[i]], frame[frame.datetime >= times[j]]
        if not len(train) or not set(train[f"label_h{horizon}"].dropna()) >= {-1, 0, 1}:
            continue
        truth = int(leaks(train, val, horizon).sum())
        assert rows_in_error(train, val, horizon) >= truth, (horizon, train.datetime.max(), val.datetime.min(), truth)
        n_leaks += truth > 0
    assert n_leaks >= 4


@pytest.mark.parametrize("with_hits", [False, True], ids=["horizon", "bars_to_hit"])
def test_setting_the_labels_to_null_removes_the_error(with_hits):
    "Rows stay as context; only the labels that cross the boundary become null."
    n_fixed = 0
    for horizon, train, val in cases(7, ("day_session", "weekdays_around_the_clock"), 2, with_hits, 30):
        over = leaks(train, val, horizon)
        if not over.any():
            continue
        purged = train.assign(**{f"label_h{horizon}": train[f"label_h{horizon}"].mask(over)})
        assert rows_in_error(purged, val, horizon) == 0 and len(purged) == len(train)
        all_but_one = over & (np.cumsum(over) < over.sum())
        if all_but_one.any() and over.sum() > 1:
            partly = train.assign(**{f"label_h{horizon}": train[f"label_h{horizon}"].mask(all_but_one)})
            assert rows_in_error(partly, val, horizon) == 1
        n_fixed += 1
    assert n_fixed >= 8


def test_a_gap_of_one_horizon_removes_the_error():
    for horizon, train, val in cases(8, ("day_session",), 2, False, 25):
        start = val.datetime.min()
        bars = np.sort(train.datetime.unique())
        assert rows_in_error(train[train.end < start], val, horizon) == 0
        assert rows_in_error(train[train.datetime <= bars[-1]], val, horizon) == leaks(train, val, horizon).sum()


@pytest.mark.parametrize("sessions", [("day_session",), ("weekdays_around_the_clock", "day_session")], ids=name)
def test_a_holiday_in_train_does_not_change_the_result(sessions):
    "A weekday without bars, one to four weeks before the cut."
    rng = np.random.default_rng(11)
    for horizon, train, val in cases(11, sessions, 6, False, 15):
        holiday = train.datetime.max().normalize() - pd.Timedelta(days=int(rng.integers(7, 28)))
        traded = train[train.datetime.dt.normalize() != holiday]
        assert rows_in_error(traded, val, horizon) == leaks(traded, val, horizon).sum()


def test_splits_out_of_order_raise_an_error():
    for horizon, train, val in itertools.islice(cases(9, ("day_session", "daily"), 2, False, 10), 10):
        with pytest.raises(SplitOverlap, match="at or after the first"):
            read_splits(dict(train=val.drop(columns="end"), val=train.drop(columns="end")), (horizon,))


def test_a_time_zone_does_not_change_the_result():
    for horizon, train, val in cases(10, ("day_session",), 2, False, 12):
        zoned = [f.assign(datetime=f.datetime.dt.tz_localize("UTC")) for f in (train, val)]
        assert rows_in_error(*zoned, horizon) == rows_in_error(train, val, horizon)


def test_windows_stay_within_their_symbol():
    "The features are the symbol and the row number: a window holds consecutive rows of the symbol of its label."
    rng = np.random.default_rng(1)
    frame = market(rng, ("day_session", "around_the_clock", "short_session"), 40, 5, False)
    frame["owner"] = frame.symbol.str[1:].astype(float)
    frame["feature"] = frame.groupby("symbol").cumcount().astype(float)
    middle = frame.datetime.quantile(0.6)
    train, val = frame[frame.end < middle], frame[frame.datetime >= middle]
    shuffled = train.drop(columns="end").sample(frac=1, random_state=2)
    for split in read_splits(dict(train=shuffled, val=val.drop(columns="end"))).values():
        for seq_len, gap in itertools.product((1, 2, 37), (0, 1)):
            ds = TimeSeriesDataset(split, 5, seq_len, gap)
            X = ds.X[:].reshape(len(ds), seq_len, 2)
            row, owner = X[..., ds.feature_columns.index("feature")], X[..., ds.feature_columns.index("owner")]
            assert (owner == ds.metadata.symbol.str[1:].astype(float).to_numpy()[:, None]).all()
            assert (np.diff(row, axis=1) == 1).all()
            labelled = ds.metadata.merge(frame, on=["datetime", "symbol"], validate="one_to_one").feature
            assert (row[:, -1] == labelled - gap).all()
