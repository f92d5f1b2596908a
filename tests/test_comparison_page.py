"The comparison page in a browser: verdicts, one table for each task, links to runs, sorting, filter, dark mode, paper."

import base64
import io
import json
import re
import unicodedata
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from fabricate import bars, make_run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from modelfactory.evaluation.tables import metrics_table
from modelfactory.runs.compare import PAGES_FOLDER, compare
from modelfactory.runs.page import to_html, write_run_pages
from modelfactory.runs.report import FormattedTable, leaderboard, leaderboard_table, run_pages, verdict_overview
from modelfactory.runs.run import list_runs

pytestmark = pytest.mark.slow

DATA = dict(eurusd=0.2, planted=1.0, null=0.0)  # name -> skill of the models
FAMILIES = dict(svm="classical", lightgbm="boosting", catboost="boosting", gru="neural", mlp="neural")
MAX_BYTES = 2_500_000
CLASSES = (-1, 0, 1)


def notebook(text):
    output = new_output("display_data", {"text/html": f"<p>{text}</p>"})
    return new_notebook(cells=[new_code_cell("1", outputs=[output])])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "36 runs: three data sets, two horizons, five models of which one has two seeds; one run has no notebook."
    folder = tmp_path_factory.mktemp("page") / "runs"
    for data, skill in DATA.items():
        for horizon in (5, 10):
            table = bars(n=300, horizon=horizon, seed=len(data))
            for i, (model, family) in enumerate(FAMILIES.items()):
                for seed in (1, 2) if model == "gru" else (42,):
                    place = dict(data=f"/data/{data}", horizon=horizon, family=family, seed=seed)
                    run = make_run(folder, model, table, skill=skill * (1 + 0.1 * i), n_boot=8, **place)
                    if model != "mlp":
                        nbformat.write(notebook(f"{model} on {data}, h{horizon}"), run.path / "train.ipynb")
    return folder


@pytest.fixture(scope="module")
def file(runs):
    return compare(runs)


@pytest.fixture(scope="module")
def result(runs, file):
    return json.loads((runs / "model_comparison.json").read_text())


class Page(HTMLParser):
    "Attributes of the images, links and tables of a page."

    def __init__(self, text):
        super().__init__()
        self.found = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))


def test_36_runs_fit_in_a_small_page_with_alternative_texts_and_no_dead_link(file, runs):
    assert len(list_runs(runs)) == 36 and file.stat().st_size <= MAX_BYTES
    found = Page(file.read_text()).found
    assert len(found["img"]) == 39 and all(len(image["alt"]) > 20 for image in found["img"])
    assert all(image["src"].startswith("data:image/png;base64,") for image in found["img"])
    assert len(found["script"]) == 1 and "src" not in found["script"][0] and "link" not in found
    links = [a["href"] for a in found["a"] if not a["href"].startswith("#")]
    assert len(links) == 36 - 6 and all((runs / link).is_file() for link in links), "mlp has no notebook"
    anchors = {a["href"] for a in found["a"] if a["href"].startswith("#")}
    headings = {"#" + h["id"] for tag in ("h1", "h2", "h3") for h in found[tag]}
    assert anchors <= headings and "#eurusd,-horizon-5" in anchors


def test_markdown_has_alternative_texts_and_links_to_notebooks(file, runs):
    text = (runs / "model_comparison.md").read_text()
    images, links = re.findall(r"!\[([^]]+)\]\((.+?)\)", text), re.findall(r"(?<!!)\[[^]]+\]\((.+?\.ipynb)\)", text)
    assert len(images) == 39 and all(len(alt) > 20 and (runs / name).is_file() for alt, name in images)
    assert len(links) == 30 and all((runs / link).is_file() for link in links)


