"The leaderboard that `explore` shows: rows, table, tear sheets and differences. `test_lab.py` clicks on it."

import json
import re
import shutil

import nbformat
import pytest
from fabricate import bars, make_run
from traitlets import TraitError

from modelfactory import explore, list_runs, load_run
from modelfactory.runs import explore as module
from modelfactory.runs.manage import diff_runs

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Four scored runs, one without scores, one with damaged metrics, one joint fit and one unreadable folder."
    folder = tmp_path_factory.mktemp("explored")
    table = bars(300)
    for model, skill in (("gru", 1.0), ("svm", 0.0)):
        for data in ("/data/gold", "/data/<b>silver"):
            make_run(folder, model, table, data=data, skill=skill, family="neural" if model == "gru" else "classical")
    change(shutil.copytree(first(folder, "gru"), folder / "unscored"), scored=False, reason="no prices")
    (shutil.copytree(first(folder, "gru"), folder / "damaged") / "metrics/metrics.json").write_text("[1]")
    joint = shutil.copytree(first(folder, "svm"), folder / "joint")
    change(joint, horizon=[5, 20])
    for name in ("metrics.json", "baselines.json"):
        for horizon in (5, 20):
            shutil.copy(joint / "metrics" / name, joint / f"metrics/h{horizon}_{name}")
    (joint / "plots").mkdir()
    for name in ("h5_confusion", "h5_equity", "h20_equity", "learning_curve"):
        (joint / f"plots/{name}.png").write_bytes(PNG + name.encode())
    shutil.copytree(first(folder, "svm"), folder / "unread")
    (folder / "unread/manifest.json").write_text("{")
    return folder


def first(folder, model):
    "The run of a model on the first data set; the names of runs end in random digits."
    manifests = {path: json.loads((path / "manifest.json").read_text()) for path in folder.glob(f"{model}_*")}
    return next(path for path, manifest in manifests.items() if manifest["data"] == "/data/gold")


def change(run, **values):
    manifest = json.loads((run / "manifest.json").read_text()) | values
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def explorer(runs):
    return explore(runs)


def cells_of(page, key):
    row = re.search(f'<tr data-key="{key}">(.*?)</tr>', page)[1]
    return re.findall(r'data-value="([^"]*)"[^>]*>([^<]*)</td>', row)


def test_the_rows_are_all_runs_and_the_best_comes_first(runs, explorer):
    listed = list_runs(runs)
    assert len(explorer.rows) == len(listed) + 1 == 8  # the joint fit has two rows
    skill = [row.skill for row in explorer.rows.values()]
    assert skill == sorted(skill, reverse=True) and skill[-2:] == [float("-inf")] * 2
    scored = [part for run in listed if run.path.name not in ("unscored", "damaged") for part in run.parts()]
    assert sorted(skill[:-2]) == sorted(run.metrics["directional_skill"] for run in scored)


def test_a_cell_holds_the_stored_value_and_its_text(runs, explorer):
    run = load_run(first(runs, "gru"))
    cells = cells_of(explorer.page, run.path.name)
    value, text = cells[5]
    assert float(value) == run.metrics["directional_skill"] and text.startswith(f"{float(value):.3f} [")
    assert [text for _, text in cells[:5]] == ["gold", "neural", "gru", "5", "42"]


def test_rows_without_metrics_and_unreadable_folders_are_shown_with_the_reason(explorer):
    assert "unscored: not scored: no prices" in explorer.page
    assert "damaged: damaged/metrics/metrics.json: found a list" in explorer.page
    assert "left out: unread" in explorer.page
    assert cells_of(explorer.page, "unscored")[-1] == ("", "–")


def test_names_are_shown_and_never_read_as_html(explorer):
    assert "&lt;b&gt;silver" in explorer.page and "<b>silver" not in explorer.page
    key = next(key for key, row in explorer.rows.items() if "silver" in row.run.data)
    explorer.opened, explorer.selected = key, [key, next(other for other in explorer.rows if other != key)]
    for answer in (explorer.sheet, explorer.difference):
        assert "silver" in answer["page"] and "<b>silver" not in answer["page"]


def test_a_tear_sheet_has_the_verdict_the_metrics_and_the_figures_of_its_horizon(explorer):
    explorer.opened = "joint h5"
    run, page = explorer.rows["joint h5"].run, explorer.sheet["page"]
    assert explorer.sheet["key"] == "joint h5" and "trials" in page or "Direction" in page
    assert f"{run.metrics['log_loss']:.3f}" in page
    assert re.findall("alt='([^']*)'", page) == ["h5 equity", "h5 confusion", "learning curve"]


