"Reports about cutting, tuning and plugins: what was fed, what comes out."
import filecmp
import sqlite3

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import finish, until
from test_tracking import client_of, make_run
from test_tuner import at_home, home, process, states, tuner  # noqa: F401, two of them are fixtures

from modelfactory.cli import main
from modelfactory.data.folds import purge_splits
from modelfactory.data.splits import NO_TARGET, SplitOverlap, SplitsError, check_splits, read_splits
from modelfactory.runs.store import list_runs
from modelfactory.runs.tracking import TrackingError, rebuild, track_run, track_runs
from modelfactory.training.tuner import GRACE, n_trials_of, read_tuned

NAMES = ("train", "val", "test")


def call(*args):
    with pytest.raises(SystemExit) as end: main([str(a) for a in args])
    return end.value.code


def bars(n=700, reach=None, symbols="AB", seed=0):
    "Hourly bars whose labels of horizon 5 are decided up to `reach` bars later; None: the file does not say when."
    rng = np.random.default_rng(seed)
    table = pd.concat([pd.DataFrame(dict(
        datetime=pd.date_range("2024-01-01", periods=n, freq="h"), symbol=s, x=rng.normal(size=n), z=rng.normal(size=n),
        label_h5=np.arange(n) % 3 - 1)) for s in symbols], ignore_index=True)
    if reach: table["bars_to_hit_h5"] = rng.integers(1, reach + 1, len(table))
    return table


def write(folder, table, gap=0, **options):
    "Splits that are cut by time alone, `gap` bars left out between them; rows in random order."
    folder.mkdir(parents=True)
    times = np.sort(table.datetime.unique())
    cuts = np.split(np.arange(len(times)), [int(.6 * len(times)), int(.8 * len(times))])
    for name, part in zip(NAMES, cuts):
        rows = table[table.datetime.isin(times[part[gap if name != "train" else 0:]])].sample(frac=1, random_state=1)
        pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), folder / f"{name}_scaled.parquet", **options)
    (folder / "feature_scaler.json").write_text("{}")
    return folder


def reaching(early, late):
    "Row by row: whether the label is decided at or after the first bar of the later split; None where that is not known."
    start = late.datetime.min()
    last = early.groupby("symbol").datetime.max()
    hours = (start - early.datetime) / pd.Timedelta("1h")
    assert (last == early.datetime.max()).all()
    return (hours <= early.get("bars_to_hit_h5", 5)).to_numpy()


@pytest.mark.parametrize("reach", [None, 3, 15, 60])
def test_purging_makes_null_what_reaches_over_and_nothing_else(tmp_path, reach):
    source, purged = write(tmp_path / "splits", bars(reach=reach)), tmp_path / "purged"
    with pytest.raises(SplitOverlap): check_splits(source)
    counts = purge_splits(source, purged)
    frames = {name: pd.read_parquet(source / f"{name}_scaled.parquet") for name in NAMES}
    for name, late in (("train", "val"), ("val", "test")):
        before, after = (pq.read_table(f / f"{name}_scaled.parquet") for f in (source, purged))
        over = reaching(frames[name], frames[late])
        assert after.schema.equals(before.schema, check_metadata=True)
        assert after.drop_columns("label_h5").equals(before.drop_columns("label_h5"))
        assert after["label_h5"].is_null().to_numpy().tolist() == over.tolist() and over.any()
        assert after["label_h5"].filter(pa.array(~over)).equals(before["label_h5"].filter(pa.array(~over)))
        assert counts.set_index("split").loc[name, "labels purged"] == over.sum()
    for file in ("test_scaled.parquet", "feature_scaler.json"): assert filecmp.cmp(source / file, purged / file, shallow=False)
    assert "decided by bars" not in str(check_splits(purged))


def test_purging_twice_changes_no_byte(tmp_path):
    source = write(tmp_path / "splits", bars(reach=15))
    purge_splits(source, tmp_path / "once")
    assert purge_splits(tmp_path / "once", tmp_path / "twice")["labels purged"].sum() == 0
    for file in (tmp_path / "once").iterdir(): assert filecmp.cmp(file, tmp_path / "twice" / file.name, shallow=False)


@pytest.mark.parametrize("label", ["int8", "int64", "float64", "Int16", "Float32"])
def test_labels_keep_their_type(tmp_path, label):
    source = write(tmp_path / "splits", bars(reach=9).astype(dict(label_h5=label)), compression="zstd", row_group_size=100)
    purge_splits(source, tmp_path / "purged")
    before, after = (pq.ParquetFile(f / "train_scaled.parquet") for f in (source, tmp_path / "purged"))
    assert after.schema_arrow.field("label_h5").type == before.schema_arrow.field("label_h5").type
    assert after.metadata.num_row_groups == before.metadata.num_row_groups > 1
    assert after.metadata.row_group(0).column(0).compression == "ZSTD"
    labels = read_splits(tmp_path / "purged")["train"].labels[5]
    assert (labels == NO_TARGET).sum() == after.read()["label_h5"].null_count > 0


