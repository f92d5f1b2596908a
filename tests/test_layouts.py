"Bars of each published layout give the same seven columns; what cannot be decided is one error with the call."

import gzip
import json
import warnings
import zipfile
from datetime import date

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from modelfactory.data import readers
from modelfactory.data.layouts import BarsError
from modelfactory.data.readers import check_bars, closes_to_bars, read_bars

N = 40  # hourly bars, the last of them on the 14th: a day that cannot be a month


def reference(step="1h", start="2024-03-13 10:00", symbol="EURUSD", n=N, seed=0):
    "Bars whose values have few digits, so that text holds them exactly."
    rng = np.random.default_rng(seed)
    close = (1.1 + rng.integers(-50, 50, n).cumsum() / 1e5).round(5)
    open_ = np.r_[1.1, close[:-1]]
    high = (np.maximum(open_, close) + rng.integers(1, 9, n) / 1e5).round(5)
    low = (np.minimum(open_, close) - rng.integers(1, 9, n) / 1e5).round(5)
    times = pd.date_range(start, periods=n, freq=step, unit="ns")
    columns = dict(datetime=times, symbol=symbol, open=open_, high=high, low=low, close=close)
    return pd.DataFrame(columns | dict(volume=rng.integers(1, 999, n).astype(float)))


HOURS, DAYS = reference(), reference("1D", "2024-03-13")
UTC_HOURS = HOURS.assign(datetime=HOURS.datetime.dt.tz_localize("UTC"))
TWO = pd.concat([DAYS, reference("1D", "2024-03-13", "GBPUSD", seed=1)], ignore_index=True)
LAYOUTS = {}  # name -> (expected bars, function of folder and bars that gives the arguments of read_bars)


def layout(expected=HOURS, says=None, name=None, **options):
    "Registers a layout: its function writes the expected bars and returns what `read_bars` reads."

    def add(write):
        LAYOUTS[name or write.__name__] = expected, says, options, write
        return write

    return add


def epochs(bars, unit):
    return bars.datetime.astype(f"datetime64[{unit}]").astype("int64")


def text_file(folder, name, lines, encoding="utf-8"):
    (folder / name).write_bytes(("\r\n".join(lines) + "\r\n").encode(encoding))
    return folder / name


def prices(row):
    return f"{row.open:.5f}", f"{row.high:.5f}", f"{row.low:.5f}", f"{row.close:.5f}"


def joined(bars, mark, start, end):
    "A line a bar: what `start` gives, the prices, what `end` gives."
    return [mark.join([*start(r), *prices(r), *end(r)]) for r in bars.itertuples()]


def stamp(form):
    return lambda row: row.datetime.strftime(form).split("|")


def volume(row):
    return [f"{row.volume:.0f}"]


# MetaTrader -----------------------------------------------------------------------------------------------------------

MT5 = ["<DATE>", "<TIME>", "<OPEN>", "<HIGH>", "<LOW>", "<CLOSE>", "<TICKVOL>", "<VOL>", "<SPREAD>"]


@layout(says="read as MetaTrader 5 export: symbol EURUSD from the name, volume from <TICKVOL>")
def mt5_export(folder, bars):
    lines = joined(bars, "\t", stamp("%Y.%m.%d|%H:%M:%S"), lambda r: [*volume(r), "0", "7"])
    return text_file(folder, "EURUSD_H1_202403131000_202403150100.csv", ["\t".join(MT5), *lines])


@layout(DAYS, says="read as MetaTrader 5 export")
def mt5_daily_without_time(folder, bars):
    lines = joined(bars, "\t", stamp("%Y.%m.%d"), lambda r: [*volume(r), "0", "7"])
    return text_file(folder, "EURUSD_Daily.csv", ["\t".join(MT5[:1] + MT5[2:]), *lines])


@layout(says="volume from <VOL>")
def mt5_export_of_an_exchange_in_utf_16(folder, bars):
    lines = joined(bars, "\t", stamp("%Y.%m.%d|%H:%M:%S"), lambda r: ["1", *volume(r), "7"])
    return text_file(folder, "EURUSD_M15_2024.csv", ["\t".join(MT5), *lines], "utf-16")


@layout(says="read as MetaTrader 5 copy_rates: volume from tick_volume, times in s since 1970", symbol="EURUSD")
def mt5_copy_rates(folder, bars):
    rates = bars.drop(columns=["datetime", "symbol", "volume"]).assign(time=epochs(bars, "s"))
    rates = rates.assign(tick_volume=bars.volume.astype("uint64"), spread=3, real_volume=0)
    return rates.to_records(index=False)


@layout(says="read as MetaTrader 4 export: symbol EURUSD from the name")
def mt4_export(folder, bars):
    lines = joined(bars, ",", stamp("%Y.%m.%d|%H:%M"), volume)
    return text_file(folder, "EURUSD60.csv", lines, "utf-8-sig")


