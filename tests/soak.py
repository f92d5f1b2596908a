"""Injects faults into real grids; the argument is the number of kills: `python tests/soak.py 100`.

Each round starts the same grid with one more seed, and kills a run, its kernel or the grid itself at a random time.
The times are stratified: of n kills, one is in each n-th part of a round. Each three kills have three victims.
After each round: no incomplete folder is listed, no finished run was repeated or changed, and no process remains.
Other faults: a full disk, a folder that cannot be written, a limit on file sizes, kernels that do not start."""

import json
import os
import random
import re
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
VICTIMS = dict(run="modelfactory.runs.engine", kernel="ipykernel", grid="experiment")
TASK = dict(data="planted", model="logistic_regression", preset="quick")  # what the grids train
PATIENCE = 60  # seconds until all processes must have ended; a leftover process would sleep longer
LIMITED = "; ".join(  # runs a command with a limit on file sizes
    [
        "import os, resource, sys",
        "n = int(sys.argv[1])",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))",
        "os.execv(sys.argv[2], sys.argv[2:])",
    ]
)


class NotPossible(Exception):
    "This machine does not permit a fault."


class Grid:
    "A grid in a separate folder, started by the command line; a mark in the environment identifies its processes."

    def __init__(self, folder, task=TASK):
        self.folder, self.runs, self.mark = Path(folder), Path(folder) / "runs", uuid.uuid4().hex
        self.task = task
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, seeds, *args, limit=None, **env):
        "Starts the command with a number of seeds; `limit` is the largest file in bytes."
        file = self.folder / "grid.yaml"
        task = dict(data=self.task["data"], models=[self.task["model"]], preset=self.task["preset"])
        file.write_text(json.dumps(task | dict(horizons=[5], seeds=list(range(seeds)))))
        self.out = open(self.folder / "out.txt", "w+")
        command = [Path(sys.executable).with_name("modelfactory"), "experiment", file]
        command += ["--output", self.runs, "--workers", "2", *args]
        if limit:
            command = [sys.executable, "-c", LIMITED, limit, *command]
        env = os.environ | dict(OMP_NUM_THREADS="1", MODELFACTORY_TRACKING="", SOAK=self.mark) | env
        output = dict(stdout=self.out, stderr=self.out, stdin=subprocess.DEVNULL)
        self.process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=env, start_new_session=True, **output)
        return self

    def end(self, seconds=600):
        "Exit code and output of the command, which has to end within some seconds."
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
        "Living processes of the grid; with `kind`, those of one kind of victim."
        processes = []
        for p in psutil.process_iter():
            try:
                is_alive = p.environ().get("SOAK") == self.mark and p.status() != psutil.STATUS_ZOMBIE
                if is_alive and VICTIMS.get(kind, "") in " ".join(p.cmdline()):
                    processes.append(p)
            except (psutil.Error, OSError):
                pass
        return processes

    def scored_manifests(self):
        "The manifest of each finished and scored run, by its folder."
        manifests = {f.parent.name: f.read_bytes() for f in self.runs.glob(f"[!.]*/{MANIFEST_FILE}")}
        return {name: text for name, text in manifests.items() if json.loads(text)["scored"]}

    def check(self, before):
        "Raises `AssertionError` if a run in `before` changed, a visible run is incomplete, or a process remains."
        until(lambda: not self.processes(), "all processes of the grid to end", PATIENCE)
        visible = [f for f in self.runs.glob("[!.]*") if f.is_dir()]
        runs, after = list_runs(self.runs), self.scored_manifests()
        assert sorted(r.path.name for r in runs) == sorted(f.name for f in visible), "an incomplete folder is visible"
        for r in runs:
            r.verify()
        assert len({r.identity for r in runs}) == len(runs), "a finished run was repeated"
        assert before.items() <= after.items(), "a finished run was changed"


# Kills at random moments ----------------------------------------------------------------------------------------------


def stratified(moments, rng):
    "The kind of victim and the time of each kill; the time is a share of the time in which kills are tried."
    kinds = [kind for _ in range(0, moments, len(VICTIMS)) for kind in rng.sample(list(VICTIMS), len(VICTIMS))]
    shares = [(part + rng.random()) / moments for part in rng.sample(range(moments), moments)]
    return list(zip(kinds, shares, strict=False))


def kill_at_random(grid, moment, kind, seconds, rng, report):
    "One round: starts the grid, kills a victim, checks the result, and returns the kind of the victim."
    before = grid.scored_manifests()
    grid.start(moment + 2)
    with suppress(subprocess.TimeoutExpired):
        grid.process.wait(seconds)
    until(lambda: grid.processes(kind) or grid.process.poll() is not None, f"a {kind}")
    victim = rng.choice(alive) if (alive := grid.processes(kind)) else None
    if victim:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            victim = None
    code, output = grid.end()
    killed, n_scored = kind if victim else "nobody", len(grid.scored_manifests())
    report(f"moment {moment}: {killed} killed, ended with {code}, {n_scored} finished")
    assert "Traceback" not in output, output
    assert code == -signal.SIGKILL if killed == "grid" else code in (0, 1), output
    grid.check(before)
    return killed


