"Against other libraries, and on simulations with a known answer: the size of each test where nothing is, its power where something was planted."

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

pytestmark = (
    pytest.mark.no_cover
)  # thousands of small calls, which counting lines slows by half: the notebooks go through the same lines


def books(seed=0, models=20, days=250, skill=0.0, shared=0.5):
    "Daily profit with fat tails that models share in part; the last one has a daily Sharpe ratio of about `skill`."
    rng = np.random.default_rng(seed)
    pnl = 0.01 * (
        rng.standard_t(5, (models, days)) + shared * rng.standard_t(5, days) - 0.1 * (rng.random((models, days)) < 0.05)
    )
    pnl[-1] += 0.0135 * skill
    return pnl


def overlapping(rng, T, horizon, shape=()):
    "Noise of unit variance whose neighbours share all but one of `horizon` parts, as labels do."
    x = rng.normal(size=(T + horizon - 1, *shape))
    total = np.cumsum(np.concatenate([np.zeros((1, *shape)), x]), 0)
    return (total[horizon:] - total[:-horizon]) / horizon**0.5


def stack(skills, seed=0, bars=1000, horizon=5, symbols=("A", "B")):
    "A table of models that see overlapping labels through slow noise of their own."
    rng, n = np.random.default_rng(seed), len(symbols)
    score = overlapping(rng, bars, horizon, (n,)).T.ravel()
    frame = pd.DataFrame(
        dict(
            datetime=np.tile(pd.date_range("2024-01-02", periods=bars, freq="h"), n),
            symbol=np.repeat(symbols, bars),
            y_true=np.digitize(score, [-0.43, 0.43]) - 1,
        )
    )
    for i, skill in enumerate(skills):
        lean = 0.3 * (skill * score + overlapping(rng, bars, horizon, (n,)).T.ravel())
        p = np.exp(np.stack([-lean, 0 * lean, lean], 1))
        frame[[f"m{i}_p_down", f"m{i}_p_flat", f"m{i}_p_up"]] = p / p.sum(1, keepdims=True)
    return frame


# other libraries


@pytest.mark.parametrize("seed", range(5))
def test_ratios_are_those_of_empyrical(seed):
    empyrical = pytest.importorskip("empyrical")
    for pnl in books(seed, models=4):
        assert np.isclose(sharpe_ratio(pnl), empyrical.sharpe_ratio(pnl))
        assert np.isclose(sortino_ratio(pnl), empyrical.sortino_ratio(pnl))
        assert np.isclose(drawdown(pnl).min(), empyrical.max_drawdown(pnl))
        assert np.isclose(calmar_ratio(pnl), empyrical.calmar_ratio(pnl))


@pytest.mark.parametrize("seed", range(5))
def test_sharpe_probabilities_are_those_of_purgedcv(seed):
    purgedcv = pytest.importorskip("purgedcv")
    from scipy.stats import kurtosis, skew

    pnl = books(seed, skill=0.1)
    daily = pnl.mean(1) / pnl.std(1)
    for i, row in enumerate(pnl):
        assert np.isclose(probabilistic_sharpe(row, 0.5), purgedcv.probabilistic_sharpe_ratio(row, 0.5 / 252**0.5))
        assert np.isclose(deflated_sharpe(pnl, 240)[i], purgedcv.deflated_sharpe_ratio(row, 240, daily.var(ddof=1)))
        assert np.isclose(
            deflated_sharpe(row, 240, variance=0.25)[0],
            purgedcv.deflated_sharpe_ratio(row, 240, 0.25, bars_per_year=252),
        )
        assert minimum_track_record(row, 0.5) == purgedcv.min_track_record_length(
            daily[i], 0.5 / 252**0.5, 0.05, skew(row, bias=False), kurtosis(row, fisher=False, bias=False)
        )


@pytest.mark.parametrize("models, days, n_blocks", [(6, 97, 6), (7, 64, 8), (20, 126, 8), (2, 40, 4)])
def test_overfitting_is_that_of_purgedcv(models, days, n_blocks):
    purgedcv = pytest.importorskip("purgedcv")
    pnl = books(1, models, days)
    pnl[0] = 0
    ours, theirs = backtest_overfitting(pnl, n_blocks), purgedcv.probability_of_backtest_overfitting(pnl, n_blocks)
    assert np.allclose(np.sort(ours.logits), np.sort(theirs.logits)) and len(ours.logits) == theirs.n_combos
    assert np.isclose(ours.probability, theirs.pbo + (abs(theirs.logits) < 1e-12).mean() / 2)
    assert np.allclose(np.sort(ours.sharpe, 0), np.sort(theirs.is_oos_performance, 0))


