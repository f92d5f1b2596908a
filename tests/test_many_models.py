"Comparisons of many models: which of them are tested, where the others are shown, and the size of the page."

import json
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
from fabricate import bars, make_run

from modelfactory.runs import comparison, report, task
from modelfactory.runs.compare import compare
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import MANIFEST_FILE

MODELS = ("gru", "svm", "mlp", "tcn", "logistic_regression", "knn")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Six models, of which one has two seeds, with stored log losses of 1.1, 1.2 ..., and the control as the fifth."
    folder, table = tmp_path_factory.mktemp("models"), bars(n=150)
    for i, model in enumerate(MODELS):
        for seed in (1, 2) if model == "svm" else (1,):
            run = make_run(folder, model, table, seed=seed, n_boot=4)
            set_loss(run.path, 1.1 + i / 10)
    return folder


def set_loss(run, loss):
    file = run / "metrics/metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(log_loss=loss)))


@pytest.fixture
def few(monkeypatch):
    "A comparison of three models at most."
    monkeypatch.setattr(comparison, "MAX_MODELS", 3)
    monkeypatch.setattr(report, "MAX_MODELS", 3)


def test_up_to_the_limit_nothing_changes(runs, monkeypatch):
    full = comparison.comparison(runs)
    monkeypatch.setattr(comparison, "MAX_MODELS", len(MODELS))
    assert comparison.comparison(runs) == full
    assert [len(t["models"]) for t in full["tasks"]] == [6] and full["tasks"][0]["untested"] == []
    assert report.scope_sentence(full, full["tasks"]) == ""


def test_the_best_models_and_the_controls_are_tested_and_all_are_in_the_tables(runs, few):
    result = comparison.comparison(runs)
    entry = result["tasks"][0]
    assert {m["model"] for m in entry["models"]} == {"gru", "svm", "logistic_regression"}
    assert entry["n_models"] == 3 and entry["trials"] == 7, "claims are corrected for all runs"
    assert [m["model"] for m in entry["untested"]] == ["mlp", "tcn", "knn"], "by their stored log loss"
    assert [m["log_loss"] for m in entry["untested"]] == pytest.approx([1.3, 1.4, 1.6])
    assert sorted(m["rank"] for m in entry["models"] + entry["untested"]) == [1, 2, 3, 4, 5, 6]
    table = report.leaderboard(result)
    assert set(table.model) >= set(MODELS)
    assert (table[table.verdict == comparison.NOT_TESTED].model == ["mlp", "tcn", "knn"]).all()
    assert not table[table.verdict == comparison.NOT_TESTED].directional_skill_significant.any()
    page = report.leaderboard_table(table)
    assert "knn" in page.page and "corrected interval" in page.page
    sentence = report.scope_sentence(result, result["tasks"])
    assert "the 3 models of a task" in sentence and "3 other models are only in the tables" in sentence


def test_the_others_rank_by_log_loss_but_never_before_the_best_tested_model(runs, few, tmp_path):
    copied = shutil.copytree(runs, tmp_path / "runs")
    knn = next(copied.glob("knn_*"))
    manifest = json.loads((knn / MANIFEST_FILE).read_text())
    (knn / MANIFEST_FILE).write_text(json.dumps(manifest | dict(data_fingerprint="other", created="2020-01-01")))
    set_loss(knn, 0.01)  # on other data, so that it is not chosen
    entry = comparison.comparison(copied)["tasks"][0]
    ranks = {m["model"]: m["rank"] for m in entry["models"] + entry["untested"]}
    assert ranks[entry["models"][0]["model"]] == 1 and ranks["knn"] == 2


def test_predictions_of_the_others_are_not_read(runs, few, tmp_path):
    copied = shutil.copytree(runs, tmp_path / "runs")
    for name in ("mlp", "tcn", "knn"):
        for run in copied.glob(f"{name}_*"):
            shutil.rmtree(run / "predictions")
    assert comparison.comparison(copied)["unread"] == []


def test_the_next_model_takes_the_place_of_one_that_cannot_be_read(runs, few, tmp_path):
    copied = shutil.copytree(runs, tmp_path / "runs")
    shutil.rmtree(next(copied.glob("gru_*")) / "predictions")
    result = comparison.comparison(copied)
    assert {m["model"] for m in result["tasks"][0]["models"]} == {"svm", "mlp", "logistic_regression"}
    assert [row["folder"][:3] for row in result["unread"]] == ["gru"]
    assert "gru" not in {m["model"] for m in result["tasks"][0]["untested"]}


