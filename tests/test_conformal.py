"Prediction sets: oracles, no look-ahead, coverage with and without drift, saving, and the way through a run."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from crepes import ConformalClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from test_test_set import frames

from modelfactory import load_run
from modelfactory.cli import main, parse_set
from modelfactory.configuration import ConfigError
from modelfactory.data.market import MarketConfig, market_table, simulate_market
from modelfactory.data.null_worlds import find_world, simulate_null
from modelfactory.evaluation.coverage import coverage_table, set_metrics
from modelfactory.evaluation.metrics import metric_names
from modelfactory.models.base import ConformalConfig, to_output
from modelfactory.models.calibration import CalibratedModel, HoldoutError, purged_holdout
from modelfactory.models.conformal import (
    Conformal,
    ConformalModel,
    abstains,
    adapt_sets,
    adaptive_levels,
    fit_conformal,
    label_delay,
    row_uniforms,
)
from modelfactory.models.conformance import planted_task
from modelfactory.models.errors import NotFittedError
from modelfactory.models.loading import load_model
from modelfactory.models.persistence import CheckpointError
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.attempt import prediction_frame, publish, stored_output, write_run
from modelfactory.runs.isolation import IsolatedModel
from modelfactory.runs.run_folder import RunError, start_attempt
from modelfactory.runs.stitch import join_folds
from modelfactory.training.trainer import Trainer, trainer_plots

TASK = planted_task()


def new(name="logistic_regression", conformal=None, **config):
    return ModelRegistry.create(name, dict(conformal=conformal or dict(alpha=0.2)) | config, 5, TASK.features)


def fitted(y=TASK.y, X=TASK.X, X_val=TASK.X_val, y_val=TASK.y_val, **config):
    model = new(**config)
    model.fit(X, y, X_val, y_val, TASK.meta, TASK.meta_val)
    return model


def output_of(p, symbol="A", start="2024-01-01"):
    times = pd.date_range(start, periods=len(p), freq="5min")
    return to_output(p, pd.DataFrame(dict(datetime=times, symbol=symbol, horizon=5)), (-1, 0, 1))


def random_output(rng, n, **kw):
    return output_of(rng.dirichlet([1, 1, 1], n), **kw)


# Oracles


@pytest.mark.parametrize("method", ["lac", "aps"])
@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.37])
def test_sets_equal_those_of_crepes(method, alpha):
    rng = np.random.default_rng(0)
    calibration, new_rows, codes = random_output(rng, 157), random_output(rng, 200, symbol="B"), rng.integers(0, 3, 157)

    def slow_scores(output):
        if method == "lac":
            return 1 - output.probabilities.astype(float)
        u = row_uniforms(output.symbols, output.timestamps)
        scores = np.zeros(output.probabilities.shape)
        for i, p in enumerate(output.probabilities.astype(float)):
            for k in range(3):
                scores[i, k] = p[p > p[k]].sum() + u[i] * p[k]
        return scores

    oracle = ConformalClassifier().fit(slow_scores(calibration)[np.arange(157), codes])
    expected = oracle.predict_set(slow_scores(new_rows), confidence=1 - alpha, smoothing=False)
    conformal = fit_conformal(ConformalConfig(alpha=alpha, method=method), calibration, codes)
    assert np.array_equal(conformal(new_rows).sets, np.asarray(expected, bool))


