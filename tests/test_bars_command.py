"The command `bars` turns an export into splits, and two commands lead from an export to a comparison page."

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

from modelfactory.cli import main, parse_barriers
from modelfactory.configuration import ConfigError
from modelfactory.data.features import RANGE_FEATURES
from modelfactory.data.pipeline import read_pipeline
from modelfactory.data.readers import read_bars, read_eurusd
from modelfactory.data.splits import read_splits


def write_mt5(file, bars):
    "Writes bars as MetaTrader 5 exports them."
    columns = {
        "<DATE>": bars.datetime.dt.strftime("%Y.%m.%d"),
        "<TIME>": bars.datetime.dt.strftime("%H:%M:%S"),
        **{f"<{name.upper()}>": bars[name] for name in ("open", "high", "low", "close")},
        "<TICKVOL>": bars.volume.astype(int),
    }
    bars.assign(**columns, **{"<VOL>": 0, "<SPREAD>": 2})[[*columns, "<VOL>", "<SPREAD>"]].to_csv(
        file, sep="\t", index=False
    )
    return file


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_mt5(tmp_path_factory.mktemp("mt5") / "EURUSD_H1_201701012200_201705010000.csv", read_eurusd()[:2000])


def call(*arguments, cwd):
    command, options = [Path(sys.executable).with_name("modelfactory"), *map(str, arguments)], dict(text=True)
    return subprocess.run(command, cwd=cwd, env=os.environ, timeout=PATIENCE, capture_output=True, **options)


