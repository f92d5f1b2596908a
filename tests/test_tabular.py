"""Columns of windows, category codes, parameters of the libraries and monotone constraints of tabular models."""

import warnings

import numpy as np
import pandas as pd
import pytest

from modelfactory.cli import _parameters
from modelfactory.configuration import ConfigError
from modelfactory.data.dataset import Windows
from modelfactory.models.loading import load_model
from modelfactory.models.params import resolve_config
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.tabular import SUMMARY, summarise_windows

BOOSTED = dict(
    xgboost=dict(n_rounds=20, min_child_weight=1),
    lightgbm=dict(n_rounds=20, min_data_in_leaf=5),
    catboost=dict(n_rounds=20),
)
LINEAR = dict(logistic_regression={}, svm=dict(calibration_folds=2))
FOREST = dict(random_forest=dict(n_estimators=20))


def keys(n):
    return pd.DataFrame(dict(datetime=pd.date_range("2024", periods=n, freq="h"), symbol="A", horizon=5))


def fitted(name, X, y, features, **config):
    model = ModelRegistry.create(name, dict(early_stopping=False) | config, 5, features)
    model.fit(X, y, X[-50:], y[-50:], keys(len(X)), keys(50))
    return model


def probabilities(model, X):
    return model.predict(X, keys(len(X))).probabilities


# ---- columns of a window


def naive_statistics(column):
    "The six statistics of one feature in one window, by numpy on the values that are there."
    values = column[~np.isnan(column)]
    if not len(values):
        return [np.nan] * 6
    at = np.flatnonzero(~np.isnan(column))
    slope = np.polyfit(at, values, 1)[0] if len(values) > 1 else 0
    return [column[-1], values.mean(), values.std(), values.min(), values.max(), slope]


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_the_summary_equals_that_of_a_loop(missing, monkeypatch):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(60, 4)) * [1, 1e-5, 100, 1] + [0, 0, 3000, 5]).astype(np.float32)
    x[rng.random(x.shape) < missing] = np.nan
    x[10:20, 3] = np.nan if missing else 5
    windows = Windows(x, np.arange(6, 60), 7)
    expected = [[naive_statistics(w[:, j]) for j in range(4)] for w in np.asarray(windows, np.float64)]
    np.testing.assert_allclose(summarise_windows(windows), expected, rtol=2e-6, atol=1e-9)
    whole = summarise_windows(windows)
    monkeypatch.setattr("modelfactory.models.tabular.SUMMARY_CELLS", 50)
    assert np.array_equal(summarise_windows(np.asarray(windows)), whole, equal_nan=True)
    alone = np.concatenate([summarise_windows(windows[[i]]) for i in range(len(windows))])
    assert np.array_equal(alone, whole, equal_nan=True)  # bit for bit, whether or not other windows have NaN