LABELS = st.lists(st.tuples(st.integers(0, 21), st.integers(1, 9)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=LABELS, alpha=st.sampled_from([0.05, 0.1, 0.5]), step=st.sampled_from([0.005, 0.1, 0.7]))
def test_levels_equal_the_definition_and_use_no_label_before_it_is_known(rows, alpha, step):
    needed, delay = (np.array(column) for column in zip(*rows, strict=True))
    conformal = Conformal(alpha, "lac", step, np.linspace(0, 1, 20))
    levels = adaptive_levels(conformal, needed, delay)
    for t in range(len(rows)):
        known = [i for i in range(t) if needed[i] and i + delay[i] <= t]
        missed = [conformal.max_rank(levels[i]) < needed[i] for i in known]
        assert np.isclose(levels[t], alpha + step * sum(alpha - m for m in missed))
        unknown = np.array([not (i + delay[i] <= t) for i in range(len(rows))])
        changed = np.where(unknown, 21 - needed, needed)
        assert np.array_equal(adaptive_levels(conformal, changed, delay)[: t + 1], levels[: t + 1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), D=st.integers(1, 30), step=st.sampled_from([0.02, 0.1]), worst=st.booleans())
def test_the_share_of_misses_has_the_bound_of_the_paper_on_any_labels(seed, D, step, worst):
    rng = np.random.default_rng(seed)
    needed = np.full(800, 20) if worst else rng.integers(1, 22, 800) * (np.arange(800) // 100 % 2) + 1
    conformal = Conformal(0.1, "lac", step, np.linspace(0, 1, 20))
    levels = adaptive_levels(conformal, needed, np.full(800, D))
    missed = (conformal.max_rank(levels) < needed)[: 800 - D]
    assert abs(missed.mean() - 0.1) <= (1 + step * (D + 1)) / (step * len(missed)) + D / len(missed)
    assert -step * (D + 1) <= levels.min() and levels.max() <= 1 + step * (D + 1)


# Look-ahead


def adapted(seed, labels=None, gap=1, n=150):
    "Sets of two symbols, in mixed order, with label lengths of their own; the labels; the positions of the labels."
    rng = np.random.default_rng(seed)
    a, b = random_output(rng, n), random_output(rng, n, symbol="B")
    metadata = pd.concat(
        [pd.DataFrame(dict(datetime=o.timestamps, symbol=o.symbols, horizon=5)) for o in (a, b)], ignore_index=True
    ).assign(label_bars=rng.integers(1, 12, 2 * n), p=list(np.concatenate([a.probabilities, b.probabilities])))
    y = rng.integers(-1, 2, 2 * n)
    y[rng.random(2 * n) < 0.05] = -99
    order = rng.permutation(2 * n)
    metadata, y = metadata.iloc[order].reset_index(drop=True), y[order] if labels is None else labels
    output = to_output(np.stack(metadata.p), metadata, (-1, 0, 1))
    conformal = fit_conformal(ConformalConfig(alpha=0.4, step=0.2), random_output(rng, 50), rng.integers(0, 3, 50))
    model = new()
    model.conformal = conformal
    return adapt_sets(model, (output, y, label_delay(metadata, gap))).sets, y, metadata


@pytest.mark.parametrize("gap", [0, 1])
def test_a_label_changes_only_sets_of_its_symbol_that_are_made_after_it_is_decided(gap):
    sets, y, metadata = adapted(0, gap=gap)
    position = metadata.groupby("symbol").datetime.rank().to_numpy(int) - 1
    changes = 0
    for i in np.random.default_rng(1).permutation(len(y))[:40]:
        other = y.copy()
        other[i] = (y[i] + 2) % 3 - 1 if y[i] != -99 else 1
        changed = (adapted(0, other, gap)[0] != sets).any(1)
        decided = position[i] + max(metadata.label_bars[i], 5)
        allowed = (metadata.symbol == metadata.symbol[i]) & (position - gap >= decided)
        assert not changed[~allowed].any()
        changes += changed.any()
    assert changes > 15  # otherwise the test could not fail


def test_parts_in_time_order_equal_one_part():
    rng = np.random.default_rng(3)
    model, output, y = fitted(), random_output(rng, 300), rng.integers(-1, 2, 300)
    model.conformal.step = 0.1
    delay = np.full(300, 6)

    def part(rows):
        keys = {name: getattr(output, name)[rows] for name in ("predictions", "probabilities", "symbols", "horizons")}
        return replace(output, timestamps=output.timestamps[rows], **keys), y[rows], delay[rows]

    whole = adapt_sets(model, part(slice(None)))
    last = adapt_sets(model, part(slice(0, 170)), part(slice(170, 300)))
    assert np.array_equal(last.sets, whole.sets[170:])
    alone = adapt_sets(model, part(slice(170, 300)))
    assert not np.array_equal(alone.sets, last.sets)


# Coverage


def fit_and_predict(table, features, step=None, method="lac", horizon=5):
    "Fits a conformal model on train and predicts val with adapted sets."
    config = dict(method=method) | ({} if step is None else dict(step=step))
    model = ModelRegistry.create("logistic_regression", dict(conformal=config), horizon, features)
    parts = {}
    for split in ("train", "val"):
        rows = table[(table.split == split) & table[f"label_h{horizon}"].isin([-1, 0, 1])].reset_index(drop=True)
        keys = rows[["datetime", "symbol"]].assign(horizon=horizon, label_bars=rows[f"bars_to_hit_h{horizon}"])
        parts[split] = rows[features].to_numpy(np.float32), rows[f"label_h{horizon}"].to_numpy(int), keys
    (X, y, meta), (X_val, y_val, meta_val) = parts["train"], parts["val"]
    model.fit(X, y, X_val, y_val, meta, meta_val)
    return adapt_sets(model, (model.predict(X_val, meta_val), y_val, label_delay(meta_val, 1))), y_val


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lac", "aps"])
def test_coverage_on_planted_markets_is_within_two_standard_errors_in_each_month(method):
    for seed in (0, 1):
        table = market_table(simulate_market(MarketConfig(rows=(12_000, 24_000, 2), seed=seed)), (5,))
        output, y = fit_and_predict(table, ["pub_state_a", "pub_state_b", "ret_1", "ret_5", "ret_20"], method=method)
        months = coverage_table(output, y, 5, n_boot=300)
        months = months[months.rows > 1000]
        std_error = (months.coverage_ci_high - months.coverage_ci_low) / 4
        assert len(months) == 7 and (abs(months.coverage - 0.9) <= 2 * std_error).all()
        assert abs(set_metrics(output, y, 5, n_boot=0)["set_coverage"] - 0.9) < 0.005


def with_features(table):
    "Adds the last return, the return of five bars and the range, known one bar before the label begins."
    by_symbol = table.groupby("symbol")
    move = by_symbol.close.transform(lambda close: np.log(close).diff()).fillna(0) * 1000
    moves = dict(move=move, moves=move.groupby(table.symbol).transform(lambda m: m.rolling(5, 1).sum()))
    table = table.assign(**moves, range=np.log(table.high / table.low) * 1000)
    return table.assign(**{name: table.groupby("symbol")[name].shift(1).fillna(0) for name in FEATURES})


FEATURES = ["move", "moves", "range"]


@pytest.mark.slow
@pytest.mark.parametrize("volatility, low, high", [(1.4, 0.7, 0.88), (2.0, 0.6, 0.8), (0.6, 0.97, 1.0)])
def test_under_drift_adaptive_sets_keep_their_coverage_and_fixed_sets_lose_it(volatility, low, high):
    world = replace(find_world("moving_shares"), val_volatility=volatility)
    fixed, adaptive = [], []
    for seed in (0, 1, 2):
        table = with_features(simulate_null(world, 5, seed))
        for step, values in ((0, fixed), (None, adaptive)):
            output, y = fit_and_predict(table, FEATURES, step)
            values.append(set_metrics(output, y, 5, n_boot=0)["set_coverage"])
    assert (abs(np.array(adaptive) - 0.9) < 0.02).all()
    assert low < np.mean(fixed) < high and (abs(np.array(fixed) - 0.9) > abs(np.array(adaptive) - 0.9)).all()


@pytest.mark.slow
@pytest.mark.parametrize("world", ["drift_.05", "volatility_clusters", "late_labels", "own_drifts"])
def test_in_worlds_without_a_change_adaptive_sets_keep_their_coverage(world):
    output, y = fit_and_predict(with_features(simulate_null(world, 5, 3)), FEATURES)
    assert abs(set_metrics(output, y, 5, n_boot=0)["set_coverage"] - 0.9) < 0.02


def test_intervals_of_a_month_contain_the_target_and_a_broken_month_is_found():
    "Power: a month in which one set in five loses the true class; false alarms: the other months of 40 markets."
    conformal = fit_conformal(ConformalConfig(step=0), *known(np.random.default_rng(9), 20_000, "2020-01-01"))
    alarms, found = [], []
    for seed in range(40):
        output, codes = known(np.random.default_rng(seed), 24 * 91, "2024-01-01")
        sets = conformal(output).sets.copy()
        broken = (output.timestamps.month == 2) & (np.random.default_rng(seed).random(len(codes)) < 0.2)
        sets[broken, codes[broken]] = False
        table = coverage_table(replace(output, sets=sets), codes - 1, 1, n_boot=200)
        below = (table.coverage_ci_high < 0.9).to_numpy()
        found.append(below[1])
        alarms += [below[0], below[2]]
    assert np.mean(found) == 1 and np.mean(alarms) <= 0.1


def known(rng, n, start):
    "Hourly predictions that are true probabilities, and class codes."
    output = output_of(rng.dirichlet([1, 1, 1], n), start=start)
    output = replace(output, timestamps=pd.date_range(start, periods=n, freq="h"))
    return output, (output.probabilities.cumsum(1) > rng.random((n, 1))).argmax(1)


def test_tables_equal_a_slow_loop():
    rng = np.random.default_rng(2)
    output, codes = known(rng, 24 * 80, "2024-01-20")
    output = replace(output, sets=rng.random((len(output), 3)) < 0.6, symbols=rng.choice(["A", "B"], len(output)))
    keys = dict(month=[f"{t:%Y-%m}" for t in output.timestamps], symbol=list(output.symbols))
    keys["class"] = [c - 1 for c in codes]
    for by, groups in keys.items():
        table = coverage_table(output, codes - 1, 5, by, n_boot=20)
        assert [str(g) for g in table.index] == [str(g) for g in sorted(set(groups))]
        for row, group in zip(table.itertuples(), sorted(set(groups)), strict=True):
            rows = [i for i, g in enumerate(groups) if g == group]
            sets = [set(np.flatnonzero(output.sets[i])) for i in rows]
            assert row.rows == len(rows)
            assert np.isclose(row.coverage, np.mean([codes[i] in s for i, s in zip(rows, sets, strict=True)]))
            assert np.isclose(row.set_size, np.mean([len(s) for s in sets]))
            assert np.isclose(row.abstention, np.mean([len(s) in (0, 3) or s == {0, 2} for s in sets]))


def test_abstention_of_other_classes():
    both = np.array([[1, 1], [1, 0], [0, 0]], bool)
    assert abstains(both, (0, 1)).tolist() == abstains(both, (-1, 1)).tolist() == [True, False, True]
    four = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]], bool)
    assert abstains(four, (-2, -1, 1, 2)).tolist() == [False, False, True, False]


