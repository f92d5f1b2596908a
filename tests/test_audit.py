"""The leak audit and the self-test.

Leaks are planted in three data sets. Causal columns come from markets that were not used to set a threshold. The
self-test runs on correct and on cheating pipelines."""

import functools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.signal import lfilter

from modelfactory.data.audit import (
    MIN_ROWS,
    LeakFound,
    audit,
    find_leaks,
    find_scaler_leaks,
    score_columns,
    shift_within_symbol,
)
from modelfactory.data.bundled import resolve_data
from modelfactory.data.features import FEATURE_WARMUP, bar_features, settled_rows
from modelfactory.data.labels import triple_barrier
from modelfactory.data.market import MARKET_PRESETS, market_table, simulate_market
from modelfactory.data.readers import check_bars
from modelfactory.data.splits import NO_TARGET, read_split, read_splits
from modelfactory.models.registry import ModelRegistry
from modelfactory.training.selftest import future_perturbation, lookahead_features, null_splits, prefix_test, selftest
from modelfactory.training.trainer import Trainer

# Line counting slows thousands of small calls by half; the notebooks run the same lines.
pytestmark = pytest.mark.no_cover


def simulated_train(preset, seed, rows=8_000, symbols=2, width=None):
    "Train of a simulated market."
    config = replace(MARKET_PRESETS[preset], seed=seed, symbols=symbols, rows=(rows, 200, 200), columns=width)
    table = market_table(simulate_market(config))
    return read_split(table[table.split == "train"].reset_index(drop=True))


@pytest.fixture(scope="module", params=["eurusd", "planted", "null"])
def splits(request):
    return read_splits(resolve_data(request.param), splits=("train", "val", "test"))


def leak(split, name, horizon):
    "A column that is computed from future bars."

    def at(x, shift):
        return shift_within_symbol(np.asarray(x, float), split.codes, shift)

    close = split.close
    ahead = np.stack([at(close, k) for k in range(1, horizon + 1)])
    column = {
        "centred mean": lambda: sum(at(close, k) for k in range(-2, 3)) / 5,
        "centred mean in returns": lambda: sum(at(close, k) for k in range(-2, 3)) / 5 / close - 1,
        "label of the row before": lambda: at(
            np.where(split.labels[horizon] == NO_TARGET, 0, split.labels[horizon]), -1
        ),
        "next return": lambda: at(close, 1) / close - 1,
        "mfe": lambda: np.fmax.reduce(ahead) / close - 1,
        "mae": lambda: 1 - np.fmin.reduce(ahead) / close,
        "bars_to_hit": lambda: np.where(split.bars_to_hit[horizon] < 0, horizon, split.bars_to_hit[horizon]),
    }[name]()
    return np.nan_to_num(column).astype(np.float32)


def with_column(split, column):
    "The split with one more feature, named `innocent`."
    return replace(split, matrix=np.c_[split.matrix, column], features=[*split.features, "innocent"])


def thinned(split, step=6):
    """The split with every `step`-th feature.

    The scores of a column do not depend on the other features; `test_bundled_splits_have_no_finding` covers all."""
    return replace(split, matrix=split.matrix[:, ::step].copy(), features=split.features[::step])


LEAKS = {
    "centred mean": 2,
    "centred mean in returns": 2,
    "label of the row before": -1,
    "next return": 1,
    "mfe": 0,
    "mae": 0,
    "bars_to_hit": 0,
}


@pytest.mark.parametrize("horizon", [5, 20])
@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_reported_by_name(splits, name, horizon):
    report = audit(with_column(thinned(splits["train"]), leak(splits["train"], name, horizon)))
    assert {f.column for f in report.findings} == {"innocent"}
    worst = report.findings[0]
    if name == "bars_to_hit":
        assert report.ok and worst.kind == "neutrality" and worst.verdict == "warn" and worst.looks_ahead is None
    else:
        assert not report.ok and worst.kind == "direction" and worst.size > 0.1
        with pytest.raises(LeakFound, match="innocent"):
            report.raise_if_leaky()
    if name == "label of the row before":
        assert worst.shift == -1 and worst.looks_ahead == int(worst.target.removeprefix("label_h")) - 1
    else:
        assert worst.looks_ahead is None and "ahead" not in worst.sentence


