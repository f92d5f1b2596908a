"Reported problems with configs, identities, paths, presets and kernels, and the present results."

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import PATIENCE, ROOT
from fabricate import bars, make_run
from matplotlib.text import Text
from test_context import cut_and_purge
from test_foundation import market
from test_install import SOURCES

from modelfactory.cli import main
from modelfactory.configuration import ConfigError
from modelfactory.data import explore
from modelfactory.data.dataset import DatasetConfig
from modelfactory.data.splits import read_splits
from modelfactory.figure_text import keep_plain_text
from modelfactory.figures import model_comparison, tear_sheet
from modelfactory.models.base import to_output
from modelfactory.models.code import code_version
from modelfactory.models.ensemble_base import EnsembleConfig, member_configs
from modelfactory.models.params import TASK_KEYS, read_params, resolve_config
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs import engine
from modelfactory.runs import grid as grid_module
from modelfactory.runs.attempt import publish, write_run
from modelfactory.runs.compare import use_moved_data
from modelfactory.runs.comparison import comparison
from modelfactory.runs.engine import Outcome
from modelfactory.runs.grid import GridResult, grid_config, make_trainer, plan_grid, run_grid
from modelfactory.runs.report import leaderboard
from modelfactory.runs.rescore import scoring_trainer
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import RunError, start_attempt
from modelfactory.training.test_set import test_set_uses as sentences_on_test
from modelfactory.tuning.study import OptunaModelTuner

pytestmark = pytest.mark.slow

TASK = ("--model", "xgboost", "--horizon", "5", "--data", "planted")


def call(capsys, *args):
    "Exit code and what was printed to stdout and stderr."
    try:
        code = main(list(map(str, args)))
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", ["train", "tune"])
@pytest.mark.parametrize(
    "pair, option",
    [
        ("random_seed=7", "--seed"),
        ("classes=[0, 1]", "--classes"),
        ("horizon=20", "--horizon"),
        ("model_name=svm", "--model"),
        ("model_family=neural", "--model"),
    ],
)
def test_a_key_that_the_task_decides_is_refused_with_its_option(capsys, tmp_path, command, pair, option):
    "Reported: `--set random_seed=7` trained with the seed 42 of the task."
    code, out, err = call(capsys, command, *TASK, "--set", pair)
    assert code == 2 and err.count("\n") == 1 and pair.split("=")[0] in err and f"use {option}" in err and out == ""
    key, value = pair.split("=")
    (tmp_path / "c.yaml").write_text(f"{key}: {value}")
    assert call(capsys, command, *TASK, "--config", tmp_path / "c.yaml")[0] == 2


@pytest.mark.parametrize("key, value", dict(random_seed=7, classes=[0, 1], horizon=20, model_name="svm").items())
def test_a_grid_and_a_model_yaml_refuse_what_the_task_decides(tmp_path, monkeypatch, key, value):
    grid = dict(data="planted", models=["xgboost"], horizons=[5], overrides=dict(xgboost={key: value}))
    with pytest.raises(ConfigError, match=f"{key} = .* would be ignored"):
        plan_grid(grid_config(grid))
    monkeypatch.setenv("MODELFACTORY_PARAMS", str(tmp_path))
    file = tmp_path / "models/xgboost.yaml"
    file.parent.mkdir()
    for values in (
        {key: value},
        dict(presets=dict(quick={key: value})),
        dict(search={key: dict(type="categorical", choices=[value])}),
    ):
        if key == "model_name" and key in values:
            continue  # a file may contain the name of its model
        file.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError, match=f"{key} is set by the task; .* use {TASK_KEYS[key].split()[0]}"):
            read_params("xgboost")


def test_values_that_agree_with_the_task_are_no_mistake():
    "A run's config.yaml has every key and reproduces the run."
    task = dict(model="xgboost", horizon=5, data="planted", seed=7)
    first = make_trainer(task | dict(config=dict(sequence_length=3)))
    again = make_trainer(task | dict(config=first.resolved_config()["config"]))
    assert first.resolved_config() == again.resolved_config() and again.model_config["random_seed"] == 7
    assert again.model_config["sequence_length"] == 3


