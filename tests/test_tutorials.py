"""Runs every cell of the notebooks that export nothing: the first page and the tutorials.

The cells run in the process of the tests, which has already imported the libraries. The value of a cell is shown as in
Jupyter. `test_lab.py` runs the first page in a kernel as well."""

import ast
import contextlib
import io
import json
import re

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]

FILES = [
    f
    for f in [ROOT / "nbs/index.ipynb", *sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))]
    if not re.search(r'"#\|\s*default_exp', f.read_text())
]


def run_cells(sources, name="cells"):
    "Runs cells one after another in a new namespace, and makes what Jupyter shows of the value of each."
    namespace = dict(__name__="__main__")
    for number, source in enumerate(sources):
        body, last = ast.parse(source).body, None
        if body and isinstance(body[-1], ast.Expr):
            last = ast.Expression(body.pop().value)
        file = f"{name}[{number}]"
        exec(compile(ast.Module(body, []), file, "exec"), namespace)
        if last is not None:
            show(eval(compile(last, file, "eval"), namespace))
    return namespace


def show(value):
    "Makes the representations of a value: an error in one is raised, where Jupyter prints it."
    for method in ("__repr__", "_repr_html_", "_repr_markdown_"):
        if value is not None and hasattr(type(value), method):
            assert isinstance(getattr(value, method)(), str | None), method


def test_an_error_in_a_cell_or_in_what_it_shows_is_raised():
    class Broken:
        def _repr_html_(self):
            raise KeyError("no such column")

    with pytest.raises(AssertionError):
        run_cells(["x = 1", "assert x == 2"])
    with pytest.raises(ZeroDivisionError):
        run_cells(["x = 0", "1 / x"])
    with pytest.raises(KeyError):
        show(Broken())
    assert run_cells(["x = 1\nx + 1", "y = x"])["y"] == 1


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_notebook_without_a_module_runs(file, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.chdir(file.parent)
    if file.stem == "batches_and_clusters":
        monkeypatch.delenv("MODELFACTORY_TRACKING")  # it shows MLflow
    cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
    with contextlib.redirect_stdout(io.StringIO()):
        run_cells(("".join(c["source"]) for c in cells), file.name)
    pyplot.close("all")
