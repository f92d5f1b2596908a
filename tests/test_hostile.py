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
from fabricate import bars, make_run

from modelfactory.configuration import PACKAGE_ROOT, ConfigError, plugin_files, refused_settings, settings
from modelfactory.data.bundled import resolve_data
from modelfactory.data.dataset import TimeSeriesDataset
from modelfactory.data.splits import read_splits
from modelfactory.evaluation.tables import header_card, metrics_table
from modelfactory.files import FileError
from modelfactory.models.conformance import planted_task
from modelfactory.models.errors import FeatureMismatch, ModelUnavailable
from modelfactory.models.loading import load_model
from modelfactory.models.persistence import CheckpointError, file_hash, find_unsafe_files
from modelfactory.models.registry import ModelRegistry, UnknownModel, check_name
from modelfactory.runs.attempt import publish, write_run
from modelfactory.runs.compare import compare, write_comparison
from modelfactory.runs.comparison import comparison, failed_runs
from modelfactory.runs.engine import Outcome, find_notebook
from modelfactory.runs.export import export_run
from modelfactory.runs.final import final_scores
from modelfactory.runs.grid import GridResult, GridStatus
from modelfactory.runs.predict import predict_run, prediction_warnings
from modelfactory.runs.report import (
    FormattedTable,
    best_per_horizon,
    direction_tests,
    escape_markdown,
    excluded_table,
    leaderboard,
    leaderboard_table,
)
from modelfactory.runs.rescore import rescore_run
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import (
    FAILED_FOLDER,
    MANIFEST_FILE,
    RunError,
    clear_partial,
    replace_run,
    start_attempt,
)
from modelfactory.runs.sentences import comparison_notes, summary_sentences
from modelfactory.runs.tracking import run_view
from modelfactory.training.test_set import read_ledger, record_test_use
from modelfactory.training.trainer import Trainer

MODELS = dict(
    logistic_regression={},
    xgboost=dict(n_rounds=5),
    gru=dict(hidden_size=8, n_layers=1, max_epochs=1, sequence_length=4),
)


# The canary ---------------------------------------------------------------------------------------------------------------------


class Payload:
    "Unpickled, it makes the canary."

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return exec, (f"open({self.canary!r}, 'w').close()",)


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
        for name, data in members.items():
            z.writestr(name.replace("__", "/"), data)
    return file.getvalue()


def objects(canary):
    np.save(file := io.BytesIO(), np.array([Payload(canary)], object), allow_pickle=True)
    return file.getvalue()


