"The board of a grid: remaining time from measured costs, states from files, lines, JSON, pause and cancel."

import io
import json
import os
import subprocess
import sys
import time
import uuid
from types import SimpleNamespace

import jsonschema
import psutil
import pytest
from conftest import PATIENCE, finish, interruptible, read_line, until
from hypothesis import given
from hypothesis import strategies as st
from quick import quick_models, small_splits
from typer.testing import CliRunner

from modelfactory import progress
from modelfactory.cli import app
from modelfactory.configuration import ConfigError
from modelfactory.progress import PROGRESS_FILE, Progress, ShowProgress, early_stop_text, write_progress_to
from modelfactory.runs import board as boards
from modelfactory.runs.board import ENDED, GridReader, GridState, LineBoard, RunState, TerminalBoard, visible_runs
from modelfactory.runs.costs import Costs, remaining_seconds, run_seconds
from modelfactory.runs.engine import RUN_ENV_VAR
from modelfactory.runs.executors import Job
from modelfactory.runs.monitor import GridMonitor, run_log
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import FAILED_FOLDER, PARTIAL_FOLDER, start_attempt, write_json
from modelfactory.runs.sessions import SESSIONS_FOLDER, live_sessions, start_session
from modelfactory.training.trainer import Trainer

TEXT, WHOLE, FLAG = dict(type="string"), dict(type="integer", minimum=0), dict(type="boolean")
SECONDS, MAYBE_TEXT = dict(type=["number", "null"], minimum=0), dict(type=["string", "null"])


def event(name, **properties):
    "The schema of a JSON line with exactly these keys."
    properties = dict(event=dict(const=name)) | properties
    return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)


LOSSES = dict(type="object", additionalProperties=dict(type=["number", "null"]))
STATUS = dict(enum=["waiting", "paused", "running", "cancelling", *ENDED])
OUTCOME = dict(run=TEXT, status=TEXT, seconds=SECONDS, reason=TEXT)
OUTCOMES = dict(type="object", properties=OUTCOME, required=list(OUTCOME), additionalProperties=False)
EVENTS = [
    event(
        "run",
        status=STATUS,
        **dict.fromkeys(("run", "step", "note", "identity"), TEXT),
        **dict.fromkeys(("seconds", "seconds_left"), SECONDS),
        losses=LOSSES,
        folder=MAYBE_TEXT,
    ),
    event(
        "grid",
        counts=dict(type="object", additionalProperties=WHOLE),
        seconds_left=SECONDS,
        unknown=dict(type="array", items=TEXT),
        paused=FLAG,
    ),
    event("message", text=TEXT),
    event("end", ok=FLAG, outcomes=dict(type="array", items=OUTCOMES)),
]


def checked_lines(text):
    "The events of JSON lines, each of which has its schema."
    events = [json.loads(line) for line in text.splitlines()]
    for line in events:
        jsonschema.validate(line, dict(oneOf=EVENTS))
    return events


# remaining time


def naive_end(running, waiting, workers):
    "Time at which the last run ends: each waiting run starts on the worker that is free first."
    free = [seconds or 0 for seconds in running] + [0] * max(0, workers - len(running))
    for seconds in waiting:
        first = free.index(min(free))
        free[first] += seconds or 0
    return max(free)


MAYBE_SECONDS = st.lists(st.one_of(st.none(), st.integers(0, 1000).map(float)), max_size=8)


@given(MAYBE_SECONDS, MAYBE_SECONDS, st.integers(1, 5))
def test_the_remaining_time_is_that_of_a_naive_schedule(running, waiting, workers):
    left = remaining_seconds(running, waiting, workers)
    if all(seconds is None for seconds in running + waiting):
        assert left == (None if running + waiting else 0)
    else:
        assert left == naive_end(running, waiting, workers)


def stored_run(model, seconds, data="d", horizon=5, scored=True, **manifest):
    values = dict(model=model, horizon=horizon, data_fingerprint=data, seconds=dict(fit=seconds)) | manifest
    return SimpleNamespace(manifest=values, scored=scored)


