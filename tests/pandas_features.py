"The standard features as pandas computes them, one symbol after the other: the oracle of `data.features`."

from __future__ import annotations

from functools import cached_property, partial

import numpy as np
import pandas as pd

from modelfactory.data.features import true_range
from modelfactory.data.readers import OHLCV, symbol_spans


def _wilder_average(x, n):
    "Wilder's average of one symbol's values; NaN for the first n - 1 values."
    out = np.full(len(x), np.nan)
    if len(x) >= n:
        out[n - 1 :] = pd.Series(np.r_[np.mean(x[:n]), x[n:]]).ewm(alpha=1 / n, adjust=False).mean()
    return out


class _Bars:
    "One symbol's bars as pandas Series, plus the series that many features share."

    def __init__(self, bars):
        self.times = pd.DatetimeIndex(bars["datetime"])
        self.open, self.high, self.low, self.close, self.volume = (bars[c].reset_index(drop=True) for c in OHLCV)
        self.range, self.body, self.tr = self.high - self.low, self.close - self.open, pd.Series(true_range(bars))
        self.atr = self.average_range(14)
        self.ret, self.direction = np.log(self.close).diff(), np.sign(self.close.diff())

    def average_range(self, n):
        "Wilder's average of the true range, with a millionth of the close as the lower bound."
        return pd.Series(_wilder_average(self.tr.to_numpy(), n)).clip(lower=1e-6 * self.close)

    def in_atr(self, x):
        "A price difference in units of ATR."
        return x / self.atr

    def vol(self, n):
        "Standard deviation of the last `n` returns, with 1e-7 as the lower bound."
        return self.ret.rolling(n).std().clip(lower=1e-7)

    def position_in_range(self, n):
        "Position of the close between the extremes of the last `n` bars, in [-0.5, 0.5]."
        low = self.low.rolling(n).min()
        return _ratio_or_zero(self.close - low, self.high.rolling(n).max() - low) - 0.5

    macd = cached_property(lambda self: _ema(self.close, 12) - _ema(self.close, 26))
    day = cached_property(lambda self: pd.Series(self.times.normalize().asi8))


def _ratio_or_zero(numerator, denominator):
    "`numerator / denominator`, or 0 where the denominator is not positive."
    return (numerator / denominator).where(denominator > 0, 0.0)


def _ema(x, n):
    return x.ewm(span=n, adjust=False).mean()


def _rolling_corr(x, y, n):
    return x.rolling(n).corr(y).clip(-1, 1).fillna(0.0)


def _by_window(name, windows, feature):
    "Dictionary of one feature computed over windows of different lengths."
    return {name.format(n): partial(feature, n=n) for n in windows}


FEATURE_FUNCTIONS = dict(
    returns={
        **_by_window("ret_{}", (1, 2, 3, 5, 10, 20, 60), lambda b, n: b.in_atr(b.close.diff(n)) / np.sqrt(n)),
        **_by_window("ret_1_lag{}", (1, 2, 3), lambda b, n: b.in_atr(b.close.diff().shift(n))),
        "gap": lambda b: b.in_atr(b.open - b.close.shift()),
    }
)


def _directional(b, sign):
    "Wilder's directional indicator in [0, 1]; `sign` 1 measures rises, -1 measures falls."
    up, down = b.high.diff(), -b.low.diff()
    move = (up if sign > 0 else down).where((up > down) if sign > 0 else (down > up), 0.0).clip(lower=0).fillna(0.0)
    return b.in_atr(_wilder_average(move.to_numpy(), 14))


def _adx(b):
    up, down = _directional(b, 1), _directional(b, -1)
    return _ema(_ratio_or_zero((up - down).abs(), up + down).fillna(0.0), 27)


def _efficiency(b, n):
    return _ratio_or_zero(b.close.diff(n).abs(), b.close.diff().abs().rolling(n).sum())