def test_data_in_dataset_is_refused_and_members_keep_their_keys():
    with pytest.raises(ConfigError, match="use --data"):
        make_trainer(dict(model="xgboost", horizon=5, data="planted", dataset=dict(data="null")))
    members = member_configs(EnsembleConfig(members=dict(lightgbm=dict(patience=3, n_rounds=4), xgboost={})))
    assert (members["lightgbm"]["patience"], members["lightgbm"]["n_rounds"]) == (3, 4)
    assert members["xgboost"]["patience"] == ModelRegistry.get("xgboost").Config().patience


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The package from its wheel, unpacked in an otherwise empty folder."
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(source / done.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    return site


def run_python(site, folder, code, *args):
    "Runs Python code in `folder` with the package in `site`; returns the completed process."
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODELFACTORY_")}
    environment |= dict(PYTHONPATH=str(site))
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_a_wheel_holds_parameters_grids_and_notebooks(installed):
    "Also all families of models: their folders are not listed anywhere."
    package = installed / "modelfactory"
    files = {f.relative_to(package) for f in package.rglob("*") if f.is_file()}
    sources = {f.relative_to(ROOT / "modelfactory") for f in (ROOT / "modelfactory").rglob("*.py")}
    params = {f.relative_to(ROOT) for kind in ("models", "grids") for f in (ROOT / "params" / kind).glob("*.yaml")}
    assert {f for f in files if f.suffix == ".py"} == sources
    assert {f for f in files if f.suffix == ".yaml"} == params
    notebooks = {str(f.relative_to("notebooks")) for f in files if f.suffix == ".ipynb"}
    pages = {f"{kind}/{f.name}" for kind in ("tutorials", "reference") for f in (ROOT / "nbs" / kind).glob("*.ipynb")}
    assert notebooks == {"train.ipynb", "compare.ipynb", "study.ipynb"} | pages - {"reference/models.ipynb"}
    assert {f.name for f in files if f.suffix not in (".py", ".yaml", ".ipynb")} == {"settings.ini", "constraints.txt"}


def test_from_a_folder_of_ones_own_presets_grids_and_notebooks_are_those_of_the_package(installed, tmp_path):
    "Reported: `--preset quick` trained 500 rounds instead of 150."
    (tmp_path / "params/models").mkdir(parents=True)
    (tmp_path / "params/models/svm.yaml").write_text("presets: {quick: {C: 7.5}}")
    (tmp_path / "settings.ini").write_text("[modelfactory]\n")
    lines = [
        "import modelfactory",
        "from modelfactory.models.params import resolve_config",
        "from modelfactory.runs.engine import find_notebook",
        "from modelfactory.runs.grid import grid_config",
        "print(modelfactory.__file__, resolve_config('xgboost', 5, 'quick')['n_rounds'])",
        "print(resolve_config('svm', 5, 'quick')['C'], len(grid_config('demo').models))",
        "print(*[find_notebook(f'{name}.ipynb').parent.name for name in ('train', 'compare', 'study')])",
    ]
    done = run_python(installed, tmp_path, "\n".join(lines))
    first, second, third = done.stdout.splitlines()
    assert first == f"{installed}/modelfactory/__init__.py 150"
    assert second == "7.5 6" and third == "notebooks notebooks notebooks"


@pytest.mark.parametrize(
    "load, message",
    [
        (lambda: resolve_config("gru", 5, "nonsense"), "gru: unknown preset 'nonsense', valid: quick, tiny"),
        (lambda: resolve_config("gru", 5, "quik"), "'quik', did you mean 'quick'? (presets: quick, tiny)"),
        (
            lambda: plan_grid(grid_config(dict(data="planted", models=["bare"], horizons=[5], preset="quick"))),
            "bare: unknown preset 'quick', the model has no presets; add presets: to params/models/bare.yaml",
        ),
        (
            lambda: make_trainer(dict(model="bare", horizon=5, data="planted", preset="nonsense")),
            "unknown preset 'nonsense'",
        ),
        (lambda: member_configs(EnsembleConfig(member_preset="nonsense")), "unknown preset 'nonsense'"),
        (lambda: grid_config("quik"), "quik: no such file, and no grid of that name: did you mean 'quick'?"),
    ],
)
def test_an_unknown_preset_or_grid_is_an_error_that_lists_those_there_are(bare, load, message):
    with pytest.raises(ConfigError) as refused:
        load()
    assert message in str(refused.value)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    "A model without a YAML."
    lines = [
        "from modelfactory.models.classical.logistic_regression import LogisticRegressionModel",
        "from modelfactory.models.registry import ModelRegistry",
        "@ModelRegistry.register('bare', family='examples')",
        "class Bare(LogisticRegressionModel): 'Has no file of parameters.'",
    ]
    (tmp_path / "bare.py").write_text("\n".join(lines))
    monkeypatch.setenv("MODELFACTORY_PLUGINS", str(tmp_path / "bare.py"))


EDITS = """
from pathlib import Path
import json
import sys
import modelfactory
from modelfactory.models.code import code_version
from modelfactory.models.registry import ModelRegistry

package = Path(modelfactory.__file__).parent
names = [m["name"] for m in ModelRegistry.list_models()]

def versions(): return {name: code_version(name) for name in names}

def changed(edit, *files):
    "Models whose code version changes with an edit of some files."
    texts = {package / file: (package / file).read_text() for file in files}
    for file, text in texts.items(): file.write_text(edit(text))
    after = versions()
    for file, text in texts.items(): file.write_text(text)
    return sorted(name for name in names if after[name] != before[name])

before = versions()
code = lambda text: text + "\\nADDED = 1\\n"
prose = lambda text: "# A comment.\\n" + text.replace('    "', '    "Other words. ', 1)
files = [str(file.relative_to(package)) for file in package.rglob("*.py")]
by_file = {file: changed(code, file) for file in sys.argv[1:]}
print(json.dumps(dict(names=sorted(names), prose=changed(prose, *files), code=by_file)))
"""


def test_an_identity_holds_the_code_that_fits_and_predicts_and_no_other(tmp_path):
    "Reported: an edit of neural/lstm.py did not change GRU's identity; a comment in plots.py changed all identities."
    for name in ("modelfactory", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    unused = (
        "figures/tear_sheet.py",
        "evaluation/metrics.py",
        "runs/attempt.py",
        "cli.py",
        "configuration.py",
        "data/market.py",
    )
    used_by_all = (
        "data/dataset.py",
        "data/splits.py",
        "data/uniqueness.py",
        "models/base.py",
        "models/calibration.py",
        "models/conformal.py",
        "training/trainer.py",
    )
    used_by_some = {
        "models/neural/lstm.py": ["gru", "lstm"],
        "models/neural/gru.py": ["gru"],
        "models/boosting/lightgbm.py": ["average", "lightgbm", "meta_labelling", "selection", "stacking"],  # as members
    }
    done = run_python(tmp_path, tmp_path, EDITS, *unused, *used_by_all, *used_by_some, "models/sequence.py")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names, code = result["names"], result["code"]
    assert len(names) > 20 and result["prose"] == []
    networks = code.pop("models/sequence.py")
    assert {"gru", "tcn", "rwkv_ts"} < set(networks) and "xgboost" not in networks
    assert code == used_by_some | {file: [] for file in unused} | {file: names for file in used_by_all}


HELPED = """
from modelfactory.models.classical.logistic_regression import LogisticRegressionModel
from modelfactory.models.registry import ModelRegistry

@ModelRegistry.register("helped", family="examples")
class Helped(LogisticRegressionModel):
    "Imports its layers from other files."
    def fit(self, *args, **kw):
        from modelfactory_plugins.layers import scale
        import helper
        return super().fit(*args, **kw)
"""


def test_an_identity_holds_what_a_plugin_imports(tmp_path, monkeypatch):
    "A plugin that is a notebook, and a module in the same folder."
    layers, helper = tmp_path / "layers.ipynb", tmp_path / "helper.py"

    def notebook(*sources):
        fields = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
        cells = [fields | dict(id=f"c{i}", source=source) for i, source in enumerate(sources)]
        layers.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))

    (tmp_path / "helped.py").write_text(HELPED)
    notebook("#| export\ndef scale(x): return 2 * x", "scale(1)")
    helper.write_text("WIDTH = 3")
    monkeypatch.setenv("MODELFACTORY_PLUGINS", f"{tmp_path / 'layers.ipynb'}, {tmp_path / 'helped.py'}")
    first = code_version("helped")
    assert first == code_version("helped") != code_version("logistic_regression")
    notebook("#| export\ndef scale(x):\n    'Doubles.'\n    return 2 * x", "scale(20)")
    assert code_version("helped") == first
    notebook("#| export\ndef scale(x): return 3 * x")
    assert (second := code_version("helped")) != first
    helper.write_text("WIDTH = 30")
    assert code_version("helped") not in (first, second)


