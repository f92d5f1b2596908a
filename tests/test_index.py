"The index of a runs folder holds what a full read of the folder gives, whatever happens to the folder."

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import PATIENCE, finish, read_line, until
from fabricate import bars, make_run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from modelfactory.runs import index, stored
from modelfactory.runs.explore import leaderboard_html, leaderboard_rows
from modelfactory.runs.index import INDEX_FILE, MIN_INDEXED, read_index, write_index
from modelfactory.runs.run import list_runs
from modelfactory.runs.run_folder import MANIFEST_FILE, PARTIAL_FOLDER, RunError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A finished run, to be copied."
    return make_run(tmp_path_factory.mktemp("made"), "gru", bars(n=120), n_boot=4).path


@pytest.fixture(autouse=True)
def small_folders_have_an_index(monkeypatch):
    "Small folders have an index too, and it holds runs that were changed a moment ago."
    monkeypatch.setattr(index, "MIN_INDEXED", 1)
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0.02)
    index._unwritten.clear()


def copy(made, runs, number, **changes):
    "A copy of a run under another name, published by a rename."
    target = runs / f"gru_h5_20260101_000000_{number:06x}"
    shutil.copytree(made, runs / PARTIAL_FOLDER / target.name, dirs_exist_ok=True)
    edit(runs / PARTIAL_FOLDER / target.name / MANIFEST_FILE, name=target.name, identity=f"{number:016x}", **changes)
    return (runs / PARTIAL_FOLDER / target.name).rename(target)


def edit(file, **changes):
    "Changes fields of a JSON file; a damaged file stays as it is."
    with contextlib.suppress(json.JSONDecodeError):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_index(runs, monkeypatch):
    "What a full read of a folder gives."
    with monkeypatch.context() as patched:
        patched.setattr(stored, "RunIndex", lambda folder, n_folders: index.RunIndex(Path("/nonexistent"), 0))
        return describe(list_runs(runs))


def answer(run, name):
    try:
        return getattr(run, name)
    except RunError as e:
        return str(e)


def describe(listed):
    "Everything that lists, filters and leaderboards read of runs, as text; texts compare undefined numbers as equal."
    fields = ("data", "manifest", "config", "metrics", "reason")
    rows = [(r.path.name, [answer(r, name) for name in fields]) for r in listed]
    return repr(rows), listed.unread, listed.to_frame().to_csv(), leaderboard_html(leaderboard_rows(listed))


ACTIONS = "add", "remove", "rename", "swap", "score", "edit", "touch", "link", "damage", "config", "partial", "bundle"


def act(action, runs, made, number):
    "Changes a runs folder in one way; a folder without runs is only added to."
    folders = sorted(f for f in runs.glob("gru_*") if (f / MANIFEST_FILE).is_file())
    unused = max([int(f.name[-6:], 16) for f in runs.glob("gru_*")], default=0) + 1
    if action == "add" or not folders:
        copy(made, runs, unused)
        return
    run, last = folders[number % len(folders)], folders[-1]
    if action == "remove":
        shutil.rmtree(run)
    elif action == "rename":
        run.rename(runs / f"gru_renamed_{unused:06x}")
    elif action == "swap" and run != last:
        run.rename(runs / ".aside")
        last.rename(run)
        (runs / ".aside").rename(last)
    elif action == "score":
        edit(run / "metrics/metrics.json", log_loss=number / 7)
    elif action == "edit":
        edit(run / MANIFEST_FILE, seed=number % 10)  # often of the same size
    elif action == "touch":
        os.utime(run / MANIFEST_FILE, ns=(1, 1))
    elif action == "link":
        (link := run / "metrics" / f"link_{number}").unlink(missing_ok=True)
        link.symlink_to("/etc/hostname")
    elif action == "damage":
        (run / ("metrics/metrics.json" if number % 2 else MANIFEST_FILE)).write_text("{")
    elif action == "config":
        (run / "config.yaml").write_text("a: [")
    elif action == "partial":
        (run / MANIFEST_FILE).unlink(missing_ok=True)
    elif action == "bundle":
        edit(run / MANIFEST_FILE, bundle_of="other")


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 999)), min_size=3, max_size=8))
def test_the_index_equals_a_full_read_after_any_changes(made, tmp_path_factory, monkeypatch, changes):
    runs = tmp_path_factory.mktemp("changes")
    for number in range(4):
        copy(made, runs, 1000 + number, seed=number)
    list_runs(runs)
    for action, number in changes:
        act(action, runs, made, number)
        assert describe(list_runs(runs)) == without_index(runs, monkeypatch), action


