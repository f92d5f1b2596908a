"""Splits that share time are refused, and only those: against an oracle that knows the whole calendar.

The oracle has every bar there ever was, so it knows when a label is decided: at the H-th next bar of its symbol, or the
`bars_to_hit`-th. `read_splits` sees the cut files alone and has to guess from a symbol's habits how many bars lie in the gap.

What holds. On a regular calendar (the same hours every day or every weekday) that train shows for two weeks or more, the refusal is
exact: raised if and only if a defined label is decided at or after the first time of the later split. Where train is shorter, a
leak is still never missed, but a gap over hours that train has not shown may be refused although it is wide enough. Holidays within
the gap cannot be known from the files: a label window that spans one may be missed, by the bars of the holiday."""

import itertools

import numpy as np
import pandas as pd
import pytest

from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.splits import SplitOverlap, read_splits

pytestmark = (
    pytest.mark.no_cover
)  # thousands of small calls, which counting lines slows by half: the notebooks go through the same lines

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
    "Bars of all symbols with the true time at which each label is decided; undefined (null) where the calendar ends before it."
    parts = []
    for k, session in enumerate(sessions):
        times = calendar(session, "2024-01-01", days)
        n = len(times)
        hits = rng.integers(1, horizon + 1, n) if with_hits else np.full(n, horizon)
        end = np.arange(n) + hits
        known = end < n
        frame = pd.DataFrame(
            dict(datetime=times, symbol=f"S{k}", feature=rng.normal(size=n), end=times[np.where(known, end, n - 1)])
        )
        frame["label_h"] = np.where(known, np.arange(n) % 3 - 1.0, np.nan)
        if with_hits:
            frame["bars_to_hit_h"] = hits
        parts.append(frame)
    return pd.concat(parts, ignore_index=True).rename(
        columns={c: f"{c}{horizon}" for c in ("label_h", "bars_to_hit_h")}
    )


def cut(frame, rng, horizon, weeks):
    "Train of at least so many weeks, a gap of a few bars to a few days, val."
    times = np.sort(frame.datetime.unique())
    least = np.searchsorted(times, times[0] + np.timedelta64(weeks * 7, "D"))
    i = rng.integers(least, len(times) - 3 * horizon - 10)
    wide = frame.symbol.nunique() ** 2 * (3 * horizon + 2)
    j = min(
        i + int(rng.choice([0, 1, rng.integers(0, 2 * horizon + 2), rng.integers(0, wide), rng.integers(0, 2 * wide)])),
        len(times) - horizon - 5,
    )
    return frame[frame.datetime < times[i]], frame[frame.datetime >= times[j]]


def leaks(train, val, horizon):
    return train[f"label_h{horizon}"].notna() & (train.end >= val.datetime.min())


def refused(train, val, horizon):
    "How many rows the error counts; 0 when there is none."
    frames = {s: f.drop(columns="end").sample(frac=1, random_state=0) for s, f in [("train", train), ("val", val)]}
    try:
        read_splits(frames, (horizon,))
    except SplitOverlap as e:
        return int(str(e).split(f"label_h{horizon}: ")[1].split(" row")[0].replace(",", ""))
    return 0


def cases(seed, sessions, weeks, with_hits, n):
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
def test_refused_if_and_only_if_a_label_reaches_over(sessions, with_hits):
    "On regular calendars even the number of rows is right."
    seen = []
    for horizon, train, val in cases(len(sessions) + with_hits, sessions, 2, with_hits, 25):
        truth = int(leaks(train, val, horizon).sum())
        assert refused(train, val, horizon) == truth, (horizon, train.datetime.max(), val.datetime.min())
        seen.append(truth > 0)
    assert len(seen) >= 20 and 2 <= sum(seen) <= len(seen) - 2, "both outcomes have to occur"


@pytest.mark.parametrize("sessions", PANELS, ids=name)
def test_a_short_train_never_hides_a_leak(sessions):
    "Days instead of weeks: habits are not known yet, so the answer may be too careful, never too bold."
    found = 0
    rng = np.random.default_rng(3)
    for weeks in np.repeat([2 / 7, 4 / 7, 1, 10 / 7], 12):
        horizon = int(rng.integers(1, 12))
        frame = market(rng, sessions, 30, horizon, False)
        times = np.sort(frame.datetime.unique())
        i = np.searchsorted(times, times[0] + np.timedelta64(int(weeks * 7 * 24 + rng.integers(0, 24)), "h"))
        j = min(i + int(rng.integers(0, 3 * horizon)), len(times) - 2)
        train, val = frame[frame.datetime < times[i]], frame[frame.datetime >= times[j]]
        if not len(train) or not set(train[f"label_h{horizon}"].dropna()) >= {-1, 0, 1}:
            continue
        truth = int(leaks(train, val, horizon).sum())
        assert refused(train, val, horizon) >= truth, (horizon, train.datetime.max(), val.datetime.min(), truth)
        found += truth > 0
    assert found >= 5


