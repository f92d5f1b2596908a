"""Writes the pages of the site: stored notebooks, with signatures above each exporting cell and its source folded.

python docs/pages.py    # writes docs/_build/pages with the project's folder structure, which keeps links working
"""

import ast
import re
import shutil
import textwrap
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/_build/pages"
LINKED = (
    "settings.ini",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/licences.md",
)  # other files to which pages link


def write_pages(pages=PAGES):
    shutil.rmtree(pages, ignore_errors=True)
    for file in (f for f in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts):
        page = pages / file.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(processed(nbformat.read(file, 4), file.parent.name == "reference"), page)
    for name in LINKED:
        shutil.copy(ROOT / name, pages)
    shutil.copy(ROOT / "docs/index.md", pages)
    (pages / "docs").mkdir()
    shutil.copy(ROOT / "docs/comparison.png", pages / "docs")


def processed(nb, tables=False):
    "Removes directives from a notebook, documents exported names, and folds the code that makes reference tables."
    level, cells = 1, []
    for cell in nb.cells:
        directives, source = split(cell.source) if cell.cell_type == "code" else ([], cell.source)
        if not source.strip() or "hide" in directives or "lab" in cell.metadata.get("tags", []):
            continue
        cell.source = source
        if cell.cell_type == "markdown":
            level = len((re.findall(r"^(#+) ", source, re.M) or ["#" * level])[-1])
        exports, makes_table = (
            "export" in directives,
            tables and cell.cell_type == "code" and not any(output.output_type == "stream" for output in cell.outputs),
        )
        if exports:
            cells += [nbformat.v4.new_markdown_cell(text) for text in documented(source, "#" * (level + 1))]
        if exports or makes_table:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = dict(name="python")
    return nb


def split(source):
    "Splits a cell into its directives (`#| …`) and the rest."
    lines = source.split("\n")
    return [line[2:].strip() for line in lines if line.startswith("#|")], "\n".join(
        line for line in lines if not line.startswith("#|")
    )


def documented(source, marks):
    "Heading, signature and docstring of each public function and class, including fields and methods."
    for node in public(ast.parse(source).body):
        text = entry(source, node, f"{marks} {node.name}")
        if isinstance(node, ast.ClassDef):
            text += "".join(
                entry(source, m, f"{marks}# {node.name}.{m.name}") for m in public(node.body) if ast.get_docstring(m)
            )
        yield text


def public(body):
    return [
        node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]


def entry(source, node, heading):
    lines, body = source.encode().split(b"\n"), node.body[0]
    head = b"\n".join(
        [*lines[node.lineno - 1 : body.lineno - 1], lines[body.lineno - 1][: body.col_offset]]
    ).rstrip()  # column offsets of ast count bytes
    fields = (
        [f for f in node.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith("_")]
        if isinstance(node, ast.ClassDef)
        else []
    )
    shown = b"\n".join([head, *(line for f in fields for line in lines[f.lineno - 1 : f.end_lineno])]).decode()
    return f"{heading}\n\n```python\n{textwrap.dedent(shown)}\n```\n\n{ast.get_docstring(node) or ''}\n\n"


if __name__ == "__main__":
    write_pages()