def test_each_figure_follows_a_line_that_says_what_to_look_for(runs, file):
    cells = nbformat.read(runs / "compare.ipynb", 4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [i for i, output in enumerate(outputs) if "image/png" in output.get("data", {})]
    assert len(figures) == 39
    for i in figures:
        assert "Look for" in outputs[i - 1]["data"]["text/markdown"]
        width = int.from_bytes(base64.b64decode(outputs[i]["data"]["image/png"])[16:20], "big")
        assert width == 1210, "11 inches at 110 dots, the width of the page"


def test_bold_numbers_are_those_that_the_tests_distinguish(result):
    table = leaderboard(result)
    for task in result["tasks"]:
        rows = table[(table.data == task["data"]) & (table.horizon == task["horizon"])].set_index("model")
        leaders = {task["best"], *(task["not_worse"] or [])}
        for entry in task["models"]:
            row = rows.loc[entry["model"]]
            assert row.directional_skill_significant == entry["direction_significant"]
            is_leader = task["log_loss_significant"] and len(leaders) < 5 and entry["model"] in leaders
            assert row.log_loss_significant == is_leader
            is_best = task["profit_significant"] and task["best_sharpe_model"] == entry["model"]
            assert row.sharpe_net_significant == is_best
        marked = [f"{m}_significant" for m in ("directional_skill", "log_loss", "sharpe_net")]
        assert not rows.loc["prior", marked].any()
        page = leaderboard_table(table.loc[table.data.eq(task["data"]) & table.horizon.eq(task["horizon"])]).page
        body = page.split("<tbody>")[1]
        assert body.count("<b>") == rows[marked].to_numpy().sum()
    assert table.query("data == 'planted'").directional_skill_significant.any()
    assert not table.query("data == 'null'").log_loss_significant.any()


def one_task(n, significant=True, not_worse=None, **values):
    "A result with one task of `n` models, of which m0 has the lowest log loss."
    names = [f"m{i}" for i in range(n)]
    entry = dict(family="f", seeds=[1], averaged=None, direction_significant=False, verdict="not significant")
    scores = dict(log_loss=1.0, directional_skill=0.1, directional_skill_ci_low=-0.1, directional_skill_ci_high=0.3)
    models = [entry | scores | dict(model=name, runs=[name], rank=i) for i, name in enumerate(names, 1)]
    task = dict(data="d", horizon=5, models=models, best="m0", not_worse=not_worse, best_sharpe_model=None, why={})
    task |= dict(log_loss_significant=significant, p_log_loss=0.01, direction_significant=False, p_direction=0.5)
    baseline = dict(model="prior", family="baseline", log_loss=0.9)
    return dict(
        tasks=[task | dict(profit_significant=False, p_profit=None, sharpe_net=None, baselines=[baseline]) | values]
    )


@pytest.mark.parametrize(
    "n, significant, not_worse, bold",
    [
        (3, True, ["m0", "m1"], ["m0", "m1"]),
        (3, True, ["m0"], ["m0"]),
        (3, True, ["m0", "m1", "m2"], []),  # the models cannot be told apart
        (3, True, None, []),  # the differences were not tested
        (3, False, ["m0"], []),
        (1, True, None, ["m0"]),
        (1, False, None, []),
    ],
)
def test_a_log_loss_is_bold_only_if_it_is_distinguished(n, significant, not_worse, bold):
    table = leaderboard(one_task(n, significant, not_worse))
    assert table[table.log_loss_significant].model.tolist() == bold
    assert table.model.iloc[0] == "prior", "a baseline with the lowest log loss stands first"
    page = leaderboard_table(table).page
    assert "color:" not in page, "baselines are not grey"


def test_a_number_has_one_interval(result):
    table = leaderboard(result)
    for task in result["tasks"]:
        rows = table[(table.data == task["data"]) & (table.horizon == task["horizon"])].set_index("model")
        averaged = next(m["averaged"] for m in task["models"] if m["model"] == "gru")
        for name in ("directional_skill", "directional_skill_ci_low", "directional_skill_ci_high"):
            assert rows.loc["gru"][name] == averaged[name]
    frame = leaderboard_table(table).frame
    text = frame.to_string()
    assert " ± " not in text and "gru (2 seeds)" in text
    assert all(cell.count("[") <= 1 for column in frame for cell in frame[column].astype(str))
    prior = frame[frame.model == "prior"].directional_skill
    assert not prior.str.contains("[", regex=False).any(), "the column names a corrected interval; a baseline has none"


def test_links_are_relative_to_the_page_and_only_to_notebooks_that_exist(result, runs, tmp_path):
    pages = run_pages(result, runs, runs.parent / "elsewhere")
    assert len(pages) == 30 and all(link.startswith("../runs/") for link in pages.values())
    assert run_pages(result, tmp_path) == {}
    assert "<a " not in leaderboard_table(leaderboard(result), pages={}).page


def test_pages_of_runs_are_made_once_and_removed_with_their_run(tmp_path):
    for name in ("a", "b", "damaged"):
        (tmp_path / name).mkdir()
        nbformat.write(notebook(name), tmp_path / name / "train.ipynb")
    (tmp_path / "damaged/train.ipynb").write_text("{")
    folder = tmp_path / "pages"
    pages = write_run_pages(tmp_path, ["a", "b", "damaged", "../a", "missing"], folder)
    assert set(pages) == {"a", "b"} == {f.stem for f in folder.iterdir()}
    before = pages["a"].stat().st_mtime_ns
    assert set(write_run_pages(tmp_path, ["a"], folder)) == {"a"} == {f.stem for f in folder.iterdir()}
    assert pages["a"].stat().st_mtime_ns == before


def test_the_page_of_a_run_is_headed_by_its_name(tmp_path):
    "The text that explains the notebook is no part of the page; a notebook without such a text keeps all its cells."
    for name, cells in dict(a=[new_markdown_cell("# Training\n\nhow to use")], b=[]).items():
        (tmp_path / name).mkdir()
        executed = notebook(f"results of {name}")
        executed.cells[:0] = cells
        nbformat.write(executed, tmp_path / name / "train.ipynb")
    for name, file in write_run_pages(tmp_path, ["a", "b"], tmp_path / "pages").items():
        page = file.read_text()
        assert re.search(rf"<h1[^>]*>{name}<", page) and f"results of {name}" in page
        assert "Training" not in page and "how to use" not in page


def test_a_link_in_place_of_the_folder_of_pages_is_removed(tmp_path):
    "A received runs folder may hold a link to a folder of the user."
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/page.html").write_text("mine")
    (tmp_path / "pages").symlink_to(tmp_path / "mine")
    (tmp_path / "a").mkdir()
    nbformat.write(notebook("a"), tmp_path / "a/train.ipynb")
    write_run_pages(tmp_path, ["a"], tmp_path / "pages")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["page.html"]
    assert [f.name for f in (tmp_path / "pages").iterdir()] == ["a.html"]


def test_verdicts_are_stated_for_each_task(result):
    overview = verdict_overview(result)
    assert overview.frame.task.tolist() == [f"{t['data']}, horizon {t['horizon']}" for t in result["tasks"]]
    words = ("significant", "not significant", "not tested")
    assert all(str(cell).startswith(words) for cell in overview.frame.iloc[:, 1:].to_numpy().ravel())
    assert overview.page.count("<b>significant</b>") == sum(
        t[f"{claim}_significant"] or False for t in result["tasks"] for claim in ("direction", "log_loss", "profit")
    )


def test_an_undefined_value_is_a_dash_and_names_break_after_underscores():
    table = FormattedTable(pd.DataFrame(dict(p_profit=[None, None], best=["logistic_regression", None])))
    page = table._repr_html_()
    assert "None" not in page and page.count("–") == 3
    assert "p_<wbr>profit" in page and "logistic_<wbr>regression" in page


# In a browser


@pytest.fixture
def opened(browser, file):
    "Opens the comparison page; the options are those of a page of playwright. Errors of the page fail the test."
    contexts, errors = [], []

    def open_page(**options):
        context = browser.new_context(**dict(viewport=dict(width=1440, height=900)) | options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else errors.append(request)
        )
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def column(page, table, index):
    "Text of the visible cells of a column."
    cells = page.locator("table.leaderboard").nth(table).locator(f"tbody tr:visible > *:nth-child({index + 1})")
    return [text.strip() for text in cells.all_inner_texts()]


SHARPE = 7  # number of the column


@pytest.mark.browser
def test_the_first_screen_shows_the_verdict_of_each_task(opened, result):
    page = opened()
    boxes = [row.bounding_box() for row in page.locator("table.verdicts tbody tr").all()]
    assert len(boxes) == len(result["tasks"]) == 6 and all(box["y"] + box["height"] <= 900 for box in boxes)
    page.get_by_role("link", name="planted, horizon 10").click()
    heading = page.get_by_role("heading", name="planted, horizon 10")
    assert abs(heading.bounding_box()["y"]) < 200


@pytest.mark.browser
def test_a_click_sorts_by_value(opened):
    page = opened()
    head = page.locator("table.leaderboard").first.locator("th").nth(SHARPE)
    for _ in range(2):
        head.get_by_role("button").click()
        values = [float(text.split()[0]) for text in column(page, 0, SHARPE)]
        descending = head.get_attribute("aria-sort") == "descending"
        assert values == sorted(values, reverse=descending) and len(values) == 6
    assert head.get_attribute("aria-sort") == "ascending"
    text = column(page, 0, SHARPE)
    assert text != sorted(text), "the order of the texts is another one"


@pytest.mark.browser
def test_missing_values_come_last_in_both_directions(opened):
    page = opened()
    button = page.locator("table.leaderboard").first.locator("th").nth(1).get_by_role("button")
    button.click()
    assert column(page, 0, 1) == ["1", "2", "3", "4", "5", ""], "prior has no rank"
    button.click()
    assert column(page, 0, 1) == ["5", "4", "3", "2", "1", ""]


@pytest.mark.browser
def test_a_filter_acts_on_all_tables(opened):
    page = opened()
    page.get_by_role("searchbox").fill("Neural gru")
    assert [column(page, i, 2) for i in range(6)] == [["neural"]] * 6
    assert page.get_by_text("6 of 36 rows").is_visible()
    page.get_by_role("button", name="boosting").click()
    assert sorted(name.split()[0] for name in column(page, 0, 0)) == ["catboost", "lightgbm"]
    page.get_by_role("button", name="boosting").click()
    assert page.get_by_text("36 of 36 rows").is_visible()


@pytest.mark.browser
def test_links_lead_to_the_pages_of_runs(opened):
    page = opened()
    task = page.locator("table.leaderboard").first
    task.get_by_role("link", name="svm").click()
    page.wait_for_url("**/svm_h5_*.html")
    assert page.get_by_text("svm on eurusd, h5").is_visible() and PAGES_FOLDER in page.url
    page.go_back()
    task.locator("tr", has_text="gru").get_by_role("link", name="2", exact=True).click()
    page.wait_for_url("**/gru_h5_*.html")


@pytest.mark.browser
def test_text_beside_numbers_is_not_squeezed_on_a_narrow_screen(browser, tmp_path):
    "A table of metrics scrolls; the column of their meanings stays wide enough for a few words in a line."
    table = metrics_table(dict(log_loss=1.0, directional_skill=0.1, sharpe_net=-5.2, turnover=3.3))
    output = new_output("display_data", {"text/html": table})
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=[output])]), tmp_path / "train.ipynb")
    to_html(tmp_path / "train.ipynb", tmp_path / "page.html")
    context = browser.new_context(viewport=dict(width=390, height=800))
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    heights = [row.bounding_box()["height"] for row in page.locator("tr").all()]
    wide = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert len(heights) == 5 and max(heights) < 80 and wide <= 390


