"""`resample_bars` joins bars as a loop over bars does, never across a session or a day, and never with later bars.

The oracle places each bar in its interval by stepping from the start of the day or of the session, and joins the bars
of an interval one by one. Volumes are whole numbers, so that their sums are exact in any order."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfactory.data.calendars import CalendarError
from modelfactory.data.readers import BarsError
from modelfactory.data.resample import resample_bars

pytestmark = pytest.mark.slow

ZONE = "America/New_York"


@st.composite
def markets(draw, zone=None, start="2024-03-08 07:00", minutes=4 * 1440):
    "Bars of one to three symbols at irregular minutes; the days hold a change to daylight saving time in New York."
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    parts = []
    for symbol in draw(st.sampled_from(["A", "BA", "CAB"])):
        n = draw(st.integers(2, 60))
        times = pd.Timestamp(start) + pd.to_timedelta(np.sort(rng.choice(minutes, n, replace=False)), "min")
        close = 64 + rng.integers(-32, 32, n) / 4
        op, high = close + rng.integers(-4, 4, n) / 4, close + rng.integers(8, 16, n) / 4
        columns = dict(open=op, high=high, low=close - 4, close=close, volume=rng.integers(0, 9, n).astype(float))
        parts.append(pd.DataFrame(dict(datetime=times, symbol=symbol, **columns)))
    bars = pd.concat(parts, ignore_index=True)
    if zone:
        times = bars.datetime.dt.tz_localize(zone, nonexistent="NaT", ambiguous="NaT")
        bars = bars.assign(datetime=times)[times.notna()]
    return bars.drop_duplicates(["symbol", "datetime"]).sample(frac=1, random_state=0)


def day_of(time, hour):
    "Start and end of the trading day of a time, by the clock."
    zone, clock = time.tz, time.tz_localize(None)
    start = clock.normalize() + pd.Timedelta(hours=hour)
    start -= pd.Timedelta(days=1) if start > clock else pd.Timedelta(0)
    return [(start + pd.Timedelta(days=k)).tz_localize(zone, nonexistent="shift_forward") for k in (0, 1)]


def interval_of(time, edges, length, stamp):
    "The interval of a bar, by stepping from the first of the edges."
    left, end = edges
    while True:
        right = min(left + length, end) if length < pd.Timedelta(days=1) else end
        if time < right or (stamp == "close" and time == right):
            return left, right
        left = right


def naive(bars, length, stamp, edges_of):
    "Joined bars as dictionaries, with the end of the interval of each."
    rows, inside = [], pd.Timedelta(1 if stamp == "close" else 0, "ns")
    for symbol, of_symbol in bars.groupby("symbol", sort=False):
        for bar in of_symbol.sort_values("datetime").itertuples():
            left, right = interval_of(bar.datetime, edges_of(bar.datetime - inside), length, stamp)
            if not rows or (rows[-1]["symbol"], rows[-1]["right"]) != (symbol, right):
                time = left if stamp == "open" else right
                row = dict(datetime=time, symbol=symbol, open=bar.open, high=bar.high, low=bar.low, volume=0)
                rows.append(row | dict(right=right))
            row = rows[-1]
            row["high"], row["low"] = max(row["high"], bar.high), min(row["low"], bar.low)
            row["close"], row["volume"] = bar.close, row["volume"] + bar.volume
    return rows


def table(rows):
    return pd.DataFrame(rows, columns=["datetime", "symbol", "open", "high", "low", "close", "volume"])


def assert_same(joined, rows):
    expected = table(rows)
    assert len(joined) == len(expected)
    if len(expected):
        dtypes = dict(volume=float, datetime=joined.datetime.dtype)
        pd.testing.assert_frame_equal(joined, expected.astype(dtypes), check_dtype=False, check_exact=True)


RULES = st.sampled_from(["7min", "15min", "1h", "90min", "4h", "1D"])


@settings(max_examples=20, deadline=None)
@given(st.data(), RULES, st.sampled_from(["open", "close"]), st.integers(0, 23), st.sampled_from([None, ZONE]))
def test_bars_of_time_equal_those_of_a_loop(data, rule, stamp, hour, zone):
    "With the incomplete last bars and without; a bar is complete if the input reaches the end of its interval."
    bars = data.draw(markets(zone))
    options = dict(stamp=stamp, day_start=hour)
    rows = naive(bars, pd.Timedelta(rule), stamp, lambda time: day_of(time, hour))
    assert_same(resample_bars(bars, rule, incomplete="keep", **options), rows)
    last = bars.datetime.max()
    assert_same(resample_bars(bars, rule, **options), [row for row in rows if row["right"] <= last])


def parts_of_sessions(name):
    "Edges of the sessions of an exchange and of their breaks, from the library."
    import exchange_calendars

    schedule = exchange_calendars.get_calendar(name, start="2024-01-02", end="2024-12-30").schedule
    return sorted({edge for _, row in schedule.iterrows() for edge in row.dropna()})


@pytest.mark.parametrize("name", ["XNYS", "XTKS", "CMES"])
def test_no_bar_crosses_a_session_or_a_break(name):
    edges = pd.DatetimeIndex(parts_of_sessions(name))

    def edges_of(time):
        at = edges.searchsorted(time.tz_convert("UTC"), side="right")
        return edges[at - 1].tz_convert(time.tz), edges[at].tz_convert(time.tz)

    @settings(max_examples=6, deadline=None)
    @given(markets("UTC", "2024-07-01 00:00"), st.sampled_from(["15min", "2h"]), st.sampled_from(["open", "close"]))
    def check(bars, rule, stamp):
        rows = naive(bars, pd.Timedelta(rule), stamp, edges_of)
        assert_same(resample_bars(bars, rule, stamp=stamp, calendar=name, incomplete="keep"), rows)

    check()


@settings(max_examples=20, deadline=None)
@given(markets(), st.sampled_from(["3 volume", "20 volume", "500 dollars", "4e3 dollars"]))
def test_bars_of_volume_and_dollars_equal_those_of_a_loop(bars, rule):
    amount, unit = float(rule.split()[0]), rule.split()[1]
    rows = []
    if (bars.groupby("symbol").volume.sum() == 0).any():
        with pytest.raises(BarsError, match="all volumes"):
            resample_bars(bars, rule)
        return
    for symbol, of_symbol in bars.groupby("symbol", sort=False):
        filled = amount
        for bar in of_symbol.sort_values("datetime").itertuples():
            if filled >= amount:
                rows.append(dict(symbol=symbol, open=bar.open, high=bar.high, low=bar.low, volume=0))
                filled = 0
            row = rows[-1]
            filled += bar.volume * (bar.close if unit == "dollars" else 1)
            row["high"], row["low"] = max(row["high"], bar.high), min(row["low"], bar.low)
            row |= dict(datetime=bar.datetime, close=bar.close, volume=row["volume"] + bar.volume)
            row["full"] = filled >= amount
    assert_same(resample_bars(bars, rule, incomplete="keep"), rows)
    assert_same(resample_bars(bars, rule), [row for row in rows if row["full"]])


ALL_RULES = st.sampled_from(["7min", "1h", "1D", "20 volume", "500 dollars"])


def with_volume(bars):
    return bars.assign(volume=bars.volume + 1)


@settings(max_examples=15, deadline=None)
@given(markets(), ALL_RULES, st.sampled_from(["open", "close"]), st.integers(0, 4 * 1440))
def test_later_bars_never_change_earlier_ones(bars, rule, stamp, minute):
    "The complete bars of the input up to a time are the first complete bars of each symbol of the whole input."
    bars = with_volume(bars)
    until = bars[bars.datetime <= pd.Timestamp("2024-03-08 07:00") + pd.Timedelta(minutes=minute)]
    if not len(until):
        return
    early, late = (resample_bars(part, rule, stamp=stamp) for part in (until, bars))
    for symbol, part in early.groupby("symbol", sort=False):
        whole = late[late.symbol == symbol].iloc[: len(part)]
        pd.testing.assert_frame_equal(part.reset_index(drop=True), whole.reset_index(drop=True), check_exact=True)
    if stamp == "close" and len(early):
        assert early.datetime.max() <= until.datetime.max()


@settings(max_examples=15, deadline=None)
@given(markets(), ALL_RULES, st.sampled_from(["open", "close"]))
def test_resampling_twice_changes_nothing_and_keeps_the_totals(bars, rule, stamp):
    bars = with_volume(bars)
    once = resample_bars(bars, rule, stamp=stamp, incomplete="keep")
    twice = resample_bars(once, rule, stamp=stamp, incomplete="keep")
    if "dollars" not in rule:  # the close of a bar may lie below the closes that filled it
        pd.testing.assert_frame_equal(once, twice, check_exact=True)
    before, after = (t.sort_values("datetime", kind="stable").groupby("symbol", sort=True) for t in (bars, once))
    for column, how in dict(volume="sum", high="max", low="min", open="first", close="last").items():
        assert before[column].agg(how).equals(after[column].agg(how)), column


def test_an_early_close_ends_a_bar_of_local_times():
    "Naive times are local times of the exchange; the half day of 3 July 2024 ends at 13:00."
    times = pd.date_range("2024-07-03 09:30", "2024-07-03 12:30", freq="30min")
    bars = pd.DataFrame(dict(datetime=times, symbol="A", open=1.0, high=1.0, low=1.0, close=1.0, volume=1.0))
    joined = resample_bars(bars, "2h", stamp="open", calendar="XNYS", incomplete="keep")
    assert joined.datetime.tolist() == [pd.Timestamp("2024-07-03 09:30"), pd.Timestamp("2024-07-03 11:30")]
    with pytest.raises(CalendarError, match="no exchange 'NYSE2'"):
        resample_bars(bars, "2h", calendar="NYSE2")


def test_what_was_done_is_said():
    times = pd.date_range("2024-07-03", periods=50, freq="5min")
    bars = pd.DataFrame(dict(datetime=times, symbol="A", open=1.0, high=1.0, low=1.0, close=1.0, volume=1.0))
    bars.attrs["layout"] = "read as an example"
    joined = resample_bars(bars, "1h")
    text = "resampled to 1h: 50 bars to 4; 1 incomplete last bar dropped, first A 2024-07-03 04:00:00"
    assert joined.attrs == dict(layout="read as an example", resampled=text)
    for rule, reason in [("7min", "apart"), ("1min", "cannot be divided"), ("2D", "at most one day")]:
        with pytest.raises(BarsError, match=reason):
            resample_bars(bars, rule)