def test_a_grid_that_trains_again_because_of_other_code_says_so(tmp_path, monkeypatch, capsys):
    grid = dict(data="planted", models=["logistic_regression", "svm"], horizons=[5], preset="quick")
    jobs = plan_grid(grid_config(grid))
    resolved = json.loads(json.dumps(jobs[0].resolved_config))
    run = make_run(tmp_path, "logistic_regression", bars(n=60), data="planted", fingerprint=jobs[0].fingerprint)
    (run.path / "config.yaml").write_text(yaml.safe_dump(resolved))
    monkeypatch.setattr(grid_module, "_run_all", lambda jobs, *args: GridResult(Outcome(j.title, "ok") for j in jobs))
    assert [o.status for o in run_grid(grid, tmp_path)] == ["ok", "ok"]
    assert capsys.readouterr().out == "training 1 run of this grid again: the code or the defaults have changed\n"
    del resolved["config"]["calibration"]  # an earlier version did not have the key
    (run.path / "config.yaml").write_text(yaml.safe_dump(resolved))
    assert run_grid(grid, tmp_path).ok and capsys.readouterr().out.startswith("training 1 run of this grid again")
    for change in (dict(force=True), dict(grid=grid | dict(overrides=dict(logistic_regression=dict(C=0.5))))):
        run_grid(**dict(grid=grid, runs=tmp_path) | change)
        assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    "Two projects with different data in folders of the same name, `splits`."
    root = tmp_path_factory.mktemp("projects")
    for project, n in (("one", 900), ("two", 960)):
        folder = root / project / "splits"
        folder.mkdir(parents=True)
        train, rest = cut_and_purge(market(n), 0.6)
        for name, frame in zip(("train", "val", "test"), (train, *cut_and_purge(rest, 0.5)), strict=True):
            frame.to_parquet(folder / f"{name}_scaled.parquet", index=False)
    return root


