"""Information coefficients: equal to alphalens and to loops, right where there is no skill, and found where planted."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from modelfactory.data.bundled import resolve_data
from modelfactory.data.market import read_ceiling
from modelfactory.data.null_worlds import simulate_null
from modelfactory.evaluation.evaluator import ModelEvaluator
from modelfactory.evaluation.examples import example_market
from modelfactory.evaluation.information import (
    Resampling,
    coefficient,
    coefficient_series,
    estimates,
    group_ranks,
    information_report,
    information_table,
    quantile_returns,
    quantile_spread,
    rank_stability,
    scored_bars,
    shifted_values,
    standardise,
)
from modelfactory.evaluation.metrics import EvaluationError, metric_names
from modelfactory.evaluation.permutation import circular_sums, ffill_index


def panel(days=100, symbols=12, seed=0, skill=0.2):
    "Daily closes and scores that persist, as wide tables."
    rng, index = np.random.default_rng(seed), pd.bdate_range("2020-01-02", periods=days, name="datetime")
    returns = rng.normal(0, 0.01, (days, symbols))
    ahead = np.roll(returns, -1, 0)
    noise = np.stack([np.convolve(x, np.ones(3), "same") for x in rng.normal(0, 0.01, (symbols, days))], 1)
    names = [f"S{i:02}" for i in range(symbols)]
    close = pd.DataFrame(100 * np.exp(returns.cumsum(0)), index, names)
    return close, pd.DataFrame(skill * ahead + noise, index, names)


def long(wide, name):
    return wide.rename_axis(columns="symbol").stack().rename(name).reset_index()


@pytest.mark.slow
def test_coefficients_quantiles_and_turnover_equal_those_of_alphalens():
    performance = pytest.importorskip("alphalens.performance")
    from alphalens.utils import get_clean_factor_and_forward_returns

    close, score = panel()
    factor = score.stack()
    factor.index.names = ["date", "asset"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = get_clean_factor_and_forward_returns(factor, close, quantiles=5, periods=(1, 5), max_loss=0.5)
        theirs = performance.factor_information_coefficient(data)
        by_quantile = performance.mean_return_by_quantile(data, demeaned=True)[0]["5D"]
        by_date, error = performance.mean_return_by_quantile(data, by_date=True, demeaned=True)
        half_spread = performance.compute_mean_returns_spread(by_date, 5, 1, error)[0]["5D"].mean()
    rows = scored_bars(long(score, "score"), long(close, "close"), 5)
    rows = rows.select(np.isfinite(rows.forward_returns(5)))
    assert rows.across
    for bars in (1, 5):
        series = coefficient_series(coefficient(rows, bars))
        assert np.allclose(series, theirs[f"{bars}D"]) and np.isclose(coefficient(rows, bars).value, series.mean())
    assert np.allclose(quantile_returns(rows, 5).value, by_quantile)
    assert np.isclose(quantile_spread(rows, 5).value, 2 * half_spread)  # alphalens halves it
    stability = rank_stability(rows, (1, 5)).value
    for lag in (1, 5):
        assert np.isclose(stability[lag, "autocorrelation"], performance.factor_rank_autocorrelation(data, lag).mean())
        for name, q in dict(top=5, bottom=1).items():
            turnover = performance.quantile_turnover(data.factor_quantile, q, lag).mean()
            assert np.isclose(stability[lag, f"{name}_turnover"], turnover)


@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.3, 1))
@settings(max_examples=12, deadline=None)
def test_coefficients_over_time_equal_a_loop_over_symbols(seed, symbols, kept):
    close, score = panel(60, symbols, seed)
    prices = long(close, "close")
    table = long(score.round(3), "score").sample(frac=kept, random_state=seed)
    if len(table) < 3:
        return
    rows, parts = scored_bars(table, prices, 3), {True: [], False: []}
    for symbol, own in table.groupby("symbol"):
        ahead = close[symbol].shift(-3) / close[symbol] - 1
        pairs = own.set_index("datetime").score.to_frame().assign(ahead=ahead).dropna()
        if pairs.score.nunique() < 2:
            continue
        for ranks, method in ((True, stats.spearmanr), (False, stats.pearsonr)):
            parts[ranks].append((method(pairs.score, pairs.ahead).statistic, len(pairs)))
    for ranks, values in parts.items():
        expected = np.average([v for v, _ in values], weights=[n for _, n in values]) if values else np.nan
        assert np.isclose(coefficient(rows, 3, ranks).value, expected, equal_nan=True)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_ranks_equal_those_of_pandas(values):
    group, x = np.transpose(values)
    assert np.allclose(group_ranks(x.astype(float), group), pd.Series(x).groupby(group).rank())
    scaled = pd.Series(standardise(x.astype(float), group)).groupby(group)
    assert np.allclose(scaled.mean(), 0) and set(scaled.std(ddof=0).round(6)) <= {0, 1}


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_fourier_shifts_equal_shifts_one_by_one(seed):
    rng = np.random.default_rng(seed)
    grid = [(t, s) for s in range(3) for t in range(20) if rng.random() < 0.7 or t == 0]
    stamps, symbols = np.transpose(grid)
    stamps = np.unique(stamps, return_inverse=True)[1]
    moved, fixed, table = *rng.normal(size=(2, len(grid))), ffill_index(stamps, symbols)
    T = len(table)
    one_by_one = [moved[table[(stamps - k) % T, symbols]] @ fixed for k in range(T)]
    assert np.allclose(circular_sums(moved, fixed, stamps, symbols), one_by_one)


def test_future_closes_beyond_the_span_do_not_matter():
    close, score = panel(80, 8)
    rows = scored_bars(long(score[:50], "score"), long(close, "close"), 5)
    changed = close.copy()
    changed.iloc[55:] *= 2
    same = scored_bars(long(score[:50], "score"), long(changed, "close"), 5)
    assert np.array_equal(rows.forward_returns(5), same.forward_returns(5))
    assert not np.array_equal(rows.forward_returns(6), same.forward_returns(6))


def test_two_symbols_are_not_ranked_across():
    for symbols in (2, 5):
        close, score = panel(60, symbols)
        assert scored_bars(long(score, "score"), long(close, "close"), 5).across == (symbols == 5)


def claims(score, market, horizon=5):
    "Whether the interval of the rank IC excludes 0, and whether the shift test rejects."
    val = (market.split == "val").to_numpy()
    table = market[["datetime", "symbol"]].assign(score=score)[val]
    row = estimates(dict(v=coefficient(scored_bars(table, market, horizon), horizon)), Resampling(n_boot=300)).iloc[0]
    return row.ci_low > 0 or row.ci_high < 0, row.p_shift < 0.05


@pytest.mark.slow
def test_random_scores_are_significant_at_the_nominal_rate():
    found = []
    for world in ("symmetric", "drift_.05", "volatility_clusters", "own_drifts", "sparse_symbol"):
        market = simulate_null(world, seed=3)
        for seed in range(10):
            noise = pd.Series(np.random.default_rng(seed).normal(size=len(market))).ewm(span=40).mean()
            found.append(claims(noise.to_numpy(), market))
    assert (np.mean(found, 0) < 0.15).all(), np.mean(found, 0)  # 0.05 plus three standard errors of 50 draws


@pytest.mark.slow
def test_a_contrarian_score_on_a_random_walk_has_a_bias_that_is_taken_out():
    values, biases = [], []
    for seed in range(60):
        rng, times = np.random.default_rng(seed), pd.date_range("2024-01-02", periods=400, freq="h")
        walk = pd.Series(0.001 * rng.normal(size=400).cumsum())
        keys = dict(datetime=times, symbol="A")
        table = pd.DataFrame(dict(keys, score=-walk.diff(20).fillna(0)))
        pairing = coefficient(scored_bars(table, pd.DataFrame(dict(keys, close=np.exp(walk))), 5), 5)
        values.append(pairing.value)
        biases.append(pairing.bias)
    error = np.std(values) / 60**0.5
    assert np.mean(values) > 2 * error and abs(np.mean(values) - np.mean(biases)) < 2.5 * error


def test_a_planted_signal_is_found_and_noise_is_not():
    powers = []
    for seed in range(6):
        predictions, _, prices = example_market(days=26, skill=0.15, seed=seed)
        row = estimates(dict(v=coefficient(scored_bars(predictions, prices, 5), 5))).iloc[0]
        powers.append((row.ci_low > 0, row.p_shift < 0.05))
    assert np.mean(powers) >= 0.75, powers


def test_a_run_has_coefficients_with_prices_only():
    predictions, y, prices = example_market(days=20, skill=0.3)
    with_prices = ModelEvaluator(5, n_boot=100).compute_all_metrics(predictions, y, prices)
    without = ModelEvaluator(5, n_boot=100).compute_all_metrics(predictions, y)
    names = metric_names("information")
    assert np.isfinite([with_prices[k] for k in names]).all() and np.isnan([without[k] for k in names]).all()
    assert with_prices["rank_ic_ci_low"] < with_prices["rank_ic"] < with_prices["rank_ic_ci_high"]
    equal = replace(predictions, probabilities=np.full_like(predictions.probabilities, 1 / 3))
    constant = ModelEvaluator(5, n_boot=100).compute_all_metrics(equal, y, prices)
    assert np.isnan(constant["rank_ic"]) and np.isnan(constant["rank_ic_ci_low"])


def test_short_records_have_no_p_value_and_wrong_input_is_refused():
    close, score = panel(30, 1)
    rows = scored_bars(long(score, "score"), long(close, "close"), 5)
    assert np.isnan(estimates(dict(v=coefficient(rows, 5))).p_shift.item())
    report = information_report(long(score, "score"), long(close, "close"), 5)
    assert np.isfinite(report.summary.value.rank_ic) and np.isnan(report.summary.p_shift.sharpe_net)
    with pytest.raises(EvaluationError, match="expected a whole number of at least 2"):
        quantile_returns(rows, 5, quantiles=1)
    with pytest.raises(EvaluationError, match="expected the probabilities of each model"):
        information_table(long(score, "score"), long(close, "close"), 5)


def test_shifts_that_keep_the_time_of_day_are_multiples_of_the_step():
    predictions, _, prices = example_market(days=30, skill=0.0)
    pairing = coefficient(scored_bars(predictions, prices, 5), 5)
    values, excluded = shifted_values(pairing, step=78)
    assert len(values) == 29 and abs(values.mean()) < 0.1 and excluded > 0


def test_the_bayes_optimum_of_the_planted_market_has_the_highest_coefficient():
    folder = resolve_data("planted")
    bars = pd.read_parquet(folder / "val_scaled.parquet", columns=["datetime", "symbol", "close"])
    optimum = read_ceiling(folder, 5).merge(bars[["datetime", "symbol"]], on=["datetime", "symbol"])
    names = {f"{kind}_{c}": f"{kind}_p_{c}" for kind in ("full", "row") for c in ("down", "flat", "up")}
    table = information_table(optimum.rename(columns=names), bars, 5, sampling=Resampling(n_boot=300))
    assert table.index[0] == "full" and (table.rank_ic_ci_low > 0).all() and (table.rank_ic_p_shift < 0.01).all()
    assert (table.top_minus_bottom_ci_low > 0).all()
