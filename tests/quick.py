"A small market and models of a few lines: runs for tests of how runs are executed, at half the cost of others."

import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd

from modelfactory.data.bundled import resolve_data
from modelfactory.data.market import MARKET_PRESETS, market_table, simulate_market
from modelfactory.data.writer import write_splits
from modelfactory.models.registry import ModelRegistry

ROWS = (300, 150, 150)  # bars of each symbol in train, val and test


@cache
def _table():
    return market_table(simulate_market(replace(MARKET_PRESETS["planted"], rows=ROWS, columns=24, symbols=2)), (5,))


def quick_models(folder):
    """Copies the plugin with the models `nearest` and `faulty` to a new folder; returns the path as text.

    A process registers the models of a file once, and each test forgets them when it ends, hence the copy."""
    return str(shutil.copy(Path(__file__).with_name("quick_models.py"), folder))


@contextmanager
def quick_plugin(folder):
    "The models `nearest` and `faulty` are registered while the context lasts: for fixtures of a whole module."
    models = dict(ModelRegistry._models)
    os.environ["MODELFACTORY_PLUGINS"] = quick_models(folder)
    try:
        yield
    finally:
        os.environ.pop("MODELFACTORY_PLUGINS", None)
        ModelRegistry._models.clear()
        ModelRegistry._models.update(models)


def small_splits(folder):
    "Writes splits of two symbols with prices and labels of 5 bars; returns the folder."
    extra = tuple(c for c in _table() if c.startswith("pub_"))
    return write_splits(_table(), folder, (5,), extra_features=extra)


def small_bundled(folder, names):
    "Writes the first bars of each symbol and split of bundled data sets, under their names; returns the folder."
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in resolve_data(name).iterdir():
            if file.suffix == ".parquet":
                pd.read_parquet(file).groupby("symbol").head(200).to_parquet(folder / name / file.name, index=False)
            else:
                shutil.copy(file, folder / name)
    return folder
