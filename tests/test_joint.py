"Joint fits of several horizons: one network with a head for each, or one model for each behind the same call."

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from quick import quick_plugin
from typer.testing import CliRunner

from modelfactory.cli import app
from modelfactory.configuration import ConfigError
from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.market import MARKET_PRESETS, market_table, simulate_market
from modelfactory.data.splits import NO_LABEL, NO_TARGET, read_splits
from modelfactory.data.writer import write_splits
from modelfactory.models.base import check_y, training_weights
from modelfactory.models.conformance import joint_task
from modelfactory.models.loading import load_model
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.sequence import SequenceClassifier, functional_module
from modelfactory.runs.attempt import (
    change_manifest,
    prediction_file,
)
from modelfactory.runs.comparison import comparison
from modelfactory.runs.examples import train_example
from modelfactory.runs.grid import grid_config, grid_jobs
from modelfactory.runs.manage import diff_runs
from modelfactory.runs.predict import predict_run
from modelfactory.runs.rescore import rescore
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import RunError
from modelfactory.training.trainer import Trainer
from modelfactory.tuning.result import n_trials_of, read_tuned
from modelfactory.tuning.study import Objective, OptunaModelTuner


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    "Splits of two symbols with labels of 5 and of 20 bars."
    market = simulate_market(replace(MARKET_PRESETS["planted"], rows=(300, 150, 150), columns=24, symbols=2))
    table = market_table(market, (5, 20))
    extra = tuple(c for c in table if c.startswith("pub_"))
    return write_splits(table, tmp_path_factory.mktemp("joint") / "splits", (5, 20), extra_features=extra)


def test_the_samples_of_a_horizon_are_those_of_its_own_dataset(splits):
    read = read_splits(splits, (5, 20), ("train", "val"))
    rng = np.random.default_rng(0)
    for h in (5, 20):  # gaps in the middle, each horizon in other rows
        read["val"].labels[h][rng.random(len(read["val"])) < 0.2] = NO_TARGET
    for seq_len, gap, name in ((1, 1, "train"), (7, 0, "val"), (3, 1, "val")):
        context = None if name == "train" else read["train"]
        joint = TimeSeriesDataset(read[name], [20, 5], seq_len, gap, context)
        apart = {h: TimeSeriesDataset(read[name], h, seq_len, gap, context) for h in (5, 20)}
        assert set(joint.rows) == set(apart[5].rows) | set(apart[20].rows) and (joint.y != NO_TARGET).any(1).all()
        assert (joint.metadata.label_bars >= joint.metadata[["label_bars_h5", "label_bars_h20"]].max(axis=1)).all()
        half = joint.subset(np.arange(0, len(joint), 2))
        for h, ds in apart.items():
            part = joint.at(h)
            assert np.array_equal(part.rows, ds.rows) and np.array_equal(part.y, ds.y)
            assert part.metadata.equals(ds.metadata) and np.array_equal(part.X[:], ds.X[:])
            labels = half.split.labels[h]
            assert np.array_equal(labels[half.rows], half.y[:, half.horizons.index(h)])
            assert (labels != NO_TARGET).sum() == len(half.at(h))


class Linear(SequenceClassifier):
    "One linear layer over the flattened window."

    name, family = "joint_linear", "examples"

    def backbone(self, T, F, n_classes, c):
        from torch import nn

        return functional_module(lambda net, x: net.head(x.flatten(1)), head=nn.Linear(T * F, n_classes))