@pytest.mark.parametrize("seed", range(3))
def test_superior_ability_is_that_of_arch(seed):
    "arch does not divide by the standard errors, whatever its `studentize` says, so neither do we here; both draw 4,000 times."
    bootstrap = pytest.importorskip("arch.bootstrap")
    rng = np.random.default_rng(seed)
    gains = overlapping(rng, 400, 3, (8,)) * 0.5 + np.linspace(-0.5, 0.06, 8)
    theirs = bootstrap.SPA(np.zeros(400), -gains, block_size=10, reps=4000, seed=seed)
    theirs.compute()
    ours = spa_test(gains, n_boot=4000, mean_block=10, studentise=False)
    assert all(abs(ours[k] - theirs.pvalues[k]) < 0.035 for k in ("lower", "consistent", "upper"))
    assert ours["white"] == ours["upper"] and ours["lower"] <= ours["consistent"] <= ours["upper"]


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_diebold_mariano_is_the_t_ratio_of_its_cosines(horizon):
    "The statistic from cosines written out, over the number of frequencies the rule gives."
    T = 500
    d = overlapping(np.random.default_rng(horizon), T, horizon) + 0.05
    nu = count_frequencies(d, horizon, strict=True)
    t = np.arange(T) + 0.5
    squares = [(2 / T) * (d @ np.cos(np.pi * j * t / T)) ** 2 for j in range(1, nu + 1)]
    statistic, p = diebold_mariano(d, horizon)
    expected = d.mean() / (np.mean(squares) / T) ** 0.5
    assert np.isclose(statistic, expected)
    assert np.isclose(p, 2 * student_t.sf(abs(expected), nu))


def test_mcnemar_and_holm_are_those_of_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multiple = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 300)) < [[0.5], [0.6]]
    found = mcnemar(a, b)
    table = [[(a & b).sum(), (a & ~b).sum()], [(b & ~a).sum(), (~a & ~b).sum()]]
    assert (
        np.isclose(found["p_exact"], tables.mcnemar(table, exact=True).pvalue)
        and abs(found["p"] - found["p_exact"]) < 0.05
    )
    p = rng.random(30) ** 3
    assert np.allclose(holm_adjust(p), multiple.multipletests(p, method="holm")[1])


def test_critical_differences_are_those_of_demsar():
    "Table 5 of Demšar 2006: q at 5% for 2, 5 and 10 classifiers."
    for k, q in {2: 1.960, 5: 2.728, 10: 3.164}.items():
        assert np.isclose(critical_difference(k, 30), q * (k * (k + 1) / 180) ** 0.5, rtol=1e-3)


# simulations


def test_the_best_of_many_without_skill_is_not_believed():
    "The best of 20 convinces the plain ratio in most markets, the deflated one in few; a planted skill it does believe."
    plain, deflated, skilled = zip(
        *(
            (
                probabilistic_sharpe(x := books(s, shared=0)).max(),
                deflated_sharpe(x, 20).max(),
                deflated_sharpe(books(s, skill=0.4, shared=0), 20)[-1],
            )
            for s in range(200)
        )
    )
    assert (np.array(plain) > 0.95).mean() > 0.5
    assert (np.array(deflated) > 0.95).mean() < 0.05
    assert (np.array(skilled) > 0.95).mean() > 0.8


def test_expected_best_is_that_of_a_simulation():
    draws = np.random.default_rng(0).normal(size=(4000, 400))
    for n in (10, 100, 400):
        assert abs(expected_max(n) - draws[:, :n].max(1).mean()) < 0.06


def test_overfitting_is_even_without_skill_and_rare_with_it():
    chance = [backtest_overfitting(books(s, models=k), 10).probability for k in (2, 5, 20) for s in range(60)]
    skill = [backtest_overfitting(books(s, skill=0.4), 10).probability for s in range(60)]
    assert abs(np.mean(chance) - 0.5) < 0.06 and np.mean(skill) < 0.1


@pytest.mark.parametrize("horizon", [5, 20])
def test_superior_ability_has_its_size_and_power(horizon):
    "20 models on 1,000 overlapping gains: at most 1 in 10 markets without a good model is called at 5%, and a planted one is found."
    null, planted, hopeless = [], [], []
    for s in range(150):
        gains = overlapping(np.random.default_rng([s, horizon]), 1000, horizon, (20,))

        def ask(x):
            return spa_test(x, horizon, n_boot=300, seed=s)["consistent"] <= 0.05

        (
            null.append(ask(gains)),
            planted.append(ask(gains + np.r_[np.zeros(19), (5 if horizon < 20 else 8) * (horizon / 1000) ** 0.5])),
            hopeless.append(ask(gains - np.linspace(0, 2, 20))),
        )
    assert 0.005 < np.mean(null) < 0.11 and np.mean(hopeless) < 0.11
    assert np.mean(planted) > 0.85


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_paired_tests_have_their_size(horizon):
    "Pairs without a difference; where labels overlap, McNemar for independent rows finds one far too often."
    found = []
    for s in range(150):
        frame = stack([0, 0], [s, horizon], horizon=horizon)
        losses, hits = row_losses(frame), row_losses(frame, "error") == 0
        sums, overlap = timestamp_sums(frame, losses, horizon)
        found.append(
            mcnemar(hits.m0, hits.m1, frame.datetime, overlap)
            | dict(dm=diebold_mariano(sums[:, 0] - sums[:, 1], overlap)[1])
        )
    share = (pd.DataFrame(found)[["p_exact", "p", "dm"]] <= 0.05).mean()
    assert abs(share.p - 0.05) < 0.055 and abs(share.dm - 0.05) < 0.055
    assert share.p_exact > {1: 0, 5: 0.12, 20: 0.3}[horizon]