@pytest.fixture
def runs(made, tmp_path):
    "A folder of six runs with its index."
    for number in range(6):
        copy(made, tmp_path / "runs", number, seed=number)
    until(lambda: list_runs(tmp_path / "runs") and len(read_index(tmp_path / "runs")) == 6, "all runs in the index")
    return tmp_path / "runs"


@pytest.fixture
def read(monkeypatch):
    "Counts the manifests that are read from run folders, by name of the folder."
    counts, read_stored = Counter(), stored._stored_manifest

    def count(folder):
        counts[Path(folder).name] += 1
        return read_stored(folder)

    monkeypatch.setattr(stored, "_stored_manifest", count)
    return counts


def test_only_changed_runs_are_opened(made, runs, read):
    listed = list_runs(runs)
    assert leaderboard_rows(listed) and len(listed.to_frame()) == 6 and not read
    edit(listed[2].path / "metrics/metrics.json", log_loss=0.5)
    new = copy(made, runs, 99)
    listed = list_runs(runs)
    assert set(read) == {listed[2].path.name, new.name} and listed[2].metrics["log_loss"] == 0.5


def test_a_run_that_changed_a_moment_ago_is_read_again(made, runs, read, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_SECONDS", 3600.0)
    new = copy(made, runs, 99)
    for _ in range(2):
        read.clear()
        assert len(list_runs(runs)) == 7 and set(read) == {new.name}


def test_few_runs_need_no_index(made, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MIN_INDEXED", MIN_INDEXED)
    copy(made, tmp_path, 1)
    assert len(list_runs(tmp_path)) == 1 and MIN_INDEXED > 10
    assert not (tmp_path / INDEX_FILE).exists(), "it would be no faster"


def test_a_missing_folder_is_not_created(tmp_path):
    assert list_runs(tmp_path / "none") == [] and not (tmp_path / "none").exists()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    "Inverts the bytes in the middle of the largest column, which the checksums of its pages protect."
    column = pq.ParquetFile(file).metadata.row_group(0).column(2)
    content = bytearray(file.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    file.write_bytes(content)


def link(file):
    file.rename(file.with_name("other"))
    file.symlink_to("other")


def other_version(file):
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"modelfactory.index": "0"}), file)


def other_columns(file):
    pq.write_table(pq.read_table(file).drop_columns(["stamp"]), file)


def forged(file):
    "Documents that are no manifests, with the right stamps."
    table = pq.read_table(file)
    names = table.column_names.index("documents")
    wrong = [[(MANIFEST_FILE, text)] for text in ("{", "[]", "{}", '{"horizon": "x"}', "null", '"text"')]
    import pyarrow as pa

    column = pa.array(wrong, pa.map_(pa.string(), pa.string()))
    pq.write_table(table.set_column(names, "documents", column), file)


@pytest.mark.parametrize(
    "damage", [cut, flip, link, other_version, other_columns, forged, Path.unlink, lambda file: file.write_text("text")]
)
def test_a_damaged_index_is_ignored_and_written_again(damage, runs, read, monkeypatch):
    expected = without_index(runs, monkeypatch)
    damage(runs / INDEX_FILE)
    read.clear()
    assert describe(list_runs(runs)) == expected and len(read) == 6
    read.clear()
    assert describe(list_runs(runs)) == expected and not read
    assert (runs / INDEX_FILE).is_file() and not (runs / INDEX_FILE).is_symlink()


def test_a_pipe_in_place_of_the_index_does_not_block(runs, monkeypatch):
    (runs / INDEX_FILE).unlink()
    os.mkfifo(runs / INDEX_FILE)
    assert describe(list_runs(runs)) == without_index(runs, monkeypatch)


@pytest.mark.parametrize("name", [INDEX_FILE, f".{INDEX_FILE}.lock"])
def test_without_write_access_the_index_stays_in_memory(name, runs, read, monkeypatch):
    "A folder in place of the index or of its lock cannot be written, not even by root."
    expected = without_index(runs, monkeypatch)
    (runs / INDEX_FILE).unlink()
    (runs / name).unlink(missing_ok=True)
    (runs / name).mkdir()
    for n_read in (6, 0):
        read.clear()
        assert describe(list_runs(runs)) == expected and len(read) == n_read
    assert not [f for f in runs.glob(".*") if f.suffix == ".partial"], "no temporary file is left"


