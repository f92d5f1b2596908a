"Finished runs made in milliseconds: random predictions, scored by the evaluator and published like those of a model."

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from modelfactory.evaluation.baselines import baseline_predictions
from modelfactory.evaluation.evaluator import SCORING_VERSION, ModelEvaluator
from modelfactory.models.base import to_output
from modelfactory.runs.attempt import (
    add_predictions,
    add_scores,
    close_attempt,
    prediction_frame,
    publish,
    publish_fitted,
)
from modelfactory.runs.grid import make_trainer
from modelfactory.runs.run import load_run
from modelfactory.runs.run_folder import RESULT_FILE, start_attempt, write_json


def bars(n=400, symbols=("A", "B"), horizon=5, shares=(1, 1, 1), seed=0, freq="h"):
    "Labels of overlapping noise with the given class shares, and prices independent of them."
    rng = np.random.default_rng(seed)
    parts = []
    for symbol in symbols:
        noise = rng.normal(size=n + horizon).cumsum()
        score = pd.Series(noise[horizon:] - noise[:-horizon]).rank(pct=True).to_numpy()
        y = np.digitize(score, np.cumsum(shares)[:-1] / np.sum(shares)) - 1
        close = 100 * np.exp(0.001 * rng.normal(size=n).cumsum())
        times = pd.date_range("2024-01-02", periods=n, freq=freq)
        parts.append(pd.DataFrame(dict(datetime=times, symbol=symbol, y_true=y.astype(np.int8), close=close)))
    return pd.concat(parts, ignore_index=True)


def probabilities(table, skill=0.0, seed=0, classes=(-1, 0, 1)):
    "Probabilities from autocorrelated noise; with `skill` the true class is more likely."
    rng = np.random.default_rng(seed)
    k = len(classes)
    logits = pd.DataFrame(rng.normal(size=(len(table), k))).rolling(5, min_periods=1).mean().to_numpy()
    logits = logits + skill * np.eye(k)[pd.Index(classes).get_indexer(table.y_true)]
    p = np.exp(0.5 * logits)
    return p / p.sum(1, keepdims=True)


def fitted_run(runs, task, splits=("val",), scored=False):
    "A run that was fitted in this process by the steps of train.ipynb, without figures, and scored on request."
    trainer = make_trainer(task)
    trainer.train()
    attempt = start_attempt(Path(runs), dict(model=trainer.config.model, horizon=trainer.config.horizon))
    run = publish_fitted(trainer, attempt)
    for split in splits:
        trainer.predict(split, run)
        add_predictions(trainer, run)
        if scored:
            trainer.score_split(split)
    if scored:
        add_scores(trainer, run, {})
    close_attempt(attempt, run)
    return load_run(run)


def make_run(
    runs,
    model,
    table,
    *,
    data="/data/bars",
    horizon=5,
    seed=42,
    skill=0.0,
    noise=0,
    code="code",
    fingerprint=None,
    classes=(-1, 0, 1),
    scoring=SCORING_VERSION,
    prices=True,
    daily=None,
    p=None,
    family="examples",
    n_boot=20,
):
    "A finished run whose predictions of `table` have the given skill; each `data` has a different fingerprint."
    if fingerprint is None:
        is_default = str(data) == "/data/bars"
        fingerprint = "f" * 16 if is_default else hashlib.blake2b(str(data).encode(), digest_size=8).hexdigest()
    p = probabilities(table, skill, [noise, seed, *model.encode()], classes) if p is None else p
    meta = table[["datetime", "symbol"]].assign(horizon=horizon)
    output, y = to_output(p, meta, classes), table.y_true.to_numpy()
    evaluator = ModelEvaluator(horizon, classes=classes, n_boot=n_boot)
    closes = table[["datetime", "symbol", "close"]] if prices else None
    attempt = start_attempt(Path(runs), dict(model=model, horizon=horizon))
    resolved = dict(
        model=model,
        horizon=horizon,
        preset=None,
        seed=seed,
        cost_bps=1.0,
        trading_days=252,
        config={},
        data=dict(data=str(data), gap=1, classes=list(classes), features=[], exclude=[], nan=None, prices=None),
    )
    (attempt / "config.yaml").write_text(yaml.safe_dump(resolved))
    (attempt / "predictions").mkdir()
    prediction_frame(output, classes, y).to_parquet(attempt / "predictions/val_predictions.parquet", index=False)
    metrics = evaluator.compute_all_metrics(output, y, closes) | dict(fit_seconds=1.0, predict_seconds=0.1)
    prior = baseline_predictions("prior", y, meta, classes)
    baselines = dict(prior=evaluator.compute_all_metrics(prior, y, closes))
    write_json(attempt / "metrics/metrics.json", metrics)
    write_json(attempt / "metrics/baselines.json", baselines)
    write_json(attempt / "metrics/history.json", {})
    write_json(
        attempt / "splits.json",
        dict(excluded=[["volume", "market", "raw"]], labels=[], warnings=[], splits=[], n_features=3),
    )
    if prices and daily is None:
        result = evaluator.backtest(output, closes, y)
        daily = result.daily if result else None
    if daily is not None:
        daily.rename_axis("day").reset_index().to_parquet(attempt / "predictions/val_daily.parquet", index=False)
    identity = hashlib.blake2b(json.dumps([resolved, fingerprint, code]).encode(), digest_size=8).hexdigest()
    shares = [float((y == c).mean()) for c in classes]
    write_json(
        attempt / RESULT_FILE,
        dict(
            model=model,
            family=family,
            horizon=horizon,
            data=str(data),
            data_fingerprint=fingerprint,
            seed=seed,
            identity=identity,
            code=code,
            splits=["val"],
            seconds={},
            train_shares=shares,
            versions=dict(modelfactory="0"),
        )
        | (dict(scoring=scoring) if scoring > 1 else {}),
    )
    return load_run(publish(attempt, runs))
