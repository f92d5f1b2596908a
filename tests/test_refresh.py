"The live record of a run, its drift test, its challenger, and the comparison of both."

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from forks import Forks
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_plugin

from modelfactory.data.market import MARKET_PRESETS, market_table, simulate_market
from modelfactory.data.splits import NO_LABEL, BadDatetime, MissingColumn, SplitsError
from modelfactory.data.writer import bars_to_splits, write_splits
from modelfactory.evaluation.drift import HALF_LIFE, cusum, drift_limits, drift_test, timestamp_losses
from modelfactory.evaluation.metrics import EvaluationError, directional_skill
from modelfactory.runs import refresh
from modelfactory.runs.attempt import change_manifest
from modelfactory.runs.examples import train_example
from modelfactory.runs.predict import predict_run
from modelfactory.runs.refresh import (
    KEYS,
    challenger_parameters,
    challengers,
    compare_challenger,
    extend_splits,
    live_folder,
    refresh_run,
    update_live,
)
from modelfactory.runs.run import load_run
from modelfactory.runs.run_folder import RunError
from modelfactory.training.test_set import read_ledger

H, SHARES = 5, np.array([0.3, 0.4, 0.3])
MARKET = replace(MARKET_PRESETS["planted"], rows=(400, 600, 600), columns=24, symbols=2)