def trained(runs, data, **task):
    "The folder of a finished run that was trained in this process."
    trainer = make_trainer(dict(model="logistic_regression", horizon=5, data=str(data)) | task)
    trainer.run_full_pipeline()
    attempt = start_attempt(runs, dict(model=trainer.config.model, horizon=5))
    write_run(trainer, attempt)
    return publish(attempt, runs)


def test_paths_are_kept_whole(projects, monkeypatch):
    "Reported: a worker in another folder failed on a grid whose plan had succeeded."
    monkeypatch.chdir(projects / "one")
    columns = ["datetime", "symbol", "close"]
    closes = [pd.read_parquet(file, columns=columns) for file in Path("splits").glob("*.parquet")]
    pd.concat(closes).to_parquet("p.parquet")
    grid = dict(data="splits", models=["logistic_regression"], horizons=[5], dataset=dict(prices="p.parquet"))
    (job,) = plan_grid(grid_config(grid))
    data, prices = str(projects / "one/splits"), str(projects / "one/p.parquet")
    assert job.parameters["data"] == job.resolved_config["data"]["data"] == data
    assert job.parameters["dataset"]["prices"] == job.resolved_config["data"]["prices"] == prices
    twice = dict(grid, data=["splits", str(projects / "one/splits")])
    assert len(plan_grid(grid_config(twice))) == 1
    monkeypatch.chdir(projects)
    make_trainer(job.parameters).prepare_data()
    assert make_trainer(dict(model="svm", horizon=5, data="planted")).config.data.data == "planted"


