"The package installed from its wheel and from its source archive, outside the checkout; new projects; doctor."

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT
from quick import small_bundled

from modelfactory import configuration
from modelfactory.configuration import settings
from modelfactory.project import GITIGNORE, init_project

COMMON = ("settings.ini", "constraints.txt")
SOURCES = ("modelfactory", "params", "nbs", "pyproject.toml", "setup.py", "README.md", "LICENSE", *COMMON)
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, f'build_{sys.argv[1]}')(sys.argv[2]))"


def finished(command, folder, **environment):
    "A process that has ended with code 0; it imports neither the checkout nor modules of the working folder."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODELFACTORY_", "PYTHON"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def build(source, kind, target):
    target.mkdir(exist_ok=True)
    built = finished([sys.executable, "-c", BUILD, kind, target], source).stdout.split()[-1]
    return target / built


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "A source archive, built from a copy of the sources, and a wheel, built from the unpacked source archive."
    folder = tmp_path_factory.mktemp("archives")
    (source := folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    sdist = build(source, "sdist", folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    wheel = build(next((folder / "unpacked").iterdir()), "wheel", folder / "dist")
    return dict(sdist=sdist, wheel=wheel)


def new_environment(archive, folder):
    """The interpreter of a new environment that contains the package and nothing of the checkout.

    The other packages are those of this environment: the line of a .pth file adds their folder to the path, but the
    .pth files in that folder, such as the one of an editable installation, are not read."""
    folder.mkdir(exist_ok=True)
    finished([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin/python"
    site = finished([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).stdout.strip()
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-compile"]
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", *options]
    finished([*install, archive], folder)
    where = finished([python, "-c", "import modelfactory; print(modelfactory.__file__)"], folder).stdout.strip()
    assert Path(where) == Path(site, "modelfactory/__init__.py")
    return python


@pytest.fixture(scope="module")
def python(archives, tmp_path_factory):
    return new_environment(archives["wheel"], tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    return small_bundled(tmp_path_factory.mktemp("bundled"), ["planted"])


@pytest.mark.slow
def test_a_wheel_trains_exports_and_predicts_in_an_empty_folder(python, bundled, tmp_path):
    def call(*words):
        "What a command prints."
        return finished([python.with_name("modelfactory"), *words], tmp_path, **options).stdout

    options = dict(MODELFACTORY_BUNDLED=str(bundled), MODELFACTORY_TRACKING="")
    grid = ("demo", "--data", "planted", "--models", "logistic_regression,random_forest", "--horizons", "5")
    assert "\n2 ok\n" in call("experiment", *grid)
    run = next((tmp_path / "runs").glob("logistic_regression_h5_planted_*"))
    call("export", run, "--output", "bundle")
    call("predict", "bundle", bundled / "planted/test_scaled.parquet", "--output", "p.csv")
    assert (tmp_path / "p.csv").read_text().count("\n") > 100
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "p.csv", "runs"}


@pytest.mark.slow
def test_a_run_of_the_demo_from_the_source_archive(archives, bundled, tmp_path):
    python, folder = new_environment(archives["sdist"], tmp_path / "environment"), tmp_path / "empty"
    folder.mkdir()
    grid = ("demo", "--data", "planted", "--models", "logistic_regression", "--horizons", "5")
    options = dict(MODELFACTORY_BUNDLED=str(bundled), MODELFACTORY_TRACKING="")
    assert "\n1 ok\n" in finished([python, "-m", "modelfactory", "experiment", *grid], folder, **options).stdout


@pytest.mark.slow
def test_doctor_reports_the_files_and_packages_that_an_installation_lacks(python, tmp_path):
    def findings(code=0):
        command = [python, "-m", "modelfactory", "doctor", "--json"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MODELFACTORY_", "PYTHON"))}
        environment |= dict(JUPYTER_PATH=str(Path(sys.prefix, "share/jupyter")))
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == code, done.stdout + done.stderr
        return {row["what"]: row for row in json.loads(done.stdout)}

    report = findings()
    assert "installed" in report["package"]["value"] and "modelfactory init" in report["settings"]["fix"]
    assert "constraints" not in report["packages"]["value"]
    site = next(python.parents[1].glob("lib/*/site-packages"))
    notebook, metadata = site / "modelfactory/notebooks/train.ipynb", next(site.glob("modelfactory-*")) / "METADATA"
    text, listed = notebook.read_bytes(), metadata.read_text()
    notebook.unlink()
    metadata.write_text(listed.replace("Requires-Dist: numpy", "Requires-Dist: numpy\nRequires-Dist: absent-library"))
    try:
        report = findings(code=1)
    finally:
        notebook.write_bytes(text)
        metadata.write_text(listed)
    assert "missing: notebooks/train.ipynb" in report["package"]["value"]
    assert report["packages"]["value"] == "not installed: absent-library"
    assert "constraints.txt modelfactory" in report["packages"]["fix"]


@pytest.mark.slow
def test_init_from_an_installation_writes_what_it_writes_from_a_checkout(python, tmp_path):
    shown = finished([python, "-m", "modelfactory", "init", "project"], tmp_path).stdout
    assert "cd project && jupyter lab nbs/tutorials/ten_minutes.ipynb" in shown
    init_project(tmp_path / "expected")
    assert contents(tmp_path / "project") == contents(tmp_path / "expected")
    code = "from modelfactory import settings; print(settings().runs)"
    assert finished([python, "-c", code], tmp_path / "project/nbs").stdout.strip() == str(tmp_path / "project/runs")


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_links_of_a_project_exist(tmp_path):
    init_project(tmp_path)
    notebooks = list((tmp_path / "nbs").rglob("*.ipynb"))
    assert len(notebooks) > 10
    for file in notebooks:
        for cell in json.loads(file.read_text(encoding="utf8"))["cells"]:
            if cell["cell_type"] == "markdown":
                for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", "".join(cell["source"])):
                    assert (file.parent / link).exists(), f"{file.name}: {link}"


@pytest.mark.parametrize("name", ["settings.ini", "params", "nbs"])
def test_init_overwrites_nothing(tmp_path, name):
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=f"found {name}, expected none"):
        init_project(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_init_keeps_an_existing_gitignore_and_other_files(tmp_path):
    (tmp_path / ".gitignore").write_text("secret\n")
    (tmp_path / "notes.md").write_text("notes")
    assert tmp_path / ".gitignore" not in init_project(tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "secret\n" and (tmp_path / "notes.md").read_text() == "notes"
    assert init_project(tmp_path / "other")[0].read_text() == GITIGNORE


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_init_leaves_nothing_behind(tmp_path, monkeypatch, exists):
    folder = tmp_path / "a/b"
    if exists:
        folder.mkdir(parents=True)

    def rename(path, target):
        if path.name == "params":
            raise OSError(28, "No space left on device")
        return shutil.move(path, target) and target

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        init_project(folder)
    assert sorted(tmp_path.rglob("*")) == ([tmp_path / "a", folder] if exists else [])


def test_defaults_without_a_settings_file_equal_those_of_the_settings_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("MODELFACTORY_")]:
        monkeypatch.delenv(name)
    stored = settings()
    monkeypatch.setattr(configuration, "_find_settings_file", lambda: None)
    assert vars(settings()) == vars(stored)
