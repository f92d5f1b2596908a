"""A named exchange replaces what is learnt from the bars: bars between splits, trading days and their number a year.

The oracle has every bar of a year of the exchange, from the library's minutes, and cuts a gap out of them. Gaps hold
holidays and half days, which the bars outside the gap cannot show."""

import json
from functools import cache

import numpy as np
import pandas as pd
import pytest
from quick import small_splits

from modelfactory.cli import main
from modelfactory.configuration import ConfigError, TradingRules
from modelfactory.data.calendars import CalendarError, session_days
from modelfactory.data.dataset import DatasetConfig
from modelfactory.data.folds import purge_splits
from modelfactory.data.splits import SplitOverlap, read_splits
from modelfactory.evaluation.backtest import label_backtest, trading_day, tranche_backtest
from modelfactory.evaluation.evaluator import ModelEvaluator
from modelfactory.evaluation.permutation import profit_by_day
from modelfactory.training.trainer import Trainer, trainer_config

pytestmark = pytest.mark.slow


@cache
def year(name, minutes, side="left"):
    "Every bar of an exchange in 2024, in UTC; `minutes` = 0: daily bars at midnight, without a time zone."
    import exchange_calendars

    calendar = exchange_calendars.get_calendar(name, start="2024-01-01", end="2024-12-31", side=side)
    if not minutes:
        return calendar.sessions
    times = calendar.minutes
    opens = calendar.opens.reindex(calendar.minutes_to_sessions(times)).array
    return times[np.asarray((times - opens) / pd.Timedelta("1min")) % minutes == 0]


def run(*arguments):
    "Exit code of a command."
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    return stopped.value.code


def frame(times, horizon, seed=0):
    rng = np.random.default_rng(seed)
    columns = dict(datetime=times, symbol="A", close=100 + rng.normal(size=len(times)).cumsum() / 50)
    labels = {f"label_h{horizon}": np.resize([-1, 0, 1], len(times))}
    return pd.DataFrame(columns | dict(feature=rng.normal(size=len(times))) | labels)


def rows_in_error(train, val, horizon, **options):
    try:
        read_splits(dict(train=frame(train, horizon), val=frame(val, horizon)), (horizon,), **options)
    except SplitOverlap as e:
        return int(str(e).split(f"label_h{horizon}: ")[1].split(" row")[0].replace(",", ""))
    return 0


@pytest.mark.parametrize(
    ("name", "minutes", "zone", "side"),
    [
        ("XNYS", 30, "UTC", "left"),
        ("XNYS", 30, "America/New_York", "left"),  # clock times without a time zone
        ("XNYS", 30, "UTC", "right"),  # bars stamped at their close
        ("XNYS", 0, None, "left"),
        ("XHKG", 30, "UTC", "left"),  # a lunch break and half days
        ("CMES", 60, "UTC", "left"),  # sessions across midnight
    ],
)
def test_an_error_is_raised_if_and_only_if_a_label_crosses_the_boundary(name, minutes, zone, side):
    "The number of rows in the message is exact, in gaps around the Thanksgiving half day and other holidays."
    times, rng = year(name, minutes, side), np.random.default_rng(minutes)
    if side == "right":
        times = times[1:]
    times = pd.DatetimeIndex(times if zone is None else times.tz_convert(zone))
    if zone == "America/New_York":
        times = times.tz_localize(None)
    horizon, outcomes = 12 if minutes else 4, []
    for holiday in ("2024-03-28", "2024-07-03", "2024-11-27", "2024-12-23"):
        for _ in range(3):
            i = min(times.searchsorted(pd.Timestamp(holiday, tz=times.tz)) + rng.integers(-5, 6), len(times) - 2)
            j = min(i + rng.integers(0, 2 * horizon), len(times) - 2)
            truth = max(0, horizon - (j - i))
            train, val = times[max(0, i - 1500) : i], times[j : j + 60]
            assert rows_in_error(train, val, horizon, calendar=name) == truth, (train[-1], val[0])
            outcomes.append(truth > 0)
    assert 2 <= sum(outcomes) <= len(outcomes) - 2


def test_the_estimate_from_the_bars_misses_labels_across_a_holiday():
    "What the named calendar is for; without it, the check is the one of tests/test_splits_time.py."
    times = year("XNYS", 30)
    i = times.searchsorted(pd.Timestamp("2024-07-02 19:30", tz="UTC")) + 1
    j = times.searchsorted(pd.Timestamp("2024-07-05", tz="UTC"))
    train, val = times[i - 800 : i], times[j : j + 60]
    assert j - i == 7 and rows_in_error(train, val, 12, calendar="XNYS") == 12 - 7
    assert rows_in_error(train, val, 12) == 0


def test_purge_by_a_calendar_removes_the_error(tmp_path, capsys):
    times = year("XNYS", 30)
    i = times.searchsorted(pd.Timestamp("2024-07-02 19:30", tz="UTC")) + 1
    (tmp_path / "data").mkdir()
    for name, part in dict(train=times[i - 800 : i], val=times[i + 7 : i + 99], test=times[i + 150 : i + 250]).items():
        frame(part, 12).to_parquet(tmp_path / "data" / f"{name}_scaled.parquet", index=False)
    assert run("check", tmp_path / "data", "--calendar", "XNYS") == 2
    assert "5 rows decided by bars" in capsys.readouterr().err
    assert run("purge", tmp_path / "data", "--output", tmp_path / "purged", "--calendar", "XNYS") == 0
    assert run("check", tmp_path / "purged", "--calendar", "XNYS") == 0
    assert purge_splits(tmp_path / "data", tmp_path / "learnt")["labels purged"].sum() == 0


