"Pretrained models: contexts within one symbol, complete checkpoints, and a cache that several processes share."

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE, ROOT, until
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_models, small_splits

from modelfactory.data.dataset import RawColumns, TimeSeriesDataset, Windows, history_windows
from modelfactory.data.splits import read_split
from modelfactory.models.errors import ModelUnavailable
from modelfactory.models.loading import load_model
from modelfactory.models.persistence import CheckpointError
from modelfactory.models.pretrained import RowCache, find_checkpoint, load_pretrained, tiny_checkpoint
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.run import list_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: tiny_checkpoint(kind, folder / kind) for kind in ("timesfm", "timesfm25", "chronos2", "gpt2", "bert")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("data") / "small")


def market(n=120, seed=0, symbols=("A", "B")):
    "Bars of symbols with raw columns; the rows are shuffled, as in upstream files."
    rng, parts = np.random.default_rng(seed), []
    for s in symbols:
        close = 100 * np.exp(np.cumsum(rng.normal(0, 1e-3, n)))
        parts.append(
            pd.DataFrame(
                dict(
                    datetime=pd.date_range("2024", periods=n, freq="5min"),
                    symbol=s,
                    close=close,
                    high=close * 1.001,
                    low=close * 0.999,
                    rsi=rng.normal(size=n),
                    label_h5=rng.integers(-1, 2, n),
                )
            )
        )
    return pd.concat(parts).sample(frac=1, random_state=seed)


# Contexts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 1000))
def test_a_context_equals_that_of_a_loop_over_bars(bars, length, seed):
    rng, codes = np.random.default_rng(seed), np.repeat(np.arange(len(bars)), bars)
    values = np.where(rng.random(len(codes)) < 0.1, np.nan, rng.normal(size=len(codes)))
    ends = rng.integers(0, len(codes), 20)
    windows = Windows(np.zeros((len(codes), 1)), ends, 1, RawColumns(dict(close=values), codes))
    contexts = np.asarray(history_windows(windows, "close", length)).reshape(len(ends), length, 2)
    for end, window in zip(ends, contexts, strict=True):
        first = np.flatnonzero(codes == codes[end])[0]
        bars_of_symbol = values[max(first, end - length + 1) : end + 1]
        expected = np.r_[np.full(length - len(bars_of_symbol), np.nan), bars_of_symbol]
        assert np.array_equal(window[:, 1] == 1, np.isnan(expected))
        assert np.allclose(window[:, 0], np.nan_to_num(expected))


def test_a_subset_keeps_its_history_and_an_array_without_history_is_an_error():
    ds = TimeSeriesDataset(read_split(market()), 5)
    subset = history_windows(ds.X.subset([7, 3]), "close", 9)
    assert np.array_equal(subset[:], history_windows(ds.X, "close", 9)[[7, 3]])
    with pytest.raises(ValueError, match="no history"):
        history_windows(Windows(np.zeros((4, 1)), [2, 3], 1), "close", 9)
    with pytest.raises(KeyError, match="volume.*high, low, close"):
        history_windows(ds.X, "volume", 9)


# TimesFM on windows with the raw close


def timesfm(checkpoint, ds, name="timesfm", **config):
    fixed = dict(sequence_length=1, context_length=64, cache=False, device="cpu", max_epochs=2)
    model = ModelRegistry.create(name, dict(checkpoint=str(checkpoint)) | fixed | config, 5, ds.feature_columns)
    model.fit(ds.X, ds.y, ds.X, ds.y, ds.metadata, ds.metadata)
    return model


MODES = [("timesfm", mode) for mode in ("zero_shot", "probe", "finetune")]
MODES += [("timesfm25", "zero_shot"), ("timesfm25", "finetune"), ("chronos2", "probe")]


@pytest.mark.parametrize("name, mode", MODES)
def test_a_prediction_depends_on_the_bars_of_its_symbol_only(checkpoints, name, mode, tmp_path):
    ds = TimeSeriesDataset(read_split(market()), 5)
    model = timesfm(checkpoints[name], ds, name, mode=mode)
    p = model.predict(ds.X, ds.metadata).probabilities
    pick = np.random.default_rng(0).permutation(len(ds))[:40]
    assert np.abs(model.predict(ds.X.subset(pick), ds.metadata.iloc[pick]).probabilities - p[pick]).max() < 1e-5
    changed = market()
    changed.loc[changed.symbol == "B", "close"] *= np.linspace(1, 3, (changed.symbol == "B").sum())
    other = TimeSeriesDataset(read_split(changed), 5)
    q, is_a = model.predict(other.X, other.metadata).probabilities, (ds.metadata.symbol == "A").to_numpy()
    assert np.array_equal(q[is_a], p[is_a]) or np.abs(q[is_a] - p[is_a]).max() < 1e-5
    assert np.abs(q[~is_a] - p[~is_a]).max() > 1e-5
    model.save(tmp_path)
    assert np.abs(load_model(tmp_path).predict(ds.X, ds.metadata).probabilities - p).max() < 1e-6


