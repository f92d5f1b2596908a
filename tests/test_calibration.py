"Calibration: known answers, purging, saving, errors on invalid input, and the ways to configure it."

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE, ROOT
from test_folds import panel
from test_permutation import market

from modelfactory.configuration import TradingRules
from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.folds import LabelSpans
from modelfactory.data.splits import read_split
from modelfactory.evaluation.backtest import tranche_backtest
from modelfactory.evaluation.evaluator import ModelEvaluator
from modelfactory.evaluation.metrics import (
    EvaluationError,
    brier_decomposition,
    confidence_bins,
    expected_calibration_error,
)
from modelfactory.evaluation.robustness import compare_exit_rules, expected_sign, threshold_sweep
from modelfactory.figures.confidence import plot_calibration_change, plot_threshold_sweep
from modelfactory.models.calibration import (
    CALIBRATION_METHODS,
    CalibratedModel,
    Calibration,
    CalibrationError,
    fit_calibration,
    purged_holdout,
)
from modelfactory.models.conformance import check_model, planted_task
from modelfactory.models.errors import NotFittedError
from modelfactory.models.loading import load_model
from modelfactory.models.persistence import CheckpointError
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.grid import grid_config, plan_grid
from modelfactory.training.trainer import Trainer

pytestmark = pytest.mark.slow

TASK = planted_task()


def new(kind="temperature", name="logistic_regression", **config):
    return ModelRegistry.create(name, dict(calibration=kind) | config, 5, TASK.features)


def fitted(kind="temperature", y=TASK.y, meta=TASK.meta, X=TASK.X, **config):
    model = new(kind, **config)
    model.fit(X, y, TASK.X_val, TASK.y_val, meta, TASK.meta_val)
    return model


def probabilities(model):
    return model.predict(TASK.X_val, TASK.meta_val).probabilities


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def simulated(rng, n, spread=1.5):
    "Logits whose softmax is the true probability, and classes drawn from it."
    logits = rng.normal(0, spread, (n, 3)) + [0, 0.5, -0.3]
    return logits, (softmax(logits).cumsum(1) > rng.random((n, 1))).argmax(1)


def log_loss(p, y):
    return -np.log(p[np.arange(len(y)), y]).mean()


# Known answers


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
def test_the_fitted_temperature_is_unbiased_and_precise(temperature):
    ratios = []
    for seed in range(20):
        logits, y = simulated(np.random.default_rng(seed), 4000)
        ratios.append(fit_calibration("temperature", softmax(logits * temperature), y).temperature / temperature)
    assert abs(np.mean(ratios) - 1) < 3 * np.std(ratios) / 20**0.5 + 1e-3 and np.std(ratios) < 0.05


def test_temperature_uses_the_weights_of_the_rows():
    rng = np.random.default_rng(0)
    logits, y = simulated(rng, 8000)
    calibrated = np.arange(8000) < 4000
    p = softmax(np.where(calibrated[:, None], logits, 3 * logits))
    weights = [np.where(calibrated, w, 1 - w) for w in (1, 0.5, 0)]
    one, between, three = (fit_calibration("temperature", p, y, weight).temperature for weight in weights)
    assert abs(one - 1) < 0.1 and one < between < three and abs(three - 3) < 0.3


def test_isotonic_corrects_a_distortion_that_keeps_the_order():
    rng = np.random.default_rng(1)
    p = rng.uniform(0.02, 0.98, 40_000)
    y = (rng.random(len(p)) < p).astype(int)
    distorted = p**3 / (p**3 + (1 - p) ** 3)
    p_new = np.linspace(0.05, 0.95, 200)
    distorted_new = p_new**3 / (p_new**3 + (1 - p_new) ** 3)
    calibration = fit_calibration("isotonic", np.c_[1 - distorted, distorted], y)
    calibrated = calibration(np.c_[1 - distorted_new, distorted_new])[:, 1]
    assert np.abs(calibrated - p_new).mean() < 0.015 and np.abs(distorted_new - p_new).mean() > 0.1


