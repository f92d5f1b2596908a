"Recut: labels are purged by their true end, all layouts give one table, and no value changes unless asked."

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_models

from modelfactory.cli import main
from modelfactory.data.readers import check_bars
from modelfactory.data.recut import (
    LOGARITHMS,
    assign_splits,
    bars_to_end,
    labels_to_cut,
    read_labelled,
    recut_splits,
    unscale,
)
from modelfactory.data.splits import SPLIT_ORDER, SplitsError, check_splits, read_splits
from modelfactory.data.writer import bars_to_splits
from modelfactory.training.trainer import Trainer

ROWS = 240  # bars of each symbol


def labelled(symbols=("EURUSD", "GC", "600306"), seed=0):
    "Irregular bars of several symbols with labels of two horizons and columns of every role, by symbol and time."
    rng, parts = np.random.default_rng(seed), []
    hours = pd.date_range("2021-01-04", periods=ROWS * 3, freq="h", tz="UTC")
    for symbol in sorted(symbols):
        times = hours[np.sort(rng.choice(len(hours), ROWS, replace=False))]
        close = 1.2 * np.exp(np.cumsum(rng.normal(0, 0.001, ROWS)))
        frame = pd.DataFrame(dict(datetime=times, symbol=symbol))
        frame = frame.assign(open=close, high=close * 1.001, low=close * 0.999, close=close, volume=1.0)
        frame = frame.assign(split="train", session_id=np.arange(ROWS) // 7, missing_bar=0, roll_event=False)
        for h in (5, 20):
            label = rng.integers(-1, 2, ROWS)
            frame[f"label_h{h}"] = np.where(rng.random(ROWS) < 0.05, -99, label).astype(np.int8)
            frame[f"bars_to_hit_h{h}"] = rng.integers(1, 2 * h, ROWS).astype(np.int32)
            frame[f"sample_weight_h{h}"] = rng.random(ROWS)
        frame["adx"] = rng.normal(25, 5, ROWS).astype(np.float32)  # the name of a feature that the package computes
        frame["own"] = rng.normal(size=ROWS)
        frame["is_open"] = rng.random(ROWS) < 0.5
        frame["venue"] = "X"
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


TABLE = labelled()
CUT = dict(starts=("2021-01-20", "2021-01-27"))
SAME = [c for c in TABLE if c not in ("split", "label_h5", "label_h20")]  # columns that `recut_splits` never changes


def written(folder):
    "All rows of a folder of splits as one Arrow table, train first."
    return pa.concat_tables([pq.read_table(folder / f"{s}_scaled.parquet") for s in SPLIT_ORDER])


def write_parts(frame, folder, names):
    "Writes one parquet file for each (name, rows)."
    folder.mkdir(parents=True)
    for name, rows in names:
        frame[rows].to_parquet(folder / name, index=False)
    return folder


# The naive oracle


def naive_cut(keys, split, labels, bars, starts):
    "Mask of the labels to purge, by a loop over rows; `starts` are the first times that are too late, by split."
    cut = np.zeros(len(keys), bool)
    for i, (time, symbol) in enumerate(zip(keys["datetime"], keys["symbol"], strict=True)):
        if np.isnan(labels[i]) or split[i] not in starts:
            continue
        later = sorted(t for t, s in zip(keys["datetime"], keys["symbol"], strict=True) if s == symbol and t > time)
        cut[i] = bars[i] > len(later) or later[bars[i] - 1] >= starts[split[i]]
    return cut


@st.composite
def panels(draw):
    "Keys of up to three symbols on irregular calendars, by symbol and time, and the bars until each label ends."
    minutes = st.integers(0, 400)
    parts = []
    for symbol in "ABC"[: draw(st.integers(1, 3))]:
        times = sorted(draw(st.sets(minutes, min_size=8, max_size=25)))
        parts.append(pd.DataFrame(dict(datetime=pd.Timestamp("2024") + pd.to_timedelta(times, "min"), symbol=symbol)))
    keys = pd.concat(parts, ignore_index=True)
    n = len(keys)
    bars = np.array(draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)))
    labels = np.array(draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0, np.nan]), min_size=n, max_size=n)))
    return keys, bars, labels


