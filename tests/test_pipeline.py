"Raw bars to probabilities: the stored pipeline, history before new bars, and bars that arrive one by one."

import copy
import dataclasses
import json
import os
import re
import shutil
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE
from fabricate import fitted_run
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from quick import quick_plugin, small_splits

from modelfactory import bars_to_splits, load_run
from modelfactory.cli import main
from modelfactory.data.pipeline import (
    LAST_BARS_FILE,
    PIPELINE_FILE,
    PipelineError,
    break_reason,
    complete_rows,
    join_bars,
    last_bars,
    make_pipeline,
    read_pipeline,
)
from modelfactory.data.readers import OHLCV, check_bars
from modelfactory.data.splits import SplitsError
from modelfactory.runs.export import export_run
from modelfactory.runs.follow import Follower, _is_bar, follow_file, new_lines
from modelfactory.runs.predict import predict_run, prediction_warnings

pytestmark = pytest.mark.slow

TRAINED, ZONE = 1300, "America/New_York"  # bars of each symbol in the splits, of 1,500
KINDS = ("nearest", "gru")


def hourly_bars(n=1500, symbols=("A", "B", "C"), seed=7):
    "Noise; the symbols miss different bars, and a week has weekends."
    rng, parts = np.random.default_rng(seed), []
    times = pd.date_range("2024-01-01", periods=3 * n, freq="h", tz=ZONE)
    times = times[times.dayofweek < 5]
    for symbol in symbols:
        own = times[np.sort(rng.choice(n + n // 20, n, replace=False))]
        close = 100 * np.exp(np.cumsum(rng.normal(0, 0.003, n)))
        op, wicks = np.r_[close[0], close[:-1]], 1 + rng.exponential(0.001, (2, n))
        high, low = np.maximum(op, close) * wicks[0], np.minimum(op, close) / wicks[1]
        values = dict(open=op, high=high, low=low, close=close, volume=rng.poisson(50, n))
        parts.append(pd.DataFrame(dict(datetime=own, symbol=symbol, **values)))
    return check_bars(pd.concat(parts, ignore_index=True))


BARS = hourly_bars()
HEAD = BARS[BARS.groupby("symbol").cumcount() < TRAINED].reset_index(drop=True)
NEW = BARS[BARS.groupby("symbol").cumcount() >= TRAINED].reset_index(drop=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bars_to_splits(HEAD, tmp_path_factory.mktemp("pipeline") / "splits", (5,), {5: (1.0, 1.2, 7)})


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    small = dict(max_epochs=1, sequence_length=12, hidden_size=8)
    tasks = {kind: dict(model=kind, horizon=5, data=str(folder), preset=None) for kind in KINDS}
    tasks["gru"] |= dict(config=small)
    with quick_plugin(tmp_path_factory.mktemp("models")):
        yield {
            kind: fitted_run(tmp_path_factory.mktemp("runs"), task, scored=kind == "nearest")
            for kind, task in tasks.items()
        }


@pytest.fixture(scope="module")
def batches(runs):
    "Predictions of all bars in one call."
    return {kind: run.predict(BARS, ahead=True) for kind, run in runs.items()}


def assert_equal(frame, batch, n=None):
    "Each prediction has the probabilities of the same row in the batch."
    both = frame.merge(batch, on=["after", "symbol"], suffixes=("", "_batch"))
    assert len(both) == len(frame) and (n is None or len(frame) == n)
    for c in ("p_down", "p_flat", "p_up"):
        np.testing.assert_allclose(both[c].astype(float), both[f"{c}_batch"], rtol=0, atol=1e-6)


def call(*args):
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    return done.value.code


def test_transform_and_labels_equal_the_written_splits_bit_for_bit(folder):
    pipeline = read_pipeline(folder)
    parts = [pd.read_parquet(folder / f"{s}_scaled.parquet") for s in ("train", "val", "test")]
    written = check_order(pd.concat(parts))
    table = pipeline.transform(pipeline.read(HEAD)).join(pipeline.label(HEAD).iloc[:, 2:])
    table = check_order(table.dropna())
    assert len(table) == len(written) > 3000 and pipeline.names == list(written.columns[8:-2])
    for c in [*OHLCV, *pipeline.names, "datetime"]:
        assert np.array_equal(table[c], written[c]), c
    known = (written.label_h5 != -99).to_numpy()  # labels that cross into the next split were purged
    assert (table.label_h5.to_numpy() == written.label_h5)[known].all() and 0.9 < known.mean() < 1
    assert pipeline.barriers == {5: (1.0, 1.2, 7)} and pipeline.interval == 3600 and pipeline.time_zone == ZONE


def check_order(table):
    return table.sort_values(["symbol", "datetime"], ignore_index=True)


BROKEN = {
    "no object": lambda p: [],
    "no scaler": lambda p: p | dict(scaler={}),
    "NaN": lambda p: p | dict(scaler=p["scaler"] | dict(ret_1=[float("nan"), 1.0])),
    "scale 0": lambda p: p | dict(scaler=p["scaler"] | dict(ret_1=[0.0, 0.0])),
    "one number": lambda p: p | dict(scaler=p["scaler"] | dict(ret_1=[0.0])),
    "text": lambda p: p | dict(scaler="x" * 100),
    "long loop": lambda p: p | dict(barriers={"5": [1.0, 1.0, 10**12]}),
    "no barrier": lambda p: p | dict(barriers={}),
    "unknown key": lambda p: p | dict(code="import os"),
    "unknown option": lambda p: p | dict(source=dict(filepath="/etc/passwd")),
    "time zone": lambda p: p | dict(time_zone="../../etc/passwd"),
    "later version": lambda p: p | dict(version=2),
    "features": lambda p: p | dict(features=[1]),
    "deep": lambda p: p | dict(features=nested(200)),
}


def nested(n):
    value = {}
    for _ in range(n):
        value = dict(returns=value)
    return value


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_pipeline_raises_one_typed_error(folder, tmp_path, case):
    stored = json.loads((folder / PIPELINE_FILE).read_text())
    (tmp_path / PIPELINE_FILE).write_text(json.dumps(BROKEN[case](copy.deepcopy(stored))))
    with pytest.raises(PipelineError) as e:
        read_pipeline(tmp_path)
    assert PIPELINE_FILE in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("features", [dict(returns=dict(windows=[-1])), dict(os=None), dict(trend=None)])
def test_features_that_are_not_known_here_are_named_when_they_are_needed(folder, features):
    pipeline = dataclasses.replace(read_pipeline(folder), features=features)
    with pytest.raises(PipelineError, match="pipeline: "):
        pipeline.transform(HEAD)


def test_a_truncated_file_or_a_link_raises_the_same_error(folder, tmp_path):
    text = (folder / PIPELINE_FILE).read_text()
    for content in (text[:-50], "", "\x00\x1b[31m"):
        (tmp_path / PIPELINE_FILE).write_text(content)
        with pytest.raises(PipelineError):
            read_pipeline(tmp_path)
    (tmp_path / PIPELINE_FILE).unlink()
    assert read_pipeline(tmp_path) is None
    (tmp_path / PIPELINE_FILE).symlink_to(folder / PIPELINE_FILE)
    with pytest.raises(PipelineError, match="symbolic link"):
        read_pipeline(tmp_path)


def test_a_run_and_its_files_carry_the_pipeline(runs, folder, tmp_path):
    run = runs["nearest"]
    assert {PIPELINE_FILE, LAST_BARS_FILE} <= set(run.manifest["files"])
    assert run.pipeline == read_pipeline(folder)
    assert run.last_bars.merge(HEAD).equals(run.last_bars) and set(run.last_bars.symbol) == {"A", "B", "C"}
    changed = shutil.copytree(run.path, tmp_path / run.path.name)
    for name in (PIPELINE_FILE, LAST_BARS_FILE):
        (changed / name).write_bytes((changed / name).read_bytes() + b" ")
        with pytest.raises(ValueError, match="changed since the run was published"):
            load_run(changed).predict(NEW)
        shutil.copy(run.path / name, changed)


@pytest.mark.usefixtures("runs")
def test_a_run_on_other_features_says_that_it_takes_no_raw_bars(tmp_path):
    run = fitted_run(tmp_path / "runs", dict(model="nearest", horizon=5, data=str(small_splits(tmp_path / "own"))))
    assert run.pipeline is None and run.last_bars is None and PIPELINE_FILE not in run.manifest["files"]
    with pytest.raises(PipelineError, match="no pipeline.json, because bars_to_splits did not make its features"):
        run.predict(NEW)
    test = pd.read_parquet(tmp_path / "own" / "test_scaled.parquet")
    assert len(run.predict(test)) > 100
    with pytest.raises(SplitsError, match="1 feature is missing: ret_1"):
        run.predict(test.drop(columns=run.cached_model.feature_columns[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_raw_bars_have_the_probabilities_of_the_splits(runs, folder, batches, kind):
    of_splits = pd.concat([predict_run(runs[kind], str(folder), s) for s in ("train", "val", "test")])
    batch = batches[kind].dropna(subset="datetime")
    assert_equal(batch.merge(HEAD[["datetime", "symbol"]]), of_splits)
    assert not np.allclose(batch.p_up, batch.p_up.mean(), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis_settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 600), stop=st.integers(700, 1500), symbols=st.sets(st.sampled_from("ABC"), min_size=1))
def test_any_cut_of_raw_bars_equals_the_batch(runs, batches, kind, cut, stop, symbols):
    number = BARS.groupby("symbol").cumcount()
    part = BARS[(number >= cut) & (number < stop) & BARS.symbol.isin(symbols)]
    run = runs[kind]
    n_bars, by_day = run.pipeline.needs
    if stop - cut < n_bars + 60:
        return
    assert by_day
    frame = run.predict(part.sample(frac=1, random_state=cut))
    assert_equal(frame, batches[kind])
    lost = frame.attrs["history"]
    assert set(lost) == symbols and len(frame) == len(part) - sum(lost.values())
    assert all(n_bars <= n <= n_bars + 12 + 24 for n in lost.values())


def test_history_that_is_too_short_is_an_error_that_says_how_many_bars(runs):
    run = runs["nearest"]
    n = run.pipeline.needs[0] + 1
    with pytest.raises(PipelineError, match=f"A has 100 new bars, but a prediction needs {n:,} bars"):
        run.predict(BARS.query("symbol == 'A'").head(100))
    few = check_bars(BARS.query("symbol == 'A'")[:900])
    text = " ".join(prediction_warnings(run.predict(few)))
    assert "the first bars are history and are not predicted: A " in text and f"needs {n:,} bars" in text
    assert "raw bars, because no column is a feature of the model" in text


@pytest.mark.parametrize("kind", KINDS)
def test_tomorrows_bar_is_predicted_after_the_stored_bars(runs, batches, kind):
    run, first = runs[kind], NEW.groupby("symbol").head(1)
    frame = run.predict(first, ahead=True)
    assert_equal(frame, batches[kind], n=6)
    assert frame.attrs["history"] == {} and "the stored last bars of 3 symbols" in " ".join(prediction_warnings(frame))
    overlapping = BARS[BARS.groupby("symbol").cumcount().between(TRAINED - 5, TRAINED + 3)]
    frame = run.predict(overlapping)
    assert_equal(frame, batches[kind])
    assert len(frame) >= 3 * 4


def test_stored_bars_are_not_used_after_a_long_pause_or_a_revision(runs):
    run, one = runs["nearest"], NEW.query("symbol == 'A'")
    late = one.assign(datetime=one.datetime + pd.Timedelta(days=30))
    with pytest.raises(
        PipelineError, match="A: the stored last bars are not used: the pause after the last stored bar"
    ):
        run.predict(late)
    tail = BARS.query("symbol == 'A'")[TRAINED - 3 : TRAINED + 5]
    for column in OHLCV[:4]:
        revised = check_bars(tail.assign(**{c: tail[c] * (1.001 if column == "close" else 1) for c in OHLCV[:4]}))
        revised[column] = revised[column] * (1.0001 if column in ("high",) else 0.9999 if column == "low" else 1)
    with pytest.raises(PipelineError, match=r"not used: (open|high|low|close) at .* as in the stored bars"):
        run.predict(revised)
    with pytest.raises(PipelineError, match="only the stored bars have one at"):
        run.predict(tail.drop(index=tail.index[1]))


def test_join_uses_exactly_the_bars_before_the_new_ones(runs):
    pipeline, stored = runs["gru"].pipeline, runs["gru"].last_bars
    joined, is_new, reasons = join_bars(pipeline, stored, NEW)
    assert reasons == {} and joined[is_new].reset_index(drop=True).equals(NEW)
    assert joined[~is_new].reset_index(drop=True).equals(stored)
    # the oracle: the features of the last rows, computed from the stored bars alone and from all bars
    alone, whole = (pipeline.transform(bars) for bars in (stored, HEAD))
    both = alone[complete_rows(pipeline, stored)].merge(whole, on=["datetime", "symbol"])
    assert len(both) == 3 * 12
    for name in pipeline.names:
        np.testing.assert_allclose(both[f"{name}_x"], both[f"{name}_y"], rtol=0, atol=1e-5)
    fewer = stored.groupby("symbol").tail(len(stored) // 3 - 40)
    assert not last_bars(pipeline, fewer, 12)[1] and last_bars(pipeline, stored, 12)[1]


def test_rows_of_a_day_that_is_cut_are_not_complete():
    times = pd.date_range("2024-03-04", periods=3 * 1440, freq="min")
    close = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 1e-4, len(times))))
    bars = check_bars(pd.DataFrame(dict(datetime=times, symbol="A", volume=1.0, **dict.fromkeys(OHLCV[:4], close))))
    pipeline = make_pipeline(bars, dict.fromkeys(("ret_1", "day_move", "bar_of_day"), (0.0, 1.0)), {5: (1.0, 1.0, 5)})
    part = bars[700:].reset_index(drop=True)
    of_part, of_all = (pipeline.transform(table).set_index("datetime")[pipeline.names] for table in (part, bars))
    complete = complete_rows(pipeline, part)
    np.testing.assert_allclose(of_part[complete], of_all.loc[of_part.index[complete]], rtol=0, atol=1e-6)
    assert complete.sum() == 2 * 1440 and last_bars(pipeline, bars, 10)[0].datetime.iloc[0] == times[2 * 1440 - 1]


def test_drift_is_measured_on_scaled_features(runs):
    frame = runs["nearest"].predict(BARS)
    assert not any("UNLIKE TRAIN" in s for s in prediction_warnings(frame))
    daily = BARS.assign(
        datetime=pd.Timestamp("2000-01-03", tz=ZONE) + (BARS.groupby("symbol").cumcount() * pd.Timedelta("1D"))
    )
    sentences = " ".join(prediction_warnings(runs["nearest"].predict(daily)))
    assert "THE BARS ARE 1 days 00:00:00 APART, those of the splits 0 days 01:00:00" in sentences
    assert "distributed differently than in train" in sentences


def test_times_in_another_zone_are_converted_and_times_without_zone_are_refused(runs, batches):
    run = runs["nearest"]
    assert_equal(run.predict(BARS.assign(datetime=BARS.datetime.dt.tz_convert("UTC"))), batches["nearest"])
    with pytest.raises(PipelineError, match="no time zone"):
        run.predict(BARS.assign(datetime=BARS.datetime.dt.tz_localize(None)))


def test_a_csv_in_another_format_than_that_of_the_splits_is_read(tmp_path):
    bars = hourly_bars(symbols=("EURUSD",))
    head = bars[:TRAINED].assign(datetime=bars.datetime.dt.tz_localize(None))
    head.attrs["source"] = dict(columns={"close": "Last"}, unit="%d.%m.%Y %H:%M", tz=None, adjust=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        splits = bars_to_splits(head, tmp_path / "splits", (5,))
    run = fitted_run(tmp_path / "runs", dict(model="nearest", horizon=5, data=str(splits)))
    new = bars[TRAINED:].assign(datetime=bars.datetime.dt.tz_localize(None))
    european = new.rename(columns=dict(close="Last")).drop(columns="symbol")
    european["datetime"] = european.datetime.dt.strftime("%d.%m.%Y %H:%M")
    european.to_csv(tmp_path / "EURUSD.csv", index=False)
    new.to_csv(tmp_path / "iso.csv", index=False)
    frames = [run.predict(tmp_path / name) for name in ("EURUSD.csv", "iso.csv")]
    assert len(frames[0]) == len(new)
    assert_equal(frames[0], frames[1])


@pytest.mark.parametrize("kind", KINDS)
def test_bars_one_by_one_equal_the_batch(runs, batches, kind):
    rows = NEW.sort_values(["datetime", "symbol"]).head(9).to_dict("records")
    live = pd.DataFrame(runs[kind].follow(iter(rows)))
    assert_equal(live, batches[kind], n=9)
    assert live.datetime.isna().all() and live.after.tolist() == [row["datetime"] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@hypothesis_settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=st.lists(st.integers(1, 199), min_size=1, max_size=3, unique=True))
def test_tables_of_any_size_equal_the_batch(runs, batches, kind, edges):
    table, follower = NEW.sort_values(["datetime", "symbol"])[:200], Follower(runs[kind])
    parts = [follower.push(table[a:b]) for a, b in zip([0, *sorted(edges)], [*sorted(edges), 200], strict=True)]
    assert_equal(pd.concat(parts), batches[kind], n=200)
    assert follower.notes == []


def test_a_stream_without_stored_bars_waits_for_its_history(runs, batches):
    follower, table = Follower(runs["gru"]), BARS.query("symbol == 'A'")
    follower._stored = {}
    frames = [follower.push(table[:500]), *(follower.push(table[i : i + 20]) for i in range(500, 800, 20))]
    n = runs["gru"].pipeline.needs[0] + 11
    assert "A: no prediction yet" in follower.notes[0] and len(follower.notes) == 1
    live = pd.concat([frame for frame in frames if len(frame)])
    assert_equal(live, batches["gru"])
    assert 800 - n - 24 <= len(live) <= 800 - n + 1


def test_bars_that_cannot_be_used_are_refused_and_the_stream_goes_on(runs, batches):
    rows = NEW.query("symbol == 'A'").head(8).to_dict("records")
    invalid = [rows[2], rows[1], rows[0] | dict(close=-1.0), rows[5] | dict(high=0.1), dict(datetime="soon"), rows[4]]
    notes = []
    stream = [*rows[:3], *invalid[:5], rows[3], rows[4], invalid[5], *rows[5:]]
    live = pd.DataFrame(runs["nearest"].follow(stream, on_note=notes.append))
    assert_equal(live, batches["nearest"], n=8)
    assert len(notes) == 6 and all("refused" in note and "\n" not in note for note in notes)
    with pytest.warns(UserWarning, match="refused the bar"):
        list(runs["nearest"].follow([rows[0], rows[0]]))


def test_known_bars_are_skipped_and_revised_bars_restart_the_history(runs, batches):
    table = BARS.query("symbol == 'A'")
    follower = Follower(runs["nearest"])
    assert_equal(follower.push(table), batches["nearest"], n=200)
    assert "A: skipped 1,300 bars up to the last stored one" in follower.notes[0]
    follower = Follower(runs["nearest"])
    assert len(follower.push(table[TRAINED - 5 : TRAINED].assign(volume=7))) == 0
    assert "A: the stored last bars are not used: volume at" in follower.notes[0]


def lines_of(table):
    return table.to_csv(index=False).splitlines(keepends=True)


class Writer:
    "Adds one piece of text to a file whenever the follower waits, then interrupts it."

    def __init__(self, file, pieces):
        self.file, self.pieces = file, list(pieces)

    def __call__(self, seconds=0):
        if not self.pieces:
            raise KeyboardInterrupt
        piece = self.pieces.pop(0)
        if callable(piece):
            piece()
        else:
            with open(self.file, "a") as f:
                f.write(piece)


def collect(run, file, pieces):
    frames, notes = [], []
    with pytest.raises(KeyboardInterrupt):
        for frame in follow_file(run, file, notes.append, Writer(file, pieces)):
            frames.append(frame)
    return pd.concat(frames), notes


def test_a_growing_file_equals_the_batch(runs, batches, tmp_path):
    file = tmp_path / "bars.csv"
    header, *lines = lines_of(NEW.sort_values("datetime").head(12))
    file.write_text(header + "".join(lines[:4]))
    half = len(lines[5]) // 2
    pieces = [lines[4] + lines[5][:half], "", lines[5][half:], "broken,line\n", "\n", "".join(lines[6:])]
    live, notes = collect(runs["nearest"], file, pieces)
    assert_equal(live, batches["nearest"], n=12)
    assert len(notes) == 1 and notes[0].startswith("refused a bar: ") and str(tmp_path) not in notes[0]


def test_a_file_that_is_replaced_or_truncated_is_read_again(runs, batches, tmp_path):
    file, table = tmp_path / "bars.csv", NEW.query("symbol == 'A'").head(12)
    header, *lines = lines_of(table)
    file.write_text(header + "".join(lines[:6]))

    def truncate():
        file.write_text(header + "".join(lines[5:7]))

    def replace():
        (tmp_path / "next.csv").write_text(header + "".join(lines[6:12]))
        os.replace(tmp_path / "next.csv", file)

    live, notes = collect(runs["nearest"], file, [truncate, replace])
    assert_equal(live, batches["nearest"], n=12)
    assert sum("refused the bar" in note for note in notes) == 2


def test_the_command_predicts_raw_bars_and_follows_a_pipe(runs, batches, tmp_path, capsys):
    run, table = runs["nearest"].path, NEW.query("symbol == 'A'").head(20)
    table.drop(columns="symbol").to_csv(tmp_path / "new.csv", index=False)
    assert call("predict", run, tmp_path / "new.csv", "--symbol", "A", "--output", tmp_path / "p.parquet") == 0
    assert_equal(pd.read_parquet(tmp_path / "p.parquet"), batches["nearest"], n=20)
    assert call("predict", run, tmp_path / "ne?.csv", "--symbol", "A", "--output", tmp_path / "new_p.csv") == 0
    text = pd.read_csv(tmp_path / "new_p.csv")
    assert np.allclose(text.p_up, pd.read_parquet(tmp_path / "p.parquet").p_up, rtol=0, atol=1e-6)
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    for out in (None, tmp_path / "p.jsonl", tmp_path / "p.csv", tmp_path / "p.csv"):
        writer = threading.Thread(target=lambda: pipe.write_text("".join(lines_of(table))))
        writer.start()
        capsys.readouterr()
        assert call("predict", run, pipe, "--follow", *([] if out is None else ["--output", out])) == 0
        writer.join(PATIENCE)
        printed = capsys.readouterr()
    assert printed.err == "" and len(pd.read_csv(tmp_path / "p.csv")) == 40
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    live = pd.DataFrame(lines).assign(after=lambda t: pd.to_datetime(t.after, utc=True).dt.tz_convert(ZONE))
    assert_equal(live, batches["nearest"], n=20)
    assert call("predict", run, tmp_path / "none.csv", "--follow") == 2
    assert call("predict", run, pipe, "--follow", "--output", tmp_path / "p.parquet") == 2


def test_a_line_of_closes_is_a_bar_and_a_header_is_not():
    for line in ("2024-03-01,1.1", '"2024-03-01","1.1"', "A,2024-03-01 10:00,5", "1709251200;1,1", "01.03.2024;1,1"):
        assert _is_bar(line + "\n"), line
    for line in ("Date,Close", "Date,600000,600001", "time,NAV", "", "A,B,C", "20240301 report"):
        assert not _is_bar(line + "\n"), line


def test_the_command_ends_cleanly_after_ctrl_c(runs, tmp_path, capsys, monkeypatch):
    file = tmp_path / "bars.csv"
    file.write_text("".join(lines_of(NEW.query("symbol == 'A'").head(2))))
    monkeypatch.setattr("modelfactory.runs.follow.time.sleep", Writer(file, []))
    assert call("predict", runs["nearest"].path, file, "--follow") == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 and printed.err == ""


@pytest.mark.parametrize("rule", ["4h", dict(rule="120 volume")])
def test_shorter_bars_are_resampled_as_those_of_the_splits(tmp_path, rule):
    n, bars = 2900, hourly_bars(3000, symbols=("A",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        splits = bars_to_splits(bars[:n], tmp_path / "splits", (5,), resample=rule)
    run = fitted_run(tmp_path / "runs", dict(model="nearest", horizon=5, data=str(splits)))
    batch = run.predict(bars, ahead=True)
    assert read_pipeline(splits).resample == (rule if isinstance(rule, dict) else dict(rule=rule))
    start = bars.datetime > run.last_bars.datetime.iloc[-1]
    start = bars[start] if rule != "4h" else bars[bars.datetime >= run.last_bars.datetime.iloc[-1] + pd.Timedelta("4h")]
    stream = start.to_dict("records")
    notes = []
    live = pd.DataFrame(run.follow([*stream[:9], stream[3], *stream[9:21]], on_note=notes.append))
    assert_equal(live, batch)
    assert len(live) >= 4 and len(notes) == 1 and "refused" in notes[0]
    table = Follower(run).push(start[:21])
    assert_equal(table, batch, n=len(live))


def test_rolls_of_contracts_are_marked_and_stored(tmp_path):
    roll, first = HEAD.query("symbol == 'A'").datetime.iloc[700], HEAD.query("symbol == 'A'").datetime.iloc[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        splits = bars_to_splits(HEAD, tmp_path / "splits", (5,), rolls={"A": [roll]})
    train = pd.read_parquet(splits / "train_scaled.parquet")
    assert train[train.roll_event == 1][["datetime", "symbol"]].values.tolist() == [[roll, "A"]]
    pipeline = read_pipeline(splits)
    assert pipeline.rolls == {"A": [str(roll)]}
    labels = [pipeline.label(HEAD, rolls).label_h5 for rolls in (None, {"A": [str(roll)]}, {})]
    assert labels[0].equals(labels[1]) and not labels[0].equals(labels[2])
    assert pipeline.label(NEW.query("symbol == 'B'")).shape[1] == 4 and first < roll


def test_a_bundle_predicts_raw_bars_as_its_run(runs, batches, tmp_path):
    bundle = load_run(export_run(runs["nearest"].path, tmp_path / "bundle"))
    assert bundle.pipeline == runs["nearest"].pipeline
    assert_equal(bundle.predict(NEW), batches["nearest"])
    assert bundle.last_bars.equals(runs["nearest"].last_bars)


def grown_tail(n_new, of="A"):
    "The last stored bar as it is when it is over, and the bars after it; all of one symbol."
    tail = BARS.query("symbol == @of")[TRAINED - 1 : TRAINED + n_new].reset_index(drop=True)
    tail.loc[0, "high"], tail.loc[0, "close"] = tail.high[0] * 1.002, tail.high[0] * 1.001
    tail.loc[0, "volume"] += 9
    return tail


@pytest.mark.parametrize("kind", KINDS)
def test_a_bar_that_was_not_over_when_it_was_stored_is_replaced(runs, kind):
    run, tail = runs[kind], grown_tail(4)
    whole = check_bars(pd.concat([BARS.query("symbol == 'A'")[: TRAINED - 1], tail], ignore_index=True))
    batch = run.predict(whole, ahead=True)
    note = f"A: the stored bar of {tail.datetime[0]} was not over when it was stored; the new one replaces it"
    frame = run.predict(tail, ahead=True)
    assert_equal(frame, batch)
    assert len(frame) >= 4 and note in prediction_warnings(frame)
    for parts in ([tail], [tail[i : i + 1] for i in range(len(tail))]):
        follower = Follower(run)
        assert_equal(pd.concat([follower.push(part) for part in parts]), batch, n=5)
        assert follower.notes == [note]
    stored = run.last_bars.query("symbol == 'A'")
    for column, factor in [("open", 1.0005), ("high", 0.99), ("low", 1.01), ("volume", 0.5)]:
        assert break_reason(stored, tail.assign(**{column: tail[column] * factor}), 1e9)


def test_bars_of_another_price_scale_or_unknown_symbol_are_named(runs, tmp_path):
    run, few = runs["nearest"], NEW.query("symbol == 'A'").head(3)
    scaled = few.assign(**{c: few[c] * 100 for c in OHLCV[:4]})
    assert any("close has large moves in one bar: A" in text for text in prediction_warnings(run.predict(scaled)))
    follower = Follower(run)
    follower.push(scaled)
    assert len(follower.notes) == 1 and "(near 1 for 100)" in follower.notes[0]
    assert not any("large moves" in text for text in prediction_warnings(run.predict(NEW)))
    few.drop(columns="symbol").to_csv(tmp_path / "new_bars.csv", index=False)
    text = "new_bars is not a symbol of the splits (A, B, C); pass symbol="
    with pytest.raises(PipelineError, match=re.escape(text)):
        run.predict(tmp_path / "new_bars.csv")
    follower = Follower(run)
    assert not len(follower.push(few.assign(symbol="new_bars"))) and text in follower.notes[0]


def test_later_bars_change_no_earlier_prediction(runs, batches):
    cut = BARS.datetime.quantile(0.95)
    late = BARS.datetime > cut
    changed = BARS.assign(**{c: BARS[c].mask(late, BARS[c] * 1.7) for c in OHLCV})
    for kind in KINDS:
        frame = runs[kind].predict(changed)
        assert_equal(frame[frame.after < cut], batches[kind])


def test_an_error_of_follow_leaves_no_file(runs, tmp_path):
    out = tmp_path / "p.jsonl"
    assert call("predict", runs["nearest"].path, tmp_path / "none.csv", "--follow", "--output", out) == 2
    assert call("predict", tmp_path / "no_run", tmp_path / "none.csv", "--follow", "--output", out) == 2
    assert list(tmp_path.iterdir()) == []


def test_resampled_bars_of_symbols_that_arrive_at_different_times_equal_the_batch(tmp_path):
    n, bars = 2900, hourly_bars(3000, symbols=("A", "B"))
    end = bars.query("symbol == 'A'").datetime.iloc[n].floor("24h")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        splits = bars_to_splits(bars[bars.datetime <= end], tmp_path / "splits", (5,), resample="4h")
    run = fitted_run(tmp_path / "runs", dict(model="nearest", horizon=5, data=str(splits)))
    batch, new = run.predict(bars, ahead=True), bars[bars.datetime >= run.last_bars.datetime.max() + pd.Timedelta("4h")]
    a, b = (new[new.symbol == symbol].head(20) for symbol in "AB")
    follower, frames = Follower(run), []
    for part in (b[:9], a[:3], a[3:9], b[9:10], b[10:], a[9:]):  # the bars of b are ahead of those of a
        frames += [follower.push(part.iloc[i : i + 1]) for i in range(len(part))]
    live = pd.concat([frame for frame in frames if len(frame)])
    assert_equal(live, batch)
    assert len(live) >= 8 and follower.notes == []
    within = a[a.datetime > a.datetime.iloc[0]]
    for notes in (prediction_warnings(run.predict(within)), push_notes(run, within)):
        assert any("A: THE BARS BEGIN AT" in note for note in notes)


def push_notes(run, bars):
    follower = Follower(run)
    follower.push(bars)
    return follower.notes


def test_offsets_that_change_with_the_clock_are_read_in_the_zone_of_the_splits(runs, batches, tmp_path):
    spring = BARS.datetime.between(pd.Timestamp("2024-03-04", tz=ZONE), pd.Timestamp("2024-03-14", tz=ZONE))
    assert BARS[spring].datetime.map(lambda t: t.utcoffset()).nunique() == 2
    BARS.to_csv(tmp_path / "bars.csv", index=False)
    assert_equal(
        runs["nearest"].predict(tmp_path / "bars.csv", ahead=True), batches["nearest"], n=len(batches["nearest"])
    )


def test_a_pause_after_the_stored_bars_is_named(runs):
    tail = NEW.query("symbol == 'A'")
    late = tail[tail.datetime > tail.datetime.iloc[0] + pd.Timedelta("2h")].head(3)
    assert any(
        "pause after the last stored bar: A 0 days" in text for text in prediction_warnings(runs["gru"].predict(late))
    )


def test_a_file_as_standard_input_ends_with_its_last_line(tmp_path):
    (tmp_path / "bars.csv").write_text("a\nb")
    saved, opened = os.dup(0), os.open(tmp_path / "bars.csv", os.O_RDONLY)
    try:
        os.dup2(opened, 0)
        assert list(new_lines("-", wait=lambda: pytest.fail("waits for a line"))) == [["a\n"], ["b\n"]]
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(opened)


def test_the_command_writes_a_csv_as_text(runs, batches, tmp_path):
    NEW.head(3).to_csv(tmp_path / "new.csv", index=False)
    assert call("predict", runs["nearest"].path, tmp_path / "new.csv", "--output", tmp_path / "p.csv") == 0
    frame = pd.read_csv(tmp_path / "p.csv", parse_dates=["after"])
    assert_equal(frame, batches["nearest"], n=3)
