"ONNX files give the predictions of the models that they were written from."

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE, ROOT
from hypothesis import given
from hypothesis import strategies as st
from quick import small_splits

from modelfactory import load_run
from modelfactory.data.splits import SplitsWarning
from modelfactory.data.writer import bars_to_splits
from modelfactory.models.conformance import planted_task
from modelfactory.models.params import read_params
from modelfactory.models.pretrained import tiny_checkpoint
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs import export, onnx_export
from modelfactory.runs.examples import train_example
from modelfactory.runs.export import export_run
from modelfactory.runs.grid import grid_config, grid_jobs
from modelfactory.runs.onnx_export import OnnxError, onnx_model, onnx_paths, onnx_probabilities
from modelfactory.runs.run_folder import RunError
from modelfactory.runs.standalone import bundle_windows

MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript", "skl2onnx") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"ONNX IS NOT CHECKED: {MISSING} not installed (pip install 'modelfactory[onnx]')"
)

# smaller than the preset `tiny`, because the exporters take seconds for each layer
SIZES = dict(
    lstm=dict(hidden_size=4),
    gru=dict(hidden_size=4),
    transformer=dict(n_layers=1),
    timellm=dict(llm_layers=1),
    rwkv_ts=dict(d_model=8, patch_length=6, stride=6),
    autoformer=dict(n_layers=1, hidden_size=8, n_heads=1),
    patchtst=dict(n_layers=1),
    timesnet=dict(n_layers=1, n_kernels=1, top_k=1),
    random_forest=dict(n_estimators=20),
    average=dict(members=dict(logistic_regression={}, xgboost=dict(n_rounds=5), lightgbm=dict(n_rounds=5))),
    stacking=dict(members=dict(logistic_regression={}, random_forest=dict(n_estimators=5)), n_folds=2),
    selection=dict(members=dict(logistic_regression={}, random_forest=dict(n_estimators=5)), n_folds=2),
)
NO_GRAPH = dict(
    informer="aten::randint",
    meta_labelling="second model predicts only the rows that have a side",
    timesfm="closing prices, which are not features",
    timesfm25="closing prices, which are not features",
    chronos2="closing prices, which are not features",
    tabicl="training rows with each prediction",
)


def is_network(name):
    return hasattr(ModelRegistry.get(name), "backbone")


def config_of(name):
    epochs = dict(max_epochs=1) if is_network(name) else {}
    return read_params(name).presets.get("tiny", {}) | epochs | SIZES.get(name, {})


def fit(model, task):
    model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
    return model


def difference(model, task, folder):
    "Largest difference between the probabilities of a model and those of its ONNX file, on the validation rows."
    (folder / "model.onnx").write_bytes(onnx_model(model).SerializeToString())
    p = onnx_probabilities(folder / "model.onnx", task.X_val, rows_at_once=64)
    assert p.dtype == np.float32 and p.shape == (len(task.y_val), len(model.classes))
    return np.abs(p - model.predict(task.X_val, task.meta_val).probabilities).max()


QUICK = ("gru", "tft", "informer")  # PyTorch's exporters take 2 to 5 s for a network
MODELS = [row["name"] for row in ModelRegistry.list_models()]
MODELS = [pytest.param(n, marks=[pytest.mark.slow] * (is_network(n) and n not in QUICK)) for n in MODELS]


@pytest.mark.parametrize("name", MODELS)
def test_a_registered_model_is_exported_and_equal_or_on_the_list_of_those_that_cannot_be(name, tmp_path):
    kind = ModelRegistry.get(name)
    length = min(kind.Config().sequence_length, 12)
    task = planted_task(150, F=3, seq_len=length)
    checkpoint = dict(timellm="gpt2", timesfm="timesfm", timesfm25="timesfm25", chronos2="chronos2").get(name)
    config = dict(checkpoint=str(tiny_checkpoint(checkpoint, tmp_path / "checkpoint"))) if checkpoint else {}
    if name == "tabicl":
        config = dict(checkpoint=str(ROOT / "tests/data"), file="tabicl_tiny.ckpt")
    model = ModelRegistry.create(name, config_of(name) | config | dict(sequence_length=length), 5, task.features)
    if name in NO_GRAPH:
        with pytest.raises(OnnxError, match=NO_GRAPH[name]):
            onnx_model(model)
        assert NO_GRAPH[name] in onnx_paths().why_not[name] and not onnx_paths().path[name]
    else:
        fit(model, task)
        assert onnx_paths().path[name] and difference(model, task, tmp_path) < 1e-6


