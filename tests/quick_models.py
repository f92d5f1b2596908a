"""Models of a few lines for tests of whole runs: a plugin, read by each process that trains.

A run of `nearest` costs half of a run of a scikit-learn model, which imports all of scikit-learn to write its file."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np

from modelfactory.models.callbacks import run_callbacks
from modelfactory.models.registry import ModelRegistry
from modelfactory.models.tabular import TabularConfig, TabularModel


@ModelRegistry.register("nearest", family="examples")
class Nearest(TabularModel):
    "The class whose mean is nearest is the most likely."

    Config = TabularConfig

    def fit_rows(self, train, val):
        self.means = np.stack([train.X[train.y == k].mean(0) for k in range(len(self.classes))])
        return {}

    def predict_rows(self, X):
        return np.exp(-((X[:, None] - self.means) ** 2).mean(2).clip(max=50)) + 1e-12

    def write(self, folder):
        np.savez(folder / "means.npz", means=self.means)

    def read(self, folder):
        with np.load(folder / "means.npz") as saved:
            self.means = saved["means"]


@dataclass
class FaultyConfig(TabularConfig):
    fault: str = ""
    flag: str = ""


@ModelRegistry.register("faulty", family="examples")
class Faulty(Nearest):
    "A model whose fit fails in the way that its config sets."

    Config = FaultyConfig

    def fit(self, *args, **kw):
        fault, flag = self.config.fault, self.config.flag
        if fault == "hang":
            time.sleep(3600)
        if fault == "rounds":
            self._fit_rounds(flag)
        if fault == "grow":
            kept = []
            while True:
                kept.append(np.ones(4_000_000))
                time.sleep(0.02)
        if fault == "kill kernel":
            if flag:
                with open(flag, "w") as f:
                    f.write(os.environ["CUDA_VISIBLE_DEVICES"])
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "children":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
            if flag:
                open(flag, "w").close()
            time.sleep(3600)
        if fault == "poison" or fault == "once" and not os.path.exists(flag):
            if flag:
                open(flag, "w").close()
            import psutil

            worker = psutil.Process(os.getppid()).parent()  # kernel -> run -> worker
            if "ray::" in " ".join(worker.cmdline()):
                worker.kill()  # otherwise the worker has ended already
            time.sleep(3600)  # a fit of milliseconds would be published before the run ends with its worker
        return super().fit(*args, **kw)

    def _fit_rounds(self, flag):
        "Reports a round every 0.2 s until the file `flag` exists, at most 150 rounds."
        run_callbacks(self, "on_fit_start", 150)
        for number in range(150):
            run_callbacks(self, "on_epoch_end", number, dict(val_loss=1.1))
            if os.path.exists(flag):
                break
            time.sleep(0.2)
        run_callbacks(self, "on_fit_end", dict(val_loss=[1.1] * (number + 1)))


@ModelRegistry.register("faulty_once", family="examples")
class FaultyOnce(Faulty):
    "The same model under another name, for a grid with two faults."