@pytest.mark.browser
def test_on_a_narrow_screen_only_tables_scroll_and_names_stay_in_view(opened):
    page = opened(viewport=dict(width=390, height=800))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    name = page.locator("table.leaderboard tbody th").first
    box = page.locator("table.leaderboard").first.evaluate_handle("t => t.closest('div.output_area')")
    assert box.evaluate("b => b.scrollWidth > b.clientWidth")
    before = name.bounding_box()["x"]
    box.evaluate("b => b.scrollLeft = 300")
    assert box.evaluate("b => b.scrollLeft") == 300 and name.bounding_box()["x"] == before
    assert name.evaluate("n => getComputedStyle(n).backgroundColor") != "rgba(0, 0, 0, 0)"


def lightness(page, name):
    color = page.evaluate(f"getComputedStyle(document.body).{name}")
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


@pytest.mark.browser
def test_the_page_follows_a_dark_theme_on_screen_but_not_on_paper(opened):
    page = opened(color_scheme="dark")
    assert lightness(page, "backgroundColor") < 60 and lightness(page, "color") > 200
    assert "invert" in page.locator("img").first.evaluate("i => getComputedStyle(i).filter")
    page.emulate_media(media="print", color_scheme="dark")
    assert lightness(page, "color") < 60
    assert page.locator("img").first.evaluate("i => getComputedStyle(i).filter") == "none"