@settings(max_examples=50, deadline=None)
@given(panels(), st.integers(0, 6), st.booleans())
def test_exactly_the_labels_that_end_too_late_are_purged(panel, embargo, in_bars):
    keys, bars, labels = panel
    split = assign_splits(keys["datetime"], (0.5, 0.25, 0.25))
    times = sorted(keys["datetime"].unique())
    starts = {}
    for earlier, later in (("train", "val"), ("val", "test")):
        first = keys["datetime"][split == later].min()
        before = times[max(0, times.index(first) - embargo)] if in_bars else first - pd.Timedelta(10 * embargo, "min")
        starts[earlier] = before
    cut = labels_to_cut(keys, split, labels, bars, embargo if in_bars else f"{10 * embargo} minutes")
    assert np.array_equal(cut, naive_cut(keys, split, labels, bars, starts))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1, 1, np.nan]), st.sampled_from([-99, 0, np.nan, 1, 3, 8])), min_size=1),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_a_label_without_its_number_of_bars_ends_with_the_slowest(rows, horizon, max_bars):
    labels, hits = map(np.array, zip(*rows, strict=True))
    numbers = [hit for label, hit in rows if hit > 0 and not np.isnan(label)]
    longest = max([horizon, max_bars or 0, *numbers])
    assert bars_to_end(labels, hits, horizon, max_bars).tolist() == [hit if hit > 0 else longest for _, hit in rows]


# Values


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    "The table, cut once."
    return recut_splits(TABLE, tmp_path_factory.mktemp("recut") / "cut", **CUT, embargo="3 hours")


def test_all_values_and_types_stay_except_split_and_purged_labels(cut):
    table = written(cut.output)
    frame = table.to_pandas().sort_values(["symbol", "datetime"], ignore_index=True)
    pd.testing.assert_frame_equal(frame[SAME], TABLE[SAME])
    source = pa.Table.from_pandas(TABLE)
    text = ["symbol", "split"]
    assert table.select(TABLE.columns.drop(text)).schema.equals(source.select(TABLE.columns.drop(text)).schema)
    starts = pd.DatetimeIndex([*CUT["starts"]], tz="UTC")
    assert frame["split"].tolist() == [SPLIT_ORDER[i] for i in starts.searchsorted(frame["datetime"], side="right")]
    for h in (5, 20):
        label, stored = frame[f"label_h{h}"], frame[f"label_before_purge_h{h}"]
        assert label.fillna(stored).astype(int).tolist() == TABLE[f"label_h{h}"].tolist()
        assert (label == -99).sum() == (TABLE[f"label_h{h}"] == -99).sum() and (stored == -99).sum() == 0
        rows = cut.labels[cut.labels.horizon == h]
        assert rows.purged.sum() == stored.notna().sum() > 0 and rows.purged.iloc[-1] == 0


def test_the_splits_are_accepted_and_only_features_are_features(cut):
    roles = check_splits(cut.output).roles.set_index("column").role
    assert sorted(roles.index[roles == "feature"]) == ["adx", "is_open", "own"]
    assert roles["label_before_purge_h5"] == roles["sample_weight_h20"] == "future"
    split = read_splits(cut.output)["train"]
    assert np.array_equal(split.matrix[:, split.features.index("adx")], TABLE["adx"][TABLE.datetime < "2021-01-20"])


@pytest.mark.parametrize("second", [dict(starts=("2021-01-14", "2021-01-21")), dict(shares=(0.8, 0.1, 0.1)), CUT])
def test_a_recut_of_a_recut_equals_the_direct_cut(cut, second, tmp_path):
    recut_splits(cut.output, tmp_path / "again", **second)
    recut_splits(TABLE, tmp_path / "direct", **second)
    again, direct = written(tmp_path / "again"), written(tmp_path / "direct")
    assert again.equals(direct.select(again.column_names)) and set(again.column_names) == set(direct.column_names)


def test_rows_outside_are_left_out_and_labels_of_the_edge_are_purged_by_the_bars_outside(tmp_path):
    report = recut_splits(TABLE, tmp_path / "cut", train_from="2021-01-10", until="2021-01-30", **CUT)
    frame = written(report.output).to_pandas()
    inside = TABLE[(TABLE.datetime >= "2021-01-10") & (TABLE.datetime < "2021-01-30")]
    assert len(frame) == len(inside) and report.labels.purged.iloc[2] == 0
    assert frame.datetime.min() == inside.datetime.min() and frame.datetime.max() == inside.datetime.max()


