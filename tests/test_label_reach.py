"Labels that are decided later than their horizon are not used too early, and `label_reach` gives the delay."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfactory.data.labels import triple_barrier
from modelfactory.data.readers import check_bars
from modelfactory.data.splits import NO_TARGET, label_reach, read_split
from modelfactory.evaluation.baselines import last_known_labels, persistence_predictions

pytestmark = pytest.mark.no_cover  # line counting slows thousands of small calls by half


def random_walk(n, seed=0, drift=0.0):
    "Bars of a random walk, six steps per bar."
    rng = np.random.default_rng(seed)
    steps = rng.normal(drift / 6, 1e-3 / 6**0.5, (n, 6)).cumsum(1)
    start = np.r_[0, steps[:-1, -1].cumsum()]
    path = np.exp(start[:, None] + np.c_[np.zeros(n), steps])
    times = pd.date_range("2024", periods=n, freq="h")
    prices = dict(open=path[:, 0], high=path.max(1), low=path.min(1), close=path[:, -1])
    return check_bars(pd.DataFrame(dict(datetime=times, symbol="A", **prices, volume=1.0)))


def slow_labels(n=6_000, k=3.5, max_bars=15, seed=0):
    "Labels of horizon 5 that are decided up to `max_bars` later, and their metadata."
    bars = random_walk(n, seed)
    labels = triple_barrier(bars, 5, k, k, max_bars)
    defined = labels.label_h5 > -99
    metadata = pd.DataFrame(dict(datetime=bars.datetime, symbol="A", horizon=5, label_bars=labels.bars_to_hit_h5))
    return labels.label_h5[defined].to_numpy(), metadata[defined].reset_index(drop=True)


def directional_accuracy(y_pred, y):
    "Accuracy over rows where prediction and label have a sign."
    both = (y_pred != 0) & (y != 0)
    return (y_pred[both] == y[both]).mean()


def test_persistence_uses_no_label_before_it_is_decided():
    """On a random walk, labels of horizon 5 are decided up to 15 bars later.

    If the horizon is used as their reach, persistence has an accuracy of about 0.8."""
    with_look_ahead, closed = [], []
    for seed in range(3):
        y, metadata = slow_labels(seed=seed)
        y_train, y_test = y[:4_000], y[4_000:]
        for accuracies, rows in ((closed, metadata), (with_look_ahead, metadata.drop(columns="label_bars"))):
            y_pred = persistence_predictions(y_train, rows[:4_000], y_test, rows[4_000:]).predictions
            accuracies.append(directional_accuracy(y_pred, y_test))
    assert np.mean(with_look_ahead) > 0.75
    assert np.mean(closed) < 0.58


def naive_last_known(y, metadata, gap):
    "The newest label that is decided at each row, by a loop over rows."
    last_labels = np.full(len(y), np.nan)
    for symbol in metadata.symbol.unique():
        rows = metadata.index[metadata.symbol == symbol]
        rows = rows[np.argsort(metadata.datetime[rows], kind="stable")]
        for t in range(len(rows)):
            decided = [j for j in range(t) if j + metadata.label_bars[rows[j]] <= t - gap]
            if decided:
                last_labels[rows[t]] = y[rows[max(decided)]]
    return last_labels


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.integers(1, 9)), min_size=1, max_size=40),
    st.sampled_from([0, 1]),
    st.randoms(),
)
def test_the_newest_decided_label_equals_that_of_a_naive_loop(rows, gap, random):
    times = pd.date_range("2024", periods=len(rows), freq="h").tolist()
    random.shuffle(times)
    symbols, label_bars = [s for s, _ in rows], [b for _, b in rows]
    metadata = pd.DataFrame(dict(datetime=times, symbol=symbols, horizon=5, label_bars=label_bars))
    y = np.arange(len(rows))
    assert np.array_equal(last_known_labels(y, metadata, gap), naive_last_known(y, metadata, gap), equal_nan=True)


def test_labels_that_are_not_decided_have_no_effect():
    y, metadata = slow_labels(n=3_000)
    cut = 2_000
    before = persistence_predictions(y[:cut], metadata[:cut], y[cut:], metadata[cut:])
    for t in np.random.default_rng(0).integers(20, len(y) - cut, 30):
        undecided = np.arange(len(y)) + metadata.label_bars > cut + t - 1
        other = np.where(undecided, 0, y)
        after = persistence_predictions(other[:cut], metadata[:cut], other[cut:], metadata[cut:])
        assert (after.predictions[: t + 1] == before.predictions[: t + 1]).all()


def test_rows_without_a_label_do_not_shift_the_newest_decided_label():
    y, metadata = slow_labels(n=2_000)
    position = np.arange(len(y))
    kept = np.sort(np.random.default_rng(1).choice(len(y), 1_200, replace=False))
    last_labels = last_known_labels(position[kept], metadata.iloc[kept].reset_index(drop=True))
    defined = ~np.isnan(last_labels)
    row = last_labels[defined].astype(int)
    assert defined.sum() > 1_000
    assert (row + metadata.label_bars.to_numpy()[row] <= kept[defined] - 1).all()


def test_the_reach_is_that_of_the_slowest_label():
    frame = pd.DataFrame(
        dict(datetime=pd.date_range("2024", periods=6, freq="h"), symbol="A", x=0.0, label_h5=[1, -1, 0, 1, 1, -99])
    )
    assert label_reach(read_split(frame), 5) == 5
    split = read_split(frame.assign(bars_to_hit_h5=[2, 15, 8, 3, 1, 40]))
    assert split.labels[5][-1] == NO_TARGET and label_reach(split, 5) == 15
    assert label_reach(read_split(frame.assign(label_h5=-99, bars_to_hit_h5=7)), 5) == 5
