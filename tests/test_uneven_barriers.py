"""Real bars with uneven barriers: class shares near 60/40/0 and six tabular models.

No model may claim skill that a constant call has too.
"""

import numpy as np
import pytest

from modelfactory.data.readers import read_eurusd
from modelfactory.data.writer import bars_to_splits
from modelfactory.runs.attempt import publish, write_run
from modelfactory.runs.comparison import comparison
from modelfactory.runs.grid import make_trainer
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import start_attempt
from modelfactory.runs.sentences import describe

pytestmark = pytest.mark.slow

MODELS = ["logistic_regression", "random_forest", "svm", "xgboost", "lightgbm", "catboost"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    data = bars_to_splits(read_eurusd(), folder / "eurusd_1_3", horizons=(20,), barriers={20: (4.5, 1.5, 80)})
    for model in MODELS:
        parameters = dict(model=model, horizon=20, data=str(data), preset="quick")
        trainer = make_trainer(parameters)
        trainer.run_full_pipeline()
        attempt = start_attempt(folder / "runs", parameters)
        write_run(trainer, attempt)
        publish(attempt, folder / "runs")
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