def test_future_bars_do_not_change_predictions(checkpoints):
    ds = TimeSeriesDataset(read_split(market()), 5)
    model = timesfm(checkpoints["timesfm"], ds, mode="zero_shot")
    frame = market()
    late = frame.datetime > pd.Timestamp("2024-01-01 06:00")
    frame.loc[late, ["close", "high", "low"]] *= 2
    changed = TimeSeriesDataset(read_split(frame), 5)
    early = (ds.metadata.datetime <= pd.Timestamp("2024-01-01 06:00")).to_numpy()
    p, q = (model.predict(d.X, d.metadata).probabilities for d in (ds, changed))
    assert np.array_equal(p[early], q[early]) and not np.array_equal(p, q)


def test_barriers_from_config_from_file_or_estimated(checkpoints, tmp_path):
    ds = TimeSeriesDataset(read_split(market()), 5)
    by_config = timesfm(checkpoints["timesfm"], ds, mode="zero_shot", barrier_up=1.5, barrier_down=1.2)
    for s in "AB":
        (tmp_path / f"{s}_ga_h5_best.json").write_text('{"best_k_up": 1.5, "best_k_down": 1.2}')
    by_file = timesfm(checkpoints["timesfm"], ds, mode="zero_shot", barrier_folder=str(tmp_path))
    assert np.array_equal(*[m.predict(ds.X, ds.metadata).probabilities for m in (by_config, by_file)])
    assert len(timesfm(checkpoints["timesfm"], ds, mode="zero_shot").widths) == 2
    (tmp_path / "B_ga_h5_best.json").unlink()
    with pytest.raises(ValueError, match="B_ga_h5_best.json"):
        by_file.predict(ds.X, ds.metadata)
    with pytest.raises(ValueError, match="one of them"):
        timesfm(checkpoints["timesfm"], ds, mode="zero_shot", barrier_up=1.0)
    bare = TimeSeriesDataset(read_split(market().drop(columns=["high", "low"])), 5)
    with pytest.raises(ValueError, match="high"):
        timesfm(checkpoints["timesfm"], bare, mode="zero_shot", barrier_up=1.0, barrier_down=1.0)


@pytest.mark.parametrize("name", ["timesfm", "timesfm25"])
def test_finetune_saves_the_trained_layers_only(checkpoints, name, tmp_path):
    from safetensors.torch import load_file

    ds = TimeSeriesDataset(read_split(market()), 5)
    timesfm(checkpoints[name], ds, name, mode="finetune", unfrozen=1).save(tmp_path)
    names = set(load_file(tmp_path / "network.safetensors"))
    assert any("layers.1" in n for n in names) and not any("layers.0" in n or "input_ff" in n for n in names)


@pytest.mark.parametrize("control", ["none", "random_llm", "no_llm"])
def test_rows_are_independent_on_bert(checkpoints, tmp_path, control):
    ds = TimeSeriesDataset(read_split(market()), 5, seq_len=16)
    config = dict(checkpoint=str(checkpoints["bert"]), control=control, sequence_length=16, max_epochs=2, device="cpu")
    sizes = dict(d_ff=16, words=32, prototypes=16)
    model = ModelRegistry.create("timellm", config | sizes, 5, ds.feature_columns)
    model.fit(ds.X, ds.y, ds.X, ds.y)
    p, pick = model.predict(ds.X, ds.metadata).probabilities, np.random.default_rng(0).permutation(len(ds))[:40]
    assert np.abs(model.predict(ds.X.subset(pick), ds.metadata.iloc[pick]).probabilities - p[pick]).max() < 1e-5
    model.save(tmp_path)
    assert np.abs(load_model(tmp_path).predict(ds.X, ds.metadata).probabilities - p).max() < 1e-6
    if control == "random_llm":
        header = json.loads((tmp_path / "model.json").read_text())
        header["facts"]["pretrained"]["random"] = "0" * 32
        (tmp_path / "model.json").write_text(json.dumps(header))
        with pytest.raises(CheckpointError, match="other random weights"):
            load_model(tmp_path)


# Checkpoints


