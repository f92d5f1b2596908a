"""Uniqueness of labels against a loop over bars, the snippets of the book and mlfinpy; the weights of every family."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folds import panel
from typer.testing import CliRunner

from modelfactory import ModelRegistry, Trainer
from modelfactory.configuration import ConfigError
from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.folds import walk_forward
from modelfactory.data.splits import SplitsError, read_split, split_effective_samples
from modelfactory.data.uniqueness import average_uniqueness, label_concurrency, label_uniqueness
from modelfactory.models.base import BaseModel, ModelConfig, training_weights
from modelfactory.models.conformance import planted_task
from modelfactory.models.params import resolve_config
from modelfactory.training.trainer import overlap_note


def spans_of(frame, ds):
    "The set of (symbol, bar) of each sample's label, from the rows of the file: a loop over symbols and bars."
    h, spans = ds.horizon, []
    bars_of = {s: f.sort_values("datetime").reset_index(drop=True) for s, f in frame.groupby("symbol")}
    for t, s in zip(ds.metadata.datetime, ds.metadata.symbol, strict=True):
        bars = bars_of[s]
        i = int(bars.datetime.searchsorted(t))
        hit = bars.get(f"bars_to_hit_h{h}", pd.Series(h, bars.index))[i]
        spans.append({(s, i + j) for j in range(1, (h if np.isnan(hit) else int(hit)) + 1)})
    return spans


def slow_uniqueness(spans):
    "Mean of 1 / concurrency over the bars of each label, by a loop over bars."
    counts = {}
    for span in spans:
        for bar in span:
            counts[bar] = counts.get(bar, 0) + 1
    return np.array([np.mean([1 / counts[bar] for bar in span]) for span in spans]), counts


@pytest.mark.no_cover
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_symbols=st.integers(1, 3),
    horizon=st.integers(1, 9),
    with_hits=st.booleans(),
    undefined=st.sampled_from([0.0, 0.3, 0.8]),
    seq_len=st.sampled_from([1, 4]),
)
def test_uniqueness_of_a_dataset_equals_a_loop_over_bars(seed, n_symbols, horizon, with_hits, undefined, seq_len):
    frame = panel(seed, ["around_the_clock"] * n_symbols, 3, horizon, with_hits, undefined)
    frame = frame.groupby("symbol").head(60)
    try:
        ds = TimeSeriesDataset(read_split(frame), horizon, seq_len)
    except SplitsError:
        return  # no sample
    spans = spans_of(frame, ds)
    expected, counts = slow_uniqueness(spans)
    assert np.allclose(label_uniqueness(ds.metadata), expected, rtol=1e-12)
    table = label_concurrency(ds.metadata)
    assert {(r.symbol, r.bar): r.concurrency for r in table.itertuples() if r.concurrency} == counts
    rows = np.random.default_rng(seed).random(len(ds)) < 0.5  # the given rows decide the concurrency
    part = slow_uniqueness([span for span, keep in zip(spans, rows, strict=True) if keep])[0]
    assert np.allclose(label_uniqueness(ds.metadata[rows]), part)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 80), horizon=st.integers(1, 20))
def test_uniqueness_is_invariant_and_bounded(seed, n, horizon):
    rng = np.random.default_rng(seed)
    bar, length, symbol = rng.integers(0, 100, n), rng.integers(1, horizon + 1, n), rng.integers(0, 3, n)
    u, order = average_uniqueness(bar, length, symbol), rng.permutation(n)
    assert np.allclose(average_uniqueness(bar[order], length[order], symbol[order]), u[order])
    assert np.allclose(average_uniqueness(bar + 7, length, symbol * 10), u)
    assert (u > 0).all() and (u <= 1 + 1e-12).all()
    twice = average_uniqueness(np.r_[bar, bar], np.r_[length, length], np.r_[symbol, symbol])
    assert np.isclose(twice.sum(), u.sum())  # a second copy of all labels adds no information


def book_snippets(index, t1):
    "Snippets 4.1 and 4.2 of Lopez de Prado 2018, pages 60 and 62, on one molecule: spans include both ends."
    count = pd.Series(0, index)
    for first, last in t1.items():
        count.loc[first:last] += 1
    return count, pd.Series({first: (1.0 / count.loc[first:last]).mean() for first, last in t1.items()})


# computed with `num_concurrent_events` and `_get_average_uniqueness` of mlfinpy 0.1.2; RiskLabAI 2.0.1 gives the same
BARS, LENGTHS = [0, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14], [10, 18, 9, 3, 16, 20, 20, 19, 8, 15, 20, 12]
MLFINPY_COUNTS = [0, 1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 6, 7, 7, 8, 9, 9, 9, 9, 9, 8, 7, 6, 6, 6, 6, 6, 5, 3, 1, 1, 1, 1, 1]
MLFINPY = [0.399286, 0.1806, 0.200265, 0.216667, 0.144395, 0.147183]
MLFINPY += [0.153849, 0.153175, 0.120784, 0.14164, 0.365754, 0.138062]


def test_uniqueness_equals_mlfinpy_and_the_book():
    "A label of bar i depends on the returns of bars i+1 to i+k: this is the span, with both ends, that they get."
    u = average_uniqueness(BARS, LENGTHS, ["A"] * len(BARS))
    assert np.allclose(u, MLFINPY, atol=5e-7)
    table = label_concurrency(pd.DataFrame(dict(bar=BARS, label_bars=LENGTHS, symbol="A")))
    assert dict(zip(table.bar, table.concurrency, strict=True)) == dict(list(enumerate(MLFINPY_COUNTS))[1:])
    index = pd.date_range("2024-01-01", periods=40, freq="h")
    t1 = pd.Series(index[np.add(BARS, LENGTHS)], index[np.add(BARS, 1)])
    assert np.allclose(book_snippets(index, t1)[1], u)
    inclusive = book_snippets(index, pd.Series(t1.to_numpy(), index[BARS]))[1]
    assert not np.allclose(inclusive, u, atol=0.01)  # spans that include bar i give other numbers


def overlapping(n=300, F=3, seq_len=1):
    "A planted task whose labels overlap by numbers of bars that differ from row to row."
    task, rng = planted_task(n=n, F=F, seq_len=seq_len), np.random.default_rng(0)
    for meta in (task.meta, task.meta_val):
        meta["bar"], meta["label_bars"] = np.arange(len(meta)), rng.integers(1, 9, len(meta))
    return task


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_weights_are_the_product_with_class_weights_and_have_mean_one(class_weight):
    task = overlapping()
    keep = (task.y == 1) | (np.arange(len(task.y)) % 3 == 0)
    y, meta = task.y[keep], task.meta[keep]
    config = dict(sample_weight="uniqueness", class_weight=class_weight)
    model = ModelRegistry.create("logistic_regression", config, 5, task.features)
    spans = [{("A", b + j) for j in range(1, k + 1)} for b, k in zip(meta.bar, meta.label_bars, strict=True)]
    expected = slow_uniqueness(spans)[0]
    if class_weight:
        expected = expected / np.array([(y == value).sum() for value in y])
    w = training_weights(model, y + 1, meta)
    assert np.allclose(w, expected / expected.mean(), rtol=1e-5) and w.mean() == pytest.approx(1, abs=1e-6)
    assert w.std() > 0.1


SMALL = dict(
    logistic_regression={},
    random_forest=dict(n_estimators=5),
    svm={},
    xgboost=dict(n_rounds=5),
    lightgbm=dict(n_rounds=5),
    catboost=dict(n_rounds=5),
    average=dict(members={"logistic_regression": {}, "lightgbm": dict(n_rounds=5)}),
    gru=dict(sequence_length=4, max_epochs=1, hidden_size=4),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_family_fits_uniqueness_like_a_column_with_the_same_weights(name):
    task, probabilities = overlapping(seq_len=SMALL[name].get("sequence_length", 1)), {}
    for meta in (task.meta, task.meta_val):
        meta["sample_weight"] = label_uniqueness(meta)
    for value in ("column", "uniqueness", None):
        model = ModelRegistry.create(name, SMALL[name] | dict(sample_weight=value), 5, task.features)
        model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
        probabilities[value] = model.predict(task.X_val, task.meta_val).probabilities
    assert np.array_equal(probabilities["uniqueness"], probabilities["column"])
    assert not np.array_equal(probabilities["uniqueness"], probabilities[None])


def test_calibration_weights_its_rows_by_uniqueness():
    task, temperatures = overlapping(), {}
    task.meta["sample_weight"] = label_uniqueness(task.meta)
    for value in ("uniqueness", None):
        config = dict(calibration="temperature", sample_weight=value)
        model = ModelRegistry.create("logistic_regression", config, 5, task.features)
        model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
        temperatures[value] = model.calibration.temperature
    assert temperatures["uniqueness"] != temperatures[None]


@dataclass
class WeighsNothingConfig(ModelConfig):
    pass


class WeighsNothing(BaseModel):
    "A plugin that cannot weight rows."

    Config, supported_weights, name = WeighsNothingConfig, (), "weighs_nothing"

    def fit(self, *args, **kw):
        raise AssertionError("not reached")

    predict = save = load = fit


@pytest.mark.parametrize("value", ["column", "uniqueness"])
def test_a_model_that_cannot_weight_says_so_before_training(value):
    with pytest.raises(ConfigError, match=f"sample_weight = '{value}'.*cannot weight.*expected None.*training_weights"):
        WeighsNothing(dict(sample_weight=value), 5, ["a"])


def test_a_grid_and_an_ensemble_check_it_as_well(monkeypatch):
    monkeypatch.setattr(ModelRegistry.get("svm"), "supported_weights", ("column",))
    with pytest.raises(ConfigError, match="svm: sample_weight = 'uniqueness'.*expected 'column' or None"):
        resolve_config("svm", 5, None, dict(sample_weight="uniqueness"))
    with pytest.raises(ConfigError, match="svm: sample_weight = 'uniqueness'"):
        ModelRegistry.create("average", dict(members=dict(svm={}), sample_weight="uniqueness"), 5, ["a"])


@pytest.mark.parametrize("drop, text", [("bar", "no column bar"), (None, "needs metadata; found None")])
def test_missing_metadata_names_what_is_missing(drop, text):
    task = overlapping()
    meta = task.meta.drop(columns=drop) if drop else None
    model = ModelRegistry.create("logistic_regression", dict(sample_weight="uniqueness"), 5, task.features)
    with pytest.raises(ValueError, match=f"logistic_regression: sample_weight='uniqueness'.*{text}"):
        model.fit(task.X, task.y, task.X_val, task.y_val, meta, task.meta_val)


def test_the_check_and_the_note_of_a_run_state_the_effective_number_of_samples():
    from modelfactory.cli import app

    trainer = Trainer(dict(model="logistic_regression", horizon=20, data="planted", preset="quick"))
    report, val = trainer.prepare_data(), trainer.datasets["val"]
    row = report.labels.query("split == 'val' and horizon == 20").iloc[0]
    assert row.effective_samples == round(split_effective_samples(val.split, 20))
    assert len(val) / 20 < row.effective_samples < len(val) / 4  # labels are decided after 4 to 20 bars on average
    note = overlap_note(val)
    assert note in trainer.notes() and f"{len(val):,} rows" in note
    assert f"{label_uniqueness(val.metadata).sum():,.0f};" in note
    assert report.to_dict()["labels"][0]["effective_samples"] > 0
    done = CliRunner().invoke(app, ["check", "planted"])
    assert "effective_samples" in done.output and str(row.effective_samples) in done.output


def test_labels_of_one_bar_give_no_note():
    frame = panel(0, ["around_the_clock"], 2, 1, False, 0.0)
    ds = TimeSeriesDataset(read_split(frame), 1)
    assert overlap_note(ds) is None and np.allclose(label_uniqueness(ds.metadata), 1)


def test_a_fold_has_its_own_concurrency():
    frame = panel(3, ["around_the_clock"], 20, 5, False, 0.0)
    ds = TimeSeriesDataset(read_split(frame), 5)
    fold = walk_forward(ds, 2)[0]
    inside = label_uniqueness(ds.metadata.iloc[fold.train])
    whole = label_uniqueness(ds.metadata)[fold.train]
    assert (inside >= whole - 1e-12).all() and inside[-1] > whole[-1] and np.allclose(inside[5:-10], whole[5:-10])
