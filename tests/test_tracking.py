"MLflow as a view of run folders: what is written, what is never written, and what happens when MLflow fails."

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import finish, interruptible, until
from forks import Forks

from modelfactory.configuration import redact
from modelfactory.runs import tracking
from modelfactory.runs.attempt import publish
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import RESULT_FILE, write_json
from modelfactory.runs.tracking import (
    KIND_TAG,
    Tracker,
    TrackingError,
    rebuild,
    run_view,
    track_run,
    track_runs,
    track_study,
    tracking_store,
    try_track,
)

pytestmark = [pytest.mark.faults, pytest.mark.network, pytest.mark.slow]

UNREACHABLE = "http://bob:hunter2@127.0.0.1:9"
ODD = """<img src=x onerror=alert(1)> "o'clock" ü 100%41"""


def make_run(runs, name="xgboost_h5_20260101_000000_abcdef", rounds=3, config=None, extra=None, grid="", **manifest):
    "A published run of small files, like those of a training."
    attempt = runs / ".partial" / name
    attempt.mkdir(parents=True)
    settings = dict(
        model="xgboost",
        horizon=5,
        data=dict(data="planted", classes=[-1, 0, 1], nan=None),
        config=config or dict(max_depth=4),
        seed=42,
    )
    (attempt / "config.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True))
    (attempt / "train.ipynb").write_text(json.dumps(dict(cells=[], name=name)))
    metrics = dict(log_loss=0.98, sharpe=float("nan"), n_samples=100, returns_source="close")
    history = dict(
        train_loss=[1 / (i + 1) for i in range(rounds)],
        val_loss=[1 / (i + 2) for i in range(rounds)],
        best_round=rounds - 1,
    )
    write_json(attempt / "metrics/metrics.json", metrics)
    write_json(attempt / "metrics/test_metrics.json", dict(log_loss=1.01))
    write_json(attempt / "metrics/baselines.json", dict(prior=dict(log_loss=1.05)))
    write_json(attempt / "metrics/history.json", history)
    for file in [*FILES, *(extra or [])]:
        (attempt / file).parent.mkdir(exist_ok=True, parents=True)
        (attempt / file).write_bytes(file.encode())
    result = dict(
        model="xgboost",
        family="boosting",
        horizon=5,
        data="planted",
        data_fingerprint="f1",
        seed=42,
        identity=f"id of {name}",
        code="c0de",
        splits=["val", "test"],
        seconds=dict(fit=2.0, predict=0.5),
    )
    write_json(attempt / RESULT_FILE, result | manifest)
    return load_run(publish(attempt, runs, grid))


FILES = [
    "plots/equity.png",
    "predictions/val_predictions.parquet",
    "checkpoints/model.ubj",
    ".ipynb_checkpoints/x.ipynb",
]


def client_of(runs, uri="sqlite"):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_store(uri, runs).uri)
    experiment = client.get_experiment_by_name("modelfactory")
    return client, client.search_runs([experiment.experiment_id]) if experiment else []


def snapshot(runs, uri="sqlite"):
    "Everything that MLflow shows, with run names instead of its random ids."
    client, rows = client_of(runs, uri)
    names = {r.info.run_id: r.info.run_name for r in rows}

    def files(r, folder=None):
        paths = []
        for artifact in client.list_artifacts(r.info.run_id, folder):
            paths += files(r, artifact.path) if artifact.is_dir else [artifact.path]
        return paths

    def points(r):
        return {
            k: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(r.info.run_id, k)]
            for k in r.data.metrics
        }

    def tags(r):
        return {k: names.get(v, v) for k, v in r.data.tags.items()}

    return {
        r.info.run_name: (
            r.data.params,
            points(r),
            tags(r),
            r.info.start_time,
            r.info.end_time,
            r.info.status,
            {f: Path(client.download_artifacts(r.info.run_id, f)).read_bytes() for f in files(r)},
        )
        for r in rows
    }


@pytest.fixture(scope="module")
def forks():
    "Their environment is set after MLflow was imported, but before it is used."
    forks = Forks("import mlflow, mlflow.store.tracking.sqlalchemy_store, modelfactory.runs.tracking")
    yield forks
    forks.close()


TRACK_ALL = """
import sys
from pathlib import Path
from modelfactory.runs.tracking import *
runs = Path(sys.argv[1])
print(track_runs(runs))
track_study("s", [(0, {}, 1.0, "COMPLETE")], runs=runs)
print(try_track(next(runs.glob("xg*")), "http://u:canary-g@127.0.0.1:9"))
"""
TRACK = "import sys; from modelfactory.runs.tracking import track_runs; print(track_runs(sys.argv[1]))"