@layout(says="read as MetaTrader 4 export: symbol EURUSD from the name")
def histdata_zip(folder, bars):
    with zipfile.ZipFile(folder / "HISTDATA_COM_MT_EURUSD_M1_202403.zip", "w") as archive:
        lines = joined(bars, ",", stamp("%Y.%m.%d|%H:%M"), volume)
        archive.writestr("DAT_MT_EURUSD_M1_202403.csv", "\n".join(lines))
        archive.writestr("DAT_MT_EURUSD_M1_202403.txt", "gaps: none")
    return folder / "HISTDATA_COM_MT_EURUSD_M1_202403.zip"


# Exchanges of digital assets ------------------------------------------------------------------------------------------


def klines(bars, unit):
    step = {"ms": 3_600_000, "us": 3_600_000_000}[unit]
    start = dict(zip(bars.datetime, epochs(bars, unit), strict=True))
    after = [f"{step - 1}", "1.5", "9", "0.5", "0.6", "0"]

    def end(row):
        return [f"{row.volume:.8f}", str(start[row.datetime] + step - 1), *after[1:]]

    return joined(bars, ",", lambda r: [str(start[r.datetime])], end)


BTC = HOURS.assign(symbol="BTCUSDT")
KLINE_NAMES = (
    "open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume,ignore"
)


@layout(BTC, says="read as Binance klines: symbol BTCUSDT from the name, times in ms since 1970")
def binance_ms(folder, bars):
    return text_file(folder, "BTCUSDT-1h-2024-03.csv", klines(bars, "ms"))


@layout(BTC, says="times in us since 1970")
def binance_us_zip(folder, bars):
    with zipfile.ZipFile(folder / "BTCUSDT-1h-2024-03.zip", "w") as archive:
        archive.writestr("BTCUSDT-1h-2024-03.csv", "\n".join(klines(bars, "us")))
    return folder / "BTCUSDT-1h-2024-03.zip"


@layout(BTC, says="read as Binance klines")
def binance_with_names(folder, bars):
    return text_file(folder, "BTCUSDT-1h-2024-03.csv", [KLINE_NAMES, *klines(bars, "ms")])


@layout(BTC, says="read as Binance klines: 2 files or tables, symbol BTCUSDT from the name, times in ms since 1970")
def binance_months_that_overlap(folder, bars):
    lines = klines(bars, "ms")
    text_file(folder, "BTCUSDT-1h-2024-03.csv", lines[:25])
    text_file(folder, "BTCUSDT-1h-2024-04.csv", lines[22:])
    return folder


@layout(BTC, says="read as Binance klines: symbol BTCUSDT from the name, times in ms since 1970")
def binance_zip_of_pandas(folder, bars):
    "pandas writes a zipped file whose member has no suffix."
    table = pd.DataFrame([line.split(",") for line in klines(bars, "ms")])
    table.to_csv(folder / "BTCUSDT-1h-2024-03.zip", header=False, index=False)
    return folder / "BTCUSDT-1h-2024-03.zip"


@layout(says="read as Kraken OHLCVT file: symbol EURUSD from the name, times in s since 1970")
def kraken_file(folder, bars):
    start = dict(zip(bars.datetime, epochs(bars, "s"), strict=True))
    lines = joined(bars, ",", lambda r: [str(start[r.datetime])], lambda r: [*volume(r), "12"])
    return text_file(folder, "EURUSD_60.csv", lines)


@layout(says="read as Kraken OHLC of its REST API", symbol="EURUSD")
def kraken_rest(folder, bars):
    times = epochs(bars, "s").tolist()
    return [[t, *prices(r), prices(r)[1], *volume(r), 7] for t, r in zip(times, bars.itertuples(), strict=True)]


@layout(says="read as ccxt rows: times in ms since 1970", symbol="EURUSD")
def ccxt_rows(folder, bars):
    return bars.drop(columns="symbol").assign(datetime=epochs(bars, "ms")).to_numpy().tolist()


@layout(symbol="EURUSD", says="2 files or tables")
def ccxt_pages_that_overlap(folder, bars):
    rows = ccxt_rows(folder, bars)
    return iter([rows[:30], rows[25:]])


@layout(symbol="EURUSD", says="read as Coinbase candles")
def coinbase_rows(folder, bars):
    table = bars[["low", "high", "open", "close", "volume"]].to_numpy()
    return [[t, *row] for t, row in zip(epochs(bars, "s").tolist(), table.tolist(), strict=True)][::-1]


@layout(symbol="EURUSD", says="read as Coinbase candles: times in s since 1970")
def coinbase_dictionaries(folder, bars):
    table = bars.assign(start=epochs(bars, "s"))[["start", "low", "high", "open", "close", "volume"]]
    return table.astype(str).to_dict("records")


# Data vendors ---------------------------------------------------------------------------------------------------------

TITLES = ["Open", "High", "Low", "Close"]


