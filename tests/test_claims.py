"Claims have their level and power with drift, uneven barriers, sparse symbols and persistent predictions."

import numpy as np
import pandas as pd
import pytest
from scipy.signal import lfilter

from modelfactory.data.splits import MIN_BLOCKS, effective_blocks, timestamps_per_bar
from modelfactory.evaluation.bootstrap import block_length, classification_draws, count_frequencies
from modelfactory.evaluation.examples import example_predictions
from modelfactory.evaluation.metrics import METRICS, directional_gains, directional_skill, metric_names
from modelfactory.evaluation.significance import (
    adjust_for_trials,
    backtest_overfitting,
    diebold_mariano,
    direction_claim,
    direction_gains,
    information_gains,
    mean_differences,
    profit_claims,
    significance_summary,
    spa_test,
    timestamp_sums,
)

# Coverage would slow these thousands of small calls, and the notebooks run the same lines.
pytestmark = pytest.mark.no_cover
# Barriers down and up (in sd), drift, and a lower limit of the share of false claims by signed hits.
UNEVEN = (0.55, 0.5, 0, 0.05), (0.625, 0.5, 0, 0.3), (1.0, 0.5, 0, 0.9), (0.5, 0.5, 0.05, 0.5)


def barrier_labels(rng, bars, down, up, drift=0.0, max_bars=20, steps=4):
    "Labels: the barrier, `down` or `up` in sd of `max_bars` bars, that a random walk hits first; 0 without a hit."
    walk = np.cumsum(rng.normal(drift / steps, steps**-0.5, (bars + max_bars) * steps))
    path = np.lib.stride_tricks.sliding_window_view(walk, max_bars * steps)[::steps][:bars]
    start = np.r_[0, walk[steps - 1 :: steps]][:bars, None]
    scale = max_bars**0.5
    above = path - start >= up * scale
    below = path - start <= -down * scale

    def first_hit(hit):
        return np.where(hit.any(1), hit.argmax(1), path.shape[1])

    return np.sign(first_hit(below) - first_hit(above))


def market(seed, down=0.5, up=0.5, drift=0.0, bars=2000, symbols=2, max_bars=20):
    "Keys and labels of symbols whose prices are random walks."
    rng = np.random.default_rng(seed)
    times = pd.date_range("2024-01-02", periods=bars, freq="h")
    names = np.repeat([f"S{i}" for i in range(symbols)], bars)
    frame = pd.DataFrame(dict(datetime=np.tile(times, symbols), symbol=names))
    frame["y_true"] = np.concatenate([barrier_labels(rng, bars, down, up, drift, max_bars) for _ in range(symbols)])
    return frame


def add_model(frame, name, prediction, confidence=0.6):
    "Adds the probabilities of a model that gives each predicted class the same confidence."
    p = np.full((len(frame), 3), (1 - confidence) / 2)
    p[np.arange(len(frame)), np.asarray(prediction) + 1] = confidence
    frame[[f"{name}_p_down", f"{name}_p_flat", f"{name}_p_up"]] = p


def ar1(rng, n, tau):
    "AR(1) series of unit variance with a decay time of `tau` steps."
    rho = np.exp(-1 / tau)
    return lfilter([(1 - rho**2) ** 0.5], [1, -rho], rng.normal(size=n + 20 * tau))[-n:]


def unskilled_models(frame, seed):
    "Four models: always up, a constant call per symbol, random calls, and persistent calls that are mostly up."
    rng, n = np.random.default_rng(seed), len(frame)
    add_model(frame, "up", np.ones(n, int))
    add_model(frame, "symbol", np.where(frame.symbol == "S0", 1, -1))
    add_model(frame, "random", rng.choice([-1, 0, 1], n))
    add_model(frame, "persistent", np.where(ar1(rng, n, 50) > -0.5, 1, -1))
    return frame


