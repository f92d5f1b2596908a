"""Draws docs/comparison.png, the picture of the README, from the scores in docs/comparison.json.

python tools/picture.py         # draws the stored scores, in seconds
python tools/picture.py RUNS    # stores the scores of the runs of the grid `picture` in this folder, then draws them
"""

import json
import sys
from pathlib import Path

from modelfactory.figures.model_comparison import benchmark_scores, plot_benchmark
from modelfactory.figures.tear_sheet import figure_png
from modelfactory.words import count_text, list_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCORES = DOCS / "comparison.json"
DATA = "planted"
NOTE = "Preset quick. Networks read 16 bars and stop after 4 epochs without a lower validation loss."


def store_scores(runs):
    "Writes the scores of the runs in a folder."
    from modelfactory.runs.comparison import comparison

    SCORES.write_text(json.dumps(benchmark_scores(comparison(runs), DATA), indent=1) + "\n")


def seeds_note(tasks):
    "The number of seeds, and the models that have fewer."
    seeds = {m["model"]: len(m["seeds"]) for task in tasks for m in task["models"]}
    fewer = list_text(model for model, n in seeds.items() if n < max(seeds.values()))
    return f"{count_text(max(seeds.values()), 'seed')} for each model{fewer and f', fewer for {fewer}'}."


def draw():
    "Draws the stored scores."
    scores = json.loads(SCORES.read_text())
    figure = plot_benchmark(scores, DATA, f"{NOTE} {seeds_note(scores['tasks'])}")
    return figure_png(figure, colors=256, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    if sys.argv[1:]:
        store_scores(sys.argv[1])
    (DOCS / "comparison.png").write_bytes(draw())
