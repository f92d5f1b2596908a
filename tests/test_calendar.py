"Trading days: their number a year, the hour at which they begin, and the settings of both."

import json

import numpy as np
import pandas as pd
import pytest

from modelfactory.configuration import ConfigError, SettingsError, TradingRules, settings
from modelfactory.evaluation.backtest import BacktestError, days_per_year, label_backtest, trading_day, tranche_backtest
from modelfactory.evaluation.evaluator import ModelEvaluator
from modelfactory.evaluation.permutation import shift_test
from modelfactory.training.trainer import Trainer, trainer_config

pytestmark = pytest.mark.slow

ZONE = "America/New_York"


def walk(times, seed=0, sd=0.01, drift=0.0):
    "Closes of a random walk with random predictions."
    rng = np.random.default_rng(seed)
    close = 100 * np.exp((drift + rng.normal(0, sd, len(times))).cumsum())
    return pd.DataFrame(dict(datetime=times, symbol="A", close=close, prediction=rng.choice([-1, 1], len(times))))


def sharpe(pnl):
    return pnl.mean() / pnl.std(ddof=1)


# Days a year


@pytest.mark.parametrize(
    "freq, n, expected",
    [
        ("W-FRI", 300, 365.25 / 7),
        ("D", 300, 365.25),
        ("B", 300, 365.25 * 5 / 7),
        ("MS", 40, 12),
        ("W-FRI", 5, 365.25 / 7),
        ("D", 20, 365.25),
        ("B", 20, 365.25 * 5 / 7),
    ],
)
def test_days_a_year_of_long_samples(freq, n, expected):
    days = pd.date_range("2023-01-02", periods=n, freq=freq)
    assert abs(days_per_year(days) / expected - 1) < 0.005
    zoned = days.tz_localize(ZONE)
    assert days_per_year(zoned.repeat(2)[np.random.default_rng(0).permutation(2 * n)]) == days_per_year(days)


@pytest.mark.parametrize(
    "days, expected",
    [
        *[
            (pd.bdate_range(start, periods=n), 5)
            for start in ("2024-01-02", "2024-01-04", "2024-01-05")
            for n in (2, 3, 4)
        ],
        (pd.date_range("2024-01-01", periods=7), 7),
        (pd.date_range("2024-01-05", periods=2, freq="7D"), 1),
        (pd.DatetimeIndex(["2024-03-15", "2024-03-22", "2024-03-28"]), 7 * 2 / 13),
        (pd.date_range("2024-01-07", periods=6), 6),
        (pd.date_range("2024-01-05", periods=4), 7),
        (pd.DatetimeIndex(["2024-01-02"]), 5),
    ],
)
def test_days_a_year_of_a_few_days(days, expected):
    "An earlier version gave 156.5 days a year for three business days and 104 for two."
    assert np.isclose(days_per_year(days), expected * 365.25 / 7)


def test_holidays_count_in_long_samples_only():
    from pandas.tseries.holiday import USFederalHolidayCalendar

    off = USFederalHolidayCalendar().holidays("2020", "2024-12-31")
    days = pd.bdate_range("2020-01-01", "2024-12-31").difference(off)
    assert abs(days_per_year(days) - 250) < 1
    christmas = days[(days >= "2024-12-16") & (days <= "2025-01-03")]
    assert days_per_year(christmas) == 365.25 * 5 / 7


@pytest.mark.parametrize("freq, n, expected", [("W-FRI", 200, 52.18), ("h", 24 * 100, 365.25), ("2h", 12 * 21, 365.25)])
def test_a_sharpe_ratio_is_annualised_by_the_days_of_its_bars(freq, n, expected):
    "An earlier version gave 1.47 instead of .72 for weekly bars, and 1.60 instead of 1.87 for bars around the clock."
    table = walk(pd.date_range("2023-01-06", periods=n, freq=freq), drift=0.001)
    result = tranche_backtest(table.assign(prediction=1), table, 1)
    assert np.isclose(result.trading_days, expected, rtol=0.001)
    assert np.isclose(result.metrics()["sharpe_net"], sharpe(result.daily.net) * result.trading_days**0.5)
    assert result.metrics()["days_per_year"] == result.trading_days
    assert f"{result.trading_days:.0f} days a year from 0:00" in repr(result)


def test_a_number_of_trading_days_overrides_the_calendar_of_the_bars():
    table = walk(pd.date_range("2023-01-06", periods=200, freq="W-FRI"))
    result = tranche_backtest(table, table, 1, TradingRules(trading_days=100))
    assert result.trading_days == result.metrics()["days_per_year"] == 100
    sides = np.sign(table.prediction)
    assert label_backtest(table, sides, 1).metrics()["days_per_year"] == pytest.approx(52.18, abs=0.01)
    assert label_backtest(table, sides, 1, TradingRules(trading_days=7)).metrics()["days_per_year"] == 7


# The hour at which a day begins


def eurusd(weeks=30):
    "Half-hourly bars of FX weeks: Sunday 17:00 to Friday 17:00 New York time."
    times = pd.date_range("2024-01-07 17:00", periods=weeks * 7 * 48, freq="30min", tz=ZONE)
    week_hour = (times.dayofweek * 24 + times.hour + 24) % (7 * 24)  # from Sunday 0:00
    return walk(times[(week_hour >= 17) & (week_hour < 5 * 24 + 17)], sd=0.0005)