# The wrapped model


def test_the_end_of_train_changes_only_the_sets_and_purged_rows_change_nothing():
    first, end = purged_holdout(TASK.meta, 0.2)
    before = fitted()
    y = TASK.y.copy()
    y[end] = -y[end]
    purged = np.setdiff1d(np.arange(len(y)), np.r_[first, end])
    y[purged] = -y[purged]
    after = fitted(y)
    a, b = (m.predict(TASK.X_val, TASK.meta_val) for m in (before, after))
    assert len(purged) == 5 and np.array_equal(a.probabilities, b.probabilities)
    assert not np.array_equal(before.conformal.scores, after.conformal.scores) and len(before.conformal.scores) == 180
    scores = 1 - before.model.predict(TASK.X[end], TASK.meta.iloc[end]).probabilities.astype(float)
    assert np.allclose(before.conformal.scores, np.sort(scores[np.arange(len(end)), TASK.y[end] + 1]))


def test_validation_takes_no_part_and_a_row_does_not_depend_on_other_rows():
    model, other = fitted(), fitted(X_val=TASK.X_val[::-1] * 2, y_val=-TASK.y_val)
    assert np.array_equal(model.conformal.scores, other.conformal.scores)
    sets = model.predict(TASK.X_val, TASK.meta_val).sets
    rows = np.random.default_rng(0).permutation(len(sets))[:50]
    assert np.array_equal(model.predict(TASK.X_val[rows], TASK.meta_val.iloc[rows]).sets, sets[rows])


