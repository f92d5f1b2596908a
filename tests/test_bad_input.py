"""161 kinds of bad input: each gives one typed error of one line, and no file is created or changed.

A kind is one user error, counted once for any number of models that it is tried on. 42 command lines are counted
separately. Most of them lead to one of the 161 errors. They must print one line on stderr and exit with code 2.

`kind` names the user error, the exact class of the exception and the texts that its message must contain. The
function below it makes the error in its own working folder and returns the call that fails. Before and after that call
the folder is compared: paths, sizes, times and content."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE

from modelfactory.cli import main
from modelfactory.configuration import ConfigError, SettingsError, settings
from modelfactory.data.bundled import resolve_data
from modelfactory.data.dataset import DatasetConfig, TimeSeriesDataset, Windows, load_datasets, read_prices
from modelfactory.data.splits import (
    BadDatetime,
    BadValue,
    DuplicateRow,
    EmptySplit,
    FeatureSetsDiffer,
    MissingClass,
    MissingColumn,
    MissingFile,
    SplitOverlap,
    SplitsError,
    UnknownHorizon,
    UnreadableFile,
    fingerprint,
    read_scaler,
    read_split,
    read_splits,
)
from modelfactory.models.conformance import planted_task
from modelfactory.models.errors import FeatureMismatch, NotFittedError
from modelfactory.models.loading import load_model
from modelfactory.models.params import read_params, resolve_config
from modelfactory.models.persistence import CheckpointError
from modelfactory.models.registry import ModelRegistry, UnknownModel
from modelfactory.models.tabular import TabularModel
from modelfactory.models.template import new_model
from modelfactory.runs.attempt import publish, write_run
from modelfactory.runs.engine import check_parameters, find_notebook, run_notebook
from modelfactory.runs.grid import grid_config, run_grid
from modelfactory.runs.predict import predict_run
from modelfactory.runs.run import load_run
from modelfactory.runs.run_folder import RunError, start_attempt
from modelfactory.training.trainer import Trainer, trainer_config

# Thousands of small calls, which coverage slows by half. The notebooks run the same lines.
pytestmark = pytest.mark.no_cover

MODELS = dict(
    xgboost=("model.ubj", dict(n_rounds=5)),
    lightgbm=("model.txt", dict(n_rounds=5)),
    catboost=("model.cbm", dict(n_rounds=5)),
    logistic_regression=("estimator.skops", {}),
    random_forest=("estimator.skops", dict(n_estimators=5)),
    svm=("estimator.skops", {}),
)
XGBOOST_YAML = """model_name: xgboost
model_family: boosting
presets:
  quick: {n_rounds: 5}
search:
  max_depth: {type: int, low: 2, high: 8}
