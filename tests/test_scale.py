"Large splits: the leak audit scores a sample of rows, and tables of large models are mapped from disk."

from dataclasses import replace

import numpy as np
import pytest

from modelfactory.data import audit as audit_module
from modelfactory.data import matrix
from modelfactory.data.audit import _shifted, audit, sampled_rows, score_columns, shift_within_symbol
from modelfactory.data.bundled import resolve_data
from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.splits import read_splits
from modelfactory.models.registry import ModelRegistry


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


@pytest.mark.parametrize("window", ["last", "flat", "summary"])
@pytest.mark.parametrize("model", ["xgboost", "lightgbm"])
def test_a_mapped_table_gives_the_same_predictions(train, monkeypatch, tmp_path, model, window):
    ds = TimeSeriesDataset(train, 5, 3).subset(np.arange(1_500))

    def fitted(rows_at_once):
        fit = ModelRegistry.create(model, dict(n_rounds=3, window=window, sequence_length=3), 5, train.features)
        fit.rows_at_once = rows_at_once
        fit.fit(ds.X, ds.y, ds.X, ds.y, ds.metadata, ds.metadata)
        return fit, fit.predict(ds.X, ds.metadata).probabilities

    plain = fitted(10_000)[1]
    monkeypatch.setattr(matrix, "MIN_MAPPED_BYTES", 0)
    monkeypatch.setenv("MODELFACTORY_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("MODELFACTORY_MEMORY_SHARE", "0")
    model, chunked = fitted(400)
    assert matrix.is_mapped(model._fit_rows(ds.X))
    np.testing.assert_array_equal(plain, chunked)
