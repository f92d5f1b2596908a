"Significance tests agree with other libraries, and have the right size and power on simulated data."

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student_t

from modelfactory.evaluation.backtest import calmar_ratio, drawdown, sharpe_ratio, sortino_ratio
from modelfactory.evaluation.bootstrap import count_frequencies, percentile_interval
from modelfactory.evaluation.significance import (
    SignificanceError,
    backtest_overfitting,
    class_differences,
    critical_difference,
    deflated_sharpe,
    diebold_mariano,
    expected_max,
    holm_adjust,
    mcnemar,
    minimum_track_record,
    paired_differences,
    paired_tests,
    plot_critical_difference,
    plot_differences,
    plot_ranks,
    probabilistic_sharpe,
    rank_models,
    row_losses,
    spa_test,
    timestamp_sums,
)

# Coverage would slow these thousands of small calls by half, and the notebooks run the same lines.
pytestmark = pytest.mark.no_cover


def simulated_pnl(seed=0, models=20, days=250, skill=0.0, shared=0.5):
    "Daily profit with fat tails and a common part; the last model has a daily Sharpe ratio of about `skill`."
    rng = np.random.default_rng(seed)
    own, common = rng.standard_t(5, (models, days)), rng.standard_t(5, days)
    losses = 0.1 * (rng.random((models, days)) < 0.05)
    pnl = 0.01 * (own + shared * common - losses)
    pnl[-1] += 0.0135 * skill
    return pnl


def overlapping(rng, T, horizon, shape=()):
    "Noise of unit variance with the overlap of labels: neighbours share all but one of `horizon` terms."
    x = rng.normal(size=(T + horizon - 1, *shape))
    total = np.cumsum(np.concatenate([np.zeros((1, *shape)), x]), 0)
    return (total[horizon:] - total[:-horizon]) / horizon**0.5


def stack(skills, seed=0, bars=1000, horizon=5, symbols=("A", "B")):
    "Stacked predictions of models that observe overlapping labels with autocorrelated noise."
    rng, n = np.random.default_rng(seed), len(symbols)
    score = overlapping(rng, bars, horizon, (n,)).T.ravel()
    times = np.tile(pd.date_range("2024-01-02", periods=bars, freq="h"), n)
    frame = pd.DataFrame(dict(datetime=times, symbol=np.repeat(symbols, bars)))
    frame["y_true"] = np.digitize(score, [-0.43, 0.43]) - 1
    for i, skill in enumerate(skills):
        signal = 0.3 * (skill * score + overlapping(rng, bars, horizon, (n,)).T.ravel())
        p = np.exp(np.stack([-signal, 0 * signal, signal], 1))
        frame[[f"m{i}_p_down", f"m{i}_p_flat", f"m{i}_p_up"]] = p / p.sum(1, keepdims=True)
    return frame


# Agreement with other libraries


@pytest.mark.parametrize("seed", range(5))
def test_ratios_equal_those_of_empyrical(seed):
    empyrical = pytest.importorskip("empyrical")
    for pnl in simulated_pnl(seed, models=4):
        assert np.isclose(sharpe_ratio(pnl), empyrical.sharpe_ratio(pnl))
        assert np.isclose(sortino_ratio(pnl), empyrical.sortino_ratio(pnl))
        assert np.isclose(drawdown(pnl).min(), empyrical.max_drawdown(pnl))
        assert np.isclose(calmar_ratio(pnl), empyrical.calmar_ratio(pnl))


@pytest.mark.parametrize("seed", range(5))
def test_sharpe_probabilities_equal_those_of_purgedcv(seed):
    purgedcv = pytest.importorskip("purgedcv")
    from scipy.stats import kurtosis, skew

    pnl = simulated_pnl(seed, skill=0.1)
    daily = pnl.mean(1) / pnl.std(1)
    for i, row in enumerate(pnl):
        assert np.isclose(probabilistic_sharpe(row, 0.5), purgedcv.probabilistic_sharpe_ratio(row, 0.5 / 252**0.5))
        assert np.isclose(deflated_sharpe(pnl, 240)[i], purgedcv.deflated_sharpe_ratio(row, 240, daily.var(ddof=1)))
        expected = purgedcv.deflated_sharpe_ratio(row, 240, 0.25, bars_per_year=252)
        assert np.isclose(deflated_sharpe(row, 240, variance=0.25)[0], expected)
        moments = skew(row, bias=False), kurtosis(row, fisher=False, bias=False)
        expected = purgedcv.min_track_record_length(daily[i], 0.5 / 252**0.5, 0.05, *moments)
        assert minimum_track_record(row, 0.5) == expected


@pytest.mark.parametrize("models, days, n_blocks", [(6, 97, 6), (7, 64, 8), (20, 126, 8), (2, 40, 4)])
def test_overfitting_equals_that_of_purgedcv(models, days, n_blocks):
    purgedcv = pytest.importorskip("purgedcv")
    pnl = simulated_pnl(1, models, days)
    pnl[0] = 0
    result = backtest_overfitting(pnl, n_blocks)
    expected = purgedcv.probability_of_backtest_overfitting(pnl, n_blocks)
    assert np.allclose(np.sort(result.logits), np.sort(expected.logits))
    assert len(result.logits) == expected.n_combos
    assert np.isclose(result.probability, expected.pbo + (abs(expected.logits) < 1e-12).mean() / 2)
    assert np.allclose(np.sort(result.sharpe, 0), np.sort(expected.is_oos_performance, 0))


