"Inputs from bug reports: labels, symbols and features of any type are read correctly, or raise a named error."

import datetime
import decimal
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfactory.data.dataset import DatasetConfig, load_datasets, read_prices
from modelfactory.data.readers import check_bars
from modelfactory.data.splits import (
    NO_TARGET,
    BadValue,
    FeatureSetsDiffer,
    MissingClass,
    MissingColumn,
    SplitsError,
    UnreadableFile,
    fingerprint,
    read_split,
    read_splits,
)

pytestmark = pytest.mark.no_cover  # line counting slows thousands of small calls by half


def bars(split="train", symbols=("AAA", "BBB"), n=120):
    "Hourly bars of a split, a month after the previous split."
    number = ["train", "val", "test"].index(split)
    rng = np.random.default_rng(number)
    times = pd.date_range("2024-01-01", periods=n, freq="h") + pd.Timedelta(days=30 * number)
    frames = [
        pd.DataFrame(
            dict(
                datetime=times,
                symbol=symbol,
                close=100 + rng.normal(size=n).cumsum(),
                momentum=rng.normal(size=n),
                trend=rng.normal(size=n),
                label_h5=rng.integers(-1, 2, n),
            )
        )
        for symbol in symbols
    ]
    return pd.concat(frames, ignore_index=True)


def frames(change=lambda frame: frame):
    "Frames of train and val, changed by a function."
    return {split: change(bars(split)) for split in ("train", "val")}


def write_folder(folder, change=lambda frame: frame, splits=("train", "val")):
    "Writes changed frames as a folder of splits."
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        change(bars(split)).to_parquet(folder / f"{split}_scaled.parquet", index=False)
    return folder


def warnings_of(read):
    "Warnings of the report, without those on the length of these short splits."
    return [text for text in read.report.warnings if "blocks of" not in text]


def message(error, call, *args, **kwargs):
    "Text of the error that a call raises: one short line."
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# One reader of frames and files ---------------------------------------------------------------------------------------

LABELS = np.array([-1, 0, 1, 1, 0, -1, 1, 0], float)
IS_MISSING = np.array([False, True, False, False, True, False, False, True])


def tiny(labels, n=8, **columns):
    "A frame of one symbol with these labels and columns."
    times = pd.date_range("2024-01-01", periods=n, freq="h")
    frame = dict(datetime=times, symbol="AAA", momentum=np.arange(n, dtype=float), label_h5=labels)
    return pd.DataFrame(frame | columns)


def coded(kind):
    "Labels, some of them missing, in a pandas type."
    values = [None if missing else int(value) for value, missing in zip(LABELS, IS_MISSING, strict=True)]
    if kind == "category":
        return pd.Series(pd.Categorical(values))
    if kind == "category of text":
        return pd.Series(pd.Categorical([None if v is None else str(v) for v in values]))
    if kind == "decimal":
        return pd.Series([None if v is None else decimal.Decimal(v) for v in values])
    if kind == "text":
        return pd.Series([None if v is None else str(v) for v in values])
    return pd.Series(values, dtype=kind)


@pytest.mark.parametrize(
    "kind", ["category", "category of text", "decimal", "text", "Int8", "Float64", "int64[pyarrow]"]
)
def test_missing_labels_are_missing_from_a_frame_and_a_file(kind, tmp_path):
    frame = tiny(coded(kind))
    frame.to_parquet(tmp_path / "train.parquet")
    for source in (frame, pa.Table.from_pandas(frame), tmp_path / "train.parquet"):
        labels = read_split(source).labels[5]
        assert labels.tolist() == np.where(IS_MISSING, NO_TARGET, LABELS).tolist(), (kind, type(source))


def test_nulls_of_a_category_label_are_not_the_last_category():
    "A frame with 237 of 1,186 labels missing."
    labels = np.tile([-1.0, 0.0, 1.0], 396)[:1_186]
    labels[::5][:237] = np.nan
    assert np.isnan(labels).sum() == 237
    split = read_split(tiny(pd.Categorical(labels), n=1_186))
    assert (split.labels[5] == NO_TARGET).sum() == 237
    assert (split.labels[5] == 1).sum() == (labels == 1).sum()


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(pd.Categorical([3, 1, 2, 1, 3, 2, 1, 1])),
        pd.Series([3, 1, 2, 1, 3, 2, 1, 1], dtype="Int16"),
        pd.Series([decimal.Decimal(v) for v in "31213211"]),
        pd.Series([3, 1, 2, 1, 3, 2, 1, 1], dtype="float[pyarrow]"),
    ],
)
def test_a_number_of_any_type_is_a_feature_in_a_frame_and_a_file(values, tmp_path):
    frame = tiny(0, level=values)
    frame.to_parquet(tmp_path / "train.parquet")
    expected = values.astype(float).tolist()
    for source in (frame, pa.Table.from_pandas(frame), tmp_path / "train.parquet"):
        split = read_split(source)
        assert split.features == ["momentum", "level"] and split.matrix[:, 1].tolist() == expected