def yahoo(bars):
    "Prices of yfinance: an index of dates, one column a field."
    table = bars.set_index(bars.datetime.rename("Date"))[["open", "high", "low", "close", "volume"]]
    return table.rename(columns=str.title)


@layout(DAYS, says="read as Yahoo Finance: symbol EURUSD from the name, prices not adjusted")
def yahoo_file(folder, bars):
    yahoo(bars).assign(**{"Adj Close": bars.close.to_numpy() * 0.9}).to_csv(folder / "EURUSD.csv")
    return folder / "EURUSD.csv"


def two_levels(bars, symbol_first):
    tables = {symbol: yahoo(part) for symbol, part in bars.groupby("symbol", sort=False)}
    table = pd.concat(tables, axis=1, names=["Ticker", "Price"])
    return table if symbol_first else table.swaplevel(axis=1)


@layout(TWO, says="read as Yahoo Finance")
def yfinance_prices_over_tickers(folder, bars):
    return two_levels(bars, False)


@layout(TWO[:-1], says="read as Yahoo Finance: 1 row without a price left out")
def yfinance_tickers_over_prices(folder, bars):
    return two_levels(bars, True)


@layout(DAYS, says="read as Yahoo Finance")
def yfinance_file_of_three_header_rows(folder, bars):
    two_levels(bars, False).to_csv(folder / "prices.csv")
    assert (folder / "prices.csv").read_text().splitlines()[2].startswith("Date,,")
    return folder / "prices.csv"


@layout(symbol="EURUSD")
def yfinance_intraday(folder, bars):
    return yahoo(bars).rename_axis("Datetime")


@layout(says="read as TradingView export: symbol EURUSD from the name, times in s since 1970")
def tradingview_epoch(folder, bars):
    table = bars.assign(time=epochs(bars, "s"))[["time", "open", "high", "low", "close", "volume"]]
    table = table.rename(columns=dict(volume="Volume"))
    table.assign(MA=[None] * 5 + [1.0] * (len(bars) - 5)).to_csv(folder / "FX_EURUSD, 60.csv", index=False)
    return folder / "FX_EURUSD, 60.csv"