def test_fx_days_that_roll_at_17_are_monday_to_friday():
    "With days that begin at midnight, Sunday has only 7 hours and Friday only 17."
    table = eurusd()
    rolled, midnight = (tranche_backtest(table, table, 5, TradingRules(day_start=hour)) for hour in (17, 0))
    assert set(midnight.daily.index.day_name()) - set(rolled.daily.index.day_name()) == {"Sunday"}
    assert len(set(rolled.daily.index.day_name())) == 5 and abs(rolled.trading_days - 260.9) < 3
    relabelled = table.assign(datetime=table.datetime.dt.tz_localize(None) + pd.Timedelta(hours=7))
    by_hand = tranche_backtest(relabelled, relabelled, 5)
    assert np.allclose(rolled.daily.net, by_hand.daily.net) and np.allclose(rolled.daily.trades, by_hand.daily.trades)
    assert rolled.metrics() == pytest.approx(by_hand.metrics())
    assert "from 17:00" in repr(rolled)


def test_a_short_sunday_does_not_lower_the_sharpe_ratio_of_fx():
    "252 days a year with six days a week would give a Sharpe ratio 11% too low."
    table = eurusd().assign(prediction=1)
    rules = dict(day_start=0), dict(day_start=17), dict(trading_days=252)
    backtests = (tranche_backtest(table, table, 5, TradingRules(cost_bps=0.0, **rule)) for rule in rules)
    midnight, rolled, at_252 = (backtest.metrics()["sharpe"] for backtest in backtests)
    assert abs(midnight / rolled - 1) < 0.05 < 1 - at_252 / rolled


@pytest.mark.parametrize("zone", [None, "UTC", ZONE, "America/Sao_Paulo"])
@pytest.mark.parametrize("hour", [0, 9, 17, 23])
def test_a_day_begins_at_its_hour_across_clock_changes(zone, hour):
    times = pd.date_range("2018-01-01", "2018-12-31", freq="37min", tz=zone)
    days = trading_day(times, hour)
    for t, day in zip(times[::97], days[::97], strict=True):
        expected = t.date() + pd.Timedelta(days=int(hour > 0 and t.hour >= hour))
        assert day.date() == pd.Timestamp(expected).date()
    assert days.tz == times.tz and days.unit == times.unit and days.is_monotonic_increasing


def test_day_start_24_raises():
    table = walk(pd.date_range("2024-01-01", periods=50, freq="h"))
    with pytest.raises(BacktestError, match="day_start is 24, expected a whole hour from 0 to 23"):
        tranche_backtest(table, table, 1, TradingRules(day_start=24))


def test_shift_test_and_evaluator_use_the_same_days():
    from test_permutation import market

    predictions, y, prices = market()
    for rules in (TradingRules(day_start=17), TradingRules(trading_days=100), TradingRules()):
        scores = ModelEvaluator(5, n_boot=0, **vars(rules)).compute_all_metrics(predictions, y, prices)
        test = shift_test(predictions, y, prices, 5, 19, rules=rules)
        assert np.isclose(test.observed["sharpe_net"], scores["sharpe_net"])
    assert len(shift_test(predictions, y, prices, 5, 19, rules=TradingRules(day_start=17)).pnl) == 30


# Settings of both


def write_settings(monkeypatch, folder, text):
    "A folder with settings.ini as the current folder."
    (folder / "settings.ini").write_text(f"[modelfactory]\n{text}\n")
    for name in ("SETTINGS", "TRADING_DAYS", "DAY_START"):
        monkeypatch.delenv(f"MODELFACTORY_{name}", raising=False)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    "text, days, hour",
    [
        ("trading_days = auto\nday_start = 17", None, 17),
        ("trading_days = 252", 252, 0),
        ("", None, 0),
        ("trading_days = 52.2", 52.2, 0),
    ],
)
def test_settings_of_the_calendar(monkeypatch, tmp_path, text, days, hour):
    write_settings(monkeypatch, tmp_path, text)
    assert (settings().trading_days, settings().day_start) == (days, hour)
    config = trainer_config(dict(model="logistic_regression", horizon=5, data="null"))
    assert (config.trading_days, config.day_start) == (days, hour)
    evaluator = Trainer(config).evaluator
    assert (evaluator.trading_days, evaluator.day_start) == (days, hour)


@pytest.mark.parametrize("text", ["trading_days = 0", "trading_days = often", "day_start = 24", "day_start = -1"])
def test_invalid_settings_raise(monkeypatch, tmp_path, text):
    write_settings(monkeypatch, tmp_path, text)
    with pytest.raises(SettingsError, match=text.split()[0]):
        settings()


def test_configs_of_old_runs_still_load(tmp_path):
    old = dict(model="logistic_regression", horizon=5, data=dict(data="null"), cost_bps=1.0, trading_days=252)
    assert trainer_config(old).trading_days == 252 and trainer_config(old).day_start == 0
    (tmp_path / "config.yaml").write_text(json.dumps(old))
    assert trainer_config(tmp_path / "config.yaml").trading_days == 252
    assert trainer_config(old | dict(trading_days="auto")).trading_days is None
    assert trainer_config(old | dict(trading_days=None, day_start=17)).day_start == 17
    with pytest.raises(ConfigError, match="trading_days"):
        trainer_config(old | dict(trading_days=-1))


def test_a_config_survives_its_yaml(tmp_path):
    import yaml

    for days in (None, 252):
        trainer = Trainer(dict(model="logistic_regression", horizon=5, data="null", trading_days=days, day_start=17))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(trainer.resolved_config()))))
        restored = trainer_config(tmp_path / "config.yaml")
        assert (restored.trading_days, restored.day_start) == (days, 17)
