"Seeds of a model share one row and one entry in the tests; each seed is a trial."

import json

import numpy as np
import pytest
import yaml
from fabricate import bars, make_run

from modelfactory.models.base import probability_columns
from modelfactory.runs.comparison import comparison, variance_split
from modelfactory.runs.report import direction_tests, leaderboard, leaderboard_table, seed_table, variance_table
from modelfactory.runs.run import list_runs
from modelfactory.runs.sentences import task_notes
from modelfactory.runs.task import count_trials, read_task, stack_predictions, task_runs

pytestmark = pytest.mark.slow

COLUMNS = probability_columns((-1, 0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "An LSTM with three seeds of different skill, and two models with one seed."
    runs, table = tmp_path_factory.mktemp("runs"), bars(n=300)
    for seed, skill in ((1, 0.2), (2, 0.9), (3, 0.5)):
        make_run(runs, "lstm", table, seed=seed, skill=skill)
    for i in range(2):
        make_run(runs, f"other_{i}", table, skill=0.5 + 0.02 * i)
    return runs


@pytest.fixture(scope="module")
def result(folder):
    return comparison(folder)


def test_a_model_with_three_seeds_is_one_row(folder, result):
    (task,) = result["tasks"]
    assert task["n_models"] == 3 and [m["rank"] for m in task["models"]] == [1, 2, 3]
    lstm = next(m for m in task["models"] if m["model"] == "lstm")
    losses = [r.metrics["log_loss"] for r in task_runs(list_runs(folder), "bars", 5)["lstm"]]
    assert lstm["seeds"] == [1, 2, 3] and len(lstm["runs"]) == 3
    expected = dict(
        log_loss=np.mean(losses), log_loss_sd=np.std(losses, ddof=1), log_loss_min=min(losses), log_loss_max=max(losses)
    )
    assert {k: lstm[k] for k in expected} == pytest.approx(expected)
    assert lstm["log_loss_ci_low"] < lstm["log_loss"] < lstm["log_loss_ci_high"]
    for metric in ("directional_skill", "directional_accuracy"):
        values = [r.metrics[metric] for r in task_runs(list_runs(folder), "bars", 5)["lstm"]]
        expected = dict(sd=np.std(values, ddof=1), min=min(values), max=max(values))
        assert lstm[metric] == pytest.approx(np.mean(values)), "the row holds figures of the seeds"
        assert {k: lstm[f"{metric}_{k}"] for k in expected} == pytest.approx(expected)
        assert lstm[f"{metric}_ci_low"] < lstm[metric] < lstm[f"{metric}_ci_high"]
        assert lstm["averaged"][metric] != pytest.approx(lstm[metric]), "the claim is on the mean of the probabilities"
    tests = direction_tests(result).set_index("model").loc["lstm"]
    assert tests.skill == lstm["averaged"]["directional_skill"] and tests.low < tests.skill < tests.high
    table = leaderboard(result)
    text = str(leaderboard_table(table))
    assert (table.model == "lstm").sum() == 1 and "lstm (3 seeds)" in text


def test_the_entry_in_the_tests_is_the_mean_of_the_probabilities(folder, result):
    runs = list_runs(folder)
    tables = [r.predictions() for r in task_runs(runs, "bars", 5)["lstm"]]
    frame, mean = stack_predictions(runs), np.mean([t[COLUMNS].to_numpy(float) for t in tables], 0)
    assert np.allclose(frame[[f"lstm_{c}" for c in COLUMNS]], mean)
    assert sorted(c for c in frame if c.endswith("p_up")) == ["lstm_p_up", "other_0_p_up", "other_1_p_up"]
    predictions = read_task(runs, "bars", 5).predictions["lstm"]
    assert (predictions.prediction.to_numpy() == mean.argmax(1) - 1).all()
    lstm = next(m for m in result["tasks"][0]["models"] if m["model"] == "lstm")
    y = tables[0].y_true.to_numpy() + 1
    assert lstm["averaged"]["log_loss"] == pytest.approx(-np.log(mean[np.arange(len(y)), y]).mean(), rel=1e-5)
    assert lstm["averaged"]["log_loss"] < lstm["log_loss"], "Jensen: the mean of the probabilities has the lower loss"


def test_each_seed_is_a_trial(folder):
    assert count_trials(list_runs(folder), "bars") == 5


def test_variance_is_split_and_a_wide_spread_is_noted(result):
    assert seed_table(result).frame["of mean probabilities"].notna().all() and len(seed_table(result).frame) == 1
    losses = variance_table(result).frame.set_index("metric").loc["log_loss"]
    assert losses.seed_share > 0.5
    sentences = " ".join(task_notes(result["tasks"][0]))
    lstm = next(m for m in result["tasks"][0]["models"] if m["model"] == "lstm")
    assert ("lstm: " in sentences) == (lstm["rank"] < 3), "there is a note on every model but the last"


def test_one_seed_each_gives_no_split(tmp_path):
    for i in range(2):
        make_run(tmp_path, f"m{i}", bars(n=100), noise=i)
    result = comparison(tmp_path)
    assert seed_table(result) is None and variance_table(result) is None
    assert result["tasks"][0]["models"][0]["averaged"] is None


@pytest.mark.parametrize("between, within", [(0.02, 0.01), (0.0, 0.01), (0.02, 0.0)])
def test_variance_split_recovers_simulated_standard_deviations(between, within):
    rng = np.random.default_rng(0)
    scores = {i: m + within * rng.normal(size=4) for i, m in enumerate(between * rng.normal(size=400))}
    split = variance_split(scores)
    assert split["model_sd"] == pytest.approx(between, abs=0.003)
    assert split["seed_sd"] == pytest.approx(within, abs=0.001)


def set_config(run, **values):
    "Changes values in the config of a run."
    file = run.path / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


def test_runs_with_another_config_or_data_are_not_seeds_of_the_newest_run(tmp_path):
    "Depth 3 with seed 1 and depth 9 with seed 42 are two models with one name; the newest is compared."
    table = bars(n=300)
    for seed, depth in ((1, 3), (7, 9), (42, 9)):
        set_config(make_run(tmp_path, "xgboost", table, seed=seed), config=dict(max_depth=depth, random_seed=seed))
    make_run(tmp_path, "other", table, seed=1, fingerprint="0" * 16)
    make_run(tmp_path, "other", table, seed=2)
    times = {seed: f"2024-01-01T00:00:0{i}+00:00" for i, seed in enumerate((1, 2, 7, 42))}
    for file in tmp_path.glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        file.write_text(json.dumps(manifest | dict(created=times[manifest["seed"]])))
    runs = list_runs(tmp_path)
    seeds = {model: [r.seed for r in of_model] for model, of_model in task_runs(runs, "bars", 5).items()}
    assert seeds == dict(other=[2], xgboost=[7, 42]) and count_trials(runs, "bars") == 5
    result = comparison(runs)
    assert {m["model"]: m["seeds"] for m in result["tasks"][0]["models"]} == seeds and result["unread"] == []


def test_seeds_before_and_after_the_data_moved_are_of_one_model(tmp_path):
    for seed, data in enumerate(("/here/bars", "/there/bars")):
        make_run(tmp_path, "lstm", bars(n=300), seed=seed, data=data, fingerprint="a" * 16)
    (task,) = comparison(tmp_path)["tasks"]
    assert task["n_models"] == 1 and task["models"][0]["seeds"] == [0, 1]