def test_a_model_trains_on_the_recut_folder(cut, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path))
    trainer = Trainer(dict(model="nearest", horizon=5, data=str(cut.output)))
    trainer.train()
    assert len(trainer.predict("val").predictions) > 50


# Layouts


def by_horizon(folder, change=None):
    "One folder for each horizon; `change` alters the frame of horizon 20."
    for h, other in ((5, 20), (20, 5)):
        frame = TABLE.drop(columns=[f"{c}_h{other}" for c in ("label", "bars_to_hit", "sample_weight")])
        frame = (change or (lambda f: f))(frame) if h == 20 else frame
        late = frame.datetime >= ("2021-01-20" if h == 5 else "2021-01-24")
        write_parts(frame, folder / f"h{h}", [("train.parquet", ~late), ("test.parquet", late)])
    return folder


def splits_folder(folder):
    thirds = pd.qcut(TABLE.datetime, 3, labels=False)
    return write_parts(TABLE, folder, [(f"{s}_scaled.parquet", thirds == i) for i, s in enumerate(SPLIT_ORDER)])


def symbol_files(folder):
    "One file for each symbol, without a column for it."
    return write_parts(
        TABLE.drop(columns="symbol"), folder, [(f"{s}.parquet", TABLE.symbol == s) for s in set(TABLE.symbol)]
    )


def csv_file(folder):
    folder.mkdir()
    TABLE.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def hive_parts(folder):
    TABLE.to_parquet(folder, partition_cols=["symbol"], index=False)
    return folder


LAYOUTS = {
    "frame": (lambda folder: TABLE.sample(frac=1, random_state=0), "one table"),
    "indexed frame": (lambda folder: TABLE.set_index(["datetime", "symbol"]), "one table"),
    "arrow": (lambda folder: pa.Table.from_pandas(TABLE), "one table"),
    "mapping": (lambda folder: {s: TABLE[TABLE.symbol == s] for s in set(TABLE.symbol)}, "3 tables"),
    "parquet": (lambda folder: write_parts(TABLE, folder, [("t.parquet", slice(None))]) / "t.parquet", "t.parquet"),
    "csv": (csv_file, "one table: table.csv"),
    "splits": (splits_folder, "splits that are joined again: train_scaled.parquet"),
    "symbol files": (symbol_files, "3 files of one table"),
    "hive parts": (hive_parts, "3 parquet parts"),
    "horizons": (by_horizon, "one folder for each horizon"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_table(layout, tmp_path):
    make, sentence = LAYOUTS[layout]
    table = read_labelled(make(tmp_path / "data"))
    assert sentence in table.layout and not table.notes
    frame = table.table.select(TABLE.columns.tolist()).to_pandas()
    if layout == "csv":
        frame = frame.astype({c: TABLE[c].dtype for c in TABLE if c not in ("datetime", "symbol")})
    compared = [c for c in TABLE if c != "split"]
    pd.testing.assert_frame_equal(frame[compared], TABLE[compared], check_dtype=layout != "csv", check_exact=True)


def test_labels_without_a_horizon_get_it_from_their_folder(tmp_path):
    frame = TABLE.rename(columns=dict(label_h5="label", bars_to_hit_h5="bars_to_hit"))
    frame = frame.drop(columns=[c for c in frame if c.endswith("_h20")])
    folder = write_parts(frame, tmp_path / "data/h5", [("train.parquet", slice(None))]).parent
    data = read_labelled(folder)
    assert data.layout.endswith("; the folder gives the horizon of label, bars_to_hit")
    table = data.table
    assert table["label_h5"].to_pylist() == TABLE["label_h5"].tolist() and "label" not in table.column_names


def test_scalers_that_differ_between_horizons_are_not_used(tmp_path):
    folder = by_horizon(tmp_path / "data")
    for name, text in dict(h5="{}", h20='{"version": "2.0"}').items():
        (folder / name / "feature_scaler.json").write_text(text)
    report = recut_splits(folder, tmp_path / "out", **CUT)
    assert "feature_scaler.json differs between the horizons: none is used or copied" in report.warnings
    assert not (report.output / "feature_scaler.json").exists()


def test_the_index_of_a_frame_is_no_feature(tmp_path):
    TABLE.set_index(TABLE.session_id.rename("number")).to_parquet(tmp_path / "t.parquet")
    data = read_labelled(tmp_path / "t.parquet")
    assert "number" not in data.table.column_names and data.layout.endswith(
        "index of a pandas frame left out: 'number'"
    )


def test_contradictions_between_horizons_are_named(tmp_path):
    folder = by_horizon(tmp_path / "data", lambda f: f.assign(own=f.own + (f.index == 7), session_id=0))
    with pytest.raises(
        SplitsError, match="2 shared columns contradict each other: session_id, own; session_id differs"
    ):
        recut_splits(folder, tmp_path / "out")


def test_a_row_of_one_horizon_only_stays_and_lacks_the_other_label(tmp_path):
    table = read_labelled(by_horizon(tmp_path / "data", lambda f: f[f.index != 7])).table.to_pandas()
    assert len(table) == len(TABLE) and table["label_h20"].isna().tolist() == [i == 7 for i in range(len(TABLE))]
    assert np.array_equal(table["own"], TABLE["own"])


# The scaler


def small_bars():
    rng, parts = np.random.default_rng(3), []
    for symbol in ("AAA", "BBB"):
        close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, 700)))
        spread = close * rng.uniform(0.001, 0.01, (2, 700))
        frame = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=700, freq="h"), symbol=symbol))
        parts.append(frame.assign(open=close, high=close + spread[0], low=close - spread[1], close=close, volume=1.0))
    return check_bars(pd.concat(parts))