def test_columns_and_values_belong_together():
    """The value of each named column is that of its feature, row and statistic; contributions keep their sum."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 4, 3)).astype(np.float32)
    X[:, :, 1] = rng.integers(0, 4, 300)[:, None]
    y = np.where(X[:, -1, 0] > 0, 1, -1)
    for window in ("last", "flat", "summary"):
        for name in ("lightgbm", "logistic_regression"):
            config = dict(window=window, sequence_length=4, categorical=("code",))
            model = fitted(name, X, y, ["a", "code", "b"], **config)
            table, columns = model._flat(X), model.columns
            assert table.shape == (300, len(columns)) and len(columns.names) == len(set(columns.names))
            for j, column in enumerate(columns.names):
                values, lag, statistic = X[..., columns.feature[j]], columns.lag[j], columns.statistic[j]
                if statistic == "code":
                    code = float(column.partition("=")[2] or -1)
                    expected = values[:, -1] == code if code >= 0 else values[:, -1]
                elif statistic == "value":
                    expected = values[:, 3 - lag]
                else:
                    expected = [naive_statistics(w)[SUMMARY.index(statistic)] for w in values]
                np.testing.assert_allclose(table[:, j], expected, rtol=1e-5, atol=1e-6)
            spread = model.by_window(table)
            assert spread.shape == (300, 4, 3) and np.allclose(spread.sum((1, 2)), table.sum(1), atol=1e-3)
            assert next(iter(model.feature_importance())) == "a"


def test_flat_windows_warn_of_their_size():
    X, y = np.zeros((30, 200, 5), np.float32), np.arange(30) % 3 - 1
    config = dict(sequence_length=200, n_estimators=2)
    with pytest.warns(UserWarning, match=r"1,000 columns of 200 rows x 5 features: 0\.1 MiB for 30 rows, 0\.03 rows a"):
        fitted("random_forest", X, y, list("abcde"), **config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted("random_forest", X, y, list("abcde"), **config, window="last")


# ---- parameters of the libraries


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("xgboost", dict(max_bins=63), "no parameter 'max_bins'; did you mean 'max_bin'"),
        ("xgboost", dict(seed=1), "use random_seed"),
        ("xgboost", {"lambda": 1}, "use reg_lambda"),
        ("lightgbm", dict(extra_tres=True), "did you mean 'extra_trees'"),
        ("lightgbm", dict(eta=0.1), "use the key learning_rate"),
        ("lightgbm", dict(max_bin="many"), "valid integer"),
        ("catboost", dict(random_strenght=1), "did you mean 'random_strength'"),
        ("catboost", dict(iterations=5), "use n_rounds"),
        ("random_forest", dict(n_jobs=2), "use threads"),
        ("random_forest", dict(criterium="gini"), "did you mean 'criterion'"),
        ("svm", dict(shrinking=False), "no parameter 'shrinking'"),
        ("logistic_regression", dict(class_weight="balanced"), "use the key class_weight"),
        ("logistic_regression", dict(horizon=3), "use the key horizon"),
    ],
)
def test_parameters_are_refused_before_the_fit(name, params, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(name, 5, None, dict(params=params))


@pytest.mark.parametrize(
    "name, params",
    [
        ("xgboost", dict(max_leaves=2, grow_policy="lossguide")),
        ("lightgbm", dict(extra_trees=True)),
        ("catboost", dict(random_strength=0.0, min_data_in_leaf=200, grow_policy="Lossguide")),
        ("random_forest", dict(criterion="entropy", max_leaf_nodes=2)),
        ("svm", dict(fit_intercept=False)),
        ("logistic_regression", dict(fit_intercept=False)),
    ],
)
def test_parameters_reach_the_library(name, params):
    rng = np.random.default_rng(0)
    X = rng.normal(2, 1, (300, 3)).astype(np.float32)
    y = np.digitize(X[:, 0] + rng.normal(size=300), [1.5, 2.5]) - 1
    small = (BOOSTED | LINEAR | FOREST)[name]
    plain, changed = (fitted(name, X, y, list("abc"), **small, params=p) for p in ({}, params))
    assert np.abs(probabilities(plain, X) - probabilities(changed, X)).max() > 1e-3


def test_a_parameter_with_a_key_sets_the_key():
    config = resolve_config(
        "xgboost", 5, "quick", dict(params=dict(max_bin=63, max_leaves=4)), dict(params=dict(gamma=1))
    )
    assert config["max_bin"] == 63 and config["params"] == dict(max_leaves=4, gamma=1)
    assert resolve_config("xgboost", 5, None, config) == config
    options = _parameters(
        "xgboost", 5, "planted", None, None, ["params.max_bin=63", "params.gamma=1", "max_depth=2"], 0, {}
    )
    assert options["config"] == dict(params=dict(max_bin=63, gamma=1), max_depth=2)


# ---- category codes


def coded_task(n=900, seed=0):
    "Labels that depend on one of six codes, in no order, and on a number."
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, 7, n)
    x = rng.normal(size=n)
    score = np.array([0, 2, -2, 2, -2, 0, 0])[codes] + 0.3 * x + rng.normal(0, 0.3, n)
    return np.c_[x, codes].astype(np.float32), np.digitize(score, [-1, 1]) - 1


@pytest.mark.parametrize("name", [*BOOSTED, *LINEAR, *FOREST])
def test_codes_are_learned_without_an_order(name, tmp_path):
    X, y = coded_task()
    model = fitted(name, X, y, ["x", "code"], **(BOOSTED | LINEAR | FOREST)[name], categorical=("code",))
    assert (model.predict(X, keys(len(X))).predictions == y).mean() > 0.85
    assert next(iter(model.feature_importance())) == "code"
    unknown = np.c_[X[:40, 0], np.zeros(40)].astype(np.float32)
    other = unknown.copy()
    other[:, 1] = 31  # a code that the training rows do not have is treated as 0, unknown
    assert np.array_equal(probabilities(model, unknown), probabilities(model, other))
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert np.array_equal(probabilities(again, X), probabilities(model, X))
    assert np.array_equal(probabilities(again, other), probabilities(model, other))


def test_the_libraries_split_codes_as_categories():
    X, y = coded_task()

    def split_as(name, categorical):
        "What the library's own model says of the splits of the column `code`."
        booster = fitted(name, X, y, ["x", "code"], **BOOSTED[name], categorical=categorical).booster
        if name == "catboost":
            return booster.get_cat_feature_indices() == [1]
        if name == "lightgbm":
            trees = booster.trees_to_dataframe()
            return set(trees.decision_type[trees.split_feature == "Column_1"]) == {"=="}
        trees = booster.trees_to_dataframe()
        return trees.Category[trees.Feature == "f1"].notna().all()

    for name in BOOSTED:
        assert split_as(name, ("code",)) and not split_as(name, ())


def test_codes_are_checked():
    X, y = coded_task(100)
    with pytest.raises(ConfigError, match="categorical: 'cod' is not a feature, did you mean 'code'"):
        ModelRegistry.create("lightgbm", dict(categorical=("cod",)), 5, ["x", "code"])
    with pytest.raises(ValueError, match=r"code: found 1\.5, expected category codes"):
        fitted("lightgbm", X + np.float32([0, 0.5]), y, ["x", "code"], categorical=("code",))


# ---- monotone constraints


def rising_task(n=500):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 3)).astype(np.float32)
    y = np.digitize(0.4 * X[:, 0] - 0.4 * X[:, 1] + rng.normal(size=n), [-0.5, 0.5]) - 1
    return X, y


@pytest.mark.parametrize("name", BOOSTED)
@pytest.mark.parametrize("classes", [(-1, 0, 1), (-1, 1)])
def test_predictions_are_monotone(name, classes, tmp_path):
    X, y = rising_task()
    X, y = X[np.isin(y, classes)], y[np.isin(y, classes)]
    grid = np.repeat(X[:30], 25, 0)

    def largest_fall(model, feature, sign):
        "Largest fall of P(label > c) along a feature that should rise, over all thresholds c."
        along = grid.copy()
        along[:, feature] = np.tile(np.linspace(-3, 3, 25) * sign, 30)
        above = probabilities(model, along)[:, ::-1].cumsum(1)[:, :-1].reshape(30, 25, -1)
        return -np.diff(above, axis=1).min()

    features, small = ["rises", "falls", "free"], BOOSTED[name] | dict(classes=classes)
    free = fitted(name, X, y, features, **small)
    assert min(largest_fall(free, 0, 1), largest_fall(free, 1, -1)) > 0.003
    model = fitted(name, X, y, features, **small, monotone=dict(rises=1, falls=-1))
    assert max(largest_fall(model, 0, 1), largest_fall(model, 1, -1)) <= 1e-6
    assert largest_fall(model, 2, 1) > 1e-3  # the feature without a constraint is free
    assert set(model.feature_importance()) == set(features)
    model.save(tmp_path)
    assert np.array_equal(probabilities(load_model(tmp_path), X), probabilities(model, X))


def test_constraints_cover_the_rows_of_a_window():
    """With `summary`, raising all rows by one amount moves the distribution up; with `flat`, raising any row does."""
    X, y = rising_task()
    windows = Windows(X, np.arange(3, 500), 4)
    for window, rows in (("flat", [1]), ("summary", [0, 1, 2, 3])):
        config = BOOSTED["lightgbm"] | dict(sequence_length=4, window=window, monotone=dict(a=1))
        model = fitted("lightgbm", windows, y[3:], list("abc"), **config)
        raised = np.asarray(windows).copy()
        raised[:, rows, 0] += 1
        p, q = probabilities(model, windows), probabilities(model, raised)
        assert (q[:, 2] - p[:, 2]).min() >= -1e-6 and (q[:, 2] - p[:, 2]).max() > 0.01
        assert (q[:, 0] - p[:, 0]).max() <= 1e-6


def test_weights_and_absent_classes_with_constraints(tmp_path):
    X, y = rising_task()
    config = BOOSTED["xgboost"] | dict(monotone=dict(a=1))
    plain, balanced = (
        fitted("xgboost", X[y < 1], y[y < 1], list("abc"), **config, class_weight=w) for w in (None, "balanced")
    )
    assert (probabilities(plain, X)[:, 2] == 0).all()
    assert np.abs(probabilities(plain, X) - probabilities(balanced, X)).max() > 1e-3
    plain.save(tmp_path)
    assert np.array_equal(probabilities(load_model(tmp_path), X), probabilities(plain, X))


def test_constraints_are_checked():
    for name, monotone, message in [
        ("lightgbm", dict(rsj=1), "monotone: 'rsj' is not a numeric feature, did you mean 'rsi'"),
        ("lightgbm", dict(rsi=2), "monotone.rsi = 2"),
        ("random_forest", dict(rsi=1), "monotone works for boosted trees only"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ModelRegistry.create(name, dict(monotone=monotone), 5, ["rsi", "atr"])
