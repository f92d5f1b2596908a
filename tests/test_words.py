"""Generated sentences are right for every number: none, one, many, negative, undefined, infinite and very large.

Every function that writes figures into prose is fed with such numbers. A function that formats figures without
`modelfactory.words`, and is not listed here, fails the last test."""

import ast
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_comparison import a_model, a_task, a_task_with_controls

from modelfactory.configuration import TradingRules
from modelfactory.data import audit, pipeline, plausibility, splits
from modelfactory.evaluation import backtest, bootstrap, drift, information, robustness, significance, tables
from modelfactory.evaluation.examples import example_market
from modelfactory.runs import contributions, explain, manage, predict, refresh, report, sentences
from modelfactory.training import selftest, test_set
from modelfactory.tuning import result as tuning_result
from modelfactory.tuning import storage

COUNTS = 0, 1, 2, 1_234_567
FIGURES = 0.0, 1.0, 2.0, -0.0, -0.0004, 0.004, -1.1, 0.19, 0.997, math.nan, math.inf, -math.inf, 1e17, -1e17
NOUNS = r"(runs|rows|bars|trials|models|features|columns|days|folds|symbols|labels|predictions|files|months|blocks|"
NOUNS += r"seeds|horizons|groups|times|fits|problems|failures|warnings|versions|classes|others|splits|paths|more \w+s)"
WRONG = {
    "a one with a plural": rf"(?<![\d.,/])1 (other |known |new |live |training )?{NOUNS}\b",
    "a singular with another number": r"(?<![\d.,])(0|2|1,234,567) (run|row|bar|trial|model|feature|day|fold|symbol)\b",
    "NaN": r"\bnan\b|\bNone\b|\bNaT\b",
    "infinity as a word": r"(?i)\binf(inity)?\b",
    "a negative zero": r"(?<![\d.])-0(\.0+)?(?![.\d])",
    "an exponent": r"\de[+-]\d",
    "none as a number": r"\bin 0\b",
    "a number without its sign": r"- \d|--",
    "a share without its number": r"– ?%|nan%",
    "an empty pair of brackets": r"(?<!\w)\(\s*\)|\(, |, \)",
    "a missing word": r"  |, ,| ,| \.(?!\d)|\.\.",
}


def check(text):
    "Fails if a sentence has one of the known mistakes."
    mistakes = {what: m[0] for what, pattern in WRONG.items() if (m := re.search(pattern, text))}
    assert not mistakes, f"{mistakes} in {text!r}"


@pytest.mark.parametrize(
    "text",
    ["in 1 runs", "at 2 run", "breaks even at nan bp", "-0.000 nats", "1.2e+17", "in 0 of 3 folds", "[-inf, 2]", "()"],
)
def test_the_check_finds_each_mistake(text):
    with pytest.raises(AssertionError, match="in '"):
        check(text)


def some(n, name="a"):
    "At most five names, as a stand-in for `n` of them."
    return [f"{name}{i}" for i in range(min(n, 5))]


def claim(n, x):
    for low, n_blocks, sign in ((x, 50, 1), (-1.0, 50, -1), (0.1, n, 1), (0.1, 50, 0)):
        yield significance.DirectionClaim(x, low, 0.5, 0.95, x, x, sign, n, n_blocks, n).sentence


def task_with(n, x, **more):
    "A task of one or more models whose figures are all `x`."
    figures = dict(skill=x, directional_accuracy=x, directional_accuracy_constant=x, log_loss=x)
    figures |= dict(directional_skill_ci_low=x, directional_skill_ci_high=x, seeds=[1, 2], sharpe_net=x)
    figures |= dict(log_loss_min=1.0, log_loss_max=3.0, fraction_of_ceiling=dict(directional_accuracy=x))
    models = [a_model(name, **figures) for name in some(max(n, 1))]
    values = dict(sharpe_net=x, deflated_sharpe=x, overfitting=x, p_direction=x, p_log_loss=x, p_profit=x, trials=n)
    return a_task(models, **values | dict(n_left_out=n, versions=n, earlier_scoring=some(n)) | more)


