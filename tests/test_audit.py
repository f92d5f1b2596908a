"Leaks planted on three data sets, honest columns on markets that no limit was set on, and whole self-tests of honest and of cheating pipelines."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from modelfactory.data.audit import MIN_ROWS, LeakFound, aligned, audit, scaled_on_everything, score_columns
from modelfactory.data.bundled import resolve_data
from modelfactory.data.market import PRESETS, market_table, simulate
from modelfactory.data.splits import NO_TARGET, read_split, read_splits
from modelfactory.models.registry import ModelRegistry
from modelfactory.training.selftest import future_perturbation, null_splits, peeking_features, prefix_test, selftest
from modelfactory.training.trainer import Trainer

pytestmark = pytest.mark.no_cover  # thousands of small calls, which counting lines slows by half: the notebooks go through the same lines


def made(preset, seed, rows=8_000, symbols=2, width=None):
    table = market_table(simulate(replace(PRESETS[preset], seed=seed, symbols=symbols, rows=(rows, 200, 200), columns=width)))
    return read_split(table[table.split == "train"].reset_index(drop=True))


@pytest.fixture(scope="module", params=["eurusd", "planted", "null"])
def splits(request): return read_splits(resolve_data(request.param), splits=("train", "val", "test"))


def leak(split, name, horizon):
    "A column that knows the future."
    at = lambda x, shift: aligned(np.asarray(x, float), split.codes, shift)
    close = split.close
    ahead = np.stack([at(close, k) for k in range(1, horizon + 1)])
    column = {
        "centred mean": lambda: sum(at(close, k) for k in range(-2, 3)) / 5,
        "centred mean in returns": lambda: sum(at(close, k) for k in range(-2, 3)) / 5 / close - 1,
        "label of the row before": lambda: at(np.where(split.labels[horizon] == NO_TARGET, 0, split.labels[horizon]), -1),
        "next return": lambda: at(close, 1) / close - 1,
        "mfe": lambda: np.fmax.reduce(ahead) / close - 1,
        "mae": lambda: 1 - np.fmin.reduce(ahead) / close,
        "bars_to_hit": lambda: np.where(split.bars_to_hit[horizon] < 0, horizon, split.bars_to_hit[horizon])}[name]()
    return np.nan_to_num(column).astype(np.float32)


def with_column(split, column): return replace(split, matrix=np.c_[split.matrix, column], features=[*split.features, "innocent"])


LEAKS = {"centred mean": 2, "centred mean in returns": 2, "label of the row before": -1, "next return": 1, "mfe": 0, "mae": 0, "bars_to_hit": 0}


@pytest.mark.parametrize("horizon", [5, 20])
@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_named(splits, name, horizon):
    report = audit(with_column(splits["train"], leak(splits["train"], name, horizon)))
    assert {f.column for f in report.findings} == {"innocent"}
    worst = report.findings[0]
    if name == "bars_to_hit": assert report.ok and worst.kind == "neutrality" and worst.verdict == "warn" and worst.looks_ahead is None
    else:
        assert not report.ok and worst.kind == "direction" and worst.size > .1
        with pytest.raises(LeakFound, match="innocent"): report.raise_if_leaky()
    if name == "label of the row before": assert worst.shift == -1 and worst.looks_ahead == int(worst.target.removeprefix("label_h")) - 1


@pytest.mark.parametrize("ago", [1, 2, 4])
def test_a_label_that_is_not_closed_is_known_by_its_row(splits, ago):
    train = splits["train"]
    column = aligned(np.where(train.labels[5] == NO_TARGET, 0, train.labels[5]).astype(np.float32), train.codes, -ago, 0)
    worst = audit(with_column(train, column)).findings[0]
    assert (worst.verdict, worst.target, worst.shift, worst.looks_ahead) == ("fail", "label_h5", -ago, 5 - ago)


@pytest.mark.parametrize("fit, seen", [("mean and deviation", ("train", "val")), ("mean and deviation", ("train", "val", "test")), ("median and quartiles", ("train", "val", "test")), ("minimum and maximum", ("train", "val"))])
def test_a_scaler_that_saw_later_splits_is_found(splits, fit, seen):
    every = np.concatenate([splits[s].matrix for s in seen]).astype(float)
    centre, width = {"mean and deviation": (every.mean(0), every.std(0, ddof=1)),
                     "median and quartiles": (np.median(every, 0), np.subtract(*np.percentile(every, [75, 25], 0))),
                     "minimum and maximum": (every.min(0), np.ptp(every, 0))}[fit]
    again = {name: replace(s, matrix=((s.matrix - centre) / np.where(width > 0, width, 1)).astype(np.float32)) for name, s in splits.items()}
    found = scaled_on_everything(again)
    assert len(found) > (10 if fit == "minimum and maximum" else 60) and set(found.scaler) == {fit}  # most extremes lie in train
    assert not audit(again).ok
    thinned = {name: replace(s, matrix=s.matrix[5:]) for name, s in again.items()}
    assert len(scaled_on_everything(thinned)) > 40 or fit == "minimum and maximum"


def test_splits_of_the_kit_are_clean(splits):
    report = audit(splits)
    assert report.ok and not report.findings and not report.skipped and report.columns >= 100


@pytest.mark.parametrize("seed", range(70, 74))
@pytest.mark.parametrize("preset", PRESETS)
def test_honest_columns_raise_no_alarm_on_other_seeds(preset, seed):
    split = made(preset, seed, rows=[4_000, 9_000][seed % 2], symbols=1 + seed % 3)
    assert len(split.features) >= 100 and not audit(split).findings


