"GPUs are found, shared by the runs of a grid and checked by the boosters; all GPUs in these tests are fake."

import os
import threading
from concurrent.futures import wait
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from conftest import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_models, small_splits

from modelfactory.configuration import ConfigError
from modelfactory.models import devices
from modelfactory.models.conformance import planted_task
from modelfactory.models.params import ModelParams
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs import executors
from modelfactory.runs.engine import Limits, Outcome
from modelfactory.runs.executors import Job, LocalEngine, RayEngine, requested_gpus


@pytest.fixture(autouse=True)
def own_machine(monkeypatch):
    "The machine is asked for its GPUs again in each test, and sets no limit on them."
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    forget = devices.machine_gpus.cache_clear
    forget()
    yield
    forget()


def fake_nvidia_smi(monkeypatch, folder, text, status=0):
    "A program `nvidia-smi` that prints a text comes first in the path."
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n[ -z \"$CUDA_VISIBLE_DEVICES\" ] || exit 9\nprintf '{text}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def cards(n):
    return "".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i}{i})\\n" for i in range(n))


@pytest.mark.parametrize(
    "chosen, expected",
    [(None, ("GPU-00", "GPU-11")), ("1", ("1",)), ("GPU-1,0", ("GPU-1", "0")), ("0,5,1", ("0",)), ("", ()), ("-1", ())],
)
def test_visible_gpus_are_those_of_the_machine_that_the_environment_names(monkeypatch, tmp_path, chosen, expected):
    fake_nvidia_smi(monkeypatch, tmp_path, cards(2))
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert devices.visible_gpus() == expected


def test_a_broken_driver_means_no_gpu(monkeypatch, tmp_path):
    fake_nvidia_smi(monkeypatch, tmp_path, "NVIDIA-SMI has failed", status=9)
    assert devices.visible_gpus() == ()


def test_torch_counts_the_gpus_where_only_the_driver_is_installed(monkeypatch, tmp_path):
    commands = []

    def output(*command):
        commands.append(command[0])
        if command[0] == "nvidia-smi":
            raise FileNotFoundError
        return "a warning of torch\n2\n"

    monkeypatch.setattr(devices, "_output", output)
    monkeypatch.setattr(devices, "DRIVER_FILES", [str(tmp_path / "absent")])
    assert devices.visible_gpus() == () and commands == ["nvidia-smi"]
    devices.machine_gpus.cache_clear()
    monkeypatch.setattr(devices, "DRIVER_FILES", [str(tmp_path)])
    assert devices.visible_gpus() == ("0", "1")


def gpu_job(title, monkeypatch=None, gpus=None, **config):
    if monkeypatch:
        monkeypatch.setattr(executors, "read_params", lambda name: ModelParams(resources=dict(gpus=gpus)))
    return Job(dict(model="gru", horizon=5, data=title, config=config), title)


@pytest.mark.parametrize("gpus", [-1, 1.5, "one", True, float("inf"), float("nan")])
def test_an_impossible_number_of_gpus_is_an_error(monkeypatch, gpus):
    with pytest.raises(ConfigError, match="resources: gpus = .*expected 0, a part of a GPU such as 0.5"):
        requested_gpus(gpu_job("x", monkeypatch, gpus), 1)


def test_requests_of_gpus(monkeypatch):
    assert requested_gpus(gpu_job("x", monkeypatch, 0.3), 2) == Fraction(3, 10)
    assert requested_gpus(gpu_job("x", monkeypatch, 2), 2) == 2
    assert requested_gpus(gpu_job("x", monkeypatch, 2), 0) == 0, "without a GPU, a run with device auto uses the CPU"
    assert requested_gpus(gpu_job("x", monkeypatch, 0, device="cuda"), 2) == 1
    assert requested_gpus(gpu_job("x", monkeypatch, 1, device="cpu"), 2) == 0
    with pytest.raises(ConfigError, match="gpus = 3: more than the 2 of one machine; set gpus to at most 2"):
        requested_gpus(gpu_job("x", monkeypatch, 3), 2)
    with pytest.raises(ConfigError, match="device is cuda, but no GPU is visible"):
        requested_gpus(gpu_job("x", monkeypatch, 1, device="cuda"), 0)