def test_the_index_is_not_written_for_one_change_in_a_hundred(runs, monkeypatch):
    before = (runs / INDEX_FILE).stat().st_mtime_ns
    many = read_index(runs)
    row = next(iter(many.values()))
    gone = {f"gone_{i}": row for i in range(3)}
    assert write_index(runs, many | gone)
    list_runs(runs)
    assert set(read_index(runs)) == set(many), "rows of removed folders are removed"
    assert (runs / INDEX_FILE).stat().st_mtime_ns > before
    large = index.RunIndex(runs, 6)
    large._written = {f"run_{i}": row for i in range(200)}
    large.current = large._written | dict(new=row)
    large.save()
    assert set(read_index(runs)) == set(many), "one new run among two hundred is read again next time"
    large.current |= dict(second=row, third=row)
    large.save()
    assert len(read_index(runs)) == 203


def test_a_run_that_is_published_while_the_index_is_written_is_listed_next_time(made, runs, monkeypatch):
    write = index.write_index

    def publish_first(folder, rows):
        if not (runs / "gru_h5_20260101_000000_000063").exists():
            copy(made, runs, 99)
        return write(folder, rows)

    monkeypatch.setattr(index, "write_index", publish_first)
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0.0)  # the index holds the next run at once
    copy(made, runs, 98)
    assert len(list_runs(runs)) == 7
    assert len(list_runs(runs)) == 8 and describe(list_runs(runs)) == without_index(runs, monkeypatch)


def test_two_threads_may_list_at_once(runs, monkeypatch):
    (runs / INDEX_FILE).unlink()
    results = []
    threads = [threading.Thread(target=lambda: results.append(describe(list_runs(runs)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == [without_index(runs, monkeypatch)] * 4


LISTING = """
import sys
from modelfactory.runs import index
index.MIN_INDEXED = 1
from modelfactory.runs.run import list_runs
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    print(len(list_runs(sys.argv[1])), flush=True)
"""


@pytest.mark.slow
def test_two_processes_refresh_one_index_at_once(made, runs, monkeypatch):
    (runs / INDEX_FILE).unlink()
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", LISTING, runs], **pipes) for _ in range(2)]
    try:
        assert [read_line(p) for p in processes] == ["ready\n"] * 2
        for p in processes:
            p.stdin.write("go\n")
            p.stdin.flush()
        for number in range(20, 26):
            copy(made, runs, number)
        outputs = [finish(p)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    counts = [[int(line) for line in output.split()] for output in outputs]
    assert all(c == sorted(c) and 6 <= c[0] and c[-1] <= 12 and len(c) == 5 for c in counts), counts
    assert describe(list_runs(runs)) == without_index(runs, monkeypatch) and len(list_runs(runs)) == 12


def test_hashes_come_from_the_manifest_even_if_the_index_is_forged(runs):
    run, file = list_runs(runs)[0], "predictions/val_predictions.parquet"
    run.verify()
    (run.path / file).write_bytes(b"changed")
    rows = read_index(runs)
    row = rows[run.path.name]
    manifest = json.loads(row.documents[MANIFEST_FILE])
    manifest["files"][file] = hashlib.sha256(b"changed").hexdigest()
    stamp = json.dumps(index.run_stamp(run.path, [name for name, *_ in json.loads(row.stamp)]))
    documents = row.documents | {MANIFEST_FILE: json.dumps(manifest)}
    write_index(runs, rows | {run.path.name: index.IndexRow(stamp, documents)})
    listed = list_runs(runs)[0]
    assert listed.manifest["files"][file] == manifest["files"][file]
    with pytest.raises(RunError, match="changed since the run was published"):
        listed.verify()


def test_a_run_is_no_own_run_if_the_index_says_other_things_than_its_manifest(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "runs" / made.name)
    until(lambda: list_runs(run.parent) and read_index(run.parent), "the run in the index")
    assert list_runs(run.parent)[0].is_own
    row = read_index(run.parent)[run.name]
    forged_manifest = json.loads(row.documents[MANIFEST_FILE]) | dict(seed=7)
    documents = row.documents | {MANIFEST_FILE: json.dumps(forged_manifest)}
    write_index(run.parent, {run.name: index.IndexRow(row.stamp, documents)})
    listed = list_runs(run.parent)[0]
    assert listed.seed == 7 and not listed.is_own


def test_the_columns_can_be_read_by_pandas(runs):
    table, listed = pd.read_parquet(runs / INDEX_FILE).set_index("run"), list_runs(runs)
    for run in listed:
        row = table.loc[run.path.name]
        assert (row.model, row.horizon, row.seed, row.scored) == ("gru", "5", run.seed, True)
        assert row.log_loss == run.metrics["log_loss"] and np.isnan(row.fold)
