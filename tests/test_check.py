"One model of each kind: the conformance checks of a linear model and a network, and one training with its scores."

import pytest

from modelfactory import Trainer, check_model


@pytest.mark.parametrize(
    "name, config, sequence_length", [("logistic_regression", {}, 8), ("gru", dict(batch_size=128), 16)]
)
def test_conformance(name, config, sequence_length):
    assert all(row["result"] == "ok" for row in check_model(name, config, sequence_length))


@pytest.mark.parametrize(
    "model, config", [("lightgbm", {}), ("average", dict(members=dict(lightgbm={}, logistic_regression={})))]
)
def test_a_training_has_skill_where_a_signal_is_planted(model, config):
    trainer = Trainer(dict(model=model, horizon=5, data="planted", preset="quick", config=config))
    metrics = trainer.run_full_pipeline()
    assert metrics["directional_skill_ci_low"] > 0 and metrics["log_loss"] < trainer.baseline()["log_loss"]
    assert trainer.direction_claim().significant