@pytest.mark.parametrize("kind", CALIBRATION_METHODS)
def test_an_overconfident_model_gains_and_a_calibrated_model_loses_little(kind):
    gain, cost, gap = [], [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        (logits, y), (logits_new, y_new) = simulated(rng, 3000, 1.0), simulated(rng, 3000, 1.0)
        overconfident = softmax(3 * logits_new)
        calibrated = fit_calibration(kind, softmax(3 * logits), y)(overconfident)
        gain.append(log_loss(overconfident, y_new) - log_loss(calibrated, y_new))
        gap.append(expected_calibration_error(y_new, calibrated) / expected_calibration_error(y_new, overconfident))
        p_new = softmax(logits_new)
        recalibrated = fit_calibration(kind, softmax(logits), y)(p_new)
        cost.append(log_loss(recalibrated, y_new) - log_loss(p_new, y_new))
    assert min(gain) > 0.1 and max(gap) < 0.5 and np.mean(cost) < dict(temperature=0.001, isotonic=0.03)[kind]


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_isotonic_gives_no_class_probability_zero(n):
    rng = np.random.default_rng(n)
    p = np.eye(3)[rng.integers(3, size=n)]
    calibrated = fit_calibration("isotonic", p, p.argmax(1))(np.eye(3))
    assert np.isclose(calibrated.min(), 1 / (n + 3)) and np.allclose(calibrated.sum(1), 1)


# Rows of the fit and rows held out


@pytest.mark.parametrize("with_hits", [True, False], ids=["label_bars", "horizon"])
@pytest.mark.parametrize("seed", range(6))
def test_no_label_of_the_earlier_part_is_decided_in_the_end(seed, with_hits):
    "Symbols with different calendars, missing bars and label lengths; `LabelSpans` of the folds is the oracle."
    calendars = ["around_the_clock", "day_session", "short_session"]
    ds = TimeSeriesDataset(read_split(panel(seed, calendars, 12, 4, with_hits=with_hits)), 4, 1)
    labels, metadata = LabelSpans(ds), ds.metadata if with_hits else ds.metadata.drop(columns="label_bars")
    for share in (0.1, 0.35, 0.8):
        first, end = purged_holdout(metadata, share)
        cut = labels.start[end].min()
        assert set(end) == set(np.flatnonzero(labels.start >= cut)) and len(first) and (labels.end[first] < cut).all()
        purged = np.setdiff1d(np.flatnonzero(labels.start < cut), first)
        needlessly_purged = len(purged) - (labels.end[purged] >= cut).sum()
        assert needlessly_purged <= 2 * 4 * len(set(metadata.symbol))


def test_the_end_of_train_changes_only_the_calibration():
    first, end = purged_holdout(TASK.meta, 0.2)
    X, y = TASK.X[:].copy(), TASK.y.copy()
    X[end], y[end] = X[end][::-1] * 3, -y[end]
    before, after = fitted(), fitted(X=X, y=y)
    assert np.array_equal(probabilities(before.model), probabilities(after.model))
    assert before.calibration != after.calibration
    purged = np.setdiff1d(np.arange(len(y)), np.r_[first, end])
    y[purged] = -y[purged]
    assert len(purged) == 5 and np.array_equal(probabilities(fitted(X=X, y=y)), probabilities(after))


def test_validation_takes_no_part_in_calibration():
    model, p = new(), probabilities(fitted())
    model.fit(TASK.X, TASK.y, TASK.X_val[::-1].copy(), -TASK.y_val, TASK.meta, TASK.meta_val)
    assert np.array_equal(probabilities(model), p)
    future = TASK.X_val[:].copy()
    future[150:] = 99
    assert np.array_equal(model.predict(future, TASK.meta_val).probabilities[:150], p[:150])


# Interface of a calibrated model


@pytest.mark.parametrize(
    "name, kind, seq_len",
    [("logistic_regression", "temperature", 1), ("logistic_regression", "isotonic", 1), ("gru", "isotonic", 8)],
)
def test_conformance(name, kind, seq_len):
    config = dict(batch_size=128) if name == "gru" else {}
    assert all(r["result"] == "ok" for r in check_model(name, config | dict(calibration=kind), seq_len))


PREDICT_ALL = """
import sys, numpy as np, pandas as pd
from modelfactory.models.loading import load_model
X, meta = np.load("X.npy"), pd.read_parquet("meta.parquet")
for name in sys.argv[1:]: np.save(f"{name}.npy", load_model(name).predict(X, meta).probabilities)
"""


def test_a_new_process_gives_equal_probabilities(tmp_path):
    models = {kind: fitted(kind) for kind in CALIBRATION_METHODS}
    for kind, model in models.items():
        model.save(tmp_path / kind)
    np.save(tmp_path / "X.npy", TASK.X_val[:])
    TASK.meta_val.to_parquet(tmp_path / "meta.parquet")
    command, environment = [sys.executable, "-c", PREDICT_ALL, *models], os.environ | dict(PYTHONPATH=str(ROOT))
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)
    for kind, model in models.items():
        assert np.array_equal(np.load(tmp_path / f"{kind}.npy"), probabilities(model))
        stored = json.loads((tmp_path / kind / "calibration.json").read_text())
        assert load_model(tmp_path / kind).calibration == Calibration(**stored)


