"Reports on configs, identities, paths, presets and kernels: what was fed, and what comes out."
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from conftest import ROOT

from modelfactory.cli import main
from modelfactory.models.ensembles import EnsembleConfig, member_configs
from modelfactory.models.params import TASK_KEYS, read_params, resolve_config
from modelfactory.runs.grid import grid_config, plan, trainer_of
from modelfactory.settings import ConfigError

TASK = ("--model", "xgboost", "--horizon", "5", "--data", "planted")


def call(capsys, *args):
    "Exit code and what was printed to stdout and stderr."
    try:
        code = main(list(map(str, args)))
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", ["train", "tune"])
@pytest.mark.parametrize("pair, option", [
    ("random_seed=7", "--seed"), ("classes=[0, 1]", "--classes"), ("horizon=20", "--horizon"),
    ("model_name=svm", "--model"), ("model_family=neural", "--model")])
def test_a_key_that_the_task_decides_is_refused_with_its_option(capsys, tmp_path, command, pair, option):
    "`--set random_seed=7` printed a finished run whose config says 42."
    code, out, err = call(capsys, command, *TASK, "--set", pair)
    assert code == 2 and err.count("\n") == 1 and pair.split("=")[0] in err and f"use {option}" in err and out == ""
    key, value = pair.split("=")
    (tmp_path / "c.yaml").write_text(f"{key}: {value}")
    assert call(capsys, command, *TASK, "--config", tmp_path / "c.yaml")[0] == 2


@pytest.mark.parametrize("key, value", dict(random_seed=7, classes=[0, 1], horizon=20, model_name="svm").items())
def test_a_grid_and_a_model_yaml_refuse_what_the_task_decides(tmp_path, monkeypatch, key, value):
    grid = dict(data="planted", models=["xgboost"], horizons=[5], overrides=dict(xgboost={key: value}))
    with pytest.raises(ConfigError, match=f"{key} = .* would be ignored"):
        plan(grid_config(grid))
    monkeypatch.setenv("MODELFACTORY_PARAMS", str(tmp_path))
    file = tmp_path / "models/xgboost.yaml"
    file.parent.mkdir()
    for values in ({key: value}, dict(presets=dict(quick={key: value})),
                   dict(search={key: dict(type="categorical", choices=[value])})):
        if key == "model_name" and key in values: continue  # a file says whose it is
        file.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError, match=f"{key} belongs to the task; .* use {TASK_KEYS[key].split()[0]}"):
            read_params("xgboost")


def test_values_that_agree_with_the_task_are_no_mistake():
    "A run's config.yaml holds every key; from it alone the same run is made."
    first = trainer_of(dict(model="xgboost", horizon=5, data="planted", seed=7, config=dict(sequence_length=3)))
    again = trainer_of(dict(model="xgboost", horizon=5, data="planted", seed=7, config=first.resolved()["config"]))
    assert first.resolved() == again.resolved() and again.model_config["random_seed"] == 7
    assert again.model_config["sequence_length"] == 3


def test_data_in_dataset_and_shared_keys_of_members_are_refused():
    with pytest.raises(ConfigError, match="use --data"):
        trainer_of(dict(model="xgboost", horizon=5, data="planted", dataset=dict(data="null")))
    with pytest.raises(ConfigError, match="lightgbm: patience = 3 would be ignored, 10 holds here; use patience of the"):
        member_configs(EnsembleConfig(members=dict(lightgbm=dict(patience=3))))
    assert member_configs(EnsembleConfig(members=dict(lightgbm=dict(n_rounds=3))))["lightgbm"]["n_rounds"] == 3


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The package as a wheel holds it, unpacked in a folder with nothing beside it."
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("modelfactory", "params", "nbs", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(source / done.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    return site


def elsewhere(site, folder, code):
    "What a Python program prints that runs in `folder` with the package of `site`."
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODELFACTORY_")} | dict(PYTHONPATH=str(site))
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_wheel_holds_parameters_grids_and_notebooks(installed):
    "All families of models too: a folder that is not named anywhere is found."
    files = {f.relative_to(installed / "modelfactory") for f in (installed / "modelfactory").rglob("*") if f.is_file()}
    assert {f for f in files if f.suffix == ".py"} == {
        f.relative_to(ROOT / "modelfactory") for f in (ROOT / "modelfactory").rglob("*.py")}
    assert {f for f in files if f.suffix == ".yaml"} == {
        f.relative_to(ROOT) for kind in ("models", "grids") for f in (ROOT / "params" / kind).glob("*.yaml")}
    assert {f.name for f in files if f.suffix == ".ipynb"} == {"train.ipynb", "compare.ipynb", "study.ipynb"}


def test_from_a_folder_of_ones_own_presets_grids_and_notebooks_are_those_of_the_package(installed, tmp_path):
    "`--preset quick` trained 500 rounds instead of 150."
    (tmp_path / "params/models").mkdir(parents=True)
    (tmp_path / "params/models/svm.yaml").write_text("presets: {quick: {C: 7.5}}")
    (tmp_path / "settings.ini").write_text("[modelfactory]\n")
    done = elsewhere(installed, tmp_path, "\n".join([
        "import modelfactory",
        "from modelfactory.models.params import resolve_config",
        "from modelfactory.runs.engine import find_notebook",
        "from modelfactory.runs.grid import grid_config",
        "print(modelfactory.__file__, resolve_config('xgboost', 5, 'quick')['n_rounds'])",
        "print(resolve_config('svm', 5, 'quick')['C'], len(grid_config('demo').models))",
        "print(*[find_notebook(f'{name}.ipynb').parent.name for name in ('train', 'compare', 'study')])"]))
    first, second, third = done.stdout.splitlines()
    assert first == f"{installed}/modelfactory/__init__.py 150"
    assert second == "7.5 6" and third == "notebooks notebooks notebooks"


@pytest.mark.parametrize("ask, says", [
    (lambda: resolve_config("gru", 5, "nonsense"), "gru: unknown preset 'nonsense', valid: quick, tiny"),
    (lambda: resolve_config("gru", 5, "quik"), "'quik', did you mean 'quick'? (presets: quick, tiny)"),
    (lambda: plan(grid_config(dict(data="planted", models=["bare"], horizons=[5], preset="quick"))),
     "bare: unknown preset 'quick', it has none; write presets: in params/models/bare.yaml"),
    (lambda: trainer_of(dict(model="bare", horizon=5, data="planted", preset="nonsense")), "unknown preset 'nonsense'"),
    (lambda: member_configs(EnsembleConfig(member_preset="nonsense")), "unknown preset 'nonsense'"),
    (lambda: grid_config("quik"), "quik: no such file, and no grid of that name: did you mean 'quick'?")])
def test_an_unknown_preset_or_grid_is_an_error_that_lists_those_there_are(bare, ask, says):
    with pytest.raises(ConfigError) as refused:
        ask()
    assert says in str(refused.value)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    "A model without a YAML."
    (tmp_path / "bare.py").write_text("\n".join([
        "from modelfactory.models.classical.logistic_regression import LogisticRegressionModel",
        "from modelfactory.models.registry import ModelRegistry",
        "@ModelRegistry.register('bare', family='examples')",
        "class Bare(LogisticRegressionModel): 'Has no file of parameters.'"]))
    monkeypatch.setenv("MODELFACTORY_PLUGINS", str(tmp_path / "bare.py"))
