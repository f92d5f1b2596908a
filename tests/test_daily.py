"Daily data sets: StockNet's protocol against a loop, and bundled sets from stub packages where the real are missing."

import importlib.util
import re
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from modelfactory.configuration import Settings, SettingsError, settings
from modelfactory.data.bundled import BUNDLED
from modelfactory.data.daily import (
    DAILY_STARTS,
    STOCKNET_STARTS,
    movement_labels,
    read_indices,
    read_sp500_20,
    read_stocknet,
    stocknet_frames,
)
from modelfactory.data.features import DAILY_CONSTANT, RANGE_FEATURES
from modelfactory.data.readers import BarsError
from modelfactory.data.splits import NO_LABEL, read_splits
from modelfactory.training.trainer import Trainer

HEADER = ["Date", "Open", "High", "Low", "Close", "Adj Close", "Volume"]


def stocknet_folder(folder, symbols=("AAA", "LATE", "GAP"), seed=0):
    "Price files in StockNet's layout, June 2013 to March 2016: one stock is listed late, one has a day without prices."
    rng, days = np.random.default_rng(seed), pd.bdate_range("2013-06-03", "2016-03-01")
    (folder / "price/raw").mkdir(parents=True)
    for symbol in symbols:
        close = 40 * np.exp(rng.normal(0, 0.012, len(days)).cumsum())
        adjusted = close * np.where(np.arange(len(days)) < 300, 0.5, 1)
        table = pd.DataFrame(
            np.c_[close * 1.002, close * 1.01, close * 0.99, close, adjusted, np.full(len(days), 1e6)],
            columns=HEADER[1:],
        )
        table.insert(0, "Date", days.strftime("%Y-%m-%d"))
        if symbol == "LATE":
            table = table[days >= "2014-11-20"]
        if symbol == "GAP":
            table.loc[500, HEADER[1:]] = np.nan
        table.to_csv(folder / f"price/raw/{symbol}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    return read_stocknet(stocknet_folder(tmp_path_factory.mktemp("stocknet")))


def protocol_rows(bars, first, end):
    "Rows that the protocol scores, by a loop: (symbol, day of the features) -> label."
    rows = {}
    for symbol, table in bars.groupby("symbol"):
        table = table.reset_index(drop=True)
        for i in range(29, len(table) - 1):
            move, day = table.close[i + 1] / table.close[i] - 1, table.datetime[i + 1]
            if pd.Timestamp(first) <= day < pd.Timestamp(end) and (move >= 0.0055 or move <= -0.005):
                rows[symbol, table.datetime[i]] = 1 if move > 0 else -1
    return rows


def labelled(frame):
    frame = frame[frame.label_h1 != NO_LABEL]
    return dict(zip(zip(frame.symbol, frame.datetime, strict=True), frame.label_h1, strict=True))


def test_the_rows_of_the_protocol_equal_those_of_a_loop(bars):
    frames = stocknet_frames(bars)
    starts = STOCKNET_STARTS
    assert labelled(frames["test"]) == protocol_rows(bars, *starts[2:])
    for name, first, end in (("train", *starts[:2]), ("val", *starts[1:3])):
        rows, last = protocol_rows(bars, first, end), pd.Timestamp(end) - pd.offsets.BDay(2)
        kept = {key: label for key, label in rows.items() if key[1] < last}
        assert labelled(frames[name]) == kept and 0 < len(rows) - len(kept) <= 3, name


def test_no_label_of_a_split_is_decided_in_the_next(bars):
    frames = stocknet_frames(bars)
    next_day = movement_labels(bars).assign(symbol=bars.symbol, datetime=bars.datetime)
    for earlier, later in (("train", "val"), ("val", "test")):
        known = frames[earlier].drop(columns=["label_h1", "bars_to_hit_h1"]).merge(next_day, on=["symbol", "datetime"])
        used = (frames[earlier].label_h1 != NO_LABEL).to_numpy()
        assert known.next_day[used].max() < frames[later].datetime.min() + pd.Timedelta(days=1)
        assert frames[earlier].datetime.max() < frames[later].datetime.min()


@pytest.mark.parametrize("length", [2, 60, 180])
def test_every_test_row_has_a_window_of_any_length(bars, length, tmp_path):
    frames = stocknet_frames(bars)
    task = dict(model="gru", horizon=1, preset="quick", config=dict(sequence_length=length))
    trainer = Trainer(task | dict(data=dict(data="stocknet", gap=0, classes=(-1, 1))), data=frames, runs=tmp_path)
    test = trainer._load(("test",))[0]["test"]
    assert len(test.y) == (frames["test"].label_h1 != NO_LABEL).sum()
    assert test.X.shape[1] == length


def test_a_wrong_folder_says_what_was_expected(tmp_path):
    with pytest.raises(BarsError, match="expected a clone of the repository yumoxu/stocknet-dataset"):
        read_stocknet(tmp_path)
    (tmp_path / "AAA.csv").write_text("Date,Close\n2014-01-02,1\n")
    with pytest.raises(BarsError, match="AAA.csv: no column 'Open'"):
        read_stocknet(tmp_path)


SYMBOLS = {"sp500_20": 4, "indices": 2}


def write_stub(folder, name):
    "A package with the data files of `skfolio` or of `arch`, with fewer days."
    rng, days = np.random.default_rng(1), pd.bdate_range("2007-01-02", "2017-12-29")
    if name == "sp500_20":
        closes = 30 * np.exp(rng.normal(0, 0.01, (len(days), 4)).cumsum(0))
        path = folder / "skfolio/datasets/data/sp500_dataset.csv.gz"
        table = pd.DataFrame(closes, days.rename("Date"), list("ABCD")).reset_index()
        tables = {path: table}
    else:
        tables = {}
        for symbol in ("sp500", "nasdaq"):
            close = 1000 * np.exp(rng.normal(0, 0.01, len(days)).cumsum())
            open_ = close * np.exp(rng.normal(0, 0.003, len(days)))
            high, low = np.maximum(open_, close) * 1.004, np.minimum(open_, close) * 0.996
            volume = rng.integers(1_000_000, 2_000_000, len(days))
            table = pd.DataFrame(np.c_[open_, high, low, close, close, volume], columns=HEADER[1:])
            table.insert(0, "Date", [f"{d.month}/{d.day}/{d.year}" for d in days])
            tables[folder / f"arch/data/{symbol}/{symbol}.csv.gz"] = table
    package = folder / ("skfolio" if name == "sp500_20" else "arch")
    for path, table in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False)
    (package / "__init__.py").write_text("raise ImportError('the reader must not import the package')")


