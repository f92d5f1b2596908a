"`stop_on: train_tail`: early stopping uses the purged end of train, and validation takes no part in the fit."

import numpy as np
import pytest
from test_test_set import frames

from modelfactory.models.calibration import CalibratedModel, HoldoutError, TailEarlyStopping, purged_holdout
from modelfactory.models.conformance import check_model, planted_task
from modelfactory.models.loading import load_model
from modelfactory.models.registry import ModelRegistry
from modelfactory.training.trainer import EARLY_STOPPING_NOTE, Trainer, early_stopping_note

pytestmark = pytest.mark.slow

TASK = planted_task()
SMALL = {name: dict(n_rounds=60, patience=5) for name in ("lightgbm", "xgboost", "catboost")} | dict(
    gru=dict(max_epochs=4, hidden_size=8, sequence_length=12),
    average=dict(members=dict(lightgbm=dict(n_rounds=30), logistic_regression={})),
)


def new(name, **config):
    overrides = SMALL.get(name, {}) | dict(stop_on="train_tail") | config
    return ModelRegistry.create(name, overrides, 5, TASK.features)


def task_of(name):
    return planted_task(seq_len=12) if name == "gru" else TASK


def fitted(name, X_val=None, y_val=None, **config):
    task = task_of(name)
    X_val = task.X_val if X_val is None else X_val
    y_val = task.y_val if y_val is None else y_val
    model = new(name, **config)
    model.history = model.fit(task.X, task.y, X_val, y_val, task.meta, task.meta_val)
    return model


def probabilities(model, name):
    return model.predict(task_of(name).X_val, task_of(name).meta_val).probabilities


@pytest.mark.parametrize("name", ["lightgbm", "xgboost", "catboost", "gru", "average", "random_forest", "svm"])
def test_labels_and_features_of_validation_do_not_change_the_fitted_model(name):
    task, model = task_of(name), fitted(name)
    other_labels = fitted(name, y_val=np.random.default_rng(0).permutation(task.y_val))
    other_features = fitted(name, X_val=np.asarray(task.X_val)[::-1] * 3)
    assert np.array_equal(probabilities(model, name), probabilities(other_labels, name))
    assert np.array_equal(probabilities(model, name), probabilities(other_features, name))
    assert model.history == other_labels.history == other_features.history


@pytest.mark.parametrize("name", ["lightgbm", "gru"])
def test_with_stop_on_val_the_labels_of_validation_change_the_losses(name):
    task = task_of(name)
    model, other = fitted(name, stop_on="val"), fitted(name, y_val=-task.y_val, stop_on="val")
    assert model.history["val_loss"] != other.history["val_loss"]


@pytest.mark.parametrize("name", ["lightgbm", "gru"])
def test_the_model_equals_one_fitted_on_the_earlier_part_with_the_end_as_validation(name):
    task, model = task_of(name), fitted(name)
    first, end = purged_holdout(task.meta, 0.15)
    X_first, X_end = (task.X.subset(rows) if name == "gru" else task.X[rows] for rows in (first, end))
    meta_first, meta_end = (task.meta.iloc[rows].reset_index(drop=True) for rows in (first, end))
    plain = new(name, stop_on="val")
    history = plain.fit(X_first, task.y[first], X_end, task.y[end], meta_first, meta_end)
    assert history == model.history
    assert np.array_equal(probabilities(plain, name), probabilities(model, name))
    assert len(first) + len(end) == len(task.y) - 5  # 5 rows are purged: their labels are decided in the end