"""
KINDS = {}  # name -> (class of the error, texts in its message, function that makes the user error)


def kind(name, error, *texts):
    "Registers a user error; `make_error(work)` makes it and returns the call that fails."
    assert name not in KINDS

    def add(make_error):
        KINDS[name] = error, texts, make_error
        return make_error

    return add


# The working folder -------------------------------------------------------------------------------------------------


def bars(split, symbols=("AAA", "BBB"), n=120):
    "Hourly bars of a split, one month after the previous split."
    number = ["train", "val", "test"].index(split)
    rng = np.random.default_rng(number)
    start = pd.Timestamp("2024-01-01") + pd.Timedelta(days=30 * number)
    parts = []
    for symbol in symbols:
        columns = dict(
            datetime=pd.date_range(start, periods=n, freq="h"),
            symbol=symbol,
            close=100 + rng.normal(size=n).cumsum(),
            momentum=rng.normal(size=n),
            trend=rng.normal(size=n),
            label_h5=rng.integers(-1, 2, n),
            sample_weight_h5=1.0,
            bars_to_hit_h5=5,
        )
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def split_file(work, split):
    return work / "data" / f"{split}_scaled.parquet"


@pytest.fixture(scope="session")
def valid_folder(tmp_path_factory):
    "A folder without errors: splits, settings, params, a finished run, a checkpoint of each model."
    work = tmp_path_factory.mktemp("valid")
    for folder in ("data", "params/models", "params/grids", "runs", "empty"):
        (work / folder).mkdir(parents=True)
    for split in ("train", "val", "test"):
        bars(split).to_parquet(split_file(work, split), index=False)
    (work / "data/feature_scaler.json").write_text('{"version": "2.0", "features": {}}')
    (work / "settings.ini").write_text("[modelfactory]\ndata = data\nhorizons = 5\n")
    (work / "params/models/xgboost.yaml").write_text(XGBOOST_YAML)
    for name in ("small", "demo"):
        (work / f"params/grids/{name}.yaml").write_text("data: data\nmodels: [logistic_regression]\nhorizons: [5]\n")
    with pytest.MonkeyPatch.context() as at:
        at.chdir(work)
        trainer = Trainer(dict(model="logistic_regression", horizon=5, data="data"))
        trainer.run_full_pipeline()
        attempt = start_attempt(work / "runs", dict(model="logistic_regression", horizon=5))
        write_run(trainer, attempt)
        publish(attempt, work / "runs").rename(work / "runs/first")
        for name, (_, config) in MODELS.items():
            fitted(name, **config).save(work / "checkpoints" / name)
    return work


@pytest.fixture
def work(valid_folder, tmp_path, monkeypatch):
    "A working folder: a copy of the valid one."
    shutil.copytree(valid_folder, tmp_path / "work")
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "work"


def fitted(name, **config):
    task = planted_task(150)
    model = ModelRegistry.create(name, config, 5, task.features)
    model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
    return model


def folder_state(work):
    "Paths in the parent folder of `work` with size, time and content; only the names of temporary files."

    def entry(f):
        if "temporary" in f.parts:
            return None
        return f.stat().st_mtime_ns, f.is_file() and (f.stat().st_size, sha256(f.read_bytes()).hexdigest())

    return {str(f.relative_to(work.parent)): entry(f) for f in [work, *work.parent.rglob("*")]}


# Splits -------------------------------------------------------------------------------------------------------------


def splits(name, error, *texts, train=None, val=None, **call):
    "An error in the splits: `train` and `val` are functions from a valid frame to a wrong one."

    def make_error(work):
        for split, damage in dict(train=train, val=val).items():
            if damage:
                damage(bars(split)).to_parquet(split_file(work, split), index=False)
        return lambda: read_splits(work / "data", **call)

    kind(name, error, *texts)(make_error)


def put(column, value, row=7, kind=None):
    def damage(frame):
        if kind:
            frame[column] = frame[column].astype(kind)
        frame.loc[row, column] = value
        return frame

    return damage


def shift(**by):
    return lambda frame: frame.assign(datetime=frame.datetime - pd.Timedelta(**by))


def text(values):
    return lambda frame: frame.assign(datetime=[values.get(i, str(t)) for i, t in enumerate(frame.datetime)])


def drop(*columns):
    return lambda frame: frame.drop(columns=list(columns))


def zoned(frame):
    return frame.assign(datetime=frame.datetime.dt.tz_localize("UTC"))


splits(
    "no datetime column",
    MissingColumn,
    "train_scaled.parquet",
    "'datetime'",
    train=lambda t: t.rename(columns=dict(datetime="date_time")),
)
splits(
    "no symbol column",
    MissingColumn,
    "val_scaled.parquet",
    "'symbol'",
    "did you mean 'symbols'",
    val=lambda t: t.rename(columns=dict(symbol="symbols")),
)
splits("no label column", MissingColumn, "train_scaled.parquet", "label_h5", train=drop("label_h5"))
splits(
    "label column in train only",
    UnknownHorizon,
    "val_scaled.parquet",
    "label_h5",
    val=lambda t: t.rename(columns=dict(label_h5="label_h6")),
    horizons=(5,),
)
splits("a horizon without labels", UnknownHorizon, "label_h7", "horizons in this file: 5", horizons=(7,))
splits("no row", EmptySplit, "val_scaled.parquet", "no row", val=lambda t: t[:0])
splits(
    "no feature",
    EmptySplit,
    "train_scaled.parquet",
    "no feature",
    train=drop("momentum", "trend"),
    val=drop("momentum", "trend"),
)
splits(
    "a key twice",
    DuplicateRow,
    "train_scaled.parquet",
    "2 rows",
    "first at row 240",
    "AAA 2024-01-01",
    train=lambda t: pd.concat([t, t[:2]]),
)
splits(
    "text that is not a datetime",
    BadDatetime,
    "train_scaled.parquet",
    "datetime",
    "1 row",
    "row 3",
    "'soon'",
    train=text({3: "soon"}),
)
splits(
    "mixed time zones",
    BadDatetime,
    "train_scaled.parquet",
    "row 3",
    "time zone",
    train=text({3: "2024-01-01T03:00:00+02:00"}),
)
splits(
    "a row without datetime",
    BadDatetime,
    "val_scaled.parquet",
    "1 row with no time",
    "row 7",
    val=put("datetime", pd.NaT),
)
splits(
    "datetimes as numbers",
    BadDatetime,
    "train_scaled.parquet",
    "int64",
    train=lambda t: t.assign(datetime=range(len(t))),
)
splits(
    "a datetime beyond nanoseconds",
    BadDatetime,
    "val_scaled.parquet",
    "row 9",
    val=lambda t: t.assign(
        datetime=np.where(np.arange(len(t)) == 9, np.datetime64("9999-12-31", "us"), t.datetime.to_numpy("M8[us]"))
    ),
)
splits(
    "one split with a time zone, one without",
    BadDatetime,
    "train_scaled.parquet",
    "val_scaled.parquet",
    "time zone",
    train=zoned,
)
splits(
    "a row without symbol", MissingColumn, "train_scaled.parquet", "symbol", "1 row", "row 7", train=put("symbol", None)
)
splits(
    "infinity in a feature",
    BadValue,
    "train_scaled.parquet",
    "trend",
    "1 row",
    "row 7",
    "infinity",
    train=put("trend", np.inf),
)
splits(
    "infinity where NaN is filled",
    BadValue,
    "val_scaled.parquet",
    "trend",
    "infinity",
    val=put("trend", -np.inf),
    nan="median",
)
splits(
    "NaN in a feature",
    BadValue,
    "val_scaled.parquet",
    "momentum",
    "1 row",
    "row 7",
    "nan='median'",
    val=put("momentum", np.nan),
)
splits(
    "a value beyond float32", BadValue, "train_scaled.parquet", "trend", "row 7", "float32", train=put("trend", 1e300)
)
splits(
    "a feature missing in val",
    FeatureSetsDiffer,
    "trend",
    "in train_scaled.parquet, not in val_scaled.parquet",
    "exclude=",
    val=drop("trend"),
)
splits(
    "a feature missing in train",
    FeatureSetsDiffer,
    "novel",
    "in val_scaled.parquet, not in train_scaled.parquet",
    val=lambda t: t.assign(novel=1.0),
)
splits(
    "a feature that is text in val",
    FeatureSetsDiffer,
    "trend",
    "val_scaled.parquet",
    val=lambda t: t.assign(trend="up"),
)
splits(
    "splits that overlap in time",
    SplitOverlap,
    "train_scaled.parquet",
    "val_scaled.parquet",
    "240 rows",
    "row 0",
    val=shift(days=30),
)
splits(
    "splits closer than the label window",
    SplitOverlap,
    "train_scaled.parquet",
    "label_h5",
    "10 rows",
    "row 115",
    "null",
    val=shift(days=25),
)
splits(
    "one symbol of a panel closer than the label window",
    SplitOverlap,
    "label_h5",
    "5 rows",
    "BBB",
    val=lambda t: shift(days=25)(t),
    train=lambda t: t.assign(label_h5=t.label_h5.mask(t.symbol == "AAA")),
)
splits(
    "a class absent from train",
    MissingClass,
    "train_scaled.parquet",
    "label_h5",
    "class 1",
    train=lambda t: t.assign(label_h5=t.label_h5.clip(upper=0)),
)
splits(
    "labels that are words",
    BadValue,
    "train_scaled.parquet",
    "label_h5",
    "'up' (240)",
    train=lambda t: t.assign(label_h5="up"),
)
splits(
    "bars_to_hit that are words",
    BadValue,
    "train_scaled.parquet",
    "bars_to_hit_h5",
    train=lambda t: t.assign(bars_to_hit_h5="soon"),
)
splits(
    "sample weights that are words",
    BadValue,
    "train_scaled.parquet",
    "sample_weight_h5",
    train=lambda t: t.assign(sample_weight_h5="heavy"),
)
splits("closes that are words", BadValue, "val_scaled.parquet", "close", val=lambda t: t.assign(close="dear"))
splits("features= names a label", SplitsError, "label_h5", "never", features=("label_h5",))
splits("features= names a key", SplitsError, "symbol", "never", features=("symbol",))
splits("features= names no column", MissingColumn, "'trnd'", "did you mean 'trend'", features=("trnd",))
splits("exclude= names no column", MissingColumn, "'momentun'", "did you mean 'momentum'", exclude=("momentun",))
splits("nan= with an unknown value", SplitsError, "'mean'", "'median'", nan="mean")


@kind("no folder of splits", MissingFile, "nowhere", "train_scaled.parquet")
def _(work):
    return lambda: read_splits(work / "nowhere")


@kind("one split's file missing", MissingFile, "val_scaled.parquet", "no such file")
def _(work):
    split_file(work, "val").unlink()
    return lambda: read_splits(work / "data")


@kind("a folder in a file's place", MissingFile, "val_scaled.parquet")
def _(work):
    split_file(work, "val").unlink()
    split_file(work, "val").mkdir()
    return lambda: read_splits(work / "data")


@kind("an empty file", UnreadableFile, "val_scaled.parquet", "parquet")
def _(work):
    split_file(work, "val").write_bytes(b"")
    return lambda: read_splits(work / "data")


@kind("a truncated parquet file", UnreadableFile, "train_scaled.parquet", "parquet", "write it again")
def _(work):
    split_file(work, "train").write_bytes(split_file(work, "train").read_bytes()[:-500])
    return lambda: read_splits(work / "data")


@kind("a parquet file damaged in the middle", UnreadableFile, "train_scaled.parquet", "write it again")
def _(work):
    content = split_file(work, "train").read_bytes()
    split_file(work, "train").write_bytes(content[:4] + b"\xff" * 1000 + content[1004:])
    return lambda: read_splits(work / "data")


@kind("a CSV named .parquet", UnreadableFile, "train_scaled.parquet", "parquet")
def _(work):
    bars("train").to_csv(split_file(work, "train"))
    return lambda: read_splits(work / "data")


@kind("a frame with a column twice", UnreadableFile, "train frame", "trend")
def _(work):
    frame = bars("train")
    return lambda: read_split(pd.concat([frame, frame[["trend"]]], axis=1))


@kind("a file with a column twice", UnreadableFile, "train_scaled.parquet", "trend")
def _(work):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(bars("train"), preserve_index=False)
    pq.write_table(table.append_column("trend", table["trend"]), split_file(work, "train"))
    return lambda: read_splits(work / "data")


@kind("frames without the split asked for", MissingFile, "no val split", "train")
def _(work):
    return lambda: read_splits(dict(train=bars("train")))


@kind("fingerprint of a missing split", MissingFile, "test_scaled.parquet")
def _(work):
    split_file(work, "test").unlink()
    return lambda: fingerprint(work / "data", ("test",))


@kind("a broken feature_scaler.json", UnreadableFile, "feature_scaler.json", "JSON")
def _(work):
    (work / "data/feature_scaler.json").write_text('{"version": ')
    return lambda: read_scaler(work / "data")


@kind("a list in feature_scaler.json", UnreadableFile, "feature_scaler.json", "JSON")
def _(work):
    (work / "data/feature_scaler.json").write_text("[1, 2]")
    return lambda: read_scaler(work / "data")


@kind("a bundled data set misspelt", MissingFile, "plantd", "did you mean 'planted'")
def _(work):
    return lambda: resolve_data("plantd")


@kind("a price file missing", MissingFile, "closes.parquet")
def _(work):
    ds = load_datasets(DatasetConfig("data"), 5)[0]["val"]
    return lambda: read_prices(ds, "closes.parquet")


@kind("a price file without close", MissingColumn, "closes.parquet", "close")
def _(work):
    bars("val").drop(columns="close").to_parquet("closes.parquet")
    ds = load_datasets(DatasetConfig("data"), 5)[0]["val"]
    return lambda: read_prices(ds, "closes.parquet")


# Windows ------------------------------------------------------------------------------------------------------------


@kind(
    "windows longer than the symbol",
    SplitsError,
    "train_scaled.parquet",
    "no sample for horizon 5",
    "240 rows",
    "500 rows",
)
def _(work):
    return lambda: load_datasets(DatasetConfig("data"), 5, 500)


@kind("a window of no row", ValueError, "seq_len = 0", "seq_len >= 1")
def _(work):
    return lambda: TimeSeriesDataset(read_split(bars("train")), 5, 0)


@kind("a gap of two", ValueError, "gap = 2", "gap 0 or 1")
def _(work):
    return lambda: TimeSeriesDataset(read_split(bars("train")), 5, 1, 2)


@kind("windows that begin before the first row", ValueError, "windows of 4 rows end at rows 2 to 2", "expected 3 to 9")
def _(work):
    return lambda: Windows(np.zeros((10, 2)), [2], 4)


@kind("a buffer of the wrong shape", ValueError, "(2, 4, 3)", "(2, 4, 2)")
def _(work):
    return lambda: Windows(np.zeros((10, 2)), [3, 4], 4).take([0, 1], out=np.empty((2, 4, 3), np.float32))


@kind("a buffer of float64", ValueError, "float64", "float32")
def _(work):
    return lambda: Windows(np.zeros((10, 2)), [3, 4], 4).take([0, 1], out=np.empty((2, 4, 2)))


# YAML and configs ---------------------------------------------------------------------------------------------------


def yaml_file(name, *texts, text, call, file="params/models/xgboost.yaml"):
    "An error in a YAML file that `call` reads."

    def make_error(work):
        (work / file).write_text(text)
        return call

    kind(name, ConfigError, file, *texts)(make_error)


def read_xgboost():
    return read_params("xgboost")


def read_grid():
    return grid_config("small")


yaml_file(
    "an unknown key in a model's YAML", "'max_dept'", "did you mean 'max_depth'", text="max_dept: 4", call=read_xgboost
)
yaml_file(
    "an unknown key in a preset",
    "'n_round'",
    "did you mean 'n_rounds'",
    text="presets: {quick: {n_round: 4}}",
    call=read_xgboost,
)
yaml_file("a value of the wrong type", "max_depth = 'deep'", "integer", text="max_depth: deep", call=read_xgboost)
yaml_file("a value out of range", "subsample = 1.5", text="subsample: 1.5", call=read_xgboost)
yaml_file(
    "a tag that would run code",
    "plain YAML",
    text="max_depth: !!python/object/apply:os.system ['touch ran']",
    call=read_xgboost,
)
yaml_file("malformed YAML", "plain YAML", text="max_depth: [1, 2", call=read_xgboost)
yaml_file("YAML that is not text", "plain YAML", text="max_depth: \x00", call=read_xgboost)
yaml_file("a list for a mapping", "list", "key: value", text="- max_depth", call=read_xgboost)
yaml_file("a list of presets", "presets", text="presets: [quick]", call=read_xgboost)
yaml_file("a preset that is a number", "quick", text="presets: {quick: 4}", call=read_xgboost)
yaml_file("model_name of another model", "model_name", "'xgboost'", text="model_name: lightgbm", call=read_xgboost)
yaml_file(
    "model_family of another family", "model_family", "'boosting'", text="model_family: neural", call=read_xgboost
)
yaml_file(
    "search over an unknown key",
    "search",
    "'max_dep'",
    "did you mean 'max_depth'",
    text="search: {max_dep: {type: int, low: 1, high: 2}}",
    call=read_xgboost,
)
GRID = "params/grids/small.yaml"
yaml_file(
    "an unknown key in a grid", "'horizon'", "did you mean 'horizons'", text="horizon: [5]", call=read_grid, file=GRID
)
yaml_file(
    "overrides for a model that is not in the grid",
    "'xgboost'",
    "not a model of the grid",
    text="models: [svm]\noverrides: {xgboost: {max_depth: 4}}",
    call=read_grid,
    file=GRID,
)
yaml_file("no horizon in a grid", "horizons is empty", text="horizons: []", call=read_grid, file=GRID)
yaml_file("no model in a grid", "models is empty", text="models: []", call=read_grid, file=GRID)
yaml_file("a negative horizon in a grid", "horizons", "-5", text="horizons: [-5]", call=read_grid, file=GRID)
yaml_file("null for a data set's name", "data", text="data: [null]", call=read_grid, file=GRID)
yaml_file(
    "overrides that are a number", "overrides", text="models: [svm]\noverrides: {svm: 4}", call=read_grid, file=GRID
)


@kind("an unknown preset", ConfigError, "xgboost", "'quik'", "did you mean 'quick'")
def _(work):
    return lambda: resolve_config("xgboost", 5, "quik")


@kind("a negative horizon", ConfigError, "xgboost", "horizon = -5")
def _(work):
    return lambda: resolve_config("xgboost", -5)


@kind("one class in a config", ConfigError, "svm", "classes")
def _(work):
    return lambda: ModelRegistry.create("svm", dict(classes=(1,)), 5, ["a"])


@kind("an unknown class weight", ConfigError, "svm", "class_weight = 'heavy'", "balanced")
def _(work):
    return lambda: ModelRegistry.create("svm", dict(class_weight="heavy"), 5, ["a"])


@kind("a grid that does not exist", ConfigError, "smal", "no such file")
def _(work):
    return lambda: run_grid("smal")


@kind("an unknown model in a grid", UnknownModel, "'xgbost'", "did you mean 'xgboost'")
def _(work):
    return lambda: run_grid(dict(models=["xgbost"]))


@kind("an unknown config key in a grid's overrides", ConfigError, "svm", "'Cc'")
def _(work):
    return lambda: run_grid(dict(models=["svm"], overrides=dict(svm=dict(Cc=1))))


@kind(
    "a horizon in a grid without labels",
    UnknownHorizon,
    "train_scaled.parquet",
    "label_h9",
    "horizons in this file: 5",
)
def _(work):
    return lambda: run_grid(dict(models=["svm"], horizons=[5, 9]))


@kind("a data set in a grid that cannot be learnt from", BadValue, "train_scaled.parquet", "trend", "row 7")
def _(work):
    put("trend", np.nan)(bars("train")).to_parquet(split_file(work, "train"))
    return lambda: run_grid("small")


@kind("an unknown key of a trainer", ConfigError, "TrainerConfig", "'horizons'", "did you mean 'horizon'")
def _(work):
    return lambda: trainer_config(dict(model="svm", horizons=5, data="data"))


@kind("a trainer without model", ConfigError, "TrainerConfig", "model is missing")
def _(work):
    return lambda: trainer_config(dict(horizon=5, data="data"))


@kind("an unknown key of a data set", ConfigError, "data", "'gapp'", "did you mean 'gap'")
def _(work):
    return lambda: Trainer(dict(model="svm", horizon=5, data=dict(gapp=1)))


@kind("a gap of two in a config", ConfigError, "gap = 2")
def _(work):
    return lambda: Trainer(dict(model="svm", horizon=5, data=dict(gap=2)))


@kind("a parameter that the notebook does not have", ConfigError, "train.ipynb", "'modl'", "did you mean 'model'")
def _(work):
    return lambda: check_parameters(find_notebook("train.ipynb"), dict(modl="svm"))


@kind("a notebook that does not exist", ConfigError, "trian.ipynb", "notebooks=")
def _(work):
    return lambda: find_notebook("trian.ipynb")


# settings.ini -------------------------------------------------------------------------------------------------------


def settings_ini(name, *texts, text, call=settings):
    "An error in settings.ini, which `call` reads."

    def make_error(work):
        (work / "settings.ini").write_text(text)
        return call

    kind(name, SettingsError, "settings.ini", *texts)(make_error)


settings_ini("an unknown setting", "'horizon'", "did you mean 'horizons'", text="[modelfactory]\nhorizon = 5\n")
settings_ini(
    "a setting that is no number", "trading_days = 'many'", "number", text="[modelfactory]\ntrading_days = many\n"
)
settings_ini("horizons that are no numbers", "horizons", "'five'", text="[modelfactory]\nhorizons = five\n")
settings_ini("a setting out of range", "gap = '2'", text="[modelfactory]\ngap = 2\n")
settings_ini("malformed settings", "no sign of equality", text="[modelfactory]\nno sign of equality\n")
settings_ini("a setting twice", "'seed'", text="[modelfactory]\nseed = 1\nseed = 2\n")
settings_ini(
    "malformed settings while models are listed",
    "settings.ini",
    text="[modelfactory]\nno sign of equality\n",
    call=ModelRegistry.list_models,
)


@kind("a settings file that does not exist", SettingsError, "elsewhere.ini")
def _(work):
    os.environ["MODELFACTORY_SETTINGS"] = "elsewhere.ini"
    return settings


@kind("an unknown setting in the environment", SettingsError, "'sed'", "did you mean 'seed'")
def _(work):
    os.environ["MODELFACTORY_SED"] = "1"
    return settings


# Models -------------------------------------------------------------------------------------------------------------


def fit(model, X=None, y=None, meta=None):
    task = planted_task(150)
    X_train = task.X if X is None else X(task.X.copy())
    y_train = task.y if y is None else y(task.y.copy())
    metadata = task.meta if meta is None else meta(task.meta)
    return lambda: model.fit(X_train, y_train, task.X_val, task.y_val, metadata, task.meta_val)


def predict(model, X=None, meta=None):
    task = planted_task(150)
    X_new = task.X if X is None else X(task.X.copy())
    metadata = task.meta if meta is None else meta(task.meta)
    return lambda: model.predict(X_new, metadata)


def new(name="logistic_regression", F=5, **config):
    return ModelRegistry.create(name, config, 5, [f"feature_{j}" for j in range(F)])


def loaded(work):
    return load_model(work / "checkpoints/logistic_regression")


def with_nan(X):
    X[3, 2] = np.nan
    return X


@kind("features of another width in fit", ValueError, "logistic_regression", "(150, 4)", "(n, 5)")
def _(work):
    return fit(new(), X=lambda X: X[:, :4])


@kind("features of another width in predict", ValueError, "logistic_regression", "(150, 4)", "(n, 5)")
def _(work):
    return predict(loaded(work), X=lambda X: X[:, :4])


@kind("windows of another length", ValueError, "(150, 3, 5)", "(n, 4, 5)")
def _(work):
    return fit(new(sequence_length=4), X=lambda X: np.repeat(X[:, None], 3, 1))


@kind("features of another type", ValueError, "float64", "float32")
def _(work):
    return fit(new(), X=lambda X: X.astype(float))


@kind("fewer labels than rows", ValueError, "(149,)", "(150,)")
def _(work):
    return fit(new(), y=lambda y: y[:-1])


@kind("a label outside the classes", ValueError, "y holds 7", "(-1, 0, 1)")
def _(work):
    return fit(new(), y=lambda y: np.where(np.arange(150) == 9, 7, y))


@kind("one class only", ValueError, "logistic_regression", "one class")
def _(work):
    return fit(new(), y=np.ones_like)


@kind("less metadata than rows", ValueError, "149 rows", "150 rows")
def _(work):
    return predict(loaded(work), meta=lambda m: m[:-1])


COLUMNS = "the columns ['datetime', 'horizon', 'sample_weight'], expected 150 rows with datetime, symbol, horizon"


@kind("metadata without symbol", ValueError, COLUMNS)
def _(work):
    return predict(loaded(work), meta=lambda m: m.drop(columns="symbol"))


@kind("NaN in fit for a model that refuses it", ValueError, "logistic_regression", "NaN", "nan='median'")
def _(work):
    return fit(new(), X=with_nan)


@kind("NaN in predict for a model that refuses it", ValueError, "logistic_regression", "NaN", "nan='median'")
def _(work):
    return predict(loaded(work), X=with_nan)


@kind("missing sample weights", ValueError, "sample_weight", "sample_weight_h5")
def _(work):
    return fit(new(sample_weight="column"), meta=lambda m: m.drop(columns="sample_weight"))


@kind("a negative weight", ValueError, "sample_weight", "not negative")
def _(work):
    return fit(new(sample_weight="column"), meta=lambda m: m.assign(sample_weight=-1.0))


@kind("an exact kernel machine on too many rows", ValueError, "svm", "at most 100", "max_exact_rows")
def _(work):
    return fit(new("svm", exact=True, max_exact_rows=100))


@kind("predict before fit", NotFittedError, "logistic_regression", "before fit or load")
def _(work):
    return predict(new())


@kind("save before fit", NotFittedError, "logistic_regression", "nothing to save")
def _(work):
    return lambda: new().save(work / "saved")


@kind("an unknown model", UnknownModel, "'lightgmb'", "did you mean 'lightgbm'")
def _(work):
    return lambda: new("lightgmb")


@kind("a model of another family", UnknownModel, "'neural:svm'")
def _(work):
    return lambda: new("neural:svm")


@kind("a model named as a path", UnknownModel, "'../x'")
def _(work):
    return lambda: new("../x")


@kind("a run named as a path", ValueError, "'../x'", "lower-case")
def _(work):
    return lambda: run_notebook(dict(model="../x", horizon=5), work / "runs")


@kind("an attempt named as a path", ValueError, "'../x'", "lower-case")
def _(work):
    return lambda: start_attempt(work / "runs", dict(model="../x", horizon=5))


@kind("registering a path", ValueError, "'../x'", "lower-case")
def _(work):
    return lambda: ModelRegistry.register("../x", "mine")


@kind("registering a taken name", ValueError, "'svm'", "modelfactory.models.classical.svm.SVMModel", "Mine")
def _(work):
    new("svm")
    return lambda: ModelRegistry.register("svm", "mine")(type("Mine", (TabularModel,), {}))


@kind("registering a class that is not a model", TypeError, "register('mine')", "BaseModel")
def _(work):
    return lambda: ModelRegistry.register("mine", "mine")(dict)


@kind("a plugin that does not load", UnknownModel, "'mine'", "ZeroDivisionError")
def _(work):
    (work / "mine.py").write_text("1 / 0")
    (work / "settings.ini").write_text("[modelfactory]\nplugins = mine.py\n")
    return lambda: new("mine")


@kind("a new model whose files exist", FileExistsError, "mine.ipynb", "nothing was written")
def _(work):
    (work / "mine.ipynb").write_text("")
    return lambda: new_model("mine", "mine", work)


@kind("a new model with a taken name", ValueError, "'svm'", "taken")
def _(work):
    return lambda: new_model("svm", "mine", work)


@kind("a new family named as a path", ValueError, "'../x'")
def _(work):
    return lambda: new_model("mine", "../x", work)


# Checkpoints --------------------------------------------------------------------------------------------------------


class Touch:
    "An object that creates a file when it is unpickled."

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def checkpoint(name, error, *texts):
    "An error in the checkpoint of each model: `damage(folder, file)`."

    def add(damage):
        for model, (file, _) in MODELS.items():

            def make_error(work, model=model, file=file):
                damage(work / "checkpoints" / model, work / "checkpoints" / model / file)
                return lambda: load_model(work / "checkpoints" / model)

            KINDS[f"{name}: {model}"] = error, texts, make_error

    return add


def edit(folder, **values):
    file = folder / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@checkpoint("a pickle for weights", CheckpointError, "not a")
def _(folder, file):
    file.write_bytes(pickle.dumps(Touch()))


@checkpoint("half of the weights", CheckpointError, "not a")
def _(folder, file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@checkpoint("no weights", CheckpointError, "no such file")
def _(folder, file):
    file.unlink()


@checkpoint("empty weights", CheckpointError, "not a")
def _(folder, file):
    file.write_bytes(b"")


def header(name, error, *texts, model="logistic_regression"):
    "An error in the header of a checkpoint: `damage(folder)`."

    def add(damage):
        def make_error(work):
            damage(work / "checkpoints" / model)
            return lambda: load_model(work / "checkpoints" / model)

        kind(name, error, *texts)(make_error)

    return add


@header("no header", CheckpointError, "model.json")
def _(folder):
    (folder / "model.json").unlink()


@header("a header that is no JSON", CheckpointError, "model.json")
def _(folder):
    (folder / "model.json").write_bytes(pickle.dumps(Touch()))


@header("a header that is a list", CheckpointError, "model.json", "header")
def _(folder):
    (folder / "model.json").write_text("[1]")


@header("a header of another format", CheckpointError, "model.json", "format 1")
def _(folder):
    edit(folder, format=2)


@header("a header of an unknown model", UnknownModel, "'svn'", "did you mean 'svm'")
def _(folder):
    edit(folder, name="svn")


@header("a header with an unknown config key", ConfigError, "'c'")
def _(folder):
    edit(folder, config=dict(c=1))


@header("a pickle within the estimator's archive", CheckpointError, "estimator.skops")
def _(folder):
    import zipfile

    with zipfile.ZipFile(folder / "estimator.skops", "w") as z:
        z.writestr("schema.json", pickle.dumps(Touch()))


@header("an estimator of a type that is not trusted", CheckpointError, "estimator.skops", "Untrusted")
def _(folder):
    from sklearn.preprocessing import FunctionTransformer
    from skops.io import dump

    dump(FunctionTransformer(Path.touch), folder / "estimator.skops")


@kind("a checkpoint of another model", CheckpointError, "holds a svm", "expected a logistic_regression")
def _(work):
    return lambda: new().load(work / "checkpoints/svm")


@kind("a checkpoint for other features", FeatureMismatch, "missing features ['feature_4']")
def _(work):
    return lambda: new(F=4).load(work / "checkpoints/logistic_regression")


@kind(
    "a checkpoint for features in another order",
    FeatureMismatch,
    "another order",
    "'feature_1' in place of 'feature_0'",
)
def _(work):
    model = ModelRegistry.create("xgboost", {}, 5, [f"feature_{j}" for j in (1, 0, 2, 3, 4)])
    return lambda: model.load(work / "checkpoints/xgboost")


@kind("no checkpoint", CheckpointError, "nowhere")
def _(work):
    return lambda: load_model(work / "nowhere")


# Runs ---------------------------------------------------------------------------------------------------------------


@kind("a folder that is not a run", RunError, "empty", "manifest.json")
def _(work):
    return lambda: load_run(work / "empty")


@kind("the folder above as a run", RunError, "..", "manifest.json")
def _(work):
    return lambda: load_run("..")


@kind("a run that is a file", RunError, "settings.ini")
def _(work):
    return lambda: load_run(work / "settings.ini")


@kind("a manifest that is no JSON", RunError, "manifest.json", "not readable")
def _(work):
    (work / "runs/first/manifest.json").write_text("{")
    return lambda: load_run(work / "runs/first")


@kind("a manifest of something else", RunError, "manifest.json", "not a manifest")
def _(work):
    (work / "runs/first/manifest.json").write_text('{"files": {}}')
    return lambda: load_run(work / "runs/first")


@kind("a checkpoint changed after the run", RunError, "estimator.skops", "changed")
def _(work):
    run = load_run(work / "runs/first")
    with open(run.path / "checkpoints/estimator.skops", "ab") as f:
        f.write(b"x")
    return run.model


@kind("a checkpoint gone from the run", RunError, "model.json", "missing")
def _(work):
    (work / "runs/first/checkpoints/model.json").unlink()
    return load_run(work / "runs/first").model


@kind("any file changed after the run", RunError, "val_predictions.parquet", "changed")
def _(work):
    bars("val").to_parquet(work / "runs/first/predictions/val_predictions.parquet")
    return load_run(work / "runs/first").verify


@kind("metrics gone from the run", RunError, "metrics.json")
def _(work):
    (work / "runs/first/metrics/metrics.json").unlink()
    return lambda: load_run(work / "runs/first").metrics


@kind("predictions of a split that was not predicted", RunError, "first", "'test'", "val")
def _(work):
    return lambda: load_run(work / "runs/first").predictions("test")


@kind("predictions of a split named as a path", RunError, "../../x")
def _(work):
    return lambda: load_run(work / "runs/first").predictions("../../x")


@kind("an attempt that did not end", RunError, "result.json", "did not reach its end")
def _(work):
    attempt = start_attempt(work / "runs", dict(model="svm", horizon=5))
    return lambda: publish(attempt, work / "runs")


@kind("predicting bars that lack a feature", MissingColumn, "test frame", "trend")
def _(work):
    return lambda: predict_run(work / "runs/first", bars("test").drop(columns="trend"))


@kind("predicting bars with NaN", BadValue, "test frame", "trend", "row 7")
def _(work):
    return lambda: predict_run(work / "runs/first", put("trend", np.nan)(bars("test")))


@kind("predicting a missing file", MissingFile, "nowhere.parquet")
def _(work):
    return lambda: predict_run(work / "runs/first", "nowhere.parquet")


@kind("predicting an unknown split", MissingFile, "tset_scaled.parquet")
def _(work):
    return lambda: predict_run(work / "runs/first", "data", "tset")


@pytest.mark.parametrize("name", KINDS)
def test_one_typed_error_of_one_line_and_nothing_written(name, work):
    error, texts, make_error = KINDS[name]
    call = make_error(work)
    before = folder_state(work)
    with pytest.raises(Exception) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    assert "\n" not in message and message.strip() and len(message) < 600, message
    for text in texts:
        assert text in message, message
    assert folder_state(work) == before


# The command line ---------------------------------------------------------------------------------------------------

COMMANDS = {  # arguments -> text in the line on stderr
    "models --family boostin": "did you mean 'boosting'",
    "check nowhere": "nowhere",
    "check data --nan mean": "'mean'",
    "check huge": "more than float32 can hold",
    "train --model xgbost --horizon 5": "did you mean 'xgboost'",
    "train --model ../x --horizon 5": "'../x'",
    "train --model svm": "--horizon",
    "train --model svm --horizon five": "'--horizon'",
    "train --model svm --horizon 5 --dta data": "--data",
    "train --model svm --horizon -5": "-5",
    "train --model svm --horizon 9": "horizons in this file: 5",
    "train --model svm --horizon 5 --seed -1": "seed",
    "train --model svm --horizon 5 --data nowhere": "nowhere",
    "train --model svm --horizon 5 --data broken": "trend",
    "train --model svm --horizon 5 --set Cc=1": "'Cc'",
    "train --model svm --horizon 5 --set C": "key=value",
    "train --model svm --horizon 5 --set C=[1": "--set",
    "train --model svm --horizon 5 --set C=!!python/object/apply:os.getcwd[]": "--set",
    "train --model svm --horizon 5 --config nowhere.yaml": "nowhere.yaml",
    "train --model xgboost --horizon 5 --preset quik": "did you mean 'quick'",
    "train --model svm --horizon 5 --output settings.ini": "settings.ini",
    "experiment smal": "smal",
    "experiment small --workers 0": "workers",
    "experiment settings.ini": "settings.ini",
    "experiment bad.yaml": "did you mean 'horizons'",
    "compare empty": "empty",
    "compare nowhere": "nowhere",
    "predict nowhere data": "nowhere",
    "predict .. data": "manifest.json",
    "train --model svm --horizon 5 --test --data untested": "test_scaled.parquet",
    "compare settings.ini": "settings.ini",
    "predict runs/first nowhere": "nowhere",
    "predict runs/first data --split tset": "tset",
    "predict runs/first data --output nowhere/p.parquet": "nowhere",
    "predict runs/first data --output empty": "empty",
    "new ../x --family mine": "'../x'",
    "new svm --family mine": "taken",
    "new mine --family ../x": "'../x'",
    "new taken --family mine": "taken.ipynb",
    "new mine --family mine --output settings.ini": "settings.ini",
    "demo --output settings.ini": "settings.ini",
    "trian": "trian",
}


@pytest.fixture
def command_folder(work):
    "The working folder with further wrong files that the commands read."
    shutil.copytree(work / "data", work / "broken")
    put("trend", np.nan)(bars("train")).to_parquet(work / "broken/train_scaled.parquet")
    shutil.copytree(work / "data", work / "untested", ignore=shutil.ignore_patterns("test*"))
    shutil.copytree(work / "data", work / "huge")
    put("trend", 1e300)(bars("val")).to_parquet(work / "huge/val_scaled.parquet")
    (work / "bad.yaml").write_text("horizon: [5]")
    (work / "taken.ipynb").write_text("")
    return work


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_wrong_command_prints_one_line_and_exits_with_2(arguments, command_folder, capsys):
    before = folder_state(command_folder)
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    out, err = capsys.readouterr()
    assert end.value.code == 2, err
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err and out == "", out + err
    assert COMMANDS[arguments] in err
    assert folder_state(command_folder) == before


@pytest.mark.parametrize("arguments", ["train --model xgbost --horizon 5", "check huge", "new ../x --family mine"])
def test_the_installed_command(arguments, command_folder):
    before = folder_state(command_folder)
    command = [Path(sys.executable).with_name("modelfactory"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and COMMANDS[arguments] in done.stderr
    assert folder_state(command_folder) == before


def test_the_valid_folder_has_no_error(valid_folder, monkeypatch):
    monkeypatch.chdir(valid_folder)
    assert len(read_splits("data")["train"]) == 240
    assert read_scaler("data")["version"] == "2.0" and settings().horizons == (5,)
    load_run("runs/first").verify()
    assert len(predict_run("runs/first", "data")) == 240 and grid_config("small").models == ("logistic_regression",)
    for name in MODELS:
        assert load_model(valid_folder / "checkpoints" / name).fitted


def test_the_counts_in_the_docstring_are_right():
    kinds = {re.sub(f": ({'|'.join(MODELS)})$", "", name) for name in KINDS}
    assert f"{len(kinds)} kinds of bad input" in __doc__ and f"{len(COMMANDS)} command lines" in __doc__, (
        len(kinds),
        len(COMMANDS),
    )