def described(n, x):
    for flags in ({}, dict(direction_significant=True, log_loss_significant=True, profit_significant=True)):
        task = task_with(n, x, **flags)
        yield from sentences.describe(task)
        task["models"][0]["direction_significant"] = True
        yield from sentences.describe(task)
        yield from sentences.task_verdicts(task).values()


def concluded(n, x):
    gap = dict(directional_accuracy=dict(null_score=0.5, one_row_policy=x, ceiling=0.7))
    none = dict(directional_accuracy=dict(null_score=0.5, one_row_policy=x, ceiling=x))
    for ceiling in (gap, none, None):
        for skilled in (False, True):
            tasks = [task_with(n, x, ceiling=ceiling, horizon=h) for h in range(1, 2 + min(n, 2))]
            tasks[0]["models"][0]["direction_significant"] = skilled
            yield from sentences.conclusion(dict(tasks=tasks))


def of_folds(n, x):
    n_folds = max(2, min(n, 9))
    numbers = list(range(1, min(n, n_folds) + 1))
    lead = dict(leader="a", second="b", first_in=numbers, n_folds=n_folds, decisive_fold=None, then_first="b")
    decay = dict(a=dict(p=0.001, first_half=x, second_half=-2e17), b=dict(p=x, first_half=x, second_half=x))
    folds = dict(why="", n_folds=n_folds, lead=lead, skilled_folds=dict(a=numbers, b=[2]), decay=decay)
    folds |= dict(untested_folds=dict(a=[1], b=[1]), path_overfitting=x, paths=dict(a=[1.0] * max(1, min(n, 5))))
    for changes in ({}, dict(lead=lead | dict(decisive_fold=2)), dict(trained_once=True)):
        yield from sentences.fold_sentences(dict(data="bars", horizon=5, folds=folds | changes))


def of_notes(n, x):
    yield from sentences.task_notes(task_with(n, x))
    unread = [dict(folder=name) for name in (f"r{i}" for i in range(min(n, 9)))]
    yield from sentences.comparison_notes(dict(tasks=[], failed=[], early_stopping=[], unread=unread))


def of_controls(n, x):
    for missing in ((), ("dlinear",)):
        beaten = {name: ("dlinear",) for name in some(n)}
        yield from sentences.control_sentences(a_task_with_controls(beaten, missing=missing))
        yield from sentences.control_sentences(a_task_with_controls(beaten, (), ("dlinear", "logistic_regression")))


def of_report(n, x):
    row = dict(score=x, of_one_row_policy=x, of_ceiling=x)
    yield report._score_cell(SimpleNamespace(**row))
    metrics = ("log_loss", "sharpe_net", "fit_seconds")
    numbers = dict(log_loss=x, log_loss_ci_low=x, log_loss_ci_high=x, sharpe_net=x, fit_seconds=x)
    model = dict(data="d", horizon=5.0, model="a", rank=x, family="f", seeds=n, runs=[], verdict="none")
    table = pd.DataFrame([model | numbers | dict(directional_accuracy_constant=x)])
    yield re.sub(r"<[^>]*>", "; ", report.leaderboard_table(table, metrics)._repr_html_())
    tasks = [dict(untested=range(n)), *({} for _ in range(min(n, 3)))]
    yield report.scope_sentence(dict(tasks=tasks), tasks[:1])
    untested = pd.DataFrame(dict(verdict=["", *[report.NOT_TESTED] * min(n, 3)]))
    yield report.table_rows(untested, 1)[1]
    rows = [dict(model="a", log_loss=x), dict(model="a", log_loss=None)]
    folds = dict(ranks=dict(log_loss=None), decay=dict(a=dict(first_half=x, second_half=None)), rows=rows)
    folds |= dict(skilled_folds=dict(a=[1]), n_folds=n, better_than_simple={})
    yield from map(str, (report._fold_summary_row(dict(data="d", horizon=5), folds, "a", [])[k] for k in FOLD_CELLS))