class FakeRuns:
    "Runs that end when the test says so; checks that no GPU is given to more runs than fit on it."

    def __init__(self, shares):
        self.shares, self.lock = shares, threading.Lock()  # title -> number of GPUs
        self.gpus, self.ends, self.started = {}, {}, threading.Semaphore(0)
        self.problems = []

    def __call__(self, job, runs, limits, stop, force):
        title, share = job.identity, self.shares[job.identity]
        with self.lock:
            self.gpus[title] = limits.gpus
            self.ends[title] = threading.Event()
            used = {}
            for name, gpus in self.gpus.items():
                for gpu in gpus or ():
                    used[gpu] = used.get(gpu, 0) + min(self.shares[name], 1)
            if max(used.values(), default=0) > 1 or len(limits.gpus) != np.ceil(float(share)):
                self.problems.append((title, dict(self.gpus)))
        self.started.release()
        assert self.ends[title].wait(PATIENCE)
        with self.lock:
            del self.gpus[title]
        return Outcome(title, "killed" if "0" in title else "ok")


def engine_with(monkeypatch, shares, n_gpus, workers):
    "A local engine on a machine with fake GPUs, and its fake runs."
    runs = FakeRuns(shares)
    monkeypatch.setattr(executors, "visible_gpus", lambda: tuple(f"GPU-{i}" for i in range(n_gpus)))
    monkeypatch.setattr(executors, "requested_gpus", lambda job, n: shares[job.identity])
    monkeypatch.setattr(executors, "run_job", runs)
    return LocalEngine(workers), runs


@given(st.lists(st.sampled_from(["0", "1/4", "1/3", "1/2", "1", "2"]), min_size=1, max_size=9), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_each_run_gets_its_gpus_and_none_is_given_twice(asked, seed):
    with pytest.MonkeyPatch.context() as patch:
        random = Random(seed)
        shares = {f"run {i}": Fraction(n) for i, n in enumerate(asked)}
        engine, runs = engine_with(patch, shares, n_gpus=2, workers=4)
        futures = [engine.submit(gpu_job(title), None, Limits()) for title in shares]
        for _ in shares:
            assert runs.started.acquire(timeout=PATIENCE)
            with runs.lock:
                random.choice([end for end in runs.ends.values() if not end.is_set()]).set()
        assert {f.result(PATIENCE).status for f in futures} <= {"ok", "killed"}
        assert runs.problems == [] and set(engine.gpus.free.values()) == {1} and not engine.running
        engine.end()


def test_a_run_without_a_gpu_does_not_wait_behind_runs_that_wait_for_one(monkeypatch):
    shares = {"first": Fraction(1), "second": Fraction(1), "cpu": Fraction(0)}
    engine, runs = engine_with(monkeypatch, shares, n_gpus=1, workers=2)
    first, second, cpu = (engine.submit(gpu_job(title), None, Limits()) for title in shares)
    assert runs.started.acquire(timeout=PATIENCE) and runs.started.acquire(timeout=PATIENCE)
    assert runs.gpus == {"first": ("GPU-0",), "cpu": ()} and not second.running()
    runs.ends["first"].set()
    assert runs.started.acquire(timeout=PATIENCE) and runs.gpus["second"] == ("GPU-0",)
    third = engine.submit(gpu_job("second"), None, Limits())
    for title in ("second", "cpu"):
        runs.ends[title].set()
    wait([first, second, cpu], PATIENCE)
    assert runs.started.acquire(timeout=PATIENCE)
    runs.ends["second"].set()
    assert third.result(PATIENCE).status == "ok"


def test_the_end_of_an_engine_cancels_runs_that_wait_for_a_gpu(monkeypatch):
    engine, runs = engine_with(monkeypatch, dict.fromkeys(("first", "second"), Fraction(1)), n_gpus=1, workers=2)
    first, second = (engine.submit(gpu_job(title), None, Limits()) for title in ("first", "second"))
    assert runs.started.acquire(timeout=PATIENCE)
    runs.ends["first"].set()
    monkeypatch.setattr(engine, "_start_runs", lambda: None)  # the second run is still in the queue at the end
    engine.end()
    assert first.result(PATIENCE).status == "ok" and second.cancelled()


def test_without_gpus_the_environment_is_left_alone_and_too_many_fail_at_once(monkeypatch, tmp_path):
    limits_seen = []
    monkeypatch.setattr(executors, "run_job", lambda job, runs, limits, *rest: limits_seen.append(limits.gpus))
    monkeypatch.setattr(executors, "visible_gpus", lambda: ())
    LocalEngine(1).submit(gpu_job("auto", monkeypatch, 2), tmp_path, Limits()).result(PATIENCE)
    assert limits_seen == [None]
    monkeypatch.setattr(executors, "visible_gpus", lambda: ("0",))
    outcome = LocalEngine(1).submit(gpu_job("auto", monkeypatch, 2), tmp_path, Limits()).result(PATIENCE)
    assert outcome.status == "failed" and "gpus = 2: more than the 1" in outcome.reason and limits_seen == [None]


@pytest.mark.slow
@pytest.mark.faults
def test_a_gpu_is_free_again_after_its_run_was_killed(monkeypatch, tmp_path):
    fake_nvidia_smi(monkeypatch, tmp_path, cards(1))
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path))
    monkeypatch.setattr(executors, "read_params", lambda name: ModelParams(resources=dict(gpus=1)))
    data, flag = small_splits(tmp_path / "data"), tmp_path / "visible"
    task = dict(model="faulty", horizon=5, data=str(data), preset=None)
    job = Job(task | dict(config=dict(fault="kill kernel", flag=str(flag))), "killed")
    engine = LocalEngine(workers=2)
    outcome = engine.submit(job, tmp_path / "runs", Limits(PATIENCE)).result(PATIENCE)
    assert outcome.status == "killed" and flag.read_text() == "GPU-00", outcome
    assert engine.gpus.free == {"GPU-00": 1}
    engine.end()


