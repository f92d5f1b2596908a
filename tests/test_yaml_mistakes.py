"Mistakes in YAML files are explained with the file, the line and the correction."

import re

import pytest

from modelfactory.configuration import ConfigError, read_yaml
from modelfactory.runs.grid import grid_config

GRID = "horizons: [5]\nmodels: [logistic_regression]\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "config:\n\tseed: 1",
            "line 2 begins with a tab, but YAML is indented with spaces; write 2 spaces before 'seed",
        ),
        ("config:\n  a: 1\n \tb: 2", "line 3 begins with a tab, .* write 3 spaces before 'b: 2'"),
        ("seed: 1\nmodel: gru\nseed: 2", "line 3: the key 'seed' is also in line 1; remove one"),
        ("a:\n  - b: 1\n    b: 2", "line 3: the key 'b' is also in line 2"),
        ("horizons: [5\nseed: 1", "line 2, 'seed: 1': did not find expected ',' or ']'"),
        ("a: 1: 2", "line 1, 'a: 1: 2': mapping values are not allowed"),
    ],
)
def test_a_mistake_is_explained_with_its_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(file)
    assert str(error.value).startswith(f"{file}: not readable as plain YAML: ")


@pytest.mark.parametrize("text", ["a: {b: 1}\nc: {b: 1}", "x: &x {a: 1}\ny: {<<: *x, b: 2}\nz: {<<: *x, a: 3}", ""])
def test_equal_keys_of_different_mappings_and_merged_keys_are_no_mistake(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert isinstance(read_yaml(file), dict)


@pytest.mark.parametrize(
    "data, line, written",
    [
        ("data: [planted, null]", 3, 'data: [planted, "null"]'),
        ("data: null", 3, 'data: "null"'),
        ("data:\n- planted\n- ~", 5, '- "null"'),
        ("seeds: [1]\npreset: null\ndata:\n  - 'null'\n  - null  # mine", 7, '- "null"  # mine'),
    ],
)
def test_null_without_quotes_is_corrected(tmp_path, data, line, written):
    file = tmp_path / "grid.yaml"
    file.write_text(f"{GRID}{data}\n")
    with pytest.raises(ConfigError, match=rf"grid.yaml, line {line}: .*write {re.escape(written)}$"):
        grid_config(file)


def test_null_in_a_grid_of_values_is_explained_without_a_line():
    with pytest.raises(ConfigError, match="^grid: data: .*for the data set null, write .null.$"):
        grid_config(dict(data=["planted", None], models=["svm"], horizons=[5]))