def test_models_with_other_classes_are_neither_tested_nor_listed(runs, few, tmp_path):
    copied = shutil.copytree(runs, tmp_path / "runs")
    old = make_run(copied, "two", bars(n=150, shares=(1, 1)).replace(dict(y_true={0: 1})), classes=(-1, 1), n_boot=4)
    manifest = json.loads((old.path / MANIFEST_FILE).read_text())
    (old.path / MANIFEST_FILE).write_text(json.dumps(manifest | dict(created="2020-01-01T00:00:00")))
    result = comparison.comparison(copied)
    assert "two" not in {m["model"] for m in result["tasks"][0]["models"] + result["tasks"][0]["untested"]}
    assert [row["folder"] for row in result["unread"]] == [old.path.name]
    assert "classes [-1, 1], expected [-1, 0, 1]" in result["unread"][0]["reason"]


def test_best_models_against_a_naive_choice():
    rng = np.random.default_rng(0)

    class Run:
        config = dict(data=dict(classes=[-1, 0, 1]))
        created, path = "2026", type("Path", (), dict(name="x"))

        def __init__(self, loss, fingerprint="a"):
            self.metrics, self.manifest = dict(log_loss=loss), dict(data_fingerprint=fingerprint)

    models = {f"m{i:02d}": [Run(x) for x in rng.uniform(size=1 + i % 3)] for i in range(40)} | dict(dlinear=[Run(9.0)])
    means = pd.Series({name: np.mean([r.metrics["log_loss"] for r in seeds]) for name, seeds in models.items()})
    expected = {"dlinear", *means.drop("dlinear").nsmallest(9).index}
    assert set(task.best_models(models, 10)) == expected and task.best_models(models, None) == list(models)
    assert task.best_models(models, 10) == sorted(expected, key=list(models).index)
    assert "nan" not in task.best_models(models | dict(nan=[Run(float("nan"))]), 10)


def test_tasks_with_the_smallest_p_values_are_shown_within_the_limit():
    p_values = [0.5, 0.001, None, 0.2, 0.04]
    tasks = [dict(p_direction=p, models=[{}] * 10, baselines=[]) for p in p_values]
    shown = report.shown_tasks(dict(tasks=tasks), 30, report.n_table_rows)
    assert [t["p_direction"] for t in shown] == [0.001, 0.2, 0.04], "in the order of the page"
    assert report.shown_tasks(dict(tasks=tasks), 500, report.n_table_rows) == tasks
    assert len(report.shown_tasks(dict(tasks=tasks), 1, report.n_table_rows)) == 1
    assert report.shown_tasks(dict(tasks=[]), 1, report.n_table_rows) == []


def test_a_table_keeps_all_tested_models_and_the_best_of_the_others():
    verdicts = ["not significant"] * 3 + [comparison.NOT_TESTED] * 5 + [""]
    table = pd.DataFrame(dict(verdict=verdicts, model=range(9)))
    shown, sentence = report.table_rows(table, 6)
    assert shown.model.tolist() == [0, 1, 2, 3, 4, 8]
    assert sentence == "3 more models are in model_comparison.json."
    assert report.table_rows(table, 1)[0].model.tolist() == [0, 1, 2, 8]
    assert report.table_rows(table, 9)[1] == ""


@pytest.mark.slow
def test_a_page_of_60_models_names_all_draws_30_and_is_small(tmp_path):
    one = make_run(tmp_path / "one", "base", bars(n=150), n_boot=4).path
    manifest, rng = json.loads((one / MANIFEST_FILE).read_text()), np.random.default_rng(0)
    for i in range(60):
        run = shutil.copytree(one, tmp_path / f"runs/model_{i:02d}_h5_20260101_000000_{i:06x}")
        own = dict(model=f"model_{i:02d}", name=run.name, identity=f"{i:016x}")
        (run / MANIFEST_FILE).write_text(json.dumps(manifest | own))
        (run / "config.yaml").write_text(
            (one / "config.yaml").read_text().replace("model: base", f"model: model_{i:02d}")
        )
        set_loss(run, float(rng.uniform(1.0, 1.2)))
    assert len(list_runs(tmp_path / "runs")) == 60
    page = compare(tmp_path / "runs")
    text = page.read_text()
    assert page.stat().st_size < 3_000_000
    assert all(f"model_{i:02d}" in text for i in range(60))
    assert text.count("30 other models are only in the tables") >= 5, "once a section"
    cells = nbformat.read(tmp_path / "runs/compare.ipynb", 4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [i for i, output in enumerate(outputs) if "image/png" in output.get("data", {})]
    reasons = [outputs[i]["metadata"].get("image/png", {}).get("alt", "") for i in figures]
    assert figures and any("of 30 models" in text for text in reasons)