def job(model, data="d", horizon=5):
    return Job(dict(model=model, horizon=horizon, data="x"), f"{model} {data} {horizon}", fingerprint=data)


def test_costs_of_no_run_of_one_run_and_of_many_runs():
    assert Costs([]).estimate(job("gru")) is None
    assert Costs([stored_run("gru", 10.0)]).estimate(job("gru")) == 10
    many = [stored_run("gru", s) for s in (10.0, 50.0, 20.0)] + [stored_run("svm", 1.0)]
    assert Costs(many).estimate(job("gru")) == 20 and Costs(many).estimate(job("svm")) == 1


def test_costs_prefer_the_same_data_then_the_same_horizon_then_the_same_model():
    costs = Costs([stored_run("gru", 1.0), stored_run("gru", 2.0, "e"), stored_run("gru", 9.0, "e", 20)])
    assert [costs.estimate(job("gru", *task)) for task in (("d", 5), ("e", 5), ("f", 5), ("f", 7))] == [1, 2, 1.5, 2]
    joint = Costs([stored_run("gru", 3.0, horizon=[5, 20])])
    assert joint.estimate(job("gru", horizon=(5, 20))) == 3 and joint.estimate(job("gru", horizon=[5, 20])) == 3


def test_costs_use_the_wall_clock_time_and_ignore_damaged_and_unscored_runs():
    assert run_seconds(stored_run("gru", 1.0, wall_seconds=8.0)) == 8
    damaged = [stored_run("gru", "long"), stored_run("gru", 5.0, scored=False), stored_run("gru", 0)]
    damaged.append(stored_run("gru", 5.0, wall_seconds="long"))
    assert run_seconds(damaged[0]) is None and Costs(damaged).estimate(job("gru")) is None


# states from files


@pytest.fixture
def fabricated(tmp_path):
    "A runs folder with a running and a failed attempt, a reader of three jobs, and the attempts."
    jobs, runs = [job(name) for name in ("gru", "svm", "mlp")], tmp_path / "runs"
    running, failed = (start_attempt(runs, j.parameters) for j in jobs[:2])
    for attempt, j in ((running, jobs[0]), (failed, jobs[1])):
        write_json(attempt / "job.json", dict(parameters=j.parameters | dict(output=str(attempt))))
    write_json(failed / "outcome.json", dict(status="timeout", reason="not done after 9 s"))
    (runs / FAILED_FOLDER).mkdir()
    failed = failed.rename(runs / FAILED_FOLDER / failed.name)
    return SimpleNamespace(runs=runs, reader=GridReader(jobs, runs), jobs=jobs, running=running, failed=failed)


def test_states_come_from_the_files_of_attempts(fabricated):
    write_progress_to(fabricated.running)
    try:
        Progress(30, "gru").update(12, losses=dict(train_loss=1.2, val_loss=float("nan")))
    finally:
        write_progress_to(None)
    state = fabricated.reader.read()
    assert [run.status for run in state.runs] == ["running", "timeout", "waiting"]
    assert state.runs[0].step == "round 12 of 30" and state.runs[0].losses == dict(train_loss=1.2, val_loss=None)
    assert state.is_active and "1 model has no finished run yet" in state.summary()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"done": "x"}', '{"done": 1, "of": 2, "seconds": 1, "losses": 3}'])
def test_a_damaged_progress_file_is_ignored(fabricated, text):
    (fabricated.running / PROGRESS_FILE).write_text(text)
    assert fabricated.reader.read().runs[0].step == "preparing"


def test_the_measured_cost_precedes_the_rounds(fabricated):
    values = dict(label="gru", done=1, of=100, seconds=1.0, losses={})
    write_json(fabricated.running / PROGRESS_FILE, values)
    assert fabricated.reader.read().runs[0].seconds_left == 99
    began = time.time() - 100
    os.utime(fabricated.running / "job.json", (began, began))
    fabricated.reader.costs = Costs([stored_run("gru", 500.0)])
    assert 300 < fabricated.reader.read().runs[0].seconds_left <= 400
    fabricated.reader.costs = Costs([stored_run("gru", 50.0)])
    assert fabricated.reader.read().runs[0].seconds_left == 99  # it already takes longer than measured