FEATURE_FUNCTIONS["trend"] = {
    **_by_window("sma_gap_{}", (20, 50, 100), lambda b, n: b.in_atr(b.close - b.close.rolling(n).mean())),
    **_by_window("ema_gap_{}", (8, 21, 50), lambda b, n: b.in_atr(b.close - _ema(b.close, n))),
    **_by_window("sma_slope_{}", (20, 50), lambda b, n: b.in_atr(b.close.rolling(n).mean().diff(5))),
    "macd": lambda b: b.in_atr(b.macd),
    "macd_histogram": lambda b: b.in_atr(b.macd - _ema(b.macd, 9)),
    "di_plus": lambda b: _directional(b, 1),
    "di_minus": lambda b: _directional(b, -1),
    "adx": _adx,
    **_by_window("efficiency_{}", (20, 60), _efficiency),
}


def _rsi(b, n):
    move = b.close.diff().fillna(0.0)
    up, down = (pd.Series(_wilder_average(m.to_numpy(), n)) for m in (move.clip(lower=0), -move.clip(upper=0)))
    return _ratio_or_zero(up - down, up + down) / 2


def _run_length(b):
    "Number of bars in the current run; positive for rises, negative for falls."
    run = (b.direction != b.direction.shift()).cumsum()
    return b.direction.fillna(0.0) * (b.direction.groupby(run).cumcount() + 1)


def _true_strength(b):
    move, smooth = b.close.diff().fillna(0.0), lambda x: _ema(_ema(x, 25), 13)
    return _ratio_or_zero(smooth(move), smooth(move.abs()))


FEATURE_FUNCTIONS["momentum"] = {
    **_by_window("rsi_{}", (7, 14, 28), _rsi),
    "stochastic_14": lambda b: b.position_in_range(14),
    "stochastic_14_slow": lambda b: b.position_in_range(14).rolling(3).mean(),
    "true_strength": _true_strength,
    **_by_window("up_share_{}", (20, 60), lambda b, n: (b.direction > 0).rolling(n).mean() - 0.5),
    "run": _run_length,
    "acceleration_5": lambda b: b.in_atr(b.close.diff(5).diff(5)),
    **_by_window("drift_{}", (20, 60), lambda b, n: b.ret.rolling(n).mean() / b.vol(n) * np.sqrt(n)),
}


def _log_vol(variance, n):
    return np.log(variance.rolling(n).mean().clip(lower=1e-14)) / 2


def _parkinson(b):
    return np.log(b.high / b.low) ** 2 / (4 * np.log(2))


def _garman_klass(b):
    return np.log(b.high / b.low) ** 2 / 2 - (2 * np.log(2) - 1) * np.log(b.close / b.open) ** 2


def _down_share(b, n):
    "Share of negative returns in the sum of squared returns, minus 0.5."
    falls = (b.ret.clip(upper=0) ** 2).rolling(n).sum()
    return _ratio_or_zero(falls, (b.ret**2).rolling(n).sum()).clip(0, 1) - 0.5


FEATURE_FUNCTIONS["volatility"] = {
    "log_atr": lambda b: np.log(b.atr / b.close),
    "atr_ratio_7_28": lambda b: np.log(b.average_range(7) / b.average_range(28)),
    **_by_window("vol_{}", (5, 20, 60, 120), lambda b, n: np.log(b.vol(n))),
    **_by_window("vol_ratio_5_{}", (20, 120), lambda b, n: np.log(b.vol(5) / b.vol(n))),
    **_by_window("parkinson_{}", (20, 60), lambda b, n: _log_vol(_parkinson(b), n)),
    "garman_klass_20": lambda b: _log_vol(_garman_klass(b), 20),
    **_by_window("down_share_{}", (20, 60), _down_share),
    "range_variation_60": lambda b: _ratio_or_zero(b.tr.rolling(60).std(), b.tr.rolling(60).mean()),
}


def _upper_shadow(b):
    return b.high - np.maximum(b.open, b.close)


def _lower_shadow(b):
    return np.minimum(b.open, b.close) - b.low


def _inside_bar(b):
    return (b.high <= b.high.shift()) & (b.low >= b.low.shift())


def _outside_bar(b):
    return (b.high > b.high.shift()) & (b.low < b.low.shift())


