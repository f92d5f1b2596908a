"The picture of the README: its scores are complete and sorted, its lines are named, and a phone can show it."

import io
import json
import runpy

import pytest
from conftest import ROOT
from matplotlib import pyplot as plt
from PIL import Image

from modelfactory.figures.model_comparison import plot_benchmark

PHONE = 390  # pixels
TASKS = json.loads((ROOT / "docs/comparison.json").read_text())["tasks"]


@pytest.fixture
def figure():
    yield plot_benchmark(dict(tasks=TASKS), "planted", "a note")
    plt.close("all")


def test_each_row_has_a_score_and_rows_are_sorted():
    for task in TASKS:
        assert all(m["log_loss_ci_low"] < m["log_loss"] < m["log_loss_ci_high"] for m in task["models"])
        scores = [(m["averaged"] or m)["log_loss"] for m in task["models"]]
        assert scores == sorted(scores) and len(scores) > 20
        assert task["ceiling"]["log_loss"]["ceiling"] < scores[0]


def test_the_lines_are_named_with_their_values(figure):
    for ax, task in zip(figure.axes, TASKS, strict=True):
        bounds = task["ceiling"]["log_loss"]["ceiling"], task["baselines"][0]["log_loss"]
        names = [f"{name} {value:.3f}" for name, value in zip(("Bayes optimum", "no skill"), bounds, strict=True)]
        assert [text.get_text() for text in ax.texts] == names
        assert len(ax.get_yticklabels()) == len(task["models"])


def test_the_smallest_text_can_be_read_on_a_phone(figure):
    scale = PHONE / (figure.get_figwidth() * 72)  # pixels per point
    for ax in figure.axes:
        texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts, ax.xaxis.label, ax.title]
        assert min(text.get_fontsize() for text in texts) * scale >= 9


def test_the_picture_is_drawn_from_the_stored_scores():
    drawn = runpy.run_path(str(ROOT / "tools/picture.py"))["draw"]()
    sizes = [Image.open(source).size for source in (io.BytesIO(drawn), ROOT / "docs/comparison.png")]
    assert abs(sizes[0][0] - sizes[1][0]) <= 20 and abs(sizes[0][1] - sizes[1][1]) <= 20, "run `make picture`"