@layout(UTC_HOURS, says="read as TradingView export")
def tradingview_iso(folder, bars):
    table = bars.assign(time=bars.datetime.dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
    table[["time", "open", "high", "low", "close", "volume"]].to_csv(folder / "FX_EURUSD, 60.csv", index=False)
    return folder / "FX_EURUSD, 60.csv"


DUKASCOPY = "EURUSD_Candlestick_1_Hour_BID_13.03.2024-15.03.2024.csv"


@layout(says="read as Dukascopy export: symbol EURUSD from the name")
def dukascopy_gmt(folder, bars):
    lines = joined(bars, ",", stamp("%d.%m.%Y %H:%M:%S.000"), volume)
    return text_file(folder, DUKASCOPY, ["Gmt time,Open,High,Low,Close,Volume", *lines])


@layout(
    UTC_HOURS.assign(datetime=UTC_HOURS.datetime.dt.tz_convert("Europe/Berlin")),
    says="read as Dukascopy export",
    tz="Europe/Berlin",
)
def dukascopy_local(folder, bars):
    lines = joined(bars, ",", stamp("%d.%m.%Y %H:%M:%S.000 GMT%z"), volume)
    return text_file(folder, DUKASCOPY, ["Local time,Open,High,Low,Close,Volume", *lines])


@layout(UTC_HOURS, says="read as Dukascopy export")
def dukascopy_local_over_the_change_to_summer_time(folder, bars):
    local = bars.datetime.dt.tz_convert("Europe/Berlin")
    moved = bars.assign(
        datetime=local.where(bars.index % 2 == 0, bars.datetime.dt.tz_convert("Europe/Athens").astype(object))
    )
    return dukascopy_local(folder, moved)


@layout(DAYS, says="symbol EURUSD from the name")
def stooq_daily(folder, bars):
    return text_file(folder, "EURUSD.csv", ["Date,Open,High,Low,Close,Volume", *joined(bars, ",", stamp("%F"), volume)])


@layout(says="read as Stooq export")
def stooq_file(folder, bars):
    header = "<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>"
    lines = joined(bars, ",", stamp("EURUSD|60|%Y%m%d|%H%M%S"), lambda r: [*volume(r), "0"])
    return text_file(folder, "eurusd.txt", [header, *lines])


def letters(bars, **more):
    names = dict(open="o", high="h", low="l", close="c", volume="v")
    return bars.rename(columns=names)[[*names.values()]].assign(**more)


@layout(UTC_HOURS, says="read as Alpaca or Polygon bars")
def alpaca_json(folder, bars):
    times = bars.datetime.dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    return letters(bars, t=times, S="EURUSD", n=9, vw=1.1).to_dict("records")


@layout(says="read as Alpaca or Polygon bars: times in ms since 1970")
def polygon_grouped(folder, bars):
    return letters(bars, T="EURUSD", t=epochs(bars, "ms"), n=9, vw=1.1).to_dict("records")


@layout(says="read as Polygon flat file: times in ns since 1970")
def polygon_flat_file(folder, bars):
    columns = dict(ticker=bars.symbol, volume=bars.volume, open=bars.open, close=bars.close, high=bars.high)
    table = pd.DataFrame(columns | dict(low=bars.low, window_start=epochs(bars, "ns"), transactions=4))
    table.to_csv(folder / "2024-03-13.csv.gz", index=False)
    return folder / "2024-03-13.csv.gz"


@layout(TWO, says="read as Alpaca bars")
def alpaca_frame(folder, bars):
    table = bars.assign(tradeCount=3, vwap=1.1).rename(columns=dict(datetime="timestamp"))
    return table.set_index(["symbol", "timestamp"])


@layout(DAYS, says="read as Alpha Vantage", symbol="EURUSD")
def alpha_vantage_json(folder, bars):
    names = {c: f"{i}. {c}" for i, c in enumerate(["open", "high", "low", "close", "volume"], 1)}
    table = bars.rename(columns=names)[[*names.values()]].astype(str)
    return pd.DataFrame(table.set_index(bars.datetime.dt.strftime("%Y-%m-%d")).to_dict("index")).T[::-1]


@layout(DAYS, says="symbol EURUSD from the name")
def alpha_vantage_file(folder, bars):
    table = bars.drop(columns="symbol").rename(columns=dict(datetime="timestamp"))
    table[::-1].to_csv(folder / "daily_EURUSD.csv", index=False)
    return folder / "daily_EURUSD.csv"


@layout(says="read as NinjaTrader export", symbol="EURUSD")
def ninjatrader(folder, bars):
    return text_file(folder, "EURUSD.Last.txt", joined(bars, ";", stamp("%Y%m%d %H%M%S"), volume))


@layout(says="read as FirstRate Data file: symbol EURUSD from the name")
def firstrate(folder, bars):
    return text_file(folder, "EURUSD_1hour_sample.txt", joined(bars, ",", stamp("%F %T"), volume))


@layout(says="read as date, time, OHLCV without header")
def kibot(folder, bars):
    return text_file(folder, "EURUSD.txt", joined(bars, ",", stamp("%m/%d/%Y|%H:%M"), volume))


@layout(says="dates as %m/%d/%Y %H:%M")
def slashes_with_the_month_first(folder, bars):
    bars = bars.assign(Date=bars.datetime.dt.strftime("%m/%d/%Y %H:%M")).drop(columns=["datetime", "symbol"])
    bars.to_csv(folder / "EURUSD.tsv", index=False, sep="\t")
    return folder / "EURUSD.tsv"


@layout(symbol="EURUSD", says="dates as %d.%m.%Y %H:%M")
def semicolons_decimal_commas_and_a_byte_order_mark(folder, bars):
    table = bars.assign(datetime=bars.datetime.dt.strftime("%d.%m.%Y %H:%M"))
    table.to_csv(folder / "kurse.CSV", sep=";", decimal=",", index=False, encoding="utf-8-sig")
    return folder / "kurse.CSV"


# Frames ---------------------------------------------------------------------------------------------------------------


@layout(TWO, name="multiindex_time_symbol")
def multiindex(folder, bars):
    return bars.set_index(["datetime", "symbol"])


@layout(TWO, name="multiindex_without_names")
def multiindex_without_names(folder, bars):
    return bars.set_index(["symbol", "datetime"]).rename_axis([None, None]).sample(frac=1, random_state=0).sort_index()


@layout(symbol="EURUSD")
def index_without_a_name_in_capitals(folder, bars):
    return bars.set_index("datetime").rename_axis(None).drop(columns="symbol").rename(columns=str.upper)


@layout(TWO)
def arrow_table(folder, bars):
    return pa.Table.from_pandas(bars, preserve_index=False)


@layout(TWO)
def arrow_batches(folder, bars):
    return pa.RecordBatchReader.from_batches((t := arrow_table(folder, bars)).schema, t.to_batches())


@layout(TWO)
def polars_frame(folder, bars):
    return pytest.importorskip("polars").from_pandas(bars)


@layout(TWO)
def polars_lazy_frame(folder, bars):
    return polars_frame(folder, bars).lazy()


@layout(TWO)
def duckdb_relation(folder, bars):
    duckdb = pytest.importorskip("duckdb")
    bars.to_parquet(folder / "bars.parquet")
    prices = ", ".join(f"{c}::decimal(12, 5) as {c}" for c in ("open", "high", "low", "close"))
    return duckdb.sql(f"select datetime, symbol, {prices}, volume from '{folder / 'bars.parquet'}' order by 2, 1")


@layout(TWO)
def iterator_of_frames(folder, bars):
    return (part for _, part in bars.groupby("symbol"))


@layout(TWO)
def dictionary_of_frames(folder, bars):
    return {symbol: yahoo(part) for symbol, part in bars.groupby("symbol")}


@layout(TWO)
def pattern_of_feather_files(folder, bars):
    for symbol, part in bars.groupby("symbol"):
        part.drop(columns="symbol").reset_index(drop=True).to_feather(folder / f"{symbol}.feather")
    return str(folder / "*.feather")


@layout(TWO)
def parquet_file(folder, bars):
    bars.to_parquet(folder / "two.parquet")
    return folder / "two.parquet"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_same_seven_columns(name, tmp_path):
    expected, says, options, write = LAYOUTS[name]
    bars = read_bars(write(tmp_path, expected), **options)
    pd.testing.assert_frame_equal(bars, check_bars(expected), check_exact=True)
    assert (says or "read as bars, by the names of the columns") in bars.attrs["layout"]
    again = json.loads(json.dumps(bars.attrs["source"]))
    pd.testing.assert_frame_equal(read_bars(write(tmp_path, expected), options.get("symbol"), **again), bars)


def test_the_table_has_the_layouts_of_the_issue():
    assert len(LAYOUTS) >= 45


# Options --------------------------------------------------------------------------------------------------------------


def test_options_name_columns_that_no_layout_has(tmp_path):
    names = dict(open="PX_O", high="PX_H", low="PX_L", close="PX_C")
    table = HOURS.rename(columns=names | dict(datetime="When", symbol="Code")).drop(columns="volume")
    options = dict(columns=names | dict(datetime="When", symbol="Code", volume=None))
    bars = read_bars(table, **options)
    pd.testing.assert_frame_equal(bars, check_bars(HOURS.assign(volume=0.0)))
    assert bars.attrs["source"]["columns"] == options["columns"] and "volume set to 0" in bars.attrs["layout"]
    text_file(
        tmp_path, "EURUSD.csv", [",".join([*prices(r), f"{r.datetime:%Y-%m-%d %H:%M}"]) for r in HOURS.itertuples()]
    )
    positions = dict(open=0, high=1, low=2, close=3, datetime=4, volume=None)
    pd.testing.assert_frame_equal(read_bars(tmp_path / "EURUSD.csv", columns=positions), bars)
    words = {role: "" if n is None else str(n) for role, n in positions.items()}  # as from the command line
    pd.testing.assert_frame_equal(read_bars(tmp_path / "EURUSD.csv", columns=words), bars)
    day, time = HOURS.datetime.dt.strftime("%Y-%m-%d"), HOURS.datetime.dt.strftime("%H:%M")
    table = HOURS.drop(columns="datetime").assign(Tag=day, Uhr=time)
    pd.testing.assert_frame_equal(read_bars(table, columns=dict(datetime=["Tag", "Uhr"])), check_bars(HOURS))


def test_a_text_file_is_left_out_only_beside_a_table_of_the_same_name(tmp_path):
    for name in ("A.csv", "A.txt", "B.txt"):
        (tmp_path / name).write_text("a report" if name == "A.txt" else daily("2020-01-02"))
    assert read_bars(tmp_path).symbol.tolist() == ["A", "B"]


def test_codes_keep_their_zeros(tmp_path):
    row = "{},2020-01-02,1.1,1.3,1.0,1.2,5\n"
    for name, codes in dict(symbol=["600000", "000001"], Kod=["001", "002"]).items():
        text = f"{name},date,open,high,low,close,volume\n" + "".join(map(row.format, codes))
        (tmp_path / "codes.csv").write_text(text, "utf-8-sig")
        assert read_bars(tmp_path / "codes.csv", columns=dict(symbol=name)).symbol.tolist() == codes


def test_adjusted_prices_are_multiplied_and_a_close_at_the_high_stays_inside():
    bars = reference("1D", n=2000)
    bars = bars.assign(high=bars.close.clip(bars.open))
    adjusted_close = (bars.close * np.random.default_rng(0).random(len(bars))).round(6)
    factor = adjusted_close / bars.close
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adjusted = read_bars(bars.assign(**{"Adj Close": adjusted_close}), adjust=True)
    for column in ("open", "high", "low", "close"):
        np.testing.assert_allclose(adjusted[column], bars[column] * factor, rtol=1e-12)
    assert adjusted.volume.equals(bars.volume) and adjusted.close.equals(adjusted_close)
    assert "prices times adjusted close / close" in adjusted.attrs["layout"]
    both = pd.concat([bars.assign(adj=adjusted_close), bars.assign(symbol="GBPUSD", adj=adjusted_close)])
    wide = both.pivot(index="datetime", columns="symbol").rename(columns=str.title, level=0)
    wide = wide.rename(columns={"Adj": "Adj Close"}, level=0)
    again = read_bars(wide, adjust=True)
    pd.testing.assert_frame_equal(again[again.symbol == "EURUSD"].reset_index(drop=True), adjusted)


def test_a_pattern_reads_archives_of_one_symbol(tmp_path):
    for month, lines in {"03": klines(BTC, "ms")[:30], "04": klines(BTC, "us")[30:]}.items():
        zip_file(tmp_path / f"BTCUSDT-1h-2024-{month}.zip", **{f"BTCUSDT-1h-2024-{month}.csv": "\n".join(lines)})
    bars = read_bars(str(tmp_path / "BTCUSDT-1h-*.zip"))
    pd.testing.assert_frame_equal(bars, check_bars(BTC))
    assert (
        "2 files or tables, symbol BTCUSDT from the name, times in ms since 1970, times in us" in bars.attrs["layout"]
    )


def test_closes_alone_are_read_where_asked(tmp_path):
    wide = TWO.pivot(index="datetime", columns="symbol", values="close").set_axis(["C", "LOW"], axis=1)
    wide.iloc[3, 1] = np.nan
    wide.to_csv(tmp_path / "closes.csv")
    wide.set_axis(["600000", "600001"], axis=1).to_csv(tmp_path / "codes.csv")
    assert read_bars(tmp_path / "codes.csv", ohlc_from_close=True).symbol.unique().tolist() == ["600000", "600001"]
    expected = closes_to_bars(wide)
    for source in (wide, tmp_path / "closes.csv", expected[["datetime", "symbol", "close"]]):
        bars = read_bars(source, ohlc_from_close=True)
        pd.testing.assert_frame_equal(bars, expected)
        assert bars.attrs["source"]["ohlc_from_close"] is True


@pytest.mark.parametrize(
    "times, zone, tz, expected",
    [
        (["2024-03-13 10:00"], None, "Europe/Berlin", "2024-03-13 10:00+01:00"),
        (["2024-03-13 10:00-04:00"], None, "Europe/Berlin", "2024-03-13 15:00+01:00"),
        (["2024-03-13T10:00:00Z"], None, None, "2024-03-13 10:00Z"),
        (["2024-03-13 10:00:00 UTC"], None, "America/New_York", "2024-03-13 06:00-04:00"),
        ([1710324000], None, None, "2024-03-13 10:00"),
        ([1710324000], None, "America/New_York", "2024-03-13 06:00-04:00"),
        ([1710324000.5], None, None, "2024-03-13 10:00:00.5"),
        ([1710324000], "server", "Europe/Athens", "2024-03-13 10:00+02:00"),
        (["13.03.2024 10:00:00.000"], "UTC", "Europe/Berlin", "2024-03-13 11:00+01:00"),
        (["03/13/2024 1:05 PM"], None, None, "2024-03-13 13:05"),
        ([20240313], None, None, "2024-03-13"),
    ],
)
def test_a_time_zone_is_given_to_local_times_and_others_are_converted(times, zone, tz, expected):
    from modelfactory.data.layouts import parse_times

    assert parse_times(pd.Series(times), tz=tz, zone=zone)[0].isoformat() == pd.Timestamp(expected).isoformat()


def test_the_hour_that_occurs_twice_is_decided_by_the_order_of_the_bars():
    times = pd.date_range("2024-11-02 22:00", periods=9, freq="h", tz="America/New_York")
    bars = HOURS[:9].assign(datetime=times.tz_localize(None))
    assert read_bars(bars, tz="America/New_York").datetime.tolist() == times.tolist()


# What cannot be decided -----------------------------------------------------------------------------------------------

DAILY_HEADER, DAILY_ROW = "Date,Open,High,Low,Close,Volume\n", "{},1.1,1.3,1.0,1.2,5\n"


def daily(*dates):
    return DAILY_HEADER + "".join(DAILY_ROW.format(date) for date in dates)


def lines_with(header, *values):
    return header + "\n" + ",".join(values) + "\n"


UNDECIDED = {  # name -> (content of the file, options, texts of the error)
    "day or month": (daily("01/02/2020", "02/02/2020"), {}, ["'01/02/2020'", "unit='%d/%m/%Y'", "unit='%m/%d/%Y'"]),
    "both orders": (daily("13/02/2020", "02/14/2020"), {}, ["day first and with the month first", "one order"]),
    "two digits of a year": (daily("13/02/20"), {}, ["1 row not readable as a time (['13/02/20'])", "unit="]),
    "an unknown time of day": (daily("13/02/2020 at noon"), {}, ["'at noon'", "unit='%d/%m/%Y %H:%M'"]),
    "no time": (daily("2020-01-02", "soon"), {}, ["1 row not readable as a time (['soon']), first at row 1"]),
    "numbers of a row": (daily("0", "1"), {}, ["found numbers from 0 to 1", "YYYYMMDD"]),
    "numbers of a date and a time": (daily("202001021030"), {}, ["found numbers from 202001021030", "%Y%m%d%H%M"]),
    "numbers of two units": (daily("1710324000", "1710324000000"), {}, ["1710324000 to 1710324000000", "of one unit"]),
    "a year after 2261": (daily("2300-01-02"), {}, ["expected the years 1971 to 2261"]),
    "two offsets": (
        daily("2024-03-08 09:30:00-05:00", "2024-03-11 09:30:00-04:00"),
        {},
        ["1 row in another", "tz='UTC'"],
    ),
    "no zone": (daily("2020-01-02"), dict(tz="Mars/Base"), ["tz: found 'Mars/Base'", "America/New_York"]),
    "local time that is none": (
        daily("2024-03-10 02:30"),
        dict(tz="America/New_York"),
        ["do not exist or occur twice"],
    ),
    "no unit": (daily("1710324000"), dict(unit="sec"), ["unit: found 'sec', expected s, ms, us, ns"]),
    "no names known": (
        "When,First,Top,Bottom,Last\n2020-01-02,1,2,1,1\n",
        {},
        [
            "no column 'datetime', 'open', 'high', 'low', 'close', 'volume'; found When, First, Top, Bottom, Last",
            "columns={",
        ],
    ),
    "closes alone": ("Date,Close\n2020-01-02,1\n", {}, ["'open', 'high', 'low', 'volume'", "ohlc_from_close=True"]),
    "no adjusted close": (daily("2020-01-02"), dict(adjust=True), ["no column 'adjusted_close'"]),
    "a wrong key": (
        daily("2020-01-02"),
        dict(columns=dict(Last="close")),
        ["found the key 'Last'", "expected {'close': "],
    ),
    "a wrong name": (daily("2020-01-02"), dict(columns=dict(close="Clos")), ["no column 'Clos', did you mean 'Close'"]),
    "no close": (daily("2020-01-02"), dict(columns=dict(close=None)), ["close: found None, expected one name"]),
    "two closes": (lines_with("Date,Close,close", "2020-01-02", "1", "1"), {}, ["['Close', 'close']", "keep one"]),
    "no names at all": (
        "2020-01-02,1,2,3\n",
        {},
        ["4 columns without names, the first row 2020-01-02, 1, 2, 3", "'open': 1"],
    ),
    "one column": ("2020-01-02\n", {}, ["1 column without names, the first row 2020-01-02"]),
    "names in another alphabet": (
        "Дата,Цена\n2020-01-02,1\n",
        {},
        ["no column 'datetime', 'open', 'high', 'low', 'close', 'volume'; found Дата, Цена"],
    ),
    "an order of no layout": ("1710324000,1,0.5,1,2,5\n", {}, ["6 columns without names", "give the position"]),
    "decimals or thousands": ("Date;Close\n2020-01-02;1,500\n", {}, ["'1,500'", "sep=';', decimal=','"]),
    "half a time": (
        "Date,Time,Close\n2020-01-02,soon,1\n",
        dict(ohlc_from_close=True),
        ["not readable as a time (['soon'])"],
    ),
    "rows of other lengths": (DAILY_HEADER + "2020-01-02,1\n", {}, ["not readable", "Expected 6 columns, got 2"]),
    "no bar": (DAILY_HEADER, {}, ["no row, expected at least one bar"]),
    "no line": ("", {}, ["an empty file"]),
}


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_cannot_be_decided_is_one_error(name, tmp_path):
    content, options, texts = UNDECIDED[name]
    (tmp_path / "A.csv").write_text(content, "utf-8")
    with pytest.raises(BarsError) as error:
        read_bars(tmp_path / "A.csv", **options)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'A.csv'}: ") and "\n" not in message
    assert [text for text in texts if text not in message] == []
    assert [f.name for f in tmp_path.iterdir()] == ["A.csv"]