def _close_in_bar(b):
    "Position of the close in the bar, in [-0.5, 0.5]."
    return _ratio_or_zero(b.close - b.low, b.range) - 0.5 * (b.range > 0)


def _shadow_balance(b):
    return _ratio_or_zero(_lower_shadow(b) - _upper_shadow(b), b.range)


FEATURE_FUNCTIONS["candles"] = {
    "body": lambda b: b.in_atr(b.body),
    "body_lag1": lambda b: b.in_atr(b.body.shift()),
    "upper_shadow": lambda b: b.in_atr(_upper_shadow(b)),
    "lower_shadow": lambda b: b.in_atr(_lower_shadow(b)),
    "true_range": lambda b: b.in_atr(b.tr),
    "body_share": lambda b: _ratio_or_zero(b.body, b.range),
    "close_place": _close_in_bar,
    "close_place_5": lambda b: _close_in_bar(b).rolling(5).mean(),
    "shadow_balance_10": lambda b: _shadow_balance(b).rolling(10).mean(),
    "inside_bar": _inside_bar,
    "outside_bar": _outside_bar,
    "engulfing": lambda b: np.sign(b.body) * ((b.body * b.body.shift() < 0) & (b.body.abs() > b.body.shift().abs())),
}


def _volume_sum(b, n):
    return b.volume.rolling(n).sum().where(b.volume.rolling(n).max() > 0, 0.0)


def _volume_ratio(b, n):
    return np.log1p(_ratio_or_zero(b.volume * n, _volume_sum(b, n)))


def _volume_flow(b, n, direction):
    return _ratio_or_zero((direction * b.volume).rolling(n).sum(), _volume_sum(b, n)).clip(-1, 1)


def _typical_price(b):
    return (b.high + b.low + b.close) / 3


def _vwap_gap(b, n):
    vwap = _ratio_or_zero((_typical_price(b) * b.volume).rolling(n).sum(), _volume_sum(b, n))
    return b.in_atr(b.close - vwap).where(vwap > 0, 0.0)


FEATURE_FUNCTIONS["volume"] = {
    **_by_window("volume_ratio_{}", (5, 20, 60), _volume_ratio),
    "volume_trend_5_20": lambda b: np.log1p(_ratio_or_zero(_volume_sum(b, 5) * 4, _volume_sum(b, 20))),
    **_by_window("volume_flow_{}", (5, 20, 60), lambda b, n: _volume_flow(b, n, b.direction)),
    "money_flow_14": lambda b: _volume_flow(b, 14, np.sign(_typical_price(b).diff())),
    **_by_window("vwap_gap_{}", (20, 60), _vwap_gap),
    "volume_move_corr_20": lambda b: _rolling_corr(b.volume, b.ret.abs(), 20),
    "volume_return_corr_20": lambda b: _rolling_corr(b.volume, b.ret, 20),
}


def _age_of_max(x, n):
    "Bars since the maximum of the last `n` values; NaN for the first n - 1 values."
    out = np.full(len(x), np.nan)
    if len(x) >= n:
        out[n - 1 :] = np.lib.stride_tricks.sliding_window_view(x.to_numpy()[::-1], n).argmax(1)[::-1]
    return pd.Series(out)


def _bollinger(b, n):
    width = b.close.rolling(n).std().clip(lower=1e-7 * b.close)
    return _ratio_or_zero(b.close - b.close.rolling(n).mean(), width)


def _breakout(b, n):
    return (b.close > b.high.rolling(n).max().shift()) * 1.0 - (b.close < b.low.rolling(n).min().shift())


def _position_in_day(b):
    "Position of the close between the extremes of the day so far, in [-0.5, 0.5]."
    low, high = b.low.groupby(b.day).cummin(), b.high.groupby(b.day).cummax()
    return _ratio_or_zero(b.close - low, high - low) - 0.5 * (high > low)


