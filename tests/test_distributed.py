"A fit of one network by two processes equals that of one process."

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, finish
from quick import small_splits
from typer.testing import CliRunner

from modelfactory.cli import app
from modelfactory.models.callbacks import Callback, Checkpoint
from modelfactory.training.trainer import Trainer

CONFIG = dict(sequence_length=8, hidden_size=8, n_layers=1, max_epochs=12, patience=2, learning_rate=0.01)
CONFIG |= dict(dropout=0.0, batch_size=50, accumulate=2)


class EndAfterFirst(Callback):
    def on_epoch_end(self, model, epoch, logs):
        return True


def trained(data, *callbacks):
    trainer = Trainer(dict(model="gru", horizon=5, data=str(data), config=CONFIG), callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.fixture
def environment(monkeypatch):
    "The variables that torchrun sets for the first of two processes."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    values = dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    for name, value in (values | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))).items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_resumed_fit_of_two_processes_equals_an_uninterrupted_one_of_one_process(tmp_path, environment, monkeypatch):
    data = small_splits(tmp_path / "data")
    with monkeypatch.context() as m:
        m.delenv("TORCHELASTIC_RUN_ID")
        alone = trained(data)
        trained(data, Checkpoint(tmp_path / "saved", every=1), EndAfterFirst())
    assert 2 < len(alone.history["val_loss"]) < CONFIG["max_epochs"], "early stopping ends this fit"
    words = ["train", "--model", "gru", "--horizon", "5", "--data", str(data), "--output", str(tmp_path / "runs")]
    second = subprocess.Popen(
        [sys.executable, "-m", "modelfactory", *words, *(f"--set={key}={value}" for key, value in CONFIG.items())],
        cwd=ROOT,
        env=os.environ | dict(RANK="1", LOCAL_RANK="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    together = trained(data, Checkpoint(tmp_path / "saved", every=1, resume=True))
    output, _ = finish(second)
    assert second.returncode == 0, output
    assert not (tmp_path / "runs").exists(), "only the first process publishes"
    assert torch.distributed.get_world_size() == 2
    for name in ("train_loss", "val_loss"):
        np.testing.assert_allclose(together.history[name], alone.history[name], rtol=1e-5)
    assert together.history["best_round"] == alone.history["best_round"]
    p, expected = together.predict().probabilities, alone.predict().probabilities
    np.testing.assert_allclose(p, expected, atol=1e-6)
    assert together.history != alone.history, "sums in another order are not equal bit for bit"


@pytest.mark.parametrize(
    "words, message",
    [
        (["experiment", "demo"], "torchrun can start `train`, not `experiment`"),
        (["train", "--model", "svm", "--horizon", "5", "--data", "planted"], "only networks can use more than one"),
    ],
)
def test_torchrun_starts_only_fits_of_networks(environment, words, message):
    result = CliRunner().invoke(app, words)
    assert result.exit_code and message in result.output + str(result.exception)
