"User reports on purging, tuning, tracking and plugins, each as a test."

import filecmp
import sqlite3
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_tuner
from conftest import finish, until
from test_tracking import client_of, make_run
from test_tuner import process, states, tuner

from modelfactory.cli import main
from modelfactory.data.folds import purge_splits
from modelfactory.data.splits import NO_TARGET, SplitOverlap, SplitsError, check_splits, present_splits, read_splits
from modelfactory.models import conformance
from modelfactory.models.conformance import CHECKS, ConformanceError, check_model
from modelfactory.models.errors import NotFittedError
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.attempt import publish, write_run
from modelfactory.runs.engine import Outcome
from modelfactory.runs.grid import GridResult
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import start_attempt
from modelfactory.runs.tracking import TrackingError, rebuild, track_run, track_runs
from modelfactory.training.trainer import Trainer
from modelfactory.tuning.result import n_trials_of, read_tuned
from modelfactory.tuning.storage import MISSED_HEARTBEATS

pytestmark = pytest.mark.slow

NAMES = ("train", "val", "test")
at_home, forks, home = test_tuner.at_home, test_tuner.forks, test_tuner.home  # fixtures


def call(*args):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    return end.value.code


def bars(n=700, reach=None, symbols="AB", seed=0):
    "Hourly bars whose labels of horizon 5 are decided up to `reach` bars later; None: without bars_to_hit."
    rng = np.random.default_rng(seed)
    times, labels, parts = pd.date_range("2024-01-01", periods=n, freq="h"), np.arange(n) % 3 - 1, []
    for symbol in symbols:
        x, z = rng.normal(size=n), rng.normal(size=n)
        parts.append(pd.DataFrame(dict(datetime=times, symbol=symbol, x=x, z=z, label_h5=labels)))
    table = pd.concat(parts, ignore_index=True)
    if reach:
        table["bars_to_hit_h5"] = rng.integers(1, reach + 1, len(table))
    return table


def write(folder, table, gap=0, **options):
    "Splits cut by time, with `gap` bars excluded between them; rows in random order."
    folder.mkdir(parents=True)
    times = np.sort(table.datetime.unique())
    cuts = np.split(np.arange(len(times)), [int(0.6 * len(times)), int(0.8 * len(times))])
    for name, part in zip(NAMES, cuts, strict=True):
        kept = part[gap if name != "train" else 0 :]
        rows = table[table.datetime.isin(times[kept])].sample(frac=1, random_state=1)
        pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), folder / f"{name}_scaled.parquet", **options)
    (folder / "feature_scaler.json").write_text("{}")
    return folder


def labels_crossing(early, late):
    "Whether the label of each row is decided at or after the first bar of the later split, (n,) bool."
    start = late.datetime.min()
    last = early.groupby("symbol").datetime.max()
    hours = (start - early.datetime) / pd.Timedelta("1h")
    assert (last == early.datetime.max()).all()
    return (hours <= early.get("bars_to_hit_h5", 5)).to_numpy()


@pytest.mark.parametrize("reach", [None, 3, 15, 60])
def test_purging_makes_null_what_reaches_over_and_nothing_else(tmp_path, reach):
    source, purged = write(tmp_path / "splits", bars(reach=reach)), tmp_path / "purged"
    with pytest.raises(SplitOverlap):
        check_splits(source)
    counts = purge_splits(source, purged)
    frames = {name: pd.read_parquet(source / f"{name}_scaled.parquet") for name in NAMES}
    for name, late in (("train", "val"), ("val", "test")):
        before, after = (pq.read_table(f / f"{name}_scaled.parquet") for f in (source, purged))
        over = labels_crossing(frames[name], frames[late])
        assert after.schema.equals(before.schema, check_metadata=True)
        assert after.drop_columns("label_h5").equals(before.drop_columns("label_h5"))
        assert after["label_h5"].is_null().to_numpy().tolist() == over.tolist() and over.any()
        assert after["label_h5"].filter(pa.array(~over)).equals(before["label_h5"].filter(pa.array(~over)))
        assert counts.set_index("split").loc[name, "labels purged"] == over.sum()
    for file in ("test_scaled.parquet", "feature_scaler.json"):
        assert filecmp.cmp(source / file, purged / file, shallow=False)
    assert "decided by bars" not in str(check_splits(purged))


def test_purging_twice_changes_no_byte(tmp_path):
    source = write(tmp_path / "splits", bars(reach=15))
    purge_splits(source, tmp_path / "once")
    assert purge_splits(tmp_path / "once", tmp_path / "twice")["labels purged"].sum() == 0
    for file in (tmp_path / "once").iterdir():
        assert filecmp.cmp(file, tmp_path / "twice" / file.name, shallow=False)