def test_a_checkpoint_with_missing_weights_is_refused(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    for f in checkpoints["gpt2"].iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("h.1.mlp.c_fc.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(CheckpointError, match="h.1.mlp.c_fc.weight"):
        load_pretrained(AutoModel, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match="safetensors"):
        find_checkpoint(str(tmp_path))


def test_checkpoints_are_read_from_the_folder_in_HF_HOME(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    listed = {m["name"]: m for m in ModelRegistry.list_models("foundation")}
    assert not listed["timesfm"]["available"]
    assert "hf download google/timesfm-2.0-500m-pytorch" in listed["timesfm"]["reason"]
    snapshot = tmp_path / "hub/models--google--timesfm-2.0-500m-pytorch/snapshots/abc"
    snapshot.mkdir(parents=True)
    for f in checkpoints["timesfm"].iterdir():
        (snapshot / f.name).write_bytes(f.read_bytes())
    (refs := snapshot.parents[1] / "refs").mkdir()
    (refs / "main").write_text("abc")
    available = {m["name"]: m["available"] for m in ModelRegistry.list_models("foundation")}
    assert available == dict(timesfm=True, timesfm25=False, chronos2=False, timellm=False, tabicl=False)
    ds = TimeSeriesDataset(read_split(market()), 5)
    config = dict(sequence_length=1, context_length=64, cache=False)
    model = ModelRegistry.create("timesfm", config, 5, ds.feature_columns)
    model.fit(ds.X, ds.y, ds.X, ds.y)
    assert model.pretrained["revision"] == "abc" and len(model.pretrained["sha256"]["model.safetensors"]) == 64


def test_models_are_listed_with_the_checkpoint_of_their_yaml(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/timellm.yaml").write_text(f"checkpoint: {checkpoints['bert']}\n")
    monkeypatch.setenv("MODELFACTORY_PARAMS", str(tmp_path))
    assert {m["name"]: m["available"] for m in ModelRegistry.list_models("foundation")}["timellm"]


def cli(command_line, *args, **env):
    command = [sys.executable, "-m", "modelfactory.cli", *command_line.split(), *map(str, args)]
    options = dict(capture_output=True, text=True)
    return subprocess.run(command, env=os.environ | env, cwd=ROOT, timeout=PATIENCE, **options)


def test_a_grid_reports_missing_weights_and_continues(tmp_path, data):
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"data: {data}\nmodels: [timesfm, nearest]\nhorizons: [5]\n")
    environment = dict(HF_HOME=str(tmp_path), MODELFACTORY_PLUGINS=quick_models(tmp_path), MODELFACTORY_TRACKING="")
    done = cli("experiment", grid, "--output", tmp_path / "runs", **environment)
    reason = "checkpoint google/timesfm-2.0-500m-pytorch is not on this machine; get it with `hf download"
    assert done.returncode == 0 and "1 done" in done.stdout.replace("unavailable", "")
    assert f"timesfm h5 small: unavailable: {reason}" in done.stdout
    train = f"train --model timesfm --horizon 5 --data {data} --output"
    alone = cli(train, tmp_path / "runs", HF_HOME=str(tmp_path))
    assert alone.returncode == 2 and alone.stderr.count("\n") == 1 and "hf download" in alone.stderr
    assert [r.manifest["model"] for r in list_runs(tmp_path / "runs")] == ["nearest"]


def test_the_manifest_of_a_run_has_the_hashes_of_its_checkpoint(tmp_path, data, checkpoints):
    train = f"train --model timesfm --horizon 5 --data {data} --preset quick --set mode=zero_shot --set"
    checkpoint, cache = f"checkpoint={checkpoints['timesfm']}", tmp_path / "cache"
    done = cli(
        train, checkpoint, "--output", tmp_path / "runs", MODELFACTORY_CACHE=str(cache), MODELFACTORY_TRACKING=""
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads(next((tmp_path / "runs").glob("timesfm*/manifest.json")).read_text())
    assert set(manifest["pretrained"]["sha256"]) == {"config.json", "model.safetensors"}
    assert list(cache.rglob("*.npy"))


# Cache

WORKER = """
import sys, time
import numpy as np
from modelfactory.models.pretrained import RowCache
folder, log = sys.argv[1:3]
def compute(rows):
    with open(log, "a") as f: f.write("".join(f"{r}\\n" for r in rows))
    time.sleep(.15)
    return np.c_[rows, rows ** 2].astype(np.float32)
out = RowCache(folder, 2, block=10).get(np.arange(100), compute)
assert (out[:, 1] == np.arange(100) ** 2).all()
"""


def worker(tmp_path):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "cache"), str(tmp_path / "log")], cwd=ROOT)


def test_two_processes_compute_a_row_once(tmp_path):
    assert [p.wait(PATIENCE) for p in [worker(tmp_path), worker(tmp_path)]] == [0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(100))


def test_a_killed_process_loses_at_most_one_block(tmp_path):
    first, log = worker(tmp_path), tmp_path / "log"
    until(lambda: log.is_file() and len(log.read_text().split()) >= 40 or first.poll() is not None, "40 of 100 rows")
    first.send_signal(signal.SIGKILL)
    assert first.wait(PATIENCE) == -signal.SIGKILL, "the process ended before it was killed"
    (tmp_path / "cache/000099.partial").write_bytes(b"half")
    assert worker(tmp_path).wait(PATIENCE) == 0
    times = pd.Series((tmp_path / "log").read_text().split()).value_counts()
    assert len(times) == 100 and (times > 1).sum() <= 10
    assert RowCache(tmp_path / "cache", 2, block=10).get(np.array([99]), None).tolist() == [[99, 9801]]