PICKLES = {  # a pickle in the shapes in which libraries open one unasked
    **{f"protocol {p}": lambda canary, p=p: pickle.dumps(Payload(canary), p) for p in (0, 2, 5)},
    "torch": lambda canary: archive(archive__data_pkl=pickle.dumps(Payload(canary), 2)).replace(
        b"data_pkl", b"data.pkl"
    ),
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
        task = planted_task(150, seq_len=config.get("sequence_length", 1))
        model = ModelRegistry.create(name, config, 5, task.features)
        model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
        model.save(home / name)
    return home


@pytest.fixture
def checkpoint(saved, tmp_path):
    return lambda name: shutil.copytree(saved / name, tmp_path / "checkpoints" / name)


def slots(name):
    return dict(
        logistic_regression=["model.json", "estimator.skops"],
        xgboost=["model.json", "model.ubj"],
        gru=["model.json", "network.safetensors"],
    )[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_slots_are_all_the_files(name, saved):
    assert (
        sorted(f.name for f in (saved / name).rglob("*")) == sorted(slots(name))
        and find_unsafe_files(saved / name) == []
    )


@pytest.mark.parametrize("shape", PICKLES)
@pytest.mark.parametrize("name", MODELS)
def test_a_pickle_in_any_slot_is_refused(name, shape, checkpoint, canary):
    for slot in slots(name):
        folder = checkpoint(name)
        (folder / slot).write_bytes(PICKLES[shape](canary))
        with pytest.raises(CheckpointError, match=slot):
            load_model(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("shape", PICKLES)
@pytest.mark.parametrize("name", MODELS)
def test_a_pickle_beside_the_files_is_not_opened(name, shape, checkpoint, canary):
    "Under each name by which some library looks for one."
    folder = checkpoint(name)
    for beside in (
        "model.pkl",
        "training.json",
        "training.safetensors",
        "pytorch_model.bin",
        "estimator.joblib",
        "__init__.py",
        "weights.npz",
    ):
        (folder / beside).write_bytes(PICKLES[shape](canary))
    assert load_model(folder).fitted and any("pickle" in f or "not among" in f for f in find_unsafe_files(folder))


@pytest.mark.parametrize("part", ["training.json", "training.safetensors"])
def test_a_training_does_not_go_on_from_a_pickle(part, tmp_path, canary):
    "A training that was cut short is the other thing a folder is read for."
    from modelfactory.models.callbacks import Callback

    class Cut(Callback):
        def on_epoch_end(self, model, epoch, losses):
            model.save(tmp_path / "cut")
            return True

    class Resume(Callback):
        def on_fit_start(self, model, rounds):
            model.resume(tmp_path / "cut")

    task = planted_task(150, seq_len=4)

    def new(watcher):
        model = ModelRegistry.create("gru", MODELS["gru"], 5, task.features)
        model.callbacks = [watcher]
        return model

    new(Cut()).fit(task.X, task.y, task.X_val, task.y_val)
    (tmp_path / "cut" / part).write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match=part):
        new(Resume()).fit(task.X, task.y, task.X_val, task.y_val)


# skops --------------------------------------------------------------------------------------------------------------------------


class Stranger:
    "A type of nobody's; skops would call its `__reduce__`, and then what that returns."

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return exec, (f"open({self.canary!r}, 'w').close()",)


def nested(canary):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    inner = Pipeline(
        [
            ("a", FunctionTransformer(exec, kw_args=dict(globals=dict(x=[Stranger(canary)])))),
            ("b", LogisticRegression()),
        ]
    )
    return Pipeline([("outer", Pipeline([("inner", inner)]))])


def schema(folder, change):
    "Edits the schema within an archive of skops."
    file = folder / "estimator.skops"
    with zipfile.ZipFile(file) as z:
        members = {n: z.read(n) for n in z.namelist()}
    said = json.loads(members["schema.json"])
    change(said)
    with zipfile.ZipFile(file, "w") as z:
        for name, data in (members | {"schema.json": json.dumps(said)}).items():
            z.writestr(name, data)


def inside(said):
    "The node of the first array in a schema."
    nodes = [said]
    while nodes:
        if isinstance(node := nodes.pop(0), dict):
            if node.get("__loader__") == "NdArrayNode":
                return node
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


def test_a_stranger_deep_in_an_estimator_is_not_built(checkpoint, canary):
    from skops.io import dump

    folder = checkpoint("logistic_regression")
    try:
        dump(nested(canary), folder / "estimator.skops")
    except Exception as e:
        pytest.fail(f"the attack could not be written: {e}")
    with pytest.raises(CheckpointError, match="Untrusted"):
        load_model(folder)


@pytest.mark.parametrize(
    "module, cls",
    [
        ("builtins", "exec"),
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("operator", "methodcaller"),
        ("functools", "partial"),
        ("test_hostile", "Stranger"),
    ],
)
@pytest.mark.parametrize(
    "loader", ["ObjectNode", "TypeNode", "FunctionNode", "PartialNode", "MethodNode", "OperatorFuncNode"]
)
def test_a_schema_that_names_what_is_not_there_to_be_called(module, cls, loader, checkpoint, canary):
    "The archive's own words about what it holds are changed, at the top and in the middle."

    def spoil(node):
        node.update(
            {
                "__module__": module,
                "__class__": cls,
                "__loader__": loader,
                "content": [f"open({str(canary)!r}, 'w').close()"],
            }
        )

    for where in ("top", "middle"):
        folder = checkpoint("logistic_regression")
        schema(folder, lambda s: spoil(s if where == "top" else inside(s)))
        with pytest.raises(CheckpointError, match="estimator.skops"):
            load_model(folder).predict(planted_task(20).X, planted_task(20).meta)
        shutil.rmtree(folder)


def test_a_zip_that_climbs_out_writes_nothing(checkpoint, canary, tmp_path):
    folder = checkpoint("logistic_regression")
    with zipfile.ZipFile(folder / "estimator.skops", "a") as z:
        for name in ("../../canary", str(canary), "..\\..\\canary", "a/../../../canary"):
            z.writestr(name, b"out")
    before = sorted(tmp_path.rglob("*"))
    try:
        load_model(folder)
    except CheckpointError:
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_links_within_a_checkpoint_lead_to_nothing_that_runs_or_is_written(checkpoint, canary, tmp_path):
    (tmp_path / "theirs").write_bytes(pickle.dumps(Payload(canary)))
    for name in MODELS:
        for slot in slots(name):
            folder = checkpoint(name)
            (folder / slot).unlink(), (folder / slot).symlink_to(tmp_path / "theirs")
            with pytest.raises(CheckpointError):
                load_model(folder)
            (folder / slot).unlink(), (folder / slot).symlink_to(folder / slot)
            with pytest.raises(CheckpointError):
                load_model(folder)
            shutil.rmtree(folder)


@pytest.mark.parametrize("name, slot", [(name, slot) for name in MODELS for slot in slots(name)])
def test_a_link_to_what_never_ends_is_not_read(name, slot, checkpoint):
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (20, 20)); from modelfactory.models.loading import load_model; load_model(sys.argv[1])"
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
    with pytest.raises(CheckpointError, match="network.safetensors"):
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    "change",
    [dict(data_offsets=[0, 2**40]), dict(data_offsets=[8, 0]), dict(shape=[2**40]), dict(shape=[-1]), dict(dtype="O")],
)
def test_a_header_of_safetensors_that_lies_about_its_tensors(change, checkpoint):
    folder = checkpoint("gru")
    file = folder / "network.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + size])
    said[next(k for k in said if k != "__metadata__")].update(change)
    head = json.dumps(said).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    with pytest.raises(CheckpointError, match="network.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "change",
    [
        dict(horizon="5; import os"),
        dict(horizon=None),
        dict(feature_columns=None),
        dict(feature_columns=[["a"]]),
        dict(feature_columns="abcde"),
        dict(config=None),
        dict(config=[]),
        dict(name=["xgboost"]),
        dict(name="../xgboost"),
        dict(mean=None),
        dict(mean="x"),
        dict(scale=[1]),
        dict(facts=7),
    ],
)
def test_a_header_with_values_of_another_kind(name, change, checkpoint):
    "What is not read by this model does no harm; what is read is refused by a typed error of one line."
    folder = checkpoint(name)
    said = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(said | change))
    try:
        load_model(folder)
    except (CheckpointError, ConfigError, FeatureMismatch, UnknownModel) as e:
        assert "\n" not in str(e)
    else:
        assert not set(change) & set(said) or change == dict(facts=7), change


# Runs ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    "Few rows of the planted market."
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    for f in resolve_data("planted").iterdir():
        if f.suffix == ".parquet" and "scaled" in f.name:
            small(pd.read_parquet(f)).to_parquet(folder / f.name, index=False)
        elif f.name == "feature_scaler.json":
            shutil.copy(f, folder)
    return folder


def small(frame):
    return frame.groupby("symbol", group_keys=False).head(400)[
        [c for c in frame if c not in frame.columns[40:] or c.startswith(("label", "sample", "bars"))]
    ]


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
    while len(places) < n:
        places.append((f := rng.choices(files, [x.stat().st_size for x in files])[0], rng.randrange(f.stat().st_size)))
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
        with pytest.raises(RunError, match="changed since"):
            load_run(folder).model()
        flip(file, at, bit)
    assert load_run(folder).model().fitted


def test_one_flipped_bit_at_200_places_of_the_other_files_is_seen_by_verify(published, tmp_path):
    folder = shutil.copytree(published["xgboost"], tmp_path / "run")
    said = (folder / MANIFEST_FILE).rename(tmp_path / MANIFEST_FILE)
    places = flips(folder, 200)
    shutil.copy(said, folder)
    for file, at, bit in places:
        flip(file, at, bit)
        with pytest.raises(RunError, match="changed since"):
            load_run(folder).verify()
        flip(file, at, bit)
    load_run(folder).verify()


