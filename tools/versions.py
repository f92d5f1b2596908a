"""Locks, updates and audits the tested versions: `python tools/versions.py lock | update [NAME ...] | audit`.

constraints.txt names one version of each package, and lock.txt also the hashes of its files, for all systems and
Pythons. `make lock`, `make update` and `make audit` call this script."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS, LOCK, TABLE = Path("constraints.txt"), Path("lock.txt"), Path("docs/_build/update.md")
EXTRA = "dev"  # the extra that `make setup` installs
SEPARATELY = "to find the cause, update packages separately: make update PACKAGES='NAME NAME'"
ANSWER_SECONDS, AUDIT_SECONDS = 20, 900  # limits for one package and for all; answers are cached for the next audit
NOT_LOCKED = "torch"  # each index has its own builds for CPUs and for CUDA, with other hashes and dependencies


def normalised(name):
    "The name of a package as the index writes it."
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    "Name -> version of each line `name==version`, with the spelling of the file."
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", file.read_text(), re.M))


def compile_with_uv(*options, output):
    "Resolves the packages of the project and of its development; ends with the error of uv."
    uv = next(filter(None, (shutil.which("uv"), shutil.which("uv", path=Path(sys.executable).parent))), None)
    if uv is None:
        sys.exit("uv is not installed, expected it on the path or in .venv: make setup")
    command = [uv, "pip", "compile", "-q", "--no-annotate", "--python-version", "3.11", "--extra", EXTRA]
    done = subprocess.run([*command, *options, "pyproject.toml", "-o", str(output)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}uv cannot resolve the packages; {output} is unchanged")


def lock():
    "Writes lock.txt from constraints.txt."
    with tempfile.TemporaryDirectory() as folder:
        new, excluded = Path(folder, LOCK), Path(folder, "excluded.txt")
        excluded.write_text(NOT_LOCKED)
        options = ["--universal", "--generate-hashes", "--custom-compile-command", "make lock"]
        compile_with_uv(*options, "-c", str(CONSTRAINTS), "--excludes", str(excluded), output=new)
        shutil.copyfile(new, LOCK)
    print(f"{LOCK}: {len(pins(LOCK))} packages with hashes")


def write_pins(versions):
    "Writes constraints.txt, sorted by the names as the index writes them."
    lines = [f"{name}=={version}\n" for name, version in versions.items()]
    CONSTRAINTS.write_text("".join(sorted(lines, key=lambda line: line.lower().replace("_", "-"))))


def resolve_newest(names):
    """Writes the newest permitted versions into constraints.txt and lock.txt; with names, only those of these packages.

    Keeps the spelling of names. Keeps packages that the project does not require, such as the libraries of benchmarks,
    which are installed without their dependencies. New packages are added if they are in the lock; the libraries of
    CUDA, which torch requires on some indexes, are not."""
    old = pins(CONSTRAINTS)
    spelling = {normalised(name): name for name in old}
    upgrades = [f"--upgrade-package={name}" for name in names] or ["--upgrade"]
    compile_with_uv(*upgrades, "--no-header", output=CONSTRAINTS)
    newest = pins(CONSTRAINTS)
    new = old | {spelling[name]: version for name, version in newest.items() if name in spelling}
    write_pins(new)
    if new != old:
        lock()
        added = {name: version for name, version in pins(LOCK).items() if name in newest.keys() - spelling.keys()}
        write_pins(new | added)


def changes_table(old, new):
    "A Markdown table of the packages whose version differs; empty if none does."
    changed = {name: (old.get(name, "none"), new.get(name, "none")) for name in sorted(old | new, key=str.casefold)}
    rows = [f"| {name} | {before} | {after} |\n" for name, (before, after) in changed.items() if before != after]
    return "".join(["| package | tested before | tested now |\n|---|---|---|\n", *rows]) if rows else ""


def check_request(names):
    "Ends with an error if a name has no pin, or if the files to be changed differ from the last commit."
    if unknown := {normalised(name) for name in names} - {normalised(name) for name in pins(CONSTRAINTS)}:
        sys.exit(f"found {', '.join(sorted(unknown))}, expected names in {CONSTRAINTS}")
    files = ["pyproject.toml", str(CONSTRAINTS)]
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *files]).returncode:
        sys.exit(
            f"{' or '.join(files)} differs from the last commit, which is what is tested: commit the changes first"
        )


def try_newest(names):
    "Runs `make check` with the newest versions in the working folder; returns the table of changes, empty without any."
    old = pins(CONSTRAINTS)
    resolve_newest(names)
    table = changes_table(old, pins(CONSTRAINTS))
    print(table or "no newer version is permitted by pyproject.toml", flush=True)
    if table and subprocess.run(["make", "check"]).returncode:
        sys.exit(f"make check failed with these versions, so nothing has changed; {SEPARATELY}")
    return table


def update(names):
    """Tries newer versions in a clone of the last commit; replaces constraints.txt and lock.txt if `make check` passes.

    Writes a table of the changes. If the check fails, nothing in this folder changes."""
    check_request(names)
    root = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="update") as clone:
        subprocess.run(["git", "clone", "-q", str(root), clone], check=True)
        with contextlib.chdir(clone):
            table = try_newest(names)
        if not table:
            return
        for file in (CONSTRAINTS, LOCK):
            shutil.copyfile(Path(clone, file), file)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(table)
    print(f"{CONSTRAINTS} and {LOCK} are new; {TABLE} has the table for the commit or pull request")


def audited(constraints, seconds):
    "What pip-audit reports for a file of pins, as a list of packages; an error in one line if it reports nothing."
    program = shutil.which("pip-audit") or shutil.which("pip-audit", path=Path(sys.executable).parent)
    if program is None:
        return "pip-audit is not installed (pip install pip-audit)"
    command = [program, "--format=json", "--progress-spinner=off", "--no-deps", "--disable-pip", "-r", str(constraints)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return f"no database of vulnerabilities answered within {seconds} s"
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["pip-audit wrote nothing"])[-1][:200]


def audit():
    """Compares the tested versions with a database of vulnerabilities; fails if a newer version fixes one.

    Where pip-audit is not installed, or reaches no database, prints one line and does not fail."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "first.txt")
        first.write_text(CONSTRAINTS.read_text().partition("\n")[0])
        packages = audited(first, ANSWER_SECONDS)
    if not isinstance(packages, str):
        packages = audited(CONSTRAINTS, AUDIT_SECONDS)
    if isinstance(packages, str):
        return print(f"NOT CHECKED: known vulnerabilities: {packages}")
    reports = [(p["name"], p.get("version"), v["id"], v["fix_versions"]) for p in packages for v in p.get("vulns", ())]
    for name, version, identity, fixes in reports:
        print(f"{name} {version}: {identity}:", f"fixed in {', '.join(fixes)}" if fixes else "no version fixes it")
    if names := sorted({name for name, _, _, fixes in reports if fixes}):
        sys.exit(f"newer versions fix vulnerabilities: make update PACKAGES='{' '.join(names)}'")
    print(f"audit: packages: {len(packages)}; known vulnerabilities: {len(reports)}, none with a fix")


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:] or [""]
    if kind not in ("lock", "update", "audit"):
        sys.exit(__doc__)
    dict(lock=lock, update=update, audit=audit)[kind](*([arguments] if kind == "update" else ()))