def test_decoys_raise_no_alarm():
    assert not audit(made("null", 75, width=400)).findings


def test_few_rows_are_met_with_silence():
    split = made("null", 76)
    few = with_column(split, leak(split, "mfe", 5))
    for h in few.labels: few.labels[h] = np.where(np.arange(len(few)) % 9, NO_TARGET, few.labels[h])
    few = replace(few, market={})
    report = audit(few)
    assert report.ok and not report.findings and len(report.skipped) == 4 and f"fewer than {MIN_ROWS}" in report.skipped[0]
    assert len(score_columns(few)) == 0 and "skipped: label_h5, direction" in repr(report)


def test_without_closes_the_labels_still_tell():
    split = made("null", 77)
    report = audit(replace(with_column(split, leak(split, "mfe", 5)), market={}))
    assert report.named("fail") == ["innocent"]


def test_two_classes_constant_columns_and_holes():
    split = made("null", 78)
    two = {5: np.where(split.labels[5] == NO_TARGET, NO_TARGET, split.labels[5] == 0).astype(np.int8)}
    column = leak(split, "bars_to_hit", 5)
    column[::7] = np.nan
    odd = replace(with_column(with_column(split, np.zeros(len(split), np.float32)), column), labels=two)
    assert audit(odd).named("warn") == ["innocent"]


def test_nothing_is_changed(splits):
    before = {name: (s.matrix.copy(), {h: y.copy() for h, y in s.labels.items()}, list(s.features)) for name, s in splits.items()}
    audit(splits)
    for name, (matrix, labels, features) in before.items():
        assert np.array_equal(splits[name].matrix, matrix) and splits[name].features == features
        assert all(np.array_equal(splits[name].labels[h], y) for h, y in labels.items())


HONEST = dict(rows=(2_500, 2_000, 200), horizons=(5,), models=("logistic_regression",))


def test_an_honest_pipeline_passes_and_can_be_stored():
    result = selftest(**HONEST, seed=11)
    assert result.ok and result.table.n[0] > 1_900 and result.table.future[0].n == result.table.prefix[0].n
    assert json.loads(json.dumps(result.to_dict()))["ok"] and "nothing found" in repr(result) and "<b>" in result._repr_html_()


def centred(bars): return pd.DataFrame(dict(smooth=bars.groupby("symbol").close.transform(lambda c: c.rolling(5, center=True).mean().bfill().ffill() / c - 1)))
def standardised(bars): return pd.DataFrame(dict(z=bars.groupby("symbol").close.transform(lambda c: (c - c.mean()) / c.std())))
def harmless(bars): return pd.DataFrame(dict(mine=bars.groupby("symbol").close.transform(lambda c: c / c.rolling(7, min_periods=1).mean() - 1)))


@pytest.mark.parametrize("features, caught", [(centred, ["smooth"]), (standardised, ["z"]), (harmless, [])])
def test_features_of_ones_own_are_proven(features, caught): assert peeking_features(features) == caught


def test_a_leaking_feature_is_an_alarm_of_audit_and_models():
    result = selftest(**HONEST | dict(rows=(6_000, 6_000, 200)), features=centred)
    assert result.peeking == ["smooth"] and result.audit.named() == ["smooth"] and result.table.alarm.all() and len(result.problems) == 3


@pytest.fixture(scope="module")
def nothing(tmp_path_factory): return null_splits(tmp_path_factory.mktemp("market") / "null", (5,), seed=12, rows=(1_500, 900, 200))


@pytest.fixture
def cheaters():
    from modelfactory.models.classical.logistic_regression import LogisticRegressionModel

    class ByTheBatch(LogisticRegressionModel):
        "Standardises by the batch."
        def predict(self, X, metadata): return super().predict(np.asarray(X) - np.asarray(X).mean(0), metadata)

    class ReachesPast(LogisticRegressionModel):
        "Reads behind its window."
        def predict(self, X, metadata): return super().predict(X.base[np.minimum(X.ends + 6, len(X.base) - 1)], metadata)

    class LastClose(LogisticRegressionModel):
        "Follows the last close it is shown."
        def predict(self, X, metadata): return super().predict(np.asarray(X) * np.float32(metadata["close"].iloc[-1]), metadata)

    return {c.__name__: ModelRegistry.register(c.__name__.lower(), family="example")(c) for c in (ByTheBatch, ReachesPast, LastClose)}


def trained(model, folder, **config):
    trainer = Trainer(dict(model=model, horizon=5, data=str(folder), config=config))
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["bythebatch", "reachespast", "lastclose"])
def test_a_cheater_is_caught_by_another_future_and_by_a_prefix(cheaters, nothing, name):
    trainer = trained(name, nothing)
    for test in (future_perturbation(trainer), prefix_test(trainer)):
        assert not test.ok and test.moved and test.largest > 1e-5 and test.first.startswith("SYN")


@pytest.mark.parametrize("model, config", [("lightgbm", dict(n_rounds=20)), ("gru", dict(sequence_length=16, hidden_size=8, n_layers=1, max_epochs=1))])
def test_honest_models_stay_with_what_they_said(nothing, model, config):
    trainer = trained(model, nothing, **config)
    assert future_perturbation(trainer).ok and prefix_test(trainer).ok
    assert future_perturbation(trainer.model, trainer.datasets["val"]).n == future_perturbation(trainer).n


def test_the_level_of_the_intervals_counts_the_models():
    result = selftest(models=("logistic_regression",), horizons=(5, 20), rows=(2_000, 1_500, 200), alpha=.02)
    assert result.level == pytest.approx(.99) and len(result.table) == 2
