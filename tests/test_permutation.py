"The shift test on simulated markets: size, power, sparse symbols, base rates, joint shifts of symbols."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from modelfactory.configuration import TradingRules
from modelfactory.evaluation.backtest import tranche_backtest
from modelfactory.evaluation.baselines import persistence_predictions
from modelfactory.evaluation.evaluator import ModelEvaluator
from modelfactory.evaluation.metrics import EvaluationError, metric_names
from modelfactory.evaluation.permutation import (
    PermutationError,
    f1_null_interval,
    ffill_index,
    null_metrics,
    random_shifts,
    shift_test,
)
from modelfactory.models.base import to_output

# Coverage would slow these thousands of small calls by half, and the notebooks run the same lines.
pytestmark = pytest.mark.no_cover


def market(bars=700, horizon=5, skill=0.0, seed=0, symbols=2, shared=0.7):
    """Predictions, labels and prices of correlated symbols with overlapping labels.

    The model has a persistent signal that is correlated over symbols; the true move has weight `skill` in it.
    """
    rng = np.random.default_rng(seed)

    def correlated_noise():
        return shared * rng.normal(size=bars) + (1 - shared**2) ** 0.5 * rng.normal(size=(symbols, bars))

    def smoothed_noise(k):
        return np.stack([np.convolve(x, np.ones(k) / k**0.5, "same") for x in correlated_noise()])

    returns = 1e-3 * correlated_noise()
    padded = np.pad(returns, [(0, 0), (0, 1)])
    ahead = np.stack([np.convolve(r, np.ones(horizon))[horizon:] for r in padded]) / horizon**0.5 * 1e3
    signal = skill * ahead + smoothed_noise(3 * horizon)
    p = np.exp(np.stack([-signal, 0 * signal + 0.3, signal], -1)).reshape(-1, 3)
    times = np.tile(pd.date_range("2024-01-02", periods=bars, freq="h"), symbols)
    names = np.repeat([f"S{i}" for i in range(symbols)], bars)
    meta = pd.DataFrame(dict(datetime=times, symbol=names, horizon=horizon))
    y = np.digitize(ahead, [-0.4, 0.4]).ravel() - 1
    return to_output(p, meta, (-1, 0, 1)), y, meta.assign(close=100 * np.exp(returns.cumsum(1)).ravel())


FIELDS = ("predictions", "probabilities", "timestamps", "symbols", "horizons")


def rows_of(predictions, keep):
    "The rows `keep` of predictions."
    return replace(predictions, **{k: getattr(predictions, k)[keep] for k in FIELDS})


def p_values(n, **kw):
    "P-values of the shift test on `n` markets, a row each."
    horizon = kw.get("horizon", 5)
    tests = [shift_test(*market(seed=s, **kw), horizon, n_draws=99, seed=s) for s in range(n)]
    return pd.DataFrame([test.p_values for test in tests])


@pytest.mark.slow
@pytest.mark.parametrize("horizon, symbols", [(5, 2), (20, 2), (5, 4)])
def test_p_values_have_their_size_without_skill(horizon, symbols):
    p = p_values(100, horizon=horizon, symbols=symbols)
    assert ((p <= 0.05).mean() <= 0.1).all()
    assert (abs((p <= 0.5).mean() - 0.5) < 0.16).all()


def test_shifts_of_less_than_a_horizon_count_in_the_p_value():
    predictions, y, prices = market(skill=1.0)
    test = shift_test(predictions, y, prices, 5, n_draws=99)
    assert np.isclose(test.p_values["log_loss"], 9 / 700 + (1 - 9 / 700) / 100)
    assert np.isclose(shift_test(predictions, y, prices, 5, step=7).excluded_fraction, 1 / 100)


@pytest.mark.slow
def test_the_shift_test_detects_planted_skill():
    assert ((p_values(40, skill=0.25) <= 0.05).mean() > 0.8).all()