def test_other_sources_without_bars_are_one_error(tmp_path):
    three = pd.MultiIndex.from_tuples([("a", "Close", "x")])
    sources = {
        "found NoneType": None,
        "the source is empty": [],
        "no such file": tmp_path / "no.csv",
        "no file that ends in .csv": str(tmp_path / "*.csv"),
        "expected .csv, .tsv": text_file(tmp_path, "bars.xls", []),
        "no column 'low', 'symbol'": DAYS.drop(columns=["low", "symbol"]),
        "expected two: prices and symbols": pd.DataFrame([[1.0]], columns=three),
        "may be HHMM or HHMMSS": DAYS.drop(columns="datetime").assign(date=20240313, time=930),
        "found the time zones None in A, UTC in B": {
            "A": DAYS,
            "B": DAYS.assign(symbol="B", datetime=DAYS.datetime.dt.tz_localize("UTC")),
        },
    }
    for text, source in sources.items():
        with pytest.raises(BarsError, match=text):
            read_bars(source)


def test_bars_that_contradict_each_other_are_an_error_that_names_both_files(tmp_path):
    for name, bars in dict(a=DAYS[:30], b=DAYS[20:].assign(close=DAYS.open)).items():
        bars.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(BarsError, match=r"10 of 50 rows contradict .* close is 1.1\d* in .*a.csv and 1.\d* in .*b.csv"):
        read_bars(tmp_path)


