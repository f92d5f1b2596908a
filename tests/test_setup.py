"The script behind `make setup`, with a pip and a uv that write what they do into a file."

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT, finish, read_line, until

VENV = """
import sys
from pathlib import Path
folder = Path(sys.argv[1], "bin")
folder.mkdir(parents=True, exist_ok=True)
(folder / "python").exists() or (folder / "python").symlink_to(sys.executable)
"""
PIP = """
import sys, time
from pathlib import Path
HASHED = {"--require-hashes"}.intersection(sys.argv)
with open("calls", "a") as log:
    print("start", *sys.argv[1:3], *HASHED, file=log)
while not Path("release").exists():
    time.sleep(0.05)
print("Downloading torch-1-any.whl (900.5 MB)", "Downloading six-1-any.whl (11 kB)", sep="\\n")
if Path("broken").exists():
    sys.exit("ERROR: no matching distribution")
with open("calls", "a") as log:
    print("end", file=log)
"""
UV = """
import sys
from pathlib import Path
HASHED = {"--require-hashes"}.intersection(sys.argv)
with open("calls", "a") as log:
    print("uv", *sys.argv[1:3], *HASHED, file=log)
sys.exit(Path("no index").exists())
"""
INSTALLED = ["start install --progress-bar", "end", "uv pip install"]
UV_LOCK, PIP_LOCK = "uv pip install --require-hashes", "start install --progress-bar --require-hashes"


@pytest.fixture
def project(tmp_path):
    "A folder with the files that setup reads, and modules that are imported instead of the real venv, pip and uv."
    for name in ("pyproject.toml", "constraints.txt", "tools"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for name, code in dict(venv=VENV, pip=PIP, uv=UV).items():
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").touch()
        (tmp_path / "fake" / name / "__main__.py").write_text(code)
    return tmp_path


def start(project, path=""):
    environment = os.environ | dict(PYTHONPATH=str(project / "fake"), PATH=path)
    command = [sys.executable, "tools/environment.py"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen(command, cwd=project, env=environment, **options)


def calls(project):
    file = project / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_two_setups_at_once_install_once_and_a_third_has_nothing_to_do(project):
    first = start(project)
    until(lambda: calls(project), "the first pip")
    second = start(project)
    assert "waiting" in read_line(second)
    (project / "release").touch()
    output = finish(first)[0]
    assert "3.7 GB" in output and "torch-1-any.whl (900.5 MB)" in output and "six" not in output
    finish(second)
    finish(third := start(project))
    assert (first.returncode, second.returncode, third.returncode) == (0, 0, 0)
    assert calls(project) == INSTALLED and (project / ".venv/.done").is_file()


def test_a_killed_setup_is_continued_and_a_failed_one_says_why(project):
    killed = start(project)
    until(lambda: calls(project), "pip")
    os.killpg(killed.pid, 9)
    finish(killed)
    assert not (project / ".venv/.done").exists()
    (project / "release").touch()
    (project / "broken").touch()
    failed = start(project)
    assert re.search("no matching distribution.*run the same command again", finish(failed)[0], re.S)
    assert failed.returncode == 1 and not (project / ".venv/.done").exists()
    (project / "broken").unlink()
    finish(again := start(project))
    assert again.returncode == 0 and calls(project)[-3:] == INSTALLED


def test_changed_constraints_install_again(project):
    (project / "release").touch()
    finish(start(project))
    with open(project / "constraints.txt", "a") as file:
        file.write("another==1.0\n")
    finish(start(project))
    assert calls(project).count("end") == 2


def test_pip_installs_all_packages_where_uv_finds_no_index(project):
    (project / "release").touch()
    (project / "no index").touch()
    setup = start(project)
    assert "uv failed" in finish(setup)[0] and setup.returncode == 0
    assert calls(project) == [*INSTALLED, *INSTALLED[:2]] and (project / ".venv/.done").is_file()


def test_a_lock_is_installed_with_its_hashes_unless_its_versions_are_others(project):
    (project / "release").touch()
    (project / "constraints.txt").write_text("PyYAML==1.0\nsix==1.0\nbenchmark==2.0\n")
    (project / "lock.txt").write_text(
        "pyyaml==1.0 \\\n    --hash=sha256:00\nwindows-only==3.0 \\\n    --hash=sha256:00\n"
    )
    finish(start(project))
    assert calls(project) == [*INSTALLED[:2], UV_LOCK, INSTALLED[2]]
    with open(project / "constraints.txt", "a") as file:
        file.write("windows-only==3.1\n")
    assert "lock.txt is not used: windows-only" in finish(start(project))[0]
    assert calls(project)[4:] == INSTALLED


def test_pip_compares_the_hashes_of_a_lock_where_uv_fails(project):
    (project / "release").touch()
    (project / "no index").touch()
    (project / "constraints.txt").write_text("six==1.0\n")
    (project / "lock.txt").write_text("six==1.0 \\\n    --hash=sha256:00\n")
    setup = start(project)
    assert finish(setup)[0].count("uv failed") == 2 and setup.returncode == 0
    assert calls(project) == [*INSTALLED[:2], UV_LOCK, PIP_LOCK, "end", INSTALLED[2], *INSTALLED[:2]]


def test_an_old_python_is_refused_before_anything_is_written(project):
    code = "import sys; sys.version_info, sys.argv = (3, 9), ['x']; import runpy; "
    code += "runpy.run_path('tools/environment.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "expected 3.11 or later" in done.stderr and not (project / ".venv").exists()
