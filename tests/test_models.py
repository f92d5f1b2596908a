"""The conformance suite on windows of eight rows, and the YAML files and grids of all models.

The notebooks run the suite on single rows for tabular models, and on windows of sixteen rows for networks.
"""

from dataclasses import replace

import pytest

from modelfactory.models.conformance import check_model
from modelfactory.models.params import read_params
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.grid import grid_config, plan_grid

pytestmark = pytest.mark.slow


MEMBERS = dict(logistic_regression={}, lightgbm=dict(n_rounds=15, min_data_in_leaf=5))


@pytest.mark.parametrize(
    "name, config",
    [
        ("xgboost", dict(n_rounds=40, learning_rate=0.1)),
        ("stacking", dict(members=MEMBERS)),
        ("meta_labelling", dict(remainder="shares")),
    ],
)
def test_conformance_on_windows(name, config):
    """Only `TabularModel` flattens windows, so a linear model, trees and an ensemble cover all tabular models.

    The linear model is checked on windows in test_check.py."""
    assert all(r["result"] == "ok" for r in check_model(name, config, seq_len=8))


@pytest.mark.parametrize("name", [m["name"] for m in ModelRegistry.list_models()])
def test_every_model_has_a_yaml_with_quick_preset_search_space_and_texts(name):
    params = read_params(name)
    assert params.presets["quick"] and params.search and params.resources
    assert set(params.about) == {"paper", "sees", "misses", "use"} and all(params.about.values())


@pytest.mark.parametrize("grid", ["all", "quick"])
def test_the_plan_of_a_grid_holds_all_models(grid):
    jobs = plan_grid(replace(grid_config(grid), data=("planted",)))
    models = [m for m in ModelRegistry.list_models() if m["family"] != "ensemble"]
    unavailable = {m["name"] for m in models if not m["available"]}
    assert len(jobs) == 2 * len(models) >= 40
    pretrained = {"timesfm", "timesfm25", "chronos2", "timellm", "tabicl"}
    assert {j.parameters["model"] for j in jobs if j.unavailable} == unavailable <= pretrained
