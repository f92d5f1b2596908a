"scikit-learn estimators as models: weights, probabilities, trusted types, and the line of help in each error."

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

from modelfactory.configuration import ConfigError
from modelfactory.models.persistence import CheckpointError, find_unsafe_files
from modelfactory.models.tabular import SklearnModel, TabularConfig, repeated_rows

rng = np.random.default_rng(0)
X, y = rng.normal(size=(90, 2)).astype(np.float32), rng.integers(-1, 2, 90)
TIMES = pd.date_range("2024-01-02", periods=90, freq="h")
META = pd.DataFrame(dict(datetime=TIMES, symbol="A", horizon=5, sample_weight=rng.uniform(0.1, 2, 90)))
KNN_TYPES = ("sklearn.metrics._dist_metrics.EuclideanDistance64", "sklearn.neighbors._kd_tree.KDTree")


@dataclass
class Keys(TabularConfig):
    "Config keys of the models of these tests."


class ClassShares(ClassifierMixin, BaseEstimator):
    "Predicts the class shares of its training rows."

    def fit(self, X, y, sample_weight=None):
        self.classes_, counts = np.unique(y, return_counts=True)
        self.shares_ = counts / len(y)
        return self

    def predict_proba(self, X):
        return np.tile(self.shares_, (len(X), 1))


def model_of(estimator, config=None, **attributes):
    "A model with the given estimator; `attributes` are lines of its class."
    lines = dict(Config=Keys, name="mine", family="tests", estimator=lambda self, n: clone(estimator))
    return type("Mine", (SklearnModel,), lines | attributes)(config or {}, 5, ["a", "b"])


def fitted(*args, **attributes):
    model = model_of(*args, **attributes)
    model.fit(X, y, X, y, META, META)
    return model


def reloaded(model):
    "The model saved and loaded again, by a new object of its class."
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        again = type(model)({}, 5, ["a", "b"])
        again.load(Path(folder))
    return again


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50).filter(lambda weights: sum(weights) > 1e-3))
def test_rows_are_repeated_in_proportion_to_their_weights(weights):
    weight = np.array(weights)
    rows = repeated_rows(weight)
    counts, expected = np.bincount(rows, minlength=len(weight)), weight * len(weight) / weight.sum()
    assert len(rows) == len(weight) == len(counts) and (np.diff(rows) >= 0).all()
    assert np.abs(counts - expected).max() < 1 + 1e-6


@pytest.mark.parametrize(
    "estimator, line",
    [
        (KNeighborsClassifier(), "weight_key = None"),
        (GaussianProcessClassifier(), "weight_key = None"),
        (make_pipeline(StandardScaler(), LogisticRegression()), "weight_key = 'logisticregression__sample_weight'"),
        (make_pipeline(FunctionTransformer(), KNeighborsClassifier()), "weight_key = None"),
    ],
    ids=["neighbors", "gaussian_process", "pipeline", "pipeline_of_neighbors"],
)
@pytest.mark.parametrize("config", [dict(class_weight="balanced"), dict(sample_weight="column")])
def test_an_estimator_without_weights_is_refused_with_the_line_that_helps(estimator, line, config):
    with pytest.raises(ConfigError, match="has no parameter 'sample_weight'") as e:
        fitted(estimator, config)
    assert line in str(e.value)
    value = eval(line.split(" = ")[1])  # the line is put into the class, and the fit goes on
    fitted(estimator, config, weight_key=value)


def test_a_wrong_step_in_the_weight_key_is_refused():
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    with pytest.raises(ConfigError, match="no parameter 'svc__sample_weight'.*logisticregression__sample_weight"):
        fitted(pipeline, dict(class_weight="balanced"), weight_key="svc__sample_weight")


def test_weights_of_a_step_are_those_of_a_direct_fit():
    config = dict(sample_weight="column")
    key = "logisticregression__sample_weight"
    model = fitted(make_pipeline(FunctionTransformer(), LogisticRegression()), config, weight_key=key)
    direct = fitted(LogisticRegression(), config)
    assert np.allclose(model.predict(X, META).probabilities, direct.predict(X, META).probabilities)


