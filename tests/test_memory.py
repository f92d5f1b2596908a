"""Feature matrices in memory and in mapped files give the same results; work is proportional to the rows in windows."""

import os
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import small_splits

from modelfactory.configuration import ConfigError
from modelfactory.data import matrix
from modelfactory.data.dataset import DatasetConfig, Windows, load_datasets
from modelfactory.models import batches
from modelfactory.models.batches import Batches, feature_mean_std, has_nan, standardise_windows, used_rows
from modelfactory.models.conformance import ConformanceError, planted_task, single_window_cost
from modelfactory.models.registry import ModelRegistry


@st.composite
def some_windows(draw):
    "Windows in any order, with repeats, over a matrix with more rows than they contain."
    T, n, seed = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    base = rng.normal(3, 2, (40, draw(st.integers(1, 4)))).astype(np.float32)
    return Windows(base, rng.integers(T - 1, 40, n), T)


@given(some_windows(), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_rows_statistics_and_values_equal_those_of_a_naive_loop(windows, chunk):
    T, base = windows.seq_len, windows.base
    rows = sorted({int(end) - t for end in windows.ends for t in range(T)})
    assert used_rows(windows).tolist() == rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "CHUNK_VALUES", chunk)
        mean, std = feature_mean_std(windows)
        part = standardise_windows(windows, mean, std)
    values = base[rows].astype(np.float64)
    constant = values.std(0) <= 1e-7 * abs(values.mean(0))
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, np.where(constant, 1, values.std(0)), rtol=1e-6)
    assert len(part.base) == len(rows)
    assert np.array_equal(part[:], np.clip((windows[:] - mean) / std, -10, 10))


@given(some_windows(), st.integers(0, 39))
@settings(max_examples=40, deadline=None)
def test_nan_is_found_in_windows_only(windows, row):
    windows.base[row] = np.nan
    assert has_nan(windows) == np.isnan(windows[:]).any() == (row in used_rows(windows))


def trained(data, model, config):
    "Datasets, base matrix that the fit used, and predictions of a model that is trained on them."
    seq_len = config.get("sequence_length", 1)
    datasets, _ = load_datasets(DatasetConfig(str(data)), 5, seq_len)
    train, val = datasets["train"], datasets["val"]
    model = ModelRegistry.create(model, config, 5, train.feature_columns)
    history = model.fit(train.X, train.y, val.X, val.y, train.metadata, val.metadata)
    return datasets, history, model.predict(val.X, val.metadata).probabilities


@pytest.mark.parametrize(
    "model, config",
    [("gru", dict(sequence_length=12, hidden_size=8, n_layers=1, max_epochs=2)), ("xgboost", dict(n_rounds=5))],
)
def test_results_of_mapped_matrices_are_the_same_bit_for_bit(request, tmp_path, model, config):
    data = small_splits(tmp_path / "splits")
    plain, history, p = trained(data, model, config)
    scratch = request.getfixturevalue("always_mapped")
    mapped, history_mapped, p_mapped = trained(data, model, config)
    for name in ("train", "val"):
        assert not matrix.is_mapped(plain[name].X.base) and matrix.is_mapped(mapped[name].X.base)
        assert np.array_equal(plain[name].X.base, mapped[name].X.base)
    assert history == history_mapped and np.array_equal(p, p_mapped)
    assert [path.name for path in scratch.iterdir()] == ["matrices"]


def test_windows_over_an_array_file_are_read_in_place(tmp_path):
    base = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "base.npy", base)
    stored = Windows(np.load(tmp_path / "base.npy", mmap_mode="r"), np.arange(4, 50), 5)
    whole = Windows(base, stored.ends, 5)
    assert matrix.is_mapped(stored.base) and np.array_equal(stored[:], whole[:])
    for a, b in zip(feature_mean_std(stored), feature_mean_std(whole), strict=True):
        assert np.array_equal(a, b)


def test_the_settings_decide_when_a_matrix_is_mapped(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "MIN_MAPPED_BYTES", 0)
    monkeypatch.setattr(matrix, "memory_bytes", lambda: 4000)
    monkeypatch.setenv("MODELFACTORY_SCRATCH", str(tmp_path))
    for share, n_mapped in (("0.5", 500), ("0", 0), ("1", 10**9)):
        monkeypatch.setenv("MODELFACTORY_MEMORY_SHARE", share)
        assert [matrix.is_mapped(matrix.new_matrix((n, 1))) for n in (500, 501)] == [500 > n_mapped, 501 > n_mapped]


