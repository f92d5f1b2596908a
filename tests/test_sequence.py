"The training loop of networks: resumed after a kill, on a device, compiled, and without effects on global state."

import contextlib
import json
import random
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import finish, until
from forks import Forks

from modelfactory.models.batches import Batches, standardise_windows
from modelfactory.models.conformance import window_task
from modelfactory.models.registry import ModelRegistry

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SMALL = dict(sequence_length=16, hidden_size=8, n_layers=1, max_epochs=6, batch_size=32, learning_rate=1e-2)
TASK = window_task("trend", n=600)

IMPORTS = """
import numpy, torch
import modelfactory.models.callbacks, modelfactory.models.conformance
from modelfactory.models.registry import ModelRegistry
ModelRegistry.discover()
"""
FIT = """
import json, sys
from pathlib import Path
import numpy as np
from modelfactory.models.callbacks import Checkpoint
from modelfactory.models.conformance import window_task
from modelfactory.models.registry import ModelRegistry
config, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
t = window_task("trend", n=600)
model = ModelRegistry.create("gru", config, 5, t.features)
model.callbacks = [Checkpoint(folder, every=1, resume=True)]
Path(sys.argv[4]).touch()
history = model.fit(t.X, t.y, t.X_val, t.y_val)
np.savez(out, probabilities=model.predict(t.X_val, t.meta_val).probabilities, **history)
"""


def fitted(**config):
    model = ModelRegistry.create("gru", SMALL | config, 5, TASK.features)
    return model, model.fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val)


@pytest.fixture(scope="module")
def forks():
    forks = Forks(IMPORTS)
    yield forks
    forks.close()


def fit_in_a_process(forks, folder, out, kill_after=None):
    ready = out.with_name("ready")
    ready.unlink(missing_ok=True)
    process = forks(FIT, json.dumps(SMALL), folder, out, ready)
    until(lambda: ready.exists() or process.poll() is not None, "the process to start its fit")
    if kill_after is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(kill_after)
        process.kill()
    output = finish(process)
    assert process.returncode in ([0] if kill_after is None else [0, -signal.SIGKILL]), output


def test_a_fit_killed_at_random_times_and_resumed_equals_an_uninterrupted_fit(forks, tmp_path):
    fit_in_a_process(forks, tmp_path / "uninterrupted", tmp_path / "uninterrupted.npz")
    rng = random.Random(1)
    for _ in range(5):
        fit_in_a_process(forks, tmp_path / "killed", tmp_path / "killed.npz", rng.uniform(0.02, 0.6))
    fit_in_a_process(forks, tmp_path / "killed", tmp_path / "killed.npz")
    uninterrupted, killed = (np.load(tmp_path / f"{name}.npz") for name in ("uninterrupted", "killed"))
    for name in uninterrupted:
        np.testing.assert_array_equal(uninterrupted[name], killed[name], err_msg=name)
    assert [f.name for f in (tmp_path / "killed").glob("round_*")] == ["round_6"]


def test_batches_made_on_a_device_equal_batches_of_the_cpu_buffer():
    windows = standardise_windows(TASK.X, np.zeros(5, np.float32), np.ones(5, np.float32))
    idx = np.array([5, 599, 0, 5])
    assert torch.equal(Batches(windows, "cpu:0").take(idx), Batches(windows, "cpu").take(idx))


def test_a_window_of_one_row():
    rows = TASK.X[:][:, -1]
    model = ModelRegistry.create("gru", SMALL | dict(sequence_length=1), 5, TASK.features)
    model.fit(rows, TASK.y, rows, TASK.y)
    assert len(model.predict(rows, TASK.meta)) == 600


def test_a_compiled_network_has_the_same_losses(monkeypatch):
    compiled_networks, compile = [], torch.compile

    def compile_eager(net):
        compiled_networks.append(net)
        return compile(net, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eager)
    (_, plain), (model, compiled) = fitted(), fitted(compile=True)
    np.testing.assert_allclose(plain["val_loss"], compiled["val_loss"], rtol=1e-5)
    assert compiled_networks and not any("_orig_mod" in name for name in model.net.state_dict())


def test_a_fit_restores_random_generator_and_threads():
    torch.manual_seed(7)
    expected, threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(7)
    fitted(max_epochs=1, threads=threads + 1)
    assert torch.equal(torch.rand(1), expected) and torch.get_num_threads() == threads


def test_predictions_do_not_depend_on_the_batch_size():
    model, _ = fitted(max_epochs=2)
    expected = model.predict(TASK.X_val, TASK.meta_val).probabilities
    model.config.batch_size = 7
    np.testing.assert_allclose(model.predict(TASK.X_val, TASK.meta_val).probabilities, expected, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_an_error():
    with pytest.raises(ValueError, match="device is cuda, but torch finds no GPU"):
        fitted(device="cuda")


def test_label_smoothing_lowers_the_highest_probability():
    (plain, _), (smoothed, _) = fitted(early_stopping=False), fitted(early_stopping=False, label_smoothing=0.4)
    top = [m.predict(TASK.X_val, TASK.meta_val).probabilities.max(1).mean() for m in (plain, smoothed)]
    assert top[1] < top[0] - 0.05
