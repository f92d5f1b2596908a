"The drift warning of `predict`: silent on stretches of train itself, whatever their length, and raised by a shift."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from modelfactory.data.bundled import resolve_data
from modelfactory.data.explore import PSI_ALERT, SEGMENT_LENGTHS, feature_bins, population_stability_index
from modelfactory.data.splits import Split, read_splits
from modelfactory.runs.predict import prediction_warnings


@pytest.fixture(scope="module", params=["eurusd", "planted"])
def train(request):
    return read_splits(resolve_data(request.param))["train"]


@pytest.fixture(scope="module")
def known(train):
    return json.loads(json.dumps(feature_bins(train)))


def stretch(split, start, bars, symbol=0):
    "Some bars in a row of one symbol."
    rows = np.flatnonzero(split.codes == symbol)[start : start + bars]
    return replace(
        split, matrix=split.matrix[rows], codes=split.codes[rows], datetimes=split.datetimes[rows], labels={}, market={}
    )


def stretches(split, bars, n=60):
    "Stretches at random places of all symbols."
    rng = np.random.default_rng(bars)
    symbols = rng.integers(0, len(split.symbols), n)
    return [stretch(split, rng.integers(0, (split.codes == s).sum() - bars), bars, s) for s in symbols]


def unlike(split, known):
    table = population_stability_index(split, known)
    return table.feature[table["index"] > table.limit].tolist()


def warnings_of(split, known):
    "The sentences of `predict` on bars."
    frame = pd.DataFrame(index=range(len(split)))
    frame.attrs |= dict(
        skipped={},
        unseen=[],
        drift=population_stability_index(split, known).to_dict("records"),
        limits=known.get("lengths", []),
    )
    return prediction_warnings(frame)[1:]


@pytest.mark.parametrize("bars", [25, 61, 130, 400])
def test_stretches_of_train_are_like_train(train, known, bars):
    "A fixed limit of .25 names a feature in every draw of 61 bars."
    parts = stretches(train, bars)
    fixed = [(population_stability_index(part, known)["index"] > PSI_ALERT).any() for part in parts]
    named = [bool(warnings_of(part, known)) for part in parts]
    assert np.mean(fixed) > 0.9
    assert np.mean(named) <= 0.05


@pytest.mark.parametrize("feature", ["ret_1", "body"])
def test_a_feature_moved_by_two_standard_deviations_is_named(train, known, feature):
    j = train.features.index(feature)
    for part in stretches(train, 61, n=12):
        matrix = part.matrix.copy()
        matrix[:, j] += 2 * train.matrix[:, j].std()
        assert feature in unlike(replace(part, matrix=matrix), known)


def test_a_persistent_feature_moved_by_two_standard_deviations_is_named_in_a_long_stretch(train, known):
    j = train.features.index("log_atr")
    parts = stretches(train, 1_500, n=12)
    for part in parts:
        part.matrix[:, j] += 2 * train.matrix[:, j].std()
    assert np.mean(["log_atr" in unlike(part, known) for part in parts]) > 0.8


@pytest.mark.parametrize("bars", [12, 61, 400])
def test_features_that_were_not_scaled_are_named(train, known, bars):
    part = stretch(train, 200, bars)
    (sentence,) = warnings_of(replace(part, matrix=part.matrix * 50 + 10), known)
    assert sentence.startswith("MOST FEATURES ARE UNLIKE TRAIN")


def test_a_few_bars_are_not_judged(train, known):
    assert warnings_of(stretch(train, 300, SEGMENT_LENGTHS[0] - 1), known) == [
        "too few bars to check features for drift: fewer than 19 for each symbol"
    ]
    assert population_stability_index(stretch(train, 300, 12), known).limit.isna().all()


def test_runs_without_limits_are_not_judged(train, known):
    "What runs of earlier versions stored."
    old = dict(
        symbols=known["symbols"],
        features={f: {k: v for k, v in b.items() if k != "limits"} for f, b in known["features"].items()},
    )
    assert warnings_of(stretch(train, 300, 61), old) == ["the run stored no limits, so drift is not checked"]


def test_bars_of_all_symbols_together_are_like_train():
    train = read_splits(resolve_data("planted"))["train"]
    known = feature_bins(train)
    for start in range(0, 5_000, 250):
        parts = [stretch(train, start, 61, s) for s in range(len(train.symbols))]
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("matrix", "codes")}
        assert not unlike(replace(parts[0], **joined, datetimes=parts[0].datetimes.append(parts[1].datetimes)), known)


def slow_index(x, train):
    "Deciles, shares, and two bins beyond train, value by value."
    edges = [-np.inf, train.min(), *np.unique(np.quantile(train, np.arange(1, 10) / 10)), train.max(), np.inf]

    def inside(v, i):
        return v < edges[1] if i == 0 else edges[i] <= v <= edges[i + 1] if i == 1 else edges[i] < v <= edges[i + 1]

    def share(values, i):
        return sum(inside(v, i) for v in values) / len(values)

    pairs = [[max(share(values, i), 0.5 / len(x)) for values in (x, train)] for i in range(len(edges) - 1)]
    return sum((a - e) * np.log(a / e) for a, e in pairs)


@pytest.mark.parametrize("seed", range(3))
def test_the_index_is_that_of_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    matrix = np.c_[rng.normal(size=400), rng.integers(0, 4, 400), np.zeros(400), rng.normal(size=400).cumsum()].astype(
        np.float32
    )
    names = ["normal", "integer", "constant", "walk"]
    times = pd.date_range("2024", periods=400, freq="h")
    split = Split("train", "memory", matrix, names, times, np.zeros(400, int), ["A"], {}, {}, {}, {})
    known = feature_bins(split)
    part = replace(
        split, matrix=(matrix[100:170] * 1.3).astype(np.float32), codes=split.codes[100:170], datetimes=times[100:170]
    )
    table = population_stability_index(part, known).set_index("feature")
    for j, name in enumerate(names):
        assert table["index"][name] == pytest.approx(
            slow_index(part.matrix[:, j].astype(float), matrix[:, j].astype(float)), abs=1e-4
        )


def test_missing_values_and_short_symbols():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(60, 2)).astype(np.float32)
    matrix[::3, 0], matrix[:, 1] = np.nan, np.nan
    codes = np.repeat([0, 1, 2], [40, 12, 8])
    split = Split(
        "train",
        "memory",
        matrix,
        ["holes", "empty"],
        pd.date_range("2024", periods=60, freq="h"),
        codes,
        ["A", "B", "C"],
        {},
        {},
        {},
        {},
    )
    known = feature_bins(split)
    assert known["lengths"] == [19]
    assert not unlike(stretch(split, 0, 30), known)
    short = replace(split, matrix=matrix[40:], codes=codes[40:], datetimes=split.datetimes[40:])
    assert feature_bins(short)["lengths"] == []


def test_what_a_run_stores_is_small(train, known):
    assert len(json.dumps(known)) < 700 * len(train.features)
