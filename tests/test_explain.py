"Explanations: contributions equal the raw scores of the libraries, planted lags, whole runs and the command line."

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fabricate import fitted_run
from quick import small_splits

from modelfactory import load_run
from modelfactory.cli import main
from modelfactory.data.dataset import RawColumns, Windows
from modelfactory.models.conformance import planted_task
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs import explain as explanations
from modelfactory.runs.explain import explain, feature_groups, importance_table
from modelfactory.runs.predict import predict_run
from modelfactory.runs.run_folder import RunError

pytestmark = pytest.mark.slow

TASK = planted_task(n=300, F=3, seq_len=3)


def fitted(name, **config):
    model = ModelRegistry.create(name, dict(sequence_length=3, threads=1) | config, 5, TASK.features)
    model.fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    return model


def svm_decisions(model, X):
    machine = model.fitted_estimator[-1].calibrated_classifiers_[0].estimator
    return machine.decision_function(model.fitted_estimator[0].transform(X))


def logistic_decisions(model, X):
    return model.fitted_estimator.decision_function(X)


def xgboost_margins(model, X):
    return model.booster.inplace_predict(X, predict_type="margin")


TREES = dict(n_rounds=10, patience=100)
RAW_SCORES = dict(
    xgboost=(TREES, xgboost_margins),
    lightgbm=(TREES, lambda model, X: model.booster.predict(X, raw_score=True)),
    catboost=(TREES, lambda model, X: model.booster.predict(X, prediction_type="RawFormulaVal")),
    logistic_regression=({}, logistic_decisions),
    svm=({}, svm_decisions),
    random_forest=(dict(n_estimators=10), lambda model, X: model.fitted_estimator.predict_proba(X)),
)


@pytest.mark.parametrize("name", RAW_SCORES)
def test_contributions_add_up_to_the_raw_score_of_the_library(name):
    config, raw_scores = RAW_SCORES[name]
    model = fitted(name, **config)
    parts, expected = model.contributions(TASK.X_val), raw_scores(model, TASK.X_val[:].reshape(len(TASK.y_val), -1))
    assert parts.values.shape == (100, 3, 3, 3)
    assert np.allclose(parts.scores, expected, atol=1e-5)
    size = np.abs(parts.values).mean((0, 1))
    assert size.argmax() == 6  # feature 0 in the last row


@pytest.mark.parametrize("config", [dict(kernel="rbf", n_components=20), dict(exact=True, kernel="rbf")])
def test_an_svm_without_coefficients_stores_an_importance(config, tmp_path):
    model = fitted("svm", **config)
    importance = model.feature_importance()
    assert next(iter(importance)) == "feature_0" and sum(importance.values()) == pytest.approx(1)
    assert model.contributions(TASK.X_val) is None
    model.save(tmp_path)
    again = ModelRegistry.create("svm", vars(model.config), 5, TASK.features)
    again.load(tmp_path)
    assert again.feature_importance() == importance


def lag_world(n, seed):
    "Rows of news and noise; the label depends on the news two to four rows before the last row of the window."
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n + 7, 2)).astype(np.float32)
    ends = np.arange(7, n + 7)
    score = base[ends - 2, 0] + base[ends - 3, 0] + base[ends - 4, 0] + rng.normal(size=n)
    times = pd.date_range("2024-01-02", periods=n, freq="5min")
    meta = pd.DataFrame(dict(datetime=times, symbol="A", horizon=1))
    y = (np.digitize(score, [-0.8, 0.8]) - 1).astype(np.int8)
    return Windows(base, ends, 8, RawColumns({}, np.zeros(n + 7, int))), y, meta


def test_planted_lags_raise_the_loss_and_no_others():
    (X, y, meta), (X_val, y_val, meta_val) = lag_world(800, 0), lag_world(800, 1)
    model = ModelRegistry.create("logistic_regression", dict(sequence_length=8, C=1.0), 1, ["news", "noise"])
    model.fit(X, y, X_val, y_val, meta, meta_val)
    groups = feature_groups(["news", "noise"], 8, "feature x lag", [0, 1])
    task = explanations._Task(model, X_val, y_val + 1, meta_val, "permutation", groups, 1)
    losses = explanations._log_losses(task.probabilities(), task.codes)
    rows = explanations._permutation_rows(task, losses, 3, 0)
    table, rest = importance_table(rows, groups, meta_val.datetime.to_numpy(), meta_val.symbol.to_numpy(), 1)
    planted = {("news", lag) for lag in (2, 3, 4)}
    assert set(map(tuple, table[["feature", "lag"]].head(3).to_numpy())) == planted and rest["n"] == 1
    others = table[3:]
    assert (table.p_holm.head(3) < 0.001).all() and not (others.p_holm < 0.05).any() and others.zero.mean() > 0.8


