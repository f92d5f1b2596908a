"""Creates .venv with the tested packages: `python tools/environment.py`, called by `make setup`.

Two calls at once wait for each other, because the file .venv.lock is locked. The system releases the lock when a
process ends, however it ends. An interrupted call is continued by the next one: .venv/.done is written last, and
contains the hash of the files that decide which packages are installed. If `uv` is on the path and `make lock` has
written a lock for this system, the packages are those of the lock. Otherwise pip installs torch and uv, and uv the
other packages, which takes a quarter of pip's CPU time; where uv cannot reach an index that pip knows, pip installs
them all.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

VENV, OLDEST_PYTHON = Path(".venv"), (3, 11)
LOCK = Path("locks", f"{sys.platform}-{sys.version_info[0]}.{sys.version_info[1]}.txt")
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OVERRIDES = '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}\n'  # JupyterLab asks no question
SIZES = "the environment takes 3.7 GB with torch for CPUs, 6.7 GB with torch for CUDA"


def wanted_state():
    "The hash of the files that decide which packages are installed."
    texts = [file.read_bytes() for file in (Path("pyproject.toml"), Path("constraints.txt"), LOCK) if file.is_file()]
    return hashlib.sha256(b"\0".join([*texts, sys.version.encode()])).hexdigest()


def lock_file(file):
    "Locks an open file; waits while another process holds the lock."
    if os.name == "nt":
        import msvcrt

        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # gives up after ten seconds
            except OSError:
                pass
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("setup: another process is creating .venv; waiting", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def run_with_progress(command, may_fail=False):
    "Runs a command; prints large downloads and the steps that take long; on failure ends, or returns False."
    last = deque(maxlen=20)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            last.append(line)
            if re.search(
                r"Downloading .*\((\d{2,}(\.\d+)? ?Mi?B|\d+(\.\d+)? ?Gi?B)\)|^ *(Building|Installing coll)", line
            ):
                print("setup:", line.strip()[:160], flush=True)
    if process.returncode and not may_fail:
        sys.exit("".join(last) + "setup: failed; run the same command again to continue")
    return not process.returncode


def install(uv):
    "Installs the packages, and the project in editable form; `uv`: its path if the lock is used, otherwise None."
    target = ["--python", str(PYTHON)]
    if uv:
        run_with_progress([uv, "pip", "sync", *target, "--require-hashes", str(LOCK)])
        run_with_progress([uv, "pip", "install", *target, "--no-deps", "-e", "."])
        return
    pip = [str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", "-c", "constraints.txt"]
    run_with_progress([*pip, "torch", "uv"])
    project = ["-c", "constraints.txt", "-e", ".[dev]"]
    if not run_with_progress([str(PYTHON), "-m", "uv", "pip", "install", *target, *project], may_fail=True):
        print("setup: uv failed; installing with pip", flush=True)
        run_with_progress([*pip, "-e", ".[dev]"])


def main():
    if sys.version_info[:2] < OLDEST_PYTHON:
        sys.exit(f"found Python {sys.version.split()[0]}, expected 3.11 or later: make PYTHON=/path/to/python3.11")
    done = VENV / ".done"
    with open(".venv.lock", "w") as file:
        lock_file(file)
        if done.is_file() and done.read_text() == wanted_state():
            done.touch()
            return
        done.unlink(missing_ok=True)
        print(f"setup: installing about 300 packages; {SIZES}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        install(LOCK.is_file() and shutil.which("uv"))
        overrides = VENV / "share/jupyter/lab/settings/overrides.json"
        overrides.parent.mkdir(parents=True, exist_ok=True)
        overrides.write_text(OVERRIDES)
        done.write_text(wanted_state())


if __name__ == "__main__":
    main()
