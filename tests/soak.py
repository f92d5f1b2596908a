"""Faults injected into real grids, as often as asked: `python tests/soak.py 100`.

Each moment starts the same grid, one seed longer than before, and kills a run, its kernel or the grid itself at a random time. After each: no half folder is listed, no finished
run was made again or changed, no process is left after five seconds. Then a disk that is full, a folder that cannot be written, a file size limit, kernels that never start."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from conftest import until

from modelfactory.data.bundled import resolve_data
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import FAILED_FOLDER, MANIFEST_FILE, PARTIAL_FOLDER

ROOT = Path(__file__).resolve().parents[1]
VICTIMS = dict(run="modelfactory.runs.engine", kernel="ipykernel_launcher", grid="experiment")
PATIENCE = 60  # seconds until no process may be left; what is left would sleep for longer
LIMITED = "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); os.execv(sys.argv[2], sys.argv[2:])"


class Cannot(Exception):
    "A fault that this machine does not allow to be made."


class Grid:
    "A grid in a folder of its own, started as a person would; its processes are known by a mark in their environment."

    def __init__(self, folder):
        self.folder, self.runs, self.mark = Path(folder), Path(folder) / "runs", uuid.uuid4().hex
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, seeds, *args, limit=None, **env):
        (self.folder / "grid.yaml").write_text(
            f"data: planted\nmodels: [logistic_regression]\nhorizons: [5]\nseeds: {list(range(seeds))}\npreset: quick\n"
        )
        self.out = open(self.folder / "out.txt", "w+")
        command = [
            Path(sys.executable).with_name("modelfactory"),
            "experiment",
            self.folder / "grid.yaml",
            "--output",
            self.runs,
            "--workers",
            "2",
            *args,
        ]
        if limit:
            command = [sys.executable, "-c", LIMITED, limit, *command]
        env = os.environ | dict(OMP_NUM_THREADS="1", MODELFACTORY_TRACKING="", SOAK=self.mark) | env
        output = dict(stdout=self.out, stderr=self.out, stdin=subprocess.DEVNULL)
        self.process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=env, start_new_session=True, **output)
        return self

    def end(self, seconds=600):
        "Exit code and what was said."
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for p in self.processes():
                p.kill()
            self.out.seek(0)
            raise AssertionError(f"the grid did not end within {seconds} s; it wrote {self.out.read()}") from None
        self.out.seek(0)
        return code, self.out.read()

    def processes(self, kind=""):
        "Those alive that carry the mark; of a kind of victim."
        found = []
        for p in psutil.process_iter():
            try:
                if (
                    p.environ().get("SOAK") == self.mark
                    and p.status() != psutil.STATUS_ZOMBIE
                    and VICTIMS.get(kind, "") in " ".join(p.cmdline())
                ):
                    found.append(p)
            except (psutil.Error, OSError):
                pass
        return found

    def photograph(self):
        "What is finished and scored: folder -> its manifest."
        manifests = {f.parent.name: f.read_bytes() for f in self.runs.glob(f"[!.]*/{MANIFEST_FILE}")}
        return {name: text for name, text in manifests.items() if json.loads(text)["scored"]}

    def check(self, before):
        "Raises `AssertionError` unless what was there is as it was, all that shows is whole, and nothing lives on."
        until(lambda: not self.processes(), "all processes of the grid to end", PATIENCE)
        shown = [f for f in self.runs.glob("[!.]*") if f.is_dir()]
        runs, now = list_runs(self.runs), self.photograph()
        assert sorted(r.path.name for r in runs) == sorted(f.name for f in shown), "a half folder is listed"
        for r in runs:
            r.verify()
        assert len({r.identity for r in runs}) == len(runs), "a finished run was repeated"
        assert before.items() <= now.items(), "a finished run was changed"


# Killed at random moments -------------------------------------------------------------------------------------------------------


def kill_at_random(grid, moment, rng, whole, say):
    "One moment: the grid is started, a victim falls, and what is left is looked at."
    before, kind = grid.photograph(), rng.choice(list(VICTIMS))
    grid.start(moment + 2)
    with suppress(subprocess.TimeoutExpired):
        grid.process.wait(rng.uniform(0, whole))
    until(lambda: grid.processes(kind) or grid.process.poll() is not None, f"a {kind}")
    hit = rng.choice(alive) if (alive := grid.processes(kind)) else None
    if hit:
        try:
            hit.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            hit = None
    code, said = grid.end()
    say(f"moment {moment}: {kind if hit else 'nobody'} killed, ended with {code}, {len(grid.photograph())} finished")
    assert "Traceback" not in said, said
    assert code == -signal.SIGKILL if kind == "grid" and hit else code in (0, 1), said
    grid.check(before)
    return kind if hit else "nobody"


def soak(
    moments: int,  # kills
    folder: Path,  # an empty one
    seed: int = 0,
    say=print,
) -> dict:  # victim -> how often
    "Kills at `moments` random moments, then lets the grid end."
    resolve_data("planted")
    grid, rng, fallen = Grid(folder), random.Random(seed), {}
    start = time.monotonic()
    code, said = grid.start(1).end()
    assert code == 0, said
    whole = (time.monotonic() - start) * 1.3
    for moment in range(moments):
        victim = kill_at_random(grid, moment, rng, whole, say)
        fallen[victim] = fallen.get(victim, 0) + 1
    before = grid.photograph()
    code, said = grid.start(moments + 1).end()
    assert code == 0 and len(list_runs(grid.runs)) == moments + 1, said
    grid.check(before)
    assert not any((grid.runs / PARTIAL_FOLDER).iterdir()), "an attempt of a dead process was not cleared"
    return fallen


# What else goes wrong -----------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(place, options):
    "A file system in memory, where this user may mount one."
    Path(place).mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True, timeout=60).returncode:
        raise Cannot("only root may mount a file system, and not in every container")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True, timeout=60)


def told(grid, code, said):
    "A failure is lines of text that a person can read, leaves nothing half done and nothing alive."
    assert code in (1, 2) and "Traceback" not in said and said.strip(), (code, said)
    grid.check({})
    assert grid.photograph() == {}
    for line in said.splitlines():
        if "(see " in line:
            assert Path(line.rpartition("(see ")[2].rstrip(")")).exists(), f"what it points to is not there: {line}"
    return said


def full_disk(folder, size="48k"):
    "The runs folder is on a disk that is full after a few files; with room, the same command works."
    grid = Grid(folder)
    with mounted(grid.runs, f"size={size}"):
        said = told(grid, *grid.start(1).end())
    assert "space" in said, said
    code, after = grid.start(1).end()
    assert code == 0, after
    return said


def limited_files(folder):
    "No file may be larger than 16 kB: what a quota does, without root."
    grid = Grid(folder)
    return told(grid, *grid.start(1, limit=16_384).end())


def read_only(folder):
    "The runs folder is on a disk that cannot be written."
    grid = Grid(folder)
    with mounted(grid.runs, "ro"):
        said = told(grid, *grid.start(1).end())
    assert "ead-only" in said, said
    return said


def _kernel(folder, code):
    "The environment in which the process of a kernel executes some code first."
    place = Path(folder) / "first"
    place.mkdir(parents=True)
    is_kernel = 'any("ipykernel_launcher" in word for word in sys.orig_argv)'
    (place / "sitecustomize.py").write_text(f"import os, sys, time\nif {is_kernel}: {code}\n")
    return dict(PYTHONPATH=os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")])))


def silent_kernel(folder):
    "A kernel that is started and never answers: given up by its heartbeat, or by the limit of the run."
    grid = Grid(folder)
    said = told(grid, *grid.start(1, "--timeout", "15", **_kernel(folder, "time.sleep(3600)")).end())
    assert "ernel died" in said or "not done after 15 s" in said, said
    return said


def slow_kernel(folder, seconds=8):
    "A kernel that takes its time to start, as on a busy machine or a slow disk, is waited for."
    grid = Grid(folder)
    code, said = grid.start(1, **_kernel(folder, f"time.sleep({seconds})")).end()
    assert code == 0, said
    grid.check({})
    return said


def dead_kernel(folder):
    "A kernel that ends as soon as it is started: tried again, then said."
    grid = Grid(folder)
    said = told(grid, *grid.start(1, **_kernel(folder, "os._exit(1)")).end())
    assert "ernel died" in said and len(list((grid.runs / FAILED_FOLDER).iterdir())) == 3, said
    return said


FAULTS = full_disk, limited_files, read_only, silent_kernel, slow_kernel, dead_kernel


def main(moments=100, seed=0):
    home = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        print("killed:", soak(moments, home / "killed", seed))
        for fault in FAULTS:
            try:
                print(f"{fault.__name__}: {fault(home / fault.__name__).strip()}")
            except Cannot as e:
                print(f"{fault.__name__}: NOT TRIED, {e}")
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