def test_a_joint_model_is_explained_at_one_horizon():
    "Its output has all rows of the first horizon, then of the second."
    p = np.arange(24).reshape(8, 3) / 100
    model = SimpleNamespace(predict=lambda X, metadata: SimpleNamespace(probabilities=p), horizons=(5, 20))
    meta = pd.DataFrame(index=range(4))
    for k in (0, 1):
        task = explanations._Task(model, None, np.zeros(4, int), meta, "permutation", [], 5, k)
        assert np.array_equal(task.probabilities(), p[4 * k : 4 * k + 4])
    run = SimpleNamespace(path=SimpleNamespace(name="r"))
    assert explanations._checked_horizon(run, model, 20) == (20, 1)
    with pytest.raises(RunError, match="horizon is 7, expected 5 or 20"):
        explanations._checked_horizon(run, model, 7)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    config = dict(sequence_length=4)
    parameters = dict(model="logistic_regression", horizon=5, data=str(small_splits(folder / "data")), config=config)
    return fitted_run(folder / "runs", parameters, scored=True)


def call(*args):
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    return done.value.code


def test_predictions_are_explained_by_command_line(run, tmp_path, capsys):
    data, output = run.config["data"]["data"], tmp_path / "p.parquet"
    assert call("predict", run.path, data, "--explain", "--output", output) == 0
    table, printed = pd.read_parquet(output), capsys.readouterr().out
    values = table.filter(regex="^explain_.*(value|rest|base)$")
    log_p = np.log(table[["p_down", "p_flat", "p_up"]].to_numpy(float))
    assert values.shape[1] == 7 and "the model's own contributions, log-odds" in printed
    assert np.allclose(values.sum(axis=1), (log_p - log_p.mean(1, keepdims=True)).max(1), atol=1e-4)
    assert f", because of {table.explain_1.iloc[-1]} {table.explain_1_value.iloc[-1]:+.3f}" in printed
    plain = run.predict(data)
    assert plain.equals(table[list(plain)]) and call("predict", run.path, data, "--explain", "--follow") == 2


def test_explanation_by_command_line_says_its_cost_first(run, tmp_path, capsys):
    options = ("--method", "permutation", "--features", "pub_state_a,pub_state_b", "--rows", 100)
    assert call("explain", run.path, *options, "--cost") == 0
    cost = capsys.readouterr().out
    assert cost.startswith("permutation of 2 groups, 5 rotations each: 10 predictions of ") and "about" in cost
    assert call("explain", run.path, *options, "--output", tmp_path / "e.csv") == 0
    assert capsys.readouterr().out.startswith("permutation of 2 groups")
    table = pd.read_csv(tmp_path / "e.csv")
    assert set(table.feature) == {"pub_state_a", "pub_state_b"} and (table.low <= table.high).all()
    for wrong in (("--by", "symbol"), ("--features", "nothing"), ("--method", "shap")):
        assert call("explain", run.path, *wrong) == 2


def test_the_page_of_explanations_is_part_of_the_run(run, capsys):
    assert call("explain", run.path, "--add", "--features", "pub_state_a,pub_news", "--rows", 60) == 0
    again = load_run(run.path)
    again.verify()
    assert {"plots/explanation.png", "plots/explanation_lags.png"} < set(again.manifest["files"])
    stored = json.loads((run.path / "metrics/explanation.json").read_text())
    assert len(stored["explanation_lags"]["table"]) == 2 * 4 and capsys.readouterr().out.count("log loss") >= 1


def test_a_model_of_another_user_is_explained_by_predictions_alone(run):
    "Such a model runs in a process that can only predict."
    other = load_run(run.path, isolated=True)
    options = dict(features=["pub_state_a"], max_rows=60, verbose=False)
    assert explain(other, **options).method == "permutation"
    with pytest.raises(RunError, match="can only predict; use method='permutation'"):
        explain(other, method="contributions", **options)
    explained = predict_run(other, run.config["data"]["data"], explain=2)
    assert "set to its training median" in explained.attrs["explained"] and explained.explain_1_value.ne(0).all()
    own = explain(run, **options)
    assert own.method == "contributions" and own.table.importance[0] > 0 and own.table.zero.isna().all()
