"Backtests equal a loop over bars; benchmarks, labels without prices, and tables of slices."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_permutation import market, rows_of

from modelfactory.configuration import TradingRules
from modelfactory.evaluation.backtest import (
    GAP_0_NOTE,
    NO_PRICES_NOTE,
    barrier_backtest,
    label_backtest,
    trading_cost,
    tranche_backtest,
)
from modelfactory.evaluation.evaluator import ModelEvaluator
from modelfactory.evaluation.permutation import profit_by_day, shift_test
from modelfactory.evaluation.robustness import analyse_robustness, by_slice, side_masks, symbol_masks, threshold_sweep
from modelfactory.evaluation.significance import direction_claim
from modelfactory.figures.robustness import plot_robustness
from modelfactory.figures.tear_sheet import plot_equity
from modelfactory.training.trainer import Trainer, trainer_plots

RATIOS = ("sharpe", "sharpe_net", "sortino", "calmar", "max_drawdown")


# Comparison with a loop over bars


@st.composite
def calendars(draw):
    "Positions and prices of up to four symbols, at different times, with missing bars and one late start."
    rng, n_symbols = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 4))
    bars, share = draw(st.integers(8, 40)), draw(st.sampled_from([0.4, 0.7, 1.0]))
    hours = pd.date_range("2024-01-05 20:00", periods=bars, freq=draw(st.sampled_from(["1h", "5h", "1D"])))
    late, prices = draw(st.integers(0, bars // 2)), []
    for k in range(n_symbols):
        times = hours[late:] if k == n_symbols - 1 else hours
        times = times + pd.Timedelta(minutes=draw(st.sampled_from([0, 0, 1, 17])))
        times = times[rng.random(len(times)) < share] if share < 1 else times
        close = 100 * np.exp(rng.normal(0, 0.02, len(times)).cumsum())
        prices.append(pd.DataFrame(dict(datetime=times, symbol=f"S{k}", close=close)))
    prices = pd.concat(prices, ignore_index=True)
    assume(len(prices))
    keys = prices[["datetime", "symbol"]]
    rows = keys[rng.random(len(prices)) < draw(st.sampled_from([0.3, 0.8, 1.0]))]
    if not len(rows):
        rows = keys
    positions = rows.assign(position=rng.choice([-1, -0.5, 0, 0.5, 1], len(rows)))
    return positions.sample(frac=1, random_state=1), prices.sample(frac=1, random_state=2)


def slow_portfolio(positions, prices, horizon, cost_bps, day_start=0):
    "Bars and days of the portfolio, from a loop over the bars of each symbol."
    predicted = {(r.symbol, r.datetime): r.position for r in positions.itertuples()}
    traded = sorted({symbol for symbol, _ in predicted})
    bars_of = {s: list(t.sort_values("datetime").itertuples()) for s, t in prices.groupby("symbol") if s in traded}
    start, end, steps = min(t for _, t in predicted), max(t for _, t in predicted), []
    for symbol, rows in bars_of.items():
        predicted_at = [k for k, r in enumerate(rows) if (symbol, r.datetime) in predicted]
        end = max([end, *(rows[min(k + horizon, len(rows) - 1)].datetime for k in predicted_at)])
    for symbol, rows in bars_of.items():
        rows = [r for r in rows if start <= r.datetime <= end]
        held = []
        for k in range(len(rows)):
            tranches = [predicted.get((symbol, b.datetime), 0) for b in rows[max(0, k - horizon) : k]]
            held.append(sum(tranches) / horizon)
        mean = np.mean(held[1:]) if len(rows) > 1 else 0.0
        for k, row in enumerate(rows):
            bar_return = row.close / rows[k - 1].close - 1 if k else 0.0
            step = dict(datetime=row.datetime, symbol=symbol, position=held[k], gross=held[k] * bar_return)
            step["turnover"] = abs(held[k] - held[k - 1]) if k else 0.0
            step["net"] = step["gross"] - step["turnover"] * cost_bps / 1e4
            for name, share in dict(hold=1.0, constant=mean).items():
                step[name] = (share * bar_return if k else 0.0) - (abs(share) * cost_bps / 1e4 if k == 1 else 0.0)
            steps.append(step)
    state, bars = dict.fromkeys(traded, 0.0), []
    for t, now in pd.DataFrame(steps).groupby("datetime"):
        state |= dict(zip(now.symbol, now.position, strict=True))
        columns = ["gross", "net", "turnover", "hold", "constant"]
        exposure = sum(map(abs, state.values())) / len(traded)
        bars.append(dict(datetime=t) | (now[columns].sum() / len(traded)).to_dict() | dict(exposure=exposure, bars=1.0))
    bars = pd.DataFrame(bars).set_index("datetime")
    next_day = pd.to_timedelta([int(day_start > 0 and t.hour >= day_start) for t in bars.index], "D")
    return bars, bars.groupby(bars.index.normalize() + next_day).sum()


@pytest.mark.slow
@given(calendars(), st.sampled_from([1, 2, 5]), st.sampled_from([0.0, 3.0]), st.sampled_from([0, 17]))
@settings(max_examples=60, deadline=None)
def test_the_portfolio_equals_a_loop_over_bars(calendar, horizon, cost_bps, day_start):
    positions, prices = calendar
    rules = TradingRules(cost_bps=cost_bps, day_start=day_start)
    fast = tranche_backtest(positions, prices, horizon, rules)
    bars, daily = slow_portfolio(positions, prices, horizon, cost_bps, day_start)
    assert fast.bars.index.equals(bars.index) and fast.daily.index.equals(daily.index)
    for name in ("gross", "net", "turnover", "exposure"):
        assert np.allclose(fast.bars[name], bars[name]), name
    for name in ("gross", "net", "turnover", "exposure", "bars", "hold", "constant"):
        assert np.allclose(fast.daily[name], daily[name]), name
    assert fast.daily.trades.sum() == fast.n_trades
    assert np.isclose(fast.metrics()["exposure"], bars.exposure.mean())
    profit, days = profit_by_day(positions, prices, horizon, rules)
    assert days.equals(pd.DatetimeIndex(daily.index))
    assert np.allclose(profit(positions.position.to_numpy()), daily.net)


# Symbols with different bars


def walks(symbols, times, sd=0.002, seed=0):
    "Prices of random walks at the same times, and predictions that change every ten bars."
    rng, n, parts = np.random.default_rng(seed), len(times), []
    for s in symbols:
        close = 100 * np.exp(rng.normal(0, sd, n).cumsum())
        prediction = np.repeat(rng.choice([-1, 1], n // 10 + 1), 10)[:n]
        parts.append(pd.DataFrame(dict(datetime=times, symbol=s, close=close, prediction=prediction)))
    return pd.concat(parts, ignore_index=True)


def backtest_of(table, *rules):
    return tranche_backtest(table[["datetime", "symbol", "prediction"]], table, 5, *rules)


def test_a_shift_of_each_symbol_by_minutes_does_not_change_the_portfolio():
    symbols = [f"S{k}" for k in range(10)]
    table = walks(symbols, pd.date_range("2024-01-01", periods=24 * 120, freq="h"))
    minutes = pd.to_timedelta(table.symbol.str[1:].astype(int), "min")
    in_step, apart = backtest_of(table), backtest_of(table.assign(datetime=table.datetime + minutes))
    assert np.isclose(apart.daily.net.std(), in_step.daily.net.std(), rtol=1e-9)
    same = ["gross", "net", "turnover", "trades", "hold", "constant"]
    assert np.allclose(apart.daily[same], in_step.daily[same])
    assert np.isclose(apart.metrics()["exposure"], in_step.metrics()["exposure"], rtol=0.01)


def test_crypto_and_a_stock_with_different_hours_each_have_half_of_the_capital():
    crypto = walks(["C"], pd.date_range("2024-01-01", periods=24 * 140, freq="h"))
    sessions = [d + pd.Timedelta(hours=h) for d in pd.bdate_range("2024-01-01", periods=100) for h in range(10, 17)]
    stock = walks(["S"], pd.DatetimeIndex(sessions), sd=0.004, seed=1)
    both = backtest_of(pd.concat([crypto, stock])).daily.net
    alone = [backtest_of(t).daily.net.reindex(both.index, fill_value=0.0) for t in (crypto, stock)]
    assert np.allclose(both, (alone[0] + alone[1]) / 2)


def test_missing_bars_do_not_change_volatility_or_turnover():
    table = walks([f"S{k}" for k in range(10)], pd.date_range("2024-01-01", periods=24 * 120, freq="h"))
    table["prediction"] = np.where(table.symbol < "S5", 1, -1)
    full, half = backtest_of(table), backtest_of(table.sample(frac=0.5, random_state=0))
    assert abs(half.daily.net.std() / full.daily.net.std() - 1) < 0.1
    assert np.isclose(half.daily.turnover.sum(), full.daily.turnover.sum())
    assert np.isclose(full.daily.turnover.sum(), 1)


def test_a_symbol_without_predictions_has_no_share_of_the_capital():
    table = walks(["A", "B"], pd.date_range("2024-01-01", periods=300, freq="h"))
    only_a = table[table.symbol == "A"]
    predictions = only_a[["datetime", "symbol", "prediction"]]
    with_b, without_b = tranche_backtest(predictions, table, 5), tranche_backtest(predictions, only_a, 5)
    assert np.allclose(with_b.daily, without_b.daily)


# Benchmarks


def test_always_long_equals_buy_and_hold_and_always_short_equals_its_mean_position():
    table = walks(["A", "B", "C"], pd.date_range("2024-01-01", periods=500, freq="h")).sample(frac=0.7, random_state=0)
    rules, free = TradingRules(cost_bps=5.0), TradingRules(cost_bps=0.0)
    for horizon, tolerance in ((1, 1e-12), (5, 0.02)):
        long, short = (tranche_backtest(table.assign(prediction=c), table, horizon, rules) for c in (1, -1))
        assert np.abs(long.daily.net - long.daily.hold).sum() < tolerance
        assert np.abs(short.daily.net - short.daily.constant).sum() < tolerance
        assert np.isclose(long.daily.hold.sum() + 5e-4, tranche_backtest(table, table, horizon, free).daily.hold.sum())


def test_the_constant_benchmark_of_the_barrier_strategy_uses_its_positions():
    table = walks(["A", "B"], pd.date_range("2024-01-01", periods=300, freq="h"))
    predictions = table[["datetime", "symbol", "prediction"]]
    fixed = tranche_backtest(predictions, table, 5)
    barrier = barrier_backtest(predictions, table, np.full(600, 2), 5)
    assert np.allclose(fixed.daily.hold, barrier.daily.hold)
    assert not np.allclose(fixed.daily.constant, barrier.daily.constant)


# Labels without prices


def without_close(frames):
    return {k: f.drop(columns=["open", "high", "low", "close"]) for k, f in frames.items()}


@pytest.fixture(scope="module")
def splits():
    from modelfactory.data.bundled import resolve_data

    folder = resolve_data("null")
    return {k: pd.read_parquet(folder / f"{k}_scaled.parquet").groupby("symbol").head(600) for k in ("train", "val")}


@pytest.mark.parametrize("seed", range(10))
def test_labels_without_prices_have_no_sharpe_ratio(seed):
    "On daily bars with horizon 20 a Sharpe ratio of labels would have a standard deviation of 2.90; theory gives .59."
    predictions, y, _ = market(bars=750, horizon=20, seed=seed, symbols=1)
    days = pd.bdate_range("2021-01-04", periods=750)
    predictions = replace(predictions, timestamps=pd.DatetimeIndex(days))
    metrics = ModelEvaluator(20, n_boot=20).compute_all_metrics(predictions, y)
    ends = [f"{k}_ci_{end}" for k in RATIOS for end in ("low", "high")]
    assert np.isnan([metrics[k] for k in (*RATIOS, *ends)]).all() and metrics["returns_source"] == "label"
    for name in ("coverage", "win_rate", "profit_factor", "turnover", "exposure"):
        assert metrics[name] > 0
    result = label_backtest(dict(datetime=days, symbol="A", prediction=predictions.predictions), y, 20)
    assert NO_PRICES_NOTE in repr(result) and NO_PRICES_NOTE in result._repr_html_() and result.equity.isna().all()
    assert result.drawdown.isna().all() and result.daily[["gross", "net"]].isna().all(axis=None)
    assert not {"hold", "constant"} & set(result.daily)
    with pytest.raises(ValueError, match="labels without prices"):
        plot_equity(result)


@pytest.mark.slow
def test_a_run_without_prices_is_published(splits, tmp_path):
    from modelfactory.runs.attempt import publish, write_run
    from modelfactory.runs.run_folder import start_attempt

    trainer = Trainer(dict(model="logistic_regression", horizon=5, data="null"), without_close(splits))
    metrics = trainer.run_full_pipeline()
    assert metrics["returns_source"] == "label"
    assert np.isnan([metrics[k] for k in (*RATIOS, "sharpe_net_p_shift")]).all()
    assert 0 < metrics["directional_skill_p_shift"] <= 1 and 0 < metrics["win_rate"] < 1
    assert all(np.isnan(b["sharpe_net"]) for b in trainer.baselines().values())
    figures = trainer_plots(trainer)
    assert "equity" not in figures and "robustness" in figures
    attempt = start_attempt(tmp_path, dict(model="logistic_regression", horizon=5))
    write_run(trainer, attempt, figures)
    assert publish(attempt, tmp_path).is_dir()


def test_robustness_without_prices_has_no_profit():
    predictions, y, prices = market(skill=0.5)
    tables = analyse_robustness(ModelEvaluator(5, n_boot=20), predictions, y, None)
    for table in tables.tables.values():
        columns = [c for c in table if c.startswith(("sharpe", "profit", "max_drawdown", "gross"))]
        assert table[columns].isna().all(axis=None)
    assert tables.to_dict()["notes"]["no_prices"] == NO_PRICES_NOTE and NO_PRICES_NOTE in repr(tables)
    assert tables.slices.directional_accuracy.notna().all() and plot_robustness(tables).axes
    with_prices = analyse_robustness(ModelEvaluator(5, n_boot=20), predictions, y, prices)
    assert with_prices.costs.profit.notna().all() and NO_PRICES_NOTE not in repr(with_prices)


# Cost, slices and gap


def test_backtest_and_fast_backtest_have_the_same_cost():
    table = walks(["A", "B"], pd.date_range("2024-01-01", periods=300, freq="h"))
    rules = [TradingRules(cost_bps=c) for c in (7.0, 0.0)]
    costly, free = (backtest_of(table, r) for r in rules)
    assert np.allclose(free.daily.net - costly.daily.net, trading_cost(costly.daily.turnover, rules[0]))
    profit = [profit_by_day(table, table, 5, r)[0](table.prediction.to_numpy()) for r in rules]
    assert np.allclose(profit[1] - profit[0], trading_cost(costly.daily.turnover, rules[0]))


@pytest.mark.slow
def test_intervals_of_slices_are_at_a_level_corrected_for_their_number():
    predictions, y, prices = market(symbols=4, skill=0.1)
    evaluator = ModelEvaluator(5, n_boot=200)
    masks = side_masks(predictions) | symbol_masks(predictions)
    table = by_slice(evaluator, predictions, y, prices, masks)
    assert np.isclose(table.attrs["slice_level"], 1 - 0.05 / 6)
    for r, (name, mask) in zip(table.itertuples(), masks.items(), strict=True):
        alone = by_slice(evaluator, predictions, y, prices, {name: mask}).iloc[0]
        corrected = replace(evaluator, level=1 - 0.05 / 6)
        same = by_slice(corrected, predictions, y, prices, {name: mask}).iloc[0]
        assert r.directional_accuracy_low < alone.directional_accuracy_low
        assert r.directional_accuracy_high > alone.directional_accuracy_high
        lows = same[["sharpe_net_low", "directional_accuracy_low"]].astype(float)
        assert np.isclose([r.sharpe_net_low, r.directional_accuracy_low], lows).all()
    tables = analyse_robustness(evaluator, predictions, y, prices)
    assert tables.to_dict()["notes"]["slice_level"] == tables.slices.attrs["slice_level"]
    assert f"corrected for {len(tables.slices)} slices" in repr(tables)


def test_a_slice_has_the_accuracy_of_the_better_constant_call():
    predictions, y, prices = market(bars=400)
    up = replace(predictions, predictions=np.ones_like(predictions.predictions))
    y = np.where(np.arange(len(y)) % 4 == 0, -1, 1)
    table = by_slice(ModelEvaluator(5, n_boot=0), up, y, prices, side_masks(up) | symbol_masks(up)).set_index("slice")
    assert np.isclose(table.directional_accuracy_constant[["long", "S0", "S1"]], 0.75).all()
    assert np.isclose(table.directional_accuracy[["long", "S0", "S1"]], 0.75).all()
    assert np.isnan(table.directional_accuracy_constant["short"])


def test_a_slice_of_five_right_calls_has_no_interval():
    "It once had a directional accuracy of 1.000 [1.000, 1.000]."
    predictions, y, prices = market(symbols=1, bars=800, skill=0.5)
    right = np.flatnonzero((predictions.predictions == y) & (y != 0))[:5]
    few = np.isin(np.arange(len(y)), right)
    evaluator = ModelEvaluator(5, n_boot=50)
    table = by_slice(evaluator, predictions, y, prices, dict(few=few, rest=~few)).set_index("slice")
    names = ("directional_accuracy", "directional_skill", "sharpe_net")
    ends = [f"{name}_{side}" for name in names for side in ("low", "high")]
    assert table.directional_accuracy["few"] == 1 and table.loc["few", ends].isna().all()
    assert table.loc["rest", ends].notna().all()
    alone = by_slice(evaluator, predictions, y, prices, dict(few=few))
    tables = replace(analyse_robustness(evaluator, predictions, y, prices), slices=alone)
    assert "1 [–]" in repr(tables)


def claim_rows(predictions, y):
    "Table of keys, labels and predictions for `direction_claim`."
    keys = dict(datetime=predictions.timestamps, symbol=predictions.symbols)
    return pd.DataFrame(keys | dict(y_true=y, prediction=predictions.predictions))


def test_directional_skill_of_a_symbol_slice_equals_the_claim_on_its_rows():
    predictions, y, prices = market(symbols=3, bars=600, skill=0.3)
    masks = symbol_masks(predictions) | side_masks(predictions)
    table = by_slice(ModelEvaluator(5, n_boot=0), predictions, y, prices, masks).set_index("slice")
    for name, mask in symbol_masks(predictions).items():
        claim = direction_claim(claim_rows(predictions, y)[mask], 5, trials=len(masks))
        columns = ["directional_skill", "directional_skill_low", "directional_skill_high"]
        assert np.allclose(table.loc[name, columns].astype(float), [claim.skill, claim.low, claim.high])
    assert (table.directional_skill[["long", "short"]] > 0).all()


def test_a_random_side_has_no_skill_where_most_labels_are_up():
    "Calls are random and three labels in four are up. Long calls are right in 75% of the rows, without skill."
    predictions, y, prices = market(symbols=2, bars=2000)
    rng = np.random.default_rng(0)
    y, calls = rng.choice([-1, 1, 1, 1], len(y)), rng.choice([-1, 1], len(y)).astype(np.int8)
    random = replace(predictions, predictions=calls)
    table = by_slice(ModelEvaluator(5, n_boot=0), random, y, prices, side_masks(random)).set_index("slice")
    assert table.directional_accuracy["long"] > 0.7
    assert (table.directional_skill_low < 0).all() and (table.directional_skill_high > 0).all()


def test_intervals_of_thresholds_are_at_a_level_corrected_for_their_number():
    predictions, y, prices = market(symbols=3, bars=800, skill=0.4)
    evaluator = ModelEvaluator(5, n_boot=0)
    swept = threshold_sweep(evaluator, predictions, y, prices, (0.0, 0.4, 0.5, 2.0))
    assert np.isclose(swept.attrs["threshold_level"], 1 - 0.05 / 4)
    rows = claim_rows(predictions, y)
    for r in swept[:3].itertuples():
        called = (predictions.predictions != 0) & (predictions.probabilities.max(1) >= r.threshold)
        claim = direction_claim(rows[called], 5, trials=4)
        skill = [r.directional_skill, r.directional_skill_low, r.directional_skill_high]
        assert np.allclose(skill, [claim.skill, claim.low, claim.high], equal_nan=True)
    assert swept.directional_skill_low[0] > 0 and np.isnan(swept.directional_skill_low[3])
    top = np.sort(predictions.probabilities.max(1)[predictions.predictions != 0])[-5]
    few = threshold_sweep(evaluator, predictions, y, prices, (0.0, top))
    assert few.calls[1] >= 5 and np.isnan(few.directional_skill_low[1])
    tables = analyse_robustness(evaluator, predictions, y, prices)
    assert tables.to_dict()["notes"]["threshold_level"] == tables.thresholds.attrs["threshold_level"]
    assert "corrected for 10 thresholds" in repr(tables)


def test_gap_zero_is_noted():
    predictions, y, prices = market(bars=400)
    for gap in (0, 1):
        evaluator = ModelEvaluator(5, n_boot=0, gap=gap)
        tables = analyse_robustness(evaluator, predictions, y, prices)
        assert (GAP_0_NOTE in repr(evaluator.backtest(predictions, prices))) == (gap == 0)
        assert (GAP_0_NOTE in repr(tables)) == (gap == 0)
        assert (tables.to_dict()["notes"].get("gap_0") == GAP_0_NOTE) == (gap == 0)
    assert Trainer(dict(model="logistic_regression", horizon=5, data=dict(data="null", gap=0))).evaluator.gap == 0


def test_a_slice_of_one_symbol_trades_its_share_of_the_capital():
    "So the slices of a partition sum to the total."
    predictions, y, prices = market(symbols=3)
    evaluator = ModelEvaluator(5, n_boot=0)
    parts = by_slice(evaluator, predictions, y, prices, symbol_masks(predictions))
    assert np.isclose(parts.gross.sum(), evaluator.backtest(predictions, prices).daily.gross.sum())
    one = rows_of(predictions, predictions.symbols == "S0")
    assert np.isclose(evaluator.backtest(one, prices).daily.gross.sum(), 3 * parts.gross[0])


def test_the_shift_test_equals_the_backtest_for_symbols_at_different_times():
    predictions, y, prices = market(bars=300)

    def minutes(symbols):
        return pd.to_timedelta((np.asarray(symbols) == "S1").astype(int), "min")

    apart = replace(predictions, timestamps=predictions.timestamps + minutes(predictions.symbols))
    prices = prices.assign(datetime=prices.datetime + minutes(prices.symbol))
    observed = shift_test(apart, y, prices, 5, n_draws=19).observed["sharpe_net"]
    assert np.isclose(observed, ModelEvaluator(5, n_boot=0).backtest(apart, prices).metrics()["sharpe_net"])