BROKEN = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from modelfactory.models.loading import load_model
from modelfactory.models.persistence import CheckpointError
from modelfactory.files import FileError
from modelfactory.models.errors import FeatureMismatch, ModelUnavailable
from modelfactory.models.registry import UnknownModel
from modelfactory.configuration import ConfigError
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
            said = json.loads((folder / MANIFEST_FILE).read_text())
            said["files"][f"checkpoints/{slot}"] = file_hash(folder / "checkpoints" / slot)
            (folder / MANIFEST_FILE).write_text(json.dumps(said))
            with pytest.raises(CheckpointError):
                load_run(folder).model()


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"checkpoints/../../../../etc/passwd": "00"},
        {"checkpoints/model.ubj": "00"},
        {"checkpoints/model.ubj": None},
        {"checkpoints/nothing": "00"},
        [],
        None,
        7,
    ],
)
def test_hashes_that_are_wrong_or_gone(files, published, tmp_path):
    "A manifest that does not vouch for the model's files is refused like one that gives other hashes."
    folder = shutil.copytree(published["xgboost"], tmp_path / "run")
    said = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps(said | dict(files=files)))
    with pytest.raises(RunError):
        load_run(folder).model()


def test_a_file_that_the_manifest_does_not_know_is_refused(published, canary, tmp_path):
    folder = shutil.copytree(published["gru"], tmp_path / "run")
    (folder / "checkpoints/training.safetensors").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(RunError, match="training.safetensors"):
        load_run(folder).model()


# Names --------------------------------------------------------------------------------------------------------------------------

TAG = "<img src=x onerror=alert(1)>"
NAMES = [
    TAG,
    "'\"><svg onload=alert(1)>",
    "a\n\n# b\n<b>c</b>",
    "| x | y |",
    "[x](javascript:alert(1))",
    "&lt;b&gt;",
    "..",
    "`; rm -rf ~`",
]


class Elements(HTMLParser):
    "The elements of a page, with what would run."

    def __init__(self, page):
        super().__init__()
        self.tags, self.bad = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("script", "iframe", "object", "embed", "svg"):
            self.bad.append(tag)
        self.bad += [
            f"{tag} {k}={v}"
            for k, v in attrs
            if k.startswith("on") or "javascript:" in (v or "").lower() or (k == "src" and v == "x")
        ]


def harmless(page):
    assert Elements(page).bad == [], Elements(page).bad


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
        names = [
            c
            for c in frame
            if c not in ("datetime", "symbol", "open", "high", "low", "close", "volume")
            and not c.startswith(("label", "sample", "bars"))
        ]
        frame = frame.rename(columns=dict(zip(names, ("<script>alert(1)</script>", "'\"><svg onload=alert(1)>"))))
        frame.assign(symbol="<script>alert('" + frame.symbol.astype(str) + "')</script>").to_parquet(f, index=False)
    return [*(train(home / "runs", folder, name) for name in ("logistic_regression", "xgboost"))]


def test_reprs_of_a_strange_data_set(strange):
    run, trainer = strange[0]
    splits = read_splits(run.data, (5,))
    shown = dict(
        run=run,
        runs=list_runs(run.path.parent),
        splits=splits,
        report=splits.report,
        dataset=TimeSeriesDataset(splits["val"], 5),
        book=trainer.backtest("val"),
    )
    from modelfactory.data.audit import audit

    shown["audit"] = audit(splits)
    for what, x in shown.items():
        assert (bad := Elements(x._repr_html_()).bad) == [], (what, bad)


@pytest.mark.parametrize("name", NAMES)
def test_cards_and_tables_escape_names(name):
    harmless(header_card(name, 5, {}, data=name, fingerprint=name))
    harmless(metrics_table({name: 0.5}, {name: 0.4}, names=(name,)))
    (
        harmless(GridResult([Outcome(name, "failed", name)])._repr_html_()),
        harmless(GridStatus([dict(run=name, status="failed", seconds=None, note=name)])._repr_html_()),
    )


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
    (
        harmless(leaderboard_table(table)._repr_html_()),
        harmless(leaderboard_table(table.assign(data=name, model=name))._repr_html_()),
    )


def test_a_leaderboard_shows_names_as_they_are(strange):
    assert (
        "&lt;img src=x onerror=alert(1)&gt;"
        in leaderboard_table(leaderboard(comparison(strange[0][0].path.parent)))._repr_html_()
    )


def test_markdown_escapes_names(strange):
    runs = list_runs(strange[0][0].path.parent)
    result = comparison(runs)
    plain("\n".join(f"- {escape_markdown(s)}" for s in summary_sentences(result)))
    from modelfactory.runs.export import model_card

    plain(model_card(runs[0]))
    for table in (
        leaderboard_table(leaderboard(result)),
        FormattedTable(best_per_horizon(result)),
        FormattedTable(direction_tests(result)),
        excluded_table(result),
    ):
        plain(table._repr_markdown_()), harmless(table._repr_html_())


def test_the_page_of_a_comparison_has_no_element_of_a_stranger(strange, tmp_path):
    runs = shutil.copytree(strange[0][0].path.parent, tmp_path / "runs")
    page = compare(runs).read_text()
    harmless(page), plain((runs / "model_comparison.md").read_text())
    assert "onerror" in page, "the name itself is to be seen"


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n != "&lt;b&gt;"] + ["../x", "a/b", "a\0b", "A", "a b", "é", "x" * 50, ""]
)
def test_a_model_s_name_is_a_plain_word_everywhere(name, tmp_path):
    with pytest.raises(ValueError):
        check_name(name)
    with pytest.raises(ValueError):
        start_attempt(tmp_path, name, 5)
    with pytest.raises(UnknownModel):
        ModelRegistry.get(name)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_of_strange_names_is_shown_escaped(published, tmp_path):
    "A run of another's: its folder and its manifest say what they like."
    for i, name in enumerate(n for n in NAMES if n != ".."):
        folder = shutil.copytree(published["xgboost"], tmp_path / "runs" / f"{i}{name}".replace("/", "_"))
        said = json.loads((folder / MANIFEST_FILE).read_text())
        (folder / MANIFEST_FILE).write_text(
            json.dumps(said | dict(model=name, family=name, data=f"/{name}", identity=name, grid=name))
        )
        harmless(load_run(folder)._repr_html_())
    runs = list_runs(tmp_path / "runs")
    (
        harmless(runs._repr_html_()),
        harmless((table := leaderboard_table(leaderboard(comparison(runs))))._repr_html_()),
        plain(table._repr_markdown_()),
    )


