"""What strangers give: checkpoints that want to run code, names that want to be HTML, an environment full of secrets.

Every payload would make one file, the canary, when any of its code ran. It is looked for after each test."""
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import PATIENCE, ROOT

from modelfactory.data.bundled import resolve_data
from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.splits import read_splits
from modelfactory.models.base import FeatureMismatch
from modelfactory.models.conformance import planted
from modelfactory.models.persistence import CheckpointError, code_in, load_model
from modelfactory.models.registry import ModelRegistry, UnknownModel, check_name
from modelfactory.runs.compare import (
    best_per_horizon, compare, comparison, direction_tests, escape_markdown, excluded_table, leaderboard, leaderboard_table, summary, Table)
from modelfactory.runs.grid import GridResult, GridStatus
from modelfactory.runs.engine import Outcome
from modelfactory.runs.store import FAILED, MANIFEST, RunError, list_runs, load_run, publish, start_attempt, write_run
from modelfactory.settings import ConfigError
from modelfactory.evaluation.tables import header_card, metrics_table
from modelfactory.training.trainer import Trainer

MODELS = dict(logistic_regression={}, xgboost=dict(n_rounds=5), gru=dict(hidden_size=8, n_layers=1, max_epochs=1, sequence_length=4))


# The canary ---------------------------------------------------------------------------------------------------------------------

class Payload:
    "Unpickled, it makes the canary."
    def __init__(self, canary): self.canary = str(canary)
    def __reduce__(self): return exec, (f"open({self.canary!r}, 'w').close()",)


@pytest.fixture
def canary(tmp_path):
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "code of a checkpoint was run"


def test_the_canary_sings(tmp_path):
    "A payload that could not run would prove nothing."
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def archive(**members):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as z:
        for name, data in members.items(): z.writestr(name.replace("__", "/"), data)
    return file.getvalue()


def objects(canary):
    np.save(file := io.BytesIO(), np.array([Payload(canary)], object), allow_pickle=True)
    return file.getvalue()


PICKLES = {  # a pickle in the shapes in which libraries open one unasked
    **{f"protocol {p}": lambda canary, p=p: pickle.dumps(Payload(canary), p) for p in (0, 2, 5)},
    "torch": lambda canary: archive(archive__data_pkl=pickle.dumps(Payload(canary), 2)).replace(b"data_pkl", b"data.pkl"),
    "npy": objects,
    "npz": lambda canary: archive(a_npy=objects(canary)),
    "joblib": lambda canary: pickle.dumps([Payload(canary)] * 2, 4),
}


# Checkpoints --------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    "A checkpoint of each model."
    home = tmp_path_factory.mktemp("saved")
    for name, config in MODELS.items():
        task = planted(150, seq_len=config.get("sequence_length", 1))
        model = ModelRegistry.create(name, config, 5, task.features)
        model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
        model.save(home / name)
    return home


@pytest.fixture
def checkpoint(saved, tmp_path): return lambda name: shutil.copytree(saved / name, tmp_path / "checkpoints" / name)


