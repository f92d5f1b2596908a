"Shifted predictions on simulated markets: size and power of the test, sparse symbols, base rates, symbols kept together."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

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

pytestmark = (
    pytest.mark.no_cover
)  # thousands of small calls, which counting lines slows by half: the notebooks go through the same lines


def market(bars=700, horizon=5, skill=0.0, seed=0, symbols=2, shared=0.7):
    "Symbols that move together in part, labels that overlap, and a model with slow opinions that it shares over symbols, right as far as `skill` goes."
    rng = np.random.default_rng(seed)

    def slow(k):
        return np.stack(
            [
                np.convolve(x, np.ones(k) / k**0.5, "same")
                for x in shared * rng.normal(size=bars) + (1 - shared**2) ** 0.5 * rng.normal(size=(symbols, bars))
            ]
        )

    returns = 1e-3 * (shared * rng.normal(size=bars) + (1 - shared**2) ** 0.5 * rng.normal(size=(symbols, bars)))
    ahead = (
        np.stack([np.convolve(r, np.ones(horizon))[horizon:] for r in np.pad(returns, [(0, 0), (0, 1)])])
        / horizon**0.5
        * 1e3
    )
    opinion = skill * ahead + slow(3 * horizon)
    p = np.exp(np.stack([-opinion, 0 * opinion + 0.3, opinion], -1)).reshape(-1, 3)
    meta = pd.DataFrame(
        dict(
            datetime=np.tile(pd.date_range("2024-01-02", periods=bars, freq="h"), symbols),
            symbol=np.repeat([f"S{i}" for i in range(symbols)], bars),
            horizon=horizon,
        )
    )
    return (
        to_output(p, meta, (-1, 0, 1)),
        np.digitize(ahead, [-0.4, 0.4]).ravel() - 1,
        meta.assign(close=100 * np.exp(returns.cumsum(1)).ravel()),
    )


def rows_of(predictions, keep):
    return replace(
        predictions,
        **{
            k: getattr(predictions, k)[keep]
            for k in ("predictions", "probabilities", "timestamps", "symbols", "horizons")
        },
    )


def p_values(n, **kw):
    return pd.DataFrame(
        [shift_test(*market(seed=s, **kw), kw.get("horizon", 5), n_draws=99, seed=s).p_values for s in range(n)]
    )


@pytest.mark.parametrize("horizon, symbols", [(5, 2), (20, 2), (5, 4)])
def test_without_skill_a_p_value_of_5_percent_comes_up_5_percent_of_the_time(horizon, symbols):
    p = p_values(100, horizon=horizon, symbols=symbols)
    assert ((p <= 0.05).mean() <= 0.1).all() and (abs((p <= 0.5).mean() - 0.5) < 0.16).all()


def test_shifts_of_less_than_a_horizon_count():
    predictions, y, prices = market(skill=1.0)
    test = shift_test(predictions, y, prices, 5, n_draws=99)
    assert np.isclose(test.p_values["log_loss"], 9 / 700 + (1 - 9 / 700) / 100)
    assert np.isclose(shift_test(predictions, y, prices, 5, step=7).excluded_fraction, 1 / 100)


def test_a_planted_skill_is_found():
    assert ((p_values(40, skill=0.25) <= 0.05).mean() > 0.8).all()


def test_a_shift_of_symbols_together_is_a_shift_of_the_frame():
    predictions, y, prices = market()
    keep = np.sort(np.random.default_rng(0).permutation(len(y))[:1200])
    some = rows_of(predictions, keep)
    test = shift_test(some, y[keep], prices, 5, n_draws=5)
    stamps = np.unique(some.timestamps)
    for k in test.draws.index:
        source = pd.DataFrame(dict(datetime=some.timestamps, symbol=some.symbols, prediction=some.predictions))
        wide = source.pivot(index="datetime", columns="symbol", values="prediction").reindex(stamps)
        wide = pd.concat([wide, wide]).ffill().iloc[len(stamps) :]
        moved = (
            pd.DataFrame(np.roll(wide.to_numpy(), k, 0), stamps, wide.columns)
            .stack()
            .rename("prediction")
            .reset_index()
            .set_axis(["datetime", "symbol", "prediction"], axis=1)
        )
        asked = source[["datetime", "symbol"]].merge(moved, on=["datetime", "symbol"])
        assert len(asked) == len(keep)
        slow = tranche_backtest(asked, prices, 5)
        assert np.isclose(slow.metrics()["sharpe_net"], test.draws.sharpe_net[k])
        assert np.allclose(slow.daily.net, test.pnl[k])