@pytest.mark.filterwarnings("ignore:label_h5")  # few blocks
def test_rescaling_gives_the_features_and_the_scaler_of_a_direct_cut(tmp_path):
    starts = ("2024-01-22", "2024-01-26")
    first = bars_to_splits(small_bars(), tmp_path / "first", (5,))
    (first / "pipeline.json").write_text(json.dumps(dict(scaler=dict(ret_1=[7, 7]), version=1)))
    direct = read_splits(bars_to_splits(small_bars(), tmp_path / "direct", (5,), starts=starts), nan="keep")
    plain = recut_splits(first, tmp_path / "plain", starts=starts)
    times = read_labelled(first).keys["datetime"]
    in_val = (times >= starts[0]) & (times < starts[1])
    seen = (times[in_val] <= pd.read_parquet(first / "train_scaled.parquet").datetime.max()).mean()
    assert 0.1 < seen < 0.9
    assert any(f"and saw {seen:.1%} of the rows of val and 0.0% of the rows of test" in w for w in plain.warnings)
    assert json.loads((plain.output / "pipeline.json").read_text())["scaler"] == dict(ret_1=[7, 7])
    assert read_labelled(plain.output).fitted_on == read_labelled(first).fitted_on
    for source in (first, plain.output):  # the second source no longer has the rows of the old train as its train
        report = recut_splits(source, tmp_path / "out", starts=starts, rescale=True, overwrite=True)
        assert not any("scaler" in w for w in report.warnings)
        splits = read_splits(report.output)
        for name in ("train", "val"):
            scale = np.maximum(1, np.abs(direct[name].matrix))
            assert (np.abs(splits[name].matrix - direct[name].matrix) / scale).max() < 2e-5
        scalers = [json.loads((f / "feature_scaler.json").read_text()) for f in (report.output, tmp_path / "direct")]
        assert scalers[0]["warnings"] == scalers[1]["warnings"] and "fitted_on" not in scalers[0]
        kinds = [{n: (e["scaler_type"], e["category"]) for n, e in s["features"].items()} for s in scalers]
        assert kinds[0] == kinds[1]
        stats = scalers[0]["features"]["ret_1"]["train_stats"]
        pipeline = json.loads((report.output / "pipeline.json").read_text())
        assert pipeline == dict(scaler=dict(ret_1=[stats["center"], stats["scale"]]), version=1)