def random_predictions(T, seed, start="2024-01-01", overconfidence=1.0, symbols=2):
    rng = np.random.default_rng(seed)
    times = pd.date_range(start, periods=T, freq="h")
    parts = []
    for symbol in range(symbols):
        logits = np.repeat(rng.normal(size=(-(-T // H), 3)), H, 0)[:T]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        y = (p.cumsum(1) > np.repeat(rng.random(-(-T // H)), H)[:T, None]).argmax(1) - 1
        q = np.exp(overconfidence * logits)
        columns = dict(zip(("p_down", "p_flat", "p_up"), (q / q.sum(1, keepdims=True)).T, strict=True))
        parts.append(pd.DataFrame(dict(datetime=times, symbol=f"S{symbol}", y_true=y) | columns))
    return pd.concat(parts, ignore_index=True)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_cusum_equals_the_recursion(values):
    state, expected = 0.0, []
    for x in values:
        state = max(0.0, state + x)
        expected.append(state)
    np.testing.assert_allclose(cusum(np.array(values)[:, None])[:, 0], expected, atol=1e-9)


def test_the_losses_equal_a_loop_over_timestamps():
    frame = random_predictions(60, 1)
    losses = timestamp_losses(frame.sample(frac=1, random_state=0), H, SHARES)
    weight, forecast, shares = 0.5 ** (1 / (HALF_LIFE * H)), SHARES.copy(), []
    for t, (time, rows) in enumerate(frame.groupby("datetime")):
        shares.append([(rows.y_true == c).mean() for c in (-1, 0, 1)])
        known = np.array(shares[t - H]) if t >= H else SHARES
        forecast = weight * forecast + (1 - weight) * known
        p = rows[["p_down", "p_flat", "p_up"]].to_numpy()[np.arange(2), rows.y_true + 1]
        constant = -np.log(forecast[rows.y_true + 1]).mean()
        np.testing.assert_allclose(losses.loc[time], [-np.log(p).mean(), -np.log(p).mean() - constant])


def test_the_limits_follow_the_scale_of_the_losses_and_the_rate():
    x = timestamp_losses(random_predictions(300, 2), H, SHARES).to_numpy()
    limits = drift_limits(x, H, 300, n_boot=100)
    np.testing.assert_allclose(drift_limits(3 * x + 2, H, 300, n_boot=100), 3 * limits)
    assert (drift_limits(x, H, 300, alpha=0.2, n_boot=100) < limits).all()
    assert (drift_limits(x, H, 100, n_boot=100) < limits).all()


@pytest.mark.parametrize("within", [None, 150])
def test_the_alarm_is_the_first_bar_at_which_a_naive_cusum_exceeds_the_limit(within):
    before, after = random_predictions(300, 3), random_predictions(400, 4, "2024-03-01", overconfidence=2.5)
    test = drift_test(before, after, H, SHARES, within=within, n_boot=100)
    losses = timestamp_losses(pd.concat([before, after]), H, SHARES)
    limits = drift_limits(losses.to_numpy()[:300], H, test.within, n_boot=100)
    for j, name in enumerate(losses):
        mean, state, alarm = losses[name].iloc[:300].mean(), 0.0, None
        for k, (time, x) in enumerate(losses[name].iloc[300:].items()):
            state = max(0.0, (0.0 if k % test.within == 0 else state) + x - mean)
            limit = limits[j] * (1 + (k % test.within + 1) / 300)
            if alarm is None and state > limit:
                alarm = time
        assert alarm is not None and test.alarms[name]["at"] == alarm
        assert test.alarms[name]["since"] <= alarm
    assert test.verdict == "worse" and "worse" in test.sentence


def test_no_drift_test_without_enough_blocks_or_closed_labels():
    none = random_predictions(10, 5, "2024-03-01")
    assert drift_test(random_predictions(100, 1), none, H, SHARES).verdict == "not tested"
    assert drift_test(random_predictions(300, 1), none[:0], H, SHARES).verdict == "not tested"
    with pytest.raises(EvaluationError, match="start at"):
        drift_test(none, none, H, SHARES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run of a small market, and the bars after its validation split."
    folder = tmp_path_factory.mktemp("refresh")
    table = market_table(simulate_market(MARKET), (H,))
    extra = tuple(c for c in table if c.startswith("pub_"))
    data = write_splits(table, folder / "data", (H,), extra_features=extra)
    task = dict(model="nearest", horizon=H, data=str(data), config={}, dataset={}, seed=1)
    with quick_plugin(folder):
        yield train_example(task, folder / "runs"), pd.read_parquet(data / "test_scaled.parquet")


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    shutil.copytree(made[0].parent, tmp_path / "runs")
    return load_run(tmp_path / "runs" / made[0].name)


@pytest.fixture
def bars(made):
    return made[1]


def contents(run):
    return {file.name: file.read_bytes() for file in live_folder(run).glob("*.parquet")}


def head(bars, n):
    return bars.groupby("symbol").head(n)


def test_bars_in_parts_give_the_predictions_of_all_bars_at_once(run, bars):
    for n in (80, 81, 200):
        record = update_live(run, head(bars, n))
    record = update_live(run, bars.groupby("symbol").tail(150))
    batch = predict_run(run, bars).sort_values(KEYS, ignore_index=True)
    columns = [*KEYS, "p_down", "p_flat", "p_up"]
    pd.testing.assert_frame_equal(record.predictions[columns], batch[columns], check_dtype=False, atol=1e-6)
    assert record.n_added == len(batch) - len(predict_run(run, head(bars, 200)))
    before = contents(run)
    assert update_live(run, bars).n_added == 0 and contents(run) == before


def test_a_label_is_scored_only_after_all_labels_before_it_are_closed(run, bars):
    record = update_live(run, head(bars, 100))
    reach = max(row["label_reach"] for row in run.report["labels"])
    closed = record.predictions.groupby("symbol").closed.sum()
    assert (closed == len(record.predictions) // 2 - reach).all()
    assert record.predictions.y_true[~record.predictions.closed].isna().all()
    assert len(update_live(run, bars).scored) > len(record.scored) == closed.sum()


def test_open_labels_are_closed_later_and_closed_ones_stay(run, bars):
    opened = head(bars, 100).copy()
    opened.loc[opened.groupby("symbol").cumcount() == 50, f"label_h{H}"] = NO_LABEL
    record = update_live(run, opened)
    assert "2 without a label" in record.sentence
    other = head(bars, 100).copy()
    other.loc[other.groupby("symbol").cumcount() == 60, f"label_h{H}"] *= -1
    features = run.cached_model.feature_columns
    other[features] += 1
    after = update_live(run, other)
    assert after.n_changed == (other[f"label_h{H}"] != head(bars, 100)[f"label_h{H}"]).sum()
    assert len(after.scored) == len(record.scored) + 2
    pd.testing.assert_frame_equal(after.bars[features], record.bars[features])
    assert (after.predictions.p_up == record.predictions.p_up).all()
    labels = bars.merge(after.scored, on=KEYS)
    assert (labels[f"label_h{H}"] == labels.y_true).all()


def test_the_test_split_of_a_folder_is_recorded_and_the_end_of_validation_is_context(run, bars):
    record = update_live(run, run.data_folder)
    assert len(record.predictions) == len(bars)
    assert read_ledger(run.path.parent).run.tolist() == [run.path.name]
    assert record.predictions.datetime.min() == bars.datetime.min()


def test_bad_bars_leave_nothing_behind(run, bars):
    zone = bars.assign(datetime=bars.datetime.dt.tz_localize("UTC" if bars.datetime.dt.tz is None else None))
    wrong = [(MissingColumn, bars.drop(columns=f"label_h{H}")), (BadDatetime, zone)]
    early = bars.assign(datetime=bars.datetime - pd.Timedelta("3650D"))
    for error, data in [*wrong, (RunError, early)]:
        with pytest.raises(error):
            update_live(run, data)
    with pytest.raises(RunError, match="sometimes"):
        refresh_run(run, bars, retrain="sometimes")
    with pytest.raises(RunError, match="holdout"):
        refresh_run(run, bars, holdout=1.5)
    assert not live_folder(run).exists()
    result = refresh_run(run, head(bars, 7), retrain="always")
    assert result.failed and "pass more bars" in result.sentences[-1]


KILL = """
import os, signal, sys
import pandas as pd
from modelfactory.runs import refresh
from modelfactory.runs.attempt import change_manifest
write, written = refresh._write_table, []
def kill(frame, file):
    if len(written) == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
    write(frame, file)
    written.append(file)
refresh._write_table = kill
refresh.update_live(sys.argv[1], pd.read_parquet(sys.argv[2]))
"""


def test_a_killed_update_is_completed_and_two_at_once_wait_for_each_other(run, bars, tmp_path):
    file = tmp_path / "new.parquet"
    update_live(run, head(bars, 100))
    first = contents(run)
    bars.to_parquet(file)
    forks = Forks("import pandas\nimport modelfactory.runs.refresh, modelfactory.models.tabular")
    try:
        for n_written in (0, 1):
            assert forks(KILL, run.path, file, n_written).wait(60) == -9
            assert (contents(run) == first) == (n_written == 0)
        both = [forks(KILL, run.path, file, 9) for _ in range(2)]
        outputs = [fork.communicate(60)[0] for fork in both]
        assert [fork.returncode for fork in both] == [0, 0], outputs
    finally:
        forks.close()
    record = update_live(run, bars)
    batch = predict_run(run, bars).sort_values(KEYS, ignore_index=True)
    assert record.n_added == 0 and np.allclose(record.predictions.p_up, batch.p_up, atol=1e-6)
    assert sorted(contents(run)) == ["bars.parquet", "predictions.parquet"]


def test_no_label_of_a_challenger_reaches_the_rows_of_the_comparison(run, bars):
    record = update_live(run, bars)
    folder = extend_splits(record)
    assert extend_splits(record) == folder
    train, val = (pd.read_parquet(folder / f"{name}_scaled.parquet") for name in ("train", "val"))
    unseen = pd.Timestamp(refresh.read_json(folder / "refresh.json")["unseen_from"])
    closed = record.scored.datetime.unique()
    assert (pd.Series(closed) >= unseen).sum() == int(0.25 * len(closed))
    everything = pd.concat([train, val, record.bars[record.bars.datetime >= unseen]])
    times = {symbol: rows.datetime.sort_values().tolist() for symbol, rows in everything.groupby("symbol")}
    for part, end in ((train, val.datetime.min()), (val, unseen)):
        assert part.datetime.max() < end
        for row in part[part[f"label_h{H}"] != NO_LABEL].itertuples():
            at = times[row.symbol].index(row.datetime)
            assert times[row.symbol][at + getattr(row, f"bars_to_hit_h{H}")] < end
    old = [pd.read_parquet(f"{run.data_folder}/{name}_scaled.parquet") for name in ("train", "val")]
    assert len(train) + len(val) == sum(map(len, old)) + (bars.datetime < unseen).sum()
    assert val.datetime.nunique() == old[1].datetime.nunique()


@pytest.mark.slow
def test_a_challenger_is_an_ordinary_run_is_linked_compared_and_not_trained_twice(run, bars, monkeypatch):
    trained, train = [], refresh.run_job
    monkeypatch.setattr(refresh, "run_job", lambda *args: trained.append(train(*args)) or trained[-1])
    turned = bars.assign(**{f"label_h{H}": -bars[f"label_h{H}"].where(bars[f"label_h{H}"].abs() == 1, 0)})
    assert refresh_run(run, head(turned, 40)).outcome is None
    result = refresh_run(run, turned, holdout=0.7)
    assert result.drift.alarm and not result.failed and trained == [result.outcome]
    assert result.outcome.path == result.challenger.path and (result.challenger.path / "train.ipynb").is_file()
    configs = [{k: v for k, v in r.config.items() if k != "data"} for r in (run, result.challenger)]
    assert configs[0] == configs[1]
    assert result.challenger.manifest["parent"] == run.path.name
    assert refresh_run(run, turned).outcome is None and len(trained) == 1
    assert any("Challenger" in line for line in result.sentences)
    run.verify()
    result.challenger.verify()

    champion, challenger = (update_live(r, turned).scored for r in (run, result.challenger))
    start = pd.Timestamp(result.comparison.unseen_from)
    both = [r[r.datetime >= start].reset_index(drop=True) for r in (champion, challenger)]
    both[0] = both[0].merge(both[1][KEYS], on=KEYS)
    rows = np.arange(len(both[1]))
    columns = ["p_down", "p_flat", "p_up"]
    losses = [-np.log(b[columns].to_numpy()[rows, b.y_true + 1]).mean() for b in both]
    skills = [directional_skill(b.y_true, b.prediction, b.symbol) for b in both]
    for d, (old, new) in ((result.comparison.log_loss, losses), (result.comparison.directional_skill, skills)):
        assert d["champion"] == pytest.approx(old, abs=1e-6) and d["challenger"] == pytest.approx(new, abs=1e-6)
        assert d["difference"] == pytest.approx(new - old, abs=1e-6) and d["low"] < d["difference"] < d["high"]

    few = update_live(result.challenger, turned)
    few.predictions = few.predictions.tail(20)
    assert "too few rows" in compare_challenger(update_live(run, turned), few).sentences[0]
    change_manifest(result.challenger, result.challenger.path, dict(parent=None), [])  # as after a kill
    assert [other.path for other in challengers(run)] == [result.challenger.path]
    linked = load_run(result.challenger.path)
    assert linked.manifest["parent"] == run.path.name and linked.is_own


@pytest.mark.filterwarnings("ignore:label_h5")
def test_raw_bars_are_labelled_by_the_pipeline_of_the_run(tmp_path, made):
    market = simulate_market(replace(MARKET, rows=(500, 200, 400), symbols=1))
    bars = market_table(market, (H,))[["datetime", "symbol", "open", "high", "low", "close", "volume"]]
    known, new = bars.iloc[:900], bars.iloc[900:]
    data = bars_to_splits(known, tmp_path / "data", (H,), shares=(0.6, 0.2, 0.2))
    task = dict(model="nearest", horizon=H, data=str(data), config={}, dataset={}, seed=1)
    run = load_run(train_example(task, tmp_path / "runs"))
    update_live(run, new.iloc[:80])
    record = update_live(run, new)
    batch = predict_run(run, new)
    assert len(record.predictions) == len(batch) > 0
    merged = record.predictions.merge(batch, on=KEYS)
    assert len(merged) == len(batch) and np.allclose(merged.p_up_x, merged.p_up_y, atol=1e-6)
    labels = run.pipeline.label(run.pipeline.read(bars)).merge(record.scored, on=KEYS)
    assert len(labels) == len(record.scored) and (labels[f"label_h{H}"] == labels.y_true).all()
    folder = extend_splits(record)
    assert (folder / "pipeline.json").is_file()
    table = pd.read_parquet(folder / "train_scaled.parquet")
    test = pd.read_parquet(data / "test_scaled.parquet")
    assert not len(table[table[f"label_h{H}"] != NO_LABEL].merge(test, on=KEYS))


@pytest.mark.filterwarnings("ignore:label_h5")
def test_a_bar_that_was_not_over_is_replaced_and_errors_leave_nothing(tmp_path, made, monkeypatch):
    market = simulate_market(replace(MARKET, rows=(500, 200, 400), symbols=1))
    bars = market_table(market, (H,))[["datetime", "symbol", "open", "high", "low", "close", "volume"]]
    data = bars_to_splits(bars.iloc[:900], tmp_path / "data", (H,), shares=(0.6, 0.2, 0.2))
    task = dict(model="nearest", horizon=H, data=str(data), config={}, dataset={}, seed=1)
    run, new = load_run(train_example(task, tmp_path / "runs")), bars.iloc[900:980].reset_index(drop=True)
    begun = new.copy()
    begun.loc[79, ["high", "close", "low"]] = begun.open[79]
    with monkeypatch.context() as patch:
        patch.setattr("modelfactory.runs.refresh._add_predictions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            update_live(run, begun)
    assert not live_folder(run).exists()
    update_live(run, begun)
    record = update_live(run, bars.iloc[979:1100])
    stored = pd.read_parquet(live_folder(run) / "raw_bars.parquet")
    pd.testing.assert_frame_equal(stored, run.pipeline.read(bars.iloc[900:1100]), check_dtype=False)
    labels = run.pipeline.label(run.pipeline.read(bars)).merge(record.scored, on=KEYS)
    assert len(labels) == len(record.scored) > 100 and (labels[f"label_h{H}"] == labels.y_true).all()
    scaled = bars.iloc[895:900].assign(volume=1.0)
    with pytest.raises(RunError, match="the stored last bars are not used: volume"):
        update_live(load_run(train_example(task | dict(seed=2), tmp_path / "runs2")), scaled)
    with pytest.raises(SplitsError, match="the run has no pipeline.json"):
        update_live(made[0], new)


def test_a_challenger_keeps_the_calendar_and_the_rolls_of_its_parent():
    data = dict(gap=1, nan=None, classes=[-1, 0, 1], prices=None, calendar="XNYS", rolls=["2024-03-15"], exclude=["x"])
    run = SimpleNamespace(config=dict(model="svm", data=data, config={}), horizon=5, seed=1)
    dataset = challenger_parameters(run, "extended")["dataset"]
    assert dataset == {key: value for key, value in data.items() if key != "exclude"}
    del data["calendar"], data["rolls"]
    assert set(challenger_parameters(run, "extended")["dataset"]) == {"gap", "nan", "classes", "prices"}
