"The comparison as one dictionary: its schema, and every branch of every sentence made from it."

import itertools
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from fabricate import bars, make_run, probabilities

from modelfactory.cli import main
from modelfactory.runs import compare, report
from modelfactory.runs.comparison import comparison, read_comparison
from modelfactory.runs.report import (
    best_per_horizon,
    best_verdict,
    direction_tests,
    fraction_of_ceiling,
    leaderboard,
    leaderboard_table,
    verdict_table,
)
from modelfactory.runs.run import list_runs, load_run
from modelfactory.runs.run_folder import RunError
from modelfactory.runs.sentences import (
    comparison_notes,
    conclusion,
    control_sentences,
    describe,
    summary_sentences,
    task_notes,
)

pytestmark = pytest.mark.slow

TASK_KEYS = {
    "data",
    "horizon",
    "n_models",
    "n_samples",
    "trials",
    "p_direction",
    "direction_significant",
    "p_log_loss",
    "log_loss_significant",
    "p_profit",
    "profit_significant",
    "best",
    "not_worse",
    "models",
    "baselines",
    "why",
    "controls",
    "groups",
}
MODEL_KEYS = {
    "model",
    "family",
    "seeds",
    "runs",
    "folds",
    "epochs",
    "n_samples",
    "direction_significant",
    "directional_skill",
    "directional_accuracy",
    "log_loss",
    "f1_macro",
    "sharpe_net",
}
PLAIN = re.compile(r"nan|None|\binf\b|\[\]|\{|\}|  |\( |,\s*\)|\(\)")


def checked(sentences):
    "Returns the sentences; fails on a Python value in one, or on other than one full stop at its end."
    for s in sentences:
        assert not PLAIN.search(s), s
        assert s.endswith(".") and not s.endswith(".."), s
    return sentences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Six models without skill on labels with class shares 60/40/0, and one run that cannot be read."
    runs = tmp_path_factory.mktemp("runs")
    table = bars(shares=(40, 0, 60), n=600)
    for i in range(6):
        make_run(runs, f"model_{i}", table, noise=i)
    (runs / "broken").mkdir()
    (runs / "broken/manifest.json").write_text("{")
    return runs


@pytest.fixture(scope="module")
def result(folder):
    return comparison(folder)


def test_the_dictionary_has_the_keys_of_schema_1(result):
    assert result["schema"] == 1 and {"tasks", "excluded", "failed", "unread"} <= set(result)
    (task,) = result["tasks"]
    assert TASK_KEYS <= set(task) and all(MODEL_KEYS <= set(m) for m in task["models"])
    assert task["n_models"] == 6 == len(task["models"]) and task["trials"] == 6
    ends = [
        f"{m}_ci_{end}" for m in ("directional_skill", "log_loss", "f1_macro", "sharpe_net") for end in ("low", "high")
    ]
    assert all(end in m for m in task["models"] for end in ends)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {"data", "role", "reason", "count"} <= set(result["excluded"][0])


def test_class_shares_60_40_0_give_no_claim_of_direction(result):
    sentences, (task,) = checked(summary_sentences(result)), result["tasks"]
    text = "no model differs significantly from the better constant prediction"
    assert any(text in s and "always up would be right 60% of the time" in s for s in sentences)
    assert not task["direction_significant"] and not any(m["direction_significant"] for m in task["models"])


def test_a_folder_that_cannot_be_read_does_not_end_the_comparison(folder, result, tmp_path):
    assert [row["folder"] for row in result["unread"]] == ["broken"] and "not readable" in result["unread"][0]["reason"]
    runs = shutil.copytree(folder, tmp_path / "runs")
    victims = [r.path for r in list_runs(runs)]
    (victims[0] / "metrics/metrics.json").write_text("[")
    (victims[1] / "predictions/val_predictions.parquet").write_bytes(b"PAR1")
    (victims[2] / "manifest.json").write_text('{"files": {}}')
    (victims[3] / "manifest.json").unlink()
    again = comparison(runs)
    assert {row["folder"] for row in again["unread"]} == {"broken", *(v.name for v in victims[:4])}
    assert len(again["tasks"][0]["models"]) == 2
    assert all(row["reason"] for row in again["unread"])
    assert any("5 folders are not readable as runs and are excluded" in s for s in checked(comparison_notes(again)))