@pytest.mark.parametrize("config", [dict(classes=(0, 1)), dict(classes=(-2, -1, 0, 1, 2)), "a class is not in train"])
@pytest.mark.parametrize("name", ["logistic_regression", "xgboost", "lightgbm", "catboost"])
def test_any_number_of_classes_and_a_class_that_train_lacks(name, config, tmp_path):
    absent = isinstance(config, str)
    task = planted_task(150, F=3, **({} if absent else config))
    if absent:
        rows = task.y != 0
        task.X, task.y, task.meta = task.X[rows], task.y[rows], task.meta[rows].reset_index(drop=True)
    model = ModelRegistry.create(name, config_of(name) | ({} if absent else config), 5, task.features)
    assert difference(fit(model, task), task, tmp_path) < 1e-6


@pytest.mark.parametrize("name", ["random_forest", "xgboost", "lightgbm", "catboost"])
@pytest.mark.parametrize("scale", [1.0, 2.0**23])
def test_trees_send_neighbouring_float32_values_to_the_same_leaves(name, scale, tmp_path):
    task = planted_task(600, F=2)
    step = np.spacing(np.float32(scale))
    task.X, task.X_val = (np.float32(scale) + np.round(X * 4) * step for X in (task.X, task.X_val))
    model = fit(ModelRegistry.create(name, config_of(name), 5, task.features), task)
    p = model.predict(task.X_val, task.meta_val).probabilities
    assert difference(model, task, tmp_path) < 1e-6
    assert p.std() > 0.1 or scale == 1 and name == "random_forest"  # scikit-learn treats values within 1e-7 as equal


@given(st.floats(-1e30, 1e30), st.integers(-2, 2))
def test_a_threshold_rounded_down_decides_like_the_threshold(threshold, steps):
    x = np.float32(threshold)
    for _ in range(abs(steps)):
        x = np.nextafter(x, np.float32(np.copysign(np.inf, steps)))
    rounded = onnx_export._rounded_down(np.array([threshold]))
    assert rounded.dtype == np.float32 and (x <= rounded[0]) == (float(x) <= threshold)


@pytest.mark.parametrize("name", ["xgboost", "lightgbm", "catboost"])
@pytest.mark.parametrize("in_train", [True, False])
def test_missing_values_go_to_the_same_leaves(name, in_train, tmp_path):
    task = planted_task(300, F=3)
    for X in (task.X, task.X_val) if in_train else (task.X_val,):
        X[::3, 0] = np.nan
    if not in_train:  # the fit must not see missing values
        task.X_val, X_nan = task.X[: len(task.X_val)].copy(), task.X_val
    model = fit(ModelRegistry.create(name, config_of(name), 5, task.features), task)
    task.X_val = task.X_val if in_train else X_nan
    assert np.isnan(task.X_val).any() and difference(model, task, tmp_path) < 1e-6


WRAPPED = [
    ("svm", dict(calibration="temperature")),
    ("random_forest", dict(calibration="temperature", conformal=dict(alpha=0.2))),
    ("xgboost", dict(stop_on="train_tail", sequence_length=3)),
    ("stacking", dict(calibration="temperature")),
    ("svm", dict(kernel="rbf", exact=True)),
]


@pytest.mark.parametrize(("name", "config"), WRAPPED)
def test_calibration_is_part_of_the_graph_and_wrappers_are_not(name, config, tmp_path):
    task = planted_task(150, F=3, seq_len=config.get("sequence_length", 1))
    model = fit(ModelRegistry.create(name, config_of(name) | config, 5, task.features), task)
    if config.get("calibration"):
        assert abs(model.calibration.temperature - 1) > 0.01
    assert difference(model, task, tmp_path) < 1e-6


@pytest.mark.parametrize("window", ["last", "flat", "summary"])
@pytest.mark.parametrize("name", ["logistic_regression", "random_forest", "xgboost", "lightgbm", "catboost"])
def test_the_columns_of_a_window_are_part_of_the_graph(name, window, tmp_path):
    task = planted_task(150, F=3, seq_len=4)
    model = ModelRegistry.create(name, config_of(name) | dict(sequence_length=4, window=window), 5, task.features)
    assert difference(fit(model, task), task, tmp_path) < 1e-6


