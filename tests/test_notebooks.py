"""The examples and assertions of every notebook hold for the module it exports.

`nbdev-test` runs a notebook's own cells. Here the exported module stands in for the export cells, so it is the package that is
tested, from where it is installed, and coverage counts its lines."""

import ast
import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

FILES = [
    f
    for f in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if re.search(r'"#\|\s*default_exp', f.read_text()) and ".ipynb_checkpoints" not in f.parts
]


def cells(file):
    for c in json.loads(file.read_text())["cells"]:
        source = "".join(c["source"])
        if (
            c["cell_type"] == "code"
            and not re.match(r"#\|\s*(export|default_exp)", source)
            and "nbdev_export()" not in source
        ):
            yield source


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "nbs")))
def test_notebook(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    name = re.search(r"#\|\s*default_exp\s+([\w.]+)", file.read_text())[1]
    space = dict(vars(importlib.import_module(f"modelfactory.{name}"))) | dict(__name__="__main__")
    with contextlib.redirect_stdout(io.StringIO()):
        for source in cells(file):
            exec(compile(ast.parse(source), str(Path(file).name), "exec"), space)
    from matplotlib import pyplot

    pyplot.close("all")
