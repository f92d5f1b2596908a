"""Runs the examples and assertions of every notebook on its exported module.

`nbdev-test` runs all cells of a notebook. These tests use the exported module instead of the export cells. They test
the installed package, and coverage counts its lines."""

import ast
import atexit
import contextlib
import importlib
import io
import json
import re
from functools import cache
from pathlib import Path
from subprocess import TimeoutExpired
from types import SimpleNamespace

import pytest
from conftest import ROOT
from forks import Forks

pytestmark = pytest.mark.slow

FILES = [
    f
    for f in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if re.search(r'"#\|\s*default_exp', f.read_text()) and ".ipynb_checkpoints" not in f.parts
]


def example_cells(file):
    for c in json.loads(file.read_text())["cells"]:
        source = "".join(c["source"])
        is_export = re.match(r"#\|\s*(export|default_exp)", source) or "nbdev_export()" in source
        if c["cell_type"] == "code" and not is_export:
            yield source


@cache
def libraries_imported():
    "Forks of an interpreter that has imported libraries, but nothing of the package."
    forks = Forks("import numpy, pandas, pyarrow.parquet, safetensors.torch, torch")
    atexit.register(forks.close)
    return forks


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "nbs")))
def test_notebook(file, monkeypatch):
    """Executes the cells of a notebook in the namespace of its module.

    `check_model` loads each model in a new interpreter (test_models.py, test_check.py); here, in a fork of one."""
    monkeypatch.chdir(file.parent)
    if file.parent.parent.name == "models":
        run = SimpleNamespace(run=libraries_imported().run, TimeoutExpired=TimeoutExpired)
        monkeypatch.setattr("modelfactory.models.conformance.subprocess", run)
    name = re.search(r"#\|\s*default_exp\s+([\w.]+)", file.read_text())[1]
    namespace = dict(vars(importlib.import_module(f"modelfactory.{name}"))) | dict(__name__="__main__")
    with contextlib.redirect_stdout(io.StringIO()):
        for source in example_cells(file):
            exec(compile(ast.parse(source), str(Path(file).name), "exec"), namespace)
    from matplotlib import pyplot

    pyplot.close("all")
