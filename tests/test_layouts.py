"Bars of each published layout give the same seven columns; what cannot be decided is one error with the call."

import gzip
import json
import zipfile

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


@layout(says="read as MetaTrader 5 export: symbol EURUSD from the file name, volume from <TICKVOL>")
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


@layout(says="read as MetaTrader 4 export: symbol EURUSD from the file name")
def mt4_export(folder, bars):
    return text_file(folder, "EURUSD60.csv", joined(bars, ",", stamp("%Y.%m.%d|%H:%M"), volume))


@layout(says="read as MetaTrader 4 export: symbol EURUSD from the file name")
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


@layout(BTC, says="read as Binance klines: symbol BTCUSDT from the file name, times in ms since 1970")
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


@layout(
    BTC, says="read as Binance klines: 2 files or tables, symbol BTCUSDT from the file name, times in ms since 1970"
)
def binance_months_that_overlap(folder, bars):
    lines = klines(bars, "ms")
    text_file(folder, "BTCUSDT-1h-2024-03.csv", lines[:25])
    text_file(folder, "BTCUSDT-1h-2024-04.csv", lines[22:])
    return folder


@layout(says="read as Kraken OHLCVT file: symbol EURUSD from the file name, times in s since 1970")
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


@layout(DAYS, says="read as Yahoo Finance: symbol EURUSD from the file name")
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


@layout(says="read as bars, by the names of the columns", symbol="EURUSD")
def yfinance_intraday_in_new_york(folder, bars):
    table = yahoo(bars).rename_axis("Datetime")
    return table


@layout(says="read as TradingView export: symbol EURUSD from the file name, times in s since 1970")
def tradingview_epoch(folder, bars):
    names = dict(zip(["open", "high", "low", "close"], ["open", "high", "low", "close"], strict=True))
    table = bars.assign(time=epochs(bars, "s"))[["time", *names, "volume"]].rename(columns=dict(volume="Volume"))
    table.assign(MA=[None] * 5 + [1.0] * (len(bars) - 5)).to_csv(folder / "FX_EURUSD, 60.csv", index=False)
    return folder / "FX_EURUSD, 60.csv"


@layout(HOURS.assign(datetime=HOURS.datetime.dt.tz_localize("UTC")), says="read as TradingView export")
def tradingview_iso(folder, bars):
    table = bars.assign(time=bars.datetime.dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
    table[["time", "open", "high", "low", "close", "volume"]].to_csv(folder / "FX_EURUSD, 60.csv", index=False)
    return folder / "FX_EURUSD, 60.csv"


DUKASCOPY = "EURUSD_Candlestick_1_Hour_BID_13.03.2024-15.03.2024.csv"


@layout(says="read as Dukascopy export: symbol EURUSD from the file name")
def dukascopy_gmt(folder, bars):
    lines = joined(bars, ",", stamp("%d.%m.%Y %H:%M:%S.000"), volume)
    return text_file(folder, DUKASCOPY, ["Gmt time,Open,High,Low,Close,Volume", *lines])


@layout(
    HOURS.assign(datetime=HOURS.datetime.dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin")),
    says="read as Dukascopy export",
    tz="Europe/Berlin",
)
def dukascopy_local(folder, bars):
    lines = joined(bars, ",", stamp("%d.%m.%Y %H:%M:%S.000 GMT%z"), volume)
    return text_file(folder, DUKASCOPY, ["Local time,Open,High,Low,Close,Volume", *lines])


@layout(DAYS, says="symbol EURUSD from the file name")
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


@layout(HOURS.assign(datetime=HOURS.datetime.dt.tz_localize("UTC")), says="read as Alpaca or Polygon bars")
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
    table = bars.assign(trade_count=3, vwap=1.1).rename(columns=dict(datetime="timestamp"))
    return table.set_index(["symbol", "timestamp"])


@layout(DAYS, says="read as Alpha Vantage", symbol="EURUSD")
def alpha_vantage_json(folder, bars):
    names = {c: f"{i}. {c}" for i, c in enumerate(["open", "high", "low", "close", "volume"], 1)}
    table = bars.rename(columns=names)[[*names.values()]].astype(str)
    return pd.DataFrame(table.set_index(bars.datetime.dt.strftime("%Y-%m-%d")).to_dict("index")).T[::-1]


@layout(DAYS, says="read as Alpha Vantage: symbol EURUSD from the file name")
def alpha_vantage_file(folder, bars):
    table = bars.drop(columns="symbol").rename(columns=dict(datetime="timestamp"))
    table[::-1].to_csv(folder / "daily_EURUSD.csv", index=False)
    return folder / "daily_EURUSD.csv"


@layout(says="read as NinjaTrader export", symbol="EURUSD")
def ninjatrader(folder, bars):
    return text_file(folder, "EURUSD.Last.txt", joined(bars, ";", stamp("%Y%m%d %H%M%S"), volume))


@layout(says="read as FirstRate Data file: symbol EURUSD from the file name")
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