@pytest.mark.browser
def test_without_script_the_page_is_a_plain_page(opened):
    page = opened(java_script_enabled=False)
    assert len(column(page, 0, SHARPE)) == 6 and page.locator("table.leaderboard").count() == 6
    assert page.get_by_role("searchbox").count() == page.get_by_role("button").count() == 0
    page.locator("table.leaderboard").first.get_by_role("link", name="svm").click()
    page.wait_for_url("**/svm_h5_*.html")


@pytest.mark.browser
def test_on_paper_nothing_is_cut(opened):
    pypdf = pytest.importorskip("pypdf", reason="NOT CHECKED ON PAPER: pypdf is not installed (pip install pypdf)")
    page = opened()
    pdf = pypdf.PdfReader(io.BytesIO(page.pdf(prefer_css_page_size=True)))
    width, height = pdf.pages[0].mediabox[2:]
    assert 840 < width < 844 and 593 < height < 597, "A4 in landscape, in points"
    text = unicodedata.normalize("NFKC", " ".join(part.extract_text() for part in pdf.pages))  # without ligatures
    rows = column(page, 0, 10) + column(page, 5, 10)
    assert set(rows) & {"significant", "not significant"} and text.count("significant") >= len(rows)
    words = re.sub(r"\s", "", text)  # column names may be broken
    assert "Filterthemodels" not in words and "p_profit_constant" in words and "not_worse" in words
    page.emulate_media(media="print")
    page.set_viewport_size(dict(width=1046, height=718))  # A4 in landscape without margins, at 96 dots per inch
    for element in page.locator("table, img").all():
        box = element.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1047, element.evaluate("e => e.outerHTML.slice(0, 200)")
    scrolling = "[...document.querySelectorAll('div')].filter(d => getComputedStyle(d).overflowX !== 'visible').length"
    assert page.evaluate(scrolling) == 0