def slots(name): return dict(logistic_regression=["model.json", "estimator.skops"], xgboost=["model.json", "model.ubj"], gru=["model.json", "network.safetensors"])[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_slots_are_all_the_files(name, saved): assert sorted(f.name for f in (saved / name).rglob("*")) == sorted(slots(name)) and code_in(saved / name) == []


@pytest.mark.parametrize("shape", PICKLES)
@pytest.mark.parametrize("name", MODELS)
def test_a_pickle_in_any_slot_is_refused(name, shape, checkpoint, canary):
    for slot in slots(name):
        folder = checkpoint(name)
        (folder / slot).write_bytes(PICKLES[shape](canary))
        with pytest.raises(CheckpointError, match=slot): load_model(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("shape", PICKLES)
@pytest.mark.parametrize("name", MODELS)
def test_a_pickle_beside_the_files_is_not_opened(name, shape, checkpoint, canary):
    "Under each name by which some library looks for one."
    folder = checkpoint(name)
    for beside in ("model.pkl", "training.json", "training.safetensors", "pytorch_model.bin", "estimator.joblib", "__init__.py", "weights.npz"): (folder / beside).write_bytes(PICKLES[shape](canary))
    assert load_model(folder).fitted and any("pickle" in f or "not among" in f for f in code_in(folder))


@pytest.mark.parametrize("part", ["training.json", "training.safetensors"])
def test_a_training_does_not_go_on_from_a_pickle(part, tmp_path, canary):
    "A training that was cut short is the other thing a folder is read for."
    from modelfactory.models.callbacks import Callback
    class Cut(Callback):
        def on_epoch_end(self, model, epoch, losses): model.save(tmp_path / "cut"); return True
    class Resume(Callback):
        def on_fit_start(self, model, rounds): model.resume(tmp_path / "cut")
    task = planted(150, seq_len=4)
    def new(watcher):
        model = ModelRegistry.create("gru", MODELS["gru"], 5, task.features)
        model.callbacks = [watcher]
        return model
    new(Cut()).fit(task.X, task.y, task.X_val, task.y_val)
    (tmp_path / "cut" / part).write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match=part): new(Resume()).fit(task.X, task.y, task.X_val, task.y_val)


# skops --------------------------------------------------------------------------------------------------------------------------

class Stranger:
    "A type of nobody's; skops would call its `__reduce__`, and then what that returns."
    def __init__(self, canary): self.canary = str(canary)
    def __reduce__(self): return exec, (f"open({self.canary!r}, 'w').close()",)


def nested(canary):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer
    inner = Pipeline([("a", FunctionTransformer(exec, kw_args=dict(globals=dict(x=[Stranger(canary)])))), ("b", LogisticRegression())])
    return Pipeline([("outer", Pipeline([("inner", inner)]))])


def schema(folder, change):
    "Edits the schema within an archive of skops."
    file = folder / "estimator.skops"
    with zipfile.ZipFile(file) as z: members = {n: z.read(n) for n in z.namelist()}
    said = json.loads(members["schema.json"])
    change(said)
    with zipfile.ZipFile(file, "w") as z:
        for name, data in (members | {"schema.json": json.dumps(said)}).items(): z.writestr(name, data)


def inside(said):
    "The node of the first array in a schema."
    nodes = [said]
    while nodes:
        if isinstance(node := nodes.pop(0), dict):
            if node.get("__loader__") == "NdArrayNode": return node
            nodes += node.values()
        elif isinstance(node, list): nodes += node


def test_a_stranger_deep_in_an_estimator_is_not_built(checkpoint, canary):
    from skops.io import dump
    folder = checkpoint("logistic_regression")
    try: dump(nested(canary), folder / "estimator.skops")
    except Exception as e: pytest.fail(f"the attack could not be written: {e}")
    with pytest.raises(CheckpointError, match="Untrusted"): load_model(folder)


@pytest.mark.parametrize("module, cls", [("builtins", "exec"), ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("operator", "methodcaller"), ("functools", "partial"), ("test_hostile", "Stranger")])
@pytest.mark.parametrize("loader", ["ObjectNode", "TypeNode", "FunctionNode", "PartialNode", "MethodNode", "OperatorFuncNode"])
def test_a_schema_that_names_what_is_not_there_to_be_called(module, cls, loader, checkpoint, canary):
    "The archive's own words about what it holds are changed, at the top and in the middle."
    def spoil(node): node.update({"__module__": module, "__class__": cls, "__loader__": loader, "content": [f"open({str(canary)!r}, 'w').close()"]})
    for where in ("top", "middle"):
        folder = checkpoint("logistic_regression")
        schema(folder, lambda s: spoil(s if where == "top" else inside(s)))
        with pytest.raises(CheckpointError, match="estimator.skops"): load_model(folder).predict(planted(20).X, planted(20).meta)
        shutil.rmtree(folder)


def test_a_zip_that_climbs_out_writes_nothing(checkpoint, canary, tmp_path):
    folder = checkpoint("logistic_regression")
    with zipfile.ZipFile(folder / "estimator.skops", "a") as z:
        for name in ("../../canary", str(canary), "..\\..\\canary", "a/../../../canary"): z.writestr(name, b"out")
    before = sorted(tmp_path.rglob("*"))
    try: load_model(folder)
    except CheckpointError: pass
    assert sorted(tmp_path.rglob("*")) == before


def test_links_within_a_checkpoint_lead_to_nothing_that_runs_or_is_written(checkpoint, canary, tmp_path):
    (tmp_path / "theirs").write_bytes(pickle.dumps(Payload(canary)))
    for name in MODELS:
        for slot in slots(name):
            folder = checkpoint(name)
            (folder / slot).unlink(), (folder / slot).symlink_to(tmp_path / "theirs")
            with pytest.raises(CheckpointError): load_model(folder)
            (folder / slot).unlink(), (folder / slot).symlink_to(folder / slot)
            with pytest.raises(CheckpointError): load_model(folder)
            shutil.rmtree(folder)


@pytest.mark.parametrize("name, slot", [(name, slot) for name in MODELS for slot in slots(name)])
def test_a_link_to_what_never_ends_is_not_read(name, slot, checkpoint):
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (20, 20)); from modelfactory.models.persistence import load_model; load_model(sys.argv[1])"
    folder = checkpoint(name)
    (folder / slot).unlink(), (folder / slot).symlink_to("/dev/zero")
    limited = ["sh", "-c", 'ulimit -v 8000000; exec "$@"', "sh", sys.executable, "-c", code, folder]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=PATIENCE)
    assert "CheckpointError" in done.stderr.splitlines()[-1], done.stderr[-500:]


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 100_000_001])
def test_a_giant_header_of_safetensors_costs_no_memory(length, checkpoint, canary):
    import resource
    folder = checkpoint("gru")
    file = folder / "network.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="network.safetensors"): load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("change", [dict(data_offsets=[0, 2**40]), dict(data_offsets=[8, 0]), dict(shape=[2**40]), dict(shape=[-1]), dict(dtype="O")])
