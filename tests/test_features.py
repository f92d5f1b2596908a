"Features: the same values as in pandas, from a history of exactly the stated length, without later bars."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas_features import pandas_features
from test_bars import one_symbol

from modelfactory.data import features as module
from modelfactory.data.feature_groups import GROUPS, OPTIONAL_GROUPS, SymbolBars, bar_arrays, fractional_weights
from modelfactory.data.features import (
    FEATURE_WARMUP,
    STANDARD_BARS,
    bar_features,
    check_feature,
    feature,
    feature_table,
    find_lookahead,
    last_features,
    normalise_features,
    settled_rows,
)
from modelfactory.data.market import MARKET_PRESETS, simulate_market
from modelfactory.data.readers import BarsError, check_bars, read_eurusd
from modelfactory.data.rolling import (
    bars_since_max,
    window_corr,
    window_kurtosis,
    window_max,
    window_rank,
    window_skew,
    window_std,
    window_sum,
)

# Line coverage slows these thousands of small calls by half; the notebooks cover the same lines.
pytestmark = pytest.mark.no_cover

CHANGED = {  # other parameters than the defaults, in all groups
    "returns": {"windows": [4, 90], "lags": [7]},
    "trend": {"sma": [7], "ema": [80], "slope": [9], "macd": [5, 40, 30], "directional": [20, 9], "efficiency": [2]},
    "momentum": {"rsi": [1, 40], "stochastic": [5], "strength": [3, 9], "up_share": [4], "acceleration": [1, 12]},
    "volatility": {"atr_ratio": [30, 2], "vol": [2, 150], "vol_short": 9, "vol_ratio": [3], "parkinson": [1]},
    "candles": {"close_place": [1, 9], "shadow_balance": [2]},
    "volume": {"ratio": [2, 33], "trend": [30, 4], "flow": [1], "money_flow": [40], "vwap": [9], "corr": [2, 40]},
    "channel": {"donchian": [1, 31], "bollinger": [2], "bollinger_width": [40], "aroon": [2, 9], "breakout": [1]},
    "calendar": {},
    "statistics": {"autocorr": [2, 30], "skew": [3], "kurtosis": [4], "rank": [2, 130], "turns": [1]},
    "fractional": {"d": [0.3, 1.4], "threshold": 1e-3},
}


def random_choice(seed):
    "Other values for all parameters of all groups that are numbers of bars."
    rng, choice = np.random.default_rng(seed), {}
    for name in GROUPS:
        defaults = normalise_features({name: None})[name]
        lists = {key: value for key, value in defaults.items() if isinstance(value, list) and isinstance(value[0], int)}
        choice[name] = {
            key: rng.choice(np.arange(4, 70), len(value), replace=False).tolist() for key, value in lists.items()
        }
        choice[name] |= {key: int(rng.integers(4, 70)) for key, value in defaults.items() if isinstance(value, int)}
    return {name: parameters for name, parameters in choice.items() if name != "cross_section"}


PANEL = {"cross_section": {"windows": [1, 7], "beta": [15]}}


def market(n=1500, symbols=1, seed=0, step="15min"):
    "Bars with volatility that changes, heavy tails, short halts, pauses and hours without volume."
    rng = np.random.default_rng(seed)
    tables = []
    for s in range(symbols):
        volatility = 1e-3 * np.exp(0.4 * np.sin(np.arange(n) / 70) + 0.3 * rng.normal(size=n))
        returns = np.clip(rng.standard_t(4, n) * volatility, -0.05, 0.05) * (rng.random(n) > 0.03)
        close = 10.0 ** rng.uniform(-2, 3) * np.exp(returns.cumsum())
        open_ = np.r_[close[0], close[:-1]] * np.exp(rng.normal(0, 2e-4, n) * (rng.random(n) > 0.5))
        wick = rng.exponential(volatility, (2, n)) * (rng.random((2, n)) > 0.05)
        times = pd.date_range("2024", periods=2 * n, freq=step)[np.sort(rng.permutation(2 * n)[:n])]
        high, low = np.maximum(open_, close) * (1 + wick[0]), np.minimum(open_, close) / (1 + wick[1])
        volume = np.floor(rng.exponential(1e4, n)) * (rng.random(n) > 0.1)
        prices = dict(open=open_, high=high, low=low, close=close, volume=volume)
        tables.append(pd.DataFrame(dict(datetime=times, symbol=f"S{s}", **prices)))
    return check_bars(pd.concat(tables))