def test_conformal_is_outside_calibration_and_holds_out_first():
    model = fitted(calibration="temperature", conformal=dict(share=0.3))
    assert isinstance(model, ConformalModel) and isinstance(model.model, CalibratedModel)
    first, end = purged_holdout(TASK.meta, 0.3)
    meta = TASK.meta.iloc[first].reset_index(drop=True)
    inner = ModelRegistry.create("logistic_regression", dict(calibration="temperature"), 5, TASK.features)
    inner.fit(TASK.X[first], TASK.y[first], TASK.X_val, TASK.y_val, meta, TASK.meta_val)
    assert inner.calibration == model.model.calibration and len(model.conformal.scores) == len(end)
    assert "temperature calibration" in repr(model) and "sets that miss 10%" in repr(model)


@pytest.mark.parametrize("config", [dict(method="aps"), dict(method="lac")])
def test_saving_and_loading_keeps_the_sets(config, tmp_path):
    model = fitted(conformal=config, calibration="isotonic")
    model.save(tmp_path)
    again = load_model(tmp_path)
    a, b = (m.predict(TASK.X_val, TASK.meta_val) for m in (model, again))
    assert np.array_equal(a.sets, b.sets) and again.config == model.config
    assert np.array_equal(again.conformal.scores, model.conformal.scores)
    plain = ModelRegistry.create("logistic_regression", dict(calibration="isotonic"), 5, TASK.features)
    with pytest.raises(CheckpointError, match="holds a conformal logistic_regression, expected one without conformal"):
        plain.load(tmp_path)