@pytest.mark.parametrize("ago", [1, 2, 4])
def test_a_copy_of_a_label_that_is_not_closed_fails_with_its_row(splits, ago):
    train = splits["train"]
    label = np.where(train.labels[5] == NO_TARGET, 0, train.labels[5]).astype(np.float32)
    column = shift_within_symbol(label, train.codes, -ago, 0)
    worst = audit(with_column(thinned(train), column)).findings[0]
    assert (worst.verdict, worst.target, worst.shift, worst.looks_ahead) == ("fail", "label_h5", -ago, 5 - ago)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaler, names",
    [
        ("mean and deviation", ("train", "val")),
        ("mean and deviation", ("train", "val", "test")),
        ("median and quartiles", ("train", "val", "test")),
        ("minimum and maximum", ("train", "val")),
    ],
)
def test_a_scaler_fitted_on_later_splits_is_reported(splits, scaler, names):
    pooled = np.concatenate([splits[name].matrix for name in names]).astype(float)
    centre, width = {
        "mean and deviation": (pooled.mean(0), pooled.std(0, ddof=1)),
        "median and quartiles": (np.median(pooled, 0), np.subtract(*np.percentile(pooled, [75, 25], 0))),
        "minimum and maximum": (pooled.min(0), np.ptp(pooled, 0)),
    }[scaler]
    scale = np.where(width > 0, width, 1)
    rescaled = {name: replace(s, matrix=((s.matrix - centre) / scale).astype(np.float32)) for name, s in splits.items()}
    hits = find_scaler_leaks(rescaled)
    # Most extremes lie in train, so few columns show a minimum and maximum of later splits.
    assert len(hits) > (10 if scaler == "minimum and maximum" else 60)
    assert set(hits.scaler) == {scaler}
    columns = [splits["train"].features.index(column) for column in hits.column[:10]]
    reported = {
        name: replace(s, matrix=s.matrix[:, columns].copy(), features=list(hits.column[:10]))
        for name, s in rescaled.items()
    }
    assert not audit(reported).ok
    shortened = {name: replace(s, matrix=s.matrix[5:]) for name, s in rescaled.items()}
    assert len(find_scaler_leaks(shortened)) > 40 or scaler == "minimum and maximum"


def test_bundled_splits_have_no_finding(splits):
    report = audit(splits)
    assert report.ok and not report.findings and not report.skipped and report.columns >= 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(70, 74))
@pytest.mark.parametrize("preset", MARKET_PRESETS)
def test_causal_columns_have_no_finding_on_other_seeds(preset, seed):
    split = simulated_train(preset, seed, rows=[4_000, 9_000][seed % 2], symbols=1 + seed % 3)
    assert len(split.features) >= 100 and not audit(split).findings


@pytest.mark.slow
def test_noise_columns_have_no_finding():
    assert not audit(simulated_train("null", 75, width=400)).findings


STEPS = 6  # prices in a bar


def bars_of_paths(times, symbol, price, volume):
    "Bars of prices (n, STEPS)."
    prices = dict(open=price[:, 0], high=price.max(1), low=price.min(1), close=price[:, -1])
    return pd.DataFrame(dict(datetime=times, symbol=symbol, **prices, volume=volume))


