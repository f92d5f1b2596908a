"Reports on configs, identities, paths, presets and kernels: what was fed, and what comes out."
import pytest
import yaml

from modelfactory.cli import main
from modelfactory.models.ensembles import EnsembleConfig, member_configs
from modelfactory.models.params import TASK_KEYS, read_params
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
