"Bars to splits on extreme markets: halts, heavy tails, tiny and huge prices, no volume, missing bars."

import numpy as np
import pandas as pd
import pytest

from modelfactory.data.features import FEATURE_WARMUP, bar_features, find_lookahead
from modelfactory.data.readers import check_bars
from modelfactory.data.splits import MIN_BLOCKS, NO_LABEL, SplitsWarning, read_split, read_splits, split_blocks
from modelfactory.data.writer import bars_to_splits

# Line coverage slows these thousands of small calls by half; the notebooks cover the same lines.
pytestmark = pytest.mark.no_cover


def one_symbol(name, rng):
    "Bars of one symbol with halts, heavy tails and missing bars."
    n, volatility = rng.integers(700, 1200), 10.0 ** rng.uniform(-5, -1)
    returns = np.clip(rng.standard_t(2.5, n) * volatility, -0.7, 0.7)
    for start in rng.integers(0, n - 150, 4):
        returns[start : start + rng.integers(1, 150)] = 0
    close = 10.0 ** rng.uniform(-6, 5) * np.exp(returns.cumsum())
    open_, wick = np.r_[close[0], close[:-1]], rng.exponential(volatility, (2, n)) * (returns != 0)
    high, low = np.maximum(open_, close) * (1 + wick[0]), np.minimum(open_, close) / (1 + wick[1])
    volume = np.floor(rng.exponential(10.0 ** rng.uniform(-1, 12), n)) * (rng.random(n) > rng.choice([0, 0.5, 0.99]))
    bars = pd.DataFrame(
        dict(
            datetime=pd.date_range("2024", periods=n, freq="15min"),
            symbol=name,
            open=open_,
            high=high,
            low=low,
            close=close,
            volume=volume,
        )
    )
    return bars[rng.random(n) < rng.choice([1, 0.9, 0.6])]


@pytest.fixture(params=range(6))
def bars(request):
    rng = np.random.default_rng(request.param)
    return check_bars(pd.concat([one_symbol(name, rng) for name in "BAC"[: rng.integers(1, 4)]]))


def test_features_are_finite_and_causal(bars):
    all_features = bar_features(bars)
    features = all_features.iloc[:, 2:]
    settled = (bars.groupby("symbol").cumcount() >= FEATURE_WARMUP).to_numpy()
    assert np.isfinite(features[settled]).all().all()

    def compute(table):
        return bar_features(table) if table is not bars else all_features  # computed once

    assert find_lookahead(compute, bars, bars.datetime.sample(2, random_state=0)) == []


@pytest.mark.filterwarnings("ignore::modelfactory.data.splits.SplitsWarning")
def test_no_label_is_decided_in_the_next_split(bars, tmp_path):
    "The bar that decides a label is before the first bar of the next split, with the embargo between."
    out = bars_to_splits(bars, tmp_path / "splits", embargo=pd.Timedelta("5h"))
    read_splits(out, splits=("train", "val", "test"))
    split = {s: pd.read_parquet(out / f"{s}_scaled.parquet") for s in ("train", "val", "test")}
    for early, late in [("train", "val"), ("val", "test")]:
        first = split[late].datetime.min()
        for symbol, part in split[early].groupby("symbol"):
            times = bars[bars.symbol == symbol].datetime.to_numpy()
            for h in (5, 20):
                defined = part[part[f"label_h{h}"] != NO_LABEL]
                rows_of_labels = np.searchsorted(times, defined.datetime.to_numpy())
                decided = times[rows_of_labels + defined[f"bars_to_hit_h{h}"].to_numpy()]
                assert (decided + np.timedelta64(5, "h") <= first.to_datetime64()).all()


def walk(n, symbol="A", seed=0, step="1h", drift=0.0):
    "Bars of a random walk."
    rng = np.random.default_rng(seed)
    close = np.exp(rng.normal(drift * 1e-3, 1e-3, n).cumsum())
    open_ = np.r_[1.0, close[:-1]]
    wick = rng.exponential(3e-4, (2, n))
    return pd.DataFrame(
        dict(
            datetime=pd.date_range("2024", periods=n, freq=step),
            symbol=symbol,
            open=open_,
            high=np.maximum(open_, close) * (1 + wick[0]),
            low=np.minimum(open_, close) * (1 - wick[1]),
            close=close,
            volume=1.0,
        )
    )


def test_too_few_blocks_of_val_give_a_warning(tmp_path):
    "400 rows of val are 20 blocks at horizon 5 and 5 blocks at horizon 20."
    with pytest.warns(SplitsWarning) as caught:
        out = bars_to_splits(walk(200 + 2_667), tmp_path / "few")
    assert [str(w.message) for w in caught] == [
        f"label_h20: {split} holds 5 blocks of 80 bars, fewer than {MIN_BLOCKS}: "
        "too few rows to claim skill at this horizon"
        for split in ("val", "test")
    ]
    assert all(w.filename == __file__ for w in caught)
    report = read_splits(out, splits=("train", "val", "test")).report
    assert [w for w in report.warnings if "too few rows" in w] == [str(w.message) for w in caught]
    assert not [w for w in read_splits(out, splits=("train",)).report.warnings if "too few rows" in w]


def test_enough_blocks_give_no_warning(tmp_path, recwarn):
    bars_to_splits(walk(200 + 7_000), tmp_path / "enough")
    assert not [w for w in recwarn if w.category is SplitsWarning]


def test_block_length_is_weighted_by_rows_of_symbols():
    """A symbol with a bar a day beside a symbol with a bar an hour.

    Weighted by rows it doubles a block; by its own bars a block would be 24 times as long.
    """
    dense, sparse = walk(4_000).assign(label_h5=1, x=0.0), walk(4_000, "B").iloc[::24].assign(label_h5=1, x=0.0)
    alone, both = read_split(dense), read_split(pd.concat([dense, sparse]))
    assert split_blocks(alone, 5) == 200 and split_blocks(both, 5) > 90


@pytest.mark.slow
def test_report_states_the_accuracy_of_the_constant_call(tmp_path):
    "Barriers of 1.5 ATR down and 3 ATR up: always down. With a drift: always up."
    out = bars_to_splits(walk(8_000), tmp_path / "barriers", horizons=(20,), barriers={20: (3.0, 1.5)})
    splits = read_splits(out)
    share = {s.name: (s.labels[20] == -1).sum() / np.isin(s.labels[20], (-1, 1)).sum() for s in splits.values()}
    assert splits.report.labels.constant_call.tolist() == [f"down {share[s]:.2f}" for s in ("train", "val")]
    assert share["val"] > 0.6
    calls = [f"always down would be right {round(share[s], 2):.0%} of the time in {s}" for s in ("train", "val")]
    sentence = f"label_h20: {calls[0]}, {calls[1]}; compare directional accuracy with this share"
    assert sentence in splits.report.warnings and sentence in repr(splits.report)
    drift = read_splits(bars_to_splits(walk(8_000, drift=0.15), tmp_path / "drift", horizons=(20,))).report
    assert all(call.startswith("up") for call in drift.labels.constant_call)
