"""Category codes from the data to the model: training, saving, live prediction, networks, and the refusals."""

import numpy as np
import pandas as pd
import pytest
import quick

from modelfactory.data.dataset import Windows
from modelfactory.data.readers import read_eurusd
from modelfactory.data.splits import MissingColumn, SplitsError, read_split, read_splits
from modelfactory.data.writer import bars_to_splits
from modelfactory.models.loading import load_model
from modelfactory.models.params import resolve_config
from modelfactory.models.registry import ModelRegistry
from modelfactory.runs.examples import train_example
from modelfactory.runs.follow import Follower
from modelfactory.runs.predict import predict_run
from modelfactory.runs.run import load_run
from modelfactory.training.trainer import Trainer

CODED = ("symbol", "hour", "sector", "venue")


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    "Splits of two symbols with a text column and a numeric one; val has a sector that train does not have."
    folder = quick.small_splits(tmp_path_factory.mktemp("coded") / "splits")
    frames = {name: pd.read_parquet(folder / f"{name}_scaled.parquet") for name in ("train", "val", "test")}
    for name, frame in frames.items():
        n = len(frame)
        sector = np.resize(["tech", "energy", None], n) if name == "train" else np.resize(["tech", "banks"], n)
        frames[name] = frame.assign(sector=sector, venue=np.resize([10.0, 9.0, 2.0], n))
    return frames


def test_codes_are_fitted_on_train(frames):
    """Codes equal a dictionary of the sorted values of train; a value that train does not have is 0."""
    splits = read_splits(frames, (5,), categorical=CODED)
    symbols = sorted(frames["train"].symbol.unique())
    hours = sorted({str(h) for h in frames["train"].datetime.dt.hour}, key=int)
    expected = dict(symbol_code=symbols, hour_code=hours, sector_code=["energy", "tech"], venue_code=["2", "9", "10"])
    assert splits.report.categories == expected == splits.report.to_dict()["categories"]
    plain = read_splits(frames, (5,), exclude=("sector", "venue"))
    for name, split in splits.items():
        assert split.features == [*plain[name].features, *expected]
        assert np.array_equal(split.matrix[:, :-4], plain[name].matrix)
        rows = frames[name].sort_values(["symbol", "datetime"], ignore_index=True)
        rows = rows.assign(hour=rows.datetime.dt.hour.astype(str), venue=rows.venue.astype(int).astype(str))
        for code, values in expected.items():
            number = {value: i + 1 for i, value in enumerate(values)}
            assert split.matrix[:, split.features.index(code)].tolist() == [
                number.get(value, 0) for value in rows[code.removesuffix("_code")]
            ]
    assert any(
        w.startswith("val: sector: ") and "(50.00%) have no value that train has" in w for w in splits.report.warnings
    )
    assert "categories" not in plain.report.to_dict()


def test_reading_again_uses_the_stored_categories(frames):
    splits = read_splits(frames, (5,), categorical=CODED)
    features = splits["val"].features[::-1]
    again = read_split(frames["val"], "val", (), features, categories=splits.report.categories)
    assert np.array_equal(again.matrix, splits["val"].matrix[:, ::-1])
    with pytest.raises(MissingColumn, match="no column 'sector', whose category codes are a feature"):
        read_split(frames["val"].drop(columns="sector"), "val", (), features, categories=splits.report.categories)


@pytest.mark.parametrize(
    "names, error, message",
    [
        (("sektor",), MissingColumn, "categorical: no column 'sektor', did you mean 'sector'"),
        (("label_h5",), SplitsError, "'label_h5' is a target column"),
        (("close",), SplitsError, "'close' is a market column"),
        (("symbol", "symbol"), SplitsError, "'symbol_code' would occur twice"),
    ],
)
def test_columns_that_cannot_be_coded(frames, names, error, message):
    with pytest.raises(error, match=message):
        read_splits(frames, (5,), categorical=names)


