"Reports about cutting, tuning and plugins: what was fed, what comes out."
import filecmp

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelfactory.cli import main
from modelfactory.data.folds import purge_splits
from modelfactory.data.splits import NO_TARGET, SplitOverlap, SplitsError, check_splits, read_splits

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
