"""Tuning in real processes: killed, in parallel, interrupted, with failing trials.

The model predicts the class in column `signal` with probability `p`. The column equals the label in 80 of 100 rows, and
another class in the rest. So the best `p` is .8, and its log loss can be computed."""

import shutil
import signal
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE, finish, until
from forks import Forks

from modelfactory.configuration import ConfigError, read_yaml
from modelfactory.data.splits import MissingFile, SplitsError
from modelfactory.models.params import read_params
from modelfactory.models.registry import ModelRegistry
from modelfactory.training.trainer import Trainer
from modelfactory.tuning.result import n_trials_of, read_tuned
from modelfactory.tuning.space import TunerError, read_space
from modelfactory.tuning.storage import TRIAL_RETRIES, live_trials, open_storage
from modelfactory.tuning.study import OptunaModelTuner

pytestmark = [pytest.mark.faults, pytest.mark.slow]

PLUGIN = """
import os, time
from dataclasses import dataclass
import numpy as np
from modelfactory.models.callbacks import run_callbacks
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.tabular import TabularConfig, TabularModel

@dataclass
class ValleyConfig(TabularConfig):
    p: float = .4
    rounds: int = 8
    pause: float = 0.  # seconds a round
    deadly: float = 2.  # the process is killed when p is greater
    refuses: float = 2.  # ValueError when p is greater

@ModelRegistry.register("valley", family="example")
class Valley(TabularModel):
    "Predicts the class in a column with probability p."
    Config = ValleyConfig
    def fit_rows(self, train, val):
        c = self.config
        if begun := os.environ.get("VALLEY_BEGUN"): open(begun, "w").close()
        if c.p > c.refuses: raise ValueError(f"p is {c.p:.2f}, expected at most {c.refuses}")
        if c.p > c.deadly: os.kill(os.getpid(), 9)
        last = -np.log(self.predict_rows(val.X)[np.arange(len(val.y)), val.y]).mean()
        run_callbacks(self, "on_fit_start", c.rounds)
        for done in range(1, c.rounds + 1):
            time.sleep(c.pause)
            loss = np.log(3) + (last - np.log(3)) * done / c.rounds
            if run_callbacks(self, "on_epoch_end", done - 1, {"val_loss": loss}): break
        if log := os.environ.get("VALLEY_LOG"): open(log, "a").write(f"{os.getpid()} {done}\\n")
        return {}
    def predict_rows(self, X): return np.where(np.arange(3) == X[:, :1] + 1, self.config.p, (1 - self.config.p) / 2)
    def write(self, folder): pass
    def read(self, folder): pass
"""
IMPORTS = """import optuna.storages, sqlalchemy.dialects.sqlite, torch
from modelfactory.tuning.study import OptunaModelTuner
from modelfactory.training.trainer import Trainer
from modelfactory.models.registry import ModelRegistry
ModelRegistry.discover()"""
RUN = """import sys
from modelfactory.tuning.study import OptunaModelTuner
task = dict(model="valley", horizon=5, data=sys.argv[1], config=eval(sys.argv[4]))
OptunaModelTuner(task, n_trials=int(sys.argv[3]), folds=2, storage=sys.argv[2], heartbeat=1).run()
print("done")"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A plugin, its YAML, and splits without test, whose val is not a parquet file."
    home = tmp_path_factory.mktemp("home")
    (home / "valley.py").write_text(PLUGIN)
    (home / "params/models").mkdir(parents=True)
    (home / "params/models/valley.yaml").write_text(
        "presets:\n  quick: {rounds: 6}\nsearch:\n  p: {type: float, low: 0.35, high: 0.99}\n"
    )
    data, rng, n = home / "data", np.random.default_rng(0), 1500
    data.mkdir()
    hours = pd.to_timedelta(np.tile(np.arange(10), n // 10), unit="h")
    times = pd.bdate_range("2024-01-01 09:30", periods=n // 10).repeat(10) + hours
    frame = pd.concat([pd.DataFrame(dict(datetime=times, symbol=s)) for s in "AB"], ignore_index=True)
    y = rng.integers(-1, 2, len(frame))
    signal = np.where(rng.random(len(frame)) < 0.8, y, (y + 1 + rng.integers(1, 3, len(frame))) % 3 - 1)
    signal = pd.Series(signal).groupby(frame.symbol).shift(-1, fill_value=0)  # a window ends before its labelled bar
    close = 100 * np.exp(np.cumsum(rng.normal(0, 1e-3, len(frame))))
    frame = frame.assign(signal=signal.astype(float), label_h5=y, close=close)
    frame.to_parquet(data / "train_scaled.parquet")
    (data / "val_scaled.parquet").write_text("not a parquet file, because it is never read")
    return home


@pytest.fixture(scope="module")
def forks():
    forks = Forks(IMPORTS)
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    sys.modules.pop("modelfactory_plugins.valley", None)
    for key, value in dict(PLUGINS=home / "valley.py", PARAMS=home / "params", RUNS=home / "runs").items():
        monkeypatch.setenv(f"MODELFACTORY_{key}", str(value))


def tuner(home, storage, n=10, config=None, folds=2, **kw):
    task = dict(model="valley", horizon=5, data=str(home / "data"), config=config or {})
    return OptunaModelTuner(task, n, folds=folds, storage=storage, heartbeat=1, **kw)


def process(forks, home, storage, n, config=None, **env):
    return forks(RUN, home / "data", storage, n, repr(config or {}), **env)


def states(result):
    return sorted(t.state.name for t in result.trials)


def stored_states(storage):
    "States of the trials of the only study in a database; empty while the database is being created."
    import optuna

    if not storage.exists():
        return []
    url = f"sqlite:///{storage}"
    try:
        names = optuna.get_all_study_names(url)
        trials = optuna.load_study(study_name=names[0], storage=url).get_trials(deepcopy=False) if names else []
        return [t.state.name for t in trials]
    except Exception:
        return []  # the tables are being created


def test_a_search_finds_the_planted_optimum_and_is_reproducible_in_two_parts(home, tmp_path):
    "The second part continues the first one from the database alone."
    few_rounds = dict(rounds=4)
    first = tuner(home, tmp_path / "a.db", 18, few_rounds).run()
    assert abs(first.params["p"] - 0.8) < 0.05 and first.value < 0.66 < 0.75 < first.default
    assert len(first.trials) == 18 and first.trials[0].params == {"p": 0.4}
    tuner(home, tmp_path / "b.db", 12, few_rounds).run()
    again = tuner(home, tmp_path / "b.db", 18, few_rounds).run()

    def trial_values(result):
        return [(t.state, t.params, t.value, t.intermediate_values) for t in result.trials]

    assert trial_values(first) == trial_values(again)
    params, facts = read_tuned(first.save(tmp_path / "t.yaml"))
    assert params == first.params and facts["objective"] == "log_loss"
    assert facts["n_trials"] == 18 == n_trials_of("valley", 5, facts["data_fingerprint"], tmp_path / "a.db")
    task = dict(model="valley", horizon=5, data=str(home / "data"), config=read_yaml(tmp_path / "t.yaml"))
    assert Trainer(task).model_config["p"] == first.params["p"]
    assert list(tmp_path.glob(".*")) == []


def test_after_a_sigkill_the_next_call_runs_the_remaining_trials(forks, home, tmp_path):
    "The process is killed in the middle of a trial. The next call also repeats that trial."
    storage, slow = tmp_path / "k.db", dict(pause=0.04)
    victim = process(forks, home, storage, 7, slow)

    def is_third_trial():
        states = stored_states(storage)
        return states.count("COMPLETE") + states.count("PRUNED") >= 2 and "RUNNING" in states

    until(is_third_trial, "two trials")
    victim.kill()
    victim.wait(PATIENCE)
    result = tuner(home, storage, 7, slow).run()
    assert len(result.trials) == 7 and {"COMPLETE", "PRUNED"} >= set(states(result)) and result.n_trials == 7
    (lost,) = [t for t in result.study.trials if t.number not in {u.number for u in result.trials}]
    assert lost.state.name == "FAIL"
    repeated = [t for t in result.trials if t.system_attrs.get("retry_history") == [lost.number]]
    assert any(t.params == lost.params for t in repeated) or not lost.params


def test_two_processes_share_one_study(forks, home, tmp_path):
    storage, log = tmp_path / "two.db", tmp_path / "log"
    both = [process(forks, home, storage, 9, dict(pause=0.03), VALLEY_LOG=log) for _ in range(2)]
    for p in both:
        out, err = finish(p)
        assert p.returncode == 0 and "done" in out, err
    result = tuner(home, storage, 9, dict(pause=0.03)).run()
    assert len(result.trials) == 9 and set(states(result)) <= {"COMPLETE", "PRUNED"}
    assert len({t.params["p"] for t in result.trials}) == 9
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 2, "both processes ran trials"


def test_ctrl_c_ends_at_once_and_loses_no_trial(forks, home, tmp_path):
    storage, slow, begun = tmp_path / "c.db", dict(pause=0.2), tmp_path / "begun"
    victim = process(forks, home, storage, 4, slow, VALLEY_BEGUN=begun)
    until(lambda: begun.exists() or victim.poll() is not None, "a trial")
    victim.send_signal(signal.SIGINT)
    written = finish(victim)
    assert victim.returncode != 0 and "RUNNING" not in stored_states(storage), written
    trials = live_trials(tuner(home, storage, 4, slow).study())
    assert [t.state.name for t in trials] == ["WAITING"]


def test_a_trial_that_always_kills_its_process_fails(forks, home, tmp_path):
    storage, deadly = tmp_path / "d.db", dict(deadly=0.39)
    for _ in range(TRIAL_RETRIES + 1):
        victim = process(forks, home, storage, 1, deadly)
        assert victim.wait(PATIENCE) == -signal.SIGKILL
    with pytest.raises(TunerError, match="the only trial failed with a worker that was lost each time"):
        tuner(home, storage, 1, deadly).run()


def test_bad_trials_are_pruned(home, tmp_path, monkeypatch):
    monkeypatch.setenv("VALLEY_LOG", str(tmp_path / "log"))
    result = tuner(home, tmp_path / "p.db", 20, dict(rounds=20)).run()
    rounds = sum(int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines())
    assert result.count("PRUNED") >= 3 and rounds < 20 * 2 * 20 * 0.95

    def loss(t):
        return -(0.8 * np.log(t.params["p"]) + 0.2 * np.log((1 - t.params["p"]) / 2))

    pruned = [t for t in result.trials if t.state.name == "PRUNED"]
    assert all(loss(t) > result.value + 0.01 for t in pruned) and abs(result.params["p"] - 0.8) < 0.06
    assert any(max(t.intermediate_values) % 10 for t in pruned), "no trial was pruned within a fold"


def test_a_configuration_that_the_model_rejects_fails_with_its_reason(home, tmp_path):
    result = tuner(home, tmp_path / "f.db", 10, dict(refuses=0.7)).run()
    assert result.count("FAIL") >= 1 and result.params["p"] <= 0.7 and len(result.trials) == 10
    assert all(r.startswith("ValueError: p is") for r in result.failures())
    message = "all 10 trials failed, the first with ValueError: p is 0.40, expected at most 0.1; fix"
    with pytest.raises(TunerError, match=message):
        tuner(home, tmp_path / "g.db", 15, dict(refuses=0.1)).run()


@pytest.mark.parametrize("metric, best", [("f1_macro", 0.75), ("sharpe_net", -100)])
def test_f1_and_sharpe_are_maximised(home, tmp_path, metric, best):
    result = tuner(home, tmp_path / "m.db", 4, objective=metric).run()
    assert result.study.direction.name == "MAXIMIZE" and result.value > best
    assert result.value == max(t.value for t in result.trials if t.state.name == "COMPLETE")
    assert np.isclose(np.mean(result.fold_values), result.value)


def test_val_is_read_only_with_on_val_and_test_is_never_read(home, tmp_path):
    assert not (home / "data/test_scaled.parquet").exists()
    tuner(home, tmp_path / "t.db", 1).run()
    with pytest.raises(SplitsError, match="expected a parquet file"):
        tuner(home, tmp_path / "v.db", 1, on="val").run()
    frame = pd.read_parquet(home / "data/train_scaled.parquet")
    shutil.copytree(home / "data", tmp_path / "data")
    frame.assign(datetime=frame.datetime + pd.Timedelta("700D")).to_parquet(tmp_path / "data/val_scaled.parquet")
    task = dict(model="valley", horizon=5, data=str(tmp_path / "data"))
    result = OptunaModelTuner(task, 3, on="val", storage=tmp_path / "v.db").run()
    assert len(result.fold_values) == 1 and "no longer an independent" in repr(result)
    assert read_tuned(result.save(tmp_path / "v.yaml"))[1]["measured_on"] == "val"


@pytest.mark.parametrize(
    "search, message",
    [
        ("search:\n  q: {type: float, low: 0, high: 1}", "unknown key 'q'"),
        ("search:\n  p: {type: flat, low: 0, high: 1}", "p: type 'flat', did you mean 'float'"),
        ("search:\n  p: {low: 0, high: 1}", "expected type"),
        ("search:\n  p: 3", "p: found 3, expected type"),
        ("search:\n  p: {type: float, low: 1, high: 0}", "low <= high"),
        ("search:\n  p: {type: float, low: 0, high: 1, log: true}", "p: "),
        ("search:\n  p: {type: float, low: a, high: 1}", "low = 'a'"),
        ("search:\n  p: {type: float, low: 0}", "high is missing"),
        ("search:\n  p: {type: categorical, choices: []}", "p: "),
        ("search:\n  p: {type: categorical, choices: [a]}", "p = 'a'"),
        ("search:\n  rounds: {type: int, low: 1.5, high: 3}", "low = 1.5"),
        ("search:\n  p: {type: float, low: 0, high: 1, hihg: 2}", "unknown key 'hihg', did you mean 'high'"),
        ("search: [p]", "found a list"),
        ("search: {}", "nothing to vary"),
        ("rounds: 5", "nothing to vary"),
    ],
)
def test_a_wrong_search_space_is_an_error_and_writes_nothing(home, tmp_path, monkeypatch, search, message):
    (tmp_path / "params/models").mkdir(parents=True)
    (tmp_path / "params/models/valley.yaml").write_text(search + "\n")
    monkeypatch.setenv("MODELFACTORY_PARAMS", str(tmp_path / "params"))
    monkeypatch.setenv("MODELFACTORY_RUNS", str(tmp_path / "runs"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as e:
        tuner(home, None).run()
    assert message in str(e.value) and "valley.yaml" in str(e.value) and "\n" not in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(objective="loss"), "did you mean 'log_loss'"),
        (dict(on="test"), "on = 'test'"),
        (dict(n=0), "n_trials = 0"),
        (dict(folds=0), "folds = 0"),
        (dict(config=dict(p=0.5)), "nothing to vary besides"),
        (dict(config=dict(q=0.5)), "unknown key 'q'"),
    ],
)
def test_a_wrong_argument_is_an_error_and_writes_nothing(home, tmp_path, kw, message):
    with pytest.raises(ConfigError) as e:
        tuner(home, tmp_path / "b.db", **kw)
    assert message in str(e.value) and list(tmp_path.iterdir()) == []


def test_wrong_data_is_an_error_before_a_database_is_created(home, tmp_path):
    with pytest.raises(MissingFile):
        OptunaModelTuner(dict(model="valley", horizon=5, data="nowhere"), storage=tmp_path / "b.db").run()
    with pytest.raises(SplitsError, match="n_folds = 5000"):
        tuner(home, tmp_path / "b.db", folds=5000).run()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file/x.db", "nosuchdb://me:secret@host/x"):
        with pytest.raises(TunerError, match="cannot be opened") as e:
            open_storage(storage)
        assert "secret" not in str(e.value) and "\n" not in str(e.value)
    (tmp_path / "text.db").write_text("not a database, but long enough to be taken for one" * 9)
    with pytest.raises(TunerError, match="cannot be opened"):
        open_storage(tmp_path / "text.db")
    (tmp_path / "plain.yaml").write_text("p: 0.5\n")
    with pytest.raises(ConfigError, match="no comments on how it was tuned"):
        read_tuned(tmp_path / "plain.yaml")


def test_each_task_has_its_own_study(home, tmp_path):
    tasks = [
        {},
        dict(folds=3),
        dict(objective="f1_macro"),
        dict(on="val"),
        dict(embargo=1),
        dict(config=dict(rounds=9)),
        dict(search=dict(p=dict(type="float", low=0.4, high=0.9))),
    ]
    assert len({tuner(home, tmp_path / "x.db", **task).study_name for task in tasks}) == len(tasks)
    assert tuner(home, tmp_path / "y.db", 99).study_name == tuner(home, tmp_path / "x.db").study_name


def test_the_search_space_of_each_model_contains_its_defaults(monkeypatch):
    monkeypatch.delenv("MODELFACTORY_PARAMS")
    for model in ModelRegistry.list_models():
        if model["name"] == "valley":
            continue
        space = read_space(model["name"])
        config = ModelRegistry.get(model["name"]).Config(**read_params(model["name"]).config)
        assert all(r.contains(getattr(config, key)) for key, r in space.items()), model["name"]


def test_the_study_notebook(home, tmp_path):
    import nbformat

    from modelfactory.runs.engine import check_parameters, execute_notebook, find_notebook

    parameters = dict(
        model="valley",
        horizon=5,
        data=str(home / "data"),
        preset="quick",
        trials=6,
        runs=str(tmp_path),
        output=str(tmp_path / "tuned.yaml"),
    )
    check_parameters(find_notebook("study.ipynb"), parameters)
    execute_notebook(find_notebook("study.ipynb"), tmp_path / "study.ipynb", parameters)
    outputs = [o for c in nbformat.read(tmp_path / "study.ipynb", 4).cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    assert not any(o.output_type == "error" for o in outputs)
    assert read_tuned(tmp_path / "tuned.yaml")[1]["n_trials"] == 6
    assert "--preset quick" in (tmp_path / "tuned.yaml").read_text()