def test_two_projects_with_data_of_one_name_keep_their_runs(projects, tmp_path, monkeypatch):
    for project in ("one", "two"):
        monkeypatch.chdir(projects / project)
        trained(tmp_path, "splits")
    runs = list_runs(tmp_path)
    assert len(runs.latest()) == 2 and sorted(runs.data_names[r.data] for r in runs) == ["one/splits", "two/splits"]
    monkeypatch.chdir(projects / "one")
    trained(tmp_path, projects / "one/splits", model="svm")
    tasks = comparison(tmp_path)["tasks"]
    assert [(task["data"], task["n_models"]) for task in tasks] == [("one/splits", 2), ("two/splits", 1)]


def test_runs_are_of_one_data_set_by_fingerprint_or_whole_path(tmp_path):
    "Earlier versions stored relative paths, which do not identify a data set."
    table = bars(n=240)
    stored = dict(  # model: data, and the digit of its fingerprint
        a=("splits", "1"),
        b=("splits", "2"),
        c=("/one/splits", "1"),
        d=("/moved", "1"),
        e=("/two", "3"),
        f=("/two", "4"),
        g=("planted", "5"),
        h=("/bundled/planted", "5"),
    )
    for model, (data, digit) in stored.items():
        make_run(tmp_path, model, table, data=data, fingerprint=digit * 16)
    runs = list_runs(tmp_path)
    expected = dict(a="/moved", b="splits", c="/moved", d="/moved", e="/two", f="/two", g="planted", h="planted")
    assert {r.manifest["model"]: r.data for r in runs} == expected
    assert len(runs.latest()) == 8
    other = make_run(tmp_path, "a", table, data="splits", fingerprint="6" * 16)
    names = {r.data for r in list_runs(tmp_path) if r.manifest["model"] in "b" or r.path == other.path}
    assert names == {"splits (22222222)", "splits (66666666)"}


def test_data_that_moved_are_named_for_final_rescore_and_compare(projects, tmp_path, monkeypatch, capsys):
    runs, moved = tmp_path / "runs", tmp_path / "elsewhere/renamed"
    shutil.copytree(projects / "one/splits", tmp_path / "first/splits")
    monkeypatch.chdir(tmp_path / "first")
    run = trained(runs, "splits")
    monkeypatch.chdir(projects)
    assert call(capsys, "final", run)[0] in (0, None)  # from another folder
    moved.parent.mkdir()
    (tmp_path / "first/splits").rename(moved)
    code, _, err = call(capsys, "final", run)
    assert code == 2 and err.count("\n") == 1 and "splits: no such folder" in err and "--data" in err
    code, _, err = call(capsys, "final", run, "--data", projects / "two/splits")
    assert code == 2 and "contains other data" in err
    code, out, _ = call(capsys, "final", run, "--data", moved)
    assert code in (0, None) and "used 2 times" in out and len(sentences_on_test(runs)) == 1
    stored = list_runs(runs)
    with pytest.raises(RunError, match="no such folder"):
        scoring_trainer(stored[0])
    use_moved_data(stored, dict(splits=moved))
    assert scoring_trainer(stored[0]).datasets["val"].y.size
    for pair, message in (
        (f"splits={projects / 'two/splits'}", "contains other data"),
        (f"split={moved}", "did you mean 'splits'"),
        ("splits", "expected key=value"),
    ):
        code, out, err = call(capsys, "compare", runs, "--json", "--data", pair)
        assert code == 2 and message in err and out == ""
    assert call(capsys, "rescore", run)[0] == 1
    code, out, _ = call(capsys, "rescore", run, "--data", moved)
    assert code in (0, None) and out == f"{run.name}: all\n"
    code, out, _ = call(capsys, "compare", runs, "--json", "--data", f"splits={moved}")
    assert code in (0, None) and json.loads(out)["tasks"][0]["data"] == "splits"