def test_a_planted_difference_is_found():
    tables = [paired_tests(stack([0, 0, 0.5], s), 5) for s in range(60)]
    assert np.mean([t.columns.name == "against m2" for t in tables]) > 0.95
    assert (
        np.mean([(t.p_dm_holm < 0.05).all() for t in tables]) > 0.8
        and np.mean([(t.p_mcnemar_holm < 0.05).all() for t in tables]) > 0.5
    )


def test_differences_to_the_best_hold_together():
    "Equal models: in about 95% of the markets no interval, of all to the one that looks best, leaves out the true difference 0."
    outside = [
        (~class_differences(stack([0] * 6, s, bars=800), 5, "log_loss", n_boot=200).not_worse).any() for s in range(80)
    ]
    assert np.mean(outside) < 0.11
    found = [class_differences(stack([0, 0, 0, 0.6], s, bars=800), 5, "log_loss", n_boot=300) for s in range(30)]
    assert np.mean([t.index[0] == "m3" and not t.not_worse[["m0", "m1", "m2"]].any() for t in found]) > 0.8


def test_one_comparison_is_an_ordinary_interval():
    rng = np.random.default_rng(0)
    draws = dict(a=rng.normal(0.6, 0.01, 4000), b=rng.normal(0.55, 0.02, 4000))
    table = paired_differences(dict(a=0.6, b=0.55), draws, 1e9, "accuracy", against="a")
    ends = percentile_interval(dict(d=draws["b"] - draws["a"]), 1e9)
    assert np.allclose(table.loc["b", ["low", "high"]].astype(float), [ends["d_ci_low"], ends["d_ci_high"]], atol=0.002)


# what is refused, and pictures of twenty


@pytest.mark.parametrize(
    "f, says",
    [
        (lambda: deflated_sharpe(books(), 3), "count everything that was tried"),
        (lambda: deflated_sharpe(books(), 20.5), "whole number"),
        (lambda: backtest_overfitting(books(models=1)), "at least 2 models"),
        (lambda: backtest_overfitting(books(days=15)), "at least 2 models x 16 days"),
        (lambda: backtest_overfitting(books() * np.nan), "finite"),
        (lambda: spa_test(books()[0]), "expected (T, models)"),
        (lambda: diebold_mariano(np.zeros(30), 20), "expected more than 40"),
        (lambda: row_losses(stack([0]).drop(columns="y_true")), "no column 'y_true'"),
        (lambda: row_losses(stack([])), "no model"),
        (lambda: row_losses(stack([0]), "mse"), "no loss 'mse'"),
        (lambda: paired_tests(stack([0, 0]), 5, against="gru"), "no model 'gru'"),
        (lambda: paired_differences(dict(a=np.nan, b=1.0), {}, 10, "accuracy"), "defined for 1 of 2 models"),
        (lambda: critical_difference(1, 9), "at least 2"),
        (lambda: rank_models(pd.DataFrame(dict(a=[1.0, np.nan], b=[1.0, 2.0])), "accuracy"), "1 folds lack"),
    ],
)
def test_what_is_refused(f, says):
    with pytest.raises(SignificanceError) as error:
        f()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_pictures_of_twenty_models():
    from matplotlib import pyplot as plt

    rng = np.random.default_rng(0)
    ranks = rank_models(
        pd.DataFrame(rng.normal(size=(8, 20)) + np.linspace(0, 1, 20), columns=[f"model_{i}" for i in range(20)]),
        "f1_macro",
    )
    assert ranks.mean.index[0] != "model_0" and ranks.cd > 10
    draws = {m: rng.normal(size=500) for m in ranks.table}
    table = paired_differences(dict(zip(ranks.table, rng.normal(size=20))), draws, 50, "f1_macro")
    figures = [plot_ranks(ranks), plot_critical_difference(ranks), plot_differences(table, "f1_macro")]
    for fig in figures:
        fig.canvas.draw(), plt.close(fig)