@pytest.mark.parametrize("label", ["int8", "int64", "float64", "Int16", "Float32"])
def test_labels_keep_their_type(tmp_path, label):
    table = bars(reach=9).astype(dict(label_h5=label))
    source = write(tmp_path / "splits", table, compression="zstd", row_group_size=100)
    purge_splits(source, tmp_path / "purged")
    before, after = (pq.ParquetFile(f / "train_scaled.parquet") for f in (source, tmp_path / "purged"))
    assert after.schema_arrow.field("label_h5").type == before.schema_arrow.field("label_h5").type
    assert after.metadata.num_row_groups == before.metadata.num_row_groups > 1
    assert after.metadata.row_group(0).column(0).compression == "ZSTD"
    labels = read_splits(tmp_path / "purged")["train"].labels[5]
    assert (labels == NO_TARGET).sum() == after.read()["label_h5"].null_count > 0


@pytest.mark.parametrize("gap", [0, 5, 20, 48])
def test_the_advice_is_the_reach_of_the_labels_and_what_was_counted(tmp_path, gap):
    with pytest.raises(SplitOverlap) as error:
        check_splits(write(tmp_path / "splits", bars(reach=60), gap))
    assert "labels reach up to 60 bars (the largest bars_to_hit_h5)" in str(error.value)
    assert f" has {gap} bars between 2024-01-" in str(error.value)
    assert "leave 60 bars between the splits" in str(error.value) and "modelfactory purge" in str(error.value)
    check_splits(write(tmp_path / "with gap", bars(reach=60), 60))


def test_the_error_without_bars_to_hit_names_the_horizon(tmp_path):
    with pytest.raises(SplitOverlap, match=r"up to 5 bars \(the horizon: there is no bars_to_hit_h5\)"):
        check_splits(write(tmp_path / "splits", bars()))


def test_purge_command(tmp_path, capsys):
    source = write(tmp_path / "splits", bars(reach=15))
    assert call("check", source) == 2 and "modelfactory purge" in capsys.readouterr().err
    assert call("purge", source, "--output", tmp_path / "purged") == 0 and "see " in capsys.readouterr().out
    assert call("check", tmp_path / "purged") == 0
    assert call("purge", source, "--output", tmp_path / "purged") == 2 and "exists" in capsys.readouterr().err


def test_a_test_split_without_scaled_in_its_name_is_purged_and_checked(tmp_path):
    "Labels of val that are decided in test are purged, and `check` reads test as well."
    source = write(tmp_path / "splits", bars(reach=15))
    for name in NAMES:
        (source / f"{name}_scaled.parquet").rename(source / f"{name}.parquet")
    assert present_splits(source) == NAMES and present_splits(dict(train=1, val=1)) == NAMES[:2]
    purged = purge_splits(source, tmp_path / "out").set_index("split")["labels purged"]
    assert purged["train"].sum() > 0 and purged["val"].sum() > 0 and call("check", source) == 2
    assert (tmp_path / "out/test.parquet").is_file() and call("check", tmp_path / "out") == 0


def test_parts_and_csv_are_not_purged(tmp_path):
    source = write(tmp_path / "splits", bars(reach=15))
    pd.read_parquet(source / "val_scaled.parquet").to_csv(source / "val.csv", index=False)
    (source / "val_scaled.parquet").unlink()
    with pytest.raises(SplitsError, match="val.csv: expected one parquet file for each split"):
        purge_splits(source, tmp_path / "purged")
    assert [p.name for p in tmp_path.iterdir()] == ["splits"]


def test_splits_that_cannot_be_purged_are_an_error_and_nothing_is_written(tmp_path):
    table = bars()
    source = write(tmp_path / "splits", table)
    with pytest.raises(SplitsError, match="lies inside"):
        purge_splits(source, source / "purged")
    table[table.datetime > "2024-01-10"].to_parquet(source / "val_scaled.parquet")
    with pytest.raises(SplitOverlap, match="cut the splits by time"):
        purge_splits(source, tmp_path / "purged")
    assert [p.name for p in tmp_path.iterdir()] == ["splits"]


# Tuning and tracking


def orphaned(tuner):
    "Number of a trial without a heartbeat, as after a process that was killed right after it created the trial."
    return tuner.study().ask().number


def test_a_trial_that_nobody_works_on_is_made_by_another(forks, home, tmp_path):
    lost = orphaned(tuner(home, tmp_path / "o.db", 2))
    worker = process(forks, home, tmp_path / "o.db", 2)
    written = finish(worker)
    result = tuner(home, tmp_path / "o.db", 2).run()
    assert worker.returncode == 0 and len(result.trials) == 2 and {"COMPLETE", "PRUNED"} >= set(states(result)), written
    assert result.study.trials[lost].state.name == "FAIL" and lost not in [t.number for t in result.trials]