class FakeRay:
    "A cluster with two machines that records what a task asks for."

    def __init__(self, *gpus):
        self.machines, self.asked = gpus, []

    def nodes(self):
        return [dict(Alive=True, Resources=dict(CPU=4, **(dict(GPU=n) if n else {}))) for n in self.machines] + [
            dict(Alive=False, Resources=dict(CPU=64, GPU=8))
        ]

    def options(self, **resources):
        self.asked.append(resources)
        return self

    def remote(self, *args):
        self.args = args
        return self

    def future(self):
        return "the future"


def ray_engine(*gpus):
    engine = RayEngine.__new__(RayEngine)
    engine.ray = engine.task = FakeRay(*gpus)
    engine.refs = []
    return engine


@pytest.mark.parametrize(
    "machines, asked, num_gpus", [((0, 0), 1, 0.0), ((1, 2), 0.5, 0.5), ((1, 2), 2, 2.0), ((1, 2), 3, None)]
)
def test_ray_is_asked_for_the_same_gpus_as_the_local_engine(monkeypatch, machines, asked, num_gpus):
    engine = ray_engine(*machines)
    future = engine.submit(gpu_job("x", monkeypatch, asked), "runs", Limits())
    if num_gpus is None:
        assert future.result(0).status == "failed" and "more than the 2 of one machine" in future.result(0).reason
        assert engine.ray.asked == []
    else:
        assert engine.ray.asked == [dict(num_cpus=1, num_gpus=num_gpus, max_retries=3)]
        assert engine.ray.args[-1] == (max(machines) > 0)


BOOSTERS = {
    "xgboost": ("without CUDA", dict(device="cuda")),
    "lightgbm": ("CUDA Tree Learner was not enabled in this build", dict(device_type="cuda")),
    "catboost": ("finds no GPU that it can use", dict(task_type="GPU", devices="0")),
}


def booster(name, **config):
    return ModelRegistry.create(name, dict(n_rounds=3) | config, 5, planted_task(200).features)


@pytest.mark.parametrize("name", BOOSTERS)
def test_a_booster_refuses_a_gpu_that_is_not_there_or_that_its_build_cannot_use(monkeypatch, name):
    import xgboost

    task = planted_task(200)
    fit = task.X, task.y, task.X_val, task.y_val
    with pytest.raises(ValueError, match=f"{name}: device is cuda, but this process sees no GPU; set device to auto"):
        booster(name, device="cuda").fit(*fit)
    monkeypatch.setattr(devices, "machine_gpus", lambda: (("GPU-00",),))
    monkeypatch.setattr(xgboost, "build_info", lambda: dict(USE_CUDA=False))
    with pytest.raises(ValueError, match=f"{name}: device is cuda, but .*{BOOSTERS[name][0]}.*set device to auto"):
        booster(name, device="cuda").fit(*fit)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="sees no GPU .CUDA_VISIBLE_DEVICES is ''."):
        booster(name, device="cuda").fit(*fit)


@pytest.mark.parametrize("name", BOOSTERS)
def test_a_booster_uses_a_gpu_where_it_can(monkeypatch, name):
    family = type(booster(name)).__module__
    parameters = {device: booster(name, device=device).parameters() for device in ("auto", "cpu")}
    assert parameters["auto"] == parameters["cpu"], "without a GPU, auto is the CPU"
    monkeypatch.setattr(devices, "machine_gpus", lambda: (("GPU-00",),))
    monkeypatch.setattr(f"{family}._build_problem", lambda: "")
    expected = BOOSTERS[name][1]
    for device in ("auto", "cuda"):
        parameters = booster(name, device=device).parameters()
        assert {k: parameters[k] for k in expected} == expected and "rsm" not in parameters
    assert booster(name).parameters() == booster(name, device="cpu").parameters()


def test_an_unknown_device_is_an_error():
    for name in BOOSTERS:
        with pytest.raises(ConfigError, match="device = 'gpu'"):
            booster(name, device="gpu")
