"A handful of the faults of `soak.py`; `make soak` makes a hundred."

import os
import time

import psutil
import pytest
import soak

from modelfactory.runs.run_folder import clear_partial, is_alive, start_attempt


def test_random_moments(tmp_path):
    fallen = soak.soak(3, tmp_path, seed=3)
    assert sum(fallen.values()) == 3 and set(fallen) & set(soak.VICTIMS), fallen


@pytest.mark.parametrize("fault", soak.FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_told_and_leaves_nothing(fault, tmp_path):
    try:
        fault(tmp_path)
    except soak.Cannot as e:
        pytest.skip(f"NOT TRIED: {fault.__name__}: {e}")


@pytest.mark.parametrize("moved", [-(10**9), -3600, 0, 3600, 10**9])
def test_times_of_files_do_not_say_who_lives(tmp_path, moved):
    "A clock that jumped leaves files from the future or from long ago; a claim of this machine is judged by its process."
    mine, dead = start_attempt(tmp_path, "svm", 5), start_attempt(tmp_path, "svm", 20)
    (dead / "pid").write_text("999999999 0")
    for attempt in (mine, dead):
        os.utime(attempt / "pid", (time.time() + moved,) * 2)
    assert clear_partial(tmp_path) == [dead.name] and mine.is_dir()


@pytest.mark.parametrize("jump", [-3600, -2, 2, 3600])
def test_a_clock_that_jumps_does_not_make_a_living_run_dead(tmp_path, jump, monkeypatch):
    "The system says when a process started as the time of its boot, which moves with the clock, and the ticks since."
    attempt = start_attempt(tmp_path, "svm", 5)
    boot = psutil.boot_time() + jump
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot)
    if hasattr(psutil._psplatform, "BOOT_TIME"):
        monkeypatch.setattr(psutil._psplatform, "BOOT_TIME", boot)
    assert is_alive(attempt) and clear_partial(tmp_path) == []