GOOD = dict(alpha=0.1, method="lac", step=0.005, scores=[0.1, 0.2])
DAMAGE = [None, "", "[]", dict(scores=[0.2, 0.1]), dict(scores=[]), dict(alpha=0), dict(method="raps"), dict(step=-1)]
DAMAGE += [dict(scores=[0.1, 7]), dict(scores=[[0.1]]), dict(other=1), dict(scores=[0.1, float("nan")])]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_model_with_damaged_scores_cannot_be_loaded(damage, tmp_path):
    model, file = fitted(), tmp_path / "conformal.json"
    model.save(tmp_path)
    if damage is None:
        file.unlink()
    else:
        file.write_text(json.dumps(GOOD | damage) if isinstance(damage, dict) else damage)
    with pytest.raises(CheckpointError, match="conformal.json"):
        model.load(tmp_path)
    with pytest.raises(NotFittedError):
        model.predict(TASK.X_val, TASK.meta_val)


def test_an_isolated_model_without_its_scores_is_refused(tmp_path):
    fitted().save(tmp_path)
    (tmp_path / "conformal.json").unlink()
    with pytest.raises(RunError, match="conformal.json: no such file"):
        IsolatedModel(tmp_path)


def test_errors_name_the_key():
    assert parse_set(["conformal={alpha: .2}"]) == dict(conformal=dict(alpha=0.2))
    with pytest.raises(ConfigError, match="conformal: unknown key 'alfa', did you mean 'alpha'"):
        new(conformal=dict(alfa=0.1))
    with pytest.raises(ConfigError, match="conformal: alpha = 1.5"):
        new(conformal=dict(alpha=1.5))
    with pytest.raises(HoldoutError, match="conformal.share 0.005 leaves"):
        fitted(conformal=dict(share=0.005))
    with pytest.raises(ValueError, match="needs metadata_train"):
        new().fit(TASK.X, TASK.y, TASK.X_val, TASK.y_val)
    for use in (lambda m: m.predict(TASK.X_val, TASK.meta_val), lambda m: m.save("unused")):
        with pytest.raises(NotFittedError):
            use(new())


# A run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run with predictions of val and test, its trainer, and its splits."
    runs, splits = tmp_path_factory.mktemp("runs"), frames()
    config = dict(conformal=dict(alpha=0.2, step=0.05))
    trainer = Trainer(dict(model="logistic_regression", horizon=5, data="in memory", config=config), splits)
    trainer.run_full_pipeline()
    attempt = start_attempt(runs, dict(model="logistic_regression", horizon=5))
    trainer.evaluate("test", attempt)
    write_run(trainer, attempt, trainer_plots(trainer))
    return load_run(publish(attempt, runs)), trainer, splits


COLUMNS = ["in_set_down", "in_set_flat", "in_set_up", "set_size", "abstain"]


