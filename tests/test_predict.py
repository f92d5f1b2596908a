"Prediction of new bars with a run and with its bundle, in Python and by the command line."

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from fabricate import fitted_run

from modelfactory import load_run
from modelfactory.cli import main
from modelfactory.data.bundled import resolve_data
from modelfactory.data.splits import SplitsError
from modelfactory.runs.predict import prediction_warnings
from modelfactory.runs.run_folder import FEATURES_FILE, MANIFEST_FILE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = dict(max_epochs=1, sequence_length=12, hidden_size=8, batch_size=512, calibration="temperature")
    parameters = dict(model="gru", horizon=5, data="planted", preset="quick", config=config)
    return fitted_run(tmp_path_factory.mktemp("predict"), parameters, scored=True).path


@pytest.fixture(scope="module")
def bars():
    table = pd.read_parquet(resolve_data("planted") / "test_scaled.parquet")
    return table.drop(columns=[c for c in table if c.startswith(("label", "bars_to_hit"))])


def call(*args):
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    return done.value.code


def test_export_and_predict_by_command_line(run, bars, tmp_path, capsys):
    bars[:300].to_parquet(tmp_path / "new.parquet")
    assert call("export", run, "--output", tmp_path / "bundle") == 0
    for source, out in ((run, "a.parquet"), (tmp_path / "bundle", "b.parquet")):
        assert call("predict", source, tmp_path / "new.parquet", "--ahead", "--output", tmp_path / out) == 0
    a, b = (pd.read_parquet(tmp_path / f) for f in ("a.parquet", "b.parquet"))
    assert a.equals(b) and len(a) == 300 - 12 + 1 and a.datetime.isna().sum() == 1
    assert "12 bars are not predicted, because they have no full window before them" in capsys.readouterr().out
    assert call("export", run, "--output", tmp_path / "bundle") == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "bundle", "new.parquet"]


def test_bars_one_by_one_are_predicted_as_in_a_batch(run, bars):
    "Two symbols; each call has only the bars that a window needs."
    run, table = load_run(run), pd.concat([b[:40] for _, b in bars.groupby("symbol")])
    batch = run.predict(table)
    for symbol, of_symbol in table.groupby("symbol"):
        pieces = pd.concat([run.predict(of_symbol[i - 12 : i + 1]) for i in range(12, 40)])
        assert np.allclose(pieces.p_up, batch[batch.symbol == symbol].p_up, rtol=0, atol=1e-6)


def test_later_bars_do_not_change_earlier_predictions(run, bars):
    run, one = load_run(run), bars[bars.symbol == "SYN1"][:60]
    is_later = np.arange(60) >= 40
    later = one.assign(**{f: np.where(is_later, one[f] * -3 + 1, one[f]) for f in run.cached_model.feature_columns})
    assert np.array_equal(run.predict(one).p_up[: 40 - 12 + 1], run.predict(later).p_up[: 40 - 12 + 1])


def test_drift_is_not_checked_for_runs_without_bins(run, bars, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    (old / FEATURES_FILE).unlink()
    manifest = json.loads((old / MANIFEST_FILE).read_text())
    del manifest["files"][FEATURES_FILE]
    (old / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert "drift is not checked" in prediction_warnings(load_run(old).predict(bars[:50]))[-1]


@pytest.mark.parametrize(
    "breaks, words",
    [
        (lambda b: b.assign(symbol=None), "name the symbol"),
        (lambda b: pd.concat([b, b[-1:]]), "repeating a key"),
        (lambda b: b.iloc[:0], "no row"),
        (lambda b: b.assign(datetime="soon"), "datetime"),
        (lambda b: b.assign(rsi_14=np.nan) if "rsi_14" in b else b.assign(**{b.columns[8]: np.nan}), "NaN"),
    ],
)
def test_bad_bars_raise_a_one_line_error(run, bars, breaks, words):
    with pytest.raises(SplitsError, match=words) as e:
        load_run(run).predict(breaks(bars[:50]))
    assert "\n" not in str(e.value)