def test_a_session_makes_earlier_failures_wait_and_carries_requests(fabricated):
    old = time.time() - 1000
    os.utime(fabricated.failed / "job.json", (old, old))
    assert fabricated.reader.read().runs[1].status == "timeout"
    session = start_session(fabricated.runs, [j.identity for j in fabricated.jobs], 2)
    assert [run.status for run in fabricated.reader.read().runs] == ["running", "waiting", "waiting"]
    session.pause()
    session.cancel(fabricated.jobs[0].identity)
    session.cancel(fabricated.jobs[2].identity)
    state = fabricated.reader.read()
    assert [run.status for run in state.runs] == ["cancelling", "paused", "cancelled"] and state.is_paused
    session.end()
    assert [run.status for run in fabricated.reader.read().runs] == ["running", "timeout", "waiting"]


def test_a_session_of_a_dead_process_is_ignored_and_removed(tmp_path):
    dead = tmp_path / SESSIONS_FOLDER / "1.0_a"
    dead.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(PATIENCE)
    (dead / "pid").write_text(f"{process.pid} 1.0")
    assert live_sessions(tmp_path, {"a"}) == []
    session = start_session(tmp_path, ["a"])
    assert not dead.exists() and live_sessions(tmp_path, {"a"}) == [session]


def test_a_cancelled_identity_cannot_name_another_folder(tmp_path):
    session = start_session(tmp_path, ["a"])
    with pytest.raises(ValueError, match="inside the folder"):
        session.cancel("../x")


# what is shown


def states(n):
    order = ("running", "waiting", "done", "failed")
    rows = [RunState(f"model_{i} h5 eurusd fold {i}", order[i % 4], 10.0, identity=str(i)) for i in range(n)]
    rows[0].step, rows[0].losses, rows[0].seconds_left = "round 12 of 30", dict(val_loss=1.05), 3725.0
    return GridState(rows, 3725.0, ["gru"], [])


