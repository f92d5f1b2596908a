"A quiet command prints errors and its last result; a verbose one lists the files that it reads and writes."

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from quick import small_splits
from typer.main import get_command
from typer.testing import CliRunner

from modelfactory.cli import app, main
from modelfactory.runs.examples import train_example

COMMANDS = get_command(app).commands


def call(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_both_options_and_its_help_fits_80_columns(name):
    code, text, _ = call(name, "--help")
    assert code == 0 and "--quiet" in text and "--verbose" in text
    assert max(map(len, text.splitlines())) <= 80


def bars_file(folder):
    closes = 100 * np.exp(np.random.default_rng(0).normal(0, 0.001, 1500).cumsum())
    times = pd.date_range("2024-01-01", periods=1500, freq="h")
    pd.DataFrame(dict(datetime=times, close=closes)).to_csv(folder / "A.csv", index=False)
    return folder / "A.csv"


def test_a_quiet_command_prints_only_its_last_result(tmp_path):
    options = ("--horizons", "5", "--barriers", "5=2,2", "--closes", "--output")
    code, text, _ = call("bars", bars_file(tmp_path), *options, tmp_path / "loud")
    quiet_code, quiet, errors = call("bars", tmp_path / "A.csv", *options, tmp_path / "quiet", "-q")
    assert (code, quiet_code, errors) == (0, 0, "") and "next: " in text
    assert quiet.startswith("Splits\n") and quiet in text and not re.search("next: |A: 1,500 bars", quiet)


def test_quiet_json_is_json():
    loud, quiet = call("models", "--json"), call("models", "--json", "--quiet")
    assert json.loads(quiet[1]) and loud == quiet


def test_a_quiet_command_that_fails_prints_the_error_alone(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "bars",
                str(bars_file(tmp_path)),
                "--closes",
                "--output",
                str(tmp_path / "out"),
                "--barriers",
                "5=0,1",
                "-q",
            ]
        )
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1


def test_a_quiet_command_prints_the_result_that_its_exit_code_is_about(monkeypatch):
    from modelfactory.runs import environment

    finding = environment.EnvironmentFinding("python", "2.7", "fail", "install Python 3.11")
    monkeypatch.setattr(environment, "check_environment", lambda: environment.Environment([finding]))
    code, text, _ = call("doctor", "-q")
    assert code == 1 and "install Python 3.11" in text


def test_a_verbose_command_lists_its_files_with_times(tmp_path):
    code, text, lines = call(
        "bars",
        bars_file(tmp_path),
        "--horizons",
        "5",
        "--barriers",
        "5=2,2",
        "--closes",
        "--output",
        tmp_path / "a",
        "-v",
    )
    assert code == 0 and "next: " in text
    listed = [line.split(maxsplit=3) for line in lines.splitlines() if str(tmp_path) in line]
    assert all(float(seconds) >= 0 and unit == "s" for seconds, unit, *_ in listed)
    files = {(action, path.rpartition("/")[2]) for _, _, action, path in listed}
    assert ("read", "A.csv") in files and ("wrote", "train_scaled.parquet") in files
    assert not [line for line in lines.splitlines() if str(ROOT / "modelfactory") in line]
    assert call("models")[2] == "", "a list of files that does not end"


def test_a_verbose_command_lists_the_files_of_runs(tmp_path):
    data = small_splits(tmp_path / "splits")
    run = train_example(dict(model="logistic_regression", horizon=5, data=str(data)), tmp_path / "runs")
    code, _, lines = call("show", run, "--verbose")
    assert code == 0 and re.search(r"s  read   \S+manifest.json", lines)