def test_a_folder_of_unreadable_runs_gives_a_comparison_without_tasks(tmp_path):
    run = make_run(tmp_path, "model_0", bars(n=60))
    (run.path / "metrics/baselines.json").unlink()
    result = comparison(tmp_path)
    assert result["tasks"] == [] and len(result["unread"]) == 1
    for f in (summary_sentences, direction_tests, best_per_horizon, verdict_table, fraction_of_ceiling):
        f(result)
    leaderboard_table(leaderboard(result))


def test_tables_and_sentences_need_only_the_dictionary(folder, result, tmp_path):
    "A stored comparison gives the same tables and sentences without the runs."
    file = tmp_path / "c.json"
    file.write_text(json.dumps(result))
    stored = read_comparison(file)
    for f in (
        summary_sentences,
        direction_tests,
        best_per_horizon,
        lambda r: leaderboard_table(leaderboard(r)).page,
        lambda r: str(verdict_table(r)),
    ):
        a, b = f(result), f(stored)
        assert a.equals(b) if isinstance(a, pd.DataFrame) else a == b
    file.write_text(json.dumps(dict(schema=2)))
    with pytest.raises(RunError, match="schema 2, expected 1"):
        read_comparison(file)


def test_the_command_prints_only_json(folder, tmp_path, capsys):
    runs = shutil.copytree(folder, tmp_path / "runs")
    with pytest.raises(SystemExit) as end:
        main(["compare", str(runs), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and printed["tasks"][0]["n_models"] == 6
    assert printed == read_comparison(runs / compare.COMPARISON_FILE)
    assert not (runs / "model_comparison.html").exists()


def test_an_empty_folder_is_a_one_line_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path), "--json"])
    assert end.value.code == 2 and "no finished run" in capsys.readouterr().err


# every branch of every sentence


def a_model(name="a", significant=False, skill=0.01, verdict="not significant", **more):
    return (
        dict(
            model=name,
            family="examples",
            seeds=[42],
            runs=[name],
            direction=f"Directional skill of {name}.",
            verdict=verdict,
            direction_significant=significant,
            directional_skill=skill,
            directional_skill_ci_low=None if skill is None else skill - 0.02,
            directional_skill_ci_high=None if skill is None else skill + 0.02,
            directional_accuracy=0.6,
            directional_accuracy_constant=0.69,
            constant_class=1,
            log_loss=1.0,
            averaged=None,
            sharpe_net=-0.5,
            fraction_of_ceiling=dict(directional_accuracy=0.7),
            rank=1,
        )
        | more
    )


def a_task(models, **more):
    return (
        dict(
            data="bars",
            horizon=20,
            n_models=len(models),
            n_samples=500,
            n_left_out=0,
            trials=12,
            p_direction=0.4,
            direction_significant=False,
            p_log_loss=0.4,
            log_loss_significant=False,
            p_profit=0.4,
            p_profit_cash=0.3,
            p_profit_hold=0.4,
            p_profit_constant=0.2,
            profit_significant=False,
            best=models[0]["model"],
            not_worse=None if len(models) < 2 else [m["model"] for m in models[1:]],
            best_sharpe_model="a",
            sharpe_net=-0.5,
            deflated_sharpe=0.2,
            overfitting=0.6,
            why={},
            models=models,
            versions=1,
            earlier_scoring=[],
            ceiling=None,
            variance=[],
            baselines=[dict(model="prior", family="baseline", log_loss=1.1)],
        )
        | more
    )


