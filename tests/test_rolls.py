"""Over a roll of a contract nobody earns the change of price: positions are closed before it and opened after it.

The oracle loops over bars: at a roll the position is 0, and closing and opening cost a change each. Planted changes of
price at the rolls must then change no profit."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import small_splits

from modelfactory.configuration import ConfigError, TradingRules
from modelfactory.data.calendars import CalendarError, mark_rolls
from modelfactory.data.dataset import DatasetConfig, FoldConfig, load_datasets, read_prices
from modelfactory.data.labels import triple_barrier
from modelfactory.data.prices import BadPrices, check_split_prices
from modelfactory.data.readers import check_bars, read_eurusd
from modelfactory.data.splits import NO_LABEL, BadValue, read_split, read_splits
from modelfactory.evaluation.backtest import barrier_backtest, tranche_backtest
from modelfactory.evaluation.information import scored_bars
from modelfactory.evaluation.permutation import profit_by_day, shift_test
from modelfactory.models.base import PredictionOutput
from modelfactory.training.trainer import Trainer

pytestmark = pytest.mark.slow


def market(seed, jump=1.0, n=60, symbols="AB"):
    "Hourly closes, random rolls, and the same closes with prices multiplied at the rolls."
    rng, parts = np.random.default_rng(seed), []
    times = pd.date_range("2024-01-02", periods=n, freq="h")
    for symbol in symbols:
        rows = np.sort(rng.choice(n, int(0.8 * n), replace=False))
        close = 100 * np.exp(rng.normal(0, 0.01, len(rows)).cumsum())
        rolls = rng.random(len(rows)) < 0.06
        table = pd.DataFrame(dict(datetime=times[rows], symbol=symbol, close=close, roll_event=rolls))
        table["prediction"] = rng.integers(-1, 2, len(rows))
        parts.append(table.assign(close=close * jump ** rolls.cumsum()))
    return pd.concat(parts, ignore_index=True)


def naive(table, horizon, cost_bps, held=None):
    "Net profit by bar and profit by tranche, one bar and one tranche at a time."
    net, trades = {}, {}
    n_symbols = table.symbol.nunique()
    for symbol, rows in table.groupby("symbol"):
        rows, before = rows.sort_values("datetime").reset_index(drop=True), 0.0
        length = np.full(len(rows), horizon) if held is None else held[rows.index]
        for i, bar in rows.iterrows():
            opened = [k for k in range(max(0, i - horizon), i) if i - k <= min(horizon, length[k])]
            position = 0.0 if bar.roll_event else sum(rows.prediction[k] for k in opened) / horizon
            move = bar.close / rows.close[i - 1] - 1 if i else 0.0
            fee = abs(position - before) * cost_bps / 1e4
            net[bar.datetime] = net.get(bar.datetime, 0) + (position * move - fee) / n_symbols
            before = position
            for k in opened:
                earned = 0.0 if bar.roll_event else rows.prediction[k] * move
                key = symbol, rows.datetime[k]
                trades[key] = trades.get(key, 0.0) + earned
    return pd.Series(net).sort_index(), trades


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1, 4, 9]), st.sampled_from([0.5, 1.0, 1.3]))
def test_profit_equals_that_of_a_loop_which_closes_positions_over_rolls(seed, horizon, jump):
    table, rules = market(seed, jump), TradingRules(cost_bps=3.0)
    result = tranche_backtest(table, table, horizon, rules)
    net, trades = naive(table, horizon, 3.0)
    assert np.allclose(result.bars.net, net[result.bars.index], atol=1e-14)
    assert not net.drop(result.bars.index).any()
    for trade in result.trades.itertuples():
        assert np.isclose(trade.pnl, trades[trade.symbol, trade.datetime], atol=1e-14)
    profit, _ = profit_by_day(table, table, horizon, rules)
    assert np.allclose(profit(table.prediction.to_numpy(float)), result.daily.net)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([2, 7]))
def test_a_change_of_price_at_rolls_changes_no_profit(seed, horizon):
    "Of positions, barriers, benchmarks, shifted positions and information coefficients; unmarked, it changes them."
    rules = TradingRules(cost_bps=3.0)
    smooth, jump = market(seed), market(seed, 1.2)
    hits = np.random.default_rng(seed).integers(1, horizon + 1, len(smooth))
    for run in (
        lambda t: tranche_backtest(t, t, horizon, rules).daily,
        lambda t: barrier_backtest(t, t, hits, horizon, rules).daily,
        lambda t: profit_by_day(t, t, horizon, rules)[0](np.roll(t.prediction.to_numpy(float), 3)),
    ):
        assert np.allclose(run(smooth), run(jump), atol=1e-12)
    table = smooth[["datetime", "symbol"]].assign(p_down=0.3, p_flat=0.3, p_up=0.4 + smooth.prediction / 10)
    table["p_down"] = 0.7 - table.p_up
    rows = [scored_bars(table, prices, horizon) for prices in (smooth, jump)]
    assert np.allclose(*(r.forward_returns(horizon) for r in rows), equal_nan=True)
    if smooth.roll_event.any():
        unmarked = [t.drop(columns="roll_event") for t in (smooth, jump)]
        returns = [scored_bars(table, t, horizon).forward_returns(horizon) for t in unmarked]
        assert smooth.roll_event[:1].any() or not np.allclose(*returns, equal_nan=True)


def test_each_roll_costs_two_changes_of_the_position_it_closes():
    n = 60
    times = pd.date_range("2024-01-02", periods=n, freq="h")
    flat = pd.DataFrame(dict(datetime=times, symbol="ES", close=100.0, prediction=1))
    marked = flat.assign(roll_event=np.isin(np.arange(n), [20, 21, 40]))
    for horizon, rolls in [(1, 2), (5, 2)]:
        results = [tranche_backtest(t, t, horizon, TradingRules(cost_bps=1)).daily.sum() for t in (flat, marked)]
        for column in ("net", "hold"):
            assert np.isclose(results[0][column] - results[1][column], rolls * 2e-4)  # two bars in a row are one roll
    exposure = tranche_backtest(marked, marked, 5, TradingRules()).bars.exposure
    assert (exposure[marked.roll_event.to_numpy()] == 0).all() and (exposure.iloc[[19, 22, 39, 41]] == 1).all()


@pytest.mark.parametrize("roll_event", [0, np.nan, False])
def test_nothing_changes_without_a_roll(roll_event):
    table = market(1).drop(columns="roll_event")
    same = table.assign(roll_event=roll_event)
    pd.testing.assert_frame_equal(
        tranche_backtest(table, table, 5).daily, tranche_backtest(table, same, 5).daily, check_exact=True
    )


# Labels


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 12), st.sampled_from([-0.2, 0.1]))
def test_labels_are_undefined_if_and_only_if_their_bars_contain_a_roll(seed, horizon, gap):
    "Every other label, and the number of bars until it is decided, is the one without rolls and without the gaps."
    rng, eurusd = np.random.default_rng(seed), read_eurusd()
    parts = [eurusd[k : k + 150].assign(symbol=s) for k, s in ((int(rng.integers(6000)), "B"), (0, "A"))]
    bars = check_bars(pd.concat(parts, ignore_index=True))
    bars["open"] = np.where(bars.symbol == bars.symbol.shift(), bars.close.shift(), bars.open)
    bars["high"], bars["low"] = bars[["open", "high"]].max(axis=1), bars[["open", "low"]].min(axis=1)
    rolls = {s: [str(t) for t in part.datetime.sample(3, random_state=seed)] for s, part in bars.groupby("symbol")}
    marked = mark_rolls(pd.DatetimeIndex(bars.datetime), bars.symbol, rolls)
    shift = gap * pd.Series(marked).groupby(bars.symbol, sort=False).cumsum()
    jump = bars.assign(**{c: bars[c] + shift for c in ("open", "high", "low", "close")})
    plain, labels = triple_barrier(bars, horizon), triple_barrier(jump, horizon, rolls=rolls)
    symbol = bars.symbol.to_numpy()
    ahead = [slice(i + 1, i + horizon + 1) for i in range(len(bars))]
    crossing = np.array([(marked[part] & (symbol[part] == symbol[i])).any() for i, part in enumerate(ahead)])
    assert (labels[crossing] == NO_LABEL).all(axis=None)
    pd.testing.assert_frame_equal(labels[~crossing], plain[~crossing])


# From splits and settings to the backtest


def write(folder, **columns):
    for file in folder.glob("*.parquet"):
        table = pd.read_parquet(file)
        extra = {name: make(table) for name, make in columns.items()}
        table.assign(**extra).to_parquet(file, index=False)
    return folder


def marked_times(table):
    return table.datetime.isin(np.sort(table.datetime.unique())[::50][1:])


def test_rolls_are_read_from_columns_or_from_the_config(tmp_path):
    splits = small_splits(tmp_path / "splits")
    plain = read_splits(splits)
    times = tuple(
        str(t)
        for file in splits.glob("*.parquet")
        for t in pd.read_parquet(file).pipe(lambda t: t[marked_times(t)]).datetime
    )
    given_times = read_splits(splits, rolls=times)
    expected = given_times["val"].prices()
    assert expected.roll_event.sum() == 2 and "roll_event" not in plain["val"].prices()
    write(splits, roll_event=marked_times, roll_window=lambda t: 1)
    assert read_splits(splits)["val"].prices().equals(expected)
    write(splits, roll_event=lambda t: 0, roll_window=marked_times)
    assert read_splits(splits)["val"].prices().equals(expected)
    notes = [text for text in read_splits(splits).report.warnings if "rolls" in text]
    assert len(notes) == 2 and notes[1].startswith("val: 2 bars are rolls, first ")
    write(splits, roll_event=lambda t: 0, roll_window=lambda t: False)
    assert "roll_event" not in read_splits(splits)["val"].prices()
    frame = pd.read_parquet(next(splits.glob("val*"))).assign(roll_event="ESH4")
    with pytest.raises(BadValue, match="roll_event: found text"):
        read_split(frame, "val")
    with pytest.raises(CalendarError, match="expected times such as"):
        read_splits(splits, rolls=("soon",))
    with pytest.raises(ConfigError, match="expected times such as"):
        load_datasets(DatasetConfig(str(splits), rolls=("soon",)), 5)


@pytest.mark.parametrize("folds", [None, FoldConfig(n=2, fold=2)])
def test_a_price_jump_at_a_marked_roll_is_earned_by_no_run(tmp_path, folds):
    "From the folder of splits to the metrics, with and without folds, from closes in the splits and in a file."
    splits = small_splits(tmp_path / "splits")
    write(splits, roll_event=marked_times)

    def trained(**keys):
        data = dict(data=str(splits), folds=folds, **keys)
        trainer = Trainer(dict(model="logistic_regression", horizon=5, data=data), runs=tmp_path)
        trainer.train()
        trainer.predict()
        ds = trainer.datasets["val"]
        return trainer.backtest(), read_prices(ds, trainer.config.data.prices)[0]

    smooth, prices = trained()
    at = prices.roll_event.fillna(0) != 0
    assert at.any() and (smooth.bars.turnover > 0).any()
    jump = 1.5 ** at.groupby(prices.symbol, sort=False).cumsum()
    file = tmp_path / "prices.parquet"
    prices.assign(close=prices.close * jump).drop(columns="roll_event").to_parquet(file, index=False)
    from_file, _ = trained(prices=str(file))
    assert np.allclose(smooth.daily.to_numpy(), from_file.daily.to_numpy())
    prices.assign(close=prices.close * jump, roll_event=0.0).to_parquet(file, index=False)
    assert not np.allclose(smooth.daily.hold, trained(prices=str(file))[0].daily.hold)
    check_split_prices(read_splits(splits), str(file))
    prices.drop(columns="roll_event").assign(datetime=prices.datetime.dt.tz_localize("UTC")).to_parquet(file)
    with pytest.raises(BadPrices, match="time zone UTC"):
        trained(prices=str(file))


def test_the_shift_test_trades_around_rolls():
    table = market(3, 1.4, n=600)
    n, sign = len(table), np.where(table.prediction > 0, 1, -1)
    probabilities = np.select([sign[:, None] > 0], [np.array([0.2, 0.3, 0.5])], np.array([0.5, 0.3, 0.2]))
    keys = pd.DatetimeIndex(table.datetime), table.symbol.to_numpy()
    output = PredictionOutput(sign.astype(np.int8), probabilities.astype(np.float32), *keys, np.full(n, 5))
    y = np.random.default_rng(0).integers(-1, 2, n)
    smooth = market(3, 1.0, n=600)
    a, b = (shift_test(output, y, prices, 5, 19) for prices in (table, smooth))
    assert np.allclose(a.pnl, b.pnl, atol=1e-12) and np.isclose(a.observed["sharpe_net"], b.observed["sharpe_net"])
