"Null worlds have their named property and no predictable direction; the evaluation makes few claims on them."

import ast
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import modelfactory
from modelfactory.data.labels import triple_barrier
from modelfactory.data.null_worlds import NULL_WORLDS, NullWorldError, simulate_null
from modelfactory.data.splits import NO_LABEL
from modelfactory.training.null_zoo import (
    BAR_MODELS,
    CLAIM_LABELS,
    CODE_MODULES,
    _last_decided,
    above_limit,
    claim_limit,
    claim_table,
    evaluate_null_market,
    null_features,
    null_models,
    read_results,
    run_zoo,
)

pytestmark = pytest.mark.slow

UNPREDICTABLE_WORLDS = [name for name, w in NULL_WORLDS.items() if not w.predictable]


def labelled(table, horizon=5):
    "Rows with a label."
    return table[table[f"label_h{horizon}"] != NO_LABEL]


def class_shares(name, horizon=20, split=None, n=4):
    "Shares of down, flat, up over several markets."
    tables = [labelled(simulate_null(name, horizon, seed), horizon) for seed in range(n)]
    labels = pd.concat([t if split is None else t[t["split"] == split] for t in tables])[f"label_h{horizon}"]
    return labels.value_counts(normalize=True).reindex([-1, 0, 1], fill_value=0.0).to_numpy()


def up_share(name, **kwargs):
    "Share of up among the labels with a sign."
    down, _, up = class_shares(name, **kwargs)
    return up / (up + down)


def mean_move(table, s):
    "Mean log return of a symbol's bars in standard deviations of a bar, with its standard error."
    moves = np.diff(np.log(table["close"][table["symbol"] == f"NULL{s + 1}"]))
    return moves.mean() / moves.std(), len(moves) ** -0.5


@pytest.mark.parametrize("name", NULL_WORLDS)
def test_a_market_has_the_columns_and_row_counts_of_the_bundled_markets(name):
    table = simulate_null(name, 20, 3)
    columns = ["datetime", "symbol", "open", "high", "low", "close", "volume", "label_h20", "bars_to_hit_h20", "split"]
    assert set(columns) <= set(table)
    counts = table["split"].value_counts()
    assert abs(counts["train"] - 12_000) <= 1 and abs(counts["val"] - 4_000) <= 1 and len(counts) == 2
    assert not table.duplicated(["datetime", "symbol"]).any()
    assert table.groupby("symbol")["datetime"].apply(lambda t: t.is_monotonic_increasing).all()
    assert table["datetime"][table["split"] == "train"].max() < table["datetime"][table["split"] == "val"].min()
    assert (table["low"] > 0).all() and (table["high"] >= table[["open", "close"]].max(axis=1)).all()
    assert (table["low"] <= table[["open", "close"]].min(axis=1)).all()
    assert table["label_h20"][table["split"] == "val"].isin([-1, 0, 1]).all()


@pytest.mark.parametrize("name", NULL_WORLDS)
def test_the_seed_determines_the_market(name):
    table = simulate_null(name, 5, 1)
    assert table.equals(simulate_null(name, 5, 1))
    assert not np.allclose(table["close"], simulate_null(name, 5, 2)["close"])


