"Calibration against known answers, and every promise of a model that has it: purged, saved, refused, reached through every door."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_folds import panel
from test_permutation import market

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
from modelfactory.models.conformance import check_model, planted_task, predict_in_new_process
from modelfactory.models.errors import NotFittedError
from modelfactory.models.loading import load_model
from modelfactory.models.persistence import CheckpointError
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.grid import grid_config, plan_grid
from modelfactory.training.trainer import Trainer

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
    "Logits whose softmax is the truth, and what happened."
    logits = rng.normal(0, spread, (n, 3)) + [0, 0.5, -0.3]
    return logits, (softmax(logits).cumsum(1) > rng.random((n, 1))).argmax(1)


def log_loss(p, y):
    return -np.log(p[np.arange(len(y)), y]).mean()


# known answers


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
def test_temperature_is_recovered_within_its_error(temperature):
    found = []
    for seed in range(20):
        logits, y = simulated(np.random.default_rng(seed), 4000)
        found.append(fit_calibration("temperature", softmax(logits * temperature), y).temperature / temperature)
    assert abs(np.mean(found) - 1) < 3 * np.std(found) / 20**0.5 + 1e-3 and np.std(found) < 0.05


def test_temperature_weighs_rows():
    rng = np.random.default_rng(0)
    logits, y = simulated(rng, 8000)
    honest = np.arange(8000) < 4000
    said = softmax(np.where(honest[:, None], logits, 3 * logits))
    of_weight = [fit_calibration("temperature", said, y, np.where(honest, w, 1 - w)).temperature for w in (1, 0.5, 0)]
    assert abs(of_weight[0] - 1) < 0.1 and of_weight[0] < of_weight[1] < of_weight[2] and abs(of_weight[2] - 3) < 0.3


def test_isotonic_undoes_a_distortion_that_keeps_the_order():
    rng = np.random.default_rng(1)
    p = rng.uniform(0.02, 0.98, 40_000)
    y = (rng.random(len(p)) < p).astype(int)
    bent = p**3 / (p**3 + (1 - p) ** 3)
    fresh = np.linspace(0.05, 0.95, 200)
    bent_fresh = fresh**3 / (fresh**3 + (1 - fresh) ** 3)
    mended = fit_calibration("isotonic", np.c_[1 - bent, bent], y)(np.c_[1 - bent_fresh, bent_fresh])[:, 1]
    assert np.abs(mended - fresh).mean() < 0.015 and np.abs(bent_fresh - fresh).mean() > 0.1