FEATURE_FUNCTIONS["channel"] = {
    **_by_window("donchian_{}", (20, 60, 120), lambda b, n: b.position_in_range(n)),
    **_by_window("high_gap_{}", (20, 60), lambda b, n: b.in_atr(b.high.rolling(n).max() - b.close)),
    **_by_window("low_gap_{}", (20, 60), lambda b, n: b.in_atr(b.close - b.low.rolling(n).min())),
    **_by_window("bollinger_{}", (20, 60), _bollinger),
    "bollinger_width_20": lambda b: b.in_atr(b.close.rolling(20).std()),
    **_by_window("aroon_{}", (25, 60), lambda b, n: (_age_of_max(-b.low, n) - _age_of_max(b.high, n)) / n),
    "breakout_20": partial(_breakout, n=20),
    "day_move": lambda b: b.in_atr(b.close - b.open.groupby(b.day).transform("first")),
    "day_place": _position_in_day,
}


def _sin_cos(share):
    "Sine and cosine of an angle that is given as a share of the full circle."
    return np.sin(2 * np.pi * share), np.cos(2 * np.pi * share)


def _share_of_day(b):
    return pd.Series((b.times.hour * 60 + b.times.minute) / 1440)


def _share_of_week(b):
    return (pd.Series(b.times.dayofweek) + _share_of_day(b)) / 7


def _log_minutes_since_last_bar(b):
    return np.log1p(pd.Series(b.times.asi8).diff() / 60e9)


FEATURE_FUNCTIONS["calendar"] = {
    "time_of_day_sin": lambda b: _sin_cos(_share_of_day(b))[0],
    "time_of_day_cos": lambda b: _sin_cos(_share_of_day(b))[1],
    "time_of_week_sin": lambda b: _sin_cos(_share_of_week(b))[0],
    "time_of_week_cos": lambda b: _sin_cos(_share_of_week(b))[1],
    "bar_of_day": lambda b: np.log1p(b.day.groupby(b.day).cumcount()),
    "log_pause": _log_minutes_since_last_bar,
}


def _rolling_rank(x, n):
    return x.rolling(n).rank(pct=True) - 0.5


def _variance_ratio(b, n):
    five, one = (b.ret.rolling(k).sum().rolling(n).std() for k in (5, 1))
    return _ratio_or_zero(five**2, 5 * one.clip(lower=1e-7) ** 2).clip(0, 5)


def _largest_move(b, n):
    return _ratio_or_zero(b.ret.abs().rolling(n).max(), b.ret.abs().rolling(n).sum()).clip(0, 1)


FEATURE_FUNCTIONS["statistics"] = {
    **_by_window("autocorr_{}", (20, 60), lambda b, n: _rolling_corr(b.ret, b.ret.shift(), n)),
    "autocorr5_60": lambda b: _rolling_corr(b.ret, b.ret.shift(5), 60),
    "abs_autocorr_60": lambda b: _rolling_corr(b.ret.abs(), b.ret.abs().shift(), 60),
    **_by_window("skew_{}", (20, 60), lambda b, n: (1e4 * b.ret).rolling(n).skew().fillna(0.0)),
    "kurtosis_60": lambda b: (1e4 * b.ret).rolling(60).kurt().fillna(0.0),
    "close_rank_60": lambda b: _rolling_rank(b.close, 60),
    "return_rank_60": lambda b: _rolling_rank(b.ret, 60),
    "range_rank_60": lambda b: _rolling_rank(b.tr, 60),
    "volume_rank_60": lambda b: _rolling_rank(b.volume, 60),
    "variance_ratio_5_60": partial(_variance_ratio, n=60),
    "turns_20": lambda b: (b.direction * b.direction.shift() < 0).rolling(20).mean(),
    "largest_move_20": partial(_largest_move, n=20),
}


def pandas_features(bars):
    "Matrix (rows, 111), float32, without a warm-up."
    return np.concatenate([_symbol_features(bars.iloc[lo:hi]).T for lo, hi in symbol_spans(bars)])


def _symbol_features(bars):
    "Matrix (features, rows) of the features of one symbol."
    b = _Bars(bars)
    functions = [feature for group in FEATURE_FUNCTIONS.values() for feature in group.values()]
    return np.stack([np.asarray(feature(b), np.float32) for feature in functions])