def test_mlflow_shows_the_values_and_files_of_the_run(tmp_path, capfd):
    import mlflow  # before the environment is read, because an import of polars changes it

    run = make_run(tmp_path, grid="demo 3f", commit="a1b2c3")
    before, handlers, files = dict(os.environ), list(logging.getLogger().handlers), set(Path().iterdir())
    run_id = track_run(run)
    assert dict(os.environ) == before and logging.getLogger().handlers == handlers and set(Path().iterdir()) == files
    assert capfd.readouterr() == ("", "")
    client, _ = client_of(tmp_path)
    tracked = client.get_run(run_id)
    assert tracked.data.params == {
        "model": "xgboost",
        "horizon": "5",
        "data.data": "planted",
        "data.classes": "[-1, 0, 1]",
        "data.nan": "null",
        "config.max_depth": "4",
        "seed": "42",
    }
    assert tracked.data.metrics == {
        "log_loss": 0.98,
        "n_samples": 100,
        "test/log_loss": 1.01,
        "baseline/log_loss": 1.05,
        "train_loss": 1 / 3,
        "val_loss": 1 / 4,
        "best_round": 2,
    }
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "val_loss")] == [
        (0, 1 / 2),
        (1, 1 / 3),
        (2, 1 / 4),
    ]
    tags = dict(
        run=run.path.name,
        data_fingerprint="f1",
        seed="42",
        family="boosting",
        horizon="5",
        identity=run.identity,
        commit="a1b2c3",
        returns_source="close",
    )
    assert tags.items() <= tracked.data.tags.items() and tracked.data.tags["mlflow.source.git.commit"] == "a1b2c3"
    assert client.get_run(tracked.data.tags["mlflow.parentRunId"]).info.run_name == "demo 3f"
    assert tracked.info.status == "FINISHED" and tracked.info.end_time - tracked.info.start_time == 2500
    files = snapshot(tmp_path)[run.path.name][-1]
    assert files == {
        f: (run.path / f).read_bytes()
        for f in (
            "config.yaml",
            "manifest.json",
            "train.ipynb",
            "metrics/metrics.json",
            "metrics/test_metrics.json",
            "metrics/baselines.json",
            "metrics/history.json",
            "plots/equity.png",
            "predictions/val_predictions.parquet",
        )
    }
    assert mlflow.active_run() is None


def test_a_run_is_tracked_once_and_completely(tmp_path):
    run = make_run(tmp_path)
    run_id = track_run(run)
    assert track_run(run) == run_id == track_run(load_run(run.path))
    client, rows = client_of(tmp_path)
    tags = {k: v for k, v in rows[0].data.tags.items() if k.startswith("modelfactory.")}
    interrupted = client.create_run(rows[0].info.experiment_id, tags=tags).info.run_id
    assert track_run(run) == run_id and [r.info.run_id for r in client_of(tmp_path)[1]] == [run_id]
    client.delete_run(run_id)
    client.restore_run(interrupted)
    assert track_run(run) not in (run_id, interrupted) and len(client_of(tmp_path)[1]) == 1
    assert [f for f in tmp_path.iterdir() if f.name.startswith(".mlflow.db")] == []


def test_checkpoints_are_tracked_only_on_request(tmp_path):
    run = make_run(tmp_path)
    assert "checkpoints/model.ubj" not in run_view(run).files
    assert "checkpoints/model.ubj" in run_view(run, checkpoints=True).files


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    "A database with MLflow's tables, which takes a second to create; tests copy it."
    store = tracking_store("sqlite", tmp_path_factory.mktemp("empty"))
    with tracking._quiet_mlflow():
        tracking._create_database(store)
    return store.file


def test_a_store_rebuilt_from_the_files_is_the_same(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path)
    runs = [make_run(tmp_path, f"svm_h5_20260101_00000{i}_abcdef", grid="night" if i else "") for i in range(3)]
    assert track_runs(tmp_path).added == 3
    first = snapshot(tmp_path)
    assert len(first) == 4 and "mlflow.parentRunId" not in first[runs[0].path.name][2]
    (tmp_path / "mlflow.db").unlink()
    again = rebuild(tmp_path)
    assert (again.added, again.unchanged, again.removed, again.failed) == (3, 0, 0, {}) and snapshot(tmp_path) == first
    assert len([*(tmp_path / "mlflow-artifacts").iterdir()]) == 3
    shutil.rmtree(runs[2].path)
    track_study("kept", [(0, {}, 1.0, "COMPLETE")], runs=tmp_path)
    again = rebuild(tmp_path)
    assert (again.added, again.removed) == (2, 1)
    after = snapshot(tmp_path)
    remaining = {name: row for name, row in after.items() if row[2][KIND_TAG] in ("run", "grid")}
    assert remaining == {name: row for name, row in first.items() if name != runs[2].path.name} and "kept" in after