@pytest.fixture(scope="module")
def odd_splits(tmp_path_factory):
    "Splits with NaN in three features, a leaking column, a feature named like future data, and prices in a file."
    folder = tmp_path_factory.mktemp("odd_splits")
    train, rest = cut_and_purge(market(6000), 0.6)
    splits = dict(zip(("train", "val", "test"), (train, *cut_and_purge(rest, 0.5)), strict=True))
    prices = pd.concat(splits.values())[["datetime", "symbol", "close"]]
    prices.to_parquet(folder / "prices.parquet", index=False)
    rng = np.random.default_rng(0)
    for name, frame in splits.items():
        frame = frame.drop(columns=["close"]).assign(
            few=rng.normal(size=len(frame)),
            many=rng.normal(size=len(frame)),
            quality_score=rng.normal(size=len(frame)),
            late=rng.normal(size=len(frame)),
        )
        frame["leak"] = frame.label_h5.where(frame.label_h5.isin([-1, 0, 1]), 0) + 0.1 * rng.normal(size=len(frame))
        frame.loc[frame.index[: len(frame) // 4], "many"] = np.nan
        if name == "train":
            frame.loc[frame.index[[7, 9]], "few"] = np.nan
        if name == "val":
            frame.loc[frame.index[: len(frame) // 2], "late"] = np.nan
        frame.to_parquet(folder / f"{name}_scaled.parquet", index=False)
    return folder


OPTIONS = tuple("--nan median --exclude late --features quality_score --allow leak --classes -1,0,1".split())
COMMANDS = [("check",), ("train", *TASK[:4], "--data"), ("tune", *TASK[:4], "--data")]


def without_kernel(monkeypatch):
    "A dict that gets the parameters which `train` passes to a notebook; no notebook is executed."
    passed = {}

    def run(parameters, *args):
        passed.update(parameters)
        return Outcome("x", "failed")

    monkeypatch.setattr(engine, "run_notebook", run)
    return passed


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_options_say_what_of_the_data_is_used(capsys, odd_splits, tmp_path, monkeypatch, command):
    "Reported: an error recommended nan='median', and no option set it."
    passed = without_kernel(monkeypatch)
    monkeypatch.setattr(OptunaModelTuner, "run", lambda tuner: passed.update(config=tuner.config) or exit(1))
    code, _, err = call(capsys, *command, odd_splits)
    assert code == 2 and err.count("\n") == 1 and "--nan" in err and "--exclude" in err
    listed = "3 of 5 features with NaN: few (train 0.03%); many (train 25.00%, val 25.00%"
    if command[0] == "tune":  # reads train alone
        listed = "2 of 5 features with NaN: few (train 0.03%); many (train 25.00%); set"
    assert listed in err and ("late (val 50.00%)" in err) == (command[0] != "tune"), err
    code, _, err = call(capsys, *command, odd_splits, *OPTIONS[:6])
    if command[0] != "check":
        assert code == 2 and "leak" in err and passed == {}
    code, out, err = call(capsys, *command, odd_splits, *OPTIONS, "--prices", odd_splits / "prices.parquet")
    if command[0] == "check":
        assert code in (0, None) and "permitted: leak" in out
        assert "quality_score" not in out.split("Not features")[1].split("warning")[0]
        code, out, err = call(capsys, *command, odd_splits, *OPTIONS, "--prices", odd_splits / "nothing.parquet")
        assert code == 2 and "no such price file" in err
    elif command[0] == "train":
        values = dict(nan="median", exclude=["late"], features=["quality_score"], classes=[-1, 0, 1])
        assert passed["dataset"] == values | dict(prices=str(odd_splits / "prices.parquet"))
    else:
        values = (
            str(odd_splits),
            1,
            ("quality_score",),
            ("late",),
            "median",
            (-1, 0, 1),
            str(odd_splits / "prices.parquet"),
        )
        assert passed["config"].data == DatasetConfig(*values)
    for bad, message in (
        (("--nan", "mean"), "'mean'"),
        (("--classes", "up,down"), "whole numbers"),
        (("--exclude", "lat"), "did you mean 'late'"),
    ):
        code, _, err = call(capsys, *command, odd_splits, *OPTIONS, *bad)
        assert code == 2 and message in err and err.count("\n") == 1


def test_set_reaches_keys_of_the_data_set(capsys, odd_splits, monkeypatch):
    passed = without_kernel(monkeypatch)
    values = "--classes 0,1 --set dataset.nan=zero --set dataset.gap=0 --set max_depth=3".split()
    task = ("train", *TASK[:4], "--data", odd_splits, *OPTIONS, *values)
    code, _, err = call(capsys, *task)
    assert code == 1, err
    dataset = dict(nan="zero", gap=0, exclude=["late"], features=["quality_score"], classes=[0, 1])
    assert passed["config"] == dict(max_depth=3) and passed["dataset"] == dataset
    for pair, message in (("dataset.nann=zero", "did you mean 'nan'"), ("dataset.data=planted", "--data")):
        code, _, err = call(capsys, *task, "--set", pair)
        assert code == 2 and message in err


NAMES = {"f0": "ret_$5k_$10k", "f1": "$A_$"}  # matplotlib reads text between two dollar signs as a formula


@pytest.fixture(scope="module")
def dollars(tmp_path_factory):
    "Splits with dollar signs in the names of columns, symbols and the folder."
    folder = tmp_path_factory.mktemp("data") / "$B_^$"
    folder.mkdir()
    train, rest = cut_and_purge(market(900), 0.6)
    for name, frame in zip(("train", "val", "test"), (train, *cut_and_purge(rest, 0.5)), strict=True):
        rng = np.random.default_rng(len(frame))
        frame = frame.assign(**{column: rng.normal(size=len(frame)) for column in NAMES.values()})
        frame.assign(symbol="$C_" + frame.symbol + "_$").to_parquet(folder / f"{name}_scaled.parquet", index=False)
    return folder


def test_a_run_is_made_whatever_its_names_and_folders_are_called(dollars, tmp_path, monkeypatch):
    "Dollar signs, braces, a temporary folder of 150 characters, and a broken kernel spec called python3."
    runs, temporary = tmp_path / "runs {of} {0} {", tmp_path / ("t" * 150)
    temporary.mkdir()
    for name in ("python3", "python"):
        (tmp_path / "jupyter/kernels" / name).mkdir(parents=True)
        spec = dict(argv=[shutil.which("false")], display_name="Python 3", language="python")
        (tmp_path / "jupyter/kernels" / name / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("TMPDIR", str(temporary))
    config = dict(n_rounds=3, min_child_weight=1)
    outcome = engine.run_notebook(dict(model="xgboost", horizon=5, data=str(dollars), preset=None, config=config), runs)
    assert outcome.status == "ok", outcome
    run = list_runs(runs)[0]
    run.verify()
    figures = {file.name for file in (run.path / "plots").iterdir()}
    assert run.path == outcome.path and {"importance.png", "robustness.png", "predictions.png"} <= figures


def drawn_texts(figure):
    "The visible texts of a figure, without formulas."
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    shown = [text._preprocess_math(text.get_text()) for text in texts]
    return {text for text, is_formula in shown if not is_formula}


def test_pictures_show_names_as_they_are(dollars, tmp_path):
    symbols = {"$C_A_$"}
    importance = dict.fromkeys([*NAMES.values(), "plain"], 1.0)
    assert set(importance) <= drawn_texts(tear_sheet.plot_importance(importance))
    splits = read_splits(dollars, (5,), splits=("train", "val"))
    samples = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=4), symbol="$C_A_$", horizon=5))
    predictions = to_output(np.full((4, 3), 1 / 3), samples, (-1, 0, 1))
    assert symbols <= drawn_texts(tear_sheet.plot_probabilities(predictions))
    assert symbols <= drawn_texts(explore.plot_class_balance(explore.class_balance(splits["train"], 5)))
    assert any("$C_A_$" in text for text in drawn_texts(explore.plot_labels(splits["train"], 5)))
    table = bars(n=240)
    for model in ("one", "two"):
        make_run(tmp_path, model, table, data=str(dollars))
    rows = leaderboard(comparison(tmp_path))
    forest = model_comparison.plot_forest(rows, "$B_^$", "directional_skill")
    for figure in (forest, model_comparison.plot_time_against_score(rows, "$B_^$")):
        assert tear_sheet.figure_png(figure).startswith(b"\x89PNG")


def test_numbers_on_logarithmic_axes_stay_formulas():
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    ax.plot([1, 1000], [1, 2])
    ax.set_xscale("log")
    keep_plain_text(figure).canvas.draw()
    ticks = [label for label in ax.get_xticklabels() if label.get_text()]
    assert ticks and all(label._preprocess_math(label.get_text())[1] is not False for label in ticks)
    plt.close(figure)
