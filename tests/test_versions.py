"Locking, updating and auditing the tested versions, with programs in the place of uv and pip-audit."

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

UV = """#!{python}
import sys
from pathlib import Path
open("{log}", "a").write(" ".join(sys.argv[1:]) + "\\n")
if "--universal" in sys.argv:
    pins = [*Path("constraints.txt").read_text().split(), "gamma==0.1", "windows-only==1.0"]
    text = "".join(f"{{pin}} \\\\\\n    --hash=sha256:00\\n" for pin in pins)
elif Path("{new}").exists():
    text = Path("{new}").read_text()
else:
    sys.exit("No solution found")
Path(sys.argv[sys.argv.index("-o") + 1]).write_text(text)
"""
MAKEFILE = 'check:\n\t@cp constraints.txt "$(SEEN)" && grep -q hash lock.txt && test ! -e "$(BROKEN)"\n'
OLD = "alpha==1.0\nBeta_x==2.0\nbenchmark==3.0\n"


def load_versions():
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools/versions.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


versions = load_versions()


def git(folder, *words):
    user = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *user, *words], cwd=folder, check=True, capture_output=True, timeout=PATIENCE)


@pytest.fixture
def project(tmp_path):
    "A git repository with the files that an update reads, and a folder of programs that are called instead of others."
    folder, programs = tmp_path / "project", tmp_path / "bin"
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in {"constraints.txt": OLD, "pyproject.toml": "", "Makefile": MAKEFILE}.items():
        (folder / name).write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "versions")
    programs.mkdir()
    program(programs / "uv", UV.format(python=sys.executable, log=tmp_path / "calls", new=tmp_path / "new"))
    return folder


def program(file, text):
    file.write_text(text)
    file.chmod(0o755)


def update(project, *names):
    "The finished process of an update, whose temporary folder is `temporary` beside the project."
    above = project.parent
    (above / "temporary").mkdir(exist_ok=True)
    paths = dict(SEEN=above / "seen", BROKEN=above / "broken", TMPDIR=above / "temporary")
    environment = os.environ | {k: str(v) for k, v in paths.items()}
    environment["PATH"] = f"{above / 'bin'}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "tools/versions.py", "update", *names]
    options = dict(cwd=project, env=environment, capture_output=True, text=True)
    done = subprocess.run(command, timeout=PATIENCE, **options)
    assert list((above / "temporary").iterdir()) == []
    return done


def is_unchanged(project):
    files = sorted(file.name for file in project.iterdir())
    return (project / "constraints.txt").read_text() == OLD and "lock.txt" not in files and "docs" not in files


def test_an_update_that_passes_the_check_is_written_with_a_table(project):
    (project.parent / "new").write_text("alpha==1.1\nbeta-x==2.0\ngamma==0.1\nnvidia-cuda==13.0\n")
    done = update(project)
    assert done.returncode == 0, done.stdout + done.stderr
    new = "alpha==1.1\nbenchmark==3.0\nBeta_x==2.0\ngamma==0.1\n"
    assert (project / "constraints.txt").read_text() == (project.parent / "seen").read_text() == new
    assert (project / "lock.txt").read_text().count("--hash=") == 5
    table = (project / "docs/_build/update.md").read_text()
    assert "| alpha | 1.0 | 1.1 |\n| gamma | none | 0.1 |\n" in table and table in done.stdout
    resolve, lock = (project.parent / "calls").read_text().splitlines()
    assert "--upgrade " in resolve and "--excludes" in lock and "--generate-hashes" in lock


def test_an_update_that_fails_the_check_changes_nothing(project):
    (project.parent / "new").write_text("alpha==1.1\nbeta-x==2.0\n")
    (project.parent / "broken").touch()
    done = update(project)
    assert done.returncode == 1 and "make update PACKAGES=" in done.stderr and "| alpha | 1.0 | 1.1 |" in done.stdout
    assert is_unchanged(project) and (project.parent / "seen").exists()


def test_an_update_without_newer_versions_runs_no_check(project):
    (project.parent / "new").write_text("alpha==1.0\nbeta-x==2.0\n")
    done = update(project)
    assert done.returncode == 0 and "no newer version" in done.stdout
    assert is_unchanged(project) and not (project.parent / "seen").exists()