# Secrets ------------------------------------------------------------------------------------------------------------------------

SECRETS = dict(
    AWS_SECRET_ACCESS_KEY="S3cretOfAws",
    MODELFACTORY_STORAGE="postgresql://tuner:S3cretOfStorage@db.invalid/studies",
    HF_TOKEN="hf_S3cretOfHub",
    MLFLOW_TRACKING_PASSWORD="S3cretOfMlflow",
    MY_DATABASE_URL="mysql://u:S3cretOfMine@h/d",
    RAY_AUTH_TOKEN="S3cretOfRay",
)


def call(*args, cwd=ROOT, **env):
    command = [Path(sys.executable).with_name("modelfactory"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=PATIENCE)


def seen_in(folder, word="S3cret"):
    "Files that hold a word, as text, in UTF-16 or compressed in a zip."
    found = []
    for f in sorted(f for f in folder.rglob("*") if f.is_file()):
        texts = [f.read_bytes()]
        if zipfile.is_zipfile(f):
            texts += [zipfile.ZipFile(f).read(m) for m in zipfile.ZipFile(f).namelist()]
        if any(word.encode() in t or word.encode("utf-16-le") in t for t in texts):
            found.append(str(f.relative_to(folder)))
    return found


def test_secrets_of_the_environment_are_nowhere(tmp_path, data):
    "One run that works, one that fails, one whose tracking fails; then all of it in MLflow."
    runs, common = tmp_path / "runs", ("--horizon", "5", "--data", data, "--output", tmp_path / "runs")
    ok = call("train", "--model", "logistic_regression", *common, **SECRETS, MODELFACTORY_TRACKING="sqlite")
    failed = call(
        "train",
        "--model",
        "svm",
        *common,
        "--set",
        "exact=true",
        "--set",
        "max_exact_rows=10",
        **SECRETS,
        MODELFACTORY_TRACKING="http://bob:S3cretOfTracking@127.0.0.1:9",
    )
    untracked = call(
        "train",
        "--model",
        "xgboost",
        *common,
        "--set",
        "n_rounds=3",
        **SECRETS,
        MODELFACTORY_TRACKING="http://bob:S3cretOfTracking@127.0.0.1:9/?token=S3cretToken",
    )
    assert (ok.returncode, failed.returncode, untracked.returncode) == (0, 1, 0), (
        ok.stderr + failed.stderr + untracked.stderr
    )
    assert "not tracked" in untracked.stdout and "at most 10" in failed.stderr
    rebuilt = call("track", runs, "--rebuild", "--uri", "sqlite", **SECRETS)
    assert (
        rebuilt.returncode == 0
        and (runs / "mlflow.db").is_file()
        and len(list_runs(runs)) == 2
        and len([*(runs / FAILED_FOLDER).iterdir()]) == 1
    )
    for done in (ok, failed, untracked, rebuilt):
        assert "S3cret" not in done.stdout + done.stderr
    assert seen_in(runs) == []
    (runs / "proof.txt").write_text("S3cret")
    assert seen_in(runs) == ["proof.txt"]


# Runs of a stranger, and damaged ones ---------------------------------------------------------------------------------


def forge(folder, drop=(), **changes):
    "Writes a manifest as a stranger can: right hashes of what is there, no mark of this user."
    values = json.loads((folder / MANIFEST_FILE).read_text())
    files = {
        f.relative_to(folder).as_posix(): file_hash(f)
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != MANIFEST_FILE
    }
    values = {k: v for k, v in values.items() if k not in ("mark", *drop)} | dict(files=files) | changes
    (folder / MANIFEST_FILE).write_text(json.dumps(values))
    return folder


def content(folder):
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    "What the owner has beside a received folder; it is the same after each test."
    folder = tmp_path / "home"
    (folder / "documents").mkdir(parents=True)
    for name in (".bashrc", "documents/thesis.txt", "documents/metrics.json"):
        (folder / name).write_text("the owner's")
    before = content(folder)
    yield folder
    assert content(folder) == before, "a file outside the received folder was changed"


@pytest.fixture(scope="session")
def sent(tmp_path_factory):
    "What a stranger sends: a run with something in the place of a model."
    run = make_run(tmp_path_factory.mktemp("sent") / "runs", "svm", bars(n=60), n_boot=0)
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints/model.json").write_text("{}")
    return forge(run.path)


@pytest.fixture
def received(sent, tmp_path, home):
    return shutil.copytree(sent.parent, tmp_path / "received/runs") / sent.name


READERS = dict(
    load=load_run,
    export=lambda path: export_run(path, path.parents[2] / "home/bundle"),
    rescore=rescore_run,
    predict=lambda path: predict_run(path, bars(n=60)),
    final=lambda path: final_scores([path]),
    track=lambda path: run_view(load_run(path), checkpoints=True),
    verify=lambda path: load_run(path).verify(),
    model=lambda path: load_run(path).model(),
    isolated=lambda path: load_run(path, isolated=True).model(),
)


def refused(path, reader, match=None):
    with pytest.raises(RunError, match=match) as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_manifest_that_names_a_file_outside_the_run_is_refused(reader, received):
    "The payload lies where the name leads, with its right hash."
    payload = received.parent / ".bashrc"
    payload.write_text("evil")
    name = "checkpoints/../../.bashrc"
    forge(received, files=json.loads((received / MANIFEST_FILE).read_text())["files"] | {name: file_hash(payload)})
    refused(received, reader, "outside the run")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "checkpoints\\..\\..\\x",
        "a\0b",
        "a//b",
        "./a",
        "",
        "C:/x",
        "checkpoints/",
        "//host/share",
    ],
)
def test_a_name_that_is_not_plain_is_refused(name, received):
    forge(received, files={name: "0" * 64})
    refused(received, "load", "outside the run")
    assert comparison(received.parent)["unread"][0]["folder"] == received.name