def test_a_rebuild_keeps_the_runs_of_another_folder(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "shared.db")
    uri = f"sqlite:///{tmp_path}/shared.db"
    for folder in ("first", "second"):
        make_run(tmp_path / folder, f"{folder}_h5_20260101_000000_abcdef")
        track_runs(tmp_path / folder, uri)
    shutil.rmtree(next((tmp_path / "first").glob("first*")))
    assert rebuild(tmp_path / "first", uri).removed == 1
    assert list(snapshot(tmp_path, uri)) == ["second_h5_20260101_000000_abcdef"]


def test_the_error_of_a_moved_folder_names_the_fix(empty_store, tmp_path):
    run = make_run(tmp_path / "runs")
    shutil.copy(empty_store, tmp_path / "runs")
    track_run(run)
    (tmp_path / "runs").rename(tmp_path / "moved")
    with pytest.raises(TrackingError, match="delete it"):
        track_runs(tmp_path / "moved")
    (tmp_path / "moved/mlflow.db").unlink()
    assert rebuild(tmp_path / "moved").added == 1 and not (tmp_path / "runs").exists()


def test_an_unreachable_server_gives_one_line(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path)
    files = {f: f.read_bytes() for f in run.path.rglob("*") if f.is_file()}
    tracker, calls = Tracker(UNREACHABLE), []
    monkeypatch.setattr(tracking, "try_track", lambda *args: calls.append(args) or try_track(*args))
    for _ in range(40):
        tracker(run.path)
    assert len(calls) == 1, "a server that did not answer is not tried again"
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith("not tracked: ") and err == ""
    assert "refused" in out and "modelfactory track" in out
    assert "hunter2" not in out + tracker.reason and "bob" not in out + tracker.reason
    assert list_runs(tmp_path)[0].path == run.path
    assert files == {f: f.read_bytes() for f in run.path.rglob("*") if f.is_file()}


def test_a_server_that_never_answers_times_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reason = try_track(make_run(tmp_path).path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "timed out" in reason.lower()


@pytest.mark.parametrize("uri", ["file:mlruns", "mlruns", "bob:hunter2@host", "sqlite://", "sqlite:///:memory:"])
def test_an_unsupported_address_is_refused(uri, tmp_path):
    with pytest.raises(TrackingError, match="expected sqlite") as refused:
        tracking_store(uri, tmp_path)
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "http://bob:hunter2@host",
        "http://hunter2@host/x",
        "postgresql+psycopg2://bob:hun/ter2@h@host/db".replace("hun/ter2", "hunter2"),
        "https://host/?api_key=hunter2&x=1",
        "mssql://host/db;PWD=hunter2",
        "(url: http://a:hunter2@b) and http://c:hunter2@d",
    ],
)
def test_credentials_are_not_shown(text):
    assert "hunter2" not in redact(text) and "***" in redact(text)