def test_the_loss_of_a_joint_fit_is_the_mean_over_horizons_of_the_labelled_rows():
    import torch

    task = joint_task(n=120, seq_len=4)
    config = dict(sequence_length=4, class_weight="balanced", sample_weight="column", label_smoothing=0.1)
    model = Linear(config, (5, 20), task.features)
    rng = np.random.default_rng(1)
    weight = {f"sample_weight_h{h}": rng.uniform(0.5, 2, 120) for h in (5, 20)}
    codes, meta = check_y(model, task.y, 120), task.meta.assign(**weight)
    weights, logits = training_weights(model, codes, meta), rng.normal(size=(120, 6))
    expected = []
    for k, h in enumerate((5, 20)):
        rows = [i for i in range(120) if task.y[i, k] != NO_TARGET]
        w = np.array([weight[f"sample_weight_h{h}"][i] / np.sum(codes[rows, k] == codes[i, k]) for i in rows])
        assert np.allclose(weights[rows, k], w / w.mean(), rtol=1e-5) and (np.delete(weights[:, k], rows) == 0).all()
        losses = []
        for i in rows:
            z = logits[i, 3 * k : 3 * k + 3]
            log_p = z - np.log(np.exp(z).sum())
            losses.append(-0.9 * log_p[codes[i, k]] - 0.1 * log_p.mean())
        expected.append(np.mean(np.array(losses) * w / w.mean()))
    tensors = [torch.as_tensor(a) for a in (logits, codes, weights)]
    assert float(model._training_loss(*tensors)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(model._training_loss(tensors[0][100:, :], tensors[1][100:], None)) > 0  # 10 rows have no second label


def test_undefined_labels_have_no_gradient_and_each_row_needs_a_label():
    import torch

    task = joint_task(n=60, seq_len=4)
    model = Linear(dict(sequence_length=4), (5, 20), task.features)
    codes = check_y(model, task.y, 60)
    assert np.array_equal(codes, check_y(model, np.where(task.y == NO_TARGET, NO_LABEL, task.y), 60))
    logits = torch.randn(60, 6, requires_grad=True)
    model._training_loss(logits, torch.as_tensor(codes)).backward()
    has_gradient = logits.grad.abs().sum(1) if logits.grad.ndim < 2 else logits.grad.reshape(60, 2, 3).abs().sum(2)
    assert np.array_equal(has_gradient.numpy() > 0, codes >= 0)
    y = task.y.copy()
    y[7] = NO_TARGET
    with pytest.raises(ValueError, match="row 7 of y has no label"):
        check_y(model, y, 60)
    with pytest.raises(ValueError, match="y holds 3"):
        check_y(model, np.full_like(y, 3), 60)


def test_a_network_brings_its_own_loss_and_step():
    "A loss per member of two, and a step with noise; both are called with the codes of a joint fit."
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    seen = dict(loss=set(), step=set())

    class Members(Linear):
        def backbone(self, T, F, n_classes, c):
            def forward(net, x):
                logits = net.head(x.flatten(1)).unflatten(1, (2, n_classes))
                return logits if net.training else logits.mean(1)

            return functional_module(forward, head=nn.Linear(T * F, 2 * n_classes))

        def loss(self, outputs, codes, weight=None):
            seen["loss"].add(tuple(outputs.shape[1:]))
            return cross_entropy(outputs.flatten(0, 1).float(), codes.repeat_interleave(outputs.shape[1]))

        def step(self, training, x, codes, weight=None):
            seen["step"].add(tuple(codes.shape[1:]))
            return super().step(training, x + 0.01 * torch.randn_like(x), codes, weight)

    task = joint_task(n=900, seq_len=4)
    config = dict(sequence_length=4, learning_rate=3e-2, max_epochs=15)
    model = Members(config, (5, 20), task.features)
    model.fit(task.X, task.y, task.X_val, task.y_val)
    out = model.predict(task.X_val, task.meta_val)
    assert seen == dict(loss={(2, 3)}, step={(2,)})
    for k, h in enumerate((5, 20)):
        rows = task.y_val[:, k] != NO_TARGET
        assert (out.at(h).predictions == task.y_val[:, k])[rows].mean() > 0.6


@pytest.mark.parametrize("model", ["logistic_regression", "gru"])
def test_calibration_and_prediction_sets_are_fitted_per_horizon(model, tmp_path):
    is_network = model == "gru"
    task = joint_task(n=600, seq_len=4 if is_network else 1)
    config = dict(calibration="temperature", conformal=dict(alpha=0.2))
    config |= dict(sequence_length=4, hidden_size=4, max_epochs=2) if is_network else {}
    joint = ModelRegistry.create(model, config, [5, 20], task.features)
    joint.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
    out = joint.predict(task.X_val, task.meta_val)
    joint.save(tmp_path / "checkpoint")
    loaded = load_model(tmp_path / "checkpoint").predict(task.X_val, task.meta_val)
    assert np.array_equal(out.probabilities, loaded.probabilities) and np.array_equal(out.sets, loaded.sets)
    assert joint.conformal.keys() == {5, 20}
    for k, h in enumerate((5, 20)):
        rows = task.y_val[:, k] != NO_TARGET
        column = np.where(rows, task.y_val[:, k], 0) + 1
        covered = out.at(h).sets[np.arange(len(rows)), column][rows]
        assert covered.mean() == pytest.approx(0.8, abs=0.1)
    if is_network:
        held_out = [len(joint.conformal[h].scores) for h in (5, 20)]
        assert held_out == [120, 90]  # the last 30 rows have no label of 20 bars
        return
    train, val = (y[:, 1] != NO_TARGET for y in (task.y, task.y_val))
    apart = ModelRegistry.create(model, config, 20, task.features)
    meta, meta_val = (m[r].reset_index(drop=True) for m, r in ((task.meta, train), (task.meta_val, val)))
    y, y_val = task.y[train, 1], task.y_val[val, 1]
    apart.fit(task.X[train], y, task.X_val[val], y_val, meta.assign(horizon=20), meta_val.assign(horizon=20))
    expected = apart.predict(task.X_val, task.meta_val)
    assert np.array_equal(out.at(20).probabilities, expected.probabilities)
    assert np.array_equal(out.at(20).sets, expected.sets)


@pytest.fixture(scope="module")
def runs(splits, tmp_path_factory):
    "Runs of one model on horizon 5, on horizon 20 and on both."
    folder = tmp_path_factory.mktemp("runs")
    with quick_plugin(tmp_path_factory.mktemp("plugin")):
        for horizon in (5, 20, [5, 20]):
            train_example(dict(model="nearest", horizon=horizon, data=str(splits), seed=1), folder, ("confusion",))
        yield folder


def apart_and_joint(runs):
    listed = list_runs(runs)
    joint = next(r for r in listed if r.joint_horizons)
    return {r.horizon: r for r in listed if not r.joint_horizons}, joint


def test_a_joint_run_has_the_scores_of_runs_apart(runs):
    apart, joint = apart_and_joint(runs)
    assert joint.path.name.startswith("nearest_h5+20_") and joint.horizon == (5, 20)
    assert len({run.identity for run in (joint, *apart.values())}) == 3
    for h, run in apart.items():
        part = joint.at(h)
        assert part.predictions().drop(columns="horizon").equals(run.predictions().drop(columns="horizon"))
        for name, value in run.metrics.items():
            assert name.endswith("_seconds") or part.metrics[name] == pytest.approx(value, nan_ok=True), name
        assert part.baselines.keys() == run.baselines.keys()
        assert (
            part.daily_pnl().equals(run.daily_pnl()) and part.manifest["train_shares"] == run.manifest["train_shares"]
        )
        assert (joint.path / f"plots/h{h}_confusion.png").is_file()


def test_a_joint_run_is_shown_and_compared_by_horizon(runs):
    apart, joint = apart_and_joint(runs)
    shown = CliRunner().invoke(app, ["show", str(joint.path), "--json"])
    assert shown.exit_code == 0, shown.output
    for h, summary in zip((5, 20), json.loads(shown.output), strict=True):
        assert summary["title"].startswith(f"nearest (joint), h{h}, ")
        assert summary["metrics"]["log_loss"] == pytest.approx(joint.at(h).metrics["log_loss"])
    difference = diff_runs(apart[5].path, joint.path)
    names = {row["name"] for row in difference.rows if row["part"] == "metrics"}
    assert {"log_loss", "h5 log_loss", "h20 log_loss"} <= names and not diff_runs(joint.path, joint.path).rows


def test_a_comparison_has_a_row_for_each_horizon_of_a_joint_run(runs):
    result = comparison(runs)
    assert [(t["horizon"], t["trials"]) for t in result["tasks"]] == [(5, 4), (20, 4)]
    for task in result["tasks"]:
        rows = {m["model"]: m for m in task["models"]}
        assert rows.keys() == {"nearest", "nearest (joint)"} and task["n_left_out"] == 0
        assert rows["nearest (joint)"]["joint"] == [5, 20] and rows["nearest"]["joint"] == []
        assert rows["nearest (joint)"]["n_samples"] == rows["nearest"]["n_samples"]
    assert list_runs(runs).to_frame().groupby("horizon").model.apply(set).tolist() == [
        {"nearest", "nearest (joint)"},
        {"nearest", "nearest (joint)"},
    ]


def test_a_joint_run_is_rescored_and_predicts_like_runs_apart(runs, splits):
    apart, joint = apart_and_joint(runs)
    before = {h: dict(joint.at(h).metrics) for h in (5, 20)}
    file = prediction_file("val")  # a run without predictions and scores, as a killed process leaves it
    (joint.path / file).unlink()
    change_manifest(joint, joint.path, dict(scored=False, splits=[]), [file])
    assert not load_run(joint.path).at(5).scored
    assert rescore([joint.path]).scored.tolist() == ["all"]
    joint = load_run(joint.path)
    joint.verify()
    for h in (5, 20):
        after = joint.at(h).metrics
        assert {k for k in after if after[k] != pytest.approx(before[h][k], nan_ok=True)} <= {"predict_seconds"}
    frame = predict_run(joint, splits, split="val")
    for h, run in apart.items():
        expected = predict_run(run, splits, split="val")
        of_horizon = frame[frame.horizon == h].reset_index(drop=True)
        pd.testing.assert_frame_equal(of_horizon, expected, check_dtype=False)
    isolated = load_run(joint.path, isolated=True)
    assert np.abs(predict_run(isolated, splits, split="val").p_up - frame.p_up).max() < 1e-6


def test_what_does_not_support_a_joint_run_refuses_it_in_a_sentence(runs, splits, tmp_path):
    from modelfactory.runs.export import export_run
    from modelfactory.runs.information import run_information
    from modelfactory.runs.refresh import refresh_run

    _, joint = apart_and_joint(runs)
    for call in (
        lambda: export_run(joint.path, tmp_path / "bundle"),
        lambda: refresh_run(joint.path, splits),
        lambda: run_information(joint),
    ):
        with pytest.raises(RunError, match="a joint fit of the horizons 5 and 20; .* expects a run of one horizon"):
            call()
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(RunError, match=r"use at\(5\) or at\(20\)"):
        _ = joint.metrics
    folds = dict(kind="walk_forward", n=2, fold=1)
    with pytest.raises(ConfigError, match="folds: found a joint fit of the horizons 5 and 20, expected one horizon"):
        Trainer(dict(model="svm", horizon=[5, 20], data=dict(data=str(splits), folds=folds)))


def test_a_grid_and_the_command_line_name_joint_horizons(splits, monkeypatch):
    from modelfactory.cli import parse_horizons

    assert parse_horizons("5,20, 20+5") == [5, 20, (5, 20)]
    with pytest.raises(ConfigError, match="--horizons '5,x': expected numbers of bars"):
        parse_horizons("5,x")
    grid = grid_config(dict(data=str(splits), models="svm", horizons=[5, [20, 5], "5+20"]))
    assert grid.horizons == (5, (5, 20), (5, 20))
    first, second, third = grid_jobs(grid)
    assert second.identity == third.identity != first.identity and second.title == "svm h5+20 splits"
    with pytest.raises(ConfigError, match=r"horizons.*expected a number of bars"):
        grid_config(dict(data=str(splits), models="svm", horizons=[[5, 5]]))


def test_a_study_tunes_a_joint_fit_on_the_mean_over_its_horizons(splits, tmp_path):
    "The value of a trial is the mean log loss over the horizons, on the labelled rows of each."
    watch = SimpleNamespace(pruned=False, start_fold=lambda prior: None, end_fold=lambda loss: False)
    with quick_plugin(tmp_path):
        task = dict(model="nearest", data=str(splits), seed=1, horizon=(5, 20))
        trainer = Trainer(task)
        joint, config = Objective(trainer, folds=2), trainer.model_config
        joint.prepare_data()
        metadata = joint.dataset("train", 1).metadata
        times = metadata.datetime.drop_duplicates().sort_values()
        for train, test in joint.cut(1):  # purged by the longest label
            last, first = (
                times.searchsorted(t) for t in (metadata.datetime[train].max(), metadata.datetime[test].min())
            )
            assert first - last > 20
        fold = joint.fold_data(1)[0]
        output, means = joint._fit(config, fold, watch).predict(fold.test[0], fold.test[2]), []
        for k, h in enumerate((5, 20)):
            rows = fold.test[1][:, k] != NO_TARGET
            p, codes = output.at(h).probabilities[rows], fold.test[1][rows, k] + 1
            means.append(-np.log(p[np.arange(len(p)), codes]).mean())
        assert joint.values(config, watch)[0] == pytest.approx(np.mean(means), abs=1e-5)
        search = dict(threads=dict(type="categorical", choices=[1, 2]))
        tuner = OptunaModelTuner(task, 2, folds=2, storage=tmp_path / "s.db", search=search)
        result = tuner.run()
        assert "_h5+20_" in tuner.study_name and result.value > 0
        assert read_tuned(result.save(tmp_path / "tuned.yaml"))[1]["horizon"] == [5, 20]
        assert [n_trials_of("nearest", h, storage=tmp_path / "s.db") for h in (5, 20, 7)] == [2, 2, 0]