@pytest.mark.parametrize("split", ["../../../home/documents", "a/b", "", "x" * 99, "..", "val\n"])
def test_a_split_that_is_a_path_is_refused(split, received):
    "The name of a split is part of the names of files that `rescore` writes."
    forge(received, splits=["val", split])
    refused(received, "rescore", "no name of a split")


LINKS = dict(
    file=("checkpoints/model.json", "model.json"),
    folder=("checkpoints", "checkpoints"),
    metrics=("metrics", "documents"),
    plots=("plots", "documents"),
    deep=("checkpoints/members", "documents"),
    loop=("loop", "."),
    config=("config.yaml", "c.yaml"),
)


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("reader", ["load", "export", "rescore", "isolated"])
def test_a_link_in_a_run_is_refused_though_its_content_is_right(kind, reader, received, home, tmp_path):
    place, elsewhere = received / LINKS[kind][0], home / LINKS[kind][1] if kind != "loop" else received
    if place.exists() and not elsewhere.exists():
        place.rename(tmp_path / "moved")
        elsewhere = tmp_path / "moved"
    elif place.exists():
        shutil.rmtree(place)
    place.symlink_to(elsewhere)
    if kind != "loop":
        forge(received)
    refused(received, reader, "symbolic link")


def test_a_pipe_in_a_run_does_not_block_its_reader(received):
    for name in ("config.yaml", "splits.json", "extra"):
        (received / name).unlink(missing_ok=True)
        os.mkfifo(received / name)
        refused(received, "load", "not a regular file")
        (received / name).unlink()


def spoil(path, text):
    (path / MANIFEST_FILE).write_text(text)


def instead(make):
    def damage(path):
        (path / MANIFEST_FILE).unlink(), make(path / MANIFEST_FILE)

    return damage


def large(file):
    with open(file, "wb") as f:
        f.truncate(1 << 34)