def panel(n=700, symbols=5, seed=1):
    "A market in which all symbols have bars at the same times."
    bars = market(n, symbols, seed)
    return check_bars(bars.assign(datetime=np.tile(bars.datetime[:n], symbols)))


def members(choice):
    return [f for name, group in module._group_instances(choice).items() for f in group.features()]


def matrix(frame):
    return frame.drop(columns=["datetime", "symbol"]).to_numpy()


def ulps(value, expected):
    return np.abs(value.astype(float) - expected) / np.spacing(np.abs(expected))


# Values


def standard_bars(name):
    if name == "planted":
        return simulate_market(replace(MARKET_PRESETS["planted"], rows=(2000, 300, 300))).bars
    zone = dict(eurusd="UTC", new_york="America/New_York")[name]
    return read_eurusd().assign(datetime=lambda b: b.datetime.dt.tz_localize("UTC").dt.tz_convert(zone))


@pytest.mark.parametrize("name", ["eurusd", "new_york", "planted"])
def test_values_equal_those_of_pandas(name):
    "Up to one unit in the last place of float32, in fewer than one value of 10,000; whatever the unit of the times."
    bars = check_bars(standard_bars(name))
    expected = pandas_features(bars)
    in_seconds = bars.assign(datetime=bars.datetime.dt.as_unit("s"))
    assert np.array_equal(matrix(bar_features(bars)), matrix(bar_features(in_seconds)), equal_nan=True)
    value, is_settled = matrix(bar_features(bars)), settled_rows(bars)
    assert np.isnan(value[~is_settled]).all() and is_settled.sum() == len(bars) - 200 * bars.symbol.nunique()
    value, expected = value[is_settled], expected[is_settled]
    assert (value != expected).mean() < 1e-4 and ulps(value, expected)[value != expected].max() <= 1


def naive(x, n, function):
    return np.array([function(x[i - n + 1 : i + 1].astype(np.longdouble)) for i in range(n - 1, len(x))], float)


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(4, 40),
    jump=st.floats(-9, 9),
    noise=st.floats(-9, 0),
    ticks=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_moments_do_not_depend_on_values_before_the_window(seed, n, jump, noise, ticks):
    "Nearly constant values after a jump of any size: the case in which running sums lose all digits."
    rng = np.random.default_rng(seed)
    x = np.r_[10.0**jump * rng.normal(size=50), 7 + 10.0**noise * rng.normal(size=(60))]
    y = rng.normal(size=110)
    if ticks:
        x, y = np.round(x, 1), np.round(y, 1)
    centred = lambda w: w - w.mean()  # noqa: E731
    std = naive(x, n, lambda w: w.std(ddof=1))
    np.testing.assert_allclose(window_std(x[None], n)[0, n - 1 :], std, rtol=1e-9, atol=1e-300)
    total = naive(x, n, np.sum)
    np.testing.assert_allclose(
        window_sum(x[None], n)[0, n - 1 :], total, atol=1e-13 * n * naive(x, n, lambda w: np.abs(w).max()).max()
    )
    for function, power in ((window_skew, 3), (window_kurtosis, 4)):
        g = naive(x, n, lambda w, k=power: np.mean(centred(w) ** k) / w.std() ** k if w.std() else 0)  # noqa: B023
        g = (
            g * np.sqrt(n * (n - 1)) / (n - 2)
            if power == 3
            else (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (g - 3) + 6)
        )
        g = np.where(std > 0, g, 0 if power == 3 else -3)
        np.testing.assert_allclose(function(x[None], n)[0, n - 1 :], g, rtol=1e-7, atol=1e-7)
    assert np.array_equal(window_max(x[None], n)[0, n - 1 :], naive(x, n, np.max))
    age = naive(x, n, lambda w: np.argmax(w[::-1]))
    assert np.array_equal(bars_since_max(x[None], n)[0, n - 1 :], age)
    rank = naive(x, n, lambda w: ((w < w[-1]).sum() + ((w == w[-1]).sum() + 1) / 2) / n)
    assert np.array_equal(window_rank(x[None], n)[0, n - 1 :], rank)
    pairs = [(x[i - n + 1 : i + 1], y[i - n + 1 : i + 1]) for i in range(n - 1, 110)]
    corr = [np.mean(centred(a) * centred(b)) / (a.std() * b.std()) if np.ptp(a) and np.ptp(b) else 0 for a, b in pairs]
    np.testing.assert_allclose(window_corr(x[None], y[None], n)[0, n - 1 :], corr, atol=1e-6)