def stats_of(x, names=("min", "median", "max", "mean", "std", "iqr")):
    values = dict(min=x.min(), max=x.max(), mean=x.mean(), std=x.std(), median=np.median(x))
    values["iqr"] = np.subtract(*np.quantile(x, [0.75, 0.25]))
    return {name: float(values[name]) for name in names}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([None, *LOGARITHMS]),
    st.sampled_from(["standard", "robust", "robust/1.349", "none"]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_the_inverse_restores_the_values_or_is_refused(log, kind, is_stored, seed):
    "The number of values is odd, so that the median of the transformed values is the transformed median."
    rng = np.random.default_rng(seed)
    x = rng.lognormal(rng.uniform(-1, 1), rng.uniform(0.5, 1.5), 401)
    if log in (None, "sign(x) log(1 + |x|)"):
        x = x * rng.choice([-1, 1], 401)
    y = x if log is None else LOGARITHMS[log][0](x)
    stats = stats_of(y)
    centre, scale = dict(
        standard=(stats["mean"], stats["std"]),
        robust=(stats["median"], stats["iqr"]),
        none=(0, 1),
    ).get(kind, (stats["median"], stats["iqr"] / 1.349))
    z = ((y - centre) / scale).astype(np.float32)
    entry = dict(scaler_type=kind.split("/")[0], apply_log_transform=log is not None, scaled_stats=stats_of(z))
    entry["train_stats"] = stats_of(x) | (dict(center=centre, scale=scale) if is_stored else {})
    np.testing.assert_allclose(unscale(z, "f", entry), x, rtol=1e-3, atol=1e-4 * np.abs(x).max())
    without = entry | dict(train_stats=stats_of(x, ("median", "iqr")), scaled_stats={})
    if log is not None or "robust" in kind:
        with pytest.raises(SplitsError, match="feature_scaler.json: f: "):
            unscale(z, "f", without)


def scaled_folder(folder, **entries):
    "Splits whose only features are `adx` and `own`, with entries of feature_scaler.json."
    splits_folder(folder)
    for file in folder.iterdir():
        pd.read_parquet(file).drop(columns="is_open").to_parquet(file, index=False)
    none = dict(scaler_type="none", apply_log_transform=False, train_stats={}, scaled_stats={})
    scaler = dict(version="2.0", features=dict(adx=none, own=none) | entries)
    (folder / "feature_scaler.json").write_text(json.dumps(scaler))
    return folder


def test_a_constant_feature_is_unscaled_with_scale_one():
    entry = dict(scaler_type="robust", train_stats=dict(median=3.0, iqr=0.0), scaled_stats=dict(min=0, median=0, max=0))
    assert unscale(np.zeros(5), "f", entry).tolist() == [3.0] * 5


REFUSED = {
    "min after scaling is -2.5 in the file": dict(
        scaler_type="standard", train_stats=dict(mean=25, std=5), scaled_stats=dict(min=-2.5, max=2.5, mean=0, std=1)
    ),
    "own: 0 of 0 possible inverses": dict(scaler_type="quantile", train_stats={}, scaled_stats={}),
    "own: 2 of 2 possible inverses": dict(scaler_type="robust", train_stats=dict(median=1.0, iqr=2.0)),
    "own: not a valid entry": dict(scaler_type="standard", train_stats=dict(mean="x", std=1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_scaler_that_does_not_determine_the_inverse_is_refused_by_name(message, tmp_path):
    folder = scaled_folder(tmp_path / "data", own=REFUSED[message])
    recut_splits(folder, tmp_path / "plain")
    with pytest.raises(SplitsError, match=f"feature_scaler.json: .*{message}|{message}"):
        recut_splits(folder, tmp_path / "out", rescale=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "plain"]


# Errors and the command line


def test_errors_leave_nothing_behind(tmp_path):
    data = splits_folder(tmp_path / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    out, one_class = tmp_path / "new/out", TABLE.assign(label_h5=np.int8(1))
    mistakes = {
        "no such folder|no such file": lambda: recut_splits(tmp_path / "absent", out),
        "sum to 1": lambda: recut_splits(data, out, (0.5, 0.5, 0.5)),
        "val before the start of test": lambda: recut_splits(data, out, starts=("2021-01-20", "2021-01-20")),
        "test would have none of the 720 rows": lambda: recut_splits(data, out, starts=("2021-01-20", "2030-01-01")),
        "expected the first time of val": lambda: recut_splits(data, out, starts=("2021-01-20",)),
        "an empty mapping": lambda: recut_splits({}, out),
        "expected a number of bars": lambda: recut_splits(data, out, embargo="soon"),
        "horizon 7 is not among 5, 20": lambda: recut_splits(data, out, max_bars={7: 9}),
        "without it features cannot be un-scaled": lambda: recut_splits(data, out, rescale=True),
        "never occurs": lambda: recut_splits(one_class, out),
        "no label column": lambda: recut_splits(TABLE[["datetime", "symbol", "own"]], out),
        "keys occur twice": lambda: recut_splits(dict(a=TABLE, b=TABLE.head(3)), out),
        "b: 1 column of a is missing: own": lambda: recut_splits(dict(a=TABLE, b=TABLE.drop(columns="own")), out),
        "only one has a time zone": lambda: recut_splits(
            dict(a=TABLE, b=TABLE.assign(datetime=TABLE.datetime.dt.tz_localize(None))), out
        ),
        "overlaps with": lambda: recut_splits(data, data / "out"),
        "exists; choose": lambda: recut_splits(TABLE, data),
        "holds no splits": lambda: recut_splits(TABLE, tmp_path / "other", overwrite=True),
        "name one of its folders: data": lambda: recut_splits(tmp_path, tmp_path.parent / "out"),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(SplitsError, match=message):
            mistake()
        assert sorted(tmp_path.rglob("*")) == before, message


def test_what_is_not_known_is_a_warning(tmp_path):
    frame = TABLE.drop(columns="bars_to_hit_h5").assign(own=TABLE.own.mask(TABLE.index == 3))
    frame = frame[(frame.symbol != "GC") | (frame.datetime < "2021-01-20")]
    report = recut_splits(frame, tmp_path / "out", **CUT)
    text = "\n".join(report.warnings)
    assert "no bars_to_hit_h5: labels are assumed to end within 5 bars" in text
    assert "1 of 3 symbols has no row in val: GC" in text and "NaN in 1 feature: own" in text
    longer = recut_splits(frame, tmp_path / "longer", **CUT, max_bars={5: 15})
    assert longer.labels.longest[0] == 15 and longer.labels.purged[0] > report.labels.purged[0]
    assert "max-bars" not in "\n".join(longer.warnings)


def test_other_classes_can_be_checked(tmp_path):
    frame = TABLE.assign(label_h5=TABLE.label_h5 == 1, label_h20=TABLE.label_h20 == 1)
    report = recut_splits(frame, tmp_path / "out", classes=(0, 1))
    assert report.labels.labels.sum() + report.labels.purged.sum() == 2 * len(TABLE)


def test_labels_that_an_earlier_cut_purged_are_counted(tmp_path):
    splits_folder(tmp_path / "data")
    with pytest.raises(SystemExit):
        main(["purge", str(tmp_path / "data"), "--output", str(tmp_path / "purged")])
    frame = pd.concat([pd.read_parquet(f) for f in (tmp_path / "purged").iterdir()])
    lost = int((~frame["label_h5"].isin([-1, 0, 1])).sum())
    report = recut_splits(tmp_path / "purged", tmp_path / "out")
    assert f"label_h5: {lost} rows have bars_to_hit but no label" in report.warnings[0]


def test_the_command_prints_the_report_and_refuses_two_ways_to_cut(tmp_path, capsys):
    def run(*options):
        with pytest.raises(SystemExit) as end:
            main(["recut", str(data), "--output", str(tmp_path / "out"), *options])
        return end.value.code, capsys.readouterr()

    data = splits_folder(tmp_path / "data")
    code, output = run("--train", ".6", "--val", ".2", "--test", ".2", "--embargo", "3", "--max-bars", "20=60")
    assert code == 0 and "splits that are joined again" in output.out and "embargo: 3 bars" in output.out
    code, output = run("--val-from", "2021-01-20", "--train", ".5")
    assert code == 2 and "--val-from and --test-from: expected both" in output.err
    code, output = run("--max-bars", "20")
    assert code == 2 and "expected horizon=bars" in output.err
    code, output = run("--val-from", "2021-01-20", "--test-from", "2021-01-27", "--overwrite")
    assert code == 0 and (tmp_path / "out/val_scaled.parquet").is_file()