MODELS = dict(
    one=[a_model()],
    two=[a_model(), a_model("b")],
    six=[a_model(n) for n in "abcdef"],
    first=[a_model(significant=True, verdict="significant"), a_model("b")],
    other=[a_model(), a_model("b", True, 0.05, "significant")],
    all=[a_model(n, True, 0.05, "significant") for n in "abc"],
    alone=[a_model(significant=True, verdict="significant")],
    negative=[a_model(skill=-0.1, verdict="worse"), a_model("b", skill=-0.2, verdict="worse")],
    nothing=[a_model(n, False, None, "too few rows", directional_accuracy=None) for n in "ab"],
    undirected=[
        a_model(
            n,
            False,
            None,
            "no direction",
            directional_accuracy=None,
            directional_accuracy_constant=None,
            constant_class=0,
        )
        for n in "ab"
    ],
)
DIRECTION = dict(
    none=dict(
        p_direction=None,
        why=dict(
            direction="too few rows to say: 3 blocks, at least 8 are needed (a block is four label lengths long)",
        ),
    ),
    no=dict(),
    yes=dict(p_direction=0.0004, direction_significant=True),
)
LOG_LOSS = dict(
    none=dict(p_log_loss=None),
    no=dict(),
    yes=dict(p_log_loss=0.01, log_loss_significant=True),
    alone=dict(p_log_loss=0.01, log_loss_significant=True, not_worse=[]),
)
PROFIT = dict(
    none=dict(p_profit=None, sharpe_net=None, best_sharpe_model=None),
    prices=dict(p_profit=None, why=dict(profit="no prices: labels alone give no Sharpe ratio")),
    old=dict(p_profit=None, why=dict(profit="scored by an earlier version: run `modelfactory rescore`")),
    no=dict(),
    yes=dict(p_profit=0.01, p_profit_cash=0.01, p_profit_hold=0.01, p_profit_constant=0.01, profit_significant=True),
    bare=dict(deflated_sharpe=None, overfitting=None),
    gone=dict(sharpe_net=None),
)


@pytest.mark.parametrize("models", MODELS)
def test_every_combination_of_claims_gives_readable_sentences(models):
    for direction, log_loss, profit in itertools.product(DIRECTION.values(), LOG_LOSS.values(), PROFIT.values()):
        why = direction.get("why", {}) | profit.get("why", {})
        task = a_task(MODELS[models], **direction | log_loss | profit | dict(why=why))
        sentences = checked(describe(task))
        assert len(sentences) == 3 and all(s.startswith("bars, horizon 20: ") for s in sentences)
        assert best_verdict(task)


@pytest.mark.parametrize(
    "models, text",
    [
        ("one", "no model differs significantly"),
        ("first", "a has directional skill"),
        ("other", "only b has directional skill"),
        ("all", "a has directional skill"),
        ("alone", "a has directional skill"),
        ("negative", "no model is better than the better constant prediction"),
        ("nothing", "too few rows to test"),
        ("undirected", "no direction in these classes"),
    ],
)
def test_the_verdict_beside_the_best_by_log_loss(models, text):
    "`other` once raised a TypeError: another model than the best by log loss is significant."
    task = a_task(MODELS[models])
    assert text in best_verdict(task)
    assert text in best_per_horizon(dict(tasks=[task])).verdict.item()


def test_the_verdict_names_all_other_models_with_skill():
    both = a_task([a_model(), a_model("b", True), a_model("c", True)])
    assert best_verdict(both) == "only b, c have directional skill"


@pytest.mark.parametrize(
    "task, texts",
    [
        (
            a_task(MODELS["six"]),
            [
                "no model differs significantly from the better constant prediction "
                "(always up would be right 69% of the time, p = 0.400, corrected for 12 trials)"
            ],
        ),
        (
            a_task(MODELS["other"], p_direction=0.0001, direction_significant=True),
            ["1 of 2 models has directional skill (b, p < .001, corrected for 12 trials)"],
        ),
        (a_task(MODELS["all"], direction_significant=True, p_direction=0.01), ["3 of 3 models have directional skill"]),
        (
            a_task(MODELS["two"], direction_significant=True, p_direction=0.01),
            ["at least one of 2 models has directional skill", ", but none is significant alone."],
        ),
        (
            a_task([a_model(constant_class=-1, directional_accuracy_constant=0.6), a_model("b", skill=-1.0)]),
            ["always down would be right 60% of the time"],
        ),
        (a_task(MODELS["two"], p_profit=None, why=dict(profit="no prices")), ["net profit is not tested: no prices"]),
        (a_task(MODELS["two"], **LOG_LOSS["yes"]), ["1 other model is not significantly worse (b)"]),
        (a_task(MODELS["six"], **LOG_LOSS["yes"]), ["5 other models are not significantly worse"]),
        (a_task(MODELS["two"], **LOG_LOSS["alone"]), ["; every other model is significantly worse."]),
        (
            a_task(MODELS["one"], trials=1),
            [
                "the log loss of a is not significantly better than that of the training class shares "
                "(p = 0.400, corrected for 1 trial)"
            ],
        ),
        (
            a_task(MODELS["two"], p_profit_cash=0.01),
            ["better than that of buy-and-hold of the same symbols or its own mean position"],
        ),
        (
            a_task(MODELS["two"], p_profit=0.06, p_profit_cash=0.01, p_profit_hold=0.02, p_profit_constant=0.03),
            [
                "better than that of not trading, buy-and-hold of the same symbols and its own mean position "
                "at once (p = 0.060"
            ],
        ),
        (
            a_task(MODELS["two"]),
            ["the best net Sharpe ratio is -0.5 (a)", "probability of backtest overfitting of 60%"],
        ),
        (
            a_task(MODELS["one"], **PROFIT["yes"]),
            [
                "the net profit of a is significantly better than that of not trading, "
                "buy-and-hold of the same symbols and its own mean position"
            ],
        ),
    ],
)
def test_the_text_of_each_claim(task, texts):
    sentences = " ".join(describe(task))
    for text in texts:
        assert text in sentences, sentences