def test_the_fractional_difference_is_a_convolution():
    bars, weights = market(400), [1.0]
    while abs(weights[-1]) >= 1e-3:
        weights.append(-weights[-1] * (0.4 - len(weights) + 1) / len(weights))
    weights = weights[:-1]
    assert np.allclose(weights, fractional_weights(0.4, 1e-3), rtol=1e-12)
    log_close = np.log(bars.close.to_numpy())
    naive = [sum(w * log_close[t - k] for k, w in enumerate(weights)) for t in range(200, 400)]
    value = bar_features(bars, {"fractional": {"threshold": 1e-3}}).iloc[200:]
    assert np.allclose(value["fracdiff_0.4"], naive, rtol=1e-6)


def test_the_cross_section_equals_pandas_by_timestamp():
    "Also where symbols lack bars, and where a timestamp has one symbol."
    bars = panel()
    bars = bars[np.random.default_rng(0).random(len(bars)) > 0.3].reset_index(drop=True)
    value = bar_features(bars, {"cross_section": {"windows": [3], "beta": [15]}})
    groups = bars.assign(x=np.log(bars.close)).groupby("symbol", sort=False).x
    r3, r1 = groups.diff(3), groups.diff()
    at = bars.assign(x=r3).groupby("datetime").x
    std = at.transform("std").fillna(0).clip(lower=1e-7)
    mean1 = bars.assign(x=r1).groupby("datetime").x.transform("mean")
    by_symbol = pd.DataFrame(dict(r=r1, m=mean1)).groupby(bars.symbol, sort=False)
    beta = np.concatenate([(t.r.rolling(15).cov(t.m) / t.m.rolling(15).var()).to_numpy() for _, t in by_symbol])
    vol = np.concatenate([t.r.rolling(15).std().to_numpy() for _, t in by_symbol])
    expected = dict(
        cs_rank_3=(at.rank() - 0.5) / at.transform("count") - 0.5,
        cs_zscore_3=(r3 - at.transform("mean")) / std,
        cs_dispersion_3=np.log(std),
        cs_beta_15=beta,
        cs_residual_15=(r1 - beta * mean1) / vol,
    )
    rows = settled_rows(bars)
    assert (at.transform("count")[rows] == 1).any() and list(value.columns[2:]) == list(expected)
    for name, series in expected.items():
        assert np.allclose(value[name][rows], np.asarray(series)[rows], rtol=1e-5, atol=1e-6), name
    with pytest.raises(BarsError, match="group cross_section compares symbols, found one symbol"):
        bar_features(market(300), PANEL)


# History, causality and independence


def values_from(bars, members, rows):
    "Values (features, windows) at the last bar of each row of `rows` (windows, bars)."
    b = SymbolBars(bar_arrays(bars), rows)
    return np.array([np.asarray(f.compute(b), np.float32)[:, -1] for f in members])


CHOICES = dict(standard=None, changed=CHANGED, random=random_choice(2), another=random_choice(9))


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_history_of_exactly_the_stated_length_is_enough(choice):
    "Each feature at 30 bars, from exactly `bars` bars, and for `day` from the first bar of the day on."
    bars, all_of_it = market(3500), members(choice)
    full, first = values_from_all(bars, all_of_it), max(f.bars for f in all_of_it) + 300
    scale, ends = full[:, first:].astype(float).std(1), np.linspace(first, 3499, 30).astype(int)
    day = bars.datetime.dt.date
    position = bars.groupby(day).cumcount().to_numpy()
    short = {}
    for length in {f.bars for f in all_of_it}:
        group = [i for i, f in enumerate(all_of_it) if f.bars == length and not f.day]
        rows = ends[:, None] - np.arange(length)[::-1]
        short |= dict(zip(group, values_from(bars, [all_of_it[i] for i in group], rows), strict=True))
    for i, f in enumerate(all_of_it):
        if f.day:
            rows = [np.arange(t - max(f.bars - 1, position[t]), t + 1)[None] for t in ends]
            short[i] = np.concatenate([values_from(bars, [f], r)[0] for r in rows])
    for i, f in enumerate(all_of_it):
        value = full[i, ends]
        error = np.abs(short[i].astype(float) - value)
        assert (error <= 1e-6 * scale[i] + np.spacing(np.abs(value))).all(), (f.name, f.bars, (error / scale[i]).max())