def test_worlds_of_one_seed_are_different_markets():
    a, b = (np.diff(np.log(simulate_null(name, 5, 0)["close"][:8000])) for name in ("symmetric", "late_labels"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_labels_equal_triple_barrier():
    table = simulate_null("symmetric", 5, 0)
    labels = triple_barrier(table, 5, *NULL_WORLDS["symmetric"].barriers(5))
    settled = (table.groupby("symbol").cumcount() >= 150) & (labels["label_h5"] != NO_LABEL)
    settled &= table["label_h5"] != NO_LABEL
    assert (labels["label_h5"] == table["label_h5"])[settled].mean() > 0.999


@pytest.mark.parametrize("name", ["symmetric", "late_labels", "around_the_clock"])
def test_no_label_of_train_is_decided_in_val(name):
    table = simulate_null(name, 20, 0)
    for _, rows in table.groupby("symbol"):
        train = rows[rows["split"] == "train"]
        last = np.arange(len(train)) + train["bars_to_hit_h20"]
        assert (last[train["label_h20"] != NO_LABEL] < len(train)).all()
        assert (train["label_h20"] == NO_LABEL).any()


def test_the_nearer_barrier_is_touched_more_often():
    up = [up_share(name, horizon=5, n=6) for name in ("symmetric", "barriers_1.1", "barriers_1.5", "barriers_2")]
    assert abs(up[0] - 0.5) < 0.05 and up[3] < 0.32 and (np.diff(up) < 0).all()


def test_prices_have_the_drift_of_the_world():
    for name, drifts in [
        ("symmetric", (0, 0)),
        ("drift_.02", (0.02, 0.02)),
        ("drift_.05", (0.05, 0.05)),
        ("own_drifts", (-0.05, -0.02, 0.02, 0.05)),
        ("daily_bars", (0.03, 0.03)),
    ]:
        tables = [simulate_null(name, 5, seed) for seed in range(4)]
        for s, drift in enumerate(drifts):
            moves = np.array([mean_move(t, s) for t in tables])
            assert abs(moves[:, 0].mean() - drift) < 4 * moves[0, 1] / 2
    assert up_share("drift_.05", n=2) > 0.56


def test_heavy_tails_and_volatility_clusters():
    moves = {
        name: np.diff(np.log(simulate_null(name, 5, 0)["close"][:8000]))
        for name in ("symmetric", "heavy_tails", "volatility_clusters")
    }
    kurtosis = {name: ((x - x.mean()) ** 4).mean() / x.var() ** 2 for name, x in moves.items()}
    assert kurtosis["heavy_tails"] > 5 and abs(kurtosis["symmetric"] - 3) < 0.3
    clusters = {name: np.corrcoef(x[1:] ** 2, x[:-1] ** 2)[0, 1] for name, x in moves.items()}
    assert clusters["volatility_clusters"] > 0.1 and abs(clusters["symmetric"]) < 0.04


def test_closes_have_bid_ask_bounce_and_the_mid_has_not():
    table = simulate_null("bid_ask_bounce", 5, 0)[:8000]
    moves = {c: np.diff(np.log(table[c])) for c in ("close", "mid")}
    lag = {c: np.corrcoef(x[1:], x[:-1])[0, 1] for c, x in moves.items()}
    assert lag["close"] < -0.1 and abs(lag["mid"]) < 0.04


def test_ten_symbols_are_a_minute_apart():
    table = simulate_null("ten_out_of_step", 5, 0)
    assert table["symbol"].nunique() == 10 and table["datetime"].is_unique
    first = table.groupby("symbol", sort=False)["datetime"].min()
    assert (first.diff().dropna() == pd.Timedelta("1min")).all()


def test_one_symbol_trades_around_the_clock_and_the_other_has_sessions():
    always, sessions = (t["datetime"] for _, t in simulate_null("around_the_clock", 5, 0).groupby("symbol"))
    assert (always.diff().dropna() == pd.Timedelta("15min")).all()
    assert sessions.dt.dayofweek.max() == 4 and sessions.dt.hour.between(9, 15).all()
    assert sessions.min() - always.min() < pd.Timedelta("1D") and always.max() - sessions.max() < pd.Timedelta("3D")


def test_the_sparse_symbol_has_80_rows_across_all_of_val():
    val = simulate_null("sparse_symbol", 5, 0).query("split == 'val'")
    assert val["symbol"].value_counts().tolist() == [1960, 1960, 80]
    sparse, full = val[val["symbol"] == "NULL3"]["datetime"], val[val["symbol"] == "NULL1"]["datetime"]
    assert (sparse.max() - sparse.min()) / (full.max() - full.min()) > 0.95


def test_daily_bars_late_labels_and_moving_shares():
    days = simulate_null("daily_bars", 5, 0)["datetime"]
    assert (days == days.dt.normalize()).all() and days.dt.dayofweek.max() == 4
    late = labelled(simulate_null("late_labels", 5, 0))["bars_to_hit_h5"]
    assert late.max() == 15 and (late > 5).mean() > 0.1
    volatile = np.abs(class_shares("moving_shares", split="train") - class_shares("moving_shares", split="val"))
    constant = np.abs(class_shares("symmetric", split="train") - class_shares("symmetric", split="val"))
    assert volatile[1] > 0.15 and constant[1] < 0.05


def test_unknown_world_and_invalid_horizon_raise():
    with pytest.raises(NullWorldError, match="symmetric"):
        simulate_null("symetric")
    with pytest.raises(NullWorldError, match="1 to 20"):
        simulate_null("late_labels", 21)


def direction_correlations(name, seeds):
    "Correlation of the label's sign with past returns and volatility, less symbol means; one row a market."
    values = []
    for seed in seeds:
        table = simulate_null(name, 5, seed)
        X, sign = null_features(table), np.sign(table["label_h5"].to_numpy(float))
        keep = (table["label_h5"] != NO_LABEL) & (sign != 0) & np.isfinite(X).all(1)
        X, sign, symbol = pd.DataFrame(X[keep]), pd.Series(sign[keep]), table["symbol"][keep].to_numpy()
        X, sign = X - X.groupby(symbol).transform("mean"), sign - sign.groupby(symbol).transform("mean")
        values.append((X.mul(sign, axis=0).mean() / X.std() / sign.std()).to_numpy())
    return np.array(values)


@pytest.mark.parametrize("name", UNPREDICTABLE_WORLDS)
def test_past_bars_do_not_predict_the_direction(name):
    r = direction_correlations(name, range(8))
    t = r.mean(0) / (r.std(0, ddof=1) / len(r) ** 0.5)
    assert (np.abs(t) < 4.5).all() or np.abs(r.mean(0)).max() < 0.02


def test_the_mean_reverting_world_is_predictable_and_marked_so():
    assert NULL_WORLDS["mean_reverting"].predictable
    assert np.abs(direction_correlations("mean_reverting", range(3)).mean(0)).max() > 0.1


def test_predictions_do_not_change_with_later_bars_or_labels():
    "Rules and fitted models do not use later bars; models without bars do not depend on any bar."
    table = simulate_null("symmetric", 5, 0)
    changed, seed = table.copy(), 1
    cut = table["datetime"][table["split"] == "val"].iloc[1000]
    later = (table["datetime"] > cut).to_numpy()
    prices = ["open", "high", "low", "close"]
    changed.loc[later, prices] = changed.loc[later, prices] * 1.1
    row = table.groupby("symbol").cumcount()
    undecided = row + table["bars_to_hit_h5"] > row[table["datetime"] == cut].iloc[0]
    undecided &= table["split"] == "val"
    changed.loc[undecided, "label_h5"] = -changed.loc[undecided, "label_h5"]
    a, b = (null_models(t, null_features(t), {}, 5, seed)[0] for t in (table, changed))
    early = ~later[table["split"] == "val"]
    assert all(np.array_equal(a[name][early], b[name][early]) for name in a)
    assert all(np.array_equal(a[name], b[name]) == (name not in BAR_MODELS) for name in a)


def test_null_models_cover_constant_frequent_and_slow_calls():
    table = simulate_null("barriers_2", 5, 0)
    models, shares = null_models(table, null_features(table), {}, 5)
    val = table[table["split"] == "val"]
    calls = {name: p.argmax(1) - 1 for name, p in models.items()}
    assert (calls["up"] == 1).all() and set(calls["random"]) == {-1, 1} and np.isclose(shares.sum(), 1)
    changes = {name: (np.diff(calls[name]) != 0).mean() for name in ("random", "slow", "momentum")}
    assert changes["random"] > 0.4 and changes["slow"] < 0.1 and changes["momentum"] < 0.2
    for name in ("symbol", "prior"):
        assert (val.assign(call=calls[name]).groupby("symbol")["call"].nunique() == 1).all()


def test_results_are_stored_and_read_again(tmp_path):
    first = run_zoo(1, ("symmetric",), workers=0, folder=tmp_path)
    line = (tmp_path / "symmetric.jsonl").read_text()
    again = run_zoo(1, ("symmetric",), workers=0, folder=tmp_path)
    assert (tmp_path / "symmetric.jsonl").read_text() == line and again.claims[0] == first.claims[0]
    (tmp_path / "symmetric.jsonl").write_text(json.dumps(json.loads(line) | dict(code="earlier")) + "\n")
    assert len(read_results(tmp_path)) == 0 and len(read_results(tmp_path, any_code=True)) == 1


def test_a_share_of_claims_is_compared_with_its_limit():
    no_claim = dict.fromkeys(CLAIM_LABELS, False) | dict(old_direction=True, profit=None)
    claims = [no_claim | dict(direction=i < 20) for i in range(200)]
    table = claim_table(pd.DataFrame(dict(world="a", claims=claims)))
    assert table.loc["a", "direction"] == 0.1 and np.isnan(table.loc["a", "profit"])
    assert round(claim_limit(200), 3) == 0.081 and above_limit(table) == [("a", "direction", 0.1)]


def test_the_limit_of_cards_is_one_sided():
    "A card claims skill if the 95% interval is above 0: 2.5% of null cards, not 5%."
    assert round(claim_limit(200, "card"), 3) == 0.047
    table = claim_table(pd.DataFrame(dict(world="a", claims=[dict(card=0.06, direction=False)] * 200)))
    assert above_limit(table) == [("a", "card", 0.06)]


def test_the_hash_covers_every_module_of_data_and_evaluation_that_the_zoo_uses():
    package = Path(modelfactory.__file__).parent

    def imported_modules(name):
        "Modules of the package that a module imports from."
        source = (package / f"{name.replace('.', '/')}.py").read_text(encoding="utf8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = [*name.split(".")[: -node.level], *(node.module or "").split(".")]
            for parts in [base, *([*base, alias.name] for alias in node.names)]:
                if (package / f"{'/'.join(parts)}.py").is_file():
                    yield ".".join(parts)

    direct = {m for m in imported_modules("training.null_zoo") if m.split(".")[0] in ("data", "evaluation", "models")}
    assert direct - {"models.code"} <= set(CODE_MODULES)
    assert "data.splits" in set(imported_modules("evaluation.significance")) & set(CODE_MODULES)


def test_last_decided_is_the_newest_label_that_is_decided():
    table = simulate_null("sparse_symbol", 5, 0)
    label, hit = table["label_h5"].to_numpy(int), table["bars_to_hit_h5"].to_numpy(int)
    newest = _last_decided(table, label, hit)
    for _, rows in table.groupby("symbol").indices.items():
        for t in range(0, len(rows), 97):
            decided = [j for j in rows[max(0, t - 300) : t + 1] if label[j] != NO_LABEL and j - rows[0] + hit[j] <= t]
            assert newest[rows[t]] == (label[decided[-1]] if decided else 0)


WORST_WORLDS = ("barriers_1.5", "drift_.05", "own_drifts", "sparse_symbol")


def test_few_claims_in_worlds_with_uneven_class_shares():
    "A constant call passed the earlier rule in many of these 16 markets; now at most three claims are allowed."
    results = pd.DataFrame([evaluate_null_market(name, seed) for name in WORST_WORLDS for seed in range(4)])
    shares = claim_table(results.assign(world="all")).loc["all"]
    assert shares.old_direction >= 0.4
    assert shares[["direction", "profit", "log_loss", "worse_slow", "worse_elsewhere"]].max() <= 3 / 16
    assert shares.card <= 0.05