def test_the_order_of_rows_changes_nothing():
    predictions, y, prices = market()
    order = np.random.default_rng(1).permutation(len(y))
    a, b = shift_test(predictions, y, prices, 5, 50), shift_test(rows_of(predictions, order), y[order], prices, 5, 50)
    assert np.allclose(a.draws.loc[b.draws.index], b.draws) and all(
        np.isclose(a.observed[k], b.observed[k]) for k in a.observed
    )


def test_observed_scores_are_those_of_the_evaluator():
    for horizon, cost in [(1, 0.0), (5, 2.0), (20, 1.0)]:
        predictions, y, prices = market(horizon=horizon)
        for close in (prices, None):
            scores = ModelEvaluator(horizon, cost, n_boot=0).compute_all_metrics(predictions, y, close)
            observed = shift_test(predictions, y, close, horizon, 19, cost_bps=cost).observed
            for k in observed:
                assert np.isclose(observed[k], scores[k], equal_nan=True)
            assert np.isnan(observed["sharpe_net"]) == (close is None)


def test_every_row_has_a_source_whatever_is_missing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        T, S = rng.integers(2, 30), rng.integers(1, 5)
        there = rng.random((T, S)) < 0.5
        there[:, 0], there[rng.integers(T), :] = True, True
        stamps, symbols = np.nonzero(there)
        table = ffill_index(stamps, symbols)
        for u, s in np.ndindex(table.shape):
            back = next(k for k in range(T) if there[(u - k) % T, s])
            assert stamps[table[u, s]] == (u - back) % T and symbols[table[u, s]] == s


def test_the_floor_holds_what_shuffling_gives_and_no_direction_stays_on_it():
    above = [f1_null_interval(*market(seed=s)[:2], n_boot=300, seed=s) for s in range(120)]
    missed = np.mean([not f["f1_skill_ci_low"] <= 0 <= f["f1_skill_ci_high"] for f in above])
    assert missed < 0.11
    assert (
        np.mean(
            [f1_null_interval(*market(seed=s, skill=0.25)[:2], n_boot=300)["f1_skill_ci_low"] > 0 for s in range(30)]
        )
        > 0.8
    )


def test_persistence_pays_where_labels_persist_and_never_looks_ahead():
    rng, n = np.random.default_rng(0), 2000
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024-01-02", periods=n, freq="h"), symbol="A", horizon=5))
    slow = np.digitize(np.convolve(rng.normal(size=n + 299), np.ones(300), "valid"), [-7, 7]) - 1
    said = persistence_predictions(slow[:1000], meta[:1000], slow[1000:], meta[1000:])
    assert (said.predictions == slow[1000:]).mean() > 0.85
    for t in rng.integers(20, 1000, 30):
        other = slow.copy()
        other[1000 + t - 5 :] = rng.integers(-1, 2, 1000 - t + 5)
        again = persistence_predictions(other[:1000], meta[:1000], other[1000:], meta[1000:])
        assert (again.predictions[: t + 1] == said.predictions[: t + 1]).all() and np.array_equal(
            again.probabilities[: t + 1], said.probabilities[: t + 1]
        )


def test_persistence_of_a_symbol_that_train_never_saw_is_the_most_frequent_class():
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024-01-02", periods=20, freq="h"), symbol="A", horizon=2))
    said = persistence_predictions(np.ones(20, int), meta, -np.ones(20, int), meta.assign(symbol="B"))
    assert said.predictions.tolist() == [1] * 3 + [-1] * 17