def test_an_update_of_some_packages_leaves_the_others(project):
    (project.parent / "new").write_text("alpha==1.0\nbeta-x==2.1\n")
    assert update(project, "beta.X").returncode == 0
    resolve, _ = (project.parent / "calls").read_text().splitlines()
    assert "--upgrade-package=beta.X" in resolve and "--upgrade " not in resolve


@pytest.mark.parametrize("mistake", ["an unknown name", "no index", "not committed"])
def test_a_mistake_is_reported_before_anything_changes(project, mistake):
    names = ["alhpa"] if mistake == "an unknown name" else []
    if mistake == "not committed":
        (project / "pyproject.toml").write_text("[project]\n")
    done = update(project, *names)
    words = dict(
        [("an unknown name", "alhpa"), ("no index", "No solution found"), ("not committed", "commit the changes first")]
    )
    assert done.returncode == 1 and words[mistake] in done.stderr and is_unchanged(project)


PIP_AUDIT = """#!{python}
import json, sys, time
from pathlib import Path
answer = json.loads(Path("{answer}").read_text())
if answer == "silence": time.sleep(600)
if isinstance(answer, str): sys.exit("warning\\n" + answer)
pins = Path(sys.argv[sys.argv.index("-r") + 1]).read_text().split()
rows = [dict(zip(("name", "version"), pin.split("=="))) for pin in pins]
print(json.dumps(dict(dependencies=[row | dict(vulns=answer.get(row["name"], [])) for row in rows])))
sys.exit(any(row["name"] in answer for row in rows))
"""


@pytest.fixture
def audit(tmp_path, monkeypatch, capsys):
    "A function that audits three pins; pip-audit gives its argument as the answer."
    monkeypatch.chdir(tmp_path)
    Path("constraints.txt").write_text(OLD)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(versions, "ANSWER_SECONDS", 60)

    def run(answer):
        Path("answer").write_text(json.dumps(answer))
        program(tmp_path / "pip-audit", PIP_AUDIT.format(python=sys.executable, answer=tmp_path / "answer"))
        versions.audit()
        return capsys.readouterr().out

    return run


def vulnerability(*fixes):
    return dict(id="CVE-2026-1", fix_versions=list(fixes))


def test_an_audit_fails_if_a_newer_version_fixes_a_vulnerability(audit, capsys):
    with pytest.raises(SystemExit, match="make update PACKAGES='alpha'"):
        audit(dict(alpha=[vulnerability("1.1", "2.0")], benchmark=[vulnerability()]))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "alpha 1.0: CVE-2026-1: fixed in 1.1, 2.0",
        "benchmark 3.0: CVE-2026-1: no version fixes it",
    ]


def test_an_audit_passes_without_a_vulnerability_that_has_a_fix(audit):
    assert "packages: 3; known vulnerabilities: 0" in audit({})
    assert "known vulnerabilities: 1, none with a fix" in audit(dict(Beta_x=[vulnerability()]))


def test_an_audit_that_reaches_no_database_says_in_one_line_that_nothing_was_checked(audit, monkeypatch):
    assert audit("no such host") == "NOT CHECKED: known vulnerabilities: no such host\n"
    monkeypatch.setattr(versions, "ANSWER_SECONDS", 0.2)
    assert (
        audit("silence") == "NOT CHECKED: known vulnerabilities: no database of vulnerabilities answered within 0.2 s\n"
    )


def test_an_audit_without_pip_audit_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("constraints.txt").write_text(OLD)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    versions.audit()
    assert re.fullmatch(r"NOT CHECKED: .*pip install pip-audit.*\n", capsys.readouterr().out)


def test_the_lock_has_the_tested_versions_with_hashes_and_each_direct_dependency():
    "`make lock` writes it; torch is installed from the index that has builds for the machine."
    tested, locked = (
        {versions.normalised(k): v for k, v in versions.pins(ROOT / f"{name}.txt").items()}
        for name in ("constraints", "lock")
    )
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / "lock.txt").read_text(), flags=re.M)[1:]
    assert len(entries) == len(locked) and all("--hash=sha256:" in entry for entry in entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"][versions.EXTRA]]
    names = {versions.normalised(re.split(r"[ <>=\[;]", requirement)[0]) for requirement in direct}
    assert names - locked.keys() == {versions.NOT_LOCKED}, "run make lock"