DAMAGED = dict(
    empty=lambda path: spoil(path, ""),
    binary=lambda path: (path / MANIFEST_FILE).write_bytes(bytes(range(256))),
    brackets=lambda path: spoil(path, "[" * 200_000),
    objects=lambda path: spoil(path, '{"a":' * 200_000),
    nested=lambda path: forge(path, extra=json.loads("[" * 300 + "]" * 300)),
    number=lambda path: spoil(path, "7"),
    digits=lambda path: spoil(path, "9" * 10_000),
    large=instead(large),
    pipe=instead(os.mkfifo),
    folder=instead(os.mkdir),
    link=instead(lambda file: file.symlink_to("/dev/zero")),
    loop=instead(lambda file: file.symlink_to(file)),
    **{
        f"{k}={v!r:.20}": lambda path, k=k, v=v: forge(path, **{k: v})
        for k, v in [
            ("created", 7),
            ("created", "yesterday"),
            ("created", "0001-01-01T00:00:00+23:00"),
            ("horizon", "five"),
            ("horizon", 0),
            ("horizon", 10**30),
            ("horizon", None),
            ("seed", [1]),
            ("seed", "x"),
            ("model", 5),
            ("model", ["svm"]),
            ("data", None),
            ("data", "x" * 10**6),
            ("identity", {}),
            ("files", []),
            ("files", {"config.yaml": 7}),
            ("files", {"config.yaml": "00"}),
            ("family", 3),
            ("splits", "val"),
            ("splits", [None]),
            ("seconds", {"fit": "long"}),
            ("train_shares", ["a"]),
            ("versions", 7),
            ("scoring", -1),
            ("scoring", "x"),
            ("claim", 7),
        ]
    },
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    runs = tmp_path_factory.mktemp("two") / "runs"
    for model in ("good", "bad"):
        make_run(runs, model, bars(n=60), n_boot=0)
    return runs


@pytest.mark.parametrize("damage", DAMAGED)
def test_one_damaged_manifest_is_skipped_with_one_line(damage, two, tmp_path):
    runs = shutil.copytree(two, tmp_path / "runs")
    bad = next(runs.glob("bad_*"))
    DAMAGED[damage](bad)
    found = list_runs(runs)
    assert [r.manifest["model"] for r in found] == ["good"]
    (row,) = found.unread
    assert row["folder"] == bad.name and row["reason"] and "\n" not in row["reason"] and len(row["reason"]) < 1000
    assert f"left out: {bad.name}" in repr(found)
    refused(bad, "load")


def test_the_comparison_lists_what_it_left_out(two, tmp_path):
    runs = shutil.copytree(two, tmp_path / "runs")
    bad = next(runs.glob("bad_*"))
    forge(bad, created=7)
    result = comparison(runs)
    assert [m["model"] for m in result["tasks"][0]["models"]] == ["good"]
    assert [row["folder"] for row in result["unread"]] == [bad.name] and "created" in result["unread"][0]["reason"]
    assert any(bad.name in sentence for sentence in comparison_notes(result))
    assert bad.name in excluded_table(result).frame.examples.tolist()


@pytest.mark.parametrize(
    "text, match",
    [
        ("[" * 100_000, "too deep"),
        ("model: " + "{a: " * 100_000, "too deep"),
        ("model: ../../evil\ndata: {classes: [0, 1]}", "evil"),
        ("model: !!python/object/apply:os.system [id]", "plain YAML"),
        ("a: &a [*a, *a]\nmodel: svm", "values"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
            "values",
        ),
        ("model: svm\ndata: 7", "data"),
        ("model: svm\ndata: {classes: [{}, 1]}", "integers"),
        ("day: 2024-99-99", "plain YAML"),
        ("\0", "plain YAML"),
        ("", "name"),
        ("- 1", "pairs"),
    ],
)
def test_a_forged_config_is_one_typed_error(text, match, received):
    (received / "config.yaml").write_text(text)
    forge(received)
    with pytest.raises(RunError, match=match):
        load_run(received).config
    unread = comparison(received.parent)["unread"]
    assert [row["folder"] for row in unread] == [received.name]


@pytest.mark.parametrize(
    "name",
    [
        "splits.json",
        "features.json",
        "metrics/metrics.json",
        "metrics/baselines.json",
        "metrics/history.json",
        "checkpoints/model.json",
    ],
)
def test_brackets_in_any_file_of_a_run_are_one_typed_error(name, received):
    (received / name).write_text("[" * 100_000)
    forge(received)
    run = load_run(received)
    read = {
        "splits.json": lambda: run.report,
        "features.json": lambda: run.train_features,
        "metrics/metrics.json": lambda: run.metrics,
        "metrics/baselines.json": lambda: run.baselines,
        "metrics/history.json": lambda: run.history,
    }
    with pytest.raises((RunError, CheckpointError), match="too deep"):
        read.get(name, run.model)()


def test_a_run_with_odd_values_can_be_shown(received):
    edits = {
        "metrics/metrics.json": '{"sharpe_net": [1], "log_loss": "low"}',
        "predictions/val_predictions.parquet": None,
    }
    for name, text in edits.items():
        if text:
            (received / name).write_text(text)
        else:
            pd.DataFrame(dict(p_up=["a"], y_true=[None])).to_parquet(received / name)
        forge(received)
        assert received.name in repr(load_run(received)) and received.name in repr(list_runs(received.parent))


def test_a_table_that_claims_too_many_values_is_not_read(received, monkeypatch):
    from modelfactory.runs import stored

    monkeypatch.setattr(stored, "MAX_TABLE_VALUES", 100)
    with pytest.raises(RunError, match="values, expected at most"):
        load_run(received).predictions()


# Links in the place of what is written in a runs folder ---------------------------------------------------------------


def test_a_link_for_the_folder_of_replaced_runs_moves_and_removes_nothing(received, home):
    "Each folder there would be moved into the runs, or removed where a run has its name."
    runs = received.parent
    (runs / ".replaced").symlink_to(home)
    (runs / "documents").mkdir()
    list_runs(runs)
    assert (home / "documents/thesis.txt").is_file()
    with pytest.raises(RunError, match="symbolic link"):
        replace_run(runs / "documents", received)


@pytest.mark.parametrize("act", [clear_partial, lambda runs: start_attempt(runs, "svm", 5)])
def test_a_link_for_the_folder_of_attempts_is_refused(act, received, home):
    shutil.rmtree(received.parent / ".partial")
    (received.parent / ".partial").symlink_to(home)
    with pytest.raises(RunError, match="symbolic link"):
        act(received.parent)


def test_a_link_for_the_folder_of_rescored_runs_is_refused(received, home):
    (home / received.name).mkdir()
    (received.parent / ".rescored").symlink_to(home)
    refused(received, "rescore", "symbolic link")
    (home / received.name).rmdir()


@pytest.mark.parametrize("name", ["model_comparison.json", ".model_comparison.json"])
def test_a_comparison_does_not_write_through_a_link(name, received, home):
    (received.parent / name).symlink_to(home / ".bashrc")
    assert write_comparison(received.parent)["tasks"]
    assert not (received.parent / "model_comparison.json").is_symlink()


@pytest.mark.parametrize("name", ["final.jsonl", "final.jsonl.lock"])
def test_the_ledger_is_not_written_through_a_link(name, received, home):
    (received.parent / name).symlink_to(home / ".bashrc")
    with pytest.raises((FileError, OSError)):
        record_test_use(received.parent, "data", "f", "svm", 5)


def test_a_damaged_ledger_is_one_typed_error(tmp_path):
    for text in ("[" * 100_000, "7", '{"run": 1}\n{'):
        (tmp_path / "final.jsonl").write_text(text)
        with pytest.raises(FileError, match="line"):
            read_ledger(tmp_path)
    (tmp_path / "final.jsonl").unlink()
    os.mkfifo(tmp_path / "final.jsonl")
    with pytest.raises(FileError, match="regular"):
        read_ledger(tmp_path)


def test_pipes_among_the_failed_and_the_unfinished_block_nobody(received):
    runs = received.parent
    for name in (".failed/a/job.json", ".partial/b/pid"):
        (runs / name).parent.mkdir(parents=True)
        os.mkfifo(runs / name)
    assert failed_runs(runs) == [] and clear_partial(runs) == ["b"]


# The mark of this user ------------------------------------------------------------------------------------------------


def test_only_what_this_user_made_and_nobody_changed_carries_the_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    run = make_run(tmp_path / "runs", "svm", bars(n=60), n_boot=0)
    key = tmp_path / "config/modelfactory/key"
    assert load_run(run.path).is_own and key.stat().st_mode & 0o777 == 0o600 and key.stat().st_size == 32
    stored = (run.path / MANIFEST_FILE).read_text()
    for changes in (
        dict(seed=7),
        dict(model="evil"),
        dict(extra=1),
        dict(mark="0" * 64),
        dict(mark=7),
        dict(mark="é"),
        dict(mark=None),
    ):
        (run.path / MANIFEST_FILE).write_text(json.dumps(json.loads(stored) | changes))
        assert not load_run(run.path).is_own
    (run.path / MANIFEST_FILE).write_text(stored)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    assert not load_run(run.path).is_own, "another user"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert not make_run(tmp_path / "runs", "svm", bars(n=60), n_boot=0).is_own, "no place for a key"


def test_a_run_of_a_stranger_does_not_become_an_own_one(published, data, tmp_path):
    folder = forge(shutil.copytree(published["xgboost"], tmp_path / "runs" / published["xgboost"].name))
    own, bundle = load_run(published["xgboost"]), load_run(export_run(folder, tmp_path / "bundle"))
    assert own.is_own and not load_run(folder).is_own and not bundle.is_own
    assert load_run(export_run(own.path, tmp_path / "own")).is_own
    assert rescore_run(folder, class_metrics=True)["scored"] != "left" and not load_run(folder).is_own


# Models of a stranger -------------------------------------------------------------------------------------------------


def test_predict_reads_the_model_of_a_stranger_in_another_process(published, data, tmp_path):
    folder = forge(shutil.copytree(published["xgboost"], tmp_path / "run"))
    frames = [predict_run(path, str(data), "val") for path in (published["xgboost"], folder)]
    assert [f.attrs["isolated"] for f in frames] == [False, True]
    pd.testing.assert_frame_equal(*(f.copy() for f in frames))
    assert any("process of its own" in s for s in prediction_warnings(frames[1]))
    assert not any("process of its own" in s for s in prediction_warnings(frames[0]))


DEEDS = """
import os, signal, time
import numpy as np
from modelfactory.models.base import BaseModel
from modelfactory.models.persistence import load_header, save_header
from modelfactory.models.registry import ModelRegistry

@ModelRegistry.register("deed", family="example")
class Deed(BaseModel):
    def fit(self, *args, **kw): self.fitted = True; return {}
    def predict(self, X, metadata): os.abort()
    def save(self, path): save_header(self, path)
    def load(self, path):
        deed = load_header(self, path)["deed"]
        if deed == "crash": os.kill(os.getpid(), signal.SIGSEGV)
        if deed == "memory": np.ones(40_000_000_000, np.uint8)
        if deed == "time": time.sleep(10_000)
        if deed == "lie": os.write(1, b"x" * 100)
"""


@pytest.mark.parametrize(
    "deed, match", [("crash", "SIGSEGV"), ("memory", "MemoryError"), ("time", "more than 1 s"), ("abort", "SIGABRT")]
)
def test_what_a_file_does_to_its_reader_is_an_error_of_the_caller(deed, match, received, monkeypatch, tmp_path):
    (tmp_path / "deeds.py").write_text(DEEDS)
    monkeypatch.setenv("MODELFACTORY_PLUGINS", str(tmp_path / "deeds.py"))
    if deed == "time":
        monkeypatch.setattr("modelfactory.runs.isolation.REQUEST_SECONDS", 1)
    header = dict(format=1, name="deed", horizon=5, feature_columns=["a"], config={}, deed=deed)
    (received / "checkpoints/model.json").write_text(json.dumps(header))
    forge(received)
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=3), symbol="A", horizon=5))
    with pytest.raises(RunError, match=match):
        load_run(received, isolated=True).model().predict(np.zeros((3, 1), np.float32), meta)


