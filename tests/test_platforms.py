"Versions and platforms: no name that Windows lacks is used without a branch, and the pins allow all stated Pythons."

import ast
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT

from modelfactory.runs import environment

STUBS = Path(find_spec("mypy").origin).parent / "typeshed/stdlib"  # types of the standard library, by platform


def is_for_posix(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("sys.platform != 'win32'", "sys.platform == 'linux'")


def is_for_windows(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "sys.platform == 'win32'"


def names_in(statements):
    "Names that statements of a stub define or import."
    for node in (n for statement in statements for n in ast.walk(statement)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def posix_names(module):
    "Names of a module of the standard library that Windows lacks."
    file = STUBS / module.replace(".", "/")
    file = file / "__init__.pyi" if file.is_dir() else file.with_suffix(".pyi")
    body, only, common = ast.parse(file.read_text()).body, set(), set()
    for node in body:
        if is_for_posix(node) or is_for_windows(node):
            posix, windows = (node.body, node.orelse) if is_for_posix(node) else (node.orelse, node.body)
            only |= set(names_in(posix))
            common |= set(names_in(windows))
        else:
            common |= set(names_in([node]))
    return only - common


def posix_modules():
    "Modules of the standard library that Windows lacks: their stubs define nothing outside a branch."
    modules = set()
    for file in STUBS.glob("*.pyi"):
        body = ast.parse(file.read_text()).body
        public = {name for node in body if not is_for_posix(node) for name in names_in([node]) if name[0] != "_"}
        if any(map(is_for_posix, body)) and not public:
            modules.add(file.stem)
    return modules


MODULES = posix_modules()
NAMES = {module: posix_names(module) for module in ("os", "signal", "socket", "time", "asyncio")}


def parents(tree):
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def above(node, parent_of):
    while node in parent_of:
        node = parent_of[node]
        yield node


def is_guarded_import(node, parent_of):
    tries = (n for n in above(node, parent_of) if isinstance(n, ast.Try))
    return any("ImportError" in ast.unparse(handler.type) for n in tries for handler in n.handlers if handler.type)


def is_guarded_name(node, parent_of):
    "Whether a function asks for the name with `hasattr`, or for the system, before it uses the name."
    scopes = [n for n in above(node, parent_of) if isinstance(n, (ast.If, ast.IfExp, ast.BoolOp, ast.FunctionDef))]
    wanted = (f"hasattr(os, '{node.attr}')", f"hasattr(signal, '{node.attr}')", "os.name ==", "sys.platform")
    return any(text in ast.unparse(scope) for scope in scopes for text in wanted)


def unguarded(source):
    "Uses of names and modules that Windows lacks, without a branch: (line, name)."
    tree = ast.parse(source)
    parent_of = parents(tree)
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & MODULES
            uses += [(node.lineno, name) for name in names if not is_guarded_import(node, parent_of)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            top = (node.module or "").split(".")[0]
            names = {top} & MODULES | {a.name for a in node.names} & NAMES.get(node.module, set())
            uses += [(node.lineno, name) for name in names if not is_guarded_import(node, parent_of)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_posix = node.attr in NAMES.get(node.value.id, ())
            if is_posix and not is_guarded_name(node, parent_of):
                uses.append((node.lineno, f"{node.value.id}.{node.attr}"))
    return uses


def test_the_package_uses_no_name_that_windows_lacks_without_a_branch():
    files = (ROOT / "modelfactory").rglob("*.py")
    uses = {str(file.relative_to(ROOT)): unguarded(file.read_text(encoding="utf8")) for file in files}
    assert {file: names for file, names in uses.items() if names} == {}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("os.killpg(1, 15)", ["os.killpg"]),
        ("os.kill(1, signal.SIGKILL)", ["signal.SIGKILL"]),
        ("import fcntl", ["fcntl"]),
        ("from os import fork", ["fork"]),
        ("try:\n    import resource\nexcept ImportError:\n    pass", []),
        ("def f():\n    return os.geteuid() if hasattr(os, 'geteuid') else 0", []),
        ("def f():\n    return os.geteuid() if hasattr(os, 'sysconf') else 0", ["os.geteuid"]),
        ("os.kill(1, signal.SIGTERM); os.link('a', 'b'); os.getppid()", []),
    ],
)
def test_the_check_reports_uses_and_accepts_branches(source, expected):
    assert [name for _, name in unguarded(source)] == expected


def test_the_names_that_windows_lacks_are_read_from_the_stubs():
    assert {"fcntl", "resource", "pwd", "termios"} <= MODULES and "msvcrt" not in MODULES and "os" not in MODULES
    assert {"killpg", "fork", "geteuid", "sysconf"} <= NAMES["os"] and "link" not in NAMES["os"]
    assert {"SIGKILL", "SIGALRM"} <= NAMES["signal"] and "SIGTERM" not in NAMES["signal"]


def test_doctor_warns_of_text_files_that_are_not_utf8():
    with patch("locale.getencoding", lambda: "cp1252"):
        finding = environment._python()
    assert finding.state == "warn" and "cp1252" in finding.value and "PYTHONUTF8" in finding.fix
    assert environment._python().state == "ok"


def test_the_stated_python_versions_are_classified():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert versions == ["3.11", "3.12", "3.13", "3.14"] and project["requires-python"] == f">={versions[0]}"


def test_paths_of_the_package_are_valid_on_windows():
    "Also on a file system that does not distinguish upper and lower case."
    files = [f for part in ("modelfactory", "nbs", "params") for f in (ROOT / part).rglob("*")]
    names = [str(f.relative_to(ROOT)).lower() for f in files if "__pycache__" not in f.parts]
    assert len(names) == len(set(names)) and not [n for n in names if re.search(r'[<>:"|?*\\]', n)]
    reserved = {"con", "prn", "aux", "nul", *(f"{kind}{i}" for kind in ("com", "lpt") for i in range(1, 10))}
    assert not [name for name in names if Path(name).stem in reserved]


def platforms():
    "Python version -> column -> run or resolved, from the table of docs/versions.md."
    rows = re.findall(r"^\| (.+) \|$", (ROOT / "docs/versions.md").read_text(), re.M)
    (_, *systems), *cells = (row.split(" | ") for row in rows if re.match(r"Python|3\.\d+ ", row))
    return {version: dict(zip(systems, states, strict=True)) for version, *states in cells}


def test_the_page_of_platforms_lists_the_classified_versions_and_what_was_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = platforms()
    assert list(table) == re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    run = {(version, system) for version, row in table.items() for system, state in row.items() if state == "run"}
    listed = re.findall(r"^- \*\*Python (3\.\d+)\.\d+ on (\w+)\*\*", (ROOT / "docs/versions.md").read_text(), re.M)
    assert {state for row in table.values() for state in row.values()} == {"run", "resolved"} and run == set(listed)
