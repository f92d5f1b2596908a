"The drift warning of `predict`: absent for segments of train of any length, present after a shift."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from modelfactory.data.bundled import resolve_data
from modelfactory.data.explore import PSI_ALERT, SEGMENT_LENGTHS, feature_bins, population_stability_index
from modelfactory.data.splits import Split, read_splits
from modelfactory.runs.predict import prediction_warnings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["eurusd", "planted"])
def train(request):
    return read_splits(resolve_data(request.param))["train"]


@pytest.fixture(scope="module")
def train_bins(train):
    return json.loads(json.dumps(feature_bins(train)))


def segment(split, start, bars, symbol=0):
    "Consecutive bars of one symbol."
    rows = np.flatnonzero(split.codes == symbol)[start : start + bars]
    return replace(
        split, matrix=split.matrix[rows], codes=split.codes[rows], datetimes=split.datetimes[rows], labels={}, market={}
    )


def random_segments(split, bars, n=60):
    "Segments of all symbols with random starts."
    rng = np.random.default_rng(bars)
    symbols = rng.integers(0, len(split.symbols), n)
    return [segment(split, rng.integers(0, (split.codes == s).sum() - bars), bars, s) for s in symbols]


def drifted(split, train_bins):
    "Features whose index is above their limit."
    table = population_stability_index(split, train_bins)
    return table.feature[table["index"] > table.limit].tolist()


def warnings_of(split, train_bins):
    "The warnings of `predict` on bars."
    frame = pd.DataFrame(index=range(len(split)))
    frame.attrs |= dict(
        skipped={},
        unseen=[],
        drift=population_stability_index(split, train_bins).to_dict("records"),
        limits=train_bins.get("lengths", []),
    )
    return prediction_warnings(frame)[1:]


@pytest.mark.parametrize("bars", [25, 61, 130, 400])
def test_segments_of_train_give_no_warning(train, train_bins, bars):
    "A fixed limit of .25 would report a feature in nearly every segment."
    parts = random_segments(train, bars)
    fixed = [(population_stability_index(part, train_bins)["index"] > PSI_ALERT).any() for part in parts]
    warned = [bool(warnings_of(part, train_bins)) for part in parts]
    assert np.mean(fixed) > 0.9
    assert np.mean(warned) <= 0.05


@pytest.mark.parametrize("feature", ["ret_1", "body"])
def test_a_feature_moved_by_two_standard_deviations_is_reported(train, train_bins, feature):
    j = train.features.index(feature)
    for part in random_segments(train, 61, n=12):
        matrix = part.matrix.copy()
        matrix[:, j] += 2 * train.matrix[:, j].std()
        assert feature in drifted(replace(part, matrix=matrix), train_bins)


def test_a_persistent_feature_moved_by_two_standard_deviations_is_reported_in_a_long_segment(train, train_bins):
    j = train.features.index("log_atr")
    parts = random_segments(train, 1_500, n=12)
    for part in parts:
        part.matrix[:, j] += 2 * train.matrix[:, j].std()
    assert np.mean(["log_atr" in drifted(part, train_bins) for part in parts]) > 0.8


@pytest.mark.parametrize("bars", [12, 61, 400])
def test_unscaled_features_are_reported(train, train_bins, bars):
    part = segment(train, 200, bars)
    (sentence,) = warnings_of(replace(part, matrix=part.matrix * 50 + 10), train_bins)
    assert sentence.startswith("MOST FEATURES ARE UNLIKE TRAIN")


def test_too_few_bars_have_no_limit(train, train_bins):
    assert warnings_of(segment(train, 300, SEGMENT_LENGTHS[0] - 1), train_bins) == [
        "too few bars to check features for drift: fewer than 19 for each symbol"
    ]
    assert population_stability_index(segment(train, 300, 12), train_bins).limit.isna().all()


def test_runs_without_stored_limits_report_no_drift(train, train_bins):
    "Runs of earlier versions stored bins without limits."
    old = dict(
        symbols=train_bins["symbols"],
        features={f: {k: v for k, v in b.items() if k != "limits"} for f, b in train_bins["features"].items()},
    )
    assert warnings_of(segment(train, 300, 61), old) == ["the run stored no limits, so drift is not checked"]


def test_segments_of_all_symbols_together_are_not_reported():
    train = read_splits(resolve_data("planted"))["train"]
    train_bins = feature_bins(train)
    for start in range(0, 5_000, 250):
        parts = [segment(train, start, 61, s) for s in range(len(train.symbols))]
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("matrix", "codes")}
        assert not drifted(
            replace(parts[0], **joined, datetimes=parts[0].datetimes.append(parts[1].datetimes)), train_bins
        )


def slow_index(x, train):
    "The index from deciles and two bins outside train, computed value by value."
    edges = [-np.inf, train.min(), *np.unique(np.quantile(train, np.arange(1, 10) / 10)), train.max(), np.inf]

    def inside(v, i):
        if i == 0:
            return v < edges[1]
        return (edges[i] <= v if i == 1 else edges[i] < v) and v <= edges[i + 1]

    def share(values, i):
        return sum(inside(v, i) for v in values) / len(values)

    pairs = [[max(share(values, i), 0.5 / len(x)) for values in (x, train)] for i in range(len(edges) - 1)]
    return sum((a - e) * np.log(a / e) for a, e in pairs)


@pytest.mark.parametrize("seed", range(3))
def test_the_index_equals_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=400), rng.integers(0, 4, 400), np.zeros(400), rng.normal(size=400).cumsum()
    matrix = np.column_stack(columns).astype(np.float32)
    names = ["normal", "integer", "constant", "walk"]
    times = pd.date_range("2024", periods=400, freq="h")
    split = Split("train", "memory", matrix, names, times, np.zeros(400, int), ["A"], {}, {}, {}, {})
    train_bins = feature_bins(split)
    part = replace(
        split, matrix=(matrix[100:170] * 1.3).astype(np.float32), codes=split.codes[100:170], datetimes=times[100:170]
    )
    table = population_stability_index(part, train_bins).set_index("feature")
    for j, name in enumerate(names):
        slow = slow_index(part.matrix[:, j].astype(float), matrix[:, j].astype(float))
        assert table["index"][name] == pytest.approx(slow, abs=1e-4)


def test_missing_values_and_short_symbols():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(60, 2)).astype(np.float32)
    matrix[::3, 0], matrix[:, 1] = np.nan, np.nan
    codes = np.repeat([0, 1, 2], [40, 12, 8])
    times = pd.date_range("2024", periods=60, freq="h")
    split = Split("train", "memory", matrix, ["holes", "empty"], times, codes, ["A", "B", "C"], {}, {}, {}, {})
    train_bins = feature_bins(split)
    assert train_bins["lengths"] == [19]
    assert not drifted(segment(split, 0, 30), train_bins)
    short = replace(split, matrix=matrix[40:], codes=codes[40:], datetimes=split.datetimes[40:])
    assert feature_bins(short)["lengths"] == []


def test_stored_bins_are_small(train, train_bins):
    assert len(json.dumps(train_bins)) < 700 * len(train.features)