def test_a_header_of_safetensors_that_lies_about_its_tensors(change, checkpoint):
    folder = checkpoint("gru")
    file = folder / "network.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    said = json.loads(data[8:8 + size])
    said[next(k for k in said if k != "__metadata__")].update(change)
    head = json.dumps(said).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size:])
    with pytest.raises(CheckpointError, match="network.safetensors"): load_model(folder)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", [dict(horizon="5; import os"), dict(horizon=None), dict(feature_columns=None), dict(feature_columns=[["a"]]), dict(feature_columns="abcde"), dict(config=None), dict(config=[]), dict(name=["xgboost"]), dict(name="../xgboost"),
                                    dict(mean=None), dict(mean="x"), dict(scale=[1]), dict(facts=7)])
def test_a_header_with_values_of_another_kind(name, change, checkpoint):
    "What is not read by this model does no harm; what is read is refused by a typed error of one line."
    folder = checkpoint(name)
    said = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(said | change))
    try: load_model(folder)
    except (CheckpointError, ConfigError, FeatureMismatch, UnknownModel) as e: assert "\n" not in str(e)
    else: assert not set(change) & set(said) or change == dict(facts=7), change


# Runs ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    "Few rows of the planted market."
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    for f in resolve_data("planted").iterdir():
        if f.suffix == ".parquet" and "scaled" in f.name: small(pd.read_parquet(f)).to_parquet(folder / f.name, index=False)
        elif f.name == "feature_scaler.json": shutil.copy(f, folder)
    return folder


def small(frame): return frame.groupby("symbol", group_keys=False).head(400)[[c for c in frame if c not in frame.columns[40:] or c.startswith(("label", "sample", "bars"))]]


def train(runs, data, model="logistic_regression", seed=0, **config):
    trainer = Trainer(dict(model=model, horizon=5, data=dict(data=str(data)), seed=seed, config=MODELS[model] | config))
    trainer.run_full_pipeline()
    attempt = start_attempt(runs, model, 5)
    write_run(trainer, attempt)
    return load_run(publish(attempt, runs)), trainer