@pytest.mark.parametrize("models", MODELS)
def test_the_conclusion_of_each_kind_of_data(models):
    ceiling = dict(directional_accuracy=dict(null_score=0.5, one_row_policy=0.6, ceiling=0.7))
    without_fraction = [m | dict(fraction_of_ceiling=dict(directional_accuracy=None)) for m in MODELS[models]]
    no_gap = dict(directional_accuracy=dict(null_score=0.7, one_row_policy=0.7, ceiling=0.7))
    tasks = [
        a_task(MODELS[models]),
        a_task(MODELS[models], horizon=5),
        a_task(MODELS[models], data="planted", ceiling=ceiling),
        a_task(without_fraction, data="null", ceiling=no_gap),
    ]
    sentences = checked(conclusion(dict(tasks=tasks)))
    assert [s.split(":")[0] for s in sentences] == ["planted", "null", "bars"]
    skilled = any(m["direction_significant"] for m in MODELS[models])
    assert ("false positive" in sentences[1]) == skilled
    no_claim = ("differs significantly", "is better than", "not tested")
    assert any(text in sentences[2] for text in no_claim) != skilled
    assert ("at 2 horizons" in sentences[2]) == (models not in ("nothing", "undirected"))


@pytest.mark.parametrize("data, ceiling", [("bars", None), ("null", 0.5), ("planted", 0.7)])
def test_skill_that_no_single_model_has_is_called_the_same_everywhere(data, ceiling):
    "The conclusion, the sentence of the task and its verdict name models that are significant only together."
    from modelfactory.runs.sentences import NONE_ALONE, task_verdicts

    bound = dict(directional_accuracy=dict(null_score=0.5, one_row_policy=0.5, ceiling=ceiling))
    market = dict(data=data, ceiling=bound if ceiling else None)
    joint = a_task(MODELS["two"], direction_significant=True, p_direction=0.01, **market)
    other = a_task(MODELS["two"], horizon=joint["horizon"] + 1, **market)
    for tasks, where in (([joint], ""), ([joint, other], f" at horizon {joint['horizon']}")):
        [sentence] = conclusion(dict(tasks=tasks))
        assert f"at least one of 2 models has directional skill{where}, but {NONE_ALONE}" in sentence
        assert ("false positive" in sentence) == (data == "null")
    texts = describe(joint)[0], task_verdicts(joint)["direction"]
    assert all("at least one of 2 models" in text and f", but {NONE_ALONE}" in text for text in texts)


def a_task_with_controls(beaten, models=("dlinear", "logistic_regression"), missing=()):
    "A task with networks; `beaten` holds the controls that each network beats."
    tests = [dict(model=m, control=c, difference=0.1, p=0.2, beats=c in beaten[m]) for m in beaten for c in models]
    controls = dict(models=list(models), missing=list(missing), networks=list(beaten), tests=tests if models else None)
    return a_task(MODELS["two"], controls=controls)


BOTH = ("dlinear", "logistic_regression")