def soak(
    moments: int,  # number of kills
    folder: Path,  # empty
    seed: int = 0,
    report=print,  # called with one line for each kill
    task: dict = TASK,
) -> dict:  # victim -> number of kills
    "Kills at `moments` random moments, then lets the grid end."
    resolve_data(task["data"])
    grid, rng, n_killed = Grid(folder, task), random.Random(seed), {}
    start = time.monotonic()
    code, output = grid.start(1).end()
    assert code == 0, output
    max_seconds = (time.monotonic() - start) * 1.3
    for moment, (kind, share) in enumerate(stratified(moments, rng)):
        killed = kill_at_random(grid, moment, kind, share * max_seconds, rng, report)
        n_killed[killed] = n_killed.get(killed, 0) + 1
    before = grid.scored_manifests()
    code, output = grid.start(moments + 1).end()
    assert code == 0 and len(list_runs(grid.runs)) == moments + 1, output
    grid.check(before)
    assert not any((grid.runs / PARTIAL_FOLDER).iterdir()), "an attempt of a dead process was not removed"
    return n_killed


# Other faults ---------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(place, options):
    "A file system in memory; raises `NotPossible` where this user may not mount one."
    Path(place).mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True, timeout=60).returncode:
        raise NotPossible("only root may mount a file system, and not in every container")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True, timeout=60)


def check_failure(grid, code, output):
    "Returns the output of a grid that failed: readable lines, without a traceback, an incomplete run or a process."
    assert code in (1, 2) and "Traceback" not in output and output.strip(), (code, output)
    grid.check({})
    assert grid.scored_manifests() == {}
    for path in re.findall(r"\(see ([^)]+)\)", output):
        assert (grid.runs / path).exists(), f"the path does not exist: {path} in {output}"
    return output


def full_disk(folder, task=TASK, size="48k"):
    "The runs folder is on a disk that is full after a few files; with enough space, the same command works."
    grid = Grid(folder, task)
    with mounted(grid.runs, f"size={size}"):
        output = check_failure(grid, *grid.start(1).end())
    assert "space" in output, output
    code, second_output = grid.start(1).end()
    assert code == 0, second_output
    return output


def limited_files(folder, task=TASK):
    "No file may be larger than 16 KiB, as with a quota; needs no root."
    grid = Grid(folder, task)
    return check_failure(grid, *grid.start(1, limit=16_384).end())


def read_only(folder, task=TASK):
    "The runs folder is on a disk that cannot be written."
    grid = Grid(folder, task)
    with mounted(grid.runs, "ro"):
        output = check_failure(grid, *grid.start(1).end())
    assert "ead-only" in output, output
    return output


def _kernel_environment(folder, code):
    "An environment in which the process of a kernel executes some code before it starts."
    site = Path(folder) / "first"
    site.mkdir(parents=True)
    is_kernel = 'any("ipykernel" in word for word in sys.orig_argv)'
    (site / "sitecustomize.py").write_text(f"import os, sys, time\nif {is_kernel}: {code}\n")
    return dict(PYTHONPATH=os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))


def silent_kernel(folder, task=TASK):
    "A kernel that starts and never answers is ended by its heartbeat or by the time limit of the run."
    grid = Grid(folder, task)
    environment = _kernel_environment(folder, "time.sleep(3600)")
    output = check_failure(grid, *grid.start(1, "--timeout", "15", **environment).end())
    assert "ernel died" in output or "not done after 15 s" in output, output
    return output


def slow_kernel(folder, task=TASK, seconds=8):
    "A kernel that starts slowly, as on a busy machine or a slow disk, is waited for."
    grid = Grid(folder, task)
    code, output = grid.start(1, **_kernel_environment(folder, f"time.sleep({seconds})")).end()
    assert code == 0, output
    grid.check({})
    return output


def dead_kernel(folder, task=TASK):
    "A kernel that ends at its start is started again; after three attempts the grid reports it."
    grid = Grid(folder, task)
    output = check_failure(grid, *grid.start(1, **_kernel_environment(folder, "os._exit(1)")).end())
    assert "ernel died" in output and len(list((grid.runs / FAILED_FOLDER).iterdir())) == 3, output
    return output


FAULTS = full_disk, limited_files, read_only, silent_kernel, slow_kernel, dead_kernel


def main(moments=100, seed=0):
    home = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        print("killed:", soak(moments, home / "killed", seed))
        for fault in FAULTS:
            try:
                print(f"{fault.__name__}: {fault(home / fault.__name__).strip()}")
            except NotPossible as e:
                print(f"{fault.__name__}: NOT TRIED, {e}")
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