@pytest.fixture(scope="session")
def published(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("published") / "runs"
    return {name: train(runs, data, name)[0].path for name in MODELS}


def flips(folder, n, seed=0):
    "`n` places, one bit each, spread over the files by size but with at least a few in each."
    rng, files = random.Random(seed), sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    places = [(f, rng.randrange(f.stat().st_size)) for f in files for _ in range(-(-n // (2 * len(files))))]
    while len(places) < n: places.append((f := rng.choices(files, [x.stat().st_size for x in files])[0], rng.randrange(f.stat().st_size)))
    return [(f, at, 1 << rng.randrange(8)) for f, at in places[:n]]


def flip(file, at, bit):
    with open(file, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at), f.write(bytes([byte ^ bit]))


@pytest.mark.parametrize("name", MODELS)
def test_one_flipped_bit_at_200_places_is_seen_before_the_model_is_read(name, published, tmp_path):
    folder = shutil.copytree(published[name], tmp_path / published[name].name)
    for file, at, bit in flips(folder / "checkpoints", 200):
        flip(file, at, bit)
        with pytest.raises(RunError, match="changed since"): load_run(folder).model()
        flip(file, at, bit)
    assert load_run(folder).model().fitted


def test_one_flipped_bit_at_200_places_of_the_other_files_is_seen_by_verify(published, tmp_path):
    folder = shutil.copytree(published["xgboost"], tmp_path / "run")
    said = (folder / MANIFEST).rename(tmp_path / MANIFEST)
    places = flips(folder, 200)
    shutil.copy(said, folder)
    for file, at, bit in places:
        flip(file, at, bit)
        with pytest.raises(RunError, match="changed since"): load_run(folder).verify()
        flip(file, at, bit)
    load_run(folder).verify()


BROKEN = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from modelfactory.models.persistence import CheckpointError, load_model
from modelfactory.models.base import FeatureMismatch
from modelfactory.models.registry import UnknownModel
from modelfactory.settings import ConfigError
from test_hostile import MODELS, flip, flips
folder, name = Path(sys.argv[1]), sys.argv[2]
load_model(folder)
def outcome():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0)), signal.alarm(20)
    try: load_model(folder)
    except (CheckpointError, ConfigError, FeatureMismatch, UnknownModel): return 1
    except Exception as e: print(f"{type(e).__name__}: {e}", flush=True); return 2
    return 0
codes = []
for file, at, bit in flips(folder, 200, 1):
    flip(file, at, bit)
    if not (pid := os.fork()): os._exit(outcome())
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    if codes[-1] not in (0, 1): print(f"{file.name} byte {at} bit {bit}: ended with {codes[-1]}", flush=True)
    flip(file, at, bit)
print(len(codes), "read")
"""


@pytest.mark.parametrize("name", ["logistic_regression", "gru"])
def test_without_the_hash_a_flipped_bit_ends_in_a_typed_error_or_a_model(name, checkpoint, canary):
    """In a process for each place, since a library that crashes takes its process with it. That of xgboost does: its own reader ends with a
    segmentation fault at one place in twenty, which is why a run's model is read after its hashes alone."""
    command = [sys.executable, "-c", BROKEN, checkpoint(name), name, ROOT / "tests"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "200 read\n", done.stdout + done.stderr[-2000:]


def test_hashes_that_were_changed_too_do_not_make_a_pickle_run(published, canary, tmp_path):
    "Whoever can write a run can write its hashes: they are no defence, the formats are."
    from modelfactory.models.persistence import file_hash
    for name, path in published.items():
        for slot in slots(name):
            folder = shutil.copytree(path, tmp_path / name / slot)
            (folder / "checkpoints" / slot).write_bytes(pickle.dumps(Payload(canary)))
            said = json.loads((folder / MANIFEST).read_text())
            said["files"][f"checkpoints/{slot}"] = file_hash(folder / "checkpoints" / slot)
            (folder / MANIFEST).write_text(json.dumps(said))
            with pytest.raises(CheckpointError): load_run(folder).model()


@pytest.mark.parametrize("files", [{}, {"checkpoints/../../../../etc/passwd": "00"}, {"checkpoints/model.ubj": "00"}, {"checkpoints/model.ubj": None}, {"checkpoints/nothing": "00"}, [], None, 7])
def test_hashes_that_are_wrong_or_gone(files, published, tmp_path):
    "A manifest that does not vouch for the model's files is refused like one that gives other hashes."
    folder = shutil.copytree(published["xgboost"], tmp_path / "run")
    said = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(said | dict(files=files)))
    with pytest.raises(RunError): load_run(folder).model()


def test_a_file_that_the_manifest_does_not_know_is_refused(published, canary, tmp_path):
    folder = shutil.copytree(published["gru"], tmp_path / "run")
    (folder / "checkpoints/training.safetensors").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(RunError, match="training.safetensors"): load_run(folder).model()


# Names --------------------------------------------------------------------------------------------------------------------------

TAG = "<img src=x onerror=alert(1)>"
NAMES = [TAG, "'\"><svg onload=alert(1)>", "a\n\n# b\n<b>c</b>", "| x | y |", "[x](javascript:alert(1))", "&lt;b&gt;", "..", "`; rm -rf ~`"]


class Elements(HTMLParser):
    "The elements of a page, with what would run."
    def __init__(self, page):
        super().__init__()
        self.tags, self.bad = [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("script", "iframe", "object", "embed", "svg"): self.bad.append(tag)
        self.bad += [f"{tag} {k}={v}" for k, v in attrs if k.startswith("on") or "javascript:" in (v or "").lower() or (k == "src" and v == "x")]


def harmless(page): assert Elements(page).bad == [], Elements(page).bad


def plain(text):
    "Markdown as a reader of it would show it."
    import mistune
    harmless(mistune.create_markdown(escape=False, plugins=["table"])(text))


@pytest.fixture(scope="session")
def strange(data, tmp_path_factory):
    "Runs on a data set whose folder, symbols and columns have hostile names."
    home = tmp_path_factory.mktemp("strange")
    folder = shutil.copytree(data, home / TAG)
    for f in folder.glob("*.parquet"):
        frame = pd.read_parquet(f)
        names = [c for c in frame if c not in ("datetime", "symbol", "open", "high", "low", "close", "volume") and not c.startswith(("label", "sample", "bars"))]
        frame = frame.rename(columns=dict(zip(names, ("<script>alert(1)</script>", "'\"><svg onload=alert(1)>"))))
        frame.assign(symbol="<script>alert('" + frame.symbol.astype(str) + "')</script>").to_parquet(f, index=False)
    return [*(train(home / "runs", folder, name) for name in ("logistic_regression", "xgboost"))]


def test_reprs_of_a_strange_data_set(strange):
    run, trainer = strange[0]
    splits = read_splits(run.data, (5,))
    shown = dict(run=run, runs=list_runs(run.path.parent), splits=splits, report=splits.report, dataset=TimeSeriesDataset(splits["val"], 5), book=trainer.backtest("val"))
    from modelfactory.data.audit import audit
    shown["audit"] = audit(splits)
    for what, x in shown.items(): assert (bad := Elements(x._repr_html_()).bad) == [], (what, bad)


@pytest.mark.parametrize("name", NAMES)
def test_cards_and_tables_escape_names(name):
    harmless(header_card(name, 5, {}, data=name, fingerprint=name))
    harmless(metrics_table({name: .5}, {name: .4}, names=(name,)))
    harmless(GridResult([Outcome(name, "failed", name)])._repr_html_()), harmless(GridStatus([dict(run=name, status="failed", seconds=None, note=name)])._repr_html_())


def test_progress_escapes_what_it_says(monkeypatch):
    from modelfactory import progress
    drawn = []
    monkeypatch.setattr(progress, "in_kernel", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda html, **kw: drawn.append(html.data))
    progress.Progress(2, TAG).update(2, f"last: {TAG}")
    assert drawn
    harmless(drawn[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_leaderboard_escapes_names(name, strange):
    table = leaderboard(comparison(strange[0][0].path.parent))
    harmless(leaderboard_table(table)._repr_html_()), harmless(leaderboard_table(table.assign(data=name, model=name))._repr_html_())


def test_a_leaderboard_shows_names_as_they_are(strange):
    assert "&lt;img src=x onerror=alert(1)&gt;" in leaderboard_table(leaderboard(comparison(strange[0][0].path.parent)))._repr_html_()


def test_markdown_escapes_names(strange):
    runs = list_runs(strange[0][0].path.parent)
    result = comparison(runs)
    plain("\n".join(f"- {escape_markdown(s)}" for s in summary(result)))
    from modelfactory.runs.export import model_card
    plain(model_card(runs[0]))
    for table in (leaderboard_table(leaderboard(result)), Table(best_per_horizon(result)), Table(direction_tests(result)), excluded_table(result)): plain(table._repr_markdown_()), harmless(table._repr_html_())


def test_the_page_of_a_comparison_has_no_element_of_a_stranger(strange, tmp_path):
    runs = shutil.copytree(strange[0][0].path.parent, tmp_path / "runs")
    page = compare(runs).read_text()
    harmless(page), plain((runs / "model_comparison.md").read_text())
    assert "onerror" in page, "the name itself is to be seen"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "&lt;b&gt;"] + ["../x", "a/b", "a\0b", "A", "a b", "é", "x" * 50, ""])
def test_a_model_s_name_is_a_plain_word_everywhere(name, tmp_path):
    with pytest.raises(ValueError): check_name(name)
    with pytest.raises(ValueError): start_attempt(tmp_path, name, 5)
    with pytest.raises(UnknownModel): ModelRegistry.get(name)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_of_strange_names_is_shown_escaped(published, tmp_path):
    "A run of another's: its folder and its manifest say what they like."
    for i, name in enumerate(n for n in NAMES if n != ".."):
        folder = shutil.copytree(published["xgboost"], tmp_path / "runs" / f"{i}{name}".replace("/", "_"))
        said = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(said | dict(model=name, family=name, data=f"/{name}", created=name, identity=name, grid=name)))
        harmless(load_run(folder)._repr_html_())
    runs = list_runs(tmp_path / "runs")
    harmless(runs._repr_html_()), harmless((table := leaderboard_table(leaderboard(comparison(runs))))._repr_html_()), plain(table._repr_markdown_())


# Secrets ------------------------------------------------------------------------------------------------------------------------

SECRETS = dict(AWS_SECRET_ACCESS_KEY="S3cretOfAws", MODELFACTORY_STORAGE="postgresql://tuner:S3cretOfStorage@db.invalid/studies", HF_TOKEN="hf_S3cretOfHub", MLFLOW_TRACKING_PASSWORD="S3cretOfMlflow", MY_DATABASE_URL="mysql://u:S3cretOfMine@h/d", RAY_AUTH_TOKEN="S3cretOfRay")


def call(*args, cwd=ROOT, **env):
    command = [Path(sys.executable).with_name("modelfactory"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=PATIENCE)


def seen_in(folder, word="S3cret"):
    "Files that hold a word, as text, in UTF-16 or compressed in a zip."
    found = []
    for f in sorted(f for f in folder.rglob("*") if f.is_file()):
        texts = [f.read_bytes()]
        if zipfile.is_zipfile(f): texts += [zipfile.ZipFile(f).read(m) for m in zipfile.ZipFile(f).namelist()]
        if any(word.encode() in t or word.encode("utf-16-le") in t for t in texts): found.append(str(f.relative_to(folder)))
    return found


def test_secrets_of_the_environment_are_nowhere(tmp_path, data):
    "One run that works, one that fails, one whose tracking fails; then all of it in MLflow."
    runs, common = tmp_path / "runs", ("--horizon", "5", "--data", data, "--output", tmp_path / "runs")
    ok = call("train", "--model", "logistic_regression", *common, **SECRETS, MODELFACTORY_TRACKING="sqlite")
    failed = call("train", "--model", "svm", *common, "--set", "exact=true", "--set", "max_exact_rows=10", **SECRETS, MODELFACTORY_TRACKING="http://bob:S3cretOfTracking@127.0.0.1:9")
    untracked = call("train", "--model", "xgboost", *common, "--set", "n_rounds=3", **SECRETS, MODELFACTORY_TRACKING="http://bob:S3cretOfTracking@127.0.0.1:9/?token=S3cretToken")
    assert (ok.returncode, failed.returncode, untracked.returncode) == (0, 1, 0), ok.stderr + failed.stderr + untracked.stderr
    assert "not tracked" in untracked.stdout and "at most 10" in failed.stderr
    rebuilt = call("track", runs, "--rebuild", "--uri", "sqlite", **SECRETS)
    assert rebuilt.returncode == 0 and (runs / "mlflow.db").is_file() and len(list_runs(runs)) == 2 and len([*(runs / FAILED).iterdir()]) == 1
    for done in (ok, failed, untracked, rebuilt): assert "S3cret" not in done.stdout + done.stderr
    assert seen_in(runs) == []
    (runs / "proof.txt").write_text("S3cret")
    assert seen_in(runs) == ["proof.txt"]