def test_bars_outside_the_sessions_are_counted_or_refused():
    times = year("XNYS", 30)[:1000]
    sets = dict(train=times[:700], val=times[750:])

    def report(change, calendar="XNYS"):
        data = {name: frame(change(part), 5) for name, part in sets.items()}
        return read_splits(data, calendar=calendar).report.warnings

    plain = report(lambda t: t)
    assert not any("XNYS" in text for text in plain)
    early = report(lambda t: t.append(t[:3] - pd.Timedelta("8h")).sort_values())
    assert "train: 3 of 703 bars lie outside the sessions of XNYS, first A 2024-01-02 06:30:00+00:00" in early[0]
    gaps = report(lambda t: t[(t.day != 9) | (t.month != 1)])
    assert "train: 1 of 54 sessions of XNYS has no bar of A, first 2024-01-09: check for missing data" in gaps
    with pytest.raises(CalendarError, match="100% would lie inside if these clock times were in UTC"):
        report(lambda t: t.tz_localize(None))
    with pytest.raises(CalendarError, match="100% lie within the sessions of XNYS: name this exchange"):
        report(lambda t: t, "XTKS")
    with pytest.raises(CalendarError, match="no exchange 'NYSE2', did you mean"):
        report(lambda t: t, "NYSE2")


def test_days_and_days_a_year_are_those_of_the_exchange():
    "Sessions that start the evening before are one day in any time zone, in the backtest and in the shift test."
    times = year("CMES", 60)[2000:4000]
    rng = np.random.default_rng(0)
    table = frame(times, 5).assign(prediction=rng.choice([-1, 1], len(times)))
    results = []
    for zone in ("UTC", "America/Chicago", "Asia/Tokyo"):
        part = table.assign(datetime=table.datetime.dt.tz_convert(zone))
        result = tranche_backtest(part, part, 5, TradingRules(calendar="CMES"))
        profit, days = profit_by_day(part, part, 5, TradingRules(calendar="CMES"))
        assert days.equals(result.daily.index) and np.allclose(
            profit(part.prediction.to_numpy(float)), result.daily.net
        )
        assert set(days.weekday) == set(range(5))
        results.append(result)
    assert len({len(r.daily) for r in results}) == 1 and len({r.trading_days for r in results}) == 1
    assert np.allclose(results[0].daily.to_numpy(), results[2].daily.to_numpy())
    assert "days a year of CMES" in repr(results[0])
    clock = tranche_backtest(table, table, 5, TradingRules())
    assert len(clock.daily) > len(results[0].daily)
    labels = label_backtest(table, np.ones(len(table)), 5, TradingRules(calendar="CMES"))
    assert labels.trading_days == results[0].trading_days
    assert trading_day(times, 0, "CMES").equals(session_days("CMES", times))


@pytest.mark.parametrize(("step", "expected"), [(1, 252), (5, 50.4)])
@pytest.mark.parametrize("n", [3, 40, 200])
def test_days_a_year_of_daily_and_of_weekly_bars(step, expected, n):
    days = year("XNYS", 0)[::step][:n]
    table = frame(days, 5).assign(prediction=1)
    result = tranche_backtest(table, table, 1, TradingRules(calendar="XNYS"))
    assert abs(result.trading_days / expected - 1) < 0.01
    assert tranche_backtest(table, table, 1, TradingRules(calendar="XNYS", trading_days=9)).trading_days == 9


def test_the_calendar_of_the_data_reaches_every_score(tmp_path):
    folder = small_splits(tmp_path / "splits")
    plain, named = (
        Trainer(dict(model="logistic_regression", horizon=5, data=dict(data=str(folder), **keys)), runs=tmp_path)
        for keys in ({}, dict(calendar="XNYS"))
    )
    assert named.config.rules == TradingRules(calendar="XNYS") and plain.config.rules == TradingRules()
    assert named.evaluator.calendar == "XNYS"
    stored = named.resolved_config()
    assert stored["data"]["calendar"] == "XNYS" and "calendar" not in stored
    assert trainer_config(json.loads(json.dumps(stored))).rules == named.config.rules
    assert not {"calendar", "rolls"} & set(plain.resolved_config()["data"])
    with pytest.raises(ConfigError, match="unknown key 'calendar'"):
        trainer_config(dict(model="flat", horizon=5, data=str(folder), calendar="XNYS"))
    with pytest.raises(ConfigError, match="no exchange"):
        Trainer(dict(model="logistic_regression", horizon=5, data=dict(data=str(folder), calendar="X"))).prepare_data()


def test_without_a_calendar_nothing_of_it_is_imported(tmp_path):
    import subprocess
    import sys

    code = f"""
import sys
from modelfactory.data.splits import read_splits
read_splits({str(small_splits(tmp_path / "splits"))!r})
import modelfactory.data.resample, modelfactory.evaluation.backtest
print("exchange_calendars" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"


def test_keys_of_a_dataset_are_stored_only_if_set():
    named = set(DatasetConfig("x", calendar="XNYS", rolls=("2024",)).stored())
    assert named - set(DatasetConfig("x").stored()) == {"calendar", "rolls"}
    scores = ModelEvaluator(5, n_boot=0, **vars(TradingRules(calendar="XNYS")))
    assert scores.rules == TradingRules(calendar="XNYS")