def test_a_draw_equals_the_backtest_of_shifted_predictions():
    predictions, y, prices = market()
    keep = np.sort(np.random.default_rng(0).permutation(len(y))[:1200])
    sample = rows_of(predictions, keep)
    test = shift_test(sample, y[keep], prices, 5, n_draws=5)
    timestamps = np.unique(sample.timestamps)
    names = ["datetime", "symbol", "prediction"]
    for k in test.draws.index:
        columns = sample.timestamps, sample.symbols, sample.predictions
        source = pd.DataFrame(dict(zip(names, columns, strict=True)))
        wide = source.pivot(index="datetime", columns="symbol", values="prediction").reindex(timestamps)
        wide = pd.concat([wide, wide]).ffill().iloc[len(timestamps) :]
        shifted = pd.DataFrame(np.roll(wide.to_numpy(), k, 0), timestamps, wide.columns)
        shifted = shifted.stack().rename("prediction").reset_index().set_axis(names, axis=1)
        shifted = source[["datetime", "symbol"]].merge(shifted, on=["datetime", "symbol"])
        assert len(shifted) == len(keep)
        backtest = tranche_backtest(shifted, prices, 5)
        assert np.isclose(backtest.metrics()["sharpe_net"], test.draws.sharpe_net[k])
        assert np.allclose(backtest.daily.net, test.pnl[k])


def test_the_order_of_rows_does_not_change_the_result():
    predictions, y, prices = market()
    order = np.random.default_rng(1).permutation(len(y))
    a = shift_test(predictions, y, prices, 5, 50)
    b = shift_test(rows_of(predictions, order), y[order], prices, 5, 50)
    assert np.allclose(a.draws.loc[b.draws.index], b.draws)
    assert all(np.isclose(a.observed[k], b.observed[k]) for k in a.observed)


def test_observed_scores_equal_those_of_the_evaluator():
    for horizon, cost in [(1, 0.0), (5, 2.0), (20, 1.0)]:
        predictions, y, prices = market(horizon=horizon)
        for close in (prices, None):
            scores = ModelEvaluator(horizon, n_boot=0, cost_bps=cost).compute_all_metrics(predictions, y, close)
            observed = shift_test(predictions, y, close, horizon, 19, rules=TradingRules(cost_bps=cost)).observed
            for k in observed:
                assert np.isclose(observed[k], scores[k], equal_nan=True)
            assert np.isnan(observed["sharpe_net"]) == (close is None)


def test_ffill_index_finds_the_last_row_of_each_symbol_with_missing_bars():
    rng = np.random.default_rng(0)
    for _ in range(20):
        T, S = rng.integers(2, 30), rng.integers(1, 5)
        has_bar = rng.random((T, S)) < 0.5
        has_bar[:, 0], has_bar[rng.integers(T), :] = True, True
        timestamps, symbols = np.nonzero(has_bar)
        table = ffill_index(timestamps, symbols)
        for t, s in np.ndindex(table.shape):
            age = next(k for k in range(T) if has_bar[(t - k) % T, s])
            assert timestamps[table[t, s]] == (t - age) % T and symbols[table[t, s]] == s


@pytest.mark.slow
def test_the_interval_of_f1_skill_has_its_coverage_and_power():
    null = [f1_null_interval(*market(seed=s)[:2], n_boot=300, seed=s) for s in range(120)]
    missed = np.mean([not f["f1_skill_ci_low"] <= 0 <= f["f1_skill_ci_high"] for f in null])
    assert missed < 0.11
    skilled = [f1_null_interval(*market(seed=s, skill=0.25)[:2], n_boot=300) for s in range(30)]
    assert np.mean([f["f1_skill_ci_low"] > 0 for f in skilled]) > 0.8


def test_the_persistence_baseline_uses_no_future_labels():
    rng, n = np.random.default_rng(0), 2000
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024-01-02", periods=n, freq="h"), symbol="A", horizon=5))
    y = np.digitize(np.convolve(rng.normal(size=n + 299), np.ones(300), "valid"), [-7, 7]) - 1
    original = persistence_predictions(y[:1000], meta[:1000], y[1000:], meta[1000:])
    assert (original.predictions == y[1000:]).mean() > 0.85
    for t in rng.integers(20, 1000, 30):
        future = y.copy()
        future[1000 + t - 5 :] = rng.integers(-1, 2, 1000 - t + 5)
        changed = persistence_predictions(future[:1000], meta[:1000], future[1000:], meta[1000:])
        assert (changed.predictions[: t + 1] == original.predictions[: t + 1]).all()
        assert np.array_equal(changed.probabilities[: t + 1], original.probabilities[: t + 1])


def test_persistence_of_a_symbol_absent_from_train_is_the_most_frequent_class():
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024-01-02", periods=20, freq="h"), symbol="A", horizon=2))
    output = persistence_predictions(np.ones(20, int), meta, -np.ones(20, int), meta.assign(symbol="B"))
    assert output.predictions.tolist() == [1] * 3 + [-1] * 17


