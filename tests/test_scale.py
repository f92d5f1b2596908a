"Large splits: the leak audit scores a sample of rows, and tables of large models are mapped from disk."

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from modelfactory.data import audit as audit_module
from modelfactory.data import matrix, splits
from modelfactory.data.audit import (
    _shifted,
    audit,
    reference_columns,
    sampled_rows,
    score_columns,
    shift_within_symbol,
)
from modelfactory.data.bundled import resolve_data
from modelfactory.data.dataset import TimeSeriesDataset, Windows
from modelfactory.data.folds import LabelSpans, max_duration
from modelfactory.data.splits import UnreadableFile, label_bars, read_split, read_splits
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.tabular import RowChunks


@pytest.fixture(scope="module")
def train():
    "The training split of the planted market, with every sixth feature."
    split = read_splits(resolve_data("planted"))["train"]
    return replace(split, matrix=split.matrix[:, ::6].copy(), features=split.features[::6])


@pytest.fixture
def sampling(monkeypatch, train):
    "The audit scores about half of the rows of `train`."
    monkeypatch.setattr(audit_module, "SCORED_ROWS", len(train) // 2)
    monkeypatch.setattr(audit_module, "SYMBOL_ROWS", 100)


def test_a_row_is_drawn_from_each_stratum_of_each_symbol(train, monkeypatch):
    sizes = [9_000, 900, 90, 3]
    codes = np.repeat(np.arange(4), sizes)
    split = replace(train, matrix=np.zeros((len(codes), 1)), codes=codes, symbols=list("ABCD"))
    assert len(sampled_rows(split)) == len(codes)
    monkeypatch.setattr(audit_module, "SCORED_ROWS", 999)
    monkeypatch.setattr(audit_module, "SYMBOL_ROWS", 95)
    rows = sampled_rows(split)
    assert np.bincount(codes[rows]).tolist() == [900, 95, 90, 3]
    assert (rows[:900] // 10 == np.arange(900)).all() and (np.diff(rows) > 0).all()
    assert (rows == sampled_rows(split)).all()


@pytest.mark.parametrize("shift", [-30, -5, -1, 0, 1, 7, 30])
def test_values_shifted_at_some_rows_are_those_shifted_at_all_rows(shift):
    rng = np.random.default_rng(0)
    codes, values = np.repeat([0, 1, 2], [10, 3, 12]), rng.normal(size=25)
    rows = np.sort(rng.choice(25, 15, replace=False))
    np.testing.assert_array_equal(_shifted(values, codes, rows, shift), shift_within_symbol(values, codes, shift)[rows])


def test_reference_columns_at_some_rows_are_those_at_all_rows(train):
    rows = np.flatnonzero(np.random.default_rng(0).random(len(train)) < 0.1)
    everywhere, some = reference_columns(train), reference_columns(train, rows)
    assert list(everywhere) == list(some) and len(some) == 26
    for name, values in some.items():
        np.testing.assert_array_equal(values, everywhere[name][rows])


def test_a_sample_reveals_a_planted_leak_and_reports_its_power(train, sampling):
    clean = audit(train)
    assert not clean.findings and clean.scored == len(sampled_rows(train)) < clean.rows
    ahead = shift_within_symbol(train.close, train.codes, 1) / train.close - 1
    matrix = np.c_[train.matrix, np.nan_to_num(ahead)].astype(np.float32)
    report = audit(replace(train, matrix=matrix, features=[*train.features, "innocent"]))
    assert report.named("fail") == ["innocent"] and report.findings[0].target == "next bar"
    assert f"a sample of {report.scored:,} rows" in repr(report)
    assert 0.05 < report.detects < 0.2 and f"{report.detects:.3f}" in repr(report)


def test_scores_of_a_sample_agree_with_those_of_all_rows(train, monkeypatch):
    every_row = score_columns(train).query("symbol == ''")["size"]
    monkeypatch.setattr(audit_module, "SCORED_ROWS", len(train) // 2)
    sample = score_columns(train).query("symbol == ''")["size"]
    assert np.abs(every_row.to_numpy() - sample.to_numpy()).max() < 0.05


def test_all_rows_are_scored_in_a_small_split(train):
    report = audit(train)
    assert report.scored is None and "sample" not in repr(report)


@pytest.fixture
def always_mapped(always_mapped):
    "The folder of the matrices that are kept, while every matrix is mapped from a file."
    return always_mapped / "matrices"


# model -> its config, and the largest difference of a probability if the rows are read in chunks
CHUNKED = dict(xgboost=(dict(n_rounds=3), 0.01), lightgbm=(dict(n_rounds=3), 0), logistic_regression=({}, 0))


@pytest.mark.parametrize("window", ["last", "flat", "summary"])
@pytest.mark.parametrize("model", CHUNKED)
def test_rows_in_chunks_give_the_same_predictions(request, train, model, window):
    ds = TimeSeriesDataset(train, 5, 3).subset(np.arange(1_500))
    config, tolerance = CHUNKED[model]

    def fitted(rows_at_once):
        fit = ModelRegistry.create(model, config | dict(window=window, sequence_length=3), 5, train.features)
        fit.rows_at_once = rows_at_once
        fit.fit(ds.X, ds.y, ds.X, ds.y, ds.metadata, ds.metadata)
        return fit, fit.predict(ds.X, ds.metadata).probabilities

    plain = fitted(10_000)[1]
    request.getfixturevalue("always_mapped")
    fit, chunked = fitted(400)
    rows = fit._fit_rows(ds.X)
    assert isinstance(rows, RowChunks) if fit.reads_chunks else matrix.is_mapped(rows)
    np.testing.assert_array_equal(rows[:], fit._flat(ds.X))
    np.testing.assert_allclose(chunked, plain, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", ["xgboost", "lightgbm"])
def test_weights_and_category_codes_are_read_in_chunks(always_mapped, train, model):
    "Rows of weight 0 have no influence, and codes stay categories."
    ds = TimeSeriesDataset(replace(train, codes=np.zeros(len(train), int), symbols=["A"]), 5).subset(np.arange(1_500))
    base = ds.X.base.copy()
    base[:, 0] = np.arange(len(base)) % 3 + 1
    X, weight = Windows(base, ds.X.ends, 1), (np.arange(1_500) % 2).astype(float)
    wrong = np.where(weight == 1, ds.y, -ds.y)

    def probabilities(y):
        config = dict(n_rounds=3, sequence_length=1, sample_weight="column", categorical=train.features[:1])
        fit = ModelRegistry.create(model, config, 5, train.features)
        fit.rows_at_once = 400
        metadata = ds.metadata.assign(sample_weight=weight)
        fit.fit(X, y, X, y, metadata, metadata)
        assert isinstance(fit._fit_rows(X), RowChunks) and fit.code_positions == [len(train.features) - 1]
        return fit.predict(X, ds.metadata).probabilities

    np.testing.assert_allclose(probabilities(ds.y), probabilities(wrong), atol=1e-6)


@pytest.fixture
def folder(train, tmp_path):
    "A folder of splits in parquet files, in the order of time."
    for name, rows in (("train", slice(0, 300)), ("val", slice(300, 400))):
        table = pd.DataFrame(train.matrix[rows, :4], columns=train.features[:4])
        table["datetime"] = pd.date_range("2024-01-01" if name == "train" else "2024-03-01", periods=100, freq="h")[
            np.arange(len(table)) // 3 % 100
        ]
        table["symbol"] = np.array(["A", "B", "C"])[np.arange(len(table)) % 3]
        table["label_h5"] = (np.arange(len(table)) % 3 - 1).astype(np.int8)
        table.to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def test_a_matrix_is_written_once_and_then_reused(folder, monkeypatch, request):
    plain = read_split(folder / "train.parquet")
    stored = request.getfixturevalue("always_mapped")
    first = read_split(folder / "train.parquet")
    monkeypatch.setattr(splits, "_fill_matrix", None)
    again = read_split(folder / "train.parquet")
    again.matrix[0] = 7  # stays in this object
    for split in (first, read_split(folder / "train.parquet")):
        assert matrix.is_mapped(split.matrix)
        np.testing.assert_array_equal(split.matrix, plain.matrix)
    assert len(list(stored.iterdir())) == 1


def test_other_columns_and_other_files_have_matrices_of_their_own(folder, always_mapped):
    whole = read_split(folder / "train.parquet")
    part = read_split(folder / "train.parquet", features=whole.features[::-1])
    read_split(folder / "val.parquet")
    np.testing.assert_array_equal(part.matrix, whole.matrix[:, ::-1])
    assert len(list(always_mapped.iterdir())) == 3


def test_changed_data_are_read_again_and_the_old_matrix_is_deleted(folder, always_mapped):
    read_split(folder / "val.parquet")
    before = read_split(folder / "train.parquet")
    old = set(always_mapped.iterdir())
    table = pd.read_parquet(folder / "train.parquet")
    table.loc[0, before.features[0]] = 123
    table.to_parquet(folder / "train.parquet")
    assert read_split(folder / "train.parquet").matrix[0, 0] == 123 != before.matrix[0, 0]
    assert len(old) == len(list(always_mapped.iterdir())) == 2 and len(old & set(always_mapped.iterdir())) == 1


def test_data_that_change_while_they_are_read_are_not_stored(folder, always_mapped, monkeypatch):
    fill = splits._fill_matrix

    def change(filled, *args):
        fill(filled, *args)
        table = pd.read_parquet(folder / "train.parquet")
        table.iloc[:5].to_parquet(folder / "train.parquet")

    monkeypatch.setattr(splits, "_fill_matrix", change)
    with pytest.raises(UnreadableFile, match="train.parquet: has changed while it was read; read it again"):
        read_split(folder / "train.parquet")
    assert list(always_mapped.iterdir()) == []


def test_an_interrupted_matrix_is_never_read(folder, always_mapped, monkeypatch):
    def interrupt(filled, *args):
        filled[:10] = 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(splits, "_fill_matrix", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read_split(folder / "train.parquet")
    assert list(always_mapped.iterdir()) == []
    whole = read_split(folder / "train.parquet").matrix.copy()
    (file,) = always_mapped.iterdir()
    for damage in (b"", file.read_bytes()[:-100], b"\x93NUMPY"):  # as a full disk or a copy may leave it
        file.write_bytes(damage)
        np.testing.assert_array_equal(read_split(folder / "train.parquet").matrix, whole)


def test_what_a_killed_process_leaves_is_not_read_and_is_deleted_later(always_mapped):
    killed = """
import os, signal
from modelfactory.data import matrix, splits

def fill(values):
    values[:] = 1
    values.flush()
    os.kill(os.getpid(), signal.SIGKILL)

matrix.stored_matrix((100, 3), ("source", "content", "columns"), fill)"""
    assert subprocess.run([sys.executable, "-c", killed], timeout=120).returncode == -signal.SIGKILL
    (left,) = always_mapped.iterdir()

    def fill(values):
        values[:] = 2

    assert (matrix.stored_matrix((100, 3), ("source", "content", "columns"), fill) == 2).all()
    assert left.exists()  # it may belong to a process that still writes
    os.utime(left, (0, 0))
    matrix.stored_matrix((100, 3), ("other", "content", "columns"), fill)
    assert not left.exists() and len(list(always_mapped.iterdir())) == 2


def test_a_matrix_that_is_filled_is_not_stored(folder, always_mapped):
    read_splits(folder, nan="median")
    assert not always_mapped.exists()


def test_labels_beyond_the_last_bar_end_as_those_of_a_loop(train):
    ds = TimeSeriesDataset(train, 5)
    ds.rows = np.arange(len(train))  # labels of the last bars as well
    spans = LabelSpans(ds)
    times = train.datetimes.as_unit("ns").asi8
    for code in range(len(train.symbols)):
        own = np.flatnonzero(train.codes == code)
        for row in own[-8:]:
            k = row + label_bars(train, 5)[row] - own[-1]
            end = times[own[-1]] + max_duration(times[own], k) if k > 0 else times[own[-1] + k]
            assert spans.end[row] == end
