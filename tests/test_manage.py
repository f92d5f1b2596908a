"Commands that show, compare and remove runs, and the JSON that they print."

import json
import os
import shutil

import jsonschema
import pytest
from quick import quick_plugin, small_splits
from typer.testing import CliRunner

from modelfactory.cli import app
from modelfactory.runs.examples import train_example
from modelfactory.runs.manage import clean_runs, diff_runs, dry_run, run_title, show_run
from modelfactory.runs.run import load_run
from modelfactory.runs.run_folder import CHECKPOINT_PREFIX, FAILED_FOLDER, PARTIAL_FOLDER, start_attempt

TEXT, NUMBER, WHOLE = dict(type="string"), dict(type=["number", "null"]), dict(type="integer")


def rows_of(**properties):
    "The schema of a list of objects that have exactly these keys."
    item = dict(type="object", properties=properties, required=list(properties), additionalProperties=False)
    return dict(type="array", items=item, minItems=1)


def object_of(**properties):
    return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)


NUMBERS = dict(type="object", additionalProperties=dict(type=["number", "null", "string"]))
TEXTS = dict(type="array", items=TEXT)
STATUS = rows_of(run=TEXT, status=TEXT, seconds=NUMBER, note=TEXT)
RUN = object_of(
    **dict.fromkeys(("run", "data", "model", "scored"), TEXT),
    **dict.fromkeys(("horizon", "seed"), WHOLE),
    **dict.fromkeys(("directional_accuracy", "log_loss", "f1_macro", "sharpe_net"), NUMBER),
)
SCHEMAS = {
    "models": rows_of(name=TEXT, family=TEXT, summary=TEXT, available=dict(type="boolean"), reason=TEXT),
    "doctor": rows_of(what=TEXT, value=TEXT, state=dict(enum=["ok", "warn", "fail"]), fix=TEXT),
    "runs": object_of(runs=dict(type="array", items=RUN, minItems=2), unread=dict(type="array")),
    "show": object_of(
        title=TEXT,
        verdict=TEXT,
        metrics=NUMBERS,
        baseline=NUMBERS,
        facts=dict(type="object", additionalProperties=TEXT),
        notes=TEXTS,
        folder=TEXT,
    ),
    "status": STATUS,
    "experiment": object_of(n_runs=WHOLE, seconds=NUMBER, unknown=TEXTS, runs=STATUS),
    "clean": rows_of(folder=TEXT, kind=dict(enum=["failed", "interrupted"]), bytes=WHOLE),
    "compare": object_of(
        first=TEXT,
        second=TEXT,
        differences=rows_of(part=TEXT, name=TEXT, first={}, second={}),
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two finished runs of the model `nearest`, which differ in the seed, and one failed attempt."
    folder = tmp_path_factory.mktemp("manage")
    with quick_plugin(folder):
        data = str(small_splits(folder / "data"))
        for seed in (1, 2):
            train_example(dict(model="nearest", horizon=5, data=data, seed=seed), folder / "runs")
        (folder / "runs" / FAILED_FOLDER / "nearest_h5_old").mkdir(parents=True)
        (folder / "runs" / FAILED_FOLDER / "nearest_h5_old/run.log").write_text("no memory")
        yield folder / "runs"


@pytest.fixture(scope="module")
def grid(runs):
    "A grid of one finished run and one that was never trained."
    file = runs.parent / "grid.yaml"
    values = dict(models=["nearest"], horizons=[5], data=[str(runs.parent / "data")], seeds=[1, 3])
    file.write_text(json.dumps(values))
    return str(file)


def finished(runs):
    return sorted(str(f) for f in runs.glob("nearest*"))


def output_of(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


@pytest.mark.parametrize("command", SCHEMAS)
def test_json_has_its_schema(runs, grid, command):
    first, second = finished(runs)
    arguments = {
        "models": [],
        "doctor": [],
        "runs": [runs],
        "show": [first],
        "status": [grid, "--output", runs],
        "experiment": [grid, "--output", runs, "--dry-run"],
        "clean": [runs, "--dry-run"],
        "compare": ["--diff", first, second],
    }
    printed = json.loads(output_of(command, *arguments[command], "--json"))
    jsonschema.validate(printed, SCHEMAS[command])


def test_a_summary_has_the_verdict_and_the_metrics_of_its_run(runs):
    run = load_run(finished(runs)[0])
    summary = show_run(run.path)
    text = repr(summary)
    assert text.startswith("nearest, h5, data, seed 1\n") and run.claim.split(":")[0] in " ".join(text.split())
    assert summary.metrics == dict(run.metrics) and summary.baseline == run.baseline
    assert f"{run.metrics['log_loss']:.3f}" in text
    assert max(map(len, text.split("\n\nvalidation")[0].splitlines())) <= 80


def test_a_title_names_the_fold(runs):
    run = load_run(finished(runs)[0])
    run.data = "/data/eurusd"
    run.manifest |= dict(fold=3, folds="walk-forward, 6 folds")
    assert run_title(run) == "nearest, h5, eurusd, seed 1, fold 3 (walk-forward, 6 folds)"


def test_a_run_without_scores_is_shown_with_the_reason(runs, tmp_path):
    folder = shutil.copytree(finished(runs)[0], tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text()) | dict(scored=False, reason="no prices")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    summary = show_run(folder)
    assert summary.verdict == "not scored: no prices" and summary.metrics == {} and "no prices" in repr(summary)


def test_two_seeds_differ_in_the_seed_and_nowhere_in_the_data(runs):
    difference = diff_runs(*finished(runs))
    assert ("task", "seed", 1, 2) in [tuple(row.values()) for row in difference.rows]
    assert not [row for row in difference.rows if row["part"] == "data"]
    assert not diff_runs(finished(runs)[0], finished(runs)[0]).rows


def test_a_dry_run_trains_nothing_and_estimates_from_finished_runs(runs, grid):
    before = sorted(runs.rglob("*"))
    plan = dry_run(grid, runs)
    assert plan.n_runs == 1 and plan.seconds > 0 and plan.unknown == []
    assert [row["status"] for row in plan.status] == ["done", "waiting"]
    assert "1 run would be trained" in repr(plan) and sorted(runs.rglob("*")) == before


def test_a_dry_run_refuses_what_the_grid_refuses(runs, grid):
    done = CliRunner().invoke(app, ["experiment", grid, "--output", str(runs), "--models", "nearst", "--dry-run"])
    assert done.exit_code != 0 and "nearest" in str(done.exception)


def test_clean_keeps_finished_runs_and_live_attempts(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    live = start_attempt(folder, dict(model="nearest", horizon=5))
    dead = shutil.copytree(live, live.with_name("nearest_h5_dead"))
    (dead / "pid").write_text("999999999 0.0")
    fit = live.with_name(f"{CHECKPOINT_PREFIX}0123_4567")
    fit.mkdir()
    would = clean_runs(folder, dry_run=True)
    assert dead.is_dir() and [row["kind"] for row in would] == ["failed", "interrupted"]
    assert clean_runs(folder) == would and clean_runs(folder) == []
    assert live.is_dir() and fit.is_dir() and not dead.exists() and len(list(folder.glob("nearest*"))) == 2
    assert not list((folder / FAILED_FOLDER).iterdir()) and (folder / PARTIAL_FOLDER).is_dir()


def test_clean_removes_a_link_and_not_its_target(runs, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "runs"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (folder / FAILED_FOLDER).mkdir(parents=True)
    os.symlink(outside, folder / FAILED_FOLDER / "link")
    assert len(clean_runs(folder)) == 1
    assert (outside / "kept").read_text() == "kept" and not list((folder / FAILED_FOLDER).iterdir())