FOLD_CELLS = "log_loss", "skill_in", "gain_by_half"


def of_metrics(n, x):
    yield tables.format_metric(dict(a=x, a_ci_low=x, a_ci_high=1.0), "a")
    yield tables.format_metric(dict(a=n, a_ci_low=None, a_ci_high=None), "a")
    card = tables.header_card("gru", 5, dict(n_samples=n, fit_seconds=x))
    yield re.sub("<[^>]*>", "|", card)


def of_robustness(n, x):
    months = pd.DataFrame(dict(month=some(max(n, 1)), profit=[x] * max(1, min(n, 5))))
    months.attrs |= dict(share_with_profit=x, share_of_best=x)
    costs, slices = pd.DataFrame(dict(cost_bps=[x], profit=[x])), pd.DataFrame(dict(slice=some(n)))
    costs.attrs["break_even"], slices.attrs["slice_level"] = x, 0.99
    slices["skill"] = slices["skill_low"] = slices["skill_high"] = x
    thresholds = slices.copy()
    thresholds.attrs["threshold_level"] = 0.995
    r = robustness.Robustness(costs, slices, months, pd.DataFrame(dict(strategy=some(n))), thresholds)
    yield r._notes()
    yield from r._headings().values()
    yield from robustness._cells_as_text(slices.assign(calls=n)).astype(str).to_numpy().ravel()


def of_backtest(n, x):
    days = pd.date_range("2024-01-01", periods=max(1, min(n, 5)))
    daily = pd.DataFrame(dict(net=0.0), index=days)
    bars = pd.DataFrame(dict(exposure=[1.0]))
    cost = x if math.isfinite(x) and 0 <= x < 1e3 else 0.0
    b = backtest.Backtest(bars, daily, pd.DataFrame(), max(n, 1), TradingRules(cost_bps=cost), 252.0)
    b.metrics = lambda: dict(sharpe=x, n_trades=n)
    yield b._title()
    yield from (text for _, text in b._figures())


def of_drift(n, x):
    path = pd.DataFrame(index=range(min(n, 9)))
    means = pd.DataFrame(dict(log_loss=[x, x], relative=[x, x]), ["validation", "live"])
    for alarms in ({}, dict(relative=dict(at="2024-01-02", since="2024-01-01", mean=x))):
        reason = "" if n else "no label of a live prediction is known yet"
        test = drift.DriftTest(path, means, 0.05, max(n, 1), n, alarms, reason)
        yield test.sentence
        yield test.rate_sentence


def of_refresh(n, x):
    rows = dict(closed=[True, False, True][: min(n, 3)], y_true=[1.0, 1.0, math.nan][: min(n, 3)])
    record = refresh.LiveRecord(None, None, pd.DataFrame(rows).astype(dict(closed=bool)), n, n)
    yield record.sentence
    means = pd.DataFrame(dict(log_loss=[x, x], relative=[x, x]), ["validation", "live"])
    test = drift.DriftTest(pd.DataFrame(index=range(max(1, min(n, 9)))), means, 0.05, 3, n)
    loss = dict(difference=x, low=x, high=x)
    versus = refresh.ChallengerComparison("b", "2024-01-01", n, n, loss, loss)
    yield from refresh.Refresh(record, test, comparison=versus).sentences


def of_predictions(n, x):
    size = min(n, 5)
    frame = pd.DataFrame(dict(set_size=[x] * size, abstain=[True] * size))
    known = dict(n_known=n, skipped={"A": n} if n else {}, unseen=some(n), history={"A": n} if n else {})
    known |= dict(needs="a prediction needs 5 bars", limits=[3], drift=dict(feature=some(n), outside=[1.0] * size))
    frame.attrs = known | dict(drift=known["drift"] | {"index": [x] * size, "limit": [0.1] * size})
    yield from predict.prediction_warnings(frame)
    yield predict._RawRows(None, None, {"A": n}, "it needs more", [], ["A"]).too_short()
    yield predict.needs_text(SimpleNamespace(needs=(n, [])), 0)
    top = dict(explain_1="rsi", explain_1_value=x, explain_rest=x, explain_base=x)
    one = dict(symbol="A", datetime=pd.Timestamp("2024-01-01"), prediction=1, p_down=0.1) | top
    yield from contributions.prediction_sentences(pd.DataFrame([one]))