def joined(*parts):
    "Predictions, labels and prices of several markets; the number of the market precedes the symbol."
    columns = {k: np.concatenate([getattr(p, k) for p, _, _ in parts]) for k in FIELDS if k != "timestamps"}
    columns["symbols"] = np.concatenate([[f"{k}{s}" for s in p.symbols] for k, (p, _, _) in enumerate(parts)])
    times = pd.DatetimeIndex(np.concatenate([p.timestamps for p, _, _ in parts]))
    prices = pd.concat([t.assign(symbol=str(k) + t.symbol) for k, (_, _, t) in enumerate(parts)], ignore_index=True)
    return replace(parts[0][0], **columns, timestamps=times), np.concatenate([y for _, y, _ in parts]), prices


def thinned(part, step):
    "Every `step`-th row of a market."
    predictions, y, prices = part
    keep = np.arange(len(y)) % step == 0
    return rows_of(predictions, keep), y[keep], prices[keep]


def test_a_symbol_with_80_rows_hardly_changes_the_p_values():
    "Its bars are 100 timestamps apart. That once set the margin of all shifts and moved a p-value from .011 to .134."
    dense, sparse = market(bars=8000, skill=1.0), thinned(market(bars=8000, symbols=1, seed=1), 100)
    assert len(sparse[1]) == 80
    alone = shift_test(*dense, 5, n_draws=99)
    both = shift_test(*joined(dense, sparse), 5, n_draws=99)
    for name, p in alone.p_values.items():
        assert p < 0.012 and abs(both.p_values[name] - p) < 0.005


def test_a_null_distribution_exists_for_five_minute_symbols_and_a_daily_symbol():
    predictions, y, prices = market(bars=60 * 78, horizon=20, symbols=3, skill=0.5)
    both = joined((predictions, y, prices), thinned(market(bars=60 * 78, horizon=20, symbols=1, seed=1), 78))
    metrics = null_metrics(*both, horizon=20)
    assert np.isfinite([metrics[k] for k in metric_names("permutation")]).all()
    assert metrics["directional_skill_p_shift"] < 0.05


def slow_skill(y, predictions, symbols):
    "Mean of (q - mean q)(z - mean z) over rows with two signs; means are over such rows of each symbol."
    gains = []
    for s in np.unique(symbols):
        pairs = []
        for q, z, symbol in zip(predictions, y, symbols, strict=True):
            if symbol == s and q and z:
                pairs.append((np.sign(q), np.sign(z)))
        if not pairs:
            continue
        mean_q, mean_z = np.mean(pairs, axis=0)
        gains += [(q - mean_q) * (z - mean_z) for q, z in pairs]
    return np.mean(gains) if gains else np.nan


@pytest.mark.parametrize("seed", range(5))
def test_directional_skill_equals_a_loop_over_rows(seed):
    predictions, y, prices = market(bars=300, seed=seed, skill=0.3, symbols=3)
    test = shift_test(predictions, y, prices, 5, n_draws=19)
    assert np.isclose(test.observed["directional_skill"], slow_skill(y, predictions.predictions, predictions.symbols))
    wide = predictions.predictions.reshape(3, 300)
    for k in test.draws.index[:5]:
        expected = slow_skill(y, np.roll(wide, k, 1).ravel(), predictions.symbols)
        assert np.isclose(test.draws.directional_skill[k], expected)


def test_a_constant_call_per_symbol_has_no_directional_skill():
    predictions, y, prices = market(bars=400)
    y = np.where(np.arange(len(y)) % 10 < 3, -1, 1)
    calls = np.where(predictions.symbols == "S0", 1, -1).astype(np.int8)
    test = shift_test(replace(predictions, predictions=calls), y, prices, 5, n_draws=19)
    assert abs(test.observed["directional_skill"]) < 1e-12 and np.isclose(test.p_values["directional_skill"], 1)


def test_invalid_input_raises_an_error():
    predictions, y, prices = market()
    with pytest.raises(PermutationError, match="expected 19 or more"):
        shift_test(predictions, y, prices, horizon=90)
    with pytest.raises(PermutationError, match="smaller step"):
        random_shifts(1000, 20, step=100)
    with pytest.raises(PermutationError, match="no direction"):
        f1_null_interval(predictions, y, classes=(0, 1))
    with pytest.raises(EvaluationError, match="shape"):
        shift_test(predictions, y[:-1], prices, 5)