def test_calibration_holds_out_the_end_and_stopping_the_end_of_the_remaining_rows():
    model = new("lightgbm", calibration="temperature")
    assert isinstance(model, CalibratedModel) and isinstance(model.model, TailEarlyStopping)
    model.fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    first, end = purged_holdout(TASK.meta, 0.2)
    meta = TASK.meta.iloc[first].reset_index(drop=True)
    inner = new("lightgbm")
    inner.fit(TASK.X[first], TASK.y[first], TASK.X_val, -TASK.y_val, meta, TASK.meta_val)
    assert np.array_equal(probabilities(model.model, "lightgbm"), probabilities(inner, "lightgbm"))
    y = TASK.y.copy()
    y[end] = -y[end]
    other = new("lightgbm", calibration="temperature")
    other.fit(TASK.X, y, TASK.X_val, TASK.y_val, TASK.meta, TASK.meta_val)
    assert np.array_equal(probabilities(other.model, "lightgbm"), probabilities(inner, "lightgbm"))
    assert other.calibration != model.calibration


WITHOUT_EARLY_STOPPING = [("logistic_regression", {}), ("lightgbm", dict(early_stopping=False)), ("random_forest", {})]


@pytest.mark.parametrize("name, config", WITHOUT_EARLY_STOPPING)
def test_a_model_without_early_stopping_is_fitted_on_all_of_train(name, config):
    train_tail, plain = fitted(name, **config), fitted(name, stop_on="val", **config)
    assert np.array_equal(probabilities(train_tail, name), probabilities(plain, name))


@pytest.mark.parametrize(
    "name, config, seq_len", [("lightgbm", SMALL["lightgbm"], 1), ("gru", dict(batch_size=128), 8)]
)
def test_conformance(name, config, seq_len):
    assert all(r["result"] == "ok" for r in check_model(name, config | dict(stop_on="train_tail"), seq_len))


@pytest.mark.parametrize("name", ["lightgbm", "gru"])
def test_callbacks_importance_saving_and_loading_use_the_model_inside(name, tmp_path):
    class RoundCounter:
        n = 0

        def on_fit_start(self, model, n_rounds):
            pass

        def on_epoch_end(self, model, epoch, logs):
            self.n += 1

        def on_fit_end(self, model, history):
            pass

    task, counter = task_of(name), RoundCounter()
    model = new(name, calibration="isotonic")
    model.callbacks = [counter]
    history = model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
    assert counter.n == len(history["val_loss"]) and model.config.stop_on == "train_tail"
    assert "stops on the end of train" in repr(model)
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert np.array_equal(probabilities(again, name), probabilities(model, name))
    assert again.config == model.config
    assert again.feature_importance() == model.feature_importance()


def test_too_few_rows_or_no_metadata_raise_errors():
    few = planted_task(n=60)
    with pytest.raises(HoldoutError, match="stop_share 0.15 leaves 46 rows to learn from and 9 held out, expected"):
        new("lightgbm").fit(few.X, few.y, few.X_val, few.y_val, few.meta, few.meta_val)
    with pytest.raises(ValueError, match="needs metadata_train"):
        new("lightgbm").fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val)


def test_a_trainer_passes_stop_on_to_the_model_and_notes_early_stopping_on_validation():
    overrides = dict(stop_on="train_tail", stop_share=0.3, n_rounds=20)
    trainer = Trainer(dict(model="lightgbm", horizon=5, data="in memory", config=overrides), frames())
    trainer.run_full_pipeline()
    assert isinstance(trainer.model, TailEarlyStopping) and trainer.model.config.stop_share == 0.3
    assert early_stopping_note(trainer.model_config) is None

    def config_of(name):
        return Trainer(dict(model=name, horizon=5, data="in memory"), frames()).model_config

    plain = {name: config_of(name) for name in ("lightgbm", "gru", "average", "svm")}
    notes = {name: early_stopping_note(config) for name, config in plain.items()}
    assert notes == dict(lightgbm=EARLY_STOPPING_NOTE, gru=EARLY_STOPPING_NOTE, average=EARLY_STOPPING_NOTE, svm=None)
    older = {k: v for k, v in plain["lightgbm"].items() if k != "stop_on"}
    assert early_stopping_note(older) == EARLY_STOPPING_NOTE