def of_explanation(n, x):
    size = min(n, 3)
    table = pd.DataFrame(dict(feature=some(size), importance=1.0, low=[1.0, -1.0, 1.0][:size], high=2.0, p_holm=0.01))
    for method in ("permutation", "contributions"):
        rest = dict(n=n, importance=x)
        e = explain.Explanation(table, "feature", method, "nats", "gru", 5, "val", n, "free", rest=rest, skill=x)
        yield e.summary
        lines = repr(e).splitlines()
        yield from (lines[0], lines[-1])


def of_selftest(n, x):
    row = dict(model="a", horizon=5, n=n, accuracy=x, skill=x, low=x, high=x, alarm=True, error="", seconds=1.0)
    test = selftest.InvarianceResult("another future", n, n, x, "A 2024-01-01 by 0.1")
    table = pd.DataFrame([row | dict(future=test, prefix=test)])
    result = selftest.SelfTest(table, audit.AuditReport([], 1, 1, []), some(n), 0.99, 0)
    yield result._head()
    yield from result.problems
    yield from selftest._display_table(table)["directional skill"]


def of_audit(n, x):
    row = dict(column="rsi", view="value", kind="direction", target="label_h5", symbol="A", size=x)
    yield audit._finding_sentence(SimpleNamespace(**row), x, 1)
    by_shift = pd.Series([0.1, 0.5], index=[0, min(n, 9)])
    yield audit._copy_finding("rsi", "label_h5", by_shift).sentence
    findings = [audit.LeakFinding(f"c{i}", "x", 0.1, 0.1, "t", "", 0, 0, "fail", "s") for i in range(13 * min(n, 2))]
    head, _, rest = audit.AuditReport(findings[: 12 + n], n, n, [])._lines()
    yield from (head, *rest)


def of_splits(n, x):
    yield from splits.fill_warnings({name: x for name in some(n)})
    share = x if 0 <= x <= 1 else 0.9
    labels = pd.DataFrame([dict(horizon=n, split="val", constant_call=f"up {share}", blocks=min(n, 2))])
    yield from splits.constant_call_warnings(labels)
    yield from splits.block_warnings(labels)
    yield splits._bad_rows_text(np.array([True] * max(1, min(n, 5))), "with a price below 0")


def of_test_set(n, x):
    yield test_set._use_sentence("bars", n, n)


def of_tuning(n, x):
    attrs = dict(model="gru", horizon=5, data="bars", preset=None, objective="log_loss", measured_on="train")
    study = dict(study_attrs=attrs, default=x, fold_values=[x] * min(n, 5), value=x, params=dict(rate=0.01))
    result = SimpleNamespace(**study, count=lambda state: n, failures=lambda: {"ValueError": n})
    yield from (text for _, text in tuning_result._summary_rows(result))
    names = SimpleNamespace(state=SimpleNamespace(name="COMPLETE"), value=x)
    search = SimpleNamespace(get_trials=lambda deepcopy: [names], direction=SimpleNamespace(name="MINIMIZE"))
    yield storage._progress_note(search, n, n)


def of_prices(n, x):
    closes = [100.0, 100.0 * (1 + (x if math.isfinite(x) and -1 < x < 10 else 0.5)), 100.0]
    bars = pd.DataFrame(dict(datetime=pd.date_range("2024-01-01", periods=3), symbol="A", close=closes))
    yield from plausibility.large_moves(bars, 3)
    yield plausibility.join_first(some(n), 2)


def of_comparisons(n, x):
    yield repr(significance.Overfitting(np.array([x] * max(1, min(n, 5))), np.array([[x, x]])))
    ranks = significance.Ranks(pd.DataFrame(np.ones((max(1, min(n, 5)), max(1, min(n, 3))))), x, x)
    yield repr(ranks).splitlines()[0]
    rows = dict(log_loss=(1.0, x), n_samples=(3, n))
    for name, (first, second) in rows.items():
        line = manage._difference_line(dict(name=name, part="metrics", first=first, second=second))
        yield " ".join(line.split())


