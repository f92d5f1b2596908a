"""Creates .venv with the tested packages: `python tools/environment.py`, called by `make setup`.

Two calls at once wait for each other, because the file .venv.lock is locked. The system releases the lock when a
process ends, however it ends. An interrupted call is continued by the next one: .venv/.done is written last, and
contains the hash of the files that decide which packages are installed. pip installs torch and uv, and uv the other
packages, which takes a quarter of pip's CPU time; where uv cannot reach an index that pip knows, pip installs them all.
If lock.txt exists, only files with its hashes are installed. It does not contain torch, whose builds for CPUs and for
CUDA differ. A lock without a version of constraints.txt is older than that file, and is not used.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

VENV, OLDEST_PYTHON = Path(".venv"), (3, 11)
CONSTRAINTS, LOCK = Path("constraints.txt"), Path("lock.txt")
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OVERRIDES = '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}\n'  # JupyterLab asks no question
SIZES = "the environment takes 3.7 GB with torch for CPUs, 6.7 GB with torch for CUDA"


def wanted_state():
    "The hash of the files that decide which packages are installed."
    texts = [file.read_bytes() for file in (Path("pyproject.toml"), CONSTRAINTS, LOCK) if file.is_file()]
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


def is_current(lock):
    "Whether a lock exists and has the versions of constraints.txt; reports a lock that has another version."
    if not lock.is_file():
        return False
    locked, tested = (dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", f.read_text(), re.M)) for f in (lock, CONSTRAINTS))
    tested = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in tested.items()}
    changed = [name for name, version in locked.items() if tested.get(name, version) != version]
    if changed:
        print(f"setup: {lock} is not used: {', '.join(changed)} differ in {CONSTRAINTS}; make lock", flush=True)
    return not changed


def install():
    "Installs torch and uv, then the other packages, and the project in editable form."
    pip = [str(PYTHON), "-m", "pip", "install", "--progress-bar", "off"]
    uv = [str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON)]
    run_with_progress([*pip, "-c", str(CONSTRAINTS), "torch", "uv"])
    locked = [["--require-hashes", "--no-deps", "-r", str(LOCK)]] if is_current(LOCK) else []
    for step in [*locked, ["-c", str(CONSTRAINTS), "-e", ".[dev]"]]:
        if not run_with_progress([*uv, *step], may_fail=True):
            print("setup: uv failed; installing with pip", flush=True)
            run_with_progress([*pip, *step])


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
        install()
        overrides = VENV / "share/jupyter/lab/settings/overrides.json"
        overrides.parent.mkdir(parents=True, exist_ok=True)
        overrides.write_text(OVERRIDES)
        done.write_text(wanted_state())


if __name__ == "__main__":
    main()
