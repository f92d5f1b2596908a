"""Runs the examples and assertions of every notebook on its exported module.

`nbdev-test` runs all cells of a notebook. These tests use the exported module instead of the export cells. They test
the installed package, and coverage counts its lines."""

import ast
import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

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


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "nbs")))
def test_notebook(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    name = re.search(r"#\|\s*default_exp\s+([\w.]+)", file.read_text())[1]
    namespace = dict(vars(importlib.import_module(f"modelfactory.{name}"))) | dict(__name__="__main__")
    with contextlib.redirect_stdout(io.StringIO()):
        for source in example_cells(file):
            exec(compile(ast.parse(source), str(Path(file).name), "exec"), namespace)
    from matplotlib import pyplot

    pyplot.close("all")