def test_missing_booleans_and_integers_are_nan():
    up, n_trades = pd.array([True, None, False, True] * 2, "boolean"), pd.array([1, None, 3, 4] * 2, "Int64")
    frame = tiny(0, up=up, n_trades=n_trades)
    matrix = read_split(frame, nan="keep").matrix[:, 1:]
    assert np.array_equal(matrix[:4], [[1, 1], [np.nan, np.nan], [0, 3], [1, 4]], equal_nan=True)
    assert "up: 2 rows with NaN" in message(BadValue, read_split, frame)


def test_an_arrow_table_with_run_ends_and_views_is_read():
    import pyarrow.compute as pc

    table = pa.Table.from_pandas(tiny(LABELS))
    table = table.set_column(1, "symbol", pa.array(["AAA"] * len(LABELS), pa.string_view()))
    table = table.set_column(3, "label_h5", pc.run_end_encode(pa.array(LABELS)))
    assert read_split(table).labels[5].tolist() == LABELS.tolist()


def test_periods_and_the_index_of_a_frame_are_not_features(tmp_path):
    frame = tiny(0, month=pd.period_range("2024-01", periods=8, freq="M"))
    frame = frame.set_index(pd.Index(range(100, 108), name="row_id"))
    frame.to_parquet(tmp_path / "train.parquet")
    assert read_split(frame).features == read_split(tmp_path / "train.parquet").features == ["momentum"]
    assert read_split(frame.reset_index(), features=["row_id"]).matrix[0, 0] == 100


def test_unregistered_extension_types_are_not_features(tmp_path):
    "Arrow reads them as their storage type, which is a number here."
    table = pa.Table.from_pandas(tiny(0))
    field = pa.field("month", pa.int64(), metadata={"ARROW:extension:name": "acme.period"})
    pq.write_table(table.append_column(field, pa.array(range(8))), tmp_path / "train.parquet")
    assert read_split(tmp_path / "train.parquet").features == ["momentum"]
    text = message(BadValue, read_split, tmp_path / "train.parquet", features=["momentum", "month"])
    assert "month: found acme.period, expected numbers" in text


@pytest.mark.parametrize(
    "metadata", [b"{", b"[" * 100_000, b"7", b'{"index_columns": 7}', b'{"index_columns": [["momentum"], {}]}']
)
def test_invalid_pandas_metadata_is_ignored(metadata, tmp_path):
    table = pa.Table.from_pandas(tiny(LABELS)).replace_schema_metadata({b"pandas": metadata})
    pq.write_table(table, tmp_path / "train.parquet")
    assert read_split(tmp_path / "train.parquet").features == ["momentum"]


def test_a_stream_of_arrow_batches_is_read_once():
    data = {split: pa.Table.from_pandas(bars(split)).to_reader() for split in ("train", "val")}
    read = read_splits(data)
    assert all(np.array_equal(read[split].labels[5], bars(split).label_h5) for split in read)


def test_a_frame_that_arrow_cannot_read_raises_an_error_with_the_column():
    text = message(UnreadableFile, read_split, tiny(0, note=[1, "a"] * 4))
    assert text.startswith("train frame: note: found object with values of type int (4), str (4)")


# Label codings --------------------------------------------------------------------------------------------------------


def test_labels_as_numeric_text_are_numbers():
    data = frames(lambda f: f.assign(label_h5=f.label_h5.map({-1: "-1", 0: "0.0", 1: " 1"})))
    read = read_splits(data)
    assert all((read[s].labels[5] == bars(s).label_h5).all() for s in data) and warnings_of(read) == []


def test_labels_with_rounding_errors_are_rounded_with_a_warning():
    noise = np.random.default_rng(0).uniform(-9e-7, 9e-7, 240)
    read = read_splits(frames(lambda f: f.assign(label_h5=f.label_h5 + noise)))
    assert all((read[s].labels[5] == bars(s).label_h5).all() for s in read)
    sentence = "label_h5: 240 labels rounded to the nearest class, at most 1e-06 away"
    assert warnings_of(read) == [f"{split} frame: {sentence}" for split in read]


def test_labels_outside_the_classes_are_counted_in_a_warning():
    def foreign(frame):
        labels = frame.label_h5.astype(float).to_numpy(copy=True)
        labels[:30], labels[30:70], labels[70:75], labels[75:80] = 2, -2, -99, np.nan
        labels[80] = 0.5
        return frame.assign(label_h5=labels)

    read = read_splits(frames(foreign))
    shown = "train frame: label_h5: 71 of 230 labels are not among -1, 0, 1 and are treated as missing: "
    shown += "-2 (40), 2 (30), 0.5 (1)"
    assert any(w.startswith(shown) for w in read.report.warnings) and (read["train"].labels[5] == NO_TARGET).sum() == 81
    assert shown in repr(read.report) and shown in str(read.report.to_dict())


def test_missing_labels_give_no_warning():
    labels = np.where(np.arange(240) < 20, -99, bars().label_h5)
    for column in (pd.Series(labels), pd.Series(labels).mask(labels == -99)):
        assert warnings_of(read_splits({name: f.assign(label_h5=column) for name, f in frames().items()})) == []


