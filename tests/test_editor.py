"""Editors and git.

A notebook that is converted to a script and back does not change. A commit of notebooks that are not clean or not
exported is refused."""

import os
import shutil
import subprocess

import nbformat
import pytest
from conftest import PATIENCE, ROOT

pytestmark = pytest.mark.slow

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | dict(
    GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@example.org", GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@example.org"
)


def make(folder, *words, **environment):
    "Runs `make` of this project in another folder, which has a .venv."
    command, environment = ["make", "-o", "setup", *words], ENVIRONMENT | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    "A git repository with the project and one notebook."
    folder = tmp_path_factory.mktemp("repository")
    for name in ("Makefile", "pyproject.toml", "settings.ini", ".gitattributes", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / ".githooks", folder / ".githooks")
    for name in ("nbs", "modelfactory"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "nbs/01_progress.ipynb", folder / "nbs")
    shutil.copy(ROOT / "modelfactory/__init__.py", folder / "modelfactory")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    subprocess.run([".venv/bin/nbdev-export"], cwd=folder, check=True, capture_output=True, timeout=PATIENCE)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


@pytest.fixture
def project(repository, tmp_path):
    "A copy of the repository."
    return shutil.copytree(repository, tmp_path / "project", symlinks=True)


def git(folder, *words):
    options = dict(capture_output=True, text=True, check=True)
    return subprocess.run(["git", *words], cwd=folder, env=ENVIRONMENT, timeout=PATIENCE, **options).stdout


def test_notebooks_do_not_change_by_a_conversion_to_a_script_and_back(tmp_path):
    "`make edit` calls the same commands in processes."
    from jupytext.cli import jupytext

    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    files = sorted((tmp_path / "nbs").rglob("*.ipynb"))
    jupytext(["-q", "--to", "py:percent", *map(str, files)])
    back = ["-q", "--to", "ipynb", "--update", "--update-metadata", '{"jupytext": null}']
    jupytext([*back, *(str(f.with_suffix(".py")) for f in files)])
    changed = [f.name for f in files if nbformat.read(f, 4) != nbformat.read(ROOT / f.relative_to(tmp_path), 4)]
    assert len(files) > 80 and changed == []


def test_make_edit_changes_the_edited_lines_only(project):
    notebook = project / "nbs/01_progress.ipynb"
    assert make(project, "edit", f"NB={notebook.relative_to(project)}", EDITOR="true").returncode == 0
    assert git(project, "status", "--porcelain") == ""
    done = make(project, "edit", f"NB={notebook.relative_to(project)}", VISUAL="sed -i 's/^# # Progress/# # Onward/'")
    assert done.returncode == 0, done.stderr
    changes = git(project, "diff", "--no-ext-diff", "--shortstat", "nbs").split(",")[1:]
    assert changes == [" 1 insertion(+)", " 1 deletion(-)\n"]
    assert nbformat.read(notebook, 4).cells[0].source.startswith("# Onward")
    assert make(project, "edit", "NB=nbs/nothing.ipynb").returncode == 2


def test_the_hook_refuses_notebooks_that_are_not_clean_or_not_exported(project):
    assert make(project, "hooks").returncode == 0
    notebook = project / "nbs/01_progress.ipynb"
    (project / "README.md").write_text("hello")
    git(project, "add", "README.md")
    git(project, "commit", "-qm", "no notebook in it")
    nb = nbformat.read(notebook, 4)
    cell = next(c for c in nb.cells if "#| export" in c.source)
    cell.source, cell.execution_count = cell.source + "\n\nADDED = 1", 7
    nbformat.write(nb, notebook)
    git(project, "add", "nbs")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        git(project, "commit", "-qm", "not clean")
    output = refused.value.stdout + refused.value.stderr
    assert "modelfactory/progress.py" in output and "nbs/01_progress.ipynb" in output
    git(project, "add", "-A")
    git(project, "commit", "-qm", "clean and exported")
    assert "ADDED = 1" in git(project, "show", "HEAD:modelfactory/progress.py")
    assert '"execution_count": 7' not in git(project, "show", "HEAD:nbs/01_progress.ipynb")


def test_git_shows_notebooks_cell_by_cell(project):
    assert make(project, "hooks").returncode == 0
    notebook = project / "nbs/01_progress.ipynb"
    nb = nbformat.read(notebook, 4)
    nb.cells[0].source = nb.cells[0].source.replace("# Progress", "# Onward")
    nbformat.write(nb, notebook)
    diff = git(project, "diff")
    assert "nbdiff" in diff and "# Onward" in diff and '"source"' not in diff
