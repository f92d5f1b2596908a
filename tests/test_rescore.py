"Rescoring gives the same numbers in the same run, even if the process is killed at any step."

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from modelfactory.cli import main
from modelfactory.data.market import MARKET_PRESETS, market_table, simulate_market
from modelfactory.data.writer import write_splits
from modelfactory.runs import attempt as attempts
from modelfactory.runs import rescore as rescoring
from modelfactory.runs.attempt import publish, score_files, write_run
from modelfactory.runs.comparison import comparison
from modelfactory.runs.rescore import NOT_SCORED, matching_rows, rescore, rescore_run, scoring_trainer
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import (
    MANIFEST_FILE,
    REPLACED_FOLDER,
    STAGED_FOLDER,
    RunError,
    replace_run,
    start_attempt,
)
from modelfactory.training import trainer as trainers
from modelfactory.training.trainer import Trainer, trainer_plots

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    table = market_table(simulate_market(replace(MARKET_PRESETS["planted"], rows=(1500, 400, 400), columns=32)))
    features = tuple(c for c in table if c.startswith("pub_"))
    return write_splits(table, tmp_path_factory.mktemp("data") / "small", (5, 20), extra_features=features)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    "A run with predictions of val and test, and with metrics as scoring version 1 stored them."
    runs = tmp_path_factory.mktemp("runs")
    trainer = Trainer(dict(model="logistic_regression", horizon=5, data=str(data), preset="quick"))
    trainer.run_full_pipeline()
    attempt = start_attempt(runs, dict(model="logistic_regression", horizon=5))
    trainer.evaluate("test", attempt)
    write_run(trainer, attempt, trainer_plots(trainer))
    for split in ("val", "test"):
        file = attempt / score_files(split)["metrics"]
        former = dict(log_loss=9.0, f1_floor=0.1, directional_accuracy_p_shift=0.2)
        file.write_text(json.dumps(json.loads(file.read_text()) | former))
    result = json.loads((attempt / "result.json").read_text())
    result.pop("scoring")
    (attempt / "result.json").write_text(json.dumps(result))
    return load_run(publish(attempt, runs)), trainer


@pytest.fixture
def run(made, tmp_path):
    "A copy of that run in a separate folder."
    runs = shutil.copytree(made[0].path.parent, tmp_path / "runs")
    return list_runs(runs)[0]


def contents(folder):
    "The bytes of each file in a folder, by its relative name."
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def equal(a, b):
    "Whether two dicts of numbers are equal; NaN equals NaN."
    return set(a) == set(b) and all(a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) for k in a)


def test_rescoring_gives_the_scores_of_the_training_in_the_same_run(made, run):
    _, trainer = made
    before = contents(run.path)
    done = rescore([run.path])
    after = load_run(run.path)
    after.verify()
    assert done.scored.tolist() == ["all"] and after.scoring == 2 > run.scoring
    assert after.identity == run.identity and after.path == run.path

    def without_seconds(metrics):
        return {k: v for k, v in metrics.items() if k not in ("fit_seconds", "predict_seconds")}

    for split, stored in (("val", after.metrics), ("test", after._numbers("test_metrics.json"))):
        assert equal(without_seconds(stored), without_seconds(dict(trainer.metrics[split])))
    assert set(after.baselines) == {"prior", "flat", "long", "persistence"}
    assert len(after.daily_pnl()) and len(after.daily_pnl("test"))
    written = {*score_files("val").values(), *score_files("test").values(), MANIFEST_FILE}
    written |= {"plots/equity.png", "plots/robustness.png"}
    files = contents(run.path)
    assert set(files) == set(before)
    assert all(files[name] == content for name, content in before.items() if name not in written)
    assert np.array_equal(after.model().feature_columns, run.model().feature_columns)


def test_rescoring_is_not_a_use_of_the_test_set(run):
    from modelfactory.training.test_set import read_ledger

    before = len(read_ledger(run.path.parent))
    rescore([run.path])
    assert before == 1 == len(read_ledger(run.path.parent))


def test_the_comparison_claims_profit_only_after_rescoring(run, capsys):
    def task():
        return comparison(run.path.parent)["tasks"][0]

    assert "run `modelfactory rescore`" in task()["why"]["profit"] and task()["p_profit"] is None
    with pytest.raises(SystemExit) as end:
        main(["rescore", str(run.path.parent)])
    assert end.value.code == 0 and f"{run.path.name}: all" in capsys.readouterr().out
    assert task()["earlier_scoring"] == [] and "rescore" not in task()["why"].get("profit", "")


