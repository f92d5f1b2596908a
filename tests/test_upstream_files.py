"Files of the upstream pipeline, from check to comparison with the command line only."

import json

import numpy as np
import pandas as pd
import pytest
from quick import quick_models

from modelfactory.cli import main
from modelfactory.runs.run import list_runs

pytestmark = pytest.mark.slow

HORIZONS, MAX_BARS, N_FEATURES = (5, 20), 3, 160  # MAX_BARS in horizons
ROWS = dict(train=600, val=300, test=300)


def upstream_bars(symbol, seed):
    "Bars with sessions, weekends and gaps; labels decided up to three horizons later, some of them undefined."
    rng, n = np.random.default_rng(seed), sum(ROWS.values())
    hours = pd.date_range("2021-01-04", periods=3 * n, freq="h", tz="UTC")
    hours = hours[(hours.dayofweek < 5) & (hours.hour >= 7) & (hours.hour < 21)]
    times = hours[np.sort(rng.choice(len(hours), n, replace=False))]
    close = 1.2 * np.exp(np.cumsum(rng.normal(0, 0.001, n)))
    spread = close * rng.uniform(0.0002, 0.002, (2, n))
    frame = pd.DataFrame(
        dict(
            datetime=times,
            symbol=symbol,
            open=close,
            high=close + spread[0],
            low=close - spread[1],
            close=close,
            volume=rng.integers(1, 1000, n),
            split="",
            timeframe="1h",
            session_id=np.arange(n) // 14,
            missing_bar=0,
            roll_event=False,
        )
    )
    for h in HORIZONS:
        hit = rng.integers(1, MAX_BARS * h + 1, n)
        ahead = np.minimum(np.arange(n) + hit, n - 1)
        label = np.sign(close[ahead] - close).astype(int)
        frame[f"label_h{h}"] = np.where(rng.random(n) < 0.05, -99, np.where(rng.random(n) < 0.1, 0, label))
        frame[f"bars_to_hit_h{h}"] = hit
        for name in ("mae", "mfe", "quality", "sample_weight", "touch_type"):
            frame[f"{name}_h{h}"] = rng.random(n)
    values = rng.normal(size=(n, N_FEATURES)).astype(np.float32)
    return pd.concat([frame, pd.DataFrame(values, columns=[f"feature_{i}" for i in range(N_FEATURES)])], axis=1)


@pytest.fixture
def upstream(tmp_path):
    "A folder of splits whose labels cross the boundaries."
    folder = tmp_path / "splits"
    folder.mkdir()
    bars = pd.concat([upstream_bars(s, seed) for seed, s in enumerate(("EURUSD", "GC", "600306"))], ignore_index=True)
    cuts = bars["datetime"].quantile(np.cumsum([0, *ROWS.values()]) / sum(ROWS.values())).tolist()
    ends = [*cuts[1:3], cuts[3] + pd.Timedelta("1h")]
    for name, start, end in zip(ROWS, cuts[:3], ends, strict=True):
        part = bars[(bars["datetime"] >= start) & (bars["datetime"] < end)].assign(split=name)
        part.to_parquet(folder / f"{name}_scaled.parquet", index=False)
    return folder


def run(*arguments):
    "Exit code of a command."
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in arguments])
    return end.value.code


def test_from_upstream_files_to_a_comparison_by_the_command_line_alone(upstream, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path))
    purged, runs = tmp_path / "purged", tmp_path / "runs"
    assert run("check", upstream) == 2
    advice = capsys.readouterr().err
    assert "decided by bars of val_scaled.parquet" in advice and "`modelfactory purge`" in advice
    assert run("purge", upstream, "--output", purged) == 0
    assert run("check", purged) == 0 and "sets these labels to null" not in capsys.readouterr().err
    options = ("--horizon", 5, "--data", purged, "--output", runs)
    for model, preset in (("nearest", []), ("lightgbm", ["--preset", "quick"])):
        assert run("train", "--model", model, *preset, *options) == 0
    assert run("compare", runs) == 0
    (task,) = json.loads((runs / "model_comparison.json").read_text())["tasks"]
    assert sorted(row["model"] for row in task["models"]) == ["lightgbm", "nearest"]
    assert not task["direction_significant"]
    assert all(r.scored and r.report["n_features"] == N_FEATURES for r in list_runs(runs))