@pytest.mark.filterwarnings("ignore::modelfactory.data.splits.SplitsWarning")
@pytest.mark.parametrize("name", SYMBOLS)
def test_a_bundled_set_is_built_from_the_files_of_its_package(name, tmp_path, monkeypatch):
    write_stub(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", finder(tmp_path))
    BUNDLED[name](tmp_path / "out")
    splits = read_splits(tmp_path / "out", (5, 20), ("train", "val", "test"))
    for split, start in zip(("val", "test"), DAILY_STARTS, strict=True):
        first = splits[split].datetimes.min()
        assert pd.Timestamp(start) <= first < pd.Timestamp(start) + pd.Timedelta(days=5)
    assert len(splits["train"].symbols) == SYMBOLS[name]
    excluded = {*DAILY_CONSTANT, *(RANGE_FEATURES if name == "sp500_20" else ())}
    assert len(splits["train"].features) == 111 - len(excluded) and not excluded & {*splits["train"].features}
    for h in (5, 20):
        y = splits["train"].labels[h]
        shares = pd.Series(y[np.isin(y, (-1, 0, 1))]).value_counts(normalize=True)
        assert shares.min() > 0.1, shares


def finder(folder):
    "`find_spec` that finds the packages in `folder` first, even if they are imported already."
    original = importlib.util.find_spec

    def find_spec(name, package=None):
        file = folder / name / "__init__.py"
        return importlib.util.spec_from_file_location(name, file) if file.is_file() else original(name, package)

    return find_spec


@pytest.mark.parametrize(("read", "package"), [(read_sp500_20, "skfolio"), (read_indices, "arch")])
def test_a_missing_package_is_named_with_its_command(read, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BarsError, match=f"package {package} is not installed.*run `pip install {package}`"):
        read()


@pytest.mark.parametrize(
    ("read", "package", "rows"), [(read_sp500_20, "skfolio", 166_260), (read_indices, "arch", 10_062)]
)
def test_the_real_packages_hold_what_is_described(read, package, rows):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    bars = read()
    assert len(bars) == rows and not bars.isna().any(axis=None)


def test_variables_of_the_benchmarks_are_no_settings(monkeypatch):
    pages = "".join(page.read_text() for page in (ROOT / "nbs/benchmarks").glob("*.ipynb"))
    names = set(re.findall(r"MODELFACTORY_[A-Z]+(?:_[A-Z]+)*", pages))
    assert {"MODELFACTORY_STOCKNET", "MODELFACTORY_SCALE_ROWS"} <= names
    for name in names:
        key = name.removeprefix("MODELFACTORY_").lower()
        if key not in {field.name for field in fields(Settings)}:
            monkeypatch.setenv(name, "/nowhere")
    assert settings().seed >= 0
    monkeypatch.setenv("MODELFACTORY_STOCKNETS", "/nowhere")
    with pytest.raises(SettingsError, match="unknown key 'stocknets'"):
        settings()