def test_a_small_archive_that_unpacks_to_much_is_not_unpacked(checkpoint):
    import resource

    folder = checkpoint("logistic_regression")
    with zipfile.ZipFile(folder / "estimator.skops") as z:
        members = {n: z.read(n) for n in z.namelist()}
    for extra in (bytes(200_000_000), b"[" * 100_000_000):
        with zipfile.ZipFile(folder / "estimator.skops", "w", zipfile.ZIP_DEFLATED) as z:
            for name, stored in (members | {"bomb.npy": extra}).items():
                z.writestr(name, stored)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match="unpack to"):
            load_model(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_an_archive_of_countless_members_is_not_read(checkpoint, monkeypatch):
    monkeypatch.setattr("modelfactory.models.persistence.MAX_ARCHIVE_FILES", 3)
    with pytest.raises(CheckpointError, match="members"):
        load_model(checkpoint("logistic_regression"))


# Settings and code that lie in a folder -------------------------------------------------------------------------------


def stranger_s_settings(folder, canary, text=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.ini").write_text(f"[modelfactory]\nplugins = p.py\nseed = 7\n{text}")
    (folder / "p.py").write_text(f"open({str(canary)!r}, 'w').close()")
    return folder


def plugins_in(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return [f.name for f in plugin_files()]


def test_a_plugin_in_a_received_folder_of_runs_is_not_run(canary, tmp_path):
    "The command is started there; the project around it has a settings file of its own, or there is none."
    runs = stranger_s_settings(tmp_path / "runs", canary)
    done = call("models", cwd=runs)
    line = next(s for s in done.stderr.splitlines() if "not loaded" in s)
    assert done.returncode == 0 and f"plugins in {runs}/settings.ini are not loaded: " in line


def test_where_plugins_run_and_where_not(canary, tmp_path, monkeypatch):
    project = stranger_s_settings(tmp_path / "project", canary)
    (project / "nbs/models").mkdir(parents=True)
    assert plugins_in(project, monkeypatch) == ["p.py"], "the folder of the command"
    assert plugins_in(project / "nbs", monkeypatch) == [], "below it, and no git repository"
    assert "neither in the root" in refused_settings() and settings().seed == 7
    (project / ".git").mkdir()
    for folder in (project, project / "nbs", project / "nbs/models"):
        assert plugins_in(folder, monkeypatch) == ["p.py"]
    for name in ("runs", "runs/svm_h5_20260101_000000_abcdef", "runs/more"):
        assert plugins_in(stranger_s_settings(project / name, canary), monkeypatch) == [], name
        assert "folder is one of runs" in refused_settings()
    other = stranger_s_settings(tmp_path / "shared", canary)
    (other / "svm_h5_20260101_000000_abcdef").mkdir()
    (other / "svm_h5_20260101_000000_abcdef/manifest.json").write_text("{}")
    assert plugins_in(other, monkeypatch) == [], "it holds runs"
    monkeypatch.setenv("MODELFACTORY_SETTINGS", str(other / "settings.ini"))
    assert plugins_in(tmp_path, monkeypatch) == ["p.py"] and refused_settings() == "", "it was named"


def test_a_plugin_of_another_user_is_not_run(canary, tmp_path, monkeypatch):
    project = stranger_s_settings(tmp_path / "project", canary)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert plugins_in(project, monkeypatch) == [] and "belongs to another user" in refused_settings()
    from modelfactory.runs.environment import check_environment

    row = next(f for f in check_environment() if f.what == "plugins")
    assert row.state == "warn" and "not loaded" in row.found


def test_a_received_settings_file_names_no_server_and_no_notebook(canary, tmp_path, monkeypatch):
    text = (
        "address = ray://evil:1\nengine = ray\ntracking = http://evil\nstorage = postgresql://evil/x\nnotebooks = .\n"
    )
    runs = stranger_s_settings(tmp_path / "runs", canary, text)
    monkeypatch.chdir(runs)
    here = settings()
    assert (here.address, here.engine, here.tracking, here.storage, here.seed) == ("", "local", "", "", 7)
    assert all(key in refused_settings() for key in ("engine", "address", "tracking", "storage", "notebooks"))
    for name in ("train.ipynb", "compare.ipynb"):
        (runs / name).write_text("evil")
    assert find_notebook("compare.ipynb").parent == PACKAGE_ROOT / "nbs"


def test_notebooks_of_a_folder_without_settings_are_not_executed(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/compare.ipynb").write_text("evil")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modelfactory.configuration._find_settings_file", lambda: None)
    assert find_notebook("compare.ipynb").parent == PACKAGE_ROOT / "nbs"


def test_a_module_in_the_working_folder_is_not_imported(canary, tmp_path):
    "Neither by a kernel nor by the process of a model; `runpy` and `json` are what they import first."
    from modelfactory.runs.engine import KERNEL_START_CODE

    for name in ("runpy", "json", "gc", "pandas", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')")
    code = KERNEL_START_CODE.replace("runpy.run_module(", "print(").replace("run_name=", "end=")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "ipykernel_launcher" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-P", "-m", "modelfactory.runs.isolation"],
        cwd=tmp_path,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=PATIENCE,
    )
    assert "EOFError" in done.stderr


# Text of a stranger on a terminal -------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eevil\r"


def test_a_terminal_is_not_obeyed(two, tmp_path, capsys):
    runs = shutil.copytree(two, tmp_path / "runs")
    good, bad = next(runs.glob("good_*")), next(runs.glob("bad_*"))
    forge(good, model=f"svm{ESCAPES}", data=f"/data{ESCAPES}", family=ESCAPES)
    bad = bad.rename(bad.with_name(f"b{ESCAPES}"))
    forge(bad, model=7)
    found = list_runs(runs)
    result = comparison(found)
    texts = [
        repr(load_run(good)),
        repr(found),
        *summary_sentences(result),
        json.dumps(result, ensure_ascii=False),
        escape_markdown(ESCAPES),
        repr(found.unread),
        str(RunError(ESCAPES)),
        str(ConfigError(ESCAPES)),
        str(UnknownModel(ESCAPES)),
        repr(leaderboard_table(leaderboard(result)).frame),
        str(CheckpointError(ESCAPES)),
    ]
    from modelfactory import cli

    cli.print(ESCAPES, load_run(good))
    texts.append(capsys.readouterr().out)
    assert not any(c in text for text in texts for c in "\x1b\x07\x9b\u202e\r")
    assert r"\x1b[2J" in texts[0] and r"\x1b[2J" in texts[-1]


# One flipped byte in any artefact -------------------------------------------------------------------------------------

N_FLIPS = int(os.environ.get("FLIPS", 40))  # in all; 2,000 take minutes

FLIPPED = """
import json, os, random, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_hostile import forge, outcome_of
home, n, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng, counts = random.Random(seed), {}
targets = [(run, file) for run in sorted(home.iterdir()) for file in sorted((run if run.name == "data" else run / "checkpoints").rglob("*"))
           if file.is_file() and file.stat().st_size]
order = [targets[i % len(targets)] for i in range(n)]
for run in sorted(home.iterdir()): assert outcome_of(run) == 0, run  # and what it imports is there for all that follows
for i, (run, file) in enumerate(order):
    content = file.read_bytes()
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    stored = (run / "manifest.json").read_bytes()
    file.write_bytes(changed)
    if file.name != "manifest.json": forge(run)
    kind = file.name if run.name == "data" else file.suffix
    native = file.parent.name == "checkpoints"
    if native:
        if not (pid := os.fork()):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0)), signal.alarm(30)
            try: os._exit(outcome_of(run))
            except BaseException as e: print(f"{file} {i}: {type(e).__name__}: {e}", file=sys.stderr, flush=True); os._exit(2)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else: code = outcome_of(run)
    result = {0: "read", 1: "refused", 2: "untyped"}.get(code, f"signal {-code}")
    counts.setdefault(kind, {}).setdefault(result, 0)
    counts[kind][result] += 1
    file.write_bytes(content), (run / "manifest.json").write_bytes(stored)
print(json.dumps(counts))
"""


def outcome_of(path):
    "Opens everything a run has: 0 where it can be read, 1 where it is refused by a typed error."
    try:
        run = load_run(path)
        (
            run.config,
            run.metrics,
            run.baselines,
            run.history,
            run.predictions(),
            run.report,
            run.train_features,
            repr(run),
        )
        if (path / "checkpoints").is_dir():
            model, task = run.model(), planted_task(20, seq_len=4 if run.manifest["model"] == "gru" else 1)
            model.predict(task.X, task.meta)
    except (RunError, CheckpointError, ConfigError, FeatureMismatch, UnknownModel, ModelUnavailable):
        return 1
    except ValueError as e:
        if "X is" not in str(e) and "metadata" not in str(e):
            raise
        return 1
    return 0


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory):
    "A run of each format of weights, and one without any."
    home = tmp_path_factory.mktemp("artefacts")
    configs = MODELS | dict(lightgbm=dict(n_rounds=5), catboost=dict(n_rounds=5))
    for name, config in dict(data=None, **configs).items():
        run = make_run(home / "made", "gru" if name == "gru" else "svm", bars(n=60), n_boot=0)
        if config is not None:
            task = planted_task(150, seq_len=config.get("sequence_length", 1))
            model = ModelRegistry.create(name, config, 5, task.features)
            model.fit(task.X, task.y, task.X_val, task.y_val, task.meta, task.meta_val)
            model.save(run.path / "checkpoints")
        forge(run.path).rename(home / name)
    shutil.rmtree(home / "made")
    return home


def test_a_flipped_byte_crashes_no_caller_and_changes_nothing_elsewhere(artefacts, tmp_path, home):
    "The readers of libraries run in a process for each place, as they do for a run of a stranger."
    copy = shutil.copytree(artefacts, tmp_path / "received")
    before = content(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FLIPPED, ROOT / "tests", copy, str(N_FLIPS), os.environ.get("FLIP_SEED", "0")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(counts, indent=1), done.stderr[-3000:])
    assert sum(n for results in counts.values() for n in results.values()) == N_FLIPS
    untyped = {kind: results for kind, results in counts.items() if "untyped" in results}
    assert not untyped, f"{untyped} {done.stderr[-2000:]}"
    assert content(tmp_path) == before


def test_weights_that_end_their_reader_are_an_error_of_the_caller(artefacts, tmp_path):
    "Real files of xgboost with many bytes changed, through the isolated path."
    folder = shutil.copytree(artefacts / "xgboost", tmp_path / "run")
    file = folder / "checkpoints/model.ubj"
    content, rng = bytearray(file.read_bytes()), random.Random(0)
    for _ in range(200):
        content[rng.randrange(len(content))] ^= 255
    file.write_bytes(content)
    forge(folder)
    with pytest.raises(RunError):
        load_run(folder, isolated=True).model()