@pytest.mark.parametrize("seed", range(4))
def test_windows_forget_what_was_before_them(seed):
    "Nearly constant prices after large moves: from exactly the window, the same value as from all bars."
    bars = check_bars(one_symbol("A", np.random.default_rng(seed)))
    windows = [f for f in members(None) if f.bars == f.window and not f.day]
    full, ends = values_from_all(bars, windows), np.arange(200, len(bars), 7)
    assert len(windows) > 50
    for i, f in enumerate(windows):
        short = values_from(bars, [f], ends[:, None] - np.arange(f.bars)[::-1])[0].astype(float)
        tolerance = 1e-6 * full[i, 200:].astype(float).std() + np.spacing(np.abs(full[i, ends]))
        assert (np.abs(short - full[i, ends]) <= tolerance).all(), f.name


def values_from_all(bars, members):
    b = SymbolBars(bar_arrays(bars), np.arange(len(bars))[None])
    return np.array([np.asarray(f.compute(b), np.float32)[0] for f in members])


RARELY_CHANGED = ("run", "gap", "range_rank_60")  # by the oldest bar of their history


def test_a_history_that_is_too_short_is_noticed():
    "A quarter of the stated history of an average, and one bar less than a window, give other values."
    bars = market(3000)
    for f in members({"trend": None, "statistics": None, "returns": None, "momentum": None}):
        length = f.bars // 4 if f.bars > f.window else f.window - 1
        ends = np.linspace(1000, 2999, 30).astype(int)
        value, rows = values_from_all(bars, [f])[0], ends[:, None] - np.arange(max(length, 1))[::-1]
        error = np.abs(values_from(bars, [f], rows)[0].astype(float) - value[ends]) / value[1000:].astype(float).std()
        assert f.name in RARELY_CHANGED or not (error <= 1e-6).all(), f.name


def test_the_cross_section_needs_the_stated_history_of_all_symbols():
    bars, choice = panel(), {"cross_section": {"windows": [1, 7], "beta": [15, 60]}}
    full, times = bar_features(bars, choice), bars.datetime.unique()
    group = GROUPS["cross_section"](windows=(1, 7), beta=(15, 60))
    for f in group.features():
        for t in (300, 555):
            part = bars[bars.datetime.isin(times[t - f.bars + 1 : t + 1])].reset_index(drop=True)
            b = SymbolBars(bar_arrays(part) | group.columns(part), np.arange(len(part)).reshape(5, -1))
            expected = full[f.name].to_numpy().reshape(5, -1)
            error = np.abs(f.compute(b)[:, -1] - expected[:, t])
            assert (error <= 1e-6 * np.nanstd(expected) + np.spacing(np.abs(expected[:, t]))).all(), f.name


@pytest.mark.parametrize("choice", [CHANGED, random_choice(2), PANEL], ids=["changed", "random", "cross_section"])
def test_no_feature_looks_ahead(choice):
    bars = market(700, 3)
    assert find_lookahead(lambda b: bar_features(b, choice), bars, bars.datetime.sample(3, random_state=0)) == []


def test_a_symbol_does_not_depend_on_others():
    "Bit by bit, with symbols of different lengths in one batch; no feature is constant or not a number."
    bars = check_bars(pd.concat([market(n, seed=n).assign(symbol=str(n)) for n in (900, 250, 1000, 700, 150)]))
    choice = normalise_features() | CHANGED
    together = bar_features(bars, choice)
    alone = [bar_features(part.reset_index(drop=True), choice) for _, part in bars.groupby("symbol", sort=False)]
    assert np.array_equal(matrix(together), matrix(pd.concat(alone)), equal_nan=True)
    settled = matrix(together)[settled_rows(bars, choice)]
    assert np.isfinite(settled).all() and together.drop(columns=["datetime", "symbol"]).std().min() > 0