@pytest.mark.parametrize("kind", CALIBRATION_METHODS)
def test_an_over_confident_model_gains_and_a_calibrated_one_loses_next_to_nothing(kind):
    gain, cost, gap = [], [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        (logits, y), (later, happened) = simulated(rng, 3000, 1.0), simulated(rng, 3000, 1.0)
        sure, mended = softmax(3 * later), fit_calibration(kind, softmax(3 * logits), y)(softmax(3 * later))
        gain.append(log_loss(sure, happened) - log_loss(mended, happened))
        gap.append(expected_calibration_error(happened, mended) / expected_calibration_error(happened, sure))
        cost.append(
            log_loss(fit_calibration(kind, softmax(logits), y)(softmax(later)), happened)
            - log_loss(softmax(later), happened)
        )
    assert min(gain) > 0.1 and max(gap) < 0.5 and np.mean(cost) < dict(temperature=0.001, isotonic=0.03)[kind]


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_isotonic_calls_nothing_impossible(n):
    rng = np.random.default_rng(n)
    p = np.eye(3)[rng.integers(3, size=n)]
    mended = fit_calibration("isotonic", p, p.argmax(1))(np.eye(3))
    assert np.isclose(mended.min(), 1 / (n + 3)) and np.allclose(mended.sum(1), 1)


# what is learnt from what


@pytest.mark.parametrize("known", [True, False], ids=["label_bars", "horizon"])
@pytest.mark.parametrize("seed", range(6))
def test_no_label_of_the_earlier_part_is_decided_in_the_end(seed, known):
    "Symbols with other calendars, lost bars and labels of other lengths; the reckoning of folds is the oracle."
    ds = TimeSeriesDataset(
        read_split(panel(seed, ["around_the_clock", "day_session", "short_session"], 12, 4, with_hits=known)), 4, 1
    )
    labels, metadata = LabelSpans(ds), ds.metadata if known else ds.metadata.drop(columns="label_bars")
    for share in (0.1, 0.35, 0.8):
        first, end = purged_holdout(metadata, share)
        cut = labels.start[end].min()
        assert set(end) == set(np.flatnonzero(labels.start >= cut)) and len(first) and (labels.end[first] < cut).all()
        purged = np.setdiff1d(np.flatnonzero(labels.start < cut), first)
        assert (labels.end[purged] >= cut).sum() >= len(purged) - 2 * 4 * len(
            set(metadata.symbol)
        )  # and few more than had to go


def test_the_end_of_train_teaches_the_calibration_alone():
    first, end = purged_holdout(TASK.meta, 0.2)
    X, y = TASK.X[:].copy(), TASK.y.copy()
    X[end], y[end] = X[end][::-1] * 3, -y[end]
    before, after = fitted(), fitted(X=X, y=y)
    assert (
        np.array_equal(probabilities(before.model), probabilities(after.model))
        and before.calibration != after.calibration
    )
    purged = np.setdiff1d(np.arange(len(y)), np.r_[first, end])
    y[purged] = -y[purged]
    assert len(purged) == 5 and np.array_equal(probabilities(fitted(X=X, y=y)), probabilities(after))


def test_validation_takes_no_part():
    model, p = new(), probabilities(fitted())
    model.fit(TASK.X, TASK.y, TASK.X_val[::-1].copy(), -TASK.y_val, TASK.meta, TASK.meta_val)
    assert np.array_equal(probabilities(model), p)
    future = TASK.X_val[:].copy()
    future[150:] = 99
    assert np.array_equal(model.predict(future, TASK.meta_val).probabilities[:150], p[:150])


# one that has it is a model like any other


@pytest.mark.parametrize(
    "name, kind", [("logistic_regression", "temperature"), ("logistic_regression", "isotonic"), ("gru", "isotonic")]
)
def test_conformance(name, kind):
    assert all(r["result"] == "ok" for r in check_model(name, dict(calibration=kind)))


@pytest.mark.parametrize("kind", CALIBRATION_METHODS)
def test_a_fresh_process_gives_equal_probabilities(kind, tmp_path):
    model = fitted(kind)
    model.save(tmp_path)
    assert np.array_equal(predict_in_new_process(tmp_path, TASK.X_val[:], TASK.meta_val), probabilities(model))
    assert load_model(tmp_path).calibration == Calibration(**json.loads((tmp_path / "calibration.json").read_text()))


def test_what_others_ask_of_a_model():
    class Watch:
        rounds = 0

        def on_fit_start(self, model, n_rounds):
            pass

        def on_epoch_end(self, model, epoch, logs):
            self.rounds += 1

        def on_fit_end(self, model, history):
            pass

    model, plain, watch = (
        new(name="xgboost", n_rounds=7, early_stopping=False),
        ModelRegistry.create("xgboost", {}, 5, TASK.features),
        Watch(),
    )
    model.callbacks = [watch]
    history = model.fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    assert watch.rounds == 7 == len(history["val_loss"]) and set(model.feature_importance()) == set(TASK.features)
    for name in ("name", "family", "requires", "accepts_nan", "Config", "classes", "horizon", "feature_columns"):
        assert getattr(model, name) == getattr(plain, name)
    out = model.predict(TASK.X_val, TASK.meta_val)
    assert np.array_equal(np.array(model.classes)[out.probabilities.argmax(1)], out.predictions)


def test_without_it_nothing_changes():
    plain = ModelRegistry.create("logistic_regression", {}, 5, TASK.features)
    assert not isinstance(plain, CalibratedModel) and isinstance(new(), CalibratedModel)


def test_every_way_to_configure_a_model_leads_to_it():
    asked = dict(calibration="isotonic", calibration_share=0.3)
    trained = Trainer(dict(model="logistic_regression", horizon=5, data="planted", config=asked)).build_model()
    (job,) = plan_grid(
        grid_config(
            dict(data="planted", models="logistic_regression", horizons=[5], overrides=dict(logistic_regression=asked))
        )
    )
    planned = ModelRegistry.create("logistic_regression", job.parameters["config"], 5, TASK.features)
    for model in (trained, planned):
        assert (
            isinstance(model, CalibratedModel)
            and model.config.calibration == "isotonic"
            and model.config.calibration_share == 0.3
        )


# what is refused


@pytest.mark.parametrize("kind", CALIBRATION_METHODS)
def test_an_end_that_cannot_tell_is_refused(kind):
    end = purged_holdout(TASK.meta, 0.2)[1]
    lacking = TASK.y.copy()
    lacking[end] = np.where(lacking[end] == 0, 1, lacking[end])
    with pytest.raises(CalibrationError, match=f"holds out {len(end)} rows without class 0"):
        fitted(kind, lacking)
    for share in (0.005, 0.995):
        with pytest.raises(CalibrationError, match="expected at least 10 of each"):
            fitted(kind, calibration_share=share)
    with pytest.raises(ValueError, match="needs metadata_train"):
        new(kind).fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val)
    for weight in (0, -1, np.nan):
        with pytest.raises(ValueError, match="finite, not negative and not all zero"):
            fitted(
                kind,
                meta=TASK.meta.assign(sample_weight=np.where(np.isin(np.arange(len(TASK.y)), end), weight, 1)),
                sample_weight="column",
            )


