"""Writes the sources of the site: the notebooks, a page of the API for each module, and a gallery of executed runs.

python docs/pages.py [PAGES GALLERY]    # default: docs/_build/pages and docs/_build/gallery

The pages have the folder structure of the project, which keeps links between notebooks working.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

from docutils.nodes import make_id

os.environ.setdefault("MODELFACTORY_TRACKING", "")  # the runs of the gallery are not logged to MLflow

from modelfactory import PUBLIC_NAMES, compare, load_run, run_grid
from modelfactory.runs.examples import example_runs

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/_build/pages"
GALLERY = ROOT / "docs/_build/gallery"
TEXTS = (
    "index.md",
    "guide.md",
    "reference.md",
    "notebooks.md",
    "benchmarks.md",
    "development.md",
    "licences.md",
    "versions.md",
    "api/index.rst",
    "gallery/index.md",
)
LINKED = ("settings.ini", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/comparison.png")
PACKAGES = {
    "data": "Reads bars and labelled splits, computes features and labels, and checks for leaks.",
    "models": "All models, the base classes that they share, and the registry.",
    "evaluation": "Metrics with intervals, backtests and significance tests.",
    "figures": "Figures of runs and comparisons.",
    "training": "Trains and scores one model on one task.",
    "tuning": "Searches for parameters of models.",
    "runs": "Grids, run folders, comparisons and predictions.",
    "general": "Settings, the command line, plugins and files.",
}  # package, or the modules that belong to none -> what it does
GALLERY_PAGES = dict(
    tear_sheet=(
        "*/train.ipynb",
        "hide-input",
        """# Tear sheet

> The notebook of one run: lightgbm, horizon 5, on the simulated market `planted`.

A grid executes [train.ipynb](../nbs/train.ipynb) once for each run. The executed copy is kept in the folder of the run.
The market has a planted signal; a Sharpe ratio as high as here does not occur on real markets.""",
    ),
    comparison=(
        "compare.ipynb",
        "remove-input",
        """# Comparison

> Three models on two simulated markets, one with a signal and one without.