@pytest.mark.parametrize("with_hits", [False, True], ids=["horizon", "bars_to_hit"])
def test_labels_set_to_null_mend_it(with_hits):
    "Rows stay, as context; just the labels that reach over go."
    mended = 0
    for horizon, train, val in cases(7, ("day_session", "weekdays_around_the_clock"), 2, with_hits, 30):
        over = leaks(train, val, horizon)
        if not over.any():
            continue
        purged = train.assign(**{f"label_h{horizon}": train[f"label_h{horizon}"].mask(over)})
        assert refused(purged, val, horizon) == 0 and len(purged) == len(train)
        spared = over & (np.cumsum(over) < over.sum())
        if spared.any() and over.sum() > 1:
            assert (
                refused(train.assign(**{f"label_h{horizon}": train[f"label_h{horizon}"].mask(spared)}), val, horizon)
                == 1
            )
        mended += 1
    assert mended >= 8


def test_leaving_the_horizon_between_mends_it():
    for horizon, train, val in cases(8, ("day_session",), 2, False, 25):
        start = val.datetime.min()
        bars = np.sort(train.datetime.unique())
        assert refused(train[train.end < start], val, horizon) == 0
        assert refused(train[train.datetime <= bars[-1]], val, horizon) == leaks(train, val, horizon).sum()


@pytest.mark.parametrize("sessions", [("day_session",), ("weekdays_around_the_clock", "day_session")], ids=name)
def test_a_holiday_in_train_changes_nothing(sessions):
    "A weekday without bars, one to four weeks before the cut."
    rng = np.random.default_rng(11)
    for horizon, train, val in cases(11, sessions, 6, False, 15):
        off = train.datetime.max().normalize() - pd.Timedelta(days=int(rng.integers(7, 28)))
        closed = train[train.datetime.dt.normalize() != off]
        over = leaks(closed, val, horizon)
        assert refused(closed, val, horizon) == over.sum()


def test_splits_out_of_order_are_refused():
    for horizon, train, val in itertools.islice(cases(9, ("day_session", "daily"), 2, False, 10), 10):
        with pytest.raises(SplitOverlap, match="at or after the first"):
            read_splits(dict(train=val.drop(columns="end"), val=train.drop(columns="end")), (horizon,))


def test_a_time_zone_changes_nothing():
    for horizon, train, val in cases(10, ("day_session",), 2, False, 12):
        zoned = [f.assign(datetime=f.datetime.dt.tz_localize("UTC")) for f in (train, val)]
        assert refused(*zoned, horizon) == refused(train, val, horizon)


def test_windows_stay_within_their_symbol():
    "The feature says whose row it is and which: a window holds consecutive rows of the symbol it is labelled for."
    rng = np.random.default_rng(1)
    frame = market(rng, ("day_session", "around_the_clock", "short_session"), 40, 5, False)
    frame["owner"], frame["feature"] = (
        frame.symbol.str[1:].astype(float),
        frame.groupby("symbol").cumcount().astype(float),
    )
    middle = frame.datetime.quantile(0.6)
    train, val = frame[frame.end < middle], frame[frame.datetime >= middle]
    for split in read_splits(
        dict(train=train.drop(columns="end").sample(frac=1, random_state=2), val=val.drop(columns="end"))
    ).values():
        for seq_len, gap in itertools.product((1, 2, 37), (0, 1)):
            ds = TimeSeriesDataset(split, 5, seq_len, gap)
            X = ds.X[:].reshape(len(ds), seq_len, 2)
            row, owner = X[..., ds.feature_columns.index("feature")], X[..., ds.feature_columns.index("owner")]
            assert (owner == ds.metadata.symbol.str[1:].astype(float).to_numpy()[:, None]).all() and (
                np.diff(row, axis=1) == 1
            ).all()
            labelled = ds.metadata.merge(frame, on=["datetime", "symbol"], validate="one_to_one").feature
            assert (row[:, -1] == labelled - gap).all()