@pytest.mark.slow
def test_a_run_stores_sets_metrics_and_the_figure(made):
    run, trainer, _ = made
    for split in ("val", "test"):
        frame = run.predictions(split)
        assert np.array_equal(frame[COLUMNS[:3]], trainer.predictions[split].sets)
        assert (frame.set_size == frame[COLUMNS[:3]].sum(axis=1)).all() and frame.abstain.dtype == bool
        back = stored_output(frame, (-1, 0, 1))
        assert np.array_equal(back.sets, trainer.predictions[split].sets)
    covered = [row[1 + row.y_true + 1] for row in run.predictions()[[*COLUMNS[:3], "y_true"]].itertuples()]
    assert np.isclose(run.metrics["set_coverage"], np.mean(covered))
    assert {f"{m}{end}" for m in metric_names("set") for end in ("", "_ci_low", "_ci_high")} <= set(run.metrics)
    assert (run.path / "plots/coverage.png").is_file()
    assert not set(run.baseline) & set(metric_names("set"))


@pytest.mark.slow
def test_a_run_without_conformal_has_no_sets(made):
    trainer = Trainer(dict(model="logistic_regression", horizon=5, data="in memory"), made[2])
    metrics = trainer.run_full_pipeline()
    assert trainer.predictions["val"].sets is None and not set(metrics) & set(metric_names("set"))
    assert "coverage" not in trainer_plots(trainer, names=("coverage", "predictions"))
    assert not set(COLUMNS) & set(prediction_frame(trainer.predictions["val"], (-1, 0, 1)))


@pytest.mark.slow
def test_a_loaded_run_predicts_the_stored_sets_and_adapts_to_known_labels_only(made, tmp_path, capsys):
    run, _, splits = made
    labelled = {name: run.predict(splits[name]) for name in ("val", "test")}
    for name, frame in labelled.items():
        both = run.predictions(name).merge(frame, on=["datetime", "symbol"], suffixes=("", "_again"))
        assert len(both) > 100 and both.prediction.eq(both.prediction_again).all()
        assert (both.set_size == both.set_size_again).mean() > 0.98  # rows without a label are counted as bars here
    assert labelled["test"].attrs["n_known"] > labelled["val"].attrs["n_known"] > 0
    bare = splits["test"].drop(columns=[c for c in splits["test"] if c.startswith(("label", "bars_to"))])
    unlabelled = run.predict(bare, ahead=True)
    assert unlabelled.datetime.isna().any() and unlabelled[COLUMNS].notna().all(axis=None)
    assert 0 < unlabelled.attrs["n_known"] < labelled["test"].attrs["n_known"]
    isolated = load_run(run.path, isolated=True).predict(bare, ahead=True)
    assert isolated[COLUMNS].equals(unlabelled[COLUMNS])
    bare.to_parquet(tmp_path / "bars.parquet")
    with pytest.raises(SystemExit) as done:
        main(["predict", str(run.path), str(tmp_path / "bars.parquet"), "--output", str(tmp_path / "p.parquet")])
    assert done.value.code == 0 and "abstain; they are adapted to" in capsys.readouterr().out
    assert set(COLUMNS) <= set(pd.read_parquet(tmp_path / "p.parquet"))


@pytest.mark.slow
def test_a_stitched_record_keeps_the_sets_of_its_folds(made):
    task = dict(model="logistic_regression", horizon=5, config=dict(conformal=dict(alpha=0.2)))
    data = {name: made[2][name] for name in ("train", "val")}
    whole, *folds = (
        Trainer(task | dict(data=dict(data="in memory", folds=dict(n=2, fold=number))), data) for number in (None, 1, 2)
    )
    whole.prepare_data()
    outputs = []
    for trainer in folds:
        trainer.train()
        outputs.append(trainer.predict())
    joined = join_folds(whole, outputs)
    stored = {(t, s): tuple(row) for o in outputs for t, s, row in zip(o.timestamps, o.symbols, o.sets, strict=True)}
    assert [stored[t, s] for t, s in zip(joined.timestamps, joined.symbols, strict=True)] == list(
        map(tuple, joined.sets)
    )
    assert "set_coverage" in whole.score_split() and "coverage" in trainer_plots(whole, names=("coverage",))
    assert join_folds(whole, [outputs[0], replace(outputs[1], sets=None)]).sets is None
