"""Meta-labelling: its probabilities against a loop, sides out of fold, a planted condition, no claims without one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from modelfactory import ModelRegistry
from modelfactory.configuration import ConfigError
from modelfactory.data.dataset import Windows
from modelfactory.data.uniqueness import average_uniqueness
from modelfactory.evaluation.significance import direction_claim
from modelfactory.models.code import code_version
from modelfactory.models.ensemble.meta_labelling import META_FILE
from modelfactory.models.loading import load_model
from modelfactory.models.persistence import CheckpointError

FEATURES = ["momentum", "liquidity", "noise"]
LINEAR = dict(secondary="logistic_regression", side_column="momentum")
LABEL_BARS = 3


def market(n, seed, liquid, illiquid, flat=0.2):
    "The sign of momentum is right with a probability that depends on liquidity; labels are flat for a share of rows."
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3)).astype(np.float32)
    side, u = np.sign(X[:, 0]), rng.random(n)
    right = np.where(X[:, 1] > 0, liquid, illiquid) * (1 - flat)
    y = np.where(u < flat, 0, np.where(u < flat + right, side, -side)).astype(np.int8)
    times = pd.date_range("2024-01-01", periods=n, freq="5min")
    meta = pd.DataFrame(dict(datetime=times, symbol="A", horizon=5, bar=np.arange(n), label_bars=LABEL_BARS))
    return X, y, meta


def fit(train, val, features=FEATURES, **config):
    model = ModelRegistry.create("meta_labelling", config, 5, features)
    model.fit(train[0], train[1], val[0], val[1], train[2], val[2])
    return model


def significance(out, y):
    rows = pd.DataFrame(dict(datetime=out.timestamps, symbol="A", y_true=y, prediction=out.predictions))
    return direction_claim(rows, LABEL_BARS).verdict


def test_a_condition_of_a_rule_is_found():
    "In 20 of 20 markets, the model acts where the rule is right, and less elsewhere, where its boundary is smooth."
    high, low, gains = [], [], []
    for seed in range(20):
        train, val = market(1500, 2 * seed, 0.9, 0.5), market(800, 2 * seed + 1, 0.9, 0.5)
        out = fit(train, val, **LINEAR).predict(val[0], val[2])
        acted, side = out.predictions != 0, np.sign(val[0][:, 0])
        high.append(acted[val[0][:, 1] > 0.5].mean())
        low.append(acted[val[0][:, 1] < -0.5].mean())
        gains.append((val[1] == side)[acted].mean() - (val[1] == side).mean())
        assert (out.predictions[acted] == side[acted]).all() and significance(out, val[1]) == "significant"
    assert min(high) > 0.95 and max(low) < 0.5 and np.mean(low) < 0.2
    assert min(gains) > 0.02 and np.mean(gains) > 0.05


@pytest.mark.slow
def test_without_skill_claims_stay_at_their_level():
    "The rule is right half of the time everywhere; verdicts other than 'not significant' have a level of 5%."
    verdicts, acts = [], []
    for seed in range(60):
        train, val = market(600, 2 * seed, 0.5, 0.5, 0.02), market(600, 2 * seed + 1, 0.5, 0.5, 0.02)
        out = fit(train, val, **LINEAR).predict(val[0], val[2])
        acts.append((out.predictions != 0).mean())
        verdicts.append(significance(out, val[1]))
    claims = sum(verdict in ("significant", "worse") for verdict in verdicts)
    made = sum(verdict != "too few rows" for verdict in verdicts)
    assert made > 30 and np.mean(acts) > 0.05
    assert claims <= binom.ppf(0.999, made, 0.05)


class Spy:
    "Records the rows that logistic regressions are fitted on and predict; the second models are binary."

    def __init__(self, monkeypatch):
        cls = ModelRegistry.get("logistic_regression")
        self.fits, self.predicted, self.binary, spy = [], [], [], self
        fit_rows, predict = cls.fit, cls.predict

        def recorded_fit(model, X, y, X_val, y_val, meta=None, meta_val=None):
            if model.classes == (0, 1):
                spy.binary.append((model, np.asarray(X), y, meta))
            else:
                spy.fits.append(meta.datetime)
            return fit_rows(model, X, y, X_val, y_val, meta, meta_val)

        def recorded_predict(model, X, metadata):
            if model.classes != (0, 1):
                spy.predicted.append((len(spy.fits) - 1, metadata.datetime))
            return predict(model, X, metadata)

        monkeypatch.setattr(cls, "fit", recorded_fit)
        monkeypatch.setattr(cls, "predict", recorded_predict)


def test_sides_of_training_rows_are_out_of_fold_and_purged(monkeypatch):
    train, val, spy = market(400, 0, 0.9, 0.5), market(200, 1, 0.9, 0.5), Spy(monkeypatch)
    val[2]["datetime"] += pd.Timedelta("400D")
    fit(train, val, secondary="logistic_regression", n_folds=4)
    position = pd.Series(np.arange(400), train[2].datetime)
    inside = [(number, times) for number, times in spy.predicted if times.isin(train[2].datetime).all()]
    assert len(inside) == 4 and sorted(np.concatenate([position[t] for _, t in inside])) == list(range(400))
    for number, times in inside:
        fitted, predicted = position[spy.fits[number]].to_numpy(), position[times].to_numpy()
        assert abs(fitted[:, None] - predicted).min() > LABEL_BARS  # no bar is shared by two labels
    assert len(spy.fits) == 5 and len(spy.fits[-1]) == 400  # the first model of new rows is fitted on all rows


def test_an_overfitted_first_model_does_not_make_the_second_act():
    "In-sample, deep trees would be right about all training rows; out of fold, they are right about half."
    train, val = market(600, 0, 0.5, 0.5, 0.0), market(300, 1, 0.5, 0.5, 0.0)
    deep = dict(n_estimators=20, max_depth=30, min_samples_leaf=1)
    out = fit(train, val, primary="random_forest", primary_config=deep, secondary="logistic_regression").predict(
        val[0], val[2]
    )
    assert out.probabilities.max() < 0.75


@pytest.mark.parametrize("config", [LINEAR, dict(secondary="logistic_regression", n_folds=2)], ids=["rule", "model"])
@pytest.mark.parametrize("remainder", ["flat", "shares"])
def test_probabilities_are_those_of_the_definition(config, remainder):
    train, val = market(500, 0, 0.9, 0.5), market(60, 1, 0.9, 0.5)
    train[0][::10, 0] = val[0][::10, 0] = 0.0  # rows without a side for the rule
    model = fit(train, val, remainder=remainder, **config)
    out = model.predict(val[0], val[2])
    for i in range(len(val[1])):
        row, meta = val[0][i : i + 1], val[2][i : i + 1]
        if "side_column" in config:
            side, extra = int(np.sign(row[0, 0])), []
        else:
            p = model.members["primary"].predict(row, meta).probabilities[0]
            side, extra = (1, [p[2]]) if p[2] > p[0] else (-1, [p[0]])
        a = 0.0
        if side:
            x = np.r_[row[0], side, extra].astype(np.float32)[None]
            a = model.members["secondary"].predict(x, meta).probabilities[0, 1]
        expected = {side: a} if side else {}
        others = [c for c in (-1, 1) if c != side]
        for c in others:
            share = 0.01 / len(others) if remainder == "flat" else model.shares[side + 1, c + 1]
            expected[c] = (1 - a) * share
        expected[0] = 1 - sum(expected.values())
        assert np.allclose(out.probabilities[i], [expected[c] for c in (-1, 0, 1)], atol=1e-6)
        assert out.predictions[i] in (0, side)


def test_shares_are_those_of_wrong_sides_in_training():
    train, val = market(3000, 0, 0.7, 0.7, 0.6), market(300, 1, 0.7, 0.7, 0.6)
    model = fit(train, val, remainder="shares", **LINEAR)
    side, y = np.sign(train[0][:, 0]), train[1]
    for s in (-1, 1):
        wrong = y[(side == s) & (y != s)]
        expected = ((wrong == -s).sum() + 1) / (len(wrong) + 2)
        assert model.shares[s + 1, 1 - s] == pytest.approx(expected) and model.shares[s + 1, s + 1] == 0
    assert np.allclose(model.shares.sum(1), 1) and model.has_class_probabilities
    assert not fit(train, val, **LINEAR).has_class_probabilities


def test_the_second_model_gets_the_weights_of_the_rows_with_a_side(monkeypatch):
    train, val, spy = market(400, 0, 0.9, 0.5), market(200, 1, 0.9, 0.5), Spy(monkeypatch)
    train[0][::3, 0] = 0.0
    fit(train, val, sample_weight="uniqueness", class_weight="balanced", **LINEAR)
    model, X, is_right, meta = spy.binary[0]
    rows = train[0][:, 0] != 0
    y = train[1][rows]
    u = average_uniqueness(train[2].bar[rows], train[2].label_bars[rows], train[2].symbol[rows])
    expected = u / np.array([(y == value).sum() for value in y])
    assert np.allclose(meta.sample_weight, expected / expected.mean(), rtol=1e-5) and u.std() > 0.01
    assert np.array_equal(X[:, 3], np.sign(train[0][rows, 0])) and len(X) == rows.sum()
    assert np.array_equal(is_right, y == np.sign(train[0][rows, 0]))
    assert model.feature_columns == [*FEATURES, "primary_side"] and model.config.sample_weight == "column"


def test_a_window_is_read_at_its_last_row():
    n, T = 300, 5
    X, y, meta = market(n + T - 1, 0, 0.9, 0.5)
    windows = Windows(X, np.arange(T - 1, n + T - 1), T)
    part = (windows, y[T - 1 :], meta[T - 1 :].reset_index(drop=True))
    model = fit(part, part, sequence_length=T, **LINEAR)
    for inputs in (windows, np.asarray(windows)):
        out = model.predict(inputs, part[2])
        acted = out.predictions != 0
        assert 0.2 < acted.mean() < 0.95 and (out.predictions[acted] == np.sign(X[T - 1 :, 0])[acted]).all()
    assert model.members["secondary"].feature_columns == FEATURES


def test_sides_that_are_always_right_give_a_constant_that_is_saved(tmp_path):
    train, val = market(200, 0, 1, 1, 0.0), market(100, 1, 1, 1, 0.0)
    model = fit(train, val, **LINEAR)
    p = model.predict(val[0], val[2]).probabilities
    assert model.constant == pytest.approx(201 / 202) and np.allclose(p.max(1), 201 / 202)
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert np.array_equal(again.predict(val[0], val[2]).probabilities, p) and "secondary" not in again.members


@pytest.mark.parametrize("facts", [dict(constant=2, shares=[[0, 1, 0]] * 3), dict(constant=None, shares=[[1]]), {}])
def test_a_damaged_file_is_a_checkpoint_error(tmp_path, facts):
    train, val = market(200, 0, 0.9, 0.5), market(100, 1, 0.9, 0.5)
    fit(train, val, **LINEAR).save(tmp_path)
    (tmp_path / META_FILE).write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="values of a meta-labelling model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "config, text",
    [
        (dict(side_column="momentun"), "side_column = 'momentun' is not a feature, did you mean 'momentum'"),
        (dict(classes=(1, 2)), "expected class 0"),
        (dict(primary="meta_labelling"), "primary is meta_labelling itself"),
        (dict(secondary_config=dict(depth=3)), "unknown key 'depth'"),
        (dict(remainder="none"), "remainder = 'none'"),
    ],
)
def test_errors_of_the_config(config, text):
    with pytest.raises(ConfigError, match=text):
        ModelRegistry.create("meta_labelling", config, 5, FEATURES)


def test_errors_of_the_data():
    train, val = market(200, 0, 0.9, 0.5), market(100, 1, 0.9, 0.5)
    idle = (np.zeros_like(val[0]), *val[1:])
    with pytest.raises(ValueError, match="no validation row has a side"):
        fit(train, idle, **LINEAR)
    with pytest.raises(ValueError, match="folds in time need metadata_train"):
        fit((*train[:2], None), val)
    broken = val[0].copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="X holds NaN"):
        fit(train, val, side_column="momentum").predict(broken, val[2])


def test_any_registered_model_can_be_the_first_and_its_code_is_part_of_the_identity():
    train, val = market(300, 0, 0.9, 0.5), market(100, 1, 0.9, 0.5)
    config = dict(primary="average", primary_config=dict(members=dict(logistic_regression={}, svm={})), n_folds=2)
    model = fit(train, val, secondary="logistic_regression", **config)
    assert "logistic_regression decides" in repr(model) and len(model.members["primary"].members) == 2
    assert code_version("meta_labelling") != code_version("meta_labelling", dict(primary="svm"))
    assert code_version("meta_labelling", config) != code_version("meta_labelling", dict(primary="average"))
    assert Path(META_FILE).suffix == ".json"
