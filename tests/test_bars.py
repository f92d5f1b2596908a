"Bars to splits on markets that are harder than any real one: halts, heavy tails, tiny and huge prices, no volume, missing bars."
import numpy as np
import pandas as pd
import pytest

from modelfactory.data.bars import UNDEFINED, WARMUP, bar_features, bars_to_splits, check_bars, peeking
from modelfactory.data.splits import read_splits

pytestmark = pytest.mark.no_cover  # thousands of small calls, which counting lines slows by half: the notebooks go through the same lines


def one_symbol(name, rng):
    n, volatility = rng.integers(700, 1200), 10.0 ** rng.uniform(-5, -1)
    returns = np.clip(rng.standard_t(2.5, n) * volatility, -0.7, 0.7)
    for start in rng.integers(0, n - 150, 4): returns[start:start + rng.integers(1, 150)] = 0
    close = 10.0 ** rng.uniform(-6, 5) * np.exp(returns.cumsum())
    open_, wick = np.r_[close[0], close[:-1]], rng.exponential(volatility, (2, n)) * (returns != 0)
    high, low = np.maximum(open_, close) * (1 + wick[0]), np.minimum(open_, close) / (1 + wick[1])
    volume = np.floor(rng.exponential(10.0 ** rng.uniform(-1, 12), n)) * (rng.random(n) > rng.choice([0, 0.5, 0.99]))
    bars = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=n, freq="15min"), symbol=name, open=open_, high=high, low=low, close=close, volume=volume))
    return bars[rng.random(n) < rng.choice([1, 0.9, 0.6])]


@pytest.fixture(params=range(6))
def bars(request):
    rng = np.random.default_rng(request.param)
    return check_bars(pd.concat([one_symbol(name, rng) for name in "BAC"[:rng.integers(1, 4)]]))


def test_features_are_finite_and_causal(bars):
    features = bar_features(bars).iloc[:, 2:]
    warm = (bars.groupby("symbol").cumcount() >= WARMUP).to_numpy()
    assert np.isfinite(features[warm]).all().all()
    assert peeking(bar_features, bars, bars.datetime.sample(2, random_state=0)) == []


def test_no_label_reaches_the_next_split(bars, tmp_path):
    "Against the bars themselves: the bar at which each label is decided lies before the next split begins."
    out = bars_to_splits(bars, tmp_path / "splits", embargo=pd.Timedelta("5h"))
    read_splits(out, splits=("train", "val", "test"))
    split = {s: pd.read_parquet(out / f"{s}_scaled.parquet") for s in ("train", "val", "test")}
    for early, late in [("train", "val"), ("val", "test")]:
        first = split[late].datetime.min()
        for symbol, rows in split[early].groupby("symbol"):
            times = bars[bars.symbol == symbol].datetime.to_numpy()
            for h in (5, 20):
                defined = rows[rows[f"label_h{h}"] != UNDEFINED]
                decided = times[np.searchsorted(times, defined.datetime.to_numpy()) + defined[f"bars_to_hit_h{h}"].to_numpy()]
                assert (decided + np.timedelta64(5, "h") <= first.to_datetime64()).all()