def test_another_file_decides_the_order_of_day_and_month(tmp_path):
    days = DAYS.assign(Date=DAYS.datetime.dt.strftime("%d/%m/%Y")).drop(columns="datetime")
    days[19:31].to_csv(tmp_path / "april.csv", index=False)  # the 1st to the 12th
    with pytest.raises(BarsError, match=r"april.csv: .*unit='%d/%m/%Y'"):
        read_bars(tmp_path)
    days[:19].to_csv(tmp_path / "march.csv", index=False)
    bars = read_bars(tmp_path)
    pd.testing.assert_frame_equal(bars, check_bars(DAYS[:31]))
    assert read_bars(tmp_path / "april.csv", **bars.attrs["source"]).datetime.equals(
        DAYS.datetime[19:31].reset_index(drop=True)
    )


# Properties -----------------------------------------------------------------------------------------------------------


@limits(max_examples=60, deadline=None)
@given(
    st.lists(st.dates(date(1980, 1, 1), date(2090, 1, 1)), min_size=1, max_size=4, unique=True),
    st.booleans(),
)
def test_dates_are_read_as_written_or_refused(dates, day_first):
    "An order is accepted only if the other order does not read all dates; a naive loop decides."
    from modelfactory.data.layouts import DayOrMonth, parse_times

    form = "%d/%m/%Y" if day_first else "%m/%d/%Y"
    text = pd.Series([day.strftime(form) for day in dates])
    if all(day.day <= 12 for day in dates):
        with pytest.raises(DayOrMonth):
            parse_times(text)
    else:
        assert [t.date() for t in parse_times(text)] == dates
    assert [t.date() for t in parse_times(text, form)] == dates