@pytest.mark.parametrize(
    "task, text",
    [
        (a_task_with_controls({}), None),
        (a_task_with_controls({}, (), BOTH), None),
        (
            a_task_with_controls(dict(gru=()), (), BOTH),
            "no control was trained; train dlinear and logistic_regression to test whether gru beats a linear model.",
        ),
        (a_task_with_controls(dict(gru=(), tcn=()), (), BOTH), "test whether the 2 networks beat a linear model."),
        (
            a_task_with_controls(dict(gru=()), ("dlinear",), ("logistic_regression",)),
            "gru does not significantly beat dlinear (paired test of log loss); the control logistic_regression was",
        ),
        (a_task_with_controls(dict(gru=BOTH)), "gru significantly beats dlinear and logistic_regression (paired"),
        (a_task_with_controls(dict(gru=BOTH, tcn=BOTH)), "each of 2 networks significantly beats dlinear and logistic"),
        (
            a_task_with_controls(dict(gru=BOTH, tcn=())),
            "1 of 2 networks does not significantly beat dlinear or logistic_regression "
            "(paired test of log loss, corrected for 4 comparisons): tcn.",
        ),
        (
            a_task_with_controls(dict(gru=(), tcn=(), mlp=BOTH)),
            "2 of 3 networks do not significantly beat dlinear or l",
        ),
        (
            a_task_with_controls(dict(gru=(), tcn=("dlinear",), mlp=(), lstm=BOTH)),
            "3 of 4 networks do not significantly beat both dlinear and logistic_regression (paired test of log loss, "
            "corrected for 8 comparisons): gru and mlp do not significantly beat dlinear or logistic_regression; "
            "tcn does not significantly beat logistic_regression.",
        ),
    ],
)
def test_networks_that_do_not_beat_the_controls_are_named(task, text):
    sentences = checked(control_sentences(task))
    assert len(sentences) == (text is not None) and all(text in s for s in sentences)


def test_networks_are_tested_against_the_controls_that_ran(tmp_path):
    table = bars(n=600)
    skills = dict(dlinear=0.2, gru=1.0, tcn=0.2, lightgbm=1.0)
    for model, skill in skills.items():
        make_run(tmp_path, model, table, skill=skill)
    result = comparison(tmp_path)
    controls, (sentence,) = result["tasks"][0]["controls"], control_sentences(result["tasks"][0])
    assert controls["models"] == ["dlinear"] and controls["missing"] == ["logistic_regression"]
    assert {t["model"]: t["beats"] for t in controls["tests"]} == dict(gru=True, tcn=False)
    assert "1 of 2 networks does not significantly beat dlinear" in sentence and sentence in summary_sentences(result)
    groups = result["tasks"][0]["groups"]
    assert {frozenset(g) for g in groups} == {frozenset(("gru", "lightgbm")), frozenset(("dlinear", "tcn"))}


def test_networks_are_not_tested_on_too_few_rows(tmp_path):
    for model in ("dlinear", "gru"):
        make_run(tmp_path, model, bars(n=60), n_boot=0)
    (task,) = comparison(tmp_path)["tasks"]
    assert task["groups"] is None and task["controls"]["tests"] is None
    assert "of the controls is not tested: too few rows" in checked(control_sentences(task))[0]


def test_notes_on_a_task():
    lstm = a_model("lstm", seeds=[1, 2, 3], log_loss=1.0, log_loss_min=0.99, log_loss_max=1.02)
    task = a_task([lstm, a_model("gru", log_loss=1.003)], versions=2, earlier_scoring=["x", "y"], n_left_out=53)
    notes = checked(task_notes(task))
    assert len(notes) == 4 and "run `modelfactory rescore`" in notes[1]
    assert "53 rows are excluded because not every model predicted them" in notes[2]
    assert "lstm: 0.0300 between 3 seeds, 0.0030 to gru" in notes[3]
    assert task_notes(a_task([lstm | dict(log_loss_max=0.991), a_model("gru", log_loss=1.1)])) == []
    notes = checked(task_notes(a_task([a_model()], n_left_out=1, earlier_scoring=["x"])))
    assert "1 row is excluded because not every model predicted it" in notes[1]


def test_early_stopping_is_one_sentence(monkeypatch, folder):
    from modelfactory.training import trainer

    monkeypatch.setattr(trainer, "early_stopping_note", lambda config: "Early stopping saw val.", raising=False)
    sentences = [s for s in summary_sentences(comparison(folder)) if "Early stopping" in s]
    assert sentences == ["Early stopping saw val. Models: model_0, model_1, model_2, model_3, model_4, model_5."]


# runs that differ