def test_a_broken_store_gives_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # MLflow waits 100 s for a server of a database
    run = make_run(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    for uri in (
        "sqlite",
        f"sqlite:///{run.path}/train.ipynb/x.db",
        "postgresql://bob:hunter2@127.0.0.1:9/db",
        "nothing://bob:hunter2@x",
    ):
        with pytest.raises(TrackingError) as refused:
            track_run(run, uri)
        assert "\n" not in str(refused.value) and "hunter2" not in str(refused.value) and len(str(refused.value)) < 500


def test_no_secret_of_the_environment_is_stored(tmp_path):
    make_run(tmp_path, config=dict(prices="s3://AKIAUSER:canary-a@bucket/x"), grid="g")
    secrets = dict(
        AWS_SECRET_ACCESS_KEY="canary-b",
        OPENAI_API_KEY="canary-c",
        MLFLOW_TRACKING_PASSWORD="canary-d",
        MLFLOW_TRACKING_USERNAME="canary-e",
        DATABASE_URL="postgresql://x:canary-f@h/d",
        MODELFACTORY_TRACKING="http://u:canary-g@h",
        GIT_AUTHOR_NAME="canary-h",
        USER="canary-i",
    )
    command = [sys.executable, "-c", TRACK_ALL, tmp_path]  # not a fork: the secrets are there when MLflow is imported
    p = interruptible(command, env=os.environ | secrets, stderr=subprocess.STDOUT)
    output, _ = finish(p)
    assert p.returncode == 0 and "1 tracked" in output and "canary" not in output
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    written = [f for f in files if f.name.startswith((".mlflow", "mlflow")) or "mlflow-artifacts" in f.parts]
    with_secret = {f.name for f in written if b"canary" in f.read_bytes()}
    assert len(written) > 8 and with_secret == {"config.yaml"}, "only the config of the run, which the user wrote"


def test_two_processes_at_once(forks, tmp_path):
    "Both create the store: every run is tracked once and completely, without an error."
    for i in range(4):
        make_run(tmp_path, f"svm_h5_20260101_00000{i}_abcdef", grid="both")
    both = [forks(TRACK, tmp_path) for _ in range(2)]
    outputs = [finish(p)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert sum(int(s.split()[0]) for s in outputs) == 4 and all("0 failed" in s for s in outputs)
    rows = client_of(tmp_path)[1]
    assert len(rows) == 5 and {r.info.status for r in rows} == {"FINISHED"}
    assert len({r.data.tags["modelfactory.key"] for r in rows}) == 5


def test_tracking_continues_after_a_killed_process(forks, tmp_path):
    for i in range(8):
        make_run(tmp_path, f"svm_h5_20260101_00000{i}_abcdef", rounds=200)

    def database_started():
        return (tmp_path / ".mlflow.db.partial").exists()

    def two_runs_tracked():
        return len([*(tmp_path / "mlflow-artifacts").glob("*")]) >= 2

    for reached in (database_started, two_runs_tracked):
        p = forks(TRACK, tmp_path)
        until(lambda reached=reached, p=p: reached() or p.poll() is not None, "a run that is tracked")
        p.kill()
        finish(p)
    done = track_runs(tmp_path)
    assert done.added + done.unchanged == 8 and done.added > 0 and not done.failed
    rows = client_of(tmp_path)[1]
    assert len(rows) == 8 and all(r.info.status == "FINISHED" and r.data.metrics["val_loss"] == 1 / 201 for r in rows)


def test_odd_names_and_long_values(empty_store, tmp_path):
    runs = tmp_path / ODD.replace("/", "_")
    run = make_run(
        runs,
        "x" * 40,
        rounds=1500,
        config={
            ODD: ODD,
            "long": "y" * 10_000,
            "\ud800".encode("utf-8", "replace").decode(): "\x00\x1b[31m",
            **{f"k{i}": i for i in range(150)},
        },
        extra=[f"plots/{ODD.replace('/', '_')}.txt"] if sys.platform != "win32" else [],
        grid=ODD,
    )
    run.path.rename(runs / ODD.replace("/", "_"))
    run = list_runs(runs)[0]
    shutil.copy(empty_store, runs)
    assert try_track(run.path) == ""
    track_study(ODD, [(0, {ODD: ODD}, 1.0, "COMPLETE")], runs=runs)
    client, rows = client_of(runs)
    tracked = next(r for r in rows if r.data.tags[KIND_TAG] == "run")
    params = tracked.data.params
    assert len(rows) == 4 and len(params) == len(run_view(run).params) > 150
    assert all(len(v) <= 500 for v in params.values())
    assert len(client.get_metric_history(tracked.info.run_id, "val_loss")) == 1500
    assert tracked.data.tags["run"] == run.path.name
    assert "(10,002 characters)" not in str(params) and "(10,000 characters)" in params["config.long"]


def test_damaged_runs_are_listed_and_the_others_are_tracked(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path)
    good, changed, outside, link, odd = (make_run(tmp_path, f"svm_h5_20260101_00000{i}_abcdef") for i in range(5))
    (changed.path / "plots/equity.png").write_bytes(b"other")
    secret = tmp_path / "secret.txt"
    secret.write_text("canary")
    manifest = json.loads((outside.path / "manifest.json").read_text())
    (outside.path / "manifest.json").write_text(
        json.dumps(manifest | dict(files={"../secret.txt": manifest["files"]["config.yaml"]}))
    )
    (link.path / "train.ipynb").unlink()
    (link.path / "train.ipynb").symlink_to(secret)
    (odd.path / "metrics/metrics.json").write_text("[1, 2]")
    done = track_runs(tmp_path)
    assert done.added == 1 and set(done.failed) == {r.path.name for r in (changed, outside, link, odd)}
    assert "expected a path inside the run" in done.failed[outside.path.name]
    assert "symbolic link" in done.failed[link.path.name]
    assert "changed since" in done.failed[changed.path.name]
    artifacts = [f for f in (tmp_path / "mlflow-artifacts").rglob("*") if f.is_file()]
    assert not any(b"canary" in f.read_bytes() for f in artifacts)
