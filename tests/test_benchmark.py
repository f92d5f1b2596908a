"""The comparison with buy-and-hold: equal to statsmodels and to loops, and right about alpha and beta where known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as t_distribution

from modelfactory.configuration import TradingRules
from modelfactory.data.null_worlds import simulate_null
from modelfactory.evaluation.backtest import (
    benchmark_stats,
    newey_west,
    newey_west_freedom,
    newey_west_lags,
    tranche_backtest,
)


@given(st.integers(0, 1000), st.integers(5, 80), st.integers(0, 12))
@settings(max_examples=15, deadline=None)
def test_regression_and_errors_equal_those_of_statsmodels(seed, T, lags):
    api = pytest.importorskip("statsmodels.regression.linear_model")
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=T), np.convolve(rng.normal(size=T + 3), np.ones(4), "valid")
    fit = api.OLS(y, np.column_stack([np.ones(T), x])).fit(
        cov_type="HAC", cov_kwds=dict(maxlags=min(lags, T - 1), use_correction=True)
    )
    coefficients, cov = newey_west(y, x, min(lags, T - 1))
    assert np.allclose(coefficients, fit.params) and np.allclose(cov, fit.cov_params(), rtol=1e-8, atol=1e-12)


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_benchmark_stats_equal_a_loop_over_days(seed):
    rng = np.random.default_rng(seed)
    net, hold = rng.normal(size=(2, 3, 30)) * 0.01
    stats = benchmark_stats(net, hold, 252)
    for i in range(3):
        up = [(y, x) for y, x in zip(net[i], hold[i], strict=True) if x > 0]
        down = [(y, x) for y, x in zip(net[i], hold[i], strict=True) if x < 0]
        for name, days in dict(up_capture=up, down_capture=down).items():
            assert np.isclose(stats[name][i], sum(y for y, _ in days) / sum(x for _, x in days))
        slope, intercept = np.polyfit(hold[i], net[i], 1)
        assert np.isclose(stats["beta"][i], slope) and np.isclose(stats["alpha"][i], 252 * intercept)
        assert np.isclose(stats["excess_return"][i], 252 * (net[i] - hold[i]).mean())


def test_alpha_and_beta_equal_those_of_empyrical():
    empyrical = pytest.importorskip("empyrical")
    days = pd.bdate_range("2024-01-02", periods=300)
    rng = np.random.default_rng(0)
    hold = pd.Series(rng.normal(3e-4, 0.01, 300), days)
    net = 0.4 * hold + rng.normal(1e-4, 0.004, 300)
    stats = benchmark_stats(net.to_numpy(), hold.to_numpy(), 252)
    assert np.isclose(stats["beta"], empyrical.beta(net, hold))
    daily_alpha = empyrical.alpha(net, hold, annualization=1)  # compounded over one day: not annualised
    assert np.isclose(stats["alpha"] / 252, daily_alpha)


def prices_and_signals(seed, days, symbols, drift):
    "Random walks of daily closes with a drift, and predictions that persist and lean to long."
    rng, times = np.random.default_rng(seed), pd.bdate_range("2015-01-02", periods=days)
    close = 100 * np.exp(rng.normal(drift, 0.01, (symbols, days)).cumsum(1))
    lean = np.sign(rng.normal(0.5, 1, (symbols, -(-days // 10)))).repeat(10, 1)[:, :days]
    names = [f"S{i}" for i in range(symbols)]
    keys = dict(datetime=np.tile(times, symbols), symbol=np.repeat(names, days))
    return pd.DataFrame(dict(keys, close=close.ravel())), pd.DataFrame(dict(keys, prediction=lean.ravel()))


def daily_profit(rng, days, horizon):
    "Daily profit of overlapping positions without skill that lean to long, and of the market that they trade."
    returns = rng.normal(0.001, 0.01, days) * np.exp(rng.normal(0, 0.5, -(-days // 20))).repeat(20)[:days]
    calls = np.sign(rng.normal(0.5, 1, -(-(days + horizon) // 10))).repeat(10)[: days + horizon]
    position = np.convolve(calls, np.ones(horizon) / horizon, "valid")[:days]
    return position * returns, returns


@pytest.mark.parametrize(("days", "horizon"), [(60, 5), (60, 20), (250, 20)])
def test_alpha_without_skill_is_significant_at_the_nominal_rate(days, horizon):
    rng, lags, significant = np.random.default_rng(0), newey_west_lags(days, horizon), 0
    quantile = t_distribution.ppf(0.975, newey_west_freedom(days, lags))
    for _ in range(600):
        (alpha, _), cov = newey_west(*daily_profit(rng, days, horizon), lags)
        significant += abs(alpha) > quantile * cov[0, 0] ** 0.5
    assert significant / 600 < 0.08, significant  # 0.05 plus three standard errors


def test_a_long_strategy_has_beta_and_a_skilled_one_has_alpha():
    prices, signals = prices_and_signals(0, 750, 2, drift=0.001)
    rules = TradingRules(cost_bps=0)
    long = tranche_backtest(signals.assign(prediction=0.5), prices, 5, rules).benchmark()
    assert abs(long.value.beta - 0.5) < 0.02 and long.low.alpha < 0 < long.high.alpha
    future = prices.groupby("symbol").close.transform(lambda c: c.shift(-5) / c - 1).fillna(0)
    noisy = np.sign(future + np.random.default_rng(1).normal(0, 0.05, len(future)))
    skilled = tranche_backtest(signals.assign(prediction=noisy), prices, 5, rules).benchmark()
    assert skilled.low.alpha > 0 and skilled.p.alpha < 0.01


def test_a_rising_null_world_gives_excess_return_to_nobody_and_beta_to_the_long():
    table = simulate_null("drift_.05", 5, seed=1).query("split == 'val'")
    prices = table[["datetime", "symbol", "close"]]
    always = tranche_backtest(prices.assign(prediction=1), prices, 5, TradingRules(cost_bps=0)).metrics()
    assert always["sharpe"] > 2 and abs(always["beta"] - 1) < 0.03 and abs(always["up_capture"] - 1) < 0.05
    assert always["excess_return"] < 0.2 * 0.05  # it earns what buy-and-hold earns, less the first bars


def test_lags_are_at_least_the_holding_period_and_fit_the_sample():
    assert newey_west_lags(100, 0.1) == 4 and newey_west_lags(250, 20) == 20 and newey_west_lags(5, 20) == 4


def test_a_stored_table_of_daily_profit_is_what_empyrical_reads(tmp_path):
    empyrical = pytest.importorskip("empyrical")
    prices, signals = prices_and_signals(2, 250, 2, drift=0.001)
    backtest = tranche_backtest(signals, prices, 5)
    backtest.daily.rename_axis("day").reset_index().to_parquet(tmp_path / "val_daily.parquet", index=False)
    daily, days = pd.read_parquet(tmp_path / "val_daily.parquet").set_index("day"), backtest.trading_days
    metrics = backtest.metrics()
    assert np.isclose(empyrical.sharpe_ratio(daily["net"], annualization=days), metrics["sharpe_net"])
    assert np.isclose(empyrical.max_drawdown(daily["net"]), metrics["max_drawdown"])
    assert np.isclose(empyrical.beta(daily["net"], daily["hold"]), metrics["beta"])