def test_text_among_numeric_labels_is_dropped_with_a_warning():
    def words(frame):
        return frame.assign(label_h5=frame.label_h5.astype(str).where(frame.index >= 7, "undefined"))

    warnings = read_splits(frames(words)).report.warnings
    assert "label_h5: 7 of 240 labels are not among -1, 0, 1 and are treated as missing: 'undefined' (7)" in warnings[0]


@pytest.mark.parametrize(
    "labels, words",
    [
        (lambda y: y.map({-1: "down", 0: "flat", 1: "up"}), "label_h5: found text ('"),
        (lambda y: pd.to_datetime(y, unit="D"), "label_h5: found timestamp["),
        (lambda y: pd.to_timedelta(y, unit="D"), "label_h5: found duration["),
        (lambda y: y.map(lambda v: [v]), "label_h5: found list<"),
    ],
)
def test_labels_of_another_type_raise_an_error_with_the_column(labels, words):
    text = message(BadValue, read_splits, frames(lambda f: f.assign(label_h5=labels(f.label_h5))))
    assert text.startswith("train frame: ") and words in text and "expected labels among -1, 0, 1" in text


def test_the_error_on_a_missing_class_lists_the_values_in_the_file():
    text = message(MissingClass, read_splits, frames(lambda f: f.assign(label_h5=f.label_h5 * 2)))
    n = (bars().label_h5 != 0).sum()
    assert f"class -1 never occurs among {240 - n} labels" in text
    assert f"{n} of 240 labels are not among -1, 0, 1" in text
    read = read_splits(frames(lambda f: f.assign(label_h5=f.label_h5 * 2)), classes=(-2, 0, 2))
    assert (read["train"].labels[5] == bars().label_h5 * 2).all()


def test_classes_beyond_int8_raise_an_error():
    data = frames(lambda f: f.assign(label_h5=f.label_h5 * 200))
    assert "expected whole numbers from -127 to 127" in message(SplitsError, read_splits, data, classes=(-200, 0, 200))


def test_check_shows_dropped_labels(tmp_path, capsys):
    from modelfactory.cli import main

    def foreign(frame):
        return frame.assign(label_h5=frame.label_h5.mask(frame.index < 9, 2))

    data = write_folder(tmp_path / "data", foreign, ("train", "val", "test"))
    with pytest.raises(SystemExit) as end:
        main(["check", str(data)])
    assert end.value.code == 0
    assert "9 of 240 labels are not among -1, 0, 1" in capsys.readouterr().out.replace("\n", " ")


# Types of features ----------------------------------------------------------------------------------------------------

