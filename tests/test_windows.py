"""Windows equal those of a naive loop, value by value, on random tables."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modelfactory.data import splits
from modelfactory.data.dataset import TimeSeriesDataset, Windows
from modelfactory.data.splits import SplitsError, read_split

# Line counting slows thousands of small calls by half; the notebooks run the same lines.
pytestmark = [pytest.mark.no_cover, pytest.mark.slow]


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


UNDEFINED = dict(missing=np.nan, upstream=-99.0)  # values of a missing label


@st.composite
def tables(draw, long=False):
    "A frame in any row order, with symbols of unequal length, irregular times, and labels that may be missing."
    sizes = draw(st.lists(st.integers(1, 260 if long else 30), min_size=1, max_size=4))
    F, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**32 - 1))
    undefined = draw(st.sampled_from([0, 0.2, 0.9]))
    order = draw(st.sampled_from(["shuffled", "by time", "by symbol", "reversed"]))
    kind = draw(st.sampled_from(["float64", "float32", "Int8"]))
    rng = np.random.default_rng(seed)
    names = rng.permutation(["ES", "AAA", "zz", "Ü 1"])[: len(sizes)]
    parts = []
    for n, symbol in zip(sizes, names, strict=True):
        minutes = np.sort(rng.choice(3 * n, n, replace=False))
        times = pd.Timestamp("2024-01-01") + pd.to_timedelta(minutes, "min")
        parts.append(pd.DataFrame(dict(datetime=times, symbol=symbol)))
    frame = pd.concat(parts, ignore_index=True)
    label = rng.choice([-1.0, 0.0, 1.0], len(frame))
    label[rng.random(len(frame)) < undefined] = rng.choice(list(UNDEFINED.values()))
    frame["label_h3"] = pd.Series(label).astype(kind)
    for j in range(F):
        if j % 3:
            frame[f"f{j}"] = rng.normal(size=len(frame)).astype(rng.choice(["float32", "float64"]))
        else:
            frame[f"f{j}"] = rng.integers(-9, 9, len(frame))
    frame["close"] = rng.normal(size=len(frame))
    frame["sample_weight_h3"] = rng.random(len(frame))
    if order == "by time":
        return frame.sort_values("datetime", kind="stable", ignore_index=True)
    if order == "shuffled":
        rows = rng.permutation(len(frame))
    else:
        rows = slice(None, None, -1 if order == "reversed" else 1)
    return frame.iloc[rows].reset_index(drop=True)


def naive(frame, seq_len, gap):
    "X, y and metadata of each sample, by a loop over rows."
    features, X, y, meta = [c for c in frame if c[0] == "f"], [], [], []
    for symbol in dict.fromkeys(frame.symbol):
        rows = frame[frame.symbol == symbol].sort_values("datetime")
        values = rows[features].to_numpy(np.float64).astype(np.float32)
        columns = rows.datetime, rows.label_h3, rows.sample_weight_h3, rows.close
        for i, (time, label, weight, close) in enumerate(zip(*columns, strict=True)):
            start = i - gap - seq_len + 1
            if start < 0 or pd.isna(label) or label not in (-1, 0, 1):
                continue
            X.append(values[start : i - gap + 1])
            y.append(int(label))
            meta.append((time, symbol, 3, weight, close))
    return X, y, meta


def expected_count(frame, seq_len, gap):
    "Sum over symbols of max(0, rows - seq_len - gap + 1), minus the rows among these without a label."
    groups = [g.sort_values("datetime").label_h3 for _, g in frame.groupby("symbol")]
    count = 0
    for labels in groups:
        without_label = ~labels[seq_len + gap - 1 :].isin([-1, 0, 1])
        count += max(0, len(labels) - seq_len - gap + 1) - int(without_label.sum())
    return count


def check_against_naive(frame, source, seq_len, gap):
    "The dataset of `source` has the samples of the naive loop over `frame`."
    X, y, meta = naive(frame, seq_len, gap)
    assert len(y) == expected_count(frame, seq_len, gap)
    split = read_split(source)
    if not y:
        with pytest.raises(SplitsError, match="no sample"):
            TimeSeriesDataset(split, 3, seq_len, gap)
        return
    ds = TimeSeriesDataset(split, 3, seq_len, gap)
    expected = np.stack(X)[:, 0] if seq_len == 1 else np.stack(X)
    assert ds.X.shape == expected.shape == np.shape(ds.X)
    assert len(ds) == len(ds.X) == len(y)
    assert ds.X.dtype == expected.dtype == np.float32
    assert np.array_equal(np.asarray(ds.X), expected) and np.array_equal(ds.y, y)
    columns = ["datetime", "symbol", "horizon", "sample_weight", "close"]
    assert list(ds.metadata[columns].itertuples(index=False, name=None)) == meta


@examples(160)
@given(tables(), st.integers(1, 12), st.integers(0, 1))
def test_small_tables(frame, seq_len, gap):
    check_against_naive(frame, frame, seq_len, gap)


@examples(40)
@given(tables(long=True), st.integers(1, 200), st.integers(0, 1))
def test_long_windows(frame, seq_len, gap):
    check_against_naive(frame, frame, seq_len, gap)


@examples(60)
@given(tables(), st.integers(1, 12), st.integers(0, 1), st.integers(1, 6), st.integers(1, 20))
def test_column_chunks_and_row_groups_do_not_change_the_samples(
    tmp_path_factory, frame, seq_len, gap, column_chunk, row_group_size
):
    "The file is read in chunks of any size."
    file = tmp_path_factory.mktemp("rows") / "train_scaled.parquet"
    frame.to_parquet(file, index=False, row_group_size=row_group_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "COLUMN_CHUNK", column_chunk)
        check_against_naive(frame, file, seq_len, gap)


@examples(100)
@given(tables(), st.integers(1, 12), st.integers(0, 1))
def test_the_order_of_rows_does_not_matter(frame, seq_len, gap):
    "Except for the order of the symbols, which is that of their first appearance."
    assume(expected_count(frame, seq_len, gap))
    order = {s: i for i, s in enumerate(dict.fromkeys(frame.symbol))}
    tidy = frame.sort_values(["symbol", "datetime"], key=lambda c: c.map(order) if c.name == "symbol" else c)
    a, b = (TimeSeriesDataset(read_split(f), 3, seq_len, gap) for f in (frame, tidy))
    assert np.array_equal(a.X[:], b.X[:]) and np.array_equal(a.y, b.y) and a.metadata.equals(b.metadata)


# Indexing -------------------------------------------------------------------------------------------------------------


@st.composite
def windows(draw):
    "Windows over a small matrix, which may be empty."
    rows, F, seq_len = draw(st.integers(1, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    assume(rows >= seq_len)
    ends = draw(st.lists(st.integers(seq_len - 1, rows - 1), max_size=12))
    return Windows(np.arange(rows * F, dtype=np.float32).reshape(rows, F), np.array(ends, np.int64), seq_len)


def slices(n):
    return st.slices(n) if n else st.just(slice(None))


@st.composite
def indices(draw, shape):
    "Indices into the first axis or several axes, valid and invalid ones."
    n = shape[0]
    integer = st.integers(-n - 2, n + 1)
    within = st.integers(-n, n - 1) if n else st.nothing()
    first = st.one_of(
        integer,
        integer.map(np.int32),
        slices(n),
        st.lists(within, max_size=8) if n else st.just([]),
        st.lists(within, max_size=8).map(lambda i: np.array(i, np.int16)) if n else st.just(np.array([], int)),
        st.lists(st.booleans(), min_size=n, max_size=n).map(lambda m: np.array(m, bool)),
        st.just(...),
        st.just(None),
        st.just(np.array([[0, -1]] if n else np.empty((0, 2)), int)),
    )
    if draw(st.booleans()):
        return draw(st.one_of(first, st.just(())))
    rest = [draw(st.one_of(st.integers(-m, m - 1), slices(m))) for m in shape[1:]]
    return tuple([draw(first), *rest[: draw(st.integers(0, len(rest)))]])


@examples(900)
@given(st.data(), windows())
def test_indexing_equals_that_of_an_array(data, w):
    i = data.draw(indices(w.shape))
    try:
        expected = np.asarray(w)[i]
    except IndexError:
        with pytest.raises(IndexError):
            w[i]
        return
    result = w[i]
    assert np.shape(result) == expected.shape and np.asarray(result).dtype == expected.dtype
    assert np.array_equal(result, expected)


@examples(200)
@given(st.data(), windows())
def test_take_fills_the_given_buffer(data, w):
    idx = np.array(data.draw(st.lists(st.integers(-len(w), len(w) - 1), max_size=10)) if len(w) else [], int)
    pool = np.full((10, *w.shape[1:]), np.nan, np.float32)
    out = pool[: len(idx)]
    filled = w.take(idx, out=out)
    assert filled is out and np.array_equal(pool[: len(idx)], np.asarray(w)[idx]) and np.isnan(pool[len(idx) :]).all()
    again = w.take(idx[::-1], out=out)
    assert again is out and np.array_equal(out, np.asarray(w)[idx[::-1]])


@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, 3, 4), np.float32),
        np.empty((2, 4, 3)),
        np.empty((2, 3, 4), np.float32).transpose(0, 2, 1),
        np.empty((4, 4, 3), np.float32)[::2],
    ],
    ids=["shape", "dtype", "transposed", "strided"],
)
def test_take_raises_an_error_on_a_buffer_of_another_layout(out):
    before = out.copy()
    with pytest.raises(ValueError, match="C-contiguous"):
        Windows(np.ones((9, 3)), np.arange(3, 9), 4).take(np.array([0, 1]), out=out)
    assert np.array_equal(out, before, equal_nan=True)


def test_a_subset_shares_the_matrix():
    w = Windows(np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(3, 20), 4)
    subset = w.subset(np.array([5, 1, 1]))
    assert subset.base is w.base and np.array_equal(subset[:], w[[5, 1, 1]])
    with pytest.raises(ValueError):
        np.asarray(w, copy=False)