@pytest.mark.parametrize("choice", [*CHOICES.values(), PANEL], ids=[*CHOICES, "cross_section"])
def test_features_do_not_depend_on_the_currency_or_the_lot(choice):
    "Prices times 2^12 and volumes times 2^5: equal values, but for the unit `log price`."
    bars = panel()
    scaled = bars.assign(**{c: bars[c] * 2.0**12 for c in ("open", "high", "low", "close")}, volume=bars.volume * 32)
    a, b = (bar_features(table, choice) for table in (bars, scaled))
    for name, row in feature_table(choice).iterrows():
        error = (a[name] - b[name]).abs().max() / a[name].astype(float).std()
        assert (error > 1e-3) if row.unit == "log price" else (error < 1e-5), name


def test_days_that_begin_late_are_warm_up():
    "Minute bars from 10:00 on: features of the day are those of a longer history, or absent."
    bars = market(4000, step="1min")
    late = bars[300:].reset_index(drop=True)
    choice = {"channel": None, "calendar": None}
    whole, part = matrix(bar_features(bars, choice))[300:], matrix(bar_features(late, choice))
    first = settled_rows(late, choice).argmax()
    assert late.datetime[first].date() != late.datetime[first - 1].date() and first > FEATURE_WARMUP
    error = np.abs(part - whole)[first:][STANDARD_BARS:]
    assert np.isnan(part[:first]).all() and error.max() < 1e-5
    daily = late.assign(datetime=pd.date_range("1990", periods=len(late), freq="D"))
    assert settled_rows(daily).argmax() == FEATURE_WARMUP


# The newest bars


@given(
    end=st.integers(1300, 2000), n=st.integers(1, 20), more=st.integers(0, 50), choice=st.sampled_from([None, CHANGED])
)
@settings(max_examples=15, deadline=None)
def test_last_features_equal_those_of_all_bars(end, n, more, choice):
    "From any buffer of the stated length that holds the day; of two symbols, one with fewer bars."
    bars = BARS_OF_TWO
    upto = bars[bars.groupby("symbol").cumcount() < end].reset_index(drop=True)
    length = feature_table(choice).bars.max() + n - 1 + more + 100
    buffer = upto.groupby("symbol", sort=False).tail(length).reset_index(drop=True)
    value, expected = last_features(buffer, choice, n), bar_features(upto, choice).groupby("symbol", sort=False).tail(n)
    assert value.symbol.tolist() == expected.symbol.tolist() and value.datetime.tolist() == expected.datetime.tolist()
    scale = bar_features(bars, choice).iloc[:, 2:].astype(float).std().to_numpy()
    error = np.abs(matrix(value).astype(float) - matrix(expected))
    assert (error <= 1e-6 * scale + np.spacing(np.abs(matrix(expected)))).all()


BARS_OF_TWO = check_bars(pd.concat([market(2000), market(1200, seed=5).assign(symbol="SHORT")]))


def test_last_features_of_a_short_buffer_and_of_a_panel():
    bars = market(FEATURE_WARMUP + 1)
    assert np.isfinite(matrix(last_features(bars))).all() and np.isnan(matrix(last_features(bars[:-1]))).all()
    with pytest.raises(BarsError, match="n=0"):
        last_features(bars, n=0)
    minutes = market(4000, step="1min")
    minutes = minutes[: minutes.groupby(minutes.datetime.dt.date).cumcount().argmax()]  # ends a long day
    expected = bar_features(minutes).tail(1)
    assert np.allclose(matrix(last_features(minutes)), matrix(expected), rtol=1e-5, atol=1e-6)
    bars = panel()
    expected = bar_features(bars, PANEL).groupby("symbol", sort=False).tail(2)
    assert np.allclose(matrix(last_features(bars, PANEL, 2)), matrix(expected), rtol=1e-6, atol=1e-6)


# Choices


def test_a_choice_computes_its_groups_only_and_survives_json():
    bars = market(900)
    recipe = json.loads(json.dumps(normalise_features(CHANGED)))
    assert recipe["volatility"]["vol"] == [2, 150] and recipe["volatility"]["garman_klass"] == [20]
    a, b = bar_features(bars, CHANGED), bar_features(bars, recipe)
    pd.testing.assert_frame_equal(a, b)
    assert a.columns.tolist()[2:] == feature_table(recipe).index.tolist()
    standard = {name: None for name in GROUPS if name not in OPTIONAL_GROUPS}
    pd.testing.assert_frame_equal(bar_features(bars), bar_features(bars, standard))


