"The same suite on every tabular model, on windows of eight rows: their notebooks run it on single rows, those of networks on windows of sixteen."

from dataclasses import replace

import pytest

from modelfactory.models.conformance import check_model
from modelfactory.models.params import read_params
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.grid import grid_config, plan_grid


@pytest.mark.parametrize(
    "name, config", [("logistic_regression", {}), ("xgboost", dict(n_rounds=80)), ("stacking", {})]
)
def test_conformance_on_windows(name, config):
    "Windows are laid out as rows in one place, `TabularModel`: a linear model, trees and an ensemble stand for all (each notebook runs the suite on rows)."
    assert all(r["result"] == "ok" for r in check_model(name, config, seq_len=8))


@pytest.mark.parametrize("name", [m["name"] for m in ModelRegistry.list_models()])
def test_a_model_has_a_yaml_with_a_quick_preset_and_a_search_space(name):
    params = read_params(name)
    assert params.presets["quick"] and params.search and params.resources
    assert set(params.about) == {"paper", "sees", "misses", "use"} and all(params.about.values())


@pytest.mark.parametrize("grid", ["all", "quick"])
def test_a_grid_of_all_models_is_planned(grid):
    asked = grid_config(grid)
    jobs = plan_grid(replace(asked, data=("planted",)))
    models = [m for m in ModelRegistry.list_models() if m["family"] != "ensemble"]
    lacking = {m["name"] for m in models if not m["available"]}
    assert len(jobs) == 2 * len(models) >= 40 and {j.parameters["model"] for j in jobs if j.unavailable} == lacking <= {
        "timesfm",
        "timellm",
    }
