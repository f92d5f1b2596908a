"Stored predictions scored anew: the same numbers, the same run, whatever kills the process."

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
from modelfactory.training.trainer import Trainer, trainer_plots


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    table = market_table(simulate_market(replace(MARKET_PRESETS["planted"], rows=(1500, 400, 400), columns=32)))
    return write_splits(
        table,
        tmp_path_factory.mktemp("data") / "small",
        (5, 20),
        extra_features=tuple(c for c in table if c.startswith("pub_")),
    )


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    "A run with predictions of val and test, as version 1 would have left it: its metrics are of another time."
    runs = tmp_path_factory.mktemp("runs")
    trainer = Trainer(dict(model="logistic_regression", horizon=5, data=str(data), preset="quick"))
    trainer.run_full_pipeline()
    attempt = start_attempt(runs, "logistic_regression", 5)
    trainer.evaluate("test", attempt)
    write_run(trainer, attempt, trainer_plots(trainer))
    for split in ("val", "test"):
        file = attempt / score_files(split)["metrics"]
        file.write_text(
            json.dumps(
                json.loads(file.read_text()) | dict(log_loss=9.0, f1_floor=0.1, directional_accuracy_p_shift=0.2)
            )
        )
    result = json.loads((attempt / "result.json").read_text())
    result.pop("scoring")
    (attempt / "result.json").write_text(json.dumps(result))
    return load_run(publish(attempt, runs)), trainer


@pytest.fixture
def run(made, tmp_path):
    "A copy of it in a folder of its own."
    runs = shutil.copytree(made[0].path.parent, tmp_path / "runs")
    return list_runs(runs)[0]


def contents(folder, but=()):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in but}


def equal(a, b):
    return set(a) == set(b) and all(a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) for k in a)


def test_scores_are_those_of_the_training_and_the_run_is_the_same(made, run):
    _, trainer = made
    before = contents(run.path)
    done = rescore([run.path])
    after = load_run(run.path)
    after.verify()
    assert (
        done.scored.tolist() == ["all"]
        and after.scoring == 2 > run.scoring
        and after.identity == run.identity
        and after.path == run.path
    )
    seconds = ("fit_seconds", "predict_seconds")
    for split, stored in (("val", after.metrics), ("test", after._numbers("test_metrics.json"))):
        fresh = dict(trainer.metrics[split])
        assert equal(
            {k: v for k, v in stored.items() if k not in seconds}, {k: v for k, v in fresh.items() if k not in seconds}
        )
    assert (
        set(after.baselines) == {"prior", "flat", "long", "persistence"}
        and len(after.daily_pnl())
        and len(after.daily("test"))
    )
    written = {
        *score_files("val").values(),
        *score_files("test").values(),
        MANIFEST_FILE,
        "plots/equity.png",
        "plots/robustness.png",
    }
    kept = contents(run.path)
    assert set(kept) == set(before) and all(kept[name] == text for name, text in before.items() if name not in written)
    assert np.array_equal(after.model().feature_columns, run.model().feature_columns)


def test_the_test_set_is_not_used_again(run):
    from modelfactory.training.test_set import read_ledger

    before = len(read_ledger(run.path.parent))
    rescore([run.path])
    assert before == 1 == len(read_ledger(run.path.parent))


def test_the_comparison_claims_profit_only_after_rescoring(run, capsys):
    def claim():
        return comparison(run.path.parent)["tasks"][0]

    assert "run `modelfactory rescore`" in claim()["why"]["profit"] and claim()["p_profit"] is None
    with pytest.raises(SystemExit) as end:
        main(["rescore", str(run.path.parent)])
    assert end.value.code == 0 and f"{run.path.name}: all" in capsys.readouterr().out
    assert claim()["earlier_scoring"] == [] and "rescore" not in claim()["why"].get("profit", "")


@pytest.mark.parametrize("spoil", ["gone", "changed", "labels"])
def test_without_the_data_class_metrics_alone(made, run, data, tmp_path, spoil):
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
    after = load_run(run.path)
    after.verify()
    assert done["reason"] == refused["reason"]
    assert (
        done["scored"] == "class metrics only"
        and dict(gone="no such folder", changed="has changed", labels="labels in the data differ")[spoil]
        in done["reason"]
    )
    assert after.metrics["log_loss"] == pytest.approx(trainer.metrics["val"]["log_loss"], abs=1e-12) and np.isnan(
        after.metrics["sharpe_net"]
    )
    assert after.metrics["directional_skill"] == pytest.approx(trainer.metrics["val"]["directional_skill"])
    assert set(after.baselines) == {"prior", "flat", "long"} and after.baseline["log_loss"] == pytest.approx(
        trainer.baseline()["log_loss"]
    )
    with pytest.raises(RunError, match="no daily profit"):
        after.daily_pnl()
    (task,) = comparison(run.path.parent)["tasks"]
    assert task["p_profit"] is None and "no prices" in task["why"]["profit"]


