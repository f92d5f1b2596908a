"""Real bars with uneven barriers: class shares near 60/40/0 and six tabular models.

No model may claim skill that a constant call has too.
"""

import numpy as np
import pytest
from conftest import PATIENCE

from modelfactory.data.readers import read_eurusd
from modelfactory.data.writer import bars_to_splits
from modelfactory.runs.comparison import comparison
from modelfactory.runs.grid import run_grid
from modelfactory.runs.run import list_runs
from modelfactory.runs.sentences import describe

pytestmark = pytest.mark.slow

MODELS = ["logistic_regression", "random_forest", "svm", "xgboost", "lightgbm", "catboost"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    data = bars_to_splits(read_eurusd(), folder / "eurusd_1_3", horizons=(20,), barriers={20: (4.5, 1.5, 80)})
    grid = dict(data=[str(data)], models=MODELS, horizons=[20], preset="quick")
    result = run_grid(grid, folder / "runs", workers=2, timeout=PATIENCE)
    assert result.ok
    return comparison(list_runs(folder / "runs"))["tasks"][0]


def test_no_model_is_better_than_the_constant_call(task):
    text = " ".join(describe(task))
    assert "no model differs significantly from the better constant prediction" in text
    assert not task["direction_significant"] and not any(m["direction_significant"] for m in task["models"])


def test_directional_accuracy_and_that_of_the_constant_call(task):
    constant = {m["directional_accuracy_constant"] for m in task["models"]}
    accuracy = [m["directional_accuracy"] for m in task["models"]]
    assert len(constant) == 1 and constant.pop() > 0.6
    assert np.nanmax(accuracy) > 0.5