@pytest.mark.parametrize("seed", range(3))
def test_spa_p_values_equal_those_of_arch(seed):
    "arch ignores `studentize` and does not divide by standard errors, so the comparison uses `studentise=False`."
    bootstrap = pytest.importorskip("arch.bootstrap")
    rng = np.random.default_rng(seed)
    gains = overlapping(rng, 400, 3, (8,)) * 0.5 + np.linspace(-0.5, 0.06, 8)
    expected = bootstrap.SPA(np.zeros(400), -gains, block_size=10, reps=4000, seed=seed)
    expected.compute()
    p = spa_test(gains, n_boot=4000, mean_block=10, studentise=False)
    assert all(abs(p[k] - expected.pvalues[k]) < 0.035 for k in ("lower", "consistent", "upper"))
    assert p["white"] == p["upper"] and p["lower"] <= p["consistent"] <= p["upper"]


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_diebold_mariano_equals_the_t_ratio_from_explicit_cosines(horizon):
    "The number of frequencies is that of `count_frequencies`."
    T = 500
    d = overlapping(np.random.default_rng(horizon), T, horizon) + 0.05
    nu = count_frequencies(d, horizon, strict=True)
    t = np.arange(T) + 0.5
    squares = [(2 / T) * (d @ np.cos(np.pi * j * t / T)) ** 2 for j in range(1, nu + 1)]
    statistic, p = diebold_mariano(d, horizon)
    expected = d.mean() / (np.mean(squares) / T) ** 0.5
    assert np.isclose(statistic, expected)
    assert np.isclose(p, 2 * student_t.sf(abs(expected), nu))


def test_mcnemar_and_holm_equal_those_of_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multiple = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 300)) < [[0.5], [0.6]]
    result = mcnemar(a, b)
    table = [[(a & b).sum(), (a & ~b).sum()], [(b & ~a).sum(), (~a & ~b).sum()]]
    assert np.isclose(result["p_exact"], tables.mcnemar(table, exact=True).pvalue)
    assert abs(result["p"] - result["p_exact"]) < 0.05
    p = rng.random(30) ** 3
    assert np.allclose(holm_adjust(p), multiple.multipletests(p, method="holm")[1])


def test_critical_differences_equal_those_of_demsar():
    "Table 5 of Demšar 2006 has q at 5% for 2, 5 and 10 classifiers."
    for k, q in {2: 1.960, 5: 2.728, 10: 3.164}.items():
        assert np.isclose(critical_difference(k, 30), q * (k * (k + 1) / 180) ** 0.5, rtol=1e-3)


# Size and power on simulated data


@pytest.mark.slow
def test_the_deflated_sharpe_ratio_rejects_the_best_of_many_without_skill():
    "The best of 20 unskilled models passes the plain ratio in most markets, and the deflated one in few."
    plain, deflated, skilled = [], [], []
    for s in range(200):
        pnl = simulated_pnl(s, shared=0)
        plain.append(probabilistic_sharpe(pnl).max())
        deflated.append(deflated_sharpe(pnl, 20).max())
        skilled.append(deflated_sharpe(simulated_pnl(s, skill=0.4, shared=0), 20)[-1])
    assert (np.array(plain) > 0.95).mean() > 0.5
    assert (np.array(deflated) > 0.95).mean() < 0.05
    assert (np.array(skilled) > 0.95).mean() > 0.8


def test_expected_maximum_equals_that_of_a_simulation():
    draws = np.random.default_rng(0).normal(size=(4000, 400))
    for n in (10, 100, 400):
        assert abs(expected_max(n) - draws[:, :n].max(1).mean()) < 0.06


def test_overfitting_probability_is_one_half_without_skill_and_low_with_skill():
    chance = [backtest_overfitting(simulated_pnl(s, models=k), 10).probability for k in (2, 5, 20) for s in range(60)]
    skill = [backtest_overfitting(simulated_pnl(s, skill=0.4), 10).probability for s in range(60)]
    assert abs(np.mean(chance) - 0.5) < 0.06 and np.mean(skill) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [5, 20])