TYPES = {
    "text": lambda f: f.assign(trend=f.trend.astype(str)),
    "list": lambda f: f.assign(trend=[[v] for v in f.trend]),
    "timestamp": lambda f: f.assign(trend=pd.Timestamp("2024-01-01")),
    "duration": lambda f: f.assign(trend=pd.Timedelta("1h")),
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_feature_of_another_type_raises_an_error_with_the_column(kind, tmp_path):
    frame = TYPES[kind](bars("val"))
    frame.to_parquet(tmp_path / "val.parquet")
    for source, file in ((frame, "val frame"), (tmp_path / "val.parquet", "val.parquet")):
        text = message(BadValue, read_split, source, "val", features=["momentum", "trend"])
        assert text.startswith(f"{file}: trend: found {kind}") and "expected numbers" in text
    text = message(FeatureSetsDiffer, read_splits, dict(train=bars(), val=frame))
    assert f"val frame: trend is double in train frame and {kind}" in text and "not in val" not in text
    text = message(FeatureSetsDiffer, read_splits, dict(train=TYPES[kind](bars()), val=bars("val")))
    assert f"trend is double in val frame and {kind}" in text and "not in train" not in text


def test_a_feature_without_values_in_val_is_nan():
    val = bars("val").assign(trend=None)
    assert "trend: 240 rows with NaN" in message(BadValue, read_splits, dict(train=bars(), val=val))
    assert np.isfinite(read_splits(dict(train=bars(), val=val), nan="median")["val"].matrix).all()


@pytest.mark.parametrize("kind", TYPES)
def test_new_bars_of_another_type_raise_an_error_with_the_column(kind, run):
    text = message(BadValue, run.predict, TYPES[kind](bars("test")))
    assert text.startswith(f"test frame: trend: found {kind}")


# Symbols --------------------------------------------------------------------------------------------------------------

SYMBOLS = {
    "numbers": ([1, 600306], ["1", "600306"]),
    "floats": ([1.0, 600306.0], ["1", "600306"]),
    "text": (["1", "600306"], ["1", "600306"]),
    "bytes": ([b"1", b"600306"], ["1", "600306"]),
    "decimals": ([decimal.Decimal("1"), decimal.Decimal("600306")], ["1", "600306"]),
    "dates": ([datetime.date(2024, 3, 15), datetime.date(2024, 6, 21)], ["2024-03-15", "2024-06-21"]),
    "timestamps": ([pd.Timestamp("2024-03-15"), pd.Timestamp("2024-06-21")], ["2024-03-15", "2024-06-21"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run on symbols 1 and 600306."
    return trained(tmp_path_factory.mktemp("run"), lambda split: bars(split, SYMBOLS["numbers"][0]))


def trained(folder, make, **data):
    "A finished run on the frames that `make` returns for each split."
    from modelfactory.runs.attempt import publish, write_run
    from modelfactory.runs.run import load_run
    from modelfactory.runs.run_folder import start_attempt
    from modelfactory.training.trainer import Trainer

    (folder / "data").mkdir(parents=True)
    for split in ("train", "val", "test"):
        make(split).to_parquet(folder / f"data/{split}_scaled.parquet")
    trainer = Trainer(dict(model="logistic_regression", horizon=5, data=dict(data=str(folder / "data"), **data)))
    trainer.run_full_pipeline()
    attempt = start_attempt(folder / "runs", dict(model="logistic_regression", horizon=5))
    write_run(trainer, attempt)
    return load_run(publish(attempt, folder / "runs"))


@pytest.mark.parametrize("kind", SYMBOLS)
def test_symbols_of_any_type_are_text(kind, tmp_path):
    symbols, names = SYMBOLS[kind]
    frame = bars(symbols=symbols)
    frame.to_parquet(tmp_path / "train.parquet")
    category = frame.assign(symbol=frame.symbol.astype("category"))
    for source in (frame, tmp_path / "train.parquet", category):
        assert read_split(source).symbols == names
    with_prices = frame.assign(open=frame.close, high=frame.close, low=frame.close, volume=0)
    assert check_bars(with_prices).symbol.unique().tolist() == names


@pytest.mark.parametrize("kind", ["numbers", "floats", "text", "bytes", "decimals"])
def test_symbols_of_train_are_recognised_in_new_bars(kind, run):
    frame = run.predict(bars("test", SYMBOLS[kind][0]))
    assert frame.attrs["unseen"] == [] and frame.symbol.unique().tolist() == ["1", "600306"]
    assert run.predict(bars("test", [1, 7])).attrs["unseen"] == ["7"]


def test_dates_as_symbols_are_recognised_in_new_bars(tmp_path):
    run = trained(tmp_path, lambda split: bars(split, SYMBOLS["dates"][0]))
    for kind in ("dates", "timestamps"):
        assert run.predict(bars("test", SYMBOLS[kind][0])).attrs["unseen"] == []


def test_context_and_prices_match_symbols_of_another_type(tmp_path):
    data = dict(train=bars("train", [1, 600306]), val=bars("val", ["1", "600306"]))
    val = load_datasets(DatasetConfig("frames"), 5, 12, data=data)[0]["val"]
    assert len(val) == 240  # the first windows use rows of train
    bars("val", [1.0, 600306.0]).to_parquet(tmp_path / "closes.parquet")
    prices, source = read_prices(val, tmp_path / "closes.parquet")
    assert source == "file" and prices.symbol.unique().tolist() == ["1", "600306"]
    assert np.allclose(prices.close, val.metadata.close)


@pytest.mark.parametrize(
    "symbols, error, words",
    [
        (["AAA", None], MissingColumn, "120 rows without a symbol, first at row 120"),
        (["AAA", ""], MissingColumn, "120 rows without a symbol"),
        ([1.0, np.nan], MissingColumn, "120 rows without a symbol"),
        ([b"A", b"\xff"], BadValue, "bytes that are not UTF-8"),
    ],
)
def test_rows_without_a_symbol_raise_an_error(symbols, error, words):
    assert words in message(error, read_split, bars(symbols=symbols))


# Layouts --------------------------------------------------------------------------------------------------------------


def assert_same(read, expected):
    "Two splits have the same rows, apart from the time zone."
    assert read.symbols == expected.symbols and read.features == expected.features
    assert np.array_equal(read.matrix, expected.matrix, equal_nan=True)
    assert read.datetimes.tz_localize(None).equals(expected.datetimes.tz_localize(None))
    assert np.array_equal(read.labels[5], expected.labels[5]) and np.array_equal(read.close, expected.close)


def spark(frame, folder):
    "Parts with long names, a success marker and checksums."
    folder.mkdir(parents=True)
    for i in range(3):
        frame[i::3].to_parquet(folder / f"part-0000{i}-8f2c.c000.snappy.parquet", index=False)
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000-8f2c.c000.snappy.parquet.crc").write_bytes(b"crc")


def dask(frame, folder):
    "Twelve numbered parts, of which one has other types: the order of names is not the order of numbers."
    folder.mkdir(parents=True)
    for i in range(12):
        part = frame.iloc[i * len(frame) // 12 : (i + 1) * len(frame) // 12].set_index("datetime")
        if i == 2:
            part = part.astype(dict(label_h5="float32", symbol="category"))
        part.to_parquet(folder / f"part.{i}.parquet")


def by_date(frame, folder):
    "Parts partitioned by date."
    frame.assign(date=frame.datetime.dt.date.astype(str)).to_parquet(folder, partition_cols=["date"], index=False)


def by_symbol(frame, folder):
    "Parts partitioned by symbol."
    frame.to_parquet(folder, partition_cols=["symbol"], index=False)


@pytest.mark.parametrize("write", [spark, dask, by_date, by_symbol])
@pytest.mark.parametrize("layout", ["{}_scaled.parquet", "{}.parquet", "{}", "split={}"])
def test_folders_of_parts_are_read(write, layout, tmp_path):
    for split in ("train", "val", "test"):
        write(bars(split), tmp_path / layout.format(split))
    read = read_splits(tmp_path, splits=("train", "val", "test"))
    for split in read:
        assert_same(read[split], read_split(bars(split).sort_values(["symbol", "datetime"], kind="stable")))
    assert fingerprint(tmp_path) != fingerprint(tmp_path, ("train", "val"))
    before = fingerprint(tmp_path)
    write(bars("test", n=100), tmp_path / "another")
    assert fingerprint(tmp_path) == before != fingerprint(dict.fromkeys(("train", "val"), tmp_path / "another"))


def test_symbols_in_folder_names_keep_their_zeros(tmp_path):
    frame = bars(symbols=["000001", "US/A B"])
    by_symbol(frame, tmp_path / "train")
    assert_same(read_split(tmp_path / "train"), read_split(frame))


def test_parts_that_differ_raise_an_error_with_the_file(tmp_path):
    spark(bars(), tmp_path / "train")
    odd = tmp_path / "train/part-00003.parquet"
    bars().drop(columns="trend").to_parquet(odd)
    assert "train/part-00003.parquet: no column 'trend'" in message(MissingColumn, read_split, tmp_path / "train")
    bars().assign(trend="up").to_parquet(odd)
    assert "parts differ in type" in message(UnreadableFile, read_split, tmp_path / "train")
    odd.write_bytes(b"PAR1")
    assert "part-00003.parquet: not a complete parquet file" in message(UnreadableFile, read_split, tmp_path / "train")


@pytest.mark.parametrize("name", ["{}.parquet", "{}_scaled.parquet"])
def test_the_error_on_a_folder_of_data_sets_lists_them(name, tmp_path):
    for split in ("train", "val"):
        for h in (5, 20):
            (tmp_path / f"core_full/h{h}").mkdir(parents=True, exist_ok=True)
            bars(split).to_parquet(tmp_path / f"core_full/h{h}" / name.format(split))
    assert_same(read_splits(tmp_path / "core_full/h5")["val"], read_split(bars("val")))
    text = message(SplitsError, read_splits, tmp_path / "core_full")
    assert "there are splits in h20, h5: name one of these folders, such as" in text and "core_full/h20" in text
    assert "contains splits" in message(SplitsError, read_split, tmp_path / "core_full/h5")


@pytest.mark.parametrize("options", [dict(index=False), dict(), dict(index=False, date_format="%Y-%m-%dT%H:%M:%S%z")])
def test_csv_files_are_read_like_parquet_files(options, tmp_path):
    frames = {split: bars(split, ["NA", "000001"]) for split in ("train", "val", "test")}
    for split, frame in frames.items():
        frame.to_csv(tmp_path / f"{split}_scaled.csv", **options)
    read = read_splits(tmp_path, splits=("train", "val", "test"))
    for split, frame in frames.items():
        assert_same(read[split], read_split(frame))
    assert len(fingerprint(tmp_path)) == 16


def test_csv_types_are_decided_by_all_rows(tmp_path):
    n = 60_000
    frame = pd.DataFrame(dict(datetime=pd.date_range("2000", periods=n, freq="h"), symbol="A", x=1, label_h5=0))
    frame["x"] = frame.x.astype(object)
    frame.loc[n - 1, "x"] = 0.5
    frame.loc[7, "label_h5"] = np.nan
    frame.to_csv(tmp_path / "train.csv", index=False)
    split = read_split(tmp_path / "train.csv")
    assert split.features == ["x"] and split.matrix[-1, 0] == 0.5 and (split.labels[5] == NO_TARGET).sum() == 1


def test_invalid_csv_files_raise_an_error(tmp_path):
    bars().to_csv(tmp_path / "train.parquet", index=False)
    text = message(UnreadableFile, read_split, tmp_path / "train.parquet")
    assert "begins with b'date', expected a parquet file; rename a CSV file to train.csv" in text
    bars().to_csv(tmp_path / "train.csv", sep=";", index=False)
    assert "separate the columns of a CSV file by commas" in message(MissingColumn, read_split, tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text("datetime,symbol\n1,2,3\n")
    assert "not a readable CSV file" in message(UnreadableFile, read_split, tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text("")
    assert "not a readable CSV file" in message(UnreadableFile, read_split, tmp_path / "train.csv")


@pytest.mark.parametrize("levels", [["symbol", "datetime"], ["datetime"], ["symbol"]])
def test_keys_may_be_levels_of_the_index(levels, tmp_path):
    frame = bars().set_index(levels)
    frame.to_parquet(tmp_path / "train.parquet")
    for source in (frame, tmp_path / "train.parquet"):
        assert_same(read_split(source), read_split(bars()))
    data = {split: bars(split).set_index(levels) for split in ("train", "val")}
    prices = bars().assign(open=1.0, high=200.0, low=0.5, volume=0)
    assert check_bars(prices.set_index(levels)).equals(check_bars(prices))
    later = bars("train").assign(datetime=lambda f: f.datetime + pd.Timedelta("1h"))
    moved = data | dict(train=later.set_index(levels))
    assert fingerprint(data) != fingerprint(moved)


def test_the_error_on_an_unnamed_index_says_how_to_fix_it(tmp_path):
    frame = bars().set_index(["datetime", "symbol"])
    frame.index.names = [None, None]
    frame.to_parquet(tmp_path / "train.parquet")
    wide = bars().set_index(["datetime", "symbol"]).unstack()
    wide.to_parquet(tmp_path / "wide.parquet")
    for source in (frame, tmp_path / "train.parquet"):
        assert "levels of the index have no name" in message(MissingColumn, read_split, source)
    for source in (wide, tmp_path / "wide.parquet"):
        assert "the columns are a MultiIndex" in message(MissingColumn, read_split, source)


def test_new_bars_may_be_parts_or_csv(run, tmp_path):
    frame = bars("test", [1, 600306])
    expected = run.predict(frame)
    spark(frame, tmp_path / "new")
    frame.to_csv(tmp_path / "new.csv", index=False)
    for source in (tmp_path / "new", tmp_path / "new.csv", pa.Table.from_pandas(frame)):
        predictions = run.predict(source)
        assert np.array_equal(predictions.p_up, expected.p_up) and predictions.symbol.equals(expected.symbol)
    for split in ("train", "test"):
        spark(bars(split, [1, 600306]), tmp_path / "splits" / split)
    assert len(run.predict(tmp_path / "splits")) > len(expected)  # with the rows of train as context


# Many symbols ---------------------------------------------------------------------------------------------------------


class CountedArray(np.ndarray):
    "Counts the elements that element-wise operations process."

    elements = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        plain = [np.asarray(x) for x in inputs]
        CountedArray.elements += sum(x.size for x in plain)
        return getattr(ufunc, method)(*plain, **kwargs)


def naive_labels_crossing(split, horizon, start):
    "`labels_crossing` by a loop over rows."
    from modelfactory.data.splits import bars_between, label_bars

    times, needs = split.datetimes.as_unit("ns").asi8, label_bars(split, horizon)
    over = np.zeros(len(split), bool)
    for i, code in enumerate(split.codes):
        own = times[split.codes == code]
        available = (own > times[i]).sum() + bars_between(own, own[-1], start)
        over[i] = needs[i] > available and split.labels[horizon][i] != NO_TARGET
    return over


def test_checking_boundaries_takes_linear_time():
    from modelfactory.data.splits import labels_crossing

    symbols = [f"S{i}" for i in range(300)]
    split = read_split(bars(symbols=symbols, n=12))
    start = split.datetimes.max().value + 1
    expected = naive_labels_crossing(read_split(bars(symbols=symbols[:20], n=12)), 5, start)
    split.codes, CountedArray.elements = split.codes.view(CountedArray), 0
    over = labels_crossing(split, 5, start)
    assert over[: len(expected)].tolist() == expected.tolist() and over.sum() == 300 * 5
    assert CountedArray.elements <= 10 * len(split)


# Adjusted bars --------------------------------------------------------------------------------------------------------


def adjusted(n=1_400, outside=17, by=1e-10):
    "Daily bars; `outside` closes lie above the high or below the low, by the share `by` of the price."
    rng = np.random.default_rng(0)
    close = 100 * np.exp(rng.normal(0, 0.01, n).cumsum())
    times = pd.date_range("2010", periods=n, freq="D")
    frame = pd.DataFrame(
        dict(datetime=times, symbol="AAA", open=close, high=close * 1.01, low=close * 0.99, close=close, volume=1.0)
    )
    rows = rng.choice(n, outside, replace=False)
    frame.loc[rows[:10], "high"] = close[rows[:10]] * (1 - by)
    frame.loc[rows[10:], "low"] = close[rows[10:]] * (1 + by)
    return frame, np.sort(rows)


def test_closes_outside_by_a_rounding_error_widen_the_bar_with_a_warning():
    from modelfactory.data.splits import SplitsWarning

    frame, rows = adjusted()
    with pytest.warns(SplitsWarning) as shown:
        checked = check_bars(frame)
    expected = "17 of 1,400 rows outside [low, high] by a rounding error (at most 1e-09 of the price), first at row "
    assert f"{expected}{rows[0]}" in str(shown[0].message)
    assert len(shown) == 1 and shown[0].filename == __file__
    assert (checked.high >= checked.close).all() and (checked.low <= checked.close).all()
    pd.testing.assert_frame_equal(checked.drop(index=rows), frame.drop(index=rows), check_dtype=False)
    assert checked.close.equals(frame.close) and ((checked.high != frame.high) | (checked.low != frame.low)).sum() == 17


def test_flat_bars_with_a_high_below_the_low_by_a_rounding_error_are_widened():
    frame, _ = adjusted(50, 0)
    frame = frame.assign(high=frame.close * (1 - 2e-10), low=frame.close * (1 + 2e-10))
    with pytest.warns(UserWarning, match="50 of 50 rows"):
        checked = check_bars(frame)
    assert (checked.high == frame.close).all() and (checked.low == frame.close).all()


@pytest.mark.parametrize("by", [2e-9, 1e-6])
def test_closes_outside_by_more_than_a_rounding_error_raise_an_error(by):
    text = message(SplitsError, check_bars, adjusted(by=by)[0])
    assert "close: 17 rows outside [low, high]" in text


def test_written_splits_contain_the_widened_bars(tmp_path):
    from modelfactory.data.writer import bars_to_splits

    frame, _ = adjusted()
    with pytest.warns(UserWarning) as shown:
        out = bars_to_splits(frame, tmp_path / "splits", horizons=(5,))
    assert sum("by a rounding" in str(w.message) for w in shown) == 1
    for split in ("train", "val", "test"):
        rows = pd.read_parquet(out / f"{split}_scaled.parquet")
        assert ((rows.low <= rows.close) & (rows.close <= rows.high)).all()


# The same splits in five formats --------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", 25))  # 200 before a release
INTEGER_KINDS = [
    "int8",
    "int64",
    "uint16",
    "bool",
    "Int32",
    "boolean",
    "UInt8",
    "int64[pyarrow]",
    "category of numbers",
    "float16",
]
FLOAT_KINDS = ["float64", "float32", "Float32", "double[pyarrow]", "decimal", "category of floats"]
NULLABLE_KINDS = {
    "float64",
    "float32",
    "Int32",
    "boolean",
    "Float32",
    "int64[pyarrow]",
    "double[pyarrow]",
    "decimal",
    "category of numbers",
    "category of floats",
}
LABEL_KINDS = [
    "int8",
    "Int8",
    "float64",
    "float32",
    "text",
    "category of numbers",
    "category of text",
    "decimal",
    "double[pyarrow]",
]
SYMBOL_KINDS = {
    "text": ["ES", "NA", "000001"],
    "category": ["zz", "Ü 1", "A,B"],
    "numbers": [600306, 1, 7],
    "bytes": [b"ES", b"NQ", b"7"],
}
ZONES = [None, "UTC", "America/New_York", "Asia/Kolkata"]  # no daylight-saving change in the two months drawn


def typed(values, is_missing, kind):
    "A column of numbers in a type, with None where `is_missing` is true."
    listed = [None if missing else value for value, missing in zip(values.tolist(), is_missing, strict=True)]
    if kind == "decimal":
        return pd.Series([None if v is None else decimal.Decimal(str(round(v, 4))) for v in listed])
    if kind == "text":
        return pd.Series([None if v is None else f"{v:g}" for v in listed])
    if kind == "category of text":
        return pd.Series(pd.Categorical([None if v is None else f"{v:g}" for v in listed]))
    if kind.startswith("category"):
        return pd.Series(pd.Categorical(listed))
    return (
        pd.Series(listed).astype(kind) if kind in NULLABLE_KINDS or kind == "Int8" else pd.Series(values).astype(kind)
    )


@st.composite
def splits_of_any_type(draw):
    "A frame with features f0 to f3: types, row order, time zone, unit, gaps, missing values and index are drawn."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    symbol_kind = draw(st.sampled_from(list(SYMBOL_KINDS)))
    names = SYMBOL_KINDS[symbol_kind][: draw(st.integers(1, 3))]
    sizes = draw(st.lists(st.integers(2, 40), min_size=len(names), max_size=len(names)))
    zone, unit = draw(st.sampled_from(ZONES)), draw(st.sampled_from(["s", "ms", "us", "ns"]))
    steps = np.concatenate([np.sort(rng.choice(4 * n, n, replace=False)) for n in sizes])
    datetimes = pd.Series(pd.Timestamp("2024-01-04") + pd.to_timedelta(15 * steps, "min")).astype(f"datetime64[{unit}]")
    symbols = [s for s, n in zip(names, sizes, strict=True) for _ in range(n)]
    frame = pd.DataFrame(dict(datetime=datetimes.dt.tz_localize(zone), symbol=symbols))
    if symbol_kind == "category":
        frame["symbol"] = frame.symbol.astype("category")
    n, share = len(frame), draw(st.sampled_from([0, 0.3]))
    for j in range(4):
        kind = draw(st.sampled_from(INTEGER_KINDS if j % 2 else FLOAT_KINDS))
        values = rng.integers(0, 2 if kind in ("bool", "boolean") else 100, n) if j % 2 else rng.normal(size=n)
        is_missing = (rng.random(n) < share) & (np.arange(n) > 0) & (kind in NULLABLE_KINDS)
        frame[f"f{j}"] = typed(values, is_missing, kind)
    label_kind = draw(st.sampled_from(LABEL_KINDS))
    is_missing = (rng.random(n) < share) & (np.arange(n) > 0) & (label_kind != "int8")
    frame["label_h5"] = typed(rng.choice([-1, 0, 1, -99, 2], n, p=[0.3, 0.3, 0.2, 0.1, 0.1]), is_missing, label_kind)
    frame["close"], frame["venue"] = rng.lognormal(size=n), rng.choice(["X", "Y"], n)
    order = draw(st.sampled_from(["by symbol", "by time", "shuffled", "reversed"]))
    if order == "by time":
        frame = frame.sort_values("datetime", kind="stable")
    if order == "shuffled":
        frame = frame.iloc[rng.permutation(n)]
    if order == "reversed":
        frame = frame.iloc[::-1]
    levels = draw(st.sampled_from([[], ["symbol"], ["datetime", "symbol"]]))
    return frame.set_index(levels) if levels else frame.reset_index(drop=True)


def as_polars_writes(frame, file):
    "Large strings, decimals of 38 digits, dictionaries of text only, no pandas metadata, small row groups."
    table = pa.Table.from_pandas(frame, preserve_index=False)
    fields = []
    for field in table.schema:
        kind = field.type
        if pa.types.is_dictionary(kind):
            text = pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
            kind = pa.dictionary(pa.uint32(), pa.large_string()) if text else kind.value_type
        if pa.types.is_string(kind):
            kind = pa.large_string()
        if pa.types.is_decimal(kind):
            kind = pa.decimal128(38, kind.scale)
        fields.append(pa.field(field.name, kind))
    columns = []
    for column, field in zip(table.columns, fields, strict=True):
        if pa.types.is_dictionary(field.type):
            column = column.cast(pa.large_string()).dictionary_encode()
        columns.append(column.cast(field.type))
    pq.write_table(pa.table(columns, schema=pa.schema(fields)), file, row_group_size=16)


def formats(frame, folder):
    "The same rows as a frame, parquet of pandas, parquet of polars, an Arrow table and CSV."
    frame.to_parquet(folder / "pandas.parquet")
    columns = frame.reset_index() if frame.index.names != [None] else frame
    as_polars_writes(columns, folder / "polars.parquet")
    written = columns.assign(symbol=columns.symbol.map(lambda s: s.decode() if isinstance(s, bytes) else s))
    written.to_csv(folder / "rows.csv", index=False)
    return dict(
        frame=frame,
        pandas=folder / "pandas.parquet",
        polars=folder / "polars.parquet",
        table=pa.Table.from_pandas(columns, preserve_index=False),
        csv=folder / "rows.csv",
    )


@pytest.fixture(scope="module")
def four_features(tmp_path_factory):
    "A finished run on the features f0 to f3."

    def make(split):
        frame = bars(split)
        rng = np.random.default_rng(5)
        columns = {f"f{j}": rng.normal(size=len(frame)) for j in range(4)}
        return frame.drop(columns=["momentum", "trend"]).assign(**columns)

    return trained(tmp_path_factory.mktemp("four"), make, nan="zero")


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(frame=splits_of_any_type())
def test_five_formats_give_the_same_matrix_labels_and_predictions(frame, four_features):
    rows = frame.reset_index() if frame.index.names != [None] else frame
    names = [s.decode() if isinstance(s, bytes) else str(s) for s in dict.fromkeys(rows.symbol)]
    expected = None
    with tempfile.TemporaryDirectory() as folder:
        for name, source in formats(frame, Path(folder)).items():
            split = read_split(source, "test", nan="keep")
            predictions = four_features.predict(source)
            notes = [note.split(": ", 1)[1] for note in split.label_notes.get(5, [])]
            result = dict(
                features=split.features,
                symbols=split.symbols,
                codes=split.codes,
                matrix=split.matrix,
                labels=split.labels[5],
                times=split.datetimes.as_unit("ns").asi8,
                close=split.close,
                notes=notes,
                p_up=predictions.p_up.to_numpy(),
                after=pd.DatetimeIndex(predictions.after).as_unit("ns").asi8,
                symbol=predictions.symbol.tolist(),
                unseen=predictions.attrs["unseen"],
            )
            if expected is None:
                expected = result
                assert split.symbols == names and split.features == ["f0", "f1", "f2", "f3"]
                check_against_the_frame(split, rows)
            for key, value in result.items():
                assert np.array_equal(value, expected[key], equal_nan=key == "matrix"), (name, key)


def check_against_the_frame(split, rows):
    "The split equals the frame, value by value, in plain Python."
    keys = [s.decode() if isinstance(s, bytes) else str(s) for s in rows.symbol]
    by_key = {(key, pd.Timestamp(time)): i for i, (key, time) in enumerate(zip(keys, rows.datetime, strict=True))}
    for i in range(len(split)):
        row = rows.iloc[by_key[split.symbols[split.codes[i]], split.datetimes[i]]]
        label = None if pd.isna(row.label_h5) else float(row.label_h5)
        assert split.labels[5][i] == (label if label in (-1, 0, 1) else NO_TARGET)
        values = [np.nan if pd.isna(row[f]) else np.float32(float(row[f])) for f in split.features]
        assert np.array_equal(split.matrix[i], values, equal_nan=True)