def test_repeated_rows_change_the_fit_as_weights_do():
    n, config = 3000, dict(sample_weight="column")
    rows, labels = rng.normal(size=(n, 2)).astype(np.float32), rng.integers(-1, 2, n)
    weight = np.where(labels == 1, 0.3, rng.uniform(0.5, 2, n))
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=n), symbol="A", horizon=5, sample_weight=weight))
    models = model_of(GaussianNB()), model_of(GaussianNB(), config), model_of(GaussianNB(), config, weight_key=None)
    for model in models:
        model.fit(rows, labels, rows, labels, meta, meta)
    plain, weighted, repeated = (model.predict(rows, meta).probabilities for model in models)
    assert np.abs(repeated - weighted).mean() < 0.1 * np.abs(plain - weighted).mean()


@pytest.mark.parametrize("estimator", [RidgeClassifier(), SVC()])
def test_an_estimator_without_probabilities_is_refused(estimator):
    with pytest.raises(ConfigError, match="no predict_proba.*CalibratedClassifierCV"):
        fitted(estimator)


def test_types_that_exist_after_the_fit_are_named_when_the_model_is_saved():
    model = fitted(KNeighborsClassifier())
    with pytest.raises(CheckpointError, match="trusted = ") as e, tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
    line = str(e.value).split("set in the class: ")[1]
    assert line == f"trusted = {KNN_TYPES!r}"
    model = fitted(KNeighborsClassifier(), trusted=KNN_TYPES)
    p = reloaded(model).predict(X, META).probabilities
    assert np.array_equal(p, model.predict(X, META).probabilities)


def test_a_refused_model_leaves_no_estimator_behind(tmp_path):
    with pytest.raises(CheckpointError):
        fitted(KNeighborsClassifier()).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_kernels_are_named_before_the_fit():
    from sklearn.gaussian_process.kernels import RBF

    model = model_of(GaussianProcessClassifier(RBF()))
    with pytest.raises(CheckpointError, match="sklearn.gaussian_process.kernels.RBF"):
        model.fit(X, y, X, y, META, META)
    assert not model.fitted


def test_a_lambda_cannot_be_trusted_and_a_named_function_can():
    for pipeline in (
        make_pipeline(FunctionTransformer(lambda rows: 2 * rows), LogisticRegression()),
        make_pipeline(FunctionTransformer(np.abs), StandardScaler(), FunctionTransformer(local()), GaussianNB()),
    ):
        with pytest.raises(CheckpointError, match="cannot load .*define it by name in the file of the model"):
            fitted(pipeline)
    name = f"{__name__}.doubled"
    pipeline = make_pipeline(FunctionTransformer(doubled), GaussianNB())
    with pytest.raises(CheckpointError, match=f"trusted = ..{name}"):
        fitted(pipeline)
    model = fitted(pipeline, trusted=(name,))
    assert np.array_equal(reloaded(model).predict(X, META).probabilities, model.predict(X, META).probabilities)


def doubled(rows):
    return 2 * rows


def local():
    def halved(rows):
        return rows / 2

    return halved


def test_an_estimator_of_ones_own_is_trusted_by_name(monkeypatch):
    with pytest.raises(CheckpointError, match=f"trusted = ..{__name__}.ClassShares"):
        fitted(ClassShares())
    model = fitted(ClassShares(), trusted=(f"{__name__}.ClassShares",))
    assert np.array_equal(reloaded(model).predict(X, META).probabilities, model.predict(X, META).probabilities)
    monkeypatch.setattr(ClassShares, "__module__", "__main__")  # as in a notebook
    with pytest.raises(CheckpointError, match="__main__.ClassShares.*define it by name in the file of the model"):
        fitted(ClassShares())


@pytest.mark.parametrize("name, compress", [("model.joblib", 0), ("model.joblib", 3), ("model.json", 0)])
def test_a_file_of_joblib_is_refused_with_what_to_use_instead(tmp_path, name, compress):
    joblib = pytest.importorskip("joblib")
    joblib.dump(GaussianNB().fit(X, y), tmp_path / name, compress=compress)
    problems = find_unsafe_files(tmp_path)
    assert problems and all("derive a scikit-learn model from SklearnModel" in text for text in problems)