def run(*arguments):
    "Exit code of a command in this process."
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_two_commands_lead_from_an_export_to_a_comparison_page(export, tmp_path):
    done = call("bars", export, "--output", "data/eurusd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read as MetaTrader 5 export" in done.stdout and "EURUSD: 2,000 bars from 2017-01-01" in done.stdout
    assert "Features: 111" in done.stdout and "leak audit of 111 columns" in done.stdout
    following = done.stdout.splitlines()[-1].removeprefix("next: modelfactory ").split()
    assert following[following.index("--models") + 1] == "classical,boosting"
    following[following.index("--models") + 1] = "logistic_regression"
    done = call(*following, "--horizons", "5", "--output", tmp_path / "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/model_comparison.html").stat().st_size > 100_000


def test_options_reach_the_splits_and_their_pipeline(export, tmp_path, capsys):
    groups = tmp_path / "features.yaml"
    groups.write_text("returns:\nmomentum:\n")
    options = f"--output {tmp_path}/out --symbol EUR --horizons 3 --barriers 3=1,2,4 --features {groups}".split()
    dates = ("--val-from", "2017-03-15", "--test-from", "2017-04-10")
    assert run("bars", export, *options, *dates) == 0
    assert "--horizons 3 --models" in capsys.readouterr().out
    pipeline, splits = read_pipeline(tmp_path / "out"), read_splits(tmp_path / "out", None, ("train", "val", "test"))
    assert pipeline.barriers == {3: (1.0, 2.0, 4)} and set(pipeline.symbols) == {"EUR"}
    assert set(pipeline.features) == {"returns", "momentum"} and "rsi_14" in pipeline.names
    assert str(splits["val"].datetimes[0].date()) == "2017-03-15"
    assert str(splits["test"].datetimes[0].date()) == "2017-04-10"


def test_the_start_of_test_alone_leaves_a_validation_split_before_it(export, tmp_path):
    assert run("bars", export, "--output", tmp_path / "out", "--horizons", "5", "--test-from", "2017-04-10") == 0
    splits = read_splits(tmp_path / "out", None, ("train", "val", "test"))
    assert str(splits["test"].datetimes[0].date()) == "2017-04-10"
    share = len(splits["val"].datetimes) / sum(len(splits[name].datetimes) for name in ("train", "val"))
    assert share == pytest.approx(0.15 / 0.85, abs=0.01)


def test_closes_alone_leave_out_features_of_ranges_and_rolls_are_marked(tmp_path, capsys):
    bars = read_eurusd()[:1200]
    bars[["datetime", "close"]].to_csv(tmp_path / "EURUSD.csv", index=False)
    options = f"--output {tmp_path}/out --closes --horizons 5 --rolls 2017-02-15 --embargo 1D".split()
    assert run("bars", tmp_path / "EURUSD.csv", *options) == 0
    printed = capsys.readouterr().out
    assert "closes alone, so" in printed and "upper_shadow" in printed
    pipeline, splits = read_pipeline(tmp_path / "out"), read_splits(tmp_path / "out")
    assert "ret_5" in pipeline.names and "upper_shadow" not in pipeline.names and pipeline.embargo == 86_400
    assert splits["train"].market["roll_event"].sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--barriers", "5"], "expected key=value"),
        (["--barriers", "5=1"], "expected HORIZON=UP,DOWN"),
        (["--barriers", "7=1,1"], "horizon 7 is not among"),
        (["--columns", "close=Last"], "Last"),
        (["--val-from", "2017-04-01", "--test-from", "2017-03-01"], "expected the start of val before"),
        (["--val-from", "soon"], "soon"),
        (["--features", "nowhere.yaml"], "nowhere.yaml"),
        (["--embargo", "soon"], "expected a duration"),
        (["--rolls", "2030-01-01"], "2030"),
        (["--resample", "often"], "often"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(export, tmp_path, capsys, options, message):
    assert run("bars", export, "--output", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_replaced_only_if_told(export, tmp_path, capsys):
    arguments = ("bars", export, "--output", tmp_path / "out", "--horizons", "5")
    assert run(*arguments) == 0 and run(*arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert run(*arguments, "--overwrite") == 0


def test_barriers_of_the_command_line():
    assert parse_barriers(["5=1.5,1.5", "20=3,2,40"]) == {5: (1.5, 1.5), 20: (3.0, 2.0, 40)}
    with pytest.raises(ConfigError, match=r"expected HORIZON=UP,DOWN\[,MAX_BARS\]"):
        parse_barriers(["5=wide,1"])


def test_several_files_are_one_data_set(tmp_path):
    bars = read_eurusd()[:600]
    files = [write_mt5(tmp_path / f"{name}.csv", bars) for name in ("AAA", "BBB")]
    assert run("bars", *files, "--output", tmp_path / "out", "--horizons", "5") == 0
    assert set(read_pipeline(tmp_path / "out").symbols) == set(read_bars(tmp_path / "*.csv").symbol)


def closes_file(folder, name="fund.csv", column="NAV"):
    bars = read_eurusd()[:1200]
    bars.rename(columns=dict(datetime="Date", close=column))[["Date", column]].to_csv(folder / name, index=False)
    return folder / name


def test_closes_alone_leave_out_the_features_of_ranges(tmp_path, capsys):
    file, out = closes_file(tmp_path), tmp_path / "out"
    assert run("bars", file, "--output", out, "--horizons", "5", "--closes", "--columns", "close=NAV") == 0
    splits = read_splits(out, None, ("train",))
    assert not set(RANGE_FEATURES) & set(splits["train"].features) and len(splits["train"].features) == 78
    assert "closes alone, so 33 features" in capsys.readouterr().out


def test_errors_name_options_of_the_command(tmp_path, capsys):
    file = closes_file(tmp_path)
    for options, texts in (
        (
            [],
            ["--columns open=... --columns high=...", "--columns volume= sets it to 0", "per symbol: --closes"],
        ),
        (["--closes"], ["name it: --columns close=..."]),
        (["--closes", "--columns", "close=NAV", "--unit", "%Y"], ["give the format: --unit '%Y-%m-%d %H:%M'"]),
    ):
        assert run("bars", file, "--output", tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert all(text in error for text in texts) and "read_bars(" not in error, error
    (tmp_path / "days.csv").write_text("Date,Close\n01/02/2020,1.1\n02/02/2020,1.2\n")
    assert run("bars", tmp_path / "days.csv", "--output", tmp_path / "out", "--closes") == 2
    assert "--unit '%d/%m/%Y' for the day first, or --unit '%m/%d/%Y'" in capsys.readouterr().err


def test_names_of_two_columns_in_an_old_encoding(tmp_path):
    bars = read_eurusd()[:700]
    prices = {"Eröffnung": bars.open, "Hoch": bars.high, "Tief": bars.low, "Schluss": bars.close}
    times = dict(Datum=bars.datetime.dt.strftime("%d.%m.%Y"), Uhrzeit=bars.datetime.dt.strftime("%H:%M"))
    file = tmp_path / "kurse.csv"
    bars.assign(**times, **prices)[[*times, *prices]].to_csv(file, sep=";", decimal=",", index=False, encoding="cp1252")
    names = "datetime=Datum,Uhrzeit open=Eröffnung high=Hoch low=Tief close=Schluss volume=".split()
    options = [part for name in names for part in ("--columns", name)]
    assert run("bars", file, "--output", tmp_path / "out", "--horizons", "5", *options) == 0
    market = read_splits(tmp_path / "out", None, ("test",))["test"]
    assert market.datetimes[-1] == bars.datetime.iloc[-1] and market.market["close"][-1] == bars.close.iloc[-1]


def test_each_warning_is_printed_once_and_rolls_and_calendar_reach_the_report(tmp_path, capsys):
    bars = read_eurusd()[:1500]
    bars.loc[700:, ["open", "high", "low", "close"]] /= 4
    file = write_mt5(tmp_path / "EURUSD_H1_201701012200_201705010000.csv", bars)
    options = ("--output", tmp_path / "out", "--rolls", str(bars.datetime[900]), "--calendar")
    assert run("bars", file, *options, "XNYS") == 2 and not (tmp_path / "out").exists()
    assert run("bars", file, *options, "CMES") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    texts = [line.split(": ", 2)[-1] for line in lines if "large moves" in line]
    assert len(texts) == 1 and len(lines) == len(set(lines))
    assert any("1 bar is a roll" in line for line in lines) and any("sessions of CMES" in line for line in lines)


@pytest.mark.parametrize("command", ["check", "recut"])
def test_raw_bars_in_place_of_splits_point_to_the_command(export, tmp_path, capsys, command):
    output = ("--output", tmp_path / "out") if command == "recut" else ()
    file = closes_file(tmp_path, "EURUSD.csv", "close")
    file.write_text(file.read_text().replace("Date,", "datetime,"))
    assert run(command, file, *output) == 2 and "modelfactory bars" in capsys.readouterr().err
    if command == "check":
        assert run(command, export.parent) == 2 and "modelfactory bars" in capsys.readouterr().err