def signed_hits_p_value(frame, horizon):
    "P-value of the former rule: number of right signs minus number of wrong signs."
    names = [c.removesuffix("_p_up") for c in frame if c.endswith("_p_up")]
    calls = {m: np.sign(frame[f"{m}_p_up"] - frame[f"{m}_p_down"]) * frame.y_true for m in names}
    sums, overlap = timestamp_sums(frame, pd.DataFrame(calls), horizon)
    return spa_test(sums, overlap, n_boot=300)["consistent"]


@pytest.mark.slow
@pytest.mark.parametrize("down, up, drift, false_claims", UNEVEN)
def test_constant_calls_have_no_skill_where_barriers_are_uneven_or_prices_drift(down, up, drift, false_claims):
    "The level holds with barriers 1:1.1, 1:1.25, 1:2 and with drift. The former rule makes at least `false_claims`."
    new, old = [], []
    for s in range(60):
        frame = unskilled_models(market(s, down, up, drift), s)
        sums, overlap = timestamp_sums(frame, direction_gains(frame), 20)
        new.append(spa_test(sums, overlap, n_boot=300)["consistent"] <= 0.05)
        old.append(signed_hits_p_value(frame, 20) <= 0.05)
    assert np.mean(new) <= 0.05 + 2 * (0.05 * 0.95 / 60) ** 0.5
    assert np.mean(old) >= false_claims


def test_a_constant_call_is_not_significant_at_any_accuracy():
    "With barriers 1.5 down and 3.0 up, always down is right in two of three signed rows and has skill 0."
    frame = market(1, 1.5 / 20**0.5, 3.0 / 20**0.5)
    claim = direction_claim(frame.assign(prediction=-1), 20)
    assert claim.accuracy == claim.constant > 0.6 and claim.skill == 0 and claim.verdict == "not significant"
    assert f"always down {claim.constant:.3f}" in claim.sentence


def test_claims_of_unskilled_models_have_their_level():
    claims = []
    for s in range(100):
        frame = market(s, 0.5, 0.75, 0.03, bars=1500)
        persistent = np.where(ar1(np.random.default_rng(s), len(frame), 100) > -0.3, 1, -1)
        claims.append(direction_claim(frame.assign(prediction=persistent), 20).significant)
    assert np.mean(claims) <= 0.05 + 2 * (0.05 * 0.95 / 100) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.08, 0.12, 0.2])