@pytest.mark.parametrize("name", ["xgboost", "lightgbm", "catboost"])
@pytest.mark.parametrize("classes", [(-1, 0, 1), (0, 1)])
def test_monotone_constraints_are_part_of_the_graph(name, classes, tmp_path):
    task = planted_task(150, F=3, classes=classes)
    config = config_of(name) | dict(classes=classes, monotone={task.features[0]: 1})
    assert difference(fit(ModelRegistry.create(name, config, 5, task.features), task), task, tmp_path) < 1e-6


@pytest.mark.parametrize("name", ["average", "stacking", "selection"])
def test_members_read_their_own_windows(name, tmp_path):
    task = planted_task(150, F=3, seq_len=6)
    tree = dict(model="random_forest", n_estimators=5)
    members = dict(long=tree | dict(sequence_length=6), short=tree | dict(sequence_length=2), last=tree)
    config = dict(members=members) | (dict(n_folds=2) if name != "average" else {})
    assert difference(fit(ModelRegistry.create(name, config, 5, task.features), task), task, tmp_path) < 1e-6


def test_category_codes_have_no_graph():
    task = planted_task(150, F=3)
    task.X[:, 2] = task.X_val[:, 2] = 1
    config = config_of("xgboost") | dict(categorical=(task.features[2],))
    with pytest.raises(OnnxError, match="xgboost: no ONNX graph for category codes"):
        onnx_model(fit(ModelRegistry.create("xgboost", config, 5, task.features), task))


def test_an_operator_that_onnx_lacks_is_named_in_one_line():
    import torch

    task, windows = planted_task(150, F=3), planted_task(150, F=3, seq_len=4)
    svm = fit(ModelRegistry.create("svm", dict(kernel="rbf"), 5, task.features), task)
    with pytest.raises(OnnxError, match=r"^svm: ONNX has no operator for sklearn\S*\.Nystroem; [^\n]*$"):
        onnx_model(svm)
    isotonic = fit(ModelRegistry.create("svm", dict(calibration="isotonic"), 5, task.features), task)
    with pytest.raises(OnnxError, match="found isotonic calibration, expected temperature"):
        onnx_model(isotonic)

    gru = fit(ModelRegistry.create("gru", config_of("gru") | dict(sequence_length=4), 5, task.features), windows)
    gru.net.forward = lambda x: torch.special.airy_ai(x[:, 0])
    with pytest.raises(OnnxError, match="^gru: ONNX has no operator for aten::special_airy_ai; [^\n]*$"):
        onnx_model(gru)


# Runs


def train(folder, model, **grid):
    (job,) = grid_jobs(grid_config(dict(data=[str(folder / "data")], models=[model], horizons=[5]) | grid))
    return load_run(train_example(job.parameters, folder / "runs"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    small_splits(folder / "data")
    return train(folder, "logistic_regression")


def test_a_bundle_with_an_onnx_file_states_its_measured_difference(run, tmp_path):
    bundle = export_run(run.path, tmp_path / "bundle", onnx=True)
    contract = json.loads((bundle / "contract.json").read_text())["onnx"]
    loaded = load_run(bundle)
    loaded.verify()
    assert "model.onnx" in loaded.manifest["files"]
    assert contract["windows"] == len(run.predictions("val")) and contract["max_difference"] < 1e-6
    assert f"{contract['max_difference']:.1e}" in (bundle / "MODEL_CARD.md").read_text()
    import onnx

    proto = onnx.load(bundle / "model.onnx")
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:]] == contract["input"]["shape"][1:]
    assert json.loads({p.key: p.value for p in proto.metadata_props}["features"]) == run.cached_model.feature_columns