def test_callbacks_importance_and_attributes_are_those_of_the_model_inside():
    class RoundCounter:
        rounds = 0

        def on_fit_start(self, model, n_rounds):
            pass

        def on_epoch_end(self, model, epoch, logs):
            self.rounds += 1

        def on_fit_end(self, model, history):
            pass

    model = new(name="xgboost", n_rounds=7, early_stopping=False)
    plain, counter = ModelRegistry.create("xgboost", {}, 5, TASK.features), RoundCounter()
    model.callbacks = [counter]
    history = model.fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    assert counter.rounds == 7 == len(history["val_loss"])
    assert set(model.feature_importance()) == set(TASK.features)
    for name in ("name", "family", "requires", "accepts_nan", "Config", "classes", "horizon", "feature_columns"):
        assert getattr(model, name) == getattr(plain, name)
    out = model.predict(TASK.X_val, TASK.meta_val)
    assert np.array_equal(np.array(model.classes)[out.probabilities.argmax(1)], out.predictions)


def test_a_model_without_calibration_is_not_wrapped():
    plain = ModelRegistry.create("logistic_regression", {}, 5, TASK.features)
    assert not isinstance(plain, CalibratedModel) and isinstance(new(), CalibratedModel)


def test_trainer_and_grid_configure_calibration():
    config = dict(calibration="isotonic", calibration_share=0.3)
    trained = Trainer(dict(model="logistic_regression", horizon=5, data="planted", config=config)).build_model()
    overrides = dict(logistic_regression=config)
    grid = dict(data="planted", models="logistic_regression", horizons=[5], overrides=overrides)
    (job,) = plan_grid(grid_config(grid))
    planned = ModelRegistry.create("logistic_regression", job.parameters["config"], 5, TASK.features)
    for model in (trained, planned):
        assert isinstance(model, CalibratedModel)
        assert model.config.calibration == "isotonic" and model.config.calibration_share == 0.3


# Errors


@pytest.mark.parametrize("kind", CALIBRATION_METHODS)
def test_an_end_of_train_that_cannot_be_used_raises_an_error(kind):
    end = purged_holdout(TASK.meta, 0.2)[1]
    without_class_0 = TASK.y.copy()
    without_class_0[end] = np.where(without_class_0[end] == 0, 1, without_class_0[end])
    with pytest.raises(CalibrationError, match=f"holds out {len(end)} rows without class 0"):
        fitted(kind, without_class_0)
    for share in (0.005, 0.995):
        with pytest.raises(CalibrationError, match="expected at least 10 of each"):
            fitted(kind, calibration_share=share)
    with pytest.raises(ValueError, match="needs metadata_train"):
        new(kind).fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val)
    for weight in (0, -1, np.nan):
        weights = np.where(np.isin(np.arange(len(TASK.y)), end), weight, 1)
        with pytest.raises(ValueError, match="finite, not negative and not all zero"):
            fitted(kind, meta=TASK.meta.assign(sample_weight=weights), sample_weight="column")


