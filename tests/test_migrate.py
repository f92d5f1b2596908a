"A run of version 0.1, kept in tests/data, is read under the names of this version and predicts the same."

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from modelfactory import list_runs, load_run
from modelfactory.data.dataset import DatasetConfig, load_datasets
from modelfactory.data.market import MARKET_PRESETS, market_table, simulate_market
from modelfactory.data.writer import write_splits
from modelfactory.runs.migrate import SCHEMA_VERSION
from modelfactory.runs.run_folder import RunError
from modelfactory.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(ROOT / "tests/data", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "The splits of the run: the simulated market is a function of its config."
    config = replace(MARKET_PRESETS["planted"], rows=(600, 160, 160), columns=24, symbols=2)
    table = market_table(simulate_market(config), (5,))
    extra = tuple(c for c in table if c.startswith("pub_"))
    return write_splits(table, tmp_path_factory.mktemp("data") / "splits", (5,), extra_features=extra)


def test_a_run_of_an_earlier_version_is_listed_and_checked(runs):
    (run,) = list_runs(runs)
    assert run.manifest.get("schema", 1) == 1 < SCHEMA_VERSION and run.scored
    run.verify()
    assert run.metrics["log_loss"] == pytest.approx(1.143, abs=1e-3)


def test_its_config_has_the_keys_of_today_and_trains_again(runs, data):
    (run,) = list_runs(runs)
    config = run.config["config"]
    assert (config["max_grad_norm"], config["warmup_fraction"]) == (0.5, 0.2) and "clip" not in config
    trainer = Trainer(run.config | dict(data=run.config["data"] | dict(data=str(data))))
    trainer.run_full_pipeline()
    stored = run.predictions()[["p_down", "p_flat", "p_up"]].to_numpy()  # biases were decayed then
    assert np.abs(trainer.predictions["val"].probabilities - stored).max() < 0.01


@pytest.mark.parametrize("isolated", [False, True])
def test_its_model_predicts_what_it_predicted(runs, data, isolated):
    run = load_run(next(runs.iterdir()), isolated)
    model, config = run.model(), run.config
    (ds,) = load_datasets(DatasetConfig(data=str(data)), 5, model.config.sequence_length, ("val",))[0].values()
    probabilities = model.predict(ds.X, ds.metadata).probabilities
    assert np.allclose(probabilities, run.predictions()[["p_down", "p_flat", "p_up"]], atol=1e-6)
    assert config["config"]["sequence_length"] == model.config.sequence_length


def test_a_run_of_a_later_version_is_refused_with_a_reason(runs, tmp_path):
    folder = shutil.copytree(next(runs.iterdir()), tmp_path / "runs/later")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | dict(schema=SCHEMA_VERSION + 1)))
    with pytest.raises(RunError, match="made by a later version .* update modelfactory"):
        load_run(folder)
    (unread,) = list_runs(tmp_path / "runs").unread
    assert "later version" in unread["reason"]