def test_the_task_sets_the_key_of_the_model(frames):
    config = dict(
        model="lightgbm", horizon=5, data=dict(data="frames", categorical=["symbol", "sector"], exclude=["venue"])
    )
    trainer = Trainer(config, frames)
    assert tuple(trainer.model_config["categorical"]) == ("symbol_code", "sector_code")
    assert Trainer(trainer.resolved_config(), frames).model_config == trainer.model_config
    with pytest.raises(ValueError, match=r"categorical = .* would be ignored.*dataset\.categorical"):
        Trainer(config | dict(config=dict(categorical=("venue",))), frames)
    trainer.build_model()
    assert trainer.model.feature_columns[-2:] == ["symbol_code", "sector_code"]
    members = dict(members=dict(lightgbm={}, gru={}))
    ensemble = resolve_config("average", 5, None, members, categorical=("symbol_code",))
    model = ModelRegistry.create("average", ensemble, 5, ["a", "symbol_code"])
    assert [c["categorical"] for c in model.configs.values()] == [("symbol_code",)] * 2


def test_a_live_prediction_has_the_codes_of_training(tmp_path):
    """Raw bars, one at a time and together, get the probabilities that the stored splits gave."""
    bars = read_eurusd().tail(1500).reset_index(drop=True)
    data = bars_to_splits(bars[:1400], tmp_path / "data", horizons=(5,))
    config = dict(n_rounds=10, min_data_in_leaf=5, params=dict(cat_smooth=0, min_data_per_group=1))
    parameters = dict(
        model="lightgbm", horizon=5, data=str(data), dataset=dict(categorical=["symbol", "hour"]), config=config
    )
    run = load_run(train_example(parameters, tmp_path / "runs"))
    assert run.report["categories"]["symbol_code"] == ["EURUSD"] and len(run.report["categories"]["hour_code"]) == 24
    stored = run.predictions("val").set_index("datetime")
    live = predict_run(run, bars[:1400])
    both = stored.join(live.set_index("datetime"), rsuffix="_live", how="inner")
    assert len(both) > 100
    for name in ("p_down", "p_flat", "p_up"):
        np.testing.assert_allclose(both[f"{name}_live"], both[name], atol=1e-6)
    table = stored.join(predict_run(run, data, split="val").set_index("datetime"), rsuffix="_table", how="left")
    np.testing.assert_allclose(table["p_up_table"], table["p_up"], atol=1e-7)
    follower, later = Follower(run), predict_run(run, bars[1400:], ahead=True).set_index("after")
    pushed = pd.concat([follower.push(bars.iloc[i : i + 20]) for i in range(1400, 1500, 20)]).set_index("after")
    joined = pushed.join(later, rsuffix="_together", how="inner")
    assert len(joined) == 100 and np.allclose(joined.p_up, joined.p_up_together, atol=1e-6)
    assert run.model().feature_importance()["hour_code"] > 0


def test_a_network_embeds_codes(tmp_path):
    """A network learns labels that depend on codes in no order; codes that train does not have are unknown."""
    rng = np.random.default_rng(0)
    n, T = 900, 3
    codes = rng.choice([1, 2, 3, 40, 41, 300], n).astype(np.float32)
    base = np.c_[rng.normal(size=n), codes, rng.normal(size=n)].astype(np.float32)
    X = Windows(base, np.arange(T - 1, n), T)
    group = dict(zip([1, 2, 3, 40, 41, 300], [0, 1, 2, 0, 1, 2], strict=True))
    y = np.array([group[int(c)] for c in codes[T - 1 :]]) - 1
    meta = pd.DataFrame(dict(datetime=pd.date_range("2024", periods=len(y), freq="h"), symbol="A", horizon=5))
    small = dict(sequence_length=T, hidden_size=16, n_layers=1, max_epochs=8, batch_size=64, learning_rate=0.03)

    def fitted(**config):
        model = ModelRegistry.create("gru", small | config, 5, ["a", "code", "b"])
        model.fit(X, y, X, y, meta, meta)
        return model, (model.predict(X, meta).predictions == y).mean()

    (model, accuracy), (_, as_number) = fitted(categorical=("code",)), fitted()
    assert accuracy > 0.9 > as_number + 0.1
    assert model.codes == dict(code=[1, 2, 3, 40, 41, 300])
    assert model.backbone_columns[:3] == ["a", "b", "code[0]"]
    model.save(tmp_path)
    p = model.predict(X, meta).probabilities
    assert np.array_equal(load_model(tmp_path).predict(X, meta).probabilities, p)

    def with_code(code):
        windows = np.asarray(X).copy()
        windows[..., 1] = code
        return model.predict(windows, meta).probabilities

    assert all(np.array_equal(with_code(code), with_code(0)) for code in (4, 42, 299, 301, 5000))
    assert np.abs(with_code(300) - with_code(0)).max() > 0.1