@pytest.mark.parametrize("spoil", ["gone", "changed", "labels"])
def test_without_the_data_only_class_metrics_are_written(made, run, data, tmp_path, spoil):
    config, trainer = run.path / "config.yaml", made[1]
    moved = shutil.copytree(data, tmp_path / "moved")
    text = config.read_text().replace(str(data), str(tmp_path / "nowhere" if spoil == "gone" else moved))
    config.write_text(text)
    manifest = json.loads((run.path / MANIFEST_FILE).read_text())
    from modelfactory.models.persistence import file_hash

    manifest |= dict(data=str(moved), files=manifest["files"] | {"config.yaml": file_hash(config)})
    if spoil != "gone":
        table = pd.read_parquet(moved / "val_scaled.parquet")
        table["label_h5"] = -table.label_h5
        table.to_parquet(moved / "val_scaled.parquet")
    if spoil == "labels":
        from modelfactory.data.splits import fingerprint

        manifest |= dict(data_fingerprint=fingerprint(moved))
    (run.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    before = contents(run.path)
    refused = rescore_run(run.path)
    assert refused["scored"] == NOT_SCORED and refused["reason"] and contents(run.path) == before
    assert list((run.path.parent / STAGED_FOLDER).iterdir()) == []
    done = rescore_run(run.path, class_metrics=True)
    after, expected = load_run(run.path), trainer.metrics["val"]
    after.verify()
    reason = dict(gone="no such folder", changed="has changed", labels="labels in the data differ")[spoil]
    assert done["scored"] == "class metrics only" and done["reason"] == refused["reason"]
    assert reason in done["reason"]
    assert after.metrics["log_loss"] == pytest.approx(expected["log_loss"], abs=1e-12)
    assert np.isnan(after.metrics["sharpe_net"])
    assert after.metrics["directional_skill"] == pytest.approx(expected["directional_skill"])
    assert set(after.baselines) == {"prior", "flat", "long"}
    assert after.baseline["log_loss"] == pytest.approx(trainer.baseline()["log_loss"])
    with pytest.raises(RunError, match="no daily profit"):
        after.daily_pnl()
    (task,) = comparison(run.path.parent)["tasks"]
    assert task["p_profit"] is None and "no prices" in task["why"]["profit"]


def test_the_rows_of_an_older_run_are_matched_in_a_larger_dataset(made):
    "A dataset may have more samples than an older run predicted; its rows are selected in the order of the run."
    run, _ = made
    dataset = scoring_trainer(run).datasets["val"]
    frame = run.predictions().iloc[60:].sample(frac=1, random_state=0)
    rows = matching_rows(dataset, frame)
    assert len(rows) == len(frame) and (rows.metadata.symbol.to_numpy() == frame.symbol.to_numpy()).all()
    assert (rows.metadata.datetime.to_numpy() == frame.datetime.to_numpy()).all() and len(rows.X) == len(frame)
    first, *rest = frame.y_true.iloc[:10]
    with pytest.raises(RunError, match="1 of 10 labels"):
        matching_rows(dataset, frame.iloc[:10].assign(y_true=[(first + 2) % 3 - 1, *rest]))
    with pytest.raises(RunError, match="10 of 10 predicted rows"):
        matching_rows(dataset, frame.iloc[:10].assign(symbol="another"))


def test_a_missing_folder_and_changed_predictions_are_errors(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["rescore", str(tmp_path / "nothing")])
    assert end.value.code == 2 and "neither a finished run nor a folder with runs" in capsys.readouterr().err
    table = run.predictions()
    table.assign(p_up=0.0).to_parquet(run.path / "predictions/val_predictions.parquet")
    with pytest.raises(RunError, match="changed since"):
        rescore_run(run.path)


def test_one_altered_run_does_not_stop_the_others(run, capsys):
    altered = run.path.with_name(run.path.name.replace("logistic", "altered_logistic"))
    shutil.copytree(run.path, altered)
    run.predictions().assign(p_up=0.0).to_parquet(altered / "predictions/val_predictions.parquet")
    before = contents(altered)
    rows = rescore([run.path.parent]).set_index("run")
    assert rows.loc[run.path.name].scored == "all" and rows.loc[altered.name].scored == NOT_SCORED
    assert "changed since" in rows.loc[altered.name].reason and contents(altered) == before
    with pytest.raises(SystemExit) as end:
        main(["rescore", str(run.path.parent)])
    printed = capsys.readouterr().out
    assert end.value.code == 1 and f"{run.path.name}: all" in printed and f"{altered.name}: {NOT_SCORED}" in printed


def test_a_run_is_replaced_although_an_earlier_replacement_was_not_removed(tmp_path):
    "The removal of the replaced run was interrupted, so its folder still has files."
    for folder, text in {"a": "old", f"{STAGED_FOLDER}/a": "new", f"{REPLACED_FOLDER}/a": "older"}.items():
        (tmp_path / folder / "metrics").mkdir(parents=True)
        (tmp_path / folder / MANIFEST_FILE).write_text(text)
    replace_run(tmp_path / STAGED_FOLDER / "a", tmp_path / "a")
    assert (tmp_path / "a" / MANIFEST_FILE).read_text() == "new" and list((tmp_path / REPLACED_FOLDER).iterdir()) == []


class Killed(BaseException):
    "Stands for a kill: no code catches it or cleans up after it."


def test_a_kill_at_any_step_leaves_the_old_run_or_the_new_one(run, monkeypatch, tmp_path):
    """Kills before and after each link, write, rename and removal.

    After each kill the runs are opened, listed and verified as another process would do."""
    scored = {
        split: rescoring.score_with_data(scoring_trainer(run, (split,)), run, run.predictions(split), split)
        for split in ("val", "test")
    }
    for split, trainer in scored.items():
        backtest = trainer.backtest(split)
        monkeypatch.setattr(trainer, "backtest", lambda split, backtest=backtest: backtest)  # computed once
    monkeypatch.setattr(rescoring, "score_with_data", lambda trainer, run, frame, split: scored[split])
    monkeypatch.setattr(rescoring, "scoring_trainer", lambda run, splits: None)
    for module, function in (
        (rescoring.tear_sheet, "plot_equity"),
        (rescoring.tear_sheet, "figure_png"),
        (trainers, "plot_robustness"),
    ):
        monkeypatch.setattr(module, function, lambda *args: b"a picture")
    source, name = run.path.parent, run.path.name
    n_steps, kill_at = [0], [0, False]  # steps so far; the step to kill at, and whether to kill after it

    def killing(call):
        def step(*args, **kw):
            n_steps[0] += 1
            last, after = kill_at
            if n_steps[0] == last and not after:
                raise Killed
            result = call(*args, **kw)
            if n_steps[0] == last:
                raise Killed
            return result

        return step

    for module, function in (
        (os, "rename"),
        (os, "link"),
        (shutil, "rmtree"),
        (rescoring, "write_json"),
        (rescoring, "write_scores"),
        (attempts, "file_hash"),
    ):
        monkeypatch.setattr(module, function, killing(getattr(module, function)))
    versions, last = [], 0
    while True:
        last += 1
        for after in (False, True):
            runs = tmp_path / f"killed_{last}_{after}"
            shutil.copytree(source, runs)
            n_steps[0] = 0
            kill_at[:] = [last, after]
            try:
                rescore_run(runs / name)
            except Killed:
                pass
            finally:
                kill_at[:] = [0, False]
            is_reached = n_steps[0] >= last
            opened = list_runs(runs) if last % 2 else [load_run(runs / name)]
            assert [r.path.name for r in opened] == [name] and list_runs(runs).unread == []
            opened[0].verify()
            versions.append(opened[0].scoring)
            assert opened[0].scoring == 2 or contents(opened[0].path) == contents(source / name), "old run changed"
            if last % 4:
                continue
            # rescoring again completes it
            assert rescore_run(runs / name)["scored"] == "all" and load_run(runs / name).scoring == 2
            assert list((runs / REPLACED_FOLDER).iterdir()) == [] and list((runs / STAGED_FOLDER).iterdir()) == []
            shutil.rmtree(runs)
        if not is_reached:
            break
    assert last > 15 and versions[0] == 1 and versions[-1] == 2 and set(versions) == {1, 2}
    assert versions == sorted(versions), "a later kill left the old run"
