"Every run on a data set counts as a trial, and so does every trial of a tuning study."

import shutil

import numpy as np
import optuna
import pandas as pd
import pytest
from fabricate import bars, make_run, probabilities

from modelfactory.evaluation.significance import significance_summary
from modelfactory.figures.model_comparison import null_band
from modelfactory.runs.comparison import comparison
from modelfactory.runs.run import list_runs
from modelfactory.runs.sentences import describe
from modelfactory.runs.stored import RunList
from modelfactory.runs.task import count_trials

pytestmark = pytest.mark.slow


def add_study(file, name, n, **facts):
    "A study of `n` trials with user attributes."
    study = optuna.create_study(study_name=name, storage=f"sqlite:///{file}")
    for key, value in facts.items():
        study.set_user_attr(key, value)
    for _ in range(n):
        study.add_trial(optuna.trial.create_trial(value=1.0))


def test_what_counts_as_a_trial(tmp_path):
    table = bars(n=60)

    def runs():
        return list_runs(tmp_path)

    first = make_run(tmp_path, "a", table)
    make_run(tmp_path, "a", table, seed=1)
    make_run(tmp_path, "a", table, code="an earlier version of the code")
    make_run(tmp_path, "a", table, fingerprint="an earlier version of the data")
    make_run(tmp_path, "a", table, horizon=20)
    make_run(tmp_path, "a", table, data="/data/others")
    assert len(runs().latest()) == 4, "the comparison shows two seeds, a second horizon and another data set"
    assert count_trials(runs(), "bars") == 5 and count_trials(runs(), "bars", 5) == 4
    assert count_trials(runs(), "others") == 1
    shutil.copytree(first.path, tmp_path / f"{first.path.name}_again")
    assert count_trials(runs(), "bars") == 5, "a copy of a run is not another trial"


def test_trials_of_tuning_count_also_those_on_val(tmp_path):
    make_run(tmp_path, "a", bars(n=60))
    study = dict(model="a", horizon=5, data="/data/bars", data_fingerprint="f" * 16)
    add_study(tmp_path / "tuning.db", "on train", 3, **study, measured_on="train")
    add_study(tmp_path / "tuning.db", "on val", 4, **study, measured_on="val")
    add_study(tmp_path / "tuning.db", "never trained", 5, **study | dict(model="b"), measured_on="val")
    add_study(tmp_path / "tuning.db", "earlier data", 6, **study | dict(data_fingerprint="e" * 16), measured_on="val")
    add_study(tmp_path / "tuning.db", "another horizon", 7, **study | dict(horizon=20), measured_on="val")
    other_data = study | dict(data="/data/others", data_fingerprint="o" * 16)
    add_study(tmp_path / "tuning.db", "other data", 8, **other_data, measured_on="val")
    runs = list_runs(tmp_path)
    assert count_trials(runs, "bars", 5) == 1 + 3 + 4 + 5 + 6 and count_trials(runs, "bars") == 1 + 3 + 4 + 5 + 6 + 7


def test_the_count_is_in_every_claim_and_sentence(tmp_path):
    table = bars(n=400)
    for i in range(20):
        make_run(tmp_path, "a", table, code=f"version {i}", skill=0.05)
    make_run(tmp_path, "b", table)
    (task,) = comparison(tmp_path)["tasks"]
    assert task["n_models"] == 2 and task["trials"] == 21
    for model in task["models"]:
        assert "corrected for 21 trials" in model["direction"]
        assert model["direction_level"] == pytest.approx(1 - 0.05 / 21)
    assert all("corrected for 21 trials" in s for s in describe(task)[:2])
    assert "corrected for 21 trials" in repr(list_runs(tmp_path)[-1])
    alone = comparison(RunList(list_runs(tmp_path)[-1:]))["tasks"][0]
    assert alone["trials"] == 1 and "as the only model tried" in alone["models"][0]["direction"]


@pytest.mark.no_cover
def test_the_best_of_fifty_models_is_significant_only_when_one_trial_is_counted():
    """The comparison sees the best of fifty models, on 60 markets without skill.

    p <= .05 in 83% of them when one trial is counted, and in at most 5% + 2 standard errors when 50 are counted."""
    n, p_values = 60, []
    for seed in range(n):
        table = bars(n=240, symbols=("A",), seed=seed, horizon=5)
        models = [probabilities(table, seed=[seed, i]) for i in range(50)]
        gain = [(np.sign(p.argmax(1) - 1) * table.y_true).sum() for p in models]
        frame = table[["datetime", "symbol", "y_true"]].copy()
        frame[["best_p_down", "best_p_flat", "best_p_up"]] = models[int(np.argmax(gain))]
        shares = table.y_true.value_counts(normalize=True).sort_index().to_numpy()
        one, fifty = (significance_summary(frame, 5, shares, trials=trials) for trials in (1, 50))
        p_values.append({1: one["p_direction"], 50: fifty["p_direction"]})
    share = (pd.DataFrame(p_values) <= 0.05).mean()
    assert share[1] > 0.4 and share[50] <= 0.05 + 2 * (0.05 * 0.95 / n) ** 0.5, share.to_dict()


@pytest.mark.no_cover
def test_the_band_of_the_best_of_18_covers_the_best_of_18():
    """200 sets of 18 strategies without skill.

    The best one ends above its own 95% band in 39% of the sets. It ends above the band of the best of 18 in at most
    2.5% + 2 standard errors."""
    n, rng, above = 200, np.random.default_rng(0), []
    for s in range(n):
        days = 0.01 * (rng.standard_t(5, (250, 18)) + 0.5 * rng.standard_t(5, (250, 1))) / 1.3
        best = days[:, (days.mean(0) / days.std(0)).argmax()]
        end = np.prod(1 + best)
        above.append([end > null_band(x, n_boot=300, seed=s)[1, -1] for x in (best, days)])
    own, joint = np.mean(above, 0)
    assert own > 0.3 and joint <= 0.025 + 2 * (0.025 * 0.975 / n) ** 0.5, (own, joint)
