"Each use of a test set is in the ledger; the fingerprint includes test; test is checked against the earlier splits."

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from fabricate import fitted_run
from test_context import cut, cut_and_purge
from test_foundation import market

from modelfactory.cli import main
from modelfactory.data.splits import SplitOverlap, fingerprint
from modelfactory.runs.final import final_scores
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import MANIFEST_FILE
from modelfactory.training.test_set import LEDGER_FILE, read_ledger, record_test_use, test_set_uses
from modelfactory.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    "A separate runs folder for each test."
    monkeypatch.setenv("MODELFACTORY_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def frames(n=900):
    train, rest = cut_and_purge(market(n), 0.6)
    val, test = cut_and_purge(rest, 0.5)
    return dict(train=train, val=val, test=test)


LOGISTIC = dict(model="logistic_regression", horizon=5, data="in memory")
TRAIN = ("train", "--model", "logistic_regression", "--horizon", 5, "--data", "planted", "--output")


def make_trainer(data=None, **kw):
    return Trainer(LOGISTIC, data or frames(), **kw)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with one run that was not scored on test, trained in this process."
    home = tmp_path_factory.mktemp("trained")
    (home / "data").mkdir()
    for name, frame in frames().items():
        frame.to_parquet(home / f"data/{name}_scaled.parquet")
    fitted_run(home / "output", LOGISTIC | dict(data=str(home / "data")), scored=True)
    return home / "output"


def call(*args):
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    return done.value.code


def test_a_trainer_in_a_notebook_records_each_use_before_it_returns(runs, tmp_path):
    logistic = make_trainer()
    logistic.run_full_pipeline()
    assert not (runs / LEDGER_FILE).exists()
    logistic.evaluate("test")
    logistic.evaluate("test")
    make_trainer(runs=tmp_path / "elsewhere").evaluate("test")
    ledger = read_ledger(runs)
    assert ledger.model.tolist() == ["logistic_regression"] * 2
    assert set(ledger.run) == {""} and set(ledger.horizon) == {5}
    assert set(ledger.fingerprint) == {logistic.fingerprint()} and len(read_ledger(tmp_path / "elsewhere")) == 1
    assert test_set_uses(runs) == [
        "in memory: the test set was used 2 times, for 1 model: its scores are no longer those of a single use."
    ]


def test_no_score_is_returned_where_the_use_cannot_be_recorded(tmp_path):
    (tmp_path / "file").write_text("")
    logistic = make_trainer(runs=tmp_path / "file")
    with pytest.raises(OSError):
        logistic.evaluate("test")
    assert "test" not in logistic.metrics and "test" not in logistic.predictions


def test_train_with_test_and_final_each_record_one_use_with_the_name_of_the_run(tmp_path, capsys):
    folder = tmp_path / "output"
    assert call(*TRAIN, folder, "--test") == 0
    (run,) = list_runs(folder)
    ledger = read_ledger(folder)
    assert ledger.run.tolist() == [run.path.name] and ledger.fingerprint.tolist() == [run.manifest["data_fingerprint"]]
    final_scores([run.path])
    assert read_ledger(folder).run.tolist() == [run.path.name] * 2
    assert test_set_uses(folder)[0].startswith("planted: the test set was used 2 times, for 1 model")
    assert not (tmp_path / "runs" / LEDGER_FILE).exists()


def test_a_run_with_a_fingerprint_of_train_and_val_only_can_be_scored_on_test(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "output")
    (run,) = list_runs(folder)
    manifest = json.loads((run.path / MANIFEST_FILE).read_text())
    manifest["data_fingerprint"] = Trainer(run.config).fingerprint(("train", "val"))
    (run.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert len(final_scores([run.path])) and len(read_ledger(folder)) == 1


def test_a_ledger_of_an_earlier_version_is_read(tmp_path):
    line = dict(when="2024-01-01T00:00:00+00:00", run="gru_h5_1", data="mine", fingerprint="0", model="gru", horizon=5)
    (tmp_path / LEDGER_FILE).write_text(json.dumps(line) + "\n")
    record_test_use(tmp_path, "mine", "1", "xgboost", 5)
    record_test_use(tmp_path, "mine", "0", "xgboost", 5)
    old, new = test_set_uses(tmp_path)
    assert old.startswith("mine (0): the test set was used 2 times, for 2 models")
    assert new == "mine (1): the test set was used 1 time, for 1 model."


def test_folders_with_the_same_name_are_two_test_sets(tmp_path):
    for folder in ("x/scaled", "y/scaled"):
        (tmp_path / folder).mkdir(parents=True)
        record_test_use(tmp_path, tmp_path / folder, folder, "gru", 5, "gru_h5_1")
    assert test_set_uses(tmp_path) == [
        f"{f}: the test set was used 1 time, for 1 model." for f in ("x/scaled", "y/scaled")
    ]
    assert read_ledger(tmp_path)["data"].tolist() == [str(tmp_path / "x/scaled"), str(tmp_path / "y/scaled")]


def test_a_use_recorded_by_name_in_an_earlier_version_is_of_the_same_test_set(tmp_path):
    (tmp_path / "mine").mkdir()
    line = dict(when="2024-01-01T00:00:00+00:00", run="gru_h5_1", data="mine", fingerprint="0", model="gru", horizon=5)
    (tmp_path / LEDGER_FILE).write_text(json.dumps(line) + "\n")
    record_test_use(tmp_path, tmp_path / "mine", "0", "xgboost", 5)
    (sentence,) = test_set_uses(tmp_path)
    assert sentence.startswith("mine: the test set was used 2 times, for 2 models")


def test_the_card_of_a_run_shows_its_uses_of_test(trained, tmp_path):
    from modelfactory.runs.export import model_card

    (run,) = list_runs(shutil.copytree(trained, tmp_path / "output"))
    card = model_card(run)
    assert "The run was never scored on test" in card and "Validation was not used in training" in card
    final_scores([run.path])
    assert "The run was scored on test 1 time" in model_card(run)


def test_the_fingerprint_includes_test_if_it_exists(tmp_path):
    data = frames()
    other = data | dict(test=data["test"].assign(rsi=0.0))
    without = {k: v for k, v in data.items() if k != "test"}
    assert len({fingerprint(data), fingerprint(other), fingerprint(without)}) == 3
    assert fingerprint(data, ("train", "val")) == fingerprint(without) == fingerprint(other, ("train", "val"))
    for name, frame in data.items():
        frame.to_parquet(tmp_path / f"{name}_scaled.parquet")
    original = fingerprint(tmp_path)
    other["test"].to_parquet(tmp_path / "test_scaled.parquet")
    changed = fingerprint(tmp_path)
    (tmp_path / "test_scaled.parquet").write_bytes(b"no parquet: hashed, not read")
    assert len({original, changed, fingerprint(tmp_path)}) == 3
    (tmp_path / "test_scaled.parquet").unlink()
    assert fingerprint(tmp_path) == fingerprint(tmp_path, ("train", "val"))


def test_labels_of_val_that_reach_into_test_are_refused_when_test_is_read(runs):
    "Both train and val are checked against test."
    train, rest = cut_and_purge(market(900), 0.6)
    val, test = cut(rest, [0.5])
    logistic = make_trainer(dict(train=train, val=val, test=test))
    assert logistic.run_full_pipeline()["n_samples"] > 0
    with pytest.raises(SplitOverlap, match="val frame: label_h5: 10 rows decided by bars of test frame"):
        logistic.evaluate("test")
    assert "test" not in logistic.metrics and read_ledger(runs).empty


def test_the_history_of_test_comes_from_val(tmp_path):
    data = frames()
    logistic = Trainer(LOGISTIC | dict(config=dict(sequence_length=30)), data)
    logistic.evaluate("test")
    ds = logistic.datasets["test"]
    assert len(ds) == len(data["test"]) - data["test"].label_h5.isna().sum() and len(ds.context) == 2 * 30
    last = pd.concat([part.tail(30) for _, part in data["val"].groupby("symbol")])
    assert np.array_equal(np.sort(ds.context.matrix[:, 0]), np.sort(last.rsi.to_numpy(np.float32)))
