"The licences of direct dependencies: docs/licences.md lists each with the licence that its installed package declares."

import re
import tomllib
from importlib.metadata import distribution

import pytest
from conftest import ROOT

PERMITTED = {"MIT", "BSD", "Apache-2.0", "MPL-2.0", "PSF", "NCSA", "LGPL-3.0"}
PATTERNS = {
    "MIT": r"\bMIT\b",
    "BSD": r"\bBSD\b",
    "Apache-2.0": r"Apache",
    "MPL-2.0": r"MPL-2\.0",
    "PSF": r"Python Software Foundation",
    "NCSA": r"NCSA",
    "LGPL-3.0": r"LGPL-3\.0|Lesser General Public License v3",
}
NOT_DECLARED = {"skops": "MIT"}  # its metadata names none; the licence is the file LICENSE of its repository


def dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return sorted({re.split(r"[ <>=\[;]", name)[0] for name in named})


def listed():
    rows = re.findall(r"^\| `([\w-]+)` \| ([\w.-]+) \|", (ROOT / "docs/licences.md").read_text(), re.M)
    return dict(rows)


def declared(name):
    "What the metadata of an installed package says of its licence, as text."
    metadata = distribution(name).metadata
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    return " ".join([metadata.get("License-Expression") or "", *classifiers, metadata.get("License") or ""])


def test_the_table_lists_every_direct_dependency():
    assert sorted(listed()) == dependencies() and set(listed().values()) <= PERMITTED


@pytest.mark.parametrize("name", dependencies())
def test_a_listed_licence_is_the_declared_one(name):
    licence = listed()[name]
    if name in NOT_DECLARED:
        assert licence == NOT_DECLARED[name] and not any(re.search(p, declared(name)) for p in PATTERNS.values())
    else:
        assert re.search(PATTERNS[licence], declared(name)), declared(name)[:200]
