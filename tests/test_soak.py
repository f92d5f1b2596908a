"A few of the faults of `soak.py`; `make soak` injects a hundred."

import os
import time

import psutil
import pytest
import soak
from quick import quick_models, small_splits

from modelfactory.runs.run_folder import clear_partial, is_alive, start_attempt

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return dict(data=str(small_splits(tmp_path_factory.mktemp("data") / "small")), model="nearest", preset=None)


@pytest.fixture(autouse=True)
def plugin(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path_factory.mktemp("models")))


def test_kills_at_random_moments(tmp_path, task):
    "One kill in each third of a round; a run, a kernel and a grid."
    n_killed = soak.soak(3, tmp_path, seed=3, task=task)
    assert sum(n_killed.values()) == 3 and set(n_killed) & set(soak.VICTIMS), n_killed


@pytest.mark.parametrize("fault", soak.FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_reported_and_leaves_nothing(fault, tmp_path, task):
    try:
        fault(tmp_path, task)
    except soak.NotPossible as e:
        pytest.skip(f"NOT TRIED: {fault.__name__}: {e}")


@pytest.mark.parametrize("shift", [-(10**9), -3600, 0, 3600, 10**9])
def test_file_times_do_not_decide_whether_a_local_attempt_is_alive(tmp_path, shift):
    """A clock that jumped leaves files with times far in the future or in the past.

    Whether an attempt of this machine is alive depends on its process alone."""
    alive, dead = (start_attempt(tmp_path, dict(model="svm", horizon=horizon)) for horizon in (5, 20))
    (dead / "pid").write_text("999999999 0")
    for attempt in (alive, dead):
        os.utime(attempt / "pid", (time.time() + shift,) * 2)
    assert clear_partial(tmp_path) == [dead.name] and alive.is_dir()


@pytest.mark.parametrize("jump", [-3600, -2, 2, 3600])
def test_a_jump_of_the_clock_does_not_make_a_running_attempt_dead(tmp_path, jump, monkeypatch):
    "The system gives the start of a process as its boot time, which moves with the clock, plus ticks since boot."
    attempt = start_attempt(tmp_path, dict(model="svm", horizon=5))
    boot = psutil.boot_time() + jump
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot)
    if hasattr(psutil._psplatform, "BOOT_TIME"):
        monkeypatch.setattr(psutil._psplatform, "BOOT_TIME", boot)
    assert is_alive(attempt) and clear_partial(tmp_path) == []