def test_a_terminal_of_80_columns_shows_what_is_running(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    screen = io.StringIO()
    board = TerminalBoard(screen)
    state = states(100)
    state.runs[3].note = "ValueError: no rows in the data of this split at all, expected some"
    board.show(state)
    board.close()
    lines = screen.getvalue().rstrip().splitlines()
    assert all(text in screen.getvalue() for text in ("failed", "1.0500", "10s", "model_0 h5 eurusd fold 0"))
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "round 12 of 30" in screen.getvalue() and "1h 02m" in screen.getvalue() and "80 more" in screen.getvalue()


def test_visible_runs_prefer_running_then_failed_then_waiting():
    shown = visible_runs(states(100).runs, 60)
    assert [sum(s.status == name for s in shown) for name in ("running", "failed", "waiting")] == [25, 25, 10]
    assert visible_runs(shown, 1000) == shown


def test_lines_of_a_log_are_changes_of_statuses(capsys):
    board, state = LineBoard(), states(4)
    board.show(state)
    assert (
        capsys.readouterr().out
        == "model_0 h5 eurusd fold 0: running, round 12 of 30, val_loss 1.0500, about 1h 02m left\n"
    )
    board.show(state)
    assert capsys.readouterr().out == ""
    state.runs[0] = RunState(state.runs[0].run, "done", 12.0, "stopped early at 42 of 150", identity="0")
    board.show(state)
    assert capsys.readouterr().out.startswith(
        "model_0 h5 eurusd fold 0: done in 12s, stopped early at 42 of 150; 2 done"
    )


def test_tables_escape_names_and_errors():
    name = "<img src=x onerror=alert(1)>\x1b[31m"
    row = RunState(name, "failed", 1.0, name, {name: 1.0}, note=name, identity=name)
    text = boards.state_html(GridState([row], None, [name], []), {name: ""})
    assert "<img" not in text and "\x1b" not in text and "&lt;img" in text
    assert "\x1b" not in boards.run_line(row)


@pytest.mark.parametrize("rounds, text", [(None, ""), ({}, ""), ("x", ""), (dict(done=5, of=5), "")])
def test_only_a_fit_with_fewer_rounds_has_stopped_early(rounds, text):
    assert early_stop_text(rounds) == text and early_stop_text(dict(done=42, of=150)) == "stopped early at 42 of 150"


# the progress of one fit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture
def drawn(monkeypatch):
    "The HTML that is drawn in a notebook."
    texts = []

    class Handle:
        def update(self, shown):
            texts.append(shown.data)

    def display(shown, **options):
        texts.append(shown.data)
        return Handle()

    monkeypatch.setattr(progress, "in_kernel", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(ShowProgress.__init__, "__defaults__", (0.0,))
    return texts


@pytest.fixture
def boosting(data):
    "Makes a trainer that stops early within a moment."
    config = dict(n_rounds=40, patience=2, threads=1)
    return lambda: Trainer(dict(model="lightgbm", horizon=5, data=str(data), config=config))


def test_a_trainer_shows_its_fit_in_a_notebook_and_says_that_it_stopped_early(drawn, boosting):
    trainer = boosting()
    history = trainer.train()
    n = len(history["val_loss"])
    assert n < 40 and trainer.rounds == dict(done=n, of=40)
    assert f"stopped early at {n} of 40 100%" in drawn[-1] and "<progress value='1' max='1'" in drawn[-1]
    assert "val_loss" in drawn[-1] and trainer.model.callbacks == []


def test_a_trainer_is_quiet_in_a_script_and_inside_another_bar(drawn, boosting, monkeypatch, capsys):
    with Progress(1, "outer"):
        n = len(drawn)
        boosting().train()
        assert len(drawn) == n
    monkeypatch.setattr(progress, "in_kernel", lambda: False)
    boosting().train()
    assert capsys.readouterr() == ("", "")


def test_a_fit_that_fails_leaves_no_callback_behind(drawn, boosting):
    trainer = boosting()
    model = trainer.build_model()
    model.fit = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert model.callbacks == []


# real grids


@pytest.fixture
def marked(monkeypatch, tmp_path_factory):
    "Marks the processes of this test, and adds the models of the tests."
    monkeypatch.setenv("BOARD_TEST", uuid.uuid4().hex)
    monkeypatch.setenv("MODELFACTORY_PLUGINS", quick_models(tmp_path_factory.mktemp("models")))


def run_processes():
    "The living processes of runs of this test."
    listed = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(RUN_ENV_VAR) and environment.get("BOARD_TEST") == os.environ["BOARD_TEST"]:
                listed += [process] * (process.status() != psutil.STATUS_ZOMBIE)
        except (psutil.Error, OSError):
            pass
    return listed


def end_grid(monitor):
    "Ends a grid: after a failed test, its runs and its pause would keep this process alive."
    for session in live_sessions(monitor.runs, {run.identity for run in monitor.state.runs}):
        session.resume()
        for run in monitor.state.runs:
            session.cancel(run.identity)


@pytest.mark.slow
@pytest.mark.faults
def test_one_run_is_cancelled_the_other_waits_while_paused_and_a_watch_ends_with_the_grid(marked, data, tmp_path):
    flag, runs, file = tmp_path / "began", tmp_path / "runs", tmp_path / "grid.yaml"
    overrides = dict(faulty=dict(fault="children", flag=str(flag)))
    file.write_text(json.dumps(dict(models=["faulty", "nearest"], horizons=[5], data=[str(data)], overrides=overrides)))
    other = GridMonitor(file, runs)  # as in another process: it sees the same files
    monitor = GridMonitor(file, runs, every=0.1).start(workers=1)
    try:
        with pytest.raises(ConfigError, match="is running"):
            monitor.start()
        until(lambda: flag.exists() or monitor.error or monitor.result, "the first run to start a process")
        assert [run.status for run in other.refresh().runs] == ["running", "waiting"]
        command = [sys.executable, "-m", "modelfactory", "status", file, "--output", runs, "--watch", "--json"]
        watch = interruptible(command)
        first_line = read_line(watch)
        other.pause()
        other.cancel("faulty h5 small")
        until(lambda: other.refresh().runs[0].status == "cancelled", "the first run to end")
        until(lambda: run_processes() == [], "the processes of the run to end")
        assert other.state.runs[1].status == "paused" and list_runs(runs) == []
        assert json.loads((other.state.runs[0].folder / "outcome.json").read_text())["status"] == "cancelled"
        other.resume()
        state = monitor.wait(PATIENCE)
        assert [run.status for run in state.runs] == ["cancelled", "done"] and monitor.error is None
        assert monitor.result.count("ok") == 1 and not monitor.result.ok
    finally:
        end_grid(other)
    out, err = finish(watch)
    events = checked_lines(first_line + out)
    assert watch.returncode == 0 and err == "" and events[-1]["event"] in ("run", "grid"), err
    last = {line["run"]: line["status"] for line in events if line["event"] == "run"}
    assert last == {"faulty h5 small": "cancelled", "nearest h5 small": "done"}
    assert not list((runs / PARTIAL_FOLDER).iterdir()) and not (runs / SESSIONS_FOLDER).exists()
    (run,) = list_runs(runs)
    assert run.manifest["wall_seconds"] > 0
    with pytest.raises(ConfigError, match="expected a run of a grid that is running"):
        other.cancel("nearest h5 small")


@pytest.mark.slow
def test_piped_output_has_a_line_for_each_run_and_json_lines_have_their_schema(marked, data, tmp_path):
    flag, file = tmp_path / "go", tmp_path / "grid.yaml"
    overrides = dict(faulty=dict(fault="rounds", flag=str(flag)))
    file.write_text(json.dumps(dict(models=["faulty"], horizons=[5], data=[str(data)], overrides=overrides)))
    command = [sys.executable, "-m", "modelfactory", "experiment", file, "--output", tmp_path / "runs"]
    process, lines = interruptible([*command, "--json"]), []
    for line in process.stdout:
        lines.append(line)
        if '"round ' in line and json.loads(line)["losses"]:
            flag.touch()
    process.wait(PATIENCE)
    events = checked_lines("".join(lines))
    steps = [line["step"] for line in events if line["event"] == "run"]
    assert "stopped early at" in steps[-1] and " of 150" in steps[-1] and any(s.startswith("round ") for s in steps)
    assert events[-1]["event"] == "end" and events[-1]["ok"] and process.returncode == 0
    done = CliRunner().invoke(app, ["experiment", str(file), "--output", str(tmp_path / "runs"), "--force"])
    began, ended = done.output.splitlines()[:2]
    assert began.startswith("faulty h5 small: running") and "faulty h5 small: done in " in ended, done.output
    assert "stopped early at 1 of 150; 1 done" in ended
    state = CliRunner().invoke(app, ["status", str(file), "--output", str(tmp_path / "runs"), "--watch"])
    assert state.exit_code == 0


def test_a_watch_of_a_grid_that_nobody_runs_ends_and_says_so(marked, data, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps(dict(models=["nearest"], horizons=[5], data=[str(data)])))
    done = CliRunner().invoke(app, ["status", str(file), "--output", str(tmp_path / "runs"), "--watch"])
    assert done.exit_code == 0 and "no process runs this grid; 1 of 1 runs are waiting" in done.output
    assert not (tmp_path / "runs").exists()


def test_a_monitor_names_the_runs_that_it_knows(marked, data, tmp_path):
    monitor = GridMonitor(dict(models=["nearest"], horizons=[5], data=[str(data)]), tmp_path / "runs")
    with pytest.raises(ConfigError, match="nearest h5 small"):
        monitor.cancel("nearst h5 small")
    with pytest.raises(ConfigError, match="is waiting, expected a run of a grid that is running"):
        monitor.cancel("nearest h5 small")
    assert monitor.log("nearest h5 small") == "" and run_log(tmp_path) == ""
