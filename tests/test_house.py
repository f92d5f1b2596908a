"Rules of the project: notebooks are the source and clean, and each module has a notebook."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import PATIENCE, ROOT

NOTEBOOKS = sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)
MODULES = sorted(f for f in (ROOT / "modelfactory").rglob("*.py") if f.name not in ("__init__.py", "_modidx.py"))
BIN = Path(sys.executable).parent
MACHINE = r"(/home/|/root/|/work/|/Users/)\w"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the sources in another folder, exported and cleaned there."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "modelfactory", "pyproject.toml", "settings.ini"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    shutil.rmtree(folder / "modelfactory")
    (folder / "modelfactory").mkdir()
    shutil.copy(ROOT / "modelfactory/__init__.py", folder / "modelfactory")
    subprocess.run([BIN / "nbdev-export"], cwd=folder, check=True, capture_output=True, timeout=PATIENCE)
    subprocess.run([BIN / "nbdev-clean"], cwd=folder, check=True, capture_output=True, timeout=PATIENCE)
    return folder


def test_the_exported_package_equals_an_export_of_the_notebooks(copy):
    exported = {f.relative_to(copy): f.read_text() for f in (copy / "modelfactory").rglob("*.py")}
    stored = {f.relative_to(ROOT): f.read_text() for f in (ROOT / "modelfactory").rglob("*.py")}
    assert exported.keys() == stored.keys(), "run nbdev-export; remove modules whose notebook is gone"
    assert [str(f) for f in stored if stored[f] != exported[f]] == [], "run nbdev-export"


def test_notebooks_are_clean(copy):
    dirty = [
        str(f.relative_to(ROOT))
        for f in NOTEBOOKS
        if json.loads(f.read_text()) != json.loads((copy / f.relative_to(ROOT)).read_text())
    ]
    assert dirty == [], "run nbdev-clean"


@pytest.mark.parametrize("module", MODULES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_module_has_a_notebook(module):
    notebook = re.search(r"File to edit: (\S+\.ipynb)", module.read_text())
    assert notebook and (module.parent / notebook[1]).resolve().is_file()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_notebook_is_valid_and_small_and_has_a_title(file):
    nb = nbformat.read(file, 4)
    nbformat.validate(nb)
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")
    assert "widgets" not in nb.metadata, "execute it with --NotebookClient.store_widget_state=False"
    source = "\n".join(c.source for c in nb.cells)
    assert "import *" not in source and "TODO" not in source and not re.search(MACHINE, source)
    large = [c.id for c in nb.cells if c.cell_type == "code" and len(json.dumps(c.outputs)) > 100_000]
    assert large == [], "an output above 100 KB"
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    text_outputs = [{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in outputs]
    assert not re.search(MACHINE, json.dumps(text_outputs)), "an output contains a path of a machine"


def test_links_of_notebooks_and_readme_exist():
    for page in [ROOT / "README.md", *NOTEBOOKS]:
        if page.suffix == ".md":
            text = page.read_text()
        else:
            text = "\n".join(c.source for c in nbformat.read(page, 4).cells if c.cell_type == "markdown")
        for link in re.findall(r"\]\((?!https?:|#)([^)\s]+\.(?:ipynb|md|ini|yaml|html))\)", text):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_readme_is_the_index_notebook():
    assert (ROOT / "README.md").read_text() == readme(), "run make readme"


def readme():
    from nbconvert import MarkdownExporter

    nb = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    nb.cells = [c for c in nb.cells if "lab" not in c.metadata.get("tags", [])]  # cells for a live kernel only
    nb.metadata["language_info"] = dict(name="python")
    text = re.sub(r"\n{3,}", "\n\n", MarkdownExporter().from_notebook_node(nb)[0]).strip() + "\n"
    # Links are relative to nbs/ in the notebook, and to the root in README.md.
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda link: f"]({os.path.normpath('nbs/' + link[1])})", text)


def test_the_first_page_has_the_tables_of_the_benchmark():
    "Its numbers are the stored outputs of the benchmarks."
    tables = [markdown_table("null_zoo", row) for row in ("symmetric", "planted_0.2")]
    tables.append(markdown_table("stocknet", "always up"))
    assert all(table in readme() for table in tables), "copy the tables of the benchmarks into the first page"


def markdown_table(benchmark, row):
    "The stored table of a benchmark that has this row."
    cells = nbformat.read(ROOT / f"nbs/benchmarks/{benchmark}.ipynb", 4).cells
    outputs = [output.get("data", {}).get("text/markdown", "") for cell in cells for output in cell.get("outputs", [])]
    return next(text for text in outputs if f"| {row} " in text)


def test_the_first_page_is_short_and_has_no_output_of_its_live_cell():
    assert len(readme().splitlines()) <= 225  # seventy of them are tables of results
    code = [c for c in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells if c.cell_type == "code"]
    live = [c for c in code if "lab" in c.metadata.get("tags", [])]
    assert len(live) == 1 and live[0].outputs == []


def test_listing_models_loads_no_heavy_library():
    heavy = ["torch", "sklearn", "xgboost", "lightgbm", "catboost", "lightning", "neuralforecast"]
    heavy += ["pytorch_forecasting", "transformers", "mlflow", "pandas"]
    code = f"""
import sys
from modelfactory.models.registry import ModelRegistry
print(len(ModelRegistry.list_models()))
print([m for m in {heavy} if m in sys.modules])
"""
    options = dict(capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", code], cwd="/", timeout=PATIENCE, **options)
    assert done.stdout.splitlines() == [str(len(list((ROOT / "params/models").glob("*.yaml")))), "[]"]