def test_a_running_trial_of_another_process_is_not_repeated(forks, home, tmp_path):
    "The trial takes longer than the permitted number of missed heartbeats. It neither fails nor runs twice."
    storage, begun = tmp_path / "alive.db", tmp_path / "begun"
    slow = dict(pause=1.5 * MISSED_HEARTBEATS / 6, rounds=6)
    other = process(forks, home, storage, 1, slow, VALLEY_BEGUN=begun)
    until(lambda: begun.exists() or other.poll() is not None, "a trial")
    result = tuner(home, storage, 1, slow).run()
    written = finish(other)
    assert other.returncode == 0 and [t.state.name for t in result.study.trials] == ["COMPLETE"], written


@pytest.mark.parametrize("folder", ["50%", "what?", "a%20b", "{x}", "a#b", "x&y=z", "ü é"])
def test_a_study_is_kept_in_the_file_that_was_named(home, tmp_path, monkeypatch, folder):
    monkeypatch.setenv("MODELFACTORY_RUNS", str(tmp_path / folder))
    tuner(home, None, 1).run()
    assert [f.name for f in tmp_path.iterdir()] == [folder]
    assert [f.name for f in (tmp_path / folder).iterdir()] == ["tuning.db"]
    assert n_trials_of("valley", 5) == n_trials_of("valley", 5, storage=tmp_path / folder / "tuning.db") == 1


def test_tuned_parameters_are_saved_in_the_runs_folder(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELFACTORY_RUNS", str(tmp_path / "runs"))
    before = sorted((home / "params").rglob("*"))
    file = tuner(home, None, 1).run().save()
    assert file == tmp_path / "runs/tuned/valley_h5.yaml" and read_tuned(file)[1]["n_trials"] == 1
    assert sorted((home / "params").rglob("*")) == before and list_runs(tmp_path / "runs") == []


def test_an_experiment_that_was_deleted_is_one_line_with_what_to_do(tmp_path):
    run = make_run(tmp_path)
    track_run(run)
    client, _ = client_of(tmp_path)
    client.delete_experiment(client.get_experiment_by_name("modelfactory").experiment_id)
    for call_tracking in (lambda: track_run(run), lambda: track_runs(tmp_path), lambda: rebuild(tmp_path)):
        with pytest.raises(TrackingError, match="was deleted in MLflow; take another name") as error:
            call_tracking()
        assert "\n" not in str(error.value) and "--experiment-id 1" in str(error.value)
    assert track_runs(tmp_path, experiment="modelfactory_2").added == 1
    client.restore_experiment("1")
    assert track_runs(tmp_path).unchanged == 1


def test_an_empty_database_is_filled(tmp_path):
    make_run(tmp_path)
    (tmp_path / "mlflow.db").touch()
    assert track_runs(tmp_path).added == 1 and len(client_of(tmp_path)[1]) == 1


@pytest.mark.parametrize("damage", ["empty", "not a database"])
def test_a_damaged_database_is_an_error_of_one_line_with_a_fix(tmp_path, damage):
    "All tables except that of MLflow's version were dropped, or the file is not a database."
    run, file = make_run(tmp_path), tmp_path / "mlflow.db"
    track_run(run)
    if damage == "empty":
        with sqlite3.connect(file) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for name in tables:
                if name not in ("alembic_version", "sqlite_sequence"):
                    db.execute(f"DROP TABLE {name}")
    else:
        file.write_bytes(b"something else" * 100)
    for call_tracking in (lambda: track_run(run), lambda: track_runs(tmp_path), lambda: rebuild(tmp_path)):
        with pytest.raises(TrackingError, match="; delete it, then modelfactory track --rebuild$") as error:
            call_tracking()
        assert "\n" not in str(error.value)
    file.unlink()
    assert rebuild(tmp_path).added == 1


# Plugins, and the exit codes of a grid

CONTRACT_ALONE = """
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from modelfactory.models.base import BaseModel, ModelConfig, PredictionOutput
from modelfactory.models.errors import FeatureMismatch, NotFittedError
from modelfactory.models.registry import ModelRegistry


@dataclass
class OwnFilesConfig(ModelConfig):
    width: float = 1.


@ModelRegistry.register("own_files", family="examples")
class OwnFiles(BaseModel):
    "Classifies by the distance to the class means; saves its own files, as section 3 of the contract requires."
    Config = OwnFilesConfig
    means = None

    def rows(self, X, n):
        T, F = self.config.sequence_length, len(self.feature_columns)
        expected = (n, F) if T == 1 else (n, T, F)
        if X.shape != expected or X.dtype != np.float32:
            raise ValueError(f"X is {X.shape} {X.dtype}, expected {expected} float32")
        X = np.asarray(X).reshape(n, T * F)[:, -F:]
        if np.isnan(X).any(): raise ValueError("X holds NaN, which this model does not take")
        return X

    def fit(self, X_train, y_train, X_val, y_val, metadata_train=None, metadata_val=None):
        X, y, weight = self.rows(X_train, len(y_train)), np.asarray(y_train), np.ones(len(y_train))
        if not np.isin(y, self.classes).all(): raise ValueError(f"labels {set(y)}, expected {self.classes}")
        if self.config.class_weight: weight /= np.array([(y == value).sum() for value in y])
        if self.config.sample_weight:
            if "sample_weight" not in metadata_train: raise ValueError("the metadata has no sample_weight")
            weight *= metadata_train.sample_weight.to_numpy()
        total = np.array([weight[y == c].sum() for c in self.classes])
        sums = np.array([(weight[:, None] * X)[y == c].sum(0) for c in self.classes])
        self.means, self.share = sums / np.maximum(total, 1e-9)[:, None], total / total.sum()
        return {}

    def predict(self, X, metadata):
        if self.means is None: raise NotFittedError("predict before fit or load")
        X = self.rows(X, len(metadata))
        near = np.exp(-((X[:, None] - self.means) ** 2).sum(2).clip(max=50) / self.config.width) * self.share + 1e-12
        p = (near / near.sum(1, keepdims=True)).astype(np.float32)
        keys = pd.DatetimeIndex(metadata.datetime), metadata.symbol.to_numpy(), metadata.horizon.to_numpy()
        return PredictionOutput(np.array(self.classes, np.int8)[p.argmax(1)], p, *keys)

    def save(self, path):
        if self.means is None: raise NotFittedError("save before fit or load")
        path.mkdir(parents=True, exist_ok=True)
        (path / "columns.json").write_text(json.dumps(self.feature_columns))
        np.savez(path / "means.npz", means=self.means, share=self.share)

    def load(self, path):
        saved = json.loads((path / "columns.json").read_text())
        if saved != self.feature_columns: raise FeatureMismatch(f"fitted on {saved}, expected the same in that order")
        with np.load(path / "means.npz") as file: self.means, self.share = file["means"], file["share"]
"""


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    (tmp_path / "own_files.py").write_text(CONTRACT_ALONE)
    monkeypatch.setenv("MODELFACTORY_PLUGINS", str(tmp_path / "own_files.py"))
    sys.modules.pop("modelfactory_plugins.own_files", None)
    ModelRegistry.discover()


def test_a_plugin_that_keeps_to_the_contract_alone_is_whole(own_files):
    assert len(check_model("own_files")) == len(CHECKS)


def test_a_new_process_that_hangs_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(conformance, "NEW_PROCESS_SCRIPT", "import time; time.sleep(3600)")
    monkeypatch.setattr(conformance, "NEW_PROCESS_SECONDS", 0.1)
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=2)))
    with pytest.raises(ConformanceError, match="did not finish within 0.1 s"):
        conformance.predict_in_new_process(tmp_path, np.zeros((2, 1), np.float32), meta)