@pytest.mark.parametrize("gap", [0, 5, 20, 48])
def test_the_advice_is_the_reach_of_the_labels_and_what_was_counted(tmp_path, gap):
    with pytest.raises(SplitOverlap) as refused: check_splits(write(tmp_path / "splits", bars(reach=60), gap))
    assert "labels reach up to 60 bars (the largest bars_to_hit_h5)" in str(refused.value)
    assert f" has {gap} bars between 2024-01-" in str(refused.value)
    assert "leave 60 bars between the splits" in str(refused.value) and "modelfactory purge" in str(refused.value)
    check_splits(write(tmp_path / "left out", bars(reach=60), 60))


def test_the_advice_without_bars_to_hit_is_the_horizon(tmp_path):
    with pytest.raises(SplitOverlap, match=r"up to 5 bars \(the horizon: there is no bars_to_hit_h5\)"):
        check_splits(write(tmp_path / "splits", bars()))


def test_purging_by_command(tmp_path, capsys):
    source = write(tmp_path / "splits", bars(reach=15))
    assert call("check", source) == 2 and "modelfactory purge" in capsys.readouterr().err
    assert call("purge", source, "--output", tmp_path / "purged") == 0 and "see " in capsys.readouterr().out
    assert call("check", tmp_path / "purged") == 0
    assert call("purge", source, "--output", tmp_path / "purged") == 2 and "exists" in capsys.readouterr().err


def test_what_cannot_be_purged_leaves_nothing_behind(tmp_path):
    table = bars()
    source = write(tmp_path / "splits", table)
    with pytest.raises(SplitsError, match="lies inside"): purge_splits(source, source / "purged")
    table[table.datetime > "2024-01-10"].to_parquet(source / "val_scaled.parquet")
    with pytest.raises(SplitOverlap, match="cut the splits by time"): purge_splits(source, tmp_path / "purged")
    assert [p.name for p in tmp_path.iterdir()] == ["splits"]


# Tuning and tracking

def orphaned(tuner):
    "A trial that was lost before its first sign of life: its process was killed right after it had been entered."
    return tuner.study().ask().number


def test_a_trial_that_nobody_works_on_is_made_by_another(home, tmp_path):
    lost = orphaned(tuner(home, tmp_path / "o.db", 2))
    worker = process(home, tmp_path / "o.db", 2)
    written = finish(worker)
    result = tuner(home, tmp_path / "o.db", 2).run()
    assert worker.returncode == 0 and len(result.trials) == 2 and {"COMPLETE", "PRUNED"} >= set(states(result)), written
    assert result.study.trials[lost].state.name == "FAIL" and lost not in [t.number for t in result.trials]


def test_a_trial_that_another_process_works_on_is_left_to_it(home, tmp_path):
    "Longer than the signs of life that may be missed: it is neither failed nor made twice."
    storage, begun = tmp_path / "alive.db", tmp_path / "begun"
    slow = dict(pause=1.5 * GRACE / 6, rounds=6)
    other = process(home, storage, 1, slow, VALLEY_BEGUN=begun)
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


def test_tuned_parameters_lie_with_the_runs(home, tmp_path, monkeypatch):
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
    for act in (lambda: track_run(run), lambda: track_runs(tmp_path), lambda: rebuild(tmp_path)):
        with pytest.raises(TrackingError, match="was deleted in MLflow; take another name") as refused: act()
        assert "\n" not in str(refused.value) and "--experiment-id 1" in str(refused.value)
    assert track_runs(tmp_path, experiment="modelfactory_2").new == 1
    client.restore_experiment("1")
    assert track_runs(tmp_path).there == 1


def test_an_empty_database_is_filled(tmp_path):
    make_run(tmp_path)
    (tmp_path / "mlflow.db").touch()
    assert track_runs(tmp_path).new == 1 and len(client_of(tmp_path)[1]) == 1


@pytest.mark.parametrize("damage", ["empty", "not a database"])
def test_a_database_that_holds_nothing_is_one_line_with_what_to_do(tmp_path, damage):
    "All tables but that of MLflow's version were dropped, or the file is something else."
    run, file = make_run(tmp_path), tmp_path / "mlflow.db"
    track_run(run)
    if damage == "empty":
        with sqlite3.connect(file) as db:
            tables = [name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for name in tables:
                if name not in ("alembic_version", "sqlite_sequence"): db.execute(f"DROP TABLE {name}")
    else: file.write_bytes(b"something else" * 100)
    for act in (lambda: track_run(run), lambda: track_runs(tmp_path), lambda: rebuild(tmp_path)):
        with pytest.raises(TrackingError, match="; delete it, then modelfactory track --rebuild$") as refused: act()
        assert "\n" not in str(refused.value)
    file.unlink()
    assert rebuild(tmp_path).new == 1
