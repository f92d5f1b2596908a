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

from modelfactory.models import training_loop
from modelfactory.models.batches import Batches, standardise_windows
from modelfactory.models.conformance import window_task
from modelfactory.models.errors import DivergedError
from modelfactory.models.loading import load_model
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.training_loop import (
    SequenceConfig,
    Training,
    isolated_torch_state,
    parameter_groups,
    pick_device,
)

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_network_that_was_fitted_on_a_gpu_predicts_on_a_cpu(tmp_path):
    model, _ = fitted(max_epochs=2)
    model.save(tmp_path)
    header = json.loads((tmp_path / "model.json").read_text())
    header["config"]["device"] = "cuda"
    (tmp_path / "model.json").write_text(json.dumps(header))
    expected, loaded = (m.predict(TASK.X_val, TASK.meta_val) for m in (model, load_model(tmp_path)))
    assert np.array_equal(loaded.probabilities, expected.probabilities)


def test_label_smoothing_lowers_the_highest_probability():
    (plain, _), (smoothed, _) = fitted(early_stopping=False), fitted(early_stopping=False, label_smoothing=0.4)
    top = [m.predict(TASK.X_val, TASK.meta_val).probabilities.max(1).mean() for m in (plain, smoothed)]
    assert top[1] < top[0] - 0.05


def test_accumulated_batches_equal_one_large_batch():
    sizes = dict(large=(96, 1), parts=(32, 3), other=(20, 3))
    losses = {
        name: fitted(dropout=0.0, max_epochs=2, batch_size=batch_size, accumulate=accumulate)[1]["val_loss"]
        for name, (batch_size, accumulate) in sizes.items()
    }
    np.testing.assert_allclose(losses["parts"], losses["large"], rtol=1e-5)
    assert abs(np.subtract(losses["other"], losses["large"])).max() > 1e-4, "a step of 60 windows is another one"


def test_weight_decay_shrinks_matrices_only():
    from torch import nn

    parts = dict(linear=nn.Linear(2, 3), norm=nn.LayerNorm((4, 5)), batch=nn.BatchNorm1d(3), words=nn.Embedding(4, 2))
    net = nn.ModuleDict(parts | dict(conv=nn.Conv1d(2, 2, 3), frozen=nn.Linear(2, 2).requires_grad_(False)))
    net.position = nn.Parameter(torch.ones(5, 2))
    net.mix = nn.Parameter(torch.ones(1, 1, 7))
    decayed, others = parameter_groups(net, 0.5)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"linear.weight", "conv.weight"}
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {names[id(p)] for p in others["params"]} == trainable - {"linear.weight", "conv.weight"}
    net.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    training = Training(net, SequenceConfig(weight_decay=0.5, learning_rate=0.1), 10)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    training.optimiser.step()
    smaller = {name for name, p in net.named_parameters() if p.norm() < before[name].norm()}
    assert smaller == {"linear.weight", "conv.weight", "frozen.weight"}


class LossOf(Training):
    "A training whose losses are given."

    def __init__(self, losses):
        config = SequenceConfig(batch_size=10, learning_rate=1e-3)
        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 5, 3)), config, 100)
        self.losses_ahead, self.n_done = losses, 0

    def step(self, x, y, w=None):
        self.n_done += 1
        return torch.tensor(self.losses_ahead[self.n_done - 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("device, n_done", [("cpu", 7), ("cuda", 32)])
def test_a_loss_that_is_not_finite_ends_the_epoch(monkeypatch, value, device, n_done):
    training = LossOf([1.0] * 6 + [value] + [1.0] * 53)
    looked_at, isfinite = [], torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: looked_at.append(self) or isfinite(self))
    training.device = device  # on a GPU, each look at a loss waits for it
    monkeypatch.setattr(training_loop, "seed_torch", lambda seed, device: None)
    loss = training.epoch(0, Batches(TASK.X), torch.zeros(600, dtype=torch.long))
    assert training.n_done == n_done and not np.isfinite(loss) and training.has_diverged
    assert training.diverged_at == f"step {n_done} of 60" and len(looked_at) == n_done // (1 if device == "cpu" else 32)


def test_a_diverged_fit_stops_at_the_step_and_says_what_to_lower():
    message = r"learning_rate \(now 1e\+30\) or max_grad_norm \(now 1\); it was found at step [2-4] of 19"
    with pytest.raises(DivergedError, match=message):
        fitted(learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"or set precision to fp32 \(now bf16\)"):
        fitted(learning_rate=1e30, precision="bf16")


def test_a_fit_in_bfloat16_is_near_one_in_float32_and_predicts_in_float32(monkeypatch):
    dtypes, forward = [], training_loop.forward_logits

    def watched(net, x, precision="fp32"):
        logits = forward(net, x, precision)
        dtypes.append((net.training, logits.dtype))
        return logits

    monkeypatch.setattr(training_loop, "forward_logits", watched)
    (_, plain), (model, half) = fitted(dropout=0.0), fitted(dropout=0.0, precision="bf16")
    assert not np.array_equal(plain["val_loss"], half["val_loss"])
    np.testing.assert_allclose(half["val_loss"], plain["val_loss"], atol=0.02)
    assert {(True, torch.bfloat16), (False, torch.bfloat16)} <= set(dtypes)
    dtypes.clear()
    model.predict(TASK.X_val, TASK.meta_val)
    assert set(dtypes) == {(False, torch.float32)}


def test_a_float16_step_scales_its_gradients_and_skips_a_step_that_overflows(monkeypatch):
    monkeypatch.setattr(training_loop, "pick_precision", lambda requested, device: "fp16")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 5, 3))
    training = Training(net, SequenceConfig(learning_rate=1e-3, weight_decay=0.0), 100)
    x, y = torch.as_tensor(TASK.X[:32]), torch.zeros(32, dtype=torch.long)
    before, scale = net[1].weight.detach().clone(), training.scaler.get_scale()
    training.loss = lambda outputs, codes, weight: outputs.sum() * 1e36  # the scaled gradient overflows
    training.step(x, y)
    assert torch.equal(net[1].weight, before) and training.scaler.get_scale() < scale
    training.loss = Training(net, SequenceConfig(), 1).loss
    training.step(x, y)
    assert not torch.equal(net[1].weight, before) and net[1].weight.isfinite().all()
    assert training.state_dict()["scaler"]["scale"] == training.scaler.get_scale()


def test_devices_and_the_generators_that_a_fit_restores(monkeypatch):
    forked = []

    @contextlib.contextmanager
    def fork_rng(devices, device_type):
        forked.append((list(devices), device_type))
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with isolated_torch_state(SequenceConfig(device="cpu")):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with isolated_torch_state(SequenceConfig(device="cuda")):
        pass
    assert forked == [([], "cuda"), ([3], "cuda")]
    assert [pick_device(d) for d in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    with pytest.raises(ValueError, match="device is mps, but torch finds no GPU"):
        pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [pick_device(d) for d in ("auto", "mps")] == ["cpu", "mps"]
    seeded = []
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: seeded.append(seed))
    training_loop.seed_torch(7, "mps")
    assert seeded == [7] and torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))