def of_warnings(n, x):
    days = pd.date_range("2024-01-01", periods=150)
    factors = dict(A=1 + min(abs(x), 9.0) if x == x else 1.0, B=1.0)
    closes = {s: [100.0, 101.0] * 50 + [100.0 * f] * 50 for s, f in factors.items()}
    bars = pd.concat([pd.DataFrame(dict(datetime=days, symbol=s, close=c)) for s, c in closes.items()])
    yield from plausibility.price_warnings(bars.reset_index(drop=True), "train")
    labels = np.array([-1] * 400 + [0] * min(n, 2) + [1] * 400)
    yield from splits._rare_class_warnings(SimpleNamespace(name="train", file="t", labels={n: labels}), n, (-1, 0, 1))


def of_information(n, x):
    frame = pd.DataFrame()
    series = pd.Series(dtype=float)
    yield information.InformationReport(n, True, n, frame, frame, frame, frame, series, None)._title()


def of_replaced_bars(n, x):
    "Stored bars that new bars replace, of more symbols than are named."
    symbols = some(3 + min(n, 2))
    bars = pd.DataFrame(dict(symbol=np.repeat(symbols, 2), open=1.0, high=2.0, low=1.0, close=1.0, volume=1.0))
    bars.insert(0, "datetime", [pd.Timestamp("2024-01-02 10:00"), pd.Timestamp("2024-01-02 11:00")] * len(symbols))
    is_new = np.tile([False, True], len(symbols))
    grown = bars.assign(high=np.where(is_new, 2.5, 2.0))
    notes = pipeline.joint_notes(SimpleNamespace(interval=3600.0), bars, grown, is_new)
    assert len(notes) == min(len(symbols), 4)
    yield from notes


GENERATORS = [value for name, value in list(globals().items()) if name.startswith("of_")] + [
    claim,
    described,
    concluded,
]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda g: g.__name__)
def test_generated_text_is_right_for_every_number(generator):
    texts = 0
    for n in COUNTS:
        for x in FIGURES:
            for text in generator(n, x):
                check(text)
                texts += 1
    assert texts >= len(FIGURES)


FIGURE_WORDS = {"number_text", "percent_text", "interval_text", "rounded_text", "p_text"}
# Functions that these tests do not feed, because they need a fit, a data set or a figure; their own tests call them.
NOT_FED = {
    "data/calendars.py": {"_fit_text"},
    "data/recut.py": {"_scaler_warnings"},
    "evaluation/permutation.py": {"plot_shift_test"},
    "evaluation/significance.py": {"plot_ranks"},
    "figures/model_comparison.py": {"_name_line"},
    "figures/robustness.py": {"_plot_slices"},
    "figures/tear_sheet.py": {"_plot_curves", "plot_importance", "plot_learning_curve"},
    "runs/run.py": {"__repr__"},
    "runs/stitch.py": {"__repr__"},
    "training/trainer.py": {"learning_notes", "overlap_note"},
}