def test_after_a_failed_fit_predict_and_save_raise_errors(tmp_path):
    model, end = fitted(), purged_holdout(TASK.meta, 0.2)[1]
    one_class_at_end = TASK.y.copy()
    one_class_at_end[end] = 1
    with pytest.raises(CalibrationError):
        model.fit(TASK.X, one_class_at_end, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    for use in (lambda: probabilities(model), lambda: model.save(tmp_path)):
        with pytest.raises(NotFittedError):
            use()
    assert not list(tmp_path.iterdir())


DAMAGE = dict(
    gone=None,
    empty="",
    other="[]",
    unknown=json.dumps(dict(kind="platt")),
    cold=json.dumps(dict(kind="temperature", temperature=0)),
    text=json.dumps(dict(kind="temperature", temperature="2")),
    falling=json.dumps(dict(kind="isotonic", rows=9, curves=[[[0, 1], [1, 0]]] * 3)),
    beyond=json.dumps(dict(kind="isotonic", rows=9, curves=[[[0, 1], [-5, 9]]] * 3)),
    few=json.dumps(dict(kind="isotonic", rows=9, curves=[[[0, 1], [0, 1]]])),
    nan='{"kind": "temperature", "temperature": NaN}',
    ragged=json.dumps(dict(kind="isotonic", rows=9, curves=[[[0, 1], [0, 0.5, 1]]] * 3)),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_with_a_damaged_calibration_file_cannot_be_loaded(damage, tmp_path):
    model = fitted()
    model.save(tmp_path)
    file = tmp_path / "calibration.json"
    if DAMAGE[damage] is None:
        file.unlink()
    else:
        file.write_text(DAMAGE[damage])
    with pytest.raises(CheckpointError, match="calibration.json"):
        model.load(tmp_path)
    with pytest.raises(NotFittedError):
        probabilities(model)


def test_a_calibrated_model_cannot_be_loaded_without_its_calibration(tmp_path):
    fitted("isotonic").save(tmp_path / "calibrated")
    plain = ModelRegistry.create("logistic_regression", {}, 5, TASK.features)
    with pytest.raises(CheckpointError, match="load_model"):
        plain.load(tmp_path / "calibrated")
    assert not plain.fitted and plain.config.calibration is None
    plain.fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    plain.save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="calibration"):
        new().load(tmp_path / "plain")


# Confidence


def test_the_brier_decomposition_equals_the_formulas_of_the_papers():
    """Murphy 1973, by a slow loop.

    The remainder is the variance within bins less twice the covariance (Stephenson, Coelho and Jolliffe 2008).
    """
    rng = np.random.default_rng(3)
    logits, y = simulated(rng, 2000)
    probabilities, expected = softmax(1.6 * logits), np.zeros(4)
    for k in range(3):
        p, is_class, base_rate = probabilities[:, k], (y == k).astype(float), (y == k).mean()
        expected[2] += base_rate * (1 - base_rate)
        bins = confidence_bins(probabilities[:, [k]], 15)
        for rows in bins == np.unique(bins)[:, None]:
            share, p_mean, frequency = rows.mean(), p[rows].mean(), is_class[rows].mean()
            within = p[rows].var() - 2 * np.mean((p[rows] - p_mean) * (is_class[rows] - frequency))
            expected += share * np.array([(p_mean - frequency) ** 2, (frequency - base_rate) ** 2, 0, within])
    parts = brier_decomposition(y, probabilities)
    names = ("reliability", "resolution", "uncertainty", "within")
    assert np.allclose([parts[name] for name in names], expected, atol=1e-12)
    brier_score = ((probabilities - np.eye(3)[y]) ** 2).sum(1).mean()
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within"]
    assert np.isclose(total, brier_score)
    assert brier_decomposition(y, softmax(logits))["reliability"] < parts["reliability"] / 3


@pytest.fixture(scope="module")
def traded():
    predictions, y, prices = market(bars=500, skill=0.6, seed=2)
    return ModelEvaluator(5, cost_bps=0.5, n_boot=50), predictions, y, prices


def test_a_threshold_sweep_equals_a_slow_loop(traded):
    evaluator, predictions, y, prices = traded
    swept = threshold_sweep(evaluator, predictions, y, prices, (0.0, 0.4, 0.5, 0.6, 2.0))
    for row in swept.itertuples():
        position = []
        for y_pred, p in zip(predictions.predictions, predictions.probabilities, strict=True):
            position.append(y_pred if p.max() >= row.threshold else 0)
        position = np.array(position)
        called = position != 0
        assert row.calls == called.sum() and row.coverage == called.mean()
        if not called.any():
            assert np.isnan([row.precision, row.directional_accuracy, row.sharpe_net]).all()
            continue
        correct = [call == truth for call, truth in zip(position[called], y[called], strict=True)]
        assert np.isclose(row.precision, np.mean(correct))
        with_direction = [(call, truth) for call, truth in zip(position, y, strict=True) if call and truth]
        assert np.isclose(row.directional_accuracy, np.mean([call == truth for call, truth in with_direction]))
        columns = dict(datetime=predictions.timestamps, symbol=predictions.symbols, position=position.astype(float))
        backtest = tranche_backtest(pd.DataFrame(columns), prices, horizon=5, rules=TradingRules(cost_bps=0.5))
        assert np.isclose(row.sharpe_net, backtest.metrics()["sharpe_net"])
    assert swept.calls.iloc[-1] == 0 < swept.calls.iloc[-2] < swept.calls[0]


def test_a_threshold_of_zero_equals_the_backtest_of_the_evaluator(traded):
    evaluator, predictions, y, prices = traded
    metrics = evaluator.compute_all_metrics(predictions, y, prices)
    row = threshold_sweep(evaluator, predictions, y, prices, (0.0,)).iloc[0]
    assert np.isclose(row.sharpe_net, metrics["sharpe_net"])
    assert np.isclose(row.directional_accuracy, metrics["directional_accuracy"])
    fixed = compare_exit_rules(evaluator, predictions, y, prices).set_index("strategy").loc["fixed"]
    for name in ("sharpe", "sharpe_net", "turnover", "exposure", "max_drawdown"):
        assert np.isclose(fixed[name], metrics[name]), name


def test_the_expected_sign_is_the_probability_of_up_less_that_of_down(traded):
    evaluator, predictions, y, prices = traded
    p = predictions.probabilities.astype(float)
    assert np.allclose(expected_sign(predictions), p[:, 2] - p[:, 0], atol=1e-6)
    certain = replace(predictions, probabilities=np.eye(3, dtype=np.float32)[predictions.predictions + 1])
    assert np.array_equal(expected_sign(certain), predictions.predictions)
    rules = compare_exit_rules(evaluator, certain, y, prices).set_index("strategy").drop(columns=["n_trades"])
    assert np.allclose(rules.loc["fixed"].astype(float), rules.loc["expected sign"].astype(float))


def test_plots_of_flat_predictions_and_of_two_classes(traded):
    evaluator, predictions, y, prices = traded
    flat = replace(predictions, predictions=np.zeros_like(predictions.predictions))
    swept = threshold_sweep(evaluator, flat, y, prices)
    assert swept.calls.tolist() == [0] and plot_threshold_sweep(swept).axes[0].lines
    p = predictions.probabilities[:, 1:]
    is_up = (predictions.predictions > 0).astype(np.int8)
    two_classes = replace(predictions, predictions=is_up, probabilities=p / p.sum(1, keepdims=True))
    figure = plot_calibration_change(two_classes, two_classes, (y > 0).astype(int), (0, 1))
    assert len(figure.axes[1].get_title(loc="left")) > 0
    with pytest.raises(EvaluationError, match="y_true has"):
        plot_calibration_change(predictions, predictions, y[:-1])