def test_classes_without_direction_are_compared_by_log_loss(tmp_path):
    table = bars(n=300).assign(y_true=lambda t: t.y_true + 1)
    for name in ("a", "b"):
        make_run(tmp_path, name, table, classes=(0, 1, 2), skill=0.8 * (name == "a"))
    (task,) = comparison(tmp_path)["tasks"]
    assert task["p_direction"] is None and "direction" in task["why"]
    assert task["best"] == "a" and task["log_loss_significant"]
    assert "no direction" in describe(task)[0] and "net profit is not tested" in describe(task)[2]
    checked(describe(task))


def test_few_bars_are_too_few_for_a_test(tmp_path):
    make_run(tmp_path, "a", bars(n=40, symbols=("A",)))
    result = comparison(tmp_path)
    sentences = checked(summary_sentences(result))
    assert "too few rows" in sentences[0] and not result["tasks"][0]["direction_significant"]


def test_models_scored_on_different_rows_are_compared_on_their_common_rows(tmp_path):
    "Without the data folder, class metrics are computed on the common rows, and those that need prices are undefined."
    table = bars(n=300)
    make_run(tmp_path, "long", table, skill=0.5)
    make_run(tmp_path, "short", table.groupby("symbol").tail(270), skill=0.5)
    (task,) = comparison(tmp_path)["tasks"]
    assert task["n_left_out"] == 60 and task["n_samples"] == 540 == task["models"][0]["n_samples"]
    entry = next(m for m in task["models"] if m["model"] == "long")
    frame = load_run(tmp_path / entry["runs"][0]).predictions().groupby("symbol").tail(270)
    column = dict(zip((-1, 0, 1), ("p_down", "p_flat", "p_up"), strict=True))
    loss = -np.log([row[column[row["y_true"]]] for _, row in frame.iterrows()]).mean()
    assert math.isclose(entry["log_loss"], loss, rel_tol=1e-5) and entry["log_loss_ci_low"] < loss
    assert entry["sharpe_net"] is None
    assert "60 rows are excluded because not every model predicted them" in " ".join(checked(task_notes(task)))
    assert "no prices" in task["why"]["profit"]


def test_runs_of_an_earlier_scoring_version_load_and_are_reported(tmp_path):
    run = make_run(tmp_path, "old", bars(), scoring=1)
    values = json.loads((run.path / "metrics/metrics.json").read_text())
    former = values | dict(f1_floor=0.31, f1_floor_ci_low=0.3, f1_above_floor=0.02, directional_accuracy_p_shift=0.4)
    (run.path / "metrics/metrics.json").write_text(json.dumps(former))
    old = load_run(run.path)
    assert old.scoring == 1 and old.metrics["f1_skill"] == 0.02
    assert old.metrics["f1_null"] == 0.31 and old.metrics["f1_null_ci_low"] == 0.3
    assert not {"f1_floor", "f1_above_floor", "directional_accuracy_p_shift"} & set(old.metrics)
    result = comparison(tmp_path)
    assert result["tasks"][0]["earlier_scoring"] == [run.path.name]
    sentences = checked(summary_sentences(result))
    assert any("1 run was scored by an earlier version" in s for s in sentences)
    text = "net profit is not tested: scored by an earlier version: run `modelfactory rescore`"
    assert any(text in s for s in sentences)


def test_a_run_shows_its_claim(tmp_path):
    run = make_run(tmp_path, "a", bars(), skill=1.0)
    assert "as the only model tried" in repr(run) and "Directional skill" in repr(run)
    make_run(tmp_path, "b", bars())
    assert "corrected for 2 trials" in repr(load_run(run.path))


def test_a_claim_needs_the_test_of_all_models_together(tmp_path, monkeypatch):
    from modelfactory.evaluation import significance

    make_run(tmp_path, "a", bars(), skill=1.0)
    summary_of = significance.significance_summary

    def denied(*args, **kw):
        summary = summary_of(*args, **kw)
        rows = {m: row | dict(direction_significant=False) for m, row in summary["models"].items()}
        return summary | dict(direction_significant=False, p_direction=0.2, models=rows)

    monkeypatch.setattr(significance, "significance_summary", denied)
    model = comparison(tmp_path)["tasks"][0]["models"][0]
    assert not model["direction_significant"] and model["verdict"] == "not significant"
    assert "does not confirm it" in model["direction"]