def joined(*parts):
    "Predictions, labels and prices of several markets, the symbols of later ones renamed."
    names = ("predictions", "probabilities", "timestamps", "symbols", "horizons")
    columns = {k: np.concatenate([getattr(p, k) for p, _, _ in parts]) for k in names if k != "timestamps"}
    columns["symbols"] = np.concatenate([[f"{k}{s}" for s in p.symbols] for k, (p, _, _) in enumerate(parts)])
    times = pd.DatetimeIndex(np.concatenate([p.timestamps for p, _, _ in parts]))
    prices = pd.concat([t.assign(symbol=str(k) + t.symbol) for k, (_, _, t) in enumerate(parts)], ignore_index=True)
    return replace(parts[0][0], **columns, timestamps=times), np.concatenate([y for _, y, _ in parts]), prices


def thinned(part, every):
    predictions, y, prices = part
    keep = np.arange(len(y)) % every == 0
    return rows_of(predictions, keep), y[keep], prices[keep]


def test_a_symbol_with_80_rows_leaves_the_p_values_of_the_others():
    "It moved the p-value from .011 to .134: its bars are 100 timestamps apart, and so was the margin of all shifts."
    many, few = market(bars=8000, skill=1.0), thinned(market(bars=8000, symbols=1, seed=1), 100)
    assert len(few[1]) == 80
    alone, both = shift_test(*many, 5, n_draws=99), shift_test(*joined(many, few), 5, n_draws=99)
    for name, p in alone.p_values.items():
        assert p < 0.012 and abs(both.p_values[name] - p) < 0.005


def test_a_daily_symbol_beside_five_minute_symbols_leaves_a_null_distribution():
    predictions, y, prices = market(bars=60 * 78, horizon=20, symbols=3, skill=0.5)
    both = joined((predictions, y, prices), thinned(market(bars=60 * 78, horizon=20, symbols=1, seed=1), 78))
    metrics = null_metrics(*both, horizon=20)
    assert np.isfinite([metrics[k] for k in metric_names("permutation")]).all()
    assert metrics["directional_skill_p_shift"] < 0.05


def slow_skill(y, predictions, symbols):
    "Mean over rows with two signs of (q - mean q)(z - mean z), means over such rows of each symbol."
    gains = []
    for s in np.unique(symbols):
        pairs = [(np.sign(q), np.sign(z)) for q, z, of in zip(predictions, y, symbols) if of == s and q and z]
        if not pairs:
            continue
        mean_q, mean_z = np.mean(pairs, axis=0)
        gains += [(q - mean_q) * (z - mean_z) for q, z in pairs]
    return np.mean(gains) if gains else np.nan


@pytest.mark.parametrize("seed", range(5))
def test_directional_skill_is_the_slow_covariance(seed):
    predictions, y, prices = market(bars=300, seed=seed, skill=0.3, symbols=3)
    test = shift_test(predictions, y, prices, 5, n_draws=19)
    assert np.isclose(test.observed["directional_skill"], slow_skill(y, predictions.predictions, predictions.symbols))
    wide = predictions.predictions.reshape(3, 300)
    for k in test.draws.index[:5]:
        expected = slow_skill(y, np.roll(wide, k, 1).ravel(), predictions.symbols)
        assert np.isclose(test.draws.directional_skill[k], expected)


def test_a_constant_call_has_no_directional_skill_whatever_the_base_rates():
    predictions, y, prices = market(bars=400)
    y = np.where(np.arange(len(y)) % 10 < 3, -1, 1)
    calls = np.where(predictions.symbols == "S0", 1, -1).astype(np.int8)
    test = shift_test(replace(predictions, predictions=calls), y, prices, 5, n_draws=19)
    assert abs(test.observed["directional_skill"]) < 1e-12 and np.isclose(test.p_values["directional_skill"], 1)


def test_what_is_refused():
    predictions, y, prices = market()
    with pytest.raises(PermutationError, match="expected 19 or more"):
        shift_test(predictions, y, prices, horizon=90)
    with pytest.raises(PermutationError, match="smaller step"):
        random_shifts(1000, 20, step=100)
    with pytest.raises(PermutationError, match="no direction"):
        f1_null_interval(predictions, y, classes=(0, 1))
    with pytest.raises(EvaluationError, match="shape"):
        shift_test(predictions, y[:-1], prices, 5)