`modelfactory compare` writes this page from all runs in a folder, by executing [compare.ipynb](../nbs/compare.ipynb).
[Reading a comparison](../nbs/tutorials/reading_a_comparison.ipynb) explains how to interpret it.""",
    ),
)  # page -> its notebook among the runs, the tag of cells with code, and the text at the top
SHOWN = dict(data=["planted"], models=["lightgbm"], horizons=[5], preset="quick")  # the grid of the run in the gallery


def write_pages(pages=PAGES, gallery=GALLERY):
    "Writes all pages; `gallery` is the folder of the runs in the gallery, which are made if it does not hold them."
    shutil.rmtree(pages, ignore_errors=True)
    for name in TEXTS:
        copy(ROOT / "docs" / name, pages / name)
    for name in LINKED:
        copy(ROOT / name, pages / name)
    notebooks = {}
    for file in sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts):
        notebook, page = json.loads(file.read_text()), file.relative_to(ROOT)
        if module := exported_module(notebook):
            notebooks[module] = page
        write_notebook(processed(notebook, module, page.parent.name == "reference"), pages / page)
    write_api(notebooks, pages / "api")
    append(pages / "notebooks.md", notebook_list(notebooks))
    make_gallery(gallery)
    write_gallery(gallery, pages / "gallery")


def copy(file, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)


def write_notebook(notebook, page):
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps(notebook))


# Notebooks


def exported_module(notebook):
    "The module that a notebook defines, as `modelfactory.data.splits`; None if it defines none."
    sources = ("".join(cell["source"]) for cell in notebook["cells"])
    names = [name[1] for source in sources if (name := re.match(r"#\|\s*default_exp\s+([\w.]+)", source))]
    return f"modelfactory.{names[0]}" if names else None


def has_api(module):
    return "__" not in module


def processed(notebook, module=None, tables=False):
    "Removes directives and hidden cells, links to the API, and folds the code that makes the tables of the reference."
    cells = []
    for cell in notebook["cells"]:
        is_code, source = cell["cell_type"] == "code", "".join(cell["source"])
        directives, source = split(source) if is_code else ([], source)
        if not source.strip() or "hide" in directives or "lab" in cell["metadata"].get("tags", []):
            continue
        cell["source"] = source
        if alternative := alternative_text(directives):
            cell["metadata"]["mystnb"] = dict(image=dict(alt=alternative))
        if tables and is_code and all(output["output_type"] != "stream" for output in cell["outputs"]):
            add_tag(cell, "hide-input")
        cells.append(cell)
    if module:
        text = f"API: {{py:mod}}`{module}`" if has_api(module) else "API: [public names](/api/index)"
        cells.insert(1, dict(cell_type="markdown", id="api", metadata={}, source=text))
        notebook["metadata"]["orphan"] = True  # the sidebar lists the module; notebooks.md lists the notebook
    notebook["metadata"]["language_info"] = dict(name="python")
    return notebook | dict(cells=cells)


def split(source):
    "Splits a cell into its directives (`#| …`) and the rest."
    lines = source.split("\n")
    rest = "\n".join(line for line in lines if not line.startswith("#|"))
    return [line[2:].strip() for line in lines if line.startswith("#|")], rest


def alternative_text(directives):
    "The alternative text of a figure, as in `#| fig-alt: text`; empty if the cell has none."
    return next((d.removeprefix("fig-alt:").strip() for d in directives if d.startswith("fig-alt:")), "")


def add_tag(cell, tag):
    cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), tag]


# Lists of modules and notebooks


def write_api(notebooks, folder):
    "Writes a page for each module, a page for each package that lists its modules, and a page of the public names."
    modules = [module for module in notebooks if has_api(module)]
    for module in modules:
        text = title(short(module)) + directive(f"automodule:: {module}") + directive(f"constants:: {module}")
        (folder / f"{module}.rst").write_text(text)
    for package, about in PACKAGES.items():
        listed = in_package(package, modules)
        table = "".join(f"- {{py:mod}}`~{module}`: {summary(ROOT / notebooks[module])}\n" for module in listed)
        tree = "\n".join(f"{short(module).removeprefix(f'{package}.')} <{module}>" for module in listed)
        text = f"# {package}\n\n{about}\n\n{table}\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"
        (folder / f"{package}.md").write_text(text)
    names = [f"modelfactory.{module}.{name}" for name, module in PUBLIC_NAMES.items()]
    table = directive("autosummary::", [f"~{name}" for name in names], ":nosignatures:")
    append(folder / "index.rst", table + directive("toctree::", PACKAGES, ":hidden:"))


def append(file, text):
    file.write_text(file.read_text() + text)


def in_package(package, modules):
    "The modules of a package, with those of its folders."
    return sorted(m for m in modules if (short(m).split(".")[0] if "." in short(m) else "general") == package)


def short(module):
    return module.removeprefix("modelfactory.")


def title(text):
    return f"{text}\n{'=' * len(text)}\n\n"


def directive(name, lines=(), *options):
    body = "\n".join(f"   {line}".rstrip() for line in [*options, "", *lines])
    return f"\n\n.. {name}\n{body}\n"


def notebook_list(notebooks):
    "The list of the notebooks that define the package, with the first line of each."
    text = ""
    for package, about in PACKAGES.items():
        text += f"\n## {package}\n\n{about}\n\n"
        for module in in_package(package, notebooks):
            text += f"- [{short(module)}]({notebooks[module]}): {summary(ROOT / notebooks[module])}\n"
    return text


def summary(file):
    "The line of a notebook that says what it does: the quotation under its title."
    first = "".join(json.loads(file.read_text())["cells"][0]["source"])
    return " ".join(line[2:] for line in first.split("\n") if line.startswith("> "))


# Gallery


def make_gallery(folder):
    "Executes the notebook of a run and that of a comparison, unless the folder holds those of the same code."
    files = [*sorted((ROOT / "modelfactory").rglob("*.py")), ROOT / "nbs/train.ipynb", ROOT / "nbs/compare.ipynb"]
    code = hashlib.blake2b(b"".join(file.read_bytes() for file in files)).hexdigest()
    stamp = folder / "code.txt"
    if stamp.exists() and stamp.read_text() == code:
        return
    shutil.rmtree(folder, ignore_errors=True)
    result = run_grid(SHOWN, folder)
    if not result.ok:
        raise SystemExit(f"the run of the gallery was not trained: {result}")
    shown = load_run(result[0].path)
    for run in example_runs():
        if (run.model, run.data) != (shown.model, shown.data):
            shutil.move(run.path, folder)
    compare(folder)
    stamp.write_text(code)


def write_gallery(runs, folder):
    """Writes the executed notebooks without the paths of this machine, with their code folded or, in reports, removed.

    Links to headings get the addresses that docutils gives to headings."""
    for name, (pattern, tag, about) in GALLERY_PAGES.items():
        [file] = runs.glob(pattern)
        text = file.read_text().replace(f"{runs}/", "runs/").replace(f"{ROOT}/", "")
        link = r'<a href=\\"[^"\\]+/train\.ipynb\\">([^<]*)</a>'  # to a run, which has no page on the site
        text = re.sub(link, r"\1", text)
        first, *cells = json.loads(re.sub(r'(?<=href=\\"#)[^"\\]+', lambda to: make_id(unquote(to[0])), text))["cells"]
        for cell in cells:
            cell["metadata"] = dict(tags=[tag])
        notebook = dict(cells=[first | dict(source=about), *cells], metadata=dict(language_info=dict(name="python")))
        write_notebook(notebook | dict(nbformat=4, nbformat_minor=5), folder / f"{name}.ipynb")
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        images = [data["image/png"] for data in outputs if "image/png" in data]
        (folder / f"{name}.png").write_bytes(base64.b64decode(max(images, key=len)))


if __name__ == "__main__":
    write_pages(*map(Path, sys.argv[1:]))