def test_a_run_of_such_a_plugin_can_be_loaded(own_files, tmp_path):
    trainer = Trainer(dict(model="own_files", horizon=5, data="planted", config=dict(width=2.0)))
    trainer.run_full_pipeline()
    attempt = start_attempt(tmp_path / "runs", dict(model="own_files", horizon=5))
    write_run(trainer, attempt)
    model, task = load_run(publish(attempt, tmp_path / "runs")).model(), trainer.datasets["val"]
    again = model.predict(task.X, task.metadata).probabilities
    assert model.config.width == 2 and np.array_equal(again, trainer.predictions["val"].probabilities)


def test_a_save_before_fit_writes_no_header(own_files, tmp_path):
    with pytest.raises(NotFittedError):
        ModelRegistry.create("own_files", {}, 5, ["x"]).save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "statuses, code",
    [
        (["ok", "skipped"], 0),
        (["ok", "unavailable"], 0),
        (["unavailable"], 0),
        (["ok", "failed"], 1),
        (["timeout"], 1),
        (["killed"], 1),
        (["interrupted"], 1),
    ],
)
def test_the_exit_code_of_a_grid_is_the_one_its_help_promises(statuses, code, monkeypatch):
    result = GridResult(Outcome(f"run {i}", status) for i, status in enumerate(statuses))
    monkeypatch.setattr("modelfactory.runs.grid.run_grid", lambda *args: result)
    assert call("experiment", "demo") == code


def test_the_help_of_experiment_documents_the_exit_codes(capsys):
    assert call("experiment", "no such grid") == 2
    assert call("experiment", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 if every run is either finished or unavailable" in text
    for code in ("1 if a run failed", "2 if the grid", "130 after Ctrl-C"):
        assert code in text