def test_rows_of_an_older_run_are_found_in_more_rows(made):
    "A dataset of today has more samples than an older run predicted; the rows of the run are taken, in its order."
    run, _ = made
    dataset = scoring_trainer(run).datasets["val"]
    frame = run.predictions().iloc[60:].sample(frac=1, random_state=0)
    rows = matching_rows(dataset, frame)
    assert len(rows) == len(frame) and (rows.metadata.symbol.to_numpy() == frame.symbol.to_numpy()).all()
    assert (rows.metadata.datetime.to_numpy() == frame.datetime.to_numpy()).all() and len(rows.X) == len(frame)
    with pytest.raises(RunError, match="1 of 10 labels"):
        matching_rows(
            dataset, frame.iloc[:10].assign(y_true=lambda t: [(t.y_true.iloc[0] + 2) % 3 - 1, *t.y_true.iloc[1:]])
        )
    with pytest.raises(RunError, match="10 of 10 predicted rows"):
        matching_rows(dataset, frame.iloc[:10].assign(symbol="another"))


def test_what_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["rescore", str(tmp_path / "nothing")])
    assert end.value.code == 2 and "neither a finished run nor a folder with runs" in capsys.readouterr().err
    table = run.predictions()
    table.assign(p_up=0.0).to_parquet(run.path / "predictions/val_predictions.parquet")
    with pytest.raises(RunError, match="changed since"):
        rescore_run(run.path)


def test_one_altered_run_does_not_end_the_others(run, capsys):
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


def test_a_run_whose_last_replacement_was_not_cleared_away_is_replaced_again(tmp_path):
    "The removal of the replaced run was interrupted: its folder is still there, and not empty."
    for folder, text in {"a": "old", f"{STAGED_FOLDER}/a": "new", f"{REPLACED_FOLDER}/a": "older"}.items():
        (tmp_path / folder / "metrics").mkdir(parents=True)
        (tmp_path / folder / MANIFEST_FILE).write_text(text)
    replace_run(tmp_path / STAGED_FOLDER / "a", tmp_path / "a")
    assert (tmp_path / "a" / MANIFEST_FILE).read_text() == "new" and list((tmp_path / REPLACED_FOLDER).iterdir()) == []


class Killed(BaseException):
    "A kill: nothing catches it, and nothing is cleaned up after it."


def test_killed_at_any_step_it_is_the_old_run_or_the_new_one(run, monkeypatch, tmp_path):
    "Killed before and after each link, write, rename and removal; then opened, listed and verified by another process."
    scored = {
        split: rescoring.score_with_data(scoring_trainer(run, (split,)), run, run.predictions(split), split)
        for split in ("val", "test")
    }
    monkeypatch.setattr(rescoring, "score_with_data", lambda trainer, run, frame, split: scored[split])
    monkeypatch.setattr(rescoring, "scoring_trainer", lambda run, splits: None)
    for module, name in ((rescoring.plots, "plot_equity"), (rescoring.plots, "png"), (rescoring, "plot_robustness")):
        monkeypatch.setattr(module, name, lambda *args: b"a picture")
    source, name = run.path.parent, run.path.name
    steps, deadline = [0], [0, False]

    def killing(call):
        def step(*args, **kw):
            steps[0] += 1
            last, after = deadline
            if steps[0] == last and not after:
                raise Killed
            result = call(*args, **kw)
            if steps[0] == last:
                raise Killed
            return result

        return step

    for module, call in (
        (os, "rename"),
        (os, "link"),
        (shutil, "rmtree"),
        (rescoring, "write_json"),
        (rescoring, "write_scores"),
        (attempts, "file_hash"),
    ):
        monkeypatch.setattr(module, call, killing(getattr(module, call)))
    outcomes, last = [], 0
    while True:
        last += 1
        for after in (False, True):
            runs = tmp_path / f"killed_{last}_{after}"
            shutil.copytree(source, runs)
            deadline[:], steps[0] = [0, False], 0
            deadline[:] = [last, after]
            try:
                rescore_run(runs / name)
            except Killed:
                pass
            finally:
                deadline[:] = [0, False]
            reached = steps[0] >= last
            found = list_runs(runs) if last % 2 else [load_run(runs / name)]
            assert [r.path.name for r in found] == [name] and list_runs(runs).unread == []
            found[0].verify()
            outcomes.append(found[0].scoring)
            assert found[0].scoring == 2 or contents(found[0].path) == contents(source / name), "the old run as it was"
            if last % 4:
                continue
            assert rescore_run(runs / name)["scored"] == "all" and load_run(runs / name).scoring == 2, (
                "and it can be done again"
            )
            assert list((runs / REPLACED_FOLDER).iterdir()) == [] and list((runs / STAGED_FOLDER).iterdir()) == []
            shutil.rmtree(runs)
        if not reached:
            break
    assert last > 15 and outcomes[0] == 1 and outcomes[-1] == 2 and set(outcomes) == {1, 2}
    assert outcomes == sorted(outcomes), "once it is the new run it stays so"
