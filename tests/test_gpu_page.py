"The page that compares CPU and GPU runs without a GPU, at its tiny size."

import contextlib
import io
import json
import logging
import warnings

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the page takes ten minutes: make gpu")
def test_the_gpu_page_runs_at_its_tiny_size_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "nbs/benchmarks/gpu.ipynb").read_text())["cells"]
    printed, namespace, level = io.StringIO(), dict(__name__="__main__"), logging.root.manager.disable
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            for cell in cells:
                if cell["cell_type"] == "code":
                    exec(compile("".join(cell["source"]), "gpu.ipynb", "exec"), namespace)
    finally:
        logging.disable(level)
    assert printed.getvalue().startswith("no GPU: tiny sizes on the CPU")
    assert (namespace["home"].times > 0).all() and not namespace["ON_GPU"]