def test_long_parameters_extend_the_warm_up():
    bars = market(2500)
    for choice, first in [
        ({"returns": {"windows": [700]}}, 700),
        ({"fractional": {"d": [0.4], "threshold": 1e-5}}, len(fractional_weights(0.4, 1e-5)) - 1),
        ({"trend": {"ema": [400]}}, -(-200 * feature_table({"trend": {"ema": [400]}}).bars.max() // STANDARD_BARS)),
    ]:
        assert first > FEATURE_WARMUP and settled_rows(bars, choice).argmax() == first
        assert np.isfinite(matrix(bar_features(bars, choice))[first:]).all()


@pytest.mark.parametrize(
    "choice, message",
    [
        ({}, "features: found {}, expected groups and their parameters"),
        (["returns"], "features: found ['returns'], expected groups"),
        ({"retruns": None}, "features: unknown group 'retruns', did you mean 'returns'?"),
        ({"returns": {"window": [1]}}, "features: returns: unknown key 'window', did you mean 'windows'?"),
        ({"returns": {"windows": [0]}}, "features: returns: windows.0 = 0: input should be greater than or equal to 1"),
        ({"returns": {"windows": 5}}, "features: returns: windows = 5: input should be a valid tuple"),
        ({"returns": [5]}, "features: returns: found list, expected key: value pairs"),
        ({"volatility": {"vol": [1]}}, "features: volatility: vol.0 = 1: input should be greater than or equal to 2"),
        ({"trend": {"macd": [12, 26]}}, "features: trend: macd.2 is missing"),
        ({"returns": {"windows": [5, 5]}}, "features: returns: ret_5 is computed twice; remove or rename one"),
        (
            {"fractional": {"threshold": 1e-9}},
            "features: fractional: d=0.4 with threshold=1e-09 needs more than 10,000",
        ),
    ],
)
def test_a_wrong_choice_is_refused(choice, message):
    with pytest.raises(BarsError) as error:
        bar_features(market(300), choice)
    assert message in str(error.value)


# The user's own


@pytest.fixture
def own(monkeypatch):
    "Forgets the registered functions after the test."
    monkeypatch.setattr(module, "USER_GROUPS", {})
    monkeypatch.setattr(module, "_PROVEN", set())
    return module.USER_GROUPS


def test_a_function_of_the_user_is_computed_by_symbol(own):
    @feature("gap_to_mean", bars=lambda n: n, names=["over", "under"], formula="close / mean - 1", unit="ratio")
    def gap_to_mean(bars, n=30):
        gap = bars.close / bars.close.rolling(n).mean() - 1
        return pd.DataFrame(dict(over=gap.clip(lower=0), under=gap.clip(upper=0)))

    bars, choice = market(600, 2), {"returns": None, "gap_to_mean": {"n": 40}}
    value = bar_features(bars, choice)
    gap = bars.groupby("symbol", sort=False).close.transform(lambda c: c / c.rolling(40).mean() - 1)
    rows = settled_rows(bars, choice)
    assert np.allclose((value.over + value.under)[rows], gap[rows], atol=1e-6)
    assert feature_table(choice).loc["under"].tolist() == ["gap_to_mean", "close / mean - 1", "ratio", 40, False, False]
    assert np.allclose(
        matrix(last_features(bars, choice)), matrix(value.groupby("symbol", sort=False).tail(1)), atol=1e-6
    )
    check_feature("gap_to_mean", bars, n=50)


def test_a_function_that_looks_ahead_is_refused_with_the_first_changed_time(own):
    "A value two bars before the cut-off changes; the constant mean changes from the first bar on."

    @feature("early", bars=1)
    def early(bars):
        return bars.close.shift(-2).fillna(0.0)

    @feature("whole", bars=1)
    def whole(bars):
        return bars.close / bars.close.mean()

    bars = market(500)
    cut = bars.datetime[124]  # the first of three cut-off times
    with pytest.raises(BarsError, match=f"early uses later bars: its value at {bars.datetime[123]} .* after {cut}"):
        bar_features(bars, {"early": None})
    with pytest.raises(BarsError, match=f"whole uses later bars: its value at {bars.datetime[0]}"):
        check_feature("whole", bars)


def test_a_function_that_needs_more_bars_than_stated_is_refused(own):
    @feature("slow", bars=20)
    def slow(bars):
        return bars.close / bars.close.ewm(span=30).mean()

    @feature("of_day", bars=1, day=True)
    def of_day(bars):
        return bars.close / bars.groupby(bars.datetime.dt.date).open.transform("first")

    @feature("short", bars=20)
    def short(bars):
        return bars.close.rolling(30).mean() / bars.close

    @feature("none", bars=lambda n: n)
    def none(bars, n=0):
        return bars.close

    bars = market(500)
    with pytest.raises(BarsError, match="short needs more than 20 bars: at .* it is nan from 20 bars"):
        bar_features(bars, {"short": None})
    with pytest.raises(BarsError, match="none: bars=0, expected a whole number of at least 1"):
        bar_features(bars, {"none": None})
    with pytest.raises(BarsError, match="slow needs more than 20 bars: at .* from 20 bars and .*; raise `bars`"):
        bar_features(bars, {"slow": None})
    bar_features(bars, {"of_day": None})


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda bars: 1.0, "found float, expected 300 rows of bad"),
        (lambda bars: bars[["open"]], "found 300 rows of open, expected 300 rows of bad"),
        (lambda bars: bars.close[5:], "found 295 rows of bad, expected 300 rows of bad"),
        (lambda bars: bars.close.mask(bars.index == 250), "bad is nan at .*, expected a finite number after 1 bars"),
    ],
)
def test_values_that_do_not_fit_are_refused(own, function, message):
    feature("bad", bars=1)(function)
    with pytest.raises(BarsError, match=message):
        bar_features(market(300), {"bad": None})