@limits(max_examples=60, deadline=None)
@given(
    st.lists(st.datetimes(pd.Timestamp("1980-01-02"), pd.Timestamp("2099-12-31")), min_size=1, max_size=4, unique=True),
    st.sampled_from(["s", "ms", "us", "ns"]),
    st.sampled_from([int, float, str]),
)
def test_the_unit_of_numbers_is_never_mistaken(times, unit, kind):
    from modelfactory.data.layouts import parse_times, time_unit

    times = pd.DatetimeIndex(times).as_unit("s")
    numbers = pd.Series([kind(n) for n in times.as_unit(unit).asi8])
    assert time_unit(numbers) == unit
    assert abs(parse_times(numbers) - times.to_series(index=numbers.index)).max() < pd.Timedelta("1us")


@limits(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(0, N - 1), st.integers(1, N)), max_size=5), st.randoms())
def test_any_overlapping_parts_are_the_one_series(cuts, random):
    parts = [HOURS[:25], HOURS[25:], *(HOURS[start : start + n] for start, n in cuts)]
    random.shuffle(parts)
    bars = read_bars(iter(parts))
    pd.testing.assert_frame_equal(bars, check_bars(HOURS))
    repeated = sum(map(len, parts)) - N
    assert (f"{repeated:,} bar" in bars.attrs["layout"]) == (repeated > 0)