def test_a_bundle_is_not_compared(tmp_path):
    run = make_run(tmp_path, "a", bars())
    bundle = shutil.copytree(run.path, tmp_path / f"{run.path.name}_bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | dict(bundle_of=run.path.name, claim="Its claim.")))
    assert [r.path for r in list_runs(tmp_path)] == [run.path] and "Its claim" in repr(load_run(bundle))


def test_the_fabricated_probabilities_have_skill_only_on_request():
    table = bars(n=2000)

    def accuracy(skill):
        return (probabilities(table, skill).argmax(1) - 1 == table.y_true).mean()

    assert abs(accuracy(0.0) - 1 / 3) < 0.03 and accuracy(1.0) > 0.6


def test_the_number_of_models_that_are_not_worse_is_counted_without_the_best():
    models = MODELS["six"]
    counts = {None: "–", (): 0, ("b",): 1, ("b", "c"): 2, ("a", "b"): 1}
    for names, expected in counts.items():
        task = a_task(models, n_blocks=9, not_worse=None if names is None else list(names))
        assert verdict_table(dict(tasks=[task])).frame.not_worse.item() == expected


def test_runs_on_another_version_of_the_data_without_common_rows_are_excluded(tmp_path):
    old = make_run(tmp_path, "old", bars(n=300, symbols=("C",)), fingerprint="0" * 16)
    make_run(tmp_path, "a", bars(n=300))
    make_run(tmp_path, "b", bars(n=300), noise=1)
    set_created(old, "2024-01-01T00:00:00+00:00")
    result = comparison(tmp_path)
    (task,) = result["tasks"]
    (unread,) = result["unread"]
    assert sorted(m["model"] for m in task["models"]) == ["a", "b"] and task["n_left_out"] == 0
    assert unread["folder"] == old.path.name and "another version" in unread["reason"]


def set_created(run, when):
    file = run.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(created=when)))


def test_runs_with_other_classes_are_excluded(tmp_path):
    old = make_run(tmp_path, "old", bars(n=300, shares=(1, 1)).assign(y_true=lambda t: t.y_true + 1), classes=(0, 1))
    make_run(tmp_path, "new", bars(n=300))
    set_created(old, "2024-01-01T00:00:00+00:00")
    result = comparison(tmp_path)
    assert [m["model"] for m in result["tasks"][0]["models"]] == ["new"]
    assert "classes [0, 1]" in result["unread"][0]["reason"]


def edit_json(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def without(*names):
    return lambda values: {k: v for k, v in values.items() if k not in names}


DAMAGE = dict(
    config=lambda path: (path / "config.yaml").write_text("{}"),
    metrics=lambda path: (path / "metrics/metrics.json").write_text("[]"),
    loss=lambda path: edit_json(path / "metrics/metrics.json", without("log_loss")),
    baselines=lambda path: (path / "metrics/baselines.json").write_text("[]"),
    baseline=lambda path: (path / "metrics/baselines.json").write_text('{"prior": 1}'),
    prior=lambda path: edit_json(path / "metrics/baselines.json", without("prior")),
    family=lambda path: edit_json(path / "manifest.json", without("family")),
    shares=lambda path: edit_json(path / "manifest.json", without("train_shares")),
    column=lambda path: pd.read_parquet(path / PREDICTIONS).drop(columns="p_up").to_parquet(path / PREDICTIONS),
)
PREDICTIONS = "predictions/val_predictions.parquet"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("older", [False, True])
def test_a_damaged_run_is_excluded_with_a_reason(tmp_path, damage, older):
    "Where the newest run of a model is damaged, the one before it is compared."
    table = bars(n=200)
    make_run(tmp_path, "a", table)
    if older:
        set_created(make_run(tmp_path, "b", table), "2024-01-01T00:00:00+00:00")
    damaged = make_run(tmp_path, "b", table)
    set_created(damaged, "2099-01-01T00:00:00+00:00")
    DAMAGE[damage](damaged.path)
    result = comparison(tmp_path)
    assert {m["model"] for m in result["tasks"][0]["models"]} == ({"a", "b"} if older else {"a"})
    assert [row["folder"] for row in result["unread"]] == [damaged.path.name] and result["unread"][0]["reason"]
    checked(summary_sentences(result))


def test_a_folder_without_permission_is_listed_as_unread(tmp_path, monkeypatch):
    from modelfactory.runs import stored

    run, listed = make_run(tmp_path, "a", bars(n=60)), stored._listed
    (tmp_path / "closed").mkdir()

    def denied(path, *args):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path, *args)

    monkeypatch.setattr(stored, "_listed", denied)
    runs = list_runs(tmp_path)
    assert [r.path for r in runs] == [run.path] and "Permission denied" in runs.unread[0]["reason"]