def test_a_large_figure_is_named_and_not_shown(runs, explorer, monkeypatch):
    monkeypatch.setattr(module, "MAX_FIGURE_BYTES", 10)
    explorer.opened = "joint h20"
    assert "h20_equity.png: 18 bytes" in explorer.sheet["page"] and "<img" not in explorer.sheet["page"]


def test_a_difference_is_that_of_diff_runs(explorer):
    keys = [key for key in explorer.rows if key.startswith(("gru", "svm"))]
    explorer.selected = keys[:1]
    assert explorer.difference == {}
    explorer.selected = [keys[0], keys[-1]]
    assert explorer.selected_runs == [explorer.rows[keys[0]].run, explorer.rows[keys[-1]].run]
    expected = diff_runs(*explorer.selected_runs)
    names = re.findall(r"<tr>\s*<td>\w+</td>\s*<td>(\w+)</td>", explorer.difference["page"])
    assert names == [row["name"] for row in expected.rows] and "log_loss" in names
    change = next(row["second"] - row["first"] for row in expected.rows if row["name"] == "log_loss")
    assert f"<td>{change:+.3f}</td>" in explorer.difference["page"]


def test_filters_and_order_read_no_file_and_the_index_is_read_once(explorer, monkeypatch):
    reads = []
    monkeypatch.setattr(module, "list_runs", lambda folder: reads.append(folder))
    monkeypatch.setattr("modelfactory.runs.stored.read_json", lambda *a, **k: reads.append(a))
    explorer.filters = dict(model=["gru"], horizon=[5])
    explorer.order = ["log_loss", "ascending"]
    assert reads == []


def test_the_trials_of_a_part_of_the_runs_are_those_of_its_folder(runs):
    listed = list_runs(runs)
    part = explore([run for run in listed if run.path.name.startswith("gru")])
    key = next(iter(part.rows))
    whole = explore(runs)
    part.opened = whole.opened = key
    assert len(part.rows) == 2 and part.sheet == whole.sheet


def test_a_run_that_was_removed_is_answered_with_the_reason(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    explorer = explore(folder)
    keys = [key for key in explorer.rows if key.startswith("gru")]
    shutil.rmtree(folder / keys[0])
    explorer.opened, explorer.selected = keys[0], keys
    assert keys[0] in explorer.sheet["page"] or "No such file" in explorer.sheet["page"]
    assert explorer.difference["page"].startswith("<p>") and "config.yaml" in explorer.difference["page"]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("filters", dict(horizn=[5]), "did you mean 'horizon'"),
        ("filters", dict(horizon=5), "expected a list"),
        ("order", ["log_loss"], "ascending or descending"),
        ("order", ["logloss", "ascending"], "expected a column"),
        ("opened", "no_run", "no row 'no_run'"),
        ("selected", ["no_run"], "no row 'no_run'"),
    ],
)
def test_a_wrong_value_is_refused_and_changes_nothing(explorer, name, value, message):
    before = getattr(explorer, name)
    with pytest.raises(TraitError, match=message):
        setattr(explorer, name, value)
    assert getattr(explorer, name) == before


def test_at_most_two_different_rows_are_selected(explorer):
    keys = list(explorer.rows)
    for wrong in (keys[:3], [keys[0], keys[0]]):
        with pytest.raises(TraitError, match="at most 2 different"):
            explorer.selected = wrong


def test_two_runs_of_one_name_are_refused(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    with pytest.raises(ValueError, match="several runs are named damaged, gru"):
        explore([*list_runs(runs), *list_runs(folder)])


def test_a_folder_without_runs(tmp_path):
    explorer = explore(tmp_path)
    assert "No finished run" in explorer._repr_mimebundle_()["text/html"] and repr(explorer) == "no finished run"


def test_a_saved_notebook_and_its_html_hold_the_table(explorer, monkeypatch):
    from nbconvert import HTMLExporter
    from nbformat import v4

    monkeypatch.setattr(module, "STATIC_ROWS", 3)
    data = explorer._repr_mimebundle_()
    assert set(data) == {"text/html", "text/plain"}  # a widget view would show an error without a kernel
    cell = v4.new_code_cell("explore(runs)", outputs=[v4.new_output("execute_result", data)])
    notebook = nbformat.reads(nbformat.writes(v4.new_notebook(cells=[cell])), 4)
    page = HTMLExporter(template_name="basic").from_notebook_node(notebook)[0]
    keys = list(explorer.rows)
    assert [cells_of(page, key) for key in keys[:3]] == [cells_of(explorer.page, key) for key in keys[:3]]
    assert f'data-key="{keys[3]}"' not in page and "5 more rows are not shown" in page
    assert "<script" not in data["text/html"]