def test_the_limit_of_a_container_counts_as_its_memory(monkeypatch, tmp_path):
    (tmp_path / "limit").write_text("12345\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(matrix, "CGROUP_LIMITS", [str(tmp_path / name) for name in ("absent", "none")])
    machine = matrix.memory_bytes()
    monkeypatch.setattr(matrix, "CGROUP_LIMITS", [str(tmp_path / name) for name in ("none", "limit")])
    assert matrix.memory_bytes() == 12345 < machine


def test_a_full_disk_is_reported_before_anything_is_written(always_mapped, monkeypatch):
    def no_space(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(ConfigError, match="No space left.*scratch="):
        matrix.new_matrix((1000, 10))
    assert list(always_mapped.iterdir()) == []


def peak(f, *args):
    "Peak of the memory that a call allocates, in bytes; mapped files are not counted."
    tracemalloc.start()
    try:
        f(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_statistics_and_of_a_mapped_fit_does_not_grow_with_the_matrix(always_mapped):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((40_000, 100), np.float32)  # 16 MB
    windows, one = Windows(base, np.arange(9, 40_000), 10), Windows(base, [500], 10)
    mean, std = np.zeros(100, np.float32), np.ones(100, np.float32)
    standardise_windows(one, mean, std)  # imports
    assert peak(feature_mean_std, windows) < 0.4 * base.nbytes  # 3.0 where rows are copied and squared at once
    assert peak(standardise_windows, windows, mean, std) < 0.2 * base.nbytes
    assert peak(standardise_windows, one, mean, std) < 0.1 * base.nbytes  # 1 MB is read of the settings


def test_a_matrix_that_does_not_fit_on_the_gpu_is_sent_in_batches(monkeypatch):
    windows = Windows(np.arange(120, dtype=np.float32).reshape(40, 3), np.arange(4, 40), 5)
    idx, sent = [7, 0, 7, 35], []

    def late_upload(array, device):
        "As on a GPU, the copy is made when the result is used, not when it is requested."
        sent.append((array, array.clone()))
        return array

    plain_empty = torch.empty
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (windows.base.nbytes, 10**9))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False: plain_empty(*args))
    monkeypatch.setattr(batches, "upload", late_upload)
    streamed = Batches(windows, "cuda:0", 4)
    assert not streamed.is_on_device and not hasattr(streamed, "base") and sent == []
    assert torch.equal(streamed.take(idx), torch.from_numpy(windows[idx]))
    streamed.take([1, 2, 3, 4])
    assert all(torch.equal(*pair) for pair in sent), "a buffer was filled again before its copy ended"


def test_copies_to_a_gpu_are_pinned_and_do_not_wait(monkeypatch):
    calls, copied = [], torch.zeros(2)

    def to(self, device, non_blocking=False):
        calls.append((device, non_blocking))
        return copied

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    assert batches.upload(np.arange(3), "cuda") is copied and calls == ["pinned", ("cuda", True)]


def test_free_gpu_memory_decides_where_the_matrix_lies(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(mem_get_info=lambda device: (1000, 8000)))
    fits = [batches.fits_device(n, device) for n, device in ((500, "cuda"), (501, "cuda:1"), (10**12, "cpu:0"))]
    assert fits == [True, False, True]


def test_the_conformance_suite_counts_every_read_of_the_matrix():
    task = planted_task(seq_len=4)

    def check(read):
        probabilities = lambda X=None: read(task.X_val if X is None else X)  # noqa: E731
        single_window_cost(SimpleNamespace(seq_len=4, task=task, probabilities=probabilities))

    check(lambda X: X[:][:, -1])
    check(lambda X: X.base[X.ends])
    for read in (
        lambda X: (X.base - 0)[X.ends],
        lambda X: X[:][:, -1] + 0 * X.base.sum(),
        lambda X: np.clip(X.base, -9, 9)[X.ends],
        lambda X: sum(X.base[i : i + 50].mean() for i in range(0, len(X.base), 50)) * 0 + X[:][:, -1],
    ):
        with pytest.raises(ConformanceError, match="a window of 4 rows reads 10,00. rows"):
            check(read)