def test_names_that_are_taken_or_never_features_are_refused(own):
    feature("mine_1", bars=1)(lambda bars: bars.close)

    def other(bars):
        return bars.close

    with pytest.raises(BarsError, match="'mine_1': the name of the group is taken"):
        feature("mine_1", bars=1)(other)
    with pytest.raises(BarsError, match="'returns': the name of the group is taken"):
        feature("returns", bars=1)(other)
    with pytest.raises(BarsError, match="a column 'label_h5' is never a feature"):
        feature("labels", bars=1, names=["label_h5"])(other)
    with pytest.raises(BarsError, match="parameter n: expected .* a default that a file can hold"):
        feature("open_ended", bars=1)(lambda bars, n: bars.close)
    feature("again", bars=1, names=["gap"])(other)
    with pytest.raises(BarsError, match="again: found list, expected key: value pairs"):
        normalise_features({"again": [1]})
    with pytest.raises(BarsError, match="again: unknown key 'n', valid: none"):
        normalise_features({"again": {"n": 1}})
    with pytest.raises(BarsError, match="again: gap is computed twice"):
        bar_features(market(300), {"returns": None, "again": None})


PLUGIN = """
from modelfactory.data.features import feature

@feature("plugged", bars=1)
def plugged(bars, scale=1.0):
    return bars.close / bars.open * scale
"""


def test_a_plugin_adds_a_feature_and_a_change_of_its_source_is_refused(own, tmp_path, monkeypatch):
    "By the setting `plugins`; a plugin that fails is named when its group is not there."
    for name, text in dict(features_a=PLUGIN, features_b=PLUGIN.replace("* scale", "+ scale"), broken="1 / 0").items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("MODELFACTORY_PLUGINS", f"{tmp_path / 'features_a.py'}")
    bars = market(300)
    recipe = json.loads(json.dumps(normalise_features({"plugged": {"scale": 2}})))
    expected = (2 * bars.close / bars.open).to_numpy()[200:]
    assert np.allclose(bar_features(bars, recipe).plugged[200:], expected)
    own.clear()
    monkeypatch.setenv("MODELFACTORY_PLUGINS", f"{tmp_path / 'features_b.py'}")
    with pytest.raises(BarsError, match="plugged: the function has changed: found source .*, expected .*; restore"):
        bar_features(bars, recipe)
    own.clear()
    monkeypatch.setenv("MODELFACTORY_PLUGINS", f"{tmp_path / 'broken.py'}")
    with pytest.raises(
        BarsError, match="unknown group 'plugged', .*; plugin broken.py cannot be loaded: ZeroDivisionError"
    ):
        bar_features(bars, recipe)