def functions_that_write_figures():
    "(file, first line) -> name of each function of the package that writes figures with `modelfactory.words`."
    writers = {}
    for file in (ROOT / "modelfactory").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and file.name not in ("_modidx.py", "words.py"):
                called = {c.func.id for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
                line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if called & FIGURE_WORDS:
                    writers[str(file), line] = node.name
    return writers


def test_each_function_that_writes_figures_is_fed():
    called = set()

    def profile(frame, event, arg):
        if event == "call":
            called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    sys.setprofile(profile)
    try:
        for generator in GENERATORS:
            for x in (0.19, math.nan):
                list(generator(2, x))
    finally:
        sys.setprofile(None)
    missed = {}
    for (file, line), name in functions_that_write_figures().items():
        if (file, line) not in called:
            missed.setdefault(file.removeprefix(f"{ROOT}/modelfactory/"), set()).add(name)
    assert missed == NOT_FED, "feed new functions that write figures in a generator of this file"


FLOAT_FORMAT = re.compile(r"[+,]*(\.\d+)?[%efg]")


def functions_with_own_formats():
    "File -> functions that format figures themselves, outside of errors: a NaN, a sign or an exponent would be shown."
    own = {}
    for file in (ROOT / "modelfactory").rglob("*.py"):
        tree = ast.parse(file.read_text())
        errors = {id(node) for error in ast.walk(tree) if isinstance(error, ast.Raise) for node in ast.walk(error)}
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            values = [n for n in ast.walk(function) if isinstance(n, ast.FormattedValue) and id(n) not in errors]
            specs = [ast.unparse(value.format_spec)[2:-1] for value in values if value.format_spec]
            if any(FLOAT_FORMAT.fullmatch(spec) for spec in specs):
                own.setdefault(str(file.relative_to(ROOT / "modelfactory")), set()).add(function.name)
    return own


# Functions whose formatted values are finite and not negative by construction, or are no prose: times, sizes, seconds,
# axis ticks, parameters, labels of figures.
OWN_FORMATS = {
    "cli.py": {"clean"},
    "data/dataset.py": {"__repr__", "_class_shares"},
    "data/explore.py": {"plot_drift"},
    "data/feature_groups.py": {"features"},
    "data/matrix.py": {"_space_error"},
    "data/pipeline.py": {"break_reason"},
    "data/plausibility.py": {"_ratio_text", "_stale_warnings", "feature_warnings"},
    "data/readers.py": {"_widen_low_high"},
    "data/splits.py": {"_constant_call", "_parse_labels", "_percent_text", "_value_counts_text"},
    "evaluation/backtest.py": {"_title"},
    "evaluation/significance.py": {"plot_critical_difference"},
    "figures/confidence.py": {"_plot_reliability", "plot_threshold_sweep"},
    "figures/model_comparison.py": {"_sharpe"},
    "figures/tear_sheet.py": {"plot_confusion"},
    "models/base.py": {"divergence_message"},
    "models/calibration.py": {"__repr__"},
    "models/conformal.py": {"__repr__"},
    "models/conformance.py": {
        "__repr__",
        "_check_contributions",
        "explains_predictions",
        "learns_levels_trends_order",
        "learns_planted_signal",
        "no_skill_on_noise",
    },
    "models/ensemble_base.py": {"__repr__"},
    "models/foundation/timellm.py": {"describe"},
    "models/tabular.py": {"_warn_if_large"},
    "models/training_loop.py": {"divergence_hint"},
    "runs/engine.py": {"_wait_for_end"},
    "runs/environment.py": {"_gpu", "_machine", "_runs"},
    "runs/export.py": {"_card_onnx"},
    "progress.py": {"losses_text"},
    "runs/sessions.py": {"start_session"},
    "runs/report.py": {"_html_row"},  # the value that a click on a column sorts by
    "training/null_zoo.py": {"evaluate_planted_market", "main", "plot_claims"},
    "training/selftest.py": {"_compare_predictions"},
    "tuning/result.py": {"_plot_slice", "_summary_rows"},
}


def test_no_function_formats_figures_of_sentences_itself():
    assert functions_with_own_formats() == OWN_FORMATS, "write figures with `modelfactory.words`, or list the function"


def test_the_profit_of_a_few_days_has_no_interval():
    for days in (3, bootstrap.MIN_DAYS):
        predictions, _, prices = example_market(days=days)
        traded = backtest.tranche_backtest(predictions, prices, horizon=5)
        ends = bootstrap.percentile_interval(*bootstrap.trading_draws(traded, n_boot=200))
        text = tables.format_metric(dict(sharpe_net=1.0) | ends, "sharpe_net")
        assert ("[not estimable]" in text) == (days == 3), text
        assert all(math.isnan(end) or abs(end) < 1e3 for name, end in ends.items() if name.startswith("sharpe_net"))