def simulated(seed, kind, rows=6_000, symbols=2, width=None):
    """A split of five-minute bars with causal features.

    Kinds: `reverting` to a mean with bid-ask bounce, `bounce` alone, `asymmetric` barriers with seasonal volatility,
    `drifts` of each symbol, `slow` labels."""
    rng = np.random.default_rng(seed)
    n = (rows // symbols + FEATURE_WARMUP) * STEPS
    season = np.exp(
        0.5 * np.sin(2 * np.pi * np.arange(n) / (288 * STEPS)) + lfilter([1], [1, -0.999], rng.normal(0, 0.02, n))
    )
    bars = []
    for number in range(symbols):
        steps = rng.normal(0, 4e-4, n) * (season if kind in ("asymmetric", "slow") else 1)
        if kind == "drifts":
            steps = steps + (number - symbols / 2 + 0.5) * 1.2e-5
        memory = 0.5 ** (1 / STEPS / 15) if kind == "reverting" else 1.0
        bounce = dict(reverting=2e-4, bounce=4e-4).get(kind, 0) * rng.choice([-1, 1], n)
        price = np.exp(lfilter([1], [1, -memory], steps) + bounce).reshape(-1, STEPS)
        times = pd.date_range("2024", periods=len(price), freq="5min")
        bars.append(bars_of_paths(times, f"S{number}", price, rng.exponential(100, len(price))))
    bars = check_bars(pd.concat(bars))
    special = dict(asymmetric={5: (2.4, 1.2), 20: (5.0, 2.5)}, slow={5: (2.5, 2.5, 15), 20: (3.0, 1.5, 40)})
    barriers = special.get(kind, {5: (), 20: ()})
    labels = [triple_barrier(bars, h, *b) for h, b in barriers.items()]
    table = pd.concat([bars, bar_features(bars).drop(columns=["datetime", "symbol"]), *labels], axis=1)
    return read_split(table[settled_rows(bars)].reset_index(drop=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["reverting", "bounce", "asymmetric", "drifts", "slow"])
def test_causal_columns_have_no_finding_if_past_bars_predict(kind, seed):
    report = audit(simulated(seed, kind))
    assert not report.findings, report


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_positions_of_the_close_have_no_finding_on_a_mean_reverting_price(seed):
    """The half-life is half a bar, and volatility changes slowly.

    No past move predicts direction as well as a causal position of the close, which once failed the audit."""
    rng, rows = np.random.default_rng(seed), 40_000
    steps = (rows + FEATURE_WARMUP) * STEPS
    middle = lfilter([1], [1, -(0.5 ** (2 / STEPS))], rng.normal(size=steps))
    volatility = 2e-4 * np.exp(1.5 * lfilter([1], [1, -0.9999], rng.normal(0, (1 - 0.9999**2) ** 0.5, steps)))
    price = np.exp((volatility * np.diff(middle, prepend=0)).cumsum()).reshape(-1, STEPS)
    times = pd.date_range("2024", periods=len(price), freq="5min")
    bars = check_bars(bars_of_paths(times, "A", price, 1.0))
    positions = ["bollinger_20", "bollinger_60", "rsi_28", "ema_gap_50", "sma_gap_100", "stochastic_14"]
    table = pd.concat([bars, bar_features(bars)[positions], triple_barrier(bars, 5)], axis=1)
    split = read_split(table[settled_rows(bars)].reset_index(drop=True))
    scores = score_columns(split).query("kind == 'direction'")
    assert scores["size"].max() > 0.4 and not audit(split).findings


def test_the_finding_on_a_causal_volatility_does_not_claim_look_ahead():
    "Wilder's ATR with a threshold that it exceeds: the sentence gives the score and does not mention later bars."
    split = simulated(2, "asymmetric")
    scores = score_columns(split).assign(warn=-1.0)
    sentences = [f.sentence for f in find_leaks(split, scores[scores.column.isin(["log_atr", "true_range"])])]
    assert len(sentences) >= 2
    for sentence in sentences:
        for part in ("AUC 0.", "strongest at shift", "check how it is computed"):
            assert part in sentence
        assert "ahead" not in sentence and "knows" not in sentence


def day_high(split):
    "Log distance of the close from the high of its day, which is known only at the end of the day."
    high = pd.Series(split.market["high"]).groupby([split.codes, split.datetimes.normalize()]).transform("max")
    return np.log(split.close / high.to_numpy()).astype(np.float32)


@pytest.mark.parametrize("name", ["eurusd", "null"])
def test_the_distance_from_the_high_of_the_day_is_a_warning(name):
    train = read_splits(resolve_data(name))["train"]
    report = audit(with_column(thinned(train), day_high(train)))
    assert report.named("warn") + report.named("fail") == ["innocent"]
    assert report.findings[0].kind == "direction" and report.findings[0].size > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [80, 81, 82])
def test_the_distance_from_the_high_of_the_day_is_a_warning_on_other_null_markets(seed):
    split = simulated_train("null", seed, rows=12_000)
    assert audit(with_column(thinned(split), day_high(split))).named("warn") == ["innocent"]


@pytest.mark.slow
def test_a_leak_in_the_rows_of_one_symbol_is_a_warning():
    "The column is the distance from the high of the day for one of four symbols, and noise for the other three."
    split = simulated_train("null", 83, rows=60_000, symbols=4)
    split = replace(split, matrix=split.matrix[:, :4].copy(), features=split.features[:4])
    noise = np.random.default_rng(0).normal(size=len(split)).astype(np.float32)
    column = np.where(split.codes == 2, day_high(split) / day_high(split).std(), noise)
    report = audit(with_column(split, column.astype(np.float32)))
    assert report.ok and {f.symbol for f in report.findings if f.column == "innocent"} == {split.symbols[2]}
    assert f"of {split.symbols[2]} with AUC" in report.findings[0].sentence


@pytest.mark.parametrize("ago, verdicts", [(8, ["fail"]), (14, ["fail"]), (15, [])])
def test_a_label_is_closed_when_the_slowest_label_is_decided(ago, verdicts):
    "Labels of horizon 5 are decided up to 15 bars later: most labels of 8 rows ago are undecided."
    split = simulated(0, "slow", rows=4_000)
    assert split.bars_to_hit[5].max() == 15 and (split.bars_to_hit[5] > 8).mean() > 0.3
    label = np.where(split.labels[5] == NO_TARGET, 0, split.labels[5])
    findings = audit(
        with_column(thinned(split), shift_within_symbol(label.astype(np.float32), split.codes, -ago, 0))
    ).findings
    assert [f.verdict for f in findings] == verdicts
    if findings:
        assert findings[0].looks_ahead == 15 - ago and f"up to {15 - ago} bar" in findings[0].sentence


def columns_that_fit_scalers(n, seed):
    """Columns that fit a scaler by construction: bounded columns, and the week of the year over four years.

    Mean, median and range of the week are the same for any number of complete years."""
    rng = np.random.default_rng(seed)
    close = pd.Series(rng.normal(size=n).cumsum())

    def place(k):
        past = close.rolling(k, min_periods=1)
        low, high = past.min(), past.max()
        return ((close - low) / (high - low)).fillna(0.5)

    week, year = np.arange(n) // 100 % 52, np.arange(n) // 5_200
    return dict(
        stochastic_14=place(14),
        stochastic_60=place(60),
        robust_week=(week - 25.5) / 25.5,
        standard_week=(week - 25.5) / np.std(np.arange(52)),
        week=week / 51,
        year=year / 3,
        fixed=np.clip(rng.normal(size=n), -1, 1),
        quantised=(rng.random(n) * 52 // 1) / 51,
        rank=rng.integers(0, 101, n) / 100,
        hour=np.arange(n) % 24 / 23,
    )


def cut(columns, share):
    "Splits: train is the first share of the rows; val and test are one half of the rest each."
    matrix = np.column_stack(list(columns.values())).astype(np.float32)
    a, b = int(share * len(matrix)), int((share + 1) / 2 * len(matrix))

    def split(m):
        return replace(template(), matrix=m, features=list(columns))

    return dict(train=split(matrix[:a]), val=split(matrix[a:b]), test=split(matrix[b:]))


@functools.cache
def template():
    "A small split, simulated once."
    return simulated_train("null", 79, rows=2_000)


@pytest.mark.parametrize("noise", [False, True], ids=["alone", "beside scaled features"])
def test_columns_that_fit_a_scaler_by_construction_are_not_reported(noise):
    "15 cuts. In each, the week of the year was once reported as scaled on all splits together."
    for share in np.linspace(0.3, 0.85, 15):
        columns = columns_that_fit_scalers(20_800, 3)
        if noise:
            raw = np.random.default_rng(4).gamma(2, 3, (12, 20_800))
            train = raw[:, : int(share * 20_800)]
            columns |= {f"x{j}": (x - t.mean()) / t.std() for j, (x, t) in enumerate(zip(raw, train, strict=True))}
        assert find_scaler_leaks(cut(columns, share)).empty, share


def test_a_scaler_of_all_splits_is_reported_next_to_columns_that_fit_by_construction():
    raw = np.random.default_rng(5).gamma(2, 3, (12, 20_800))
    scaled = {f"x{j}": (x - x.min()) / np.ptp(x) for j, x in enumerate(raw)}
    assert set(find_scaler_leaks(cut(columns_that_fit_scalers(20_800, 3) | scaled, 0.5)).column) <= set(scaled)
    assert len(find_scaler_leaks(cut(columns_that_fit_scalers(20_800, 3) | scaled, 0.5))) > 4
    one = columns_that_fit_scalers(20_800, 3) | {"x": (raw[0] - raw[0].mean()) / raw[0].std()}
    assert find_scaler_leaks(cut(one, 0.5)).column.tolist() == ["x"]


def test_scores_with_few_rows_are_skipped_and_listed():
    split = simulated_train("null", 76)
    few = with_column(split, leak(split, "mfe", 5))
    for h in few.labels:
        few.labels[h] = np.where(np.arange(len(few)) % 9, NO_TARGET, few.labels[h])
    few = replace(few, market={})
    report = audit(few)
    assert report.ok and not report.findings
    assert len(report.skipped) == 4 and f"fewer than {MIN_ROWS}" in report.skipped[0]
    assert len(score_columns(few)) == 0 and "skipped: label_h5, direction" in repr(report)


def test_a_leak_fails_without_closes():
    split = simulated_train("null", 77)
    report = audit(replace(with_column(split, leak(split, "mfe", 5)), market={}))
    assert report.named("fail") == ["innocent"]


def test_two_classes_constant_columns_and_nan():
    split = simulated_train("null", 78)
    two = {5: np.where(split.labels[5] == NO_TARGET, NO_TARGET, split.labels[5] == 0).astype(np.int8)}
    column = leak(split, "bars_to_hit", 5)
    column[::7] = np.nan
    odd = replace(with_column(with_column(split, np.zeros(len(split), np.float32)), column), labels=two)
    assert audit(odd).named("warn") == ["innocent"]


def test_the_audit_changes_no_data(splits):
    before = {
        name: (s.matrix.copy(), {h: y.copy() for h, y in s.labels.items()}, list(s.features))
        for name, s in splits.items()
    }
    audit(splits)
    for name, (matrix, labels, features) in before.items():
        assert np.array_equal(splits[name].matrix, matrix) and splits[name].features == features
        assert all(np.array_equal(splits[name].labels[h], y) for h, y in labels.items())


HONEST = dict(rows=(2_500, 2_000, 200), horizons=(5,), models=("logistic_regression",))


@pytest.mark.slow
def test_a_correct_pipeline_passes_and_its_result_is_json():
    result = selftest(**HONEST, seed=11)
    assert result.ok and result.table.n[0] > 1_900 and result.table.future[0].n == result.table.prefix[0].n
    assert json.loads(json.dumps(result.to_dict()))["ok"]
    assert "no problem" in repr(result) and "<b>" in result._repr_html_()


def centred(bars):
    "A feature that uses the next two bars."
    close = bars.groupby("symbol").close
    return pd.DataFrame(
        dict(smooth=close.transform(lambda c: c.rolling(5, center=True).mean().bfill().ffill() / c - 1))
    )


def standardised(bars):
    "A feature that uses the mean and deviation of all bars."
    return pd.DataFrame(dict(z=bars.groupby("symbol").close.transform(lambda c: (c - c.mean()) / c.std())))


def causal(bars):
    "A causal feature."
    close = bars.groupby("symbol").close
    return pd.DataFrame(dict(ratio=close.transform(lambda c: c / c.rolling(7, min_periods=1).mean() - 1)))


@pytest.mark.slow
@pytest.mark.parametrize("features, expected", [(centred, ["smooth"]), (standardised, ["z"]), (causal, [])])
def test_user_features_with_look_ahead_are_reported(features, expected):
    assert lookahead_features(features) == expected


@pytest.mark.slow
def test_a_leaking_feature_is_reported_by_the_audit_and_by_every_model():
    result = selftest(**HONEST | dict(rows=(6_000, 6_000, 200)), features=centred)
    assert result.peeking == ["smooth"] and result.audit.named() == ["smooth"]
    assert result.table.alarm.all() and len(result.problems) == 3


@pytest.fixture(scope="module")
def null_folder(tmp_path_factory):
    "Splits of a market without signal."
    return null_splits(tmp_path_factory.mktemp("market") / "null", (5,), seed=12, rows=(1_500, 900, 200))


@pytest.fixture
def cheaters():
    from modelfactory.models.classical.logistic_regression import LogisticRegressionModel

    class ByTheBatch(LogisticRegressionModel):
        "Standardises each batch by its own mean."

        def predict(self, X, metadata):
            return super().predict(np.asarray(X) - np.asarray(X).mean(0), metadata)

    class ReachesPast(LogisticRegressionModel):
        "Reads rows after its window."

        def predict(self, X, metadata):
            return super().predict(X.base[np.minimum(X.ends + 6, len(X.base) - 1)], metadata)

    class LastClose(LogisticRegressionModel):
        "Multiplies features by the last close in the metadata."

        def predict(self, X, metadata):
            return super().predict(np.asarray(X) * np.float32(metadata["close"].iloc[-1]), metadata)

    return {
        c.__name__: ModelRegistry.register(c.__name__.lower(), family="example")(c)
        for c in (ByTheBatch, ReachesPast, LastClose)
    }


def trained(model, folder, **config):
    trainer = Trainer(dict(model=model, horizon=5, data=str(folder), config=config))
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["bythebatch", "reachespast", "lastclose"])
def test_a_model_that_uses_later_rows_fails_both_invariance_tests(cheaters, null_folder, name):
    trainer = trained(name, null_folder)
    for test in (future_perturbation(trainer), prefix_test(trainer)):
        assert not test.ok and test.moved and test.largest > 1e-5 and test.first.startswith("SYN")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, config",
    [("lightgbm", dict(n_rounds=20)), ("gru", dict(sequence_length=16, hidden_size=8, n_layers=1, max_epochs=1))],
)
def test_predictions_of_correct_models_do_not_depend_on_later_rows(null_folder, model, config):
    trainer = trained(model, null_folder, **config)
    assert future_perturbation(trainer).ok and prefix_test(trainer).ok
    assert future_perturbation(trainer.model, trainer.datasets["val"]).n == future_perturbation(trainer).n


@pytest.mark.slow
def test_the_level_of_the_intervals_is_corrected_for_the_number_of_tests():
    result = selftest(models=("logistic_regression",), horizons=(5, 20), rows=(2_000, 1_500, 200), alpha=0.02)
    assert result.level == pytest.approx(0.99) and len(result.table) == 2
