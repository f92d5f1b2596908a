"""Windows equal the naive loop, value for value, on tables that nobody chose."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modelfactory.data import splits
from modelfactory.data.dataset import TimeSeriesDataset, Windows
from modelfactory.data.splits import SplitsError, read_split

pytestmark = (
    pytest.mark.no_cover
)  # thousands of small calls, which counting lines slows by half: the notebooks go through the same lines


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


UNDEFINED = dict(missing=np.nan, upstream=-99.0)


@st.composite
def tables(draw, long=False):
    "A frame in any row order: symbols of unequal length, irregular times that they may share, labels that may be undefined."
    sizes = draw(st.lists(st.integers(1, 260 if long else 30), min_size=1, max_size=4))
    F, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**32 - 1))
    undefined, order, kind = (
        draw(st.sampled_from([0, 0.2, 0.9])),
        draw(st.sampled_from(["shuffled", "by time", "by symbol", "reversed"])),
        draw(st.sampled_from(["float64", "float32", "Int8"])),
    )
    rng = np.random.default_rng(seed)
    names = rng.permutation(["ES", "AAA", "zz", "Ü 1"])[: len(sizes)]
    frame = pd.concat(
        [
            pd.DataFrame(
                dict(
                    datetime=pd.Timestamp("2024-01-01")
                    + pd.to_timedelta(np.sort(rng.choice(3 * n, n, replace=False)), "min"),
                    symbol=s,
                )
            )
            for n, s in zip(sizes, names)
        ],
        ignore_index=True,
    )
    label = rng.choice([-1.0, 0.0, 1.0], len(frame))
    label[rng.random(len(frame)) < undefined] = rng.choice(list(UNDEFINED.values()))
    frame["label_h3"] = pd.Series(label).astype(kind)
    for j in range(F):
        frame[f"f{j}"] = (
            rng.normal(size=len(frame)).astype(rng.choice(["float32", "float64"]))
            if j % 3
            else rng.integers(-9, 9, len(frame))
        )
    frame["close"], frame["sample_weight_h3"] = rng.normal(size=len(frame)), rng.random(len(frame))
    if order == "by time":
        return frame.sort_values("datetime", kind="stable", ignore_index=True)
    return frame.iloc[
        rng.permutation(len(frame)) if order == "shuffled" else slice(None, None, -1 if order == "reversed" else 1)
    ].reset_index(drop=True)


def naive(frame, seq_len, gap):
    "The contract, row by row: X, y and metadata of each sample."
    features, X, y, meta = [c for c in frame if c[0] == "f"], [], [], []
    for symbol in dict.fromkeys(frame.symbol):
        mine = frame[frame.symbol == symbol].sort_values("datetime")
        for i in range(len(mine)):
            label, start = mine.label_h3.iloc[i], i - gap - seq_len + 1
            if start < 0 or pd.isna(label) or label not in (-1, 0, 1):
                continue
            X.append(mine[features].iloc[start : i - gap + 1].to_numpy(np.float64).astype(np.float32))
            y.append(int(label))
            meta.append((mine.datetime.iloc[i], symbol, 3, mine.sample_weight_h3.iloc[i], mine.close.iloc[i]))
    return X, y, meta


def expected_count(frame, seq_len, gap):
    "Contract: sum over symbols of max(0, rows - seq_len - gap + 1), less the rows there that have no target."
    groups = [g.sort_values("datetime").label_h3 for _, g in frame.groupby("symbol")]
    return sum(
        max(0, len(g) - seq_len - gap + 1) - int((~g[seq_len + gap - 1 :].isin([-1, 0, 1])).sum()) for g in groups
    )


def same_as_naive(frame, source, seq_len, gap):
    X, y, meta = naive(frame, seq_len, gap)
    assert len(y) == expected_count(frame, seq_len, gap)
    split = read_split(source)
    if not y:
        with pytest.raises(SplitsError, match="no sample"):
            TimeSeriesDataset(split, 3, seq_len, gap)
        return
    ds = TimeSeriesDataset(split, 3, seq_len, gap)
    want = np.stack(X)[:, 0] if seq_len == 1 else np.stack(X)
    assert (
        ds.X.shape == want.shape == np.shape(ds.X)
        and len(ds) == len(ds.X) == len(y)
        and ds.X.dtype == want.dtype == np.float32
    )
    assert np.array_equal(np.asarray(ds.X), want) and np.array_equal(ds.y, y)
    assert (
        list(
            ds.metadata[["datetime", "symbol", "horizon", "sample_weight", "close"]].itertuples(index=False, name=None)
        )
        == meta
    )


@examples(250)
@given(tables(), st.integers(1, 12), st.integers(0, 1))
def test_small_tables(frame, seq_len, gap):
    same_as_naive(frame, frame, seq_len, gap)


@examples(40)
@given(tables(long=True), st.integers(1, 200), st.integers(0, 1))
def test_long_windows(frame, seq_len, gap):
    same_as_naive(frame, frame, seq_len, gap)


@examples(60)
@given(tables(), st.integers(1, 12), st.integers(0, 1), st.integers(1, 6), st.integers(1, 20))
def test_column_batches_and_row_groups_do_not_show(tmp_path_factory, frame, seq_len, gap, at_once, group):
    "Read from a file, in pieces that end anywhere."
    file = tmp_path_factory.mktemp("rows") / "train_scaled.parquet"
    frame.to_parquet(file, index=False, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "COLUMN_CHUNK", at_once)
        same_as_naive(frame, file, seq_len, gap)


@examples(100)
@given(tables(), st.integers(1, 12), st.integers(0, 1))
def test_the_order_of_rows_does_not_matter(frame, seq_len, gap):
    "But for the order of the symbols, which is that of their first appearance."
    assume(expected_count(frame, seq_len, gap))
    order = {s: i for i, s in enumerate(dict.fromkeys(frame.symbol))}
    tidy = frame.sort_values(["symbol", "datetime"], key=lambda c: c.map(order) if c.name == "symbol" else c)
    a, b = (TimeSeriesDataset(read_split(f), 3, seq_len, gap) for f in (frame, tidy))
    assert np.array_equal(a.X[:], b.X[:]) and np.array_equal(a.y, b.y) and a.metadata.equals(b.metadata)


# Indexing -----------------------------------------------------------------------------------------------------------------------


@st.composite
def windows(draw):
    rows, F, seq_len = draw(st.integers(1, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    assume(rows >= seq_len)
    ends = draw(st.lists(st.integers(seq_len - 1, rows - 1), max_size=12))
    return Windows(np.arange(rows * F, dtype=np.float32).reshape(rows, F), np.array(ends, np.int64), seq_len)


def slices(n):
    return st.slices(n) if n else st.just(slice(None))


@st.composite
def indices(draw, shape):
    "What numpy takes as an index into the first axis or the first few, and what it refuses."
    n = shape[0]
    whole = st.integers(-n - 2, n + 1)
    within = st.integers(-n, n - 1) if n else st.nothing()
    first = st.one_of(
        whole,
        whole.map(np.int32),
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


@examples(1500)
@given(st.data(), windows())
def test_indexing_is_numpys(data, w):
    i, whole = data.draw(indices(w.shape)), np.asarray(w)
    try:
        want = whole[i]
    except IndexError:
        with pytest.raises(IndexError):
            w[i]
        return
    got = w[i]
    assert np.shape(got) == want.shape and np.asarray(got).dtype == want.dtype and np.array_equal(got, want)


@examples(300)
@given(st.data(), windows())
def test_take_fills_the_buffer_it_is_given(data, w):
    idx = np.array(data.draw(st.lists(st.integers(-len(w), len(w) - 1), max_size=10)) if len(w) else [], int)
    pool = np.full((10, *w.shape[1:]), np.nan, np.float32)
    out = pool[: len(idx)]
    got = w.take(idx, out=out)
    assert got is out and np.array_equal(pool[: len(idx)], np.asarray(w)[idx]) and np.isnan(pool[len(idx) :]).all()
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
def test_take_refuses_a_buffer_it_cannot_fill(out):
    before = out.copy()
    with pytest.raises(ValueError, match="C-contiguous"):
        Windows(np.ones((9, 3)), np.arange(3, 9), 4).take(np.array([0, 1]), out=out)
    assert np.array_equal(out, before, equal_nan=True)


def test_a_subset_and_the_whole_share_one_matrix():
    w = Windows(np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(3, 20), 4)
    some = w.subset(np.array([5, 1, 1]))
    assert some.base is w.base and np.array_equal(some[:], w[[5, 1, 1]])
    with pytest.raises(ValueError):
        np.asarray(w, copy=False)