def test_a_file_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(onnx_export, "onnx_probabilities", lambda file, X: onnx_probabilities(file, X) + 2e-5)
    with pytest.raises(OnnxError, match=r"differs by up to 2e-05 from the stored probabilities in \d+ of \d+ "):
        export_run(run.path, tmp_path / "bundle", onnx=True)
    monkeypatch.setattr(onnx_export, "onnx_probabilities", lambda file, X: onnx_probabilities(file, X) * np.nan)
    with pytest.raises(OnnxError, match="differs by up to nan"):
        export_run(run.path, tmp_path / "bundle", onnx=True)
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_library_changed_data_and_runs_of_others_are_refused(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(OnnxError, match=r"needs skl2onnx; .*modelfactory\[onnx\]"):
        patched.setitem(sys.modules, "skl2onnx", None)
        export_run(run.path, tmp_path / "bundle", onnx=True)
    file = next(Path(run.config["data"]["data"]).glob("val*"))
    content = file.read_bytes()
    pd.read_parquet(file).iloc[:-1].to_parquet(file)
    with pytest.raises(RunError, match="has changed since training"):
        export_run(run.path, tmp_path / "bundle", onnx=True)
    file.write_bytes(content)
    copied = tmp_path / "runs" / run.path.name
    shutil.copytree(run.path, copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | dict(seed=7)))
    with pytest.raises(OnnxError, match="was made by another user"):
        export_run(copied, tmp_path / "bundle", onnx=True)
    assert not (tmp_path / "bundle").exists()


# Bundles without the package