# Received files -------------------------------------------------------------------------------------------------------


def zip_file(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["gz", "zip", "zip of two"])
def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_UNPACKED_BYTES", 100_000)
    dates = pd.date_range("1990", periods=4000).strftime("%Y-%m-%d")
    content = {name: daily(*part) for name, part in zip(("a.csv", "b.csv"), (dates[:2000], dates[2000:]), strict=True)}
    if kind == "gz":
        (path := tmp_path / "A.csv.gz").write_bytes(gzip.compress(daily(*dates).encode()))
    else:
        path = zip_file(tmp_path / "A.zip", **({"a.csv": daily(*dates)} if kind == "zip" else content))
    with pytest.raises(BarsError, match="unpacks to more than"):
        read_bars(path)
    monkeypatch.undo()
    assert len(read_bars(path, "A")) == len(dates)


def test_paths_in_an_archive_have_no_effect(tmp_path):
    text = daily("2020-01-02")
    path = zip_file(tmp_path / "A.zip", **{"../../EURUSD.csv": text, "/etc/GBPUSD.csv": text, "__MACOSX/._A.csv": "x"})
    before = sorted(tmp_path.rglob("*"))
    assert read_bars(path).symbol.tolist() == ["EURUSD", "GBPUSD"] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["A.csv", "A.csv.gz", "A.zip", "A.parquet", "A.feather", "A.parquet.gz"])
def test_a_damaged_file_is_one_line(name, tmp_path):
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole.csv.gz"
    DAYS.to_csv(whole, index=False)
    for i, content in enumerate(
        [rng.bytes(3000), whole.read_bytes()[:200], b"PK\x03\x04" + rng.bytes(50), b"PAR1PAR1"]
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BarsError) as error:
            read_bars(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value), i


def test_files_that_are_not_regular_are_not_opened(tmp_path):
    import os

    os.mkfifo(tmp_path / "A.csv")
    for source in (tmp_path, tmp_path / "A.csv"):
        with pytest.raises(BarsError, match="A.csv: not a regular file"):
            read_bars(source)