def test_planted_skill_is_detected_as_often_as_by_signed_hits(strength):
    "Labels are symmetric, the model is right in .5 + strength of the rows. The loss of power is at most .02."
    new, old = [], []
    for s in range(60):
        frame, rng = market(s, bars=1000), np.random.default_rng([s, 1])
        blocks = np.repeat(rng.random(len(frame) // 20 + 1) < 2 * strength, 20)[: len(frame)]
        guess = np.repeat(rng.choice([-1, 1], len(frame) // 20 + 1), 20)[: len(frame)]
        add_model(frame, "model", np.where(blocks & (frame.y_true != 0), frame.y_true, guess))
        sums, overlap = timestamp_sums(frame, direction_gains(frame), 20)
        new.append(spa_test(sums, overlap, n_boot=300)["consistent"] <= 0.05)
        old.append(signed_hits_p_value(frame, 20) <= 0.05)
    assert np.mean(new) >= np.mean(old) - 0.02 - 1 / 60
    if strength == 0.2:
        assert np.mean(new) > 0.8


def test_directional_gains_equal_a_loop():
    rng = np.random.default_rng(0)
    y, q, symbols = rng.choice([-1, 0, 1], 300), rng.choice([-1, 0, 1], (300, 2)), rng.choice(list("abc"), 300)
    gains, scored = directional_gains(y, q, symbols)
    for m in range(2):
        for s in "abc":
            rows = (symbols == s) & (y != 0) & (q[:, m] != 0)
            expected = (q[rows, m] - q[rows, m].mean()) * (y[rows] - y[rows].mean())
            assert np.allclose(gains[rows, m], expected) and not gains[(symbols == s) & ~rows, m].any()
        assert np.isclose(directional_skill(y, q[:, m], symbols), gains[:, m].sum() / scored[:, m].sum())


def test_two_symbols_of_daily_bars_have_too_few_rows_for_a_claim():
    "252 daily bars of two symbols have 38 validation rows each."
    verdicts = set()
    for s in range(40):
        frame = market(s, bars=38, max_bars=20)
        frame["datetime"] = np.tile(pd.bdate_range("2024-01-02", periods=38), 2)
        claim = direction_claim(frame.assign(prediction=np.sign(frame.y_true) * (np.arange(76) % 10 == 0)), 20)
        verdicts.add(claim.verdict)
        assert np.isnan(claim.low) and not claim.significant and "too few rows to say" in claim.sentence
    assert verdicts == {"too few rows"}


def test_each_verdict_has_a_sentence():
    frame = market(0)
    right = direction_claim(frame.assign(prediction=frame.y_true), 20, trials=36)
    wrong = direction_claim(frame.assign(prediction=-frame.y_true), 20)
    flat = direction_claim(frame.assign(prediction=0), 20)
    unsigned = direction_claim(frame.assign(y_true=abs(frame.y_true), prediction=1), 20, classes=(0, 1))
    no_signed_label = direction_claim(frame.assign(y_true=0, prediction=1), 20)
    assert right.significant and "significant, corrected for 36 trials" in right.sentence
    assert wrong.verdict == "worse" and "significantly negative, as the only model tried" in wrong.sentence
    assert flat.verdict == "too few rows"
    assert unsigned.verdict == no_signed_label.verdict == "no direction"
    assert np.isclose(right.level, 1 - 0.05 / 36)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [20, 200])
@pytest.mark.parametrize("horizon", [5, 20])
def test_equal_models_with_persistent_predictions_are_not_significantly_different(tau, horizon):
    "Loss differences are persistent, with the noise of overlapping labels."
    rng, T, rejected, excluded = np.random.default_rng(tau + horizon), 6000, [], []
    for _ in range(200):
        noise = np.convolve(rng.normal(size=T + horizon - 1), np.ones(horizon) / horizon**0.5, "valid")
        d = 0.3**0.5 * ar1(rng, T, tau) + 0.7**0.5 * noise
        rejected.append(diebold_mariano(d, horizon)[1] < 0.05)
    assert np.mean(rejected) <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5
    keys = pd.DataFrame(dict(datetime=pd.date_range("2024-01-02", periods=T, freq="h"), symbol="A"))
    for _ in range(100):
        losses = pd.DataFrame({m: 0.3 * ar1(rng, T, tau) + rng.normal(size=T) for m in "abc"})
        excluded.append(not mean_differences(losses, keys, horizon).not_worse.all())
    assert np.mean(excluded) <= 0.05 + 2 * (0.05 * 0.95 / 100) ** 0.5


def test_a_planted_difference_between_models_is_detected():
    rng, T = np.random.default_rng(0), 2000
    keys = pd.DataFrame(dict(datetime=pd.date_range("2024-01-02", periods=T, freq="h"), symbol="A"))
    detected = []
    for _ in range(40):
        losses = pd.DataFrame({m: rng.normal(size=T) for m in "abc"}) + [0, 0.25, 0.25]
        table = mean_differences(losses, keys, 5)
        detected.append(table.index[0] == "a" and not table.not_worse[["b", "c"]].any())
    assert np.mean(detected) > 0.8


def test_one_sparse_symbol_hardly_changes_the_block_length():
    "A symbol has 80 rows, two have 2,000."
    t, s = np.tile(np.arange(2000), 2), np.repeat([0, 1], 2000)
    sparse_t, sparse_s = np.r_[t, np.arange(0, 2000, 25)], np.r_[s, np.full(80, 2)]
    assert timestamps_per_bar(t, s) == 1 and timestamps_per_bar(sparse_t, sparse_s) < 1.6
    without_sparse, with_sparse = block_length(t, s, 20), block_length(sparse_t, sparse_s, 20)
    assert with_sparse < 1.7 * without_sparse
    assert effective_blocks(sparse_t, sparse_s, 20) >= MIN_BLOCKS


def test_the_best_of_fifty_is_corrected_for_fifty_trials():
    naive, corrected = [], []
    for s in range(150):
        gains = np.random.default_rng(s).normal(size=(400, 50))
        best = gains[:, [gains.mean(0).argmax()]]
        p = spa_test(best, n_boot=300)["consistent"]
        naive.append(p <= 0.05)
        corrected.append(adjust_for_trials(p, 1, 50) <= 0.05)
    assert np.mean(naive) > 0.6
    assert np.mean(corrected) <= 0.05 + 2 * (0.05 * 0.95 / 150) ** 0.5


def strategies(seed, skilled, models=8, days=250, drift=0.0, exposure=1.0):
    "Daily tables of strategies with a constant exposure to the market; the first `skilled` ones also have skill."
    rng = np.random.default_rng(seed)
    index, prices = pd.date_range("2024-01-02", periods=days, freq="B"), rng.normal(drift, 0.01, days)
    tables = {}
    for m in range(models):
        timing = rng.normal(0.003 * (m < skilled), 0.01, days)
        constant = exposure * prices * (drift != 0)
        columns = dict(net=timing + constant, hold=prices, constant=constant)
        tables[f"m{m}"] = pd.DataFrame(columns, index)
    return tables


@pytest.mark.slow
def test_profit_is_significant_where_half_of_the_strategies_have_a_sharpe_ratio_near_five():
    "The variance over trials contains their skill, so the deflated ratio is not significant, and the SPA test is."
    claims = [profit_claims(strategies(s, 9, 18), 18) for s in range(20)]
    assert np.mean([c["p_profit"] <= 0.05 for c in claims]) > 0.95
    assert np.mean([c["deflated_sharpe"] >= 0.95 for c in claims]) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("drift, exposure", [(0.0, 1.0), (0.002, 1.0), (-0.002, -1.0), (0.002, 0.5)])
def test_profit_from_price_drift_alone_is_not_significant(drift, exposure):
    claims = [profit_claims(strategies(s, 0, drift=drift, exposure=exposure), 8) for s in range(25)]
    assert np.mean([c["p_profit"] <= 0.05 for c in claims]) <= 0.05 + 2 * (0.05 * 0.95 / 25) ** 0.5


@pytest.mark.slow
def test_profit_is_not_significant_where_no_model_beats_all_benchmarks():
    "One model is always short on a falling market. Another has timing skill and loses."
    claimed, separately = [], []
    for s in range(25):
        rng = np.random.default_rng(s)
        index = pd.date_range("2024-01-02", periods=250, freq="B")
        market = rng.normal(-0.002, 0.01, 250)
        short = pd.DataFrame(dict(net=-market, hold=market, constant=-market), index)
        timing = rng.normal(0.002, 0.002, 250)
        timed = pd.DataFrame(dict(net=1.5 * market + timing, hold=market, constant=1.5 * market), index)
        claim = profit_claims(dict(short=short, timed=timed), 2)
        parts = claim["p_profit_cash"], claim["p_profit_hold"], claim["p_profit_constant"]
        separately.append(max(parts) <= 0.05)
        claimed.append(claim["p_profit"] <= 0.05)
    assert np.mean(separately) > 0.6
    assert np.mean(claimed) <= 0.05 + 2 * (0.05 * 0.95 / 25) ** 0.5


def test_a_claim_on_profit_that_is_not_made_has_a_reason():
    tables = strategies(0, 0)
    short = {m: t[:15] for m, t in tables.items()}
    flat = {m: t * 0 for m, t in tables.items()}
    old = {m: t[["net"]] for m, t in tables.items()}
    cases = (short, "too few days"), (flat, "nothing was traded"), (old, "earlier version"), ({}, "no prices")
    for daily, reason in cases:
        claim = profit_claims(daily, 18)
        assert claim["p_profit"] is None and reason in claim["why"]


def test_overfitting_needs_sixteen_days():
    assert len(backtest_overfitting(np.random.default_rng(0).normal(size=(5, 16))).logits) == 70


@pytest.mark.slow
def test_a_change_of_class_shares_is_no_skill():
    "Flat labels are more frequent after train. A model with more probability for flat beats the shares of train."
    claimed = []
    for s in range(25):
        rng = np.random.default_rng(s)
        y = rng.choice([-1, 0, 1], 2000, p=[0.25, 0.5, 0.25])
        frame = pd.DataFrame(dict(datetime=pd.date_range("2024-01-02", periods=2000, freq="h"), symbol="A", y_true=y))
        frame[["model_p_down", "model_p_flat", "model_p_up"]] = [0.3, 0.4, 0.3]
        noisy = np.clip(0.4 + 0.02 * ar1(rng, 2000, 50), 0.2, 0.6)
        frame["noisy_p_down"] = frame["noisy_p_up"] = (1 - noisy) / 2
        frame["noisy_p_flat"] = noisy
        summary = significance_summary(frame, 5, [1 / 3] * 3)
        claimed.append(summary["log_loss_significant"])
        assert np.allclose(information_gains(frame)["model"], 0)
    assert np.mean(claimed) <= 0.05 + 2 * (0.05 * 0.95 / 25) ** 0.5


def test_a_summary_has_all_keys_for_one_and_for_three_models():
    for models in (1, 3):
        frame = market(3)
        for m in range(models):
            add_model(frame, f"m{m}", frame.y_true if m else np.ones(len(frame), int), 0.5)
        summary = significance_summary(frame, 20, [0.4, 0.2, 0.4], strategies(0, 0, models), trials=7)
        assert summary["trials"] == 7 and summary["n_models"] == models
        assert set(summary["models"]) == {f"m{m}" for m in range(models)}
        assert summary["direction_significant"] is (models == 3)
        assert ("overfitting" in summary["why"]) is (models == 1)
        assert (summary["not_worse"] is None) is (models == 1)
        flags = [m for m, row in summary["models"].items() if row["direction_significant"]]
        assert flags == ["m1", "m2"][: models - 1]


def test_claims_on_direction_use_the_predicted_class():
    "A model may predict a class that is not its most probable one. Summary and claim both use the prediction."
    frame = market(3)
    add_model(frame, "model", np.ones(len(frame), int), 0.5)
    by_probability = significance_summary(frame, 20, [0.4, 0.2, 0.4])
    predictions = dict(model=frame["y_true"].to_numpy())
    by_prediction = significance_summary(frame, 20, [0.4, 0.2, 0.4], predictions=predictions)
    assert not by_probability["direction_significant"]
    assert by_probability["claims"]["model"].skill == 0
    assert by_prediction["direction_significant"]
    assert by_prediction["claims"]["model"].accuracy == 1


def test_the_null_calibration_error_falls_with_the_root_of_the_rows():
    def mean_ece_null(bars):
        draws, _ = classification_draws(*example_predictions(bars, horizon=1, skill=0.0), 1, n_boot=200)
        return draws["ece_null"].mean()

    short, long = mean_ece_null(600), mean_ece_null(2400)
    assert abs(long / short - 0.5) < 0.1


def test_metrics_have_valid_signs_and_kinds():
    kinds = {"class", "direction", "set", "trading", "information", "permutation", "run"}
    assert all(m.sign in (-1, 0, 1) and m.kind in kinds for m in METRICS.values())
    assert len(metric_names()) == len(METRICS) and "sharpe_net" in metric_names("trading")


def test_white_noise_keeps_most_degrees_of_freedom():
    counts = [count_frequencies(np.random.default_rng(s).normal(size=2000), 5) for s in range(100)]
    assert np.median(counts) == 50 and np.mean(counts) > 40