def test_class_metrics_are_computed_without_prices(tmp_path, monkeypatch):
    from modelfactory.data.splits import MissingFile

    table = bars(n=300)
    make_run(tmp_path, "long", table)
    make_run(tmp_path, "short", table.groupby("symbol").tail(270))

    def missing_prices(*args, **kw):
        raise MissingFile("prices.parquet: no such file")

    monkeypatch.setattr("modelfactory.runs.comparison.scoring_trainer", lambda run: object())
    monkeypatch.setattr("modelfactory.runs.comparison.score_with_data", missing_prices)
    (task,) = comparison(tmp_path)["tasks"]
    assert task["n_left_out"] == 60 and "prices.parquet: no such file" in task["why"]["profit"]
    assert all(m["log_loss"] and m["sharpe_net"] is None for m in task["models"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_two_models_at_one_time_have_no_plot_of_differences(tmp_path, n):
    from modelfactory.runs.task import plot_task_differences, read_task

    table = bars(n=n, symbols=tuple("ABCDEFGH"))
    for name in "ab":
        make_run(tmp_path, name, table, prices=False)
    figure = plot_task_differences(read_task(list_runs(tmp_path), "bars", 5))
    assert n > 1 or figure is None
    checked(summary_sentences(comparison(tmp_path)))


def test_significantly_worse_models_are_not_reported_as_equal():
    worse = a_task(MODELS["negative"])
    for text in (describe(worse)[0], best_verdict(worse), conclusion(dict(tasks=[worse]))[0]):
        assert "is better than the better constant prediction" in text and "differs significantly" not in text
    assert "differs significantly" in conclusion(dict(tasks=[a_task(MODELS["two"])]))[0]


def test_models_at_two_horizons_are_counted_once():
    tasks = [a_task(MODELS["six"], horizon=h) for h in (5, 20)]
    assert "none of 6 models at 2 horizons" in conclusion(dict(tasks=tasks))[0]
    tasks = [a_task(MODELS["alone"], horizon=h) for h in (5, 20)]
    assert "1 of 1 model at 2 horizons has directional skill" in conclusion(dict(tasks=tasks))[0]


def test_a_task_without_a_ceiling_adds_no_claim_to_a_simulated_market():
    ceiling = dict(directional_accuracy=dict(null_score=0.7, one_row_policy=0.7, ceiling=0.7))
    tasks = [a_task(MODELS["two"], data="null", ceiling=ceiling), a_task(MODELS["alone"], data="null", horizon=5)]
    assert "none of 2 models has significant directional skill" in conclusion(dict(tasks=tasks))[0]


def test_an_undefined_number_is_a_dash(tmp_path):
    run = make_run(tmp_path, "a", bars(n=100), prices=False)
    assert "net Sharpe ratio –)" in repr(run)
    row = dict(
        data="d",
        horizon=5,
        model="a",
        metric="f1_macro",
        score=math.nan,
        null_score=math.nan,
        one_row_policy=0.4,
        ceiling=0.5,
        of_one_row_policy=math.nan,
        of_ceiling=math.nan,
    )
    assert "nan" not in str(report.ceiling_table(pd.DataFrame([row])).frame[["f1_macro"]].dropna())
    from modelfactory.figures.model_comparison import _sharpe
    from modelfactory.runs.task import read_task

    assert _sharpe(read_task(list_runs(tmp_path), "bars", 5), "a") == "–"


def test_the_command_line_lists_runs_and_whether_they_are_scored(tmp_path, capsys):
    make_run(tmp_path, "a", bars())
    unscored = make_run(tmp_path, "b", bars()).path / "manifest.json"
    unscored.write_text(json.dumps(json.loads(unscored.read_text()) | dict(scored=False, reason="the disk was full")))
    with pytest.raises(SystemExit, match="0"):
        main(["runs", str(tmp_path)])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in listed[1:]] == ["yes", "full"] and "no: the disk was full" in listed[2]