GUARD = """
import runpy, sys


class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {forbidden!r}:
            raise ImportError(f"{{name}} is not in requirements.txt")


sys.meta_path.insert(0, Guard())
sys.argv = {argv!r}
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@cache
def import_names():
    "{import name: distributions} of all installed packages."
    plain = {top: {normal(name) for name in names} for top, names in packages_distributions().items()}
    return plain | dict(modelfactory={"modelfactory"})


def normal(requirement):
    return re.split(r"[ <>=!~;\[(]", requirement)[0].lower().replace("_", "-")


def forbidden(requirements):
    "Import names of the installed packages that are not required, directly or by another required package."
    allowed, pending = set(), [normal(line) for line in requirements]
    while pending:
        name = pending.pop()
        if name not in allowed and (name == "modelfactory" or find_distribution(name)):
            allowed.add(name)
            listed = [] if name == "modelfactory" else requires(name) or []
            pending += [normal(line) for line in listed if "extra ==" not in line]
    return {top for top, names in import_names().items() if not names & allowed}


def find_distribution(name):
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def predict_guarded(bundle, source, output, package=False):
    "Runs predict.py in a process in which only the packages of requirements.txt, and what they need, can be imported."
    lines = [line for line in (bundle / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    argv = [str(bundle / "predict.py"), str(source), str(output)]
    names = forbidden([*lines, *(["modelfactory"] if package else [])])
    assert ("modelfactory" in names) != package and "mlflow" in names
    script = GUARD.format(forbidden=names, argv=argv, folder=str(bundle))
    environment = os.environ | dict(PYTHONPATH=str(ROOT) if package else "")
    options = dict(cwd=output.parent, env=environment, capture_output=True, text=True)
    return subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=PATIENCE, **options)


def raw_bars(n, seed=0):
    rng, parts = np.random.default_rng(seed), []
    for symbol in ("AAA", "BBB"):
        close = 100 * np.exp(np.cumsum(rng.normal(0, 1e-3, n)))
        prices = dict(open=np.r_[close[0], close[:-1]], high=close * 1.002, low=close * 0.998, close=close)
        prices["high"], prices["low"] = (
            f(prices["open"], prices[k]) for f, k in ((np.maximum, "high"), (np.minimum, "low"))
        )
        times = pd.date_range("2024-01-01", periods=n, freq="15min")
        parts.append(pd.DataFrame(dict(datetime=times, symbol=symbol, **prices, volume=rng.integers(10, 100, n))))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    "A run on the splits of raw bars, and the bars that follow them."
    folder = tmp_path_factory.mktemp("raw")
    bars = raw_bars(1100)
    is_old = bars.groupby("symbol").cumcount() < 1000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SplitsWarning)
        bars_to_splits(bars[is_old].reset_index(drop=True), folder / "data", horizons=(5,))
    overrides = dict(lightgbm=dict(n_rounds=10, sequence_length=6))
    return train(folder, "lightgbm", overrides=overrides), bars[~is_old]


def same(a, b):
    keys = ["symbol", "after"]
    a, b = (frame.sort_values(keys, ignore_index=True) for frame in (a, b))
    probabilities = ["p_down", "p_flat", "p_up"]
    pd.testing.assert_frame_equal(a.drop(columns=probabilities), b.drop(columns=probabilities)[list(a)[:4] + ["after"]])
    return np.abs(a[probabilities].to_numpy() - b[probabilities].to_numpy()).max()


def test_a_bundle_predicts_raw_bars_without_the_package_or_the_library_of_the_model(raw, tmp_path):
    run, new = raw
    bundle = export_run(run.path, tmp_path / "bundle", onnx=True)
    assert json.loads((bundle / "contract.json").read_text())["onnx"]["raw_bars"]
    new.to_csv(tmp_path / "new.csv", index=False)
    done = predict_guarded(bundle, tmp_path / "new.csv", tmp_path / "p.parquet")
    assert done.returncode == 0, done.stderr
    assert same(pd.read_parquet(tmp_path / "p.parquet"), run.predict(new, ahead=True)) < 1e-6
    load_run(bundle).verify()  # the script writes nothing into the bundle
    new.iloc[:3].assign(symbol="CCC").to_csv(tmp_path / "short.csv", index=False)
    done = predict_guarded(bundle, tmp_path / "short.csv", tmp_path / "none.csv")
    assert done.returncode and re.fullmatch(
        r"bars: found 3, but a prediction needs [\d,]+ of its symbol; .*\n", done.stderr
    )
    (bundle / "pipeline.json").write_text((bundle / "pipeline.json").read_text().replace("0.", "1.", 1))
    done = predict_guarded(bundle, tmp_path / "new.csv", tmp_path / "none.csv")
    assert (
        done.returncode and "pipeline.json: missing or changed" in done.stderr and not (tmp_path / "none.csv").exists()
    )


def test_a_bundle_of_a_run_without_a_pipeline_predicts_features(run, tmp_path):
    bundle = export_run(run.path, tmp_path / "bundle", onnx=True)
    bars = pd.read_parquet(next(Path(run.config["data"]["data"]).glob("test*")))
    bars.to_parquet(tmp_path / "bars.parquet")
    done = predict_guarded(bundle, tmp_path / "bars.parquet", tmp_path / "p.parquet")
    assert done.returncode == 0, done.stderr
    assert same(pd.read_parquet(tmp_path / "p.parquet"), run.predict(bars, ahead=True)) < 1e-6


@pytest.mark.parametrize("name", ["logistic_regression", "lightgbm"])
def test_the_requirements_of_another_bundle_are_enough(name, run, raw, tmp_path):
    run, source = (
        (run, pd.read_parquet(next(Path(run.config["data"]["data"]).glob("test*")))) if name != "lightgbm" else raw
    )
    bundle = export_run(run.path, tmp_path / "bundle")
    source.to_parquet(tmp_path / "bars.parquet", index=False)
    text = (bundle / "requirements.txt").read_text()
    assert f"modelfactory=={run.manifest['versions']['modelfactory']}" in text
    assert ("lightgbm==" in text) == (name == "lightgbm") and ("scikit-learn==" in text) == (name != "lightgbm")
    done = predict_guarded(bundle, tmp_path / "bars.parquet", tmp_path / "p.parquet")
    assert "modelfactory is not in requirements.txt" in done.stderr  # the guard works
    done = predict_guarded(bundle, tmp_path / "bars.parquet", tmp_path / "p.parquet", package=True)
    assert done.returncode == 0, done.stderr
    assert same(pd.read_parquet(tmp_path / "p.parquet"), run.predict(source, ahead=True)) == 0


@given(st.data())
def test_windows_of_a_bundle_equal_a_loop_over_rows(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    seq_len, gap = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 1))
    symbols = np.repeat(list("ABC")[: len(sizes)], sizes)
    is_new = np.array(data.draw(st.lists(st.booleans(), min_size=len(symbols), max_size=len(symbols))))
    expected = []
    for symbol in sorted(set(symbols)):
        rows = np.flatnonzero(symbols == symbol)
        windows = [(row - gap, row) for row in rows if is_new[row]] + ([(rows[-1], -1)] if gap else [])
        expected += [(last, row) for last, row in windows if last - seq_len + 1 >= rows[0]]
    assert list(zip(*bundle_windows(symbols, is_new, seq_len, gap), strict=True)) == expected


def test_features_of_a_user_are_not_computed_in_a_bundle():
    features = dict(returns=None, my_group=None)
    run = SimpleNamespace(pipeline=SimpleNamespace(features=features, names=["a"]), cached_model=SimpleNamespace())
    assert not export._takes_raw_bars(run)
