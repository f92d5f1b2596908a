"The graph of the package: imports go one way, no circle, no private name of a neighbour, each public name once."

import ast
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import PATIENCE, ROOT

import modelfactory

PACKAGE = ROOT / "modelfactory"
LAYERS = ("data", "models", "evaluation", "figures", "training", "tuning", "runs", "cli")
COMMANDS = {
    "selftest",
    "compare",
    "rescore",
    "explain",
    "main",
}  # a command of `cli` has the name of the function that it calls


def module_name(file, package=PACKAGE):
    return ".".join(file.relative_to(package).with_suffix("").parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(node, module, modules):
    "Modules of the package, and names in them, that an import statement names."
    if isinstance(node, ast.Import):
        return [(a.name.removeprefix("modelfactory."), None) for a in node.names if a.name.startswith("modelfactory.")]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
    elif (node.module or "").split(".")[0] == "modelfactory":
        base = node.module.removeprefix("modelfactory").removeprefix(".")
    else:
        return []
    names = [f"{base}.{a.name}".removeprefix(".") for a in node.names]
    return [(name, None) if name in modules else (base, name.rpartition(".")[2]) for name in names]


def graph(package=PACKAGE):
    "{module: {(module that it imports, name or None)}}; what is imported for annotations alone does not count."
    files = {module_name(f, package): f for f in package.rglob("*.py") if not f.name.startswith("_")}
    edges = {}
    for module, file in files.items():
        edges[module] = set()
        pending = [ast.parse(file.read_text())]
        while pending:
            node = pending.pop()
            if is_type_checking(node):
                continue
            edges[module] |= {(target, name) for target, name in imported(node, module, files) if target in files}
            pending += ast.iter_child_nodes(node)
    return edges


def circles(edges):
    "Modules that import themselves by way of others."
    targets = {module: {target for target, _ in names} for module, names in edges.items()}

    def reach(module):
        reached, pending = set(), [module]
        while pending:
            new = targets.get(pending.pop(), set()) - reached
            reached |= new
            pending += new
        return reached

    return sorted(module for module in targets if module in reach(module))


def layer(module):
    first = module.split(".")[0]
    return LAYERS.index(first) if first in LAYERS else -1


def upward(edges):
    return sorted((m, t) for m, names in edges.items() for t, _ in names if layer(t) > layer(m))


def test_a_package_imports_only_packages_to_its_left():
    edges = graph()
    assert len(edges) > 80 and sum(map(len, edges.values())) > 300
    assert upward(edges) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circles(graph()) == []


def test_no_module_imports_a_private_name_of_another():
    private = [(m, t, n) for m, names in graph().items() for t, n in names if n and n.startswith("_")]
    assert private == []


@pytest.mark.parametrize(
    "line", ["from modelfactory.runs.b import x", "def f():\n    from modelfactory.runs.b import x"]
)
def test_the_checks_find_a_circle_and_an_import_to_the_right(tmp_path, line):
    for name, text in dict(a=line, b="from ..data.a import y").items():
        folder = tmp_path / ("data" if name == "a" else "runs")
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
    edges = graph(tmp_path)
    assert circles(edges) == ["data.a", "runs.b"] and upward(edges) == [("data.a", "runs.b")]


def test_a_public_name_is_defined_in_one_module():
    places = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        if file.name == "_modidx.py":
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            else:
                continue
            for name in names:
                places[name].add(module_name(file))
    repeated = {n: sorted(p) for n, p in places.items() if len(p) > 1 and not n.startswith("_") and n not in COMMANDS}
    assert repeated == {}


def test_public_names_are_importable_from_the_package():
    for name in modelfactory.PUBLIC_NAMES:
        exec(f"from modelfactory import {name}")
        assert callable(getattr(modelfactory, name)) and name in dir(modelfactory)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = modelfactory.no_such_name


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, modelfactory; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert not {"numpy", "pandas", "torch", "sklearn", "matplotlib"} & set(done.stdout.split())


def test_each_notebook_exports_one_module():
    exported = {f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py") if f.stat().st_size}
    sources = defaultdict(list)
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        for line in notebook.read_text().splitlines():
            if "#| default_exp " in line:
                module = line.split("#| default_exp ")[1].rstrip('",\n').removesuffix("\\n")
                sources[module.replace(".", "/") + ".py"].append(notebook.relative_to(ROOT).as_posix())
    assert {m: f for m, f in sources.items() if len(f) > 1 and "{" not in m} == {}
    assert exported - set(sources) - {"_modidx.py"} == set()