def test_a_fit_that_fails_leaves_nothing_that_predicts(tmp_path):
    model, end = fitted(), purged_holdout(TASK.meta, 0.2)[1]
    lacking = TASK.y.copy()
    lacking[end] = 1
    with pytest.raises(CalibrationError):
        model.fit(TASK.X, lacking, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
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
def test_a_damaged_calibration_is_not_read_and_not_done_without(damage, tmp_path):
    model = fitted()
    model.save(tmp_path)
    file = tmp_path / "calibration.json"
    file.unlink() if DAMAGE[damage] is None else file.write_text(DAMAGE[damage])
    with pytest.raises(CheckpointError, match="calibration.json"):
        model.load(tmp_path)
    with pytest.raises(NotFittedError):
        probabilities(model)


def test_a_calibrated_model_is_not_read_without_its_calibration(tmp_path):
    fitted("isotonic").save(tmp_path / "calibrated")
    plain = ModelRegistry.create("logistic_regression", {}, 5, TASK.features)
    with pytest.raises(CheckpointError, match="load_model"):
        plain.load(tmp_path / "calibrated")
    assert not plain.fitted and plain.config.calibration is None
    plain.fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    plain.save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="calibration"):
        new().load(tmp_path / "plain")


# confidence


def test_the_parts_of_a_brier_score_are_those_of_the_papers():
    "Murphy 1973 by a slow loop; the remainder is the variance within bins less twice the covariance (Stephenson, Coelho and Jolliffe 2008)."
    rng = np.random.default_rng(3)
    logits, y = simulated(rng, 2000)
    p, want = softmax(1.6 * logits), np.zeros(4)
    for k in range(3):
        said, happened, base = p[:, k], (y == k).astype(float), (y == k).mean()
        want[2] += base * (1 - base)
        for rows in (bins := confidence_bins(p[:, [k]], 15)) == np.unique(bins)[:, None]:
            share, a, b = rows.mean(), said[rows].mean(), happened[rows].mean()
            want += share * np.array(
                [
                    (a - b) ** 2,
                    (b - base) ** 2,
                    0,
                    said[rows].var() - 2 * np.mean((said[rows] - a) * (happened[rows] - b)),
                ]
            )
    found = brier_decomposition(y, p)
    assert np.allclose([found[k] for k in ("reliability", "resolution", "uncertainty", "within")], want, atol=1e-12)
    assert np.isclose(
        found["reliability"] - found["resolution"] + found["uncertainty"] + found["within"],
        ((p - np.eye(3)[y]) ** 2).sum(1).mean(),
    )
    assert brier_decomposition(y, softmax(logits))["reliability"] < found["reliability"] / 3


@pytest.fixture(scope="module")
def traded():
    predictions, y, prices = market(bars=500, skill=0.6, seed=2)
    return ModelEvaluator(5, cost_bps=0.5, n_boot=50), predictions, y, prices


def test_a_sweep_is_the_slow_loop(traded):
    evaluator, predictions, y, prices = traded
    swept = threshold_sweep(evaluator, predictions, y, prices, (0.0, 0.4, 0.5, 0.6, 2.0))
    for r in swept.itertuples():
        position = np.array(
            [c if p.max() >= r.threshold else 0 for c, p in zip(predictions.predictions, predictions.probabilities)]
        )
        called = position != 0
        assert r.calls == called.sum() and r.coverage == called.mean()
        if not called.any():
            assert np.isnan([r.precision, r.directional_accuracy, r.sharpe_net]).all()
            continue
        assert np.isclose(r.precision, np.mean([c == t for c, t in zip(position[called], y[called])]))
        assert np.isclose(r.directional_accuracy, np.mean([c == t for c, t in zip(position, y) if c and t]))
        frame = pd.DataFrame(
            dict(datetime=predictions.timestamps, symbol=predictions.symbols, position=position.astype(float))
        )
        assert np.isclose(
            r.sharpe_net, tranche_backtest(frame, prices, horizon=5, cost_bps=0.5).metrics()["sharpe_net"]
        )
    assert swept.calls.iloc[-1] == 0 < swept.calls.iloc[-2] < swept.calls[0]


def test_a_threshold_of_zero_is_the_evaluators_own_backtest(traded):
    evaluator, predictions, y, prices = traded
    metrics = evaluator.compute_all_metrics(predictions, y, prices)
    row = threshold_sweep(evaluator, predictions, y, prices, (0.0,)).iloc[0]
    assert np.isclose(row.sharpe_net, metrics["sharpe_net"]) and np.isclose(
        row.directional_accuracy, metrics["directional_accuracy"]
    )
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


def test_pictures_of_a_model_that_calls_nothing_and_of_two_classes(traded):
    evaluator, predictions, y, prices = traded
    flat = replace(predictions, predictions=np.zeros_like(predictions.predictions))
    swept = threshold_sweep(evaluator, flat, y, prices)
    assert swept.calls.tolist() == [0] and plot_threshold_sweep(swept).axes[0].lines
    two = replace(
        predictions,
        predictions=(predictions.predictions > 0).astype(np.int8),
        probabilities=predictions.probabilities[:, 1:] / predictions.probabilities[:, 1:].sum(1, keepdims=True),
    )
    assert len(plot_calibration_change(two, two, (y > 0).astype(int), (0, 1)).axes[1].get_title(loc="left")) > 0
    with pytest.raises(EvaluationError, match="y_true has"):
        plot_calibration_change(predictions, predictions, y[:-1])
