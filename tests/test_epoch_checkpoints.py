"A network whose process is killed goes on from its last epoch with the same grid command."

import os
import time

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from quick import small_splits

from modelfactory.models import callbacks
from modelfactory.models.callbacks import Callback
from modelfactory.runs.attempt import checkpoint_fit, publish_fitted
from modelfactory.runs.grid import run_grid
from modelfactory.runs.run import load_run
from modelfactory.runs.run_folder import (
    CHECKPOINT_DAYS,
    CHECKPOINT_PREFIX,
    PARTIAL_FOLDER,
    UNSCORED,
    clear_partial,
    start_attempt,
)
from modelfactory.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.faults]

PLUGIN = """
import os, signal
from dataclasses import dataclass
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.sequence import SequenceClassifier, SequenceConfig, functional_module

@dataclass
class LinearConfig(SequenceConfig):
    flag: str = ""

@ModelRegistry.register("linear_killed_once", family="examples")
class LinearKilledOnce(SequenceClassifier):
    "A linear network whose process is killed in its third epoch unless the file `flag` exists."
    Config = LinearConfig

    def backbone(self, T, F, n_classes, c):
        from torch import nn
        return functional_module(lambda net, x: net.head(net.dropout(x.flatten(1))), dropout=nn.Dropout(0.3),
                                 head=nn.Linear(T * F, n_classes))

    def loss(self, outputs, codes, weight=None):
        if len(self.training.losses["val_loss"]) == 2 and not os.path.exists(self.config.flag):
            open(self.config.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(outputs, codes, weight)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    "A network that is killed once; the training notebook ends when the run is published, because scores take long."
    (tmp_path / "killed_once.py").write_text(PLUGIN)
    notebook = nbformat.read(ROOT / "nbs/train.ipynb", 4)
    last = next(i for i, cell in enumerate(notebook.cells) if "publish_fitted(trainer" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks/train.ipynb")
    monkeypatch.setenv("MODELFACTORY_NOTEBOOKS", str(tmp_path / "notebooks"))
    monkeypatch.setenv("MODELFACTORY_PLUGINS", str(tmp_path / "killed_once.py"))
    return "linear_killed_once"


def checkpoints(runs):
    return [folder.name for folder in (runs / PARTIAL_FOLDER).glob(".fit_*/round_*")]


def test_a_killed_network_goes_on_from_its_last_epoch_with_the_same_grid(tmp_path, plugin):
    data, runs = str(small_splits(tmp_path / "data")), tmp_path / "runs"
    config = dict(sequence_length=8, max_epochs=6, batch_size=32, flag=str(tmp_path / "flag"))
    grid = dict(data=data, models=[plugin], horizons=[5], seeds=[1], overrides={plugin: config})
    assert [o.status for o in run_grid(grid, runs)] == ["killed"]
    (last,) = checkpoints(runs)
    assert clear_partial(runs) == [] and checkpoints(runs) == [last]
    (outcome,) = run_grid(grid, runs)
    assert outcome.status == UNSCORED and not checkpoints(runs) and list((runs / PARTIAL_FOLDER).iterdir()) == []
    run = load_run(outcome.path)
    assert f"goes on after epoch {last[6:]} of at most 6" in (run.path / "train.ipynb").read_text()
    uninterrupted = Trainer(dict(model=plugin, horizon=5, data=data, seed=1, config=config))
    assert uninterrupted.train() == run.history
    val, expected = uninterrupted.datasets["val"], uninterrupted.predict().probabilities
    assert np.array_equal(run.model().predict(val.X, val.metadata).probabilities, expected)


class Ended(Exception):
    pass


class EndAfter(Callback):
    def __init__(self, epoch):
        self.last = epoch

    def on_epoch_end(self, model, epoch, logs):
        if epoch + 1 == self.last:
            raise Ended


SMALL = dict(sequence_length=4, hidden_size=4, n_layers=1, max_epochs=6, patience=2, learning_rate=0.1)


def attempt_of(data, runs, end_after=None, **config):
    "A trainer after an attempt with checkpoints, and the folder of the attempt."
    trainer = Trainer(dict(model="gru", horizon=5, data=data, config=SMALL | config))
    attempt = start_attempt(runs, dict(model="gru", horizon=5))
    checkpoint_fit(trainer, attempt)
    trainer.callbacks[0].max_share = None
    if end_after:
        trainer.callbacks.append(EndAfter(end_after))
        with pytest.raises(Ended):
            trainer.train()
    else:
        trainer.train()
    trainer.callbacks[0].lock.release()  # as at the end of its process
    return trainer, attempt


def test_only_an_attempt_of_the_same_run_goes_on_and_a_damaged_checkpoint_costs_only_time(tmp_path, capsys):
    data, runs = str(small_splits(tmp_path / "data")), tmp_path / "runs"
    expected = Trainer(dict(model="gru", horizon=5, data=data, config=SMALL)).train()
    assert len(expected["val_loss"]) < SMALL["max_epochs"], "early stopping ends this fit"
    attempt_of(data, runs, end_after=2)
    attempt_of(data, runs, dropout=0.2)
    assert "goes on" not in capsys.readouterr().out
    trainer, _ = attempt_of(data, runs)
    assert "goes on after epoch 2 of at most 6" in capsys.readouterr().out and trainer.history == expected
    trainer, attempt = attempt_of(data, runs)  # killed between its last epoch and its publication
    assert f"goes on after epoch {len(expected['val_loss'])}" in capsys.readouterr().out
    assert trainer.history == expected
    for name, fault in (("training.json", b"{"), ("training.safetensors", b"half")):
        for folder in (runs / PARTIAL_FOLDER).glob(".fit_*/round_*"):
            (folder / name).write_bytes(fault)
        trainer, attempt = attempt_of(data, runs)
        assert "starts again, because its checkpoint cannot be read" in capsys.readouterr().out
        assert trainer.history == expected
    publish_fitted(trainer, attempt)
    assert len(checkpoints(runs)) == 1, "those of the other config stay"


def test_checkpoints_are_off_with_0_and_for_other_models(tmp_path):
    data, runs = str(small_splits(tmp_path / "data")), tmp_path / "runs"
    attempt_of(data, runs, checkpoint_every=0, max_epochs=2)
    assert not checkpoints(runs)


def test_a_checkpoint_that_cannot_be_written_does_not_cost_the_fit(tmp_path, capsys, monkeypatch):
    data, runs = str(small_splits(tmp_path / "data")), tmp_path / "runs"

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(callbacks.Checkpoint, "_write", fail)
    trainer, _ = attempt_of(data, runs, max_epochs=2)
    assert len(trainer.history["val_loss"]) == 2 and not checkpoints(runs)
    assert capsys.readouterr().out.count("no further checkpoints, because one cannot be written") == 1


def test_checkpoints_are_written_less_often_if_they_take_too_much_of_the_time(tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])

    def write(model, epoch):
        written.append(epoch + 1)
        now[0] += 1

    checkpoint = callbacks.Checkpoint(tmp_path, every=1, max_share=0.02)
    checkpoint._write = write
    checkpoint.on_fit_start(None, 400)
    for epoch in range(400):
        now[0] += 1
        checkpoint.on_epoch_end(None, epoch, {})
    assert written[:3] == [1, 99, 148] and len(written) / now[0] <= 0.02


def test_old_checkpoints_are_removed(tmp_path):
    old, new = (tmp_path / PARTIAL_FOLDER / f"{CHECKPOINT_PREFIX}{name}" for name in ("old", "new"))
    for folder, days in ((old, CHECKPOINT_DAYS + 1), (new, CHECKPOINT_DAYS - 1)):
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - days * 86_400,) * 2)
    assert clear_partial(tmp_path) == [old.name] and new.is_dir()


@pytest.mark.parametrize(
    "model, config",
    [
        ("catboost", dict(n_rounds=2)),
        ("average", dict(members=dict(catboost=dict(n_rounds=2)))),
        ("lightgbm", dict(n_rounds=2, monotone=dict(pub_state_a=1))),
    ],
)
def test_models_without_epochs_are_fitted_as_without_checkpoints(tmp_path, model, config):
    "CatBoost and monotone boosters refuse a callback that saves the model during the fit, alone and in an ensemble."
    trainer = Trainer(dict(model=model, horizon=5, data=str(small_splits(tmp_path / "data")), config=config))
    trainer.prepare_data()
    checkpoint_fit(trainer, tmp_path / PARTIAL_FOLDER / "attempt")
    trainer.train()
    assert trainer.model.fitted and checkpoints(tmp_path) == []