def test_spa_test_has_its_size_and_power(horizon):
    "20 models on 1,000 overlapping gains. Without a good model at most 11% of the markets are significant at 5%."
    null, planted, hopeless = [], [], []
    skill = np.r_[np.zeros(19), (5 if horizon < 20 else 8) * (horizon / 1000) ** 0.5]
    for s in range(150):
        gains = overlapping(np.random.default_rng([s, horizon]), 1000, horizon, (20,))
        for shift, results in ((0, null), (skill, planted), (-np.linspace(0, 2, 20), hopeless)):
            p = spa_test(gains + shift, horizon, n_boot=300, seed=s)["consistent"]
            results.append(p <= 0.05)
    assert 0.005 < np.mean(null) < 0.11 and np.mean(hopeless) < 0.11
    assert np.mean(planted) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_paired_tests_have_their_size(horizon):
    "Equal models. With overlapping labels McNemar's test for independent rows rejects far too often."
    tests = []
    for s in range(150):
        frame = stack([0, 0], [s, horizon], horizon=horizon)
        losses, hits = row_losses(frame), row_losses(frame, "error") == 0
        sums, overlap = timestamp_sums(frame, losses, horizon)
        _, p_dm = diebold_mariano(sums[:, 0] - sums[:, 1], overlap)
        tests.append(mcnemar(hits.m0, hits.m1, frame.datetime, overlap) | dict(dm=p_dm))
    share = (pd.DataFrame(tests)[["p_exact", "p", "dm"]] <= 0.05).mean()
    assert abs(share.p - 0.05) < 0.055 and abs(share.dm - 0.05) < 0.055
    assert share.p_exact > {1: 0, 5: 0.12, 20: 0.3}[horizon]


@pytest.mark.slow
def test_paired_tests_detect_a_planted_difference():
    tables = [paired_tests(stack([0, 0, 0.5], s), 5) for s in range(60)]
    assert np.mean([t.columns.name == "against m2" for t in tables]) > 0.95
    assert np.mean([(t.p_dm_holm < 0.05).all() for t in tables]) > 0.8
    assert np.mean([(t.p_mcnemar_holm < 0.05).all() for t in tables]) > 0.5


@pytest.mark.slow
def test_intervals_of_differences_to_the_best_hold_jointly():
    "With equal models, all intervals contain the true difference 0 in about 95% of the markets."

    def differences(skills, seed, n_boot):
        return class_differences(stack(skills, seed, bars=800), 5, "log_loss", n_boot=n_boot)

    excluded = [(~differences([0] * 6, s, 200).not_worse).any() for s in range(80)]
    assert np.mean(excluded) < 0.11
    tables = [differences([0, 0, 0, 0.6], s, 300) for s in range(30)]
    assert np.mean([t.index[0] == "m3" and not t.not_worse[["m0", "m1", "m2"]].any() for t in tables]) > 0.8


def test_the_interval_of_a_single_comparison_is_a_percentile_interval():
    rng = np.random.default_rng(0)
    draws = dict(a=rng.normal(0.6, 0.01, 4000), b=rng.normal(0.55, 0.02, 4000))
    table = paired_differences(dict(a=0.6, b=0.55), draws, 1e9, "accuracy", against="a")
    ends = percentile_interval(dict(d=draws["b"] - draws["a"]), 1e9)
    assert np.allclose(table.loc["b", ["low", "high"]].astype(float), [ends["d_ci_low"], ends["d_ci_high"]], atol=0.002)


# Errors and figures


@pytest.mark.parametrize(
    "f, message",
    [
        (lambda: deflated_sharpe(simulated_pnl(), 3), "count everything that was tried"),
        (lambda: deflated_sharpe(simulated_pnl(), 20.5), "whole number"),
        (lambda: backtest_overfitting(simulated_pnl(models=1)), "at least 2 models"),
        (lambda: backtest_overfitting(simulated_pnl(days=15)), "at least 2 models x 16 days"),
        (lambda: backtest_overfitting(simulated_pnl() * np.nan), "finite"),
        (lambda: spa_test(simulated_pnl()[0]), "of shape (T, models)"),
        (lambda: diebold_mariano(np.zeros(30), 20), "expected more than 40"),
        (lambda: row_losses(stack([0]).drop(columns="y_true")), "no column 'y_true'"),
        (lambda: row_losses(stack([])), "no model"),
        (lambda: row_losses(stack([0]), "mse"), "no loss 'mse'"),
        (lambda: paired_tests(stack([0, 0]), 5, against="gru"), "no model 'gru'"),
        (lambda: paired_differences(dict(a=np.nan, b=1.0), {}, 10, "accuracy"), "defined for 1 of 2 models"),
        (lambda: critical_difference(1, 9), "at least 2"),
        (lambda: rank_models(pd.DataFrame(dict(a=[1.0, np.nan], b=[1.0, 2.0])), "accuracy"), "1 fold lacks"),
    ],
)
def test_invalid_input_raises_an_error_with_one_line(f, message):
    with pytest.raises(SignificanceError) as error:
        f()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_figures_of_twenty_models():
    from matplotlib import pyplot as plt

    rng = np.random.default_rng(0)
    names = [f"model_{i}" for i in range(20)]
    scores = pd.DataFrame(rng.normal(size=(8, 20)) + np.linspace(0, 1, 20), columns=names)
    ranks = rank_models(scores, "f1_macro")
    assert ranks.mean.index[0] != "model_0" and ranks.cd > 10
    draws = {m: rng.normal(size=500) for m in ranks.table}
    points = dict(zip(ranks.table, rng.normal(size=20), strict=True))
    table = paired_differences(points, draws, 50, "f1_macro")
    figures = [plot_ranks(ranks), plot_critical_difference(ranks), plot_differences(table, "f1_macro")]
    for fig in figures:
        fig.canvas.draw()
        plt.close(fig)
