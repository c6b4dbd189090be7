import base64
import hashlib
import json
import os
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from fasttrace.errors import FasttraceError, PlanError, StoreError
from fasttrace.facts.dataset import Fact
from fasttrace.reports import page as report
from fasttrace.reports.averages import average
from fasttrace.reports.page import write_report
from fasttrace.results.metric_grids import MetricGrids
from fasttrace.results.record import Record
from tests.helpers.averaged import STREAMS, make_result, record
from tests.helpers.counts import calls_in

pytest.importorskip("plotly")

HOSTILE = '</script><script>window.bad = 1</script><img src=x onerror="window.bad = 1"><!--<script>'
TOKENS = ("<b>bold</b>", " Need", "&lt;le", "\n", " 東京", " %{x}", " $x$")
RUN = {"model": "org/gpt2-xl", "samples": 10, "sigma": 0.1346298158, "versions": {"torch": "2.13.0"}}


def named(seed, prompt, **changes):
    fact = Fact(str(seed), prompt, prompt.split()[0], " Paris", None, f"P{seed}")
    metadata = {**RUN, "prompt": prompt}
    return Record(fact, make_result(seed=seed, metadata=metadata, **changes), None, seed % 2 == 0)


def records():
    yield named(1, "Berlin lies in the country of")
    yield named(2, "Paris is where one finds the", tokens=TOKENS, target="<i>Tower")
    yield Record(Fact("3", HOSTILE, "<img"), None, "the subject <i>does not</i> occur")
    yield named(10, "Rome was not built in a")


def payload(path):
    text = path.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def grid(path, i):
    text = re.search(rf'<script type="text/plain" id="grid-{i}">(.*?)</script>', path.read_text("utf-8"))[1]
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


# The file.


def test_the_page_holds_every_fact_and_every_cell(tmp_path):
    given = list(records())
    path = write_report(iter(given), tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert os.listdir(path.parent) == ["report.html"]
    data = payload(path)
    assert [fact["id"] for fact in data["facts"]] == ["1", "2", "3", "10"]
    assert data["facts"][0]["clean"] == given[0].result.clean_prob
    assert data["facts"][1]["tokens"] == list(TOKENS)
    for i in (0, 1, 3):
        effects = [given[i].result.grid(stream, "indirect_effect") for stream in STREAMS]
        np.testing.assert_allclose(grid(path, i), np.ravel(effects), rtol=1e-7)
    assert 'id="grid-2"' not in path.read_text("utf-8")


def test_the_summary_counts_and_names_what_all_results_agree_on(tmp_path):
    data = payload(write_report(records(), tmp_path / "report.html"))
    assert data["title"] == "Causal tracing of org/gpt2-xl"
    assert data["counts"] == {
        "facts": 4,
        "traced": 3,
        "asked": 3,
        "known": 2,
        "reasons": [["the subject <i>does not</i> occur", 1]],
    }
    about = {"model": "org/gpt2-xl", "samples": "10", "sigma": "0.13463", "versions": "torch 2.13.0"}
    assert dict(data["about"]) == about
    other = make_result(metadata={**RUN, "samples": 3})
    data = payload(write_report([*records(), record(other)], tmp_path / "report.html"))
    assert "samples" not in dict(data["about"])


ODD = '<b>"odd %{x}'


def pairs(metrics=("kl", "logit_diff", ODD), **metadata):
    """Facts with metrics beside prob, and what a counterfactual leaves in the metadata."""
    for seed in (1, 2):
        random = np.random.default_rng(seed)
        grids = {stream: random.standard_normal((4, 7)).astype(np.float32) for stream in STREAMS}
        others = {name: MetricGrids(grids, grids, clean=0.0, corrupted=1.5 + seed) for name in metrics}
        tokens = [[f" o{i}" for i in range(7)]]
        about = {**RUN, "counterfactual_tokens": tokens, "differing": [2], **metadata}
        result = make_result(seed=seed, others=others, metadata=about)
        yield Record(Fact(str(seed), f"A {seed}", "A"), result, None, True)


@pytest.mark.parametrize("background", ["corrupted", "clean"])
def test_every_metric_that_is_asked_for_has_its_averages_and_grids_in_either_direction(tmp_path, background):
    direction = {"corrupted": "denoising", "clean": "noising"}[background]
    given = list(pairs(background=background, direction=direction))
    path = write_report(given, tmp_path / "r.html", metrics=("kl", "rank", ODD))
    data = payload(path)
    assert [choice["name"] for choice in data["metrics"]] == ["prob", "kl", ODD]
    assert data["title"] == "Causal tracing of org/gpt2-xl" + {"clean": ", noising"}.get(background, "")
    assert dict(data["about"]).keys().isdisjoint({"counterfactual_tokens", "differing"})
    for k, name in ((1, "kl"), (2, ODD)):
        expected = average(given, metric=name)
        totals = [row["mean"] for row in data["others"][name]["totals"]]
        np.testing.assert_allclose(totals, expected.totals()["mean"], rtol=1e-5)
        for i in (0, 1):
            result = given[i].result
            effects = [result.grid(stream, "indirect_effect", metric=name) for stream in STREAMS]
            np.testing.assert_allclose(grid(path, f"{i}-{k}"), np.ravel(effects), rtol=1e-6)
            runs = data["facts"][i]["runs"][name]
            assert runs["background"] == result.run_value(background, name)
            assert runs["total"] == result.gap(name)


def test_the_logit_difference_comes_first_where_every_traced_fact_has_a_foil(tmp_path):
    with_foils, skipped = list(pairs()), record(reason="too long")
    assert payload(write_report([*with_foils, skipped], tmp_path / "r.html"))["metric"] == "logit_diff"
    assert payload(write_report([*with_foils, *records()], tmp_path / "r.html"))["metric"] == "prob"
    assert payload(write_report([skipped], tmp_path / "r.html"))["metric"] == "prob"


def test_a_metric_that_cannot_be_averaged_leaves_the_others_theirs(tmp_path):
    odd = {stream: np.full((4, 7), np.inf, dtype=np.float32) for stream in STREAMS}
    given = [record(make_result(others={"kl": MetricGrids(odd, {}, 0.0, 1.0)}))]
    data = payload(write_report(given, tmp_path / "r.html"))
    assert data["averages"]["facts"] == 1
    assert data["others"] == {}
    assert data["notes"] == [
        "No averages of kl: fact '1' has cells that are not finite: trace it again, or leave it out"
    ]


@pytest.mark.parametrize(
    "metadata", [{"counterfactual_tokens": 3}, {"differing": "x"}, {"counterfactual_tokens": [[]]}]
)
def test_a_pair_that_no_trace_writes_is_left_out(tmp_path, metadata):
    assert payload(write_report(pairs(**metadata), tmp_path / "r.html"))["facts"][0]["pair"] is None


@pytest.mark.parametrize("metrics", [("top1",), "kl", (3,), None])
def test_metrics_that_have_no_average_are_refused(tmp_path, metrics):
    with pytest.raises(PlanError, match="metric"):
        write_report(pairs(), tmp_path / "r.html", metrics=metrics)
    assert os.listdir(tmp_path) == []


def test_what_the_caller_says_of_the_run_is_shown(tmp_path):
    path = write_report(
        records(),
        tmp_path / "report.html",
        title="A run",
        about={"facts": "known.csv", "levels": (1, 2.5)},
        bad_rows=[{"line": 3, "error": "no subject"}, "row 4"],
        notes=["Half of it.", "The other half."],
    )
    data = payload(path)
    assert (data["title"], data["about"]) == ("A run", [["facts", "known.csv"], ["levels", "1, 2.5"]])
    assert data["bad_rows"] == ["line 3, error no subject", "row 4"]
    assert data["notes"] == ["Half of it.", "The other half."]


def test_averages_are_those_of_aggregate(tmp_path):
    data = payload(write_report(records(), tmp_path / "report.html"))["averages"]
    averages = average(records())
    frame = averages.to_frame()
    for stream in data["streams"]:
        for line in stream["lines"]:
            cells = frame[(frame["stream"] == stream["name"]) & (frame["role"] == line["role"])]
            np.testing.assert_allclose(line["mean"], cells["mean"], rtol=1e-5)
            np.testing.assert_allclose(line["boot_high"], cells["boot_high"], rtol=1e-5)
    assert data["totals"][2]["mean"] == pytest.approx(averages.totals()["mean"][2], rel=1e-5)
    assert data["peaks"][0]["layer"] == averages.strongest("block_output")["layer"][0]


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ([], "No averages: no fact to average"),
        ([record(reason="too long"), record()], "No averages: no fact to average"),
        (
            [record(make_result()), record(make_result(n_layers=7), "b"), record(make_result())],
            "fact 'b' has n_layers 7",
        ),
    ],
)
def test_what_cannot_be_averaged_is_listed_with_a_note(tmp_path, given, note):
    data = payload(write_report(iter(given), tmp_path / "report.html"))
    assert len(data["facts"]) == len(given)
    assert data["averages"] is None
    assert note in data["notes"][0]


def test_numbers_that_are_not_finite_and_lone_surrogates_are_written(tmp_path):
    grids = {stream: np.full((4, 7), np.nan) for stream in STREAMS}
    odd = make_result(prob=grids, clean_prob=float("nan"), tokens=("\ud83d",) * 7, target="\ud83d")
    path = write_report([record(odd)], tmp_path / "report.html")
    fact = payload(path)["facts"][0]
    assert (fact["clean"], fact["total"], fact["target"]) == (None, None, "\ud83d")
    assert np.isnan(grid(path, 0)).all()


def test_no_text_can_end_the_script_that_holds_it(tmp_path):
    given = [named(1, HOSTILE, tokens=(HOSTILE,) * 7, target=HOSTILE), record(reason=HOSTILE, name=HOSTILE)]
    path = write_report(given, tmp_path / "r.html", title=HOSTILE, about={HOSTILE: HOSTILE}, notes=[HOSTILE])
    text = path.read_text("utf-8")
    assert "window.bad" in text
    assert "<script>window.bad" not in text
    assert "<img" not in text
    assert payload(path)["title"] == HOSTILE


def test_scripts_are_embedded_once_and_only_they_may_run(tmp_path):
    text = write_report(records(), tmp_path / "report.html").read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 3
    assert text.count("plotly.js v") == 1
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none'")
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_line_ends_of_scripts_are_those_the_browser_hashes():
    assert report._embeddable("a\r\nb\rc\n") == "a\nb\nc\n"


def test_1209_facts_of_a_large_model_stay_under_25_mb_and_work_grows_no_faster_than_they_do(tmp_path):
    result = make_result((1, 5), 11, n_layers=48, metadata={**RUN, "prompt": "The mother tongue of X is"})

    def written(facts):
        given = (record(result, str(i)) for i in range(facts))
        return calls_in(lambda: write_report(given, tmp_path / f"{facts}.html"))[1]

    _, few, some, many = map(written, (1, 3, 103, 1209))  # the first imports what it needs
    assert many <= few + 1.1 * (some - few) / 100 * 1206
    assert (tmp_path / "1209.html").stat().st_size < 25e6


def test_an_interrupted_report_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    def interrupted(*_args):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_page", interrupted)
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_report(records(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_report(records(), tmp_path / "file" / "report.html")


def test_without_plotly_the_error_says_what_to_install_before_records_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    given = records()
    with pytest.raises(FasttraceError, match=r'pip install "fasttrace\[report\]"'):
        write_report(given, tmp_path / "report.html")
    assert len(list(given)) == 4


# In a browser: Debian's chromium and chromium-driver.


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium or no chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    given = list(records())
    given[1].result.save(folder / "2.parquet")
    path = write_report(given, folder / "report.html", bad_rows=["row 7"], notes=[HOSTILE])
    return path


def show(browser, path, width=1400, scheme="light"):
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    wait(browser, lambda: browser.execute_script("return document.querySelectorAll('.main-svg').length > 0"))
    return browser


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: condition())


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def ids(browser):
    return [cell.text.split()[-1] for cell in find(browser, "tbody:not([hidden]) > tr > td:first-child")]


def press(browser, column):
    next(button for button in find(browser, "th button") if button.text.startswith(column)).click()


def type_into_search(browser, text):
    field = find(browser, "#search")[0]
    field.clear()
    field.send_keys(text or " ")


def open_fact(browser, i):
    button = find(browser, f"[aria-controls=detail-{i}]")[0]
    button.click()
    charts = f"#detail-{i} .chart"
    wait(browser, lambda: len(find(browser, f"{charts} .main-svg .hm image")) == 3)
    return find(browser, charts)


def hover(browser, chart, x, y):
    """Moves the pointer over a point in data coordinates; gives what the label says, line by line."""
    from selenium.webdriver import ActionChains

    place = """
        const [chart, x, y] = arguments, layout = chart._fullLayout;
        chart.scrollIntoView({block: "center"});
        const box = chart.getBoundingClientRect();
        return [box.x + layout.xaxis._offset + layout.xaxis.d2p(x), box.y + layout.yaxis._offset + layout.yaxis.d2p(y)];
    """
    left, top = browser.execute_script(place, chart, x, y)
    actions = ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(1, 1)
    actions.w3c_actions.pointer_action.move_to_location(round(left), round(top))
    actions.perform()
    wait(browser, lambda: chart.find_elements("css selector", ".hovertext .nums"))
    lines = "return [...arguments[0].querySelectorAll('.hovertext .nums .line')].map(line => line.textContent)"
    return browser.execute_script(lines, chart)


def requests(browser):
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def test_the_page_opens_from_disk_without_network_errors_or_foreign_scripts(browser, written):
    show(browser, written)
    open_fact(browser, 1)
    assert browser.title == "Causal tracing of org/gpt2-xl"
    assert browser.execute_script("return window.bad") is None
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_text_is_shown_as_it_is_written(browser, written):
    show(browser, written)
    assert find(browser, ".note")[0].text == HOSTILE
    assert find(browser, "tbody")[2].text.startswith(f"3 {HOSTILE}")
    assert "skipped: the subject <i>does not</i> occur" in find(browser, "tbody")[2].text
    assert [mark.text for mark in find(browser, "mark")] == ["Berlin", "Paris", "<img", "Rome"]


def test_the_summary_shows_counts_and_effects(browser, written):
    show(browser, written)
    tiles = [tile.text.splitlines() for tile in find(browser, "#tiles > div")]
    assert tiles[0] == ["Facts traced", "3", "of 4"]
    assert tiles[1] == ["Known by the model", "2", "of 3 with an expected answer"]
    total = average(records()).totals().iloc[2]
    assert tiles[4][:2] == ["Average total effect", f"{total['mean']:+.3g}"]
    assert float(tiles[4][2].split()[-1]) == pytest.approx(total["high"], rel=6e-3)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rome", ["10"]),
        ("P1", ["1", "10"]),
        ("THE lies", ["1"]),
        ("paris", ["1", "2", "10"]),
        ("zebra", []),
        ("<i>", ["2", "3"]),
    ],
)
def test_the_table_is_filtered_by_words_in_any_of_its_texts(browser, written, text, found):
    show(browser, written)
    type_into_search(browser, text)
    assert ids(browser) == found
    assert find(browser, "#found")[0].text == f"{len(found)} of 4 facts"
    type_into_search(browser, "")
    assert ids(browser) == ["1", "2", "3", "10"]


@pytest.mark.parametrize(
    ("choice", "found"), [("traced", ["1", "2", "10"]), ("skipped", ["3"]), ("known", ["2", "10"]), ("unknown", ["1"])]
)
def test_the_table_is_filtered_by_what_became_of_a_fact(browser, written, choice, found):
    show(browser, written)
    find(browser, f"#show option[value={choice}]")[0].click()
    assert ids(browser) == found


def test_the_table_is_sorted_by_a_press_on_a_heading_with_missing_values_last(browser, written):
    show(browser, written)
    effects = {r.fact.id: r.result.total_effect for r in records() if r.result}
    falling = sorted(effects, key=lambda name: -effects[name])
    open_fact(browser, 1)
    press(browser, "Total effect")
    assert [name for name in ids(browser) if name in effects] == falling
    assert "3" in ids(browser)[-1]
    assert find(browser, "th[aria-sort]")[0].get_attribute("aria-sort") == "descending"
    press(browser, "Total effect")
    assert [name for name in ids(browser) if name in effects] == falling[::-1]
    press(browser, "Id")
    assert [name for name in ids(browser) if name.isdigit()][:2] == ["1", "2"]
    detail = find(browser, ".detail")[0]
    assert detail.find_element("xpath", "..").text.startswith("2 Paris is where")


def test_hover_over_a_cell_shows_what_the_parquet_file_has(browser, written):
    show(browser, written)
    frame = pd.read_parquet(written.parent / "2.parquet")
    charts = open_fact(browser, 1)
    shown = ("<b>bold</b>", "Need", "&lt;le", "\\u000a", "東京", "%{x}", "$x$")
    for chart, stream in zip(charts, STREAMS, strict=True):
        for layer, position in ((0, 0), (3, 2), (1, 5), (2, 6), (1, 3), (3, 4)):
            cell = frame[(frame.stream == stream) & (frame.layer == layer) & (frame.position == position)].iloc[0]
            where, probability, effect = hover(browser, chart, layer, position)
            assert where == f"{shown[position]}, block {layer}"
            assert float(probability.removeprefix("probability ")) == pytest.approx(cell.prob, rel=5.1e-4)
            assert float(effect.removeprefix("indirect effect ")) == pytest.approx(cell.indirect_effect, rel=5.1e-4)


def test_the_axis_names_tokens_as_they_are_with_a_star_at_the_subject(browser, written):
    show(browser, written)
    chart = open_fact(browser, 1)[0]
    labels = [tick.get_attribute("textContent") for tick in chart.find_elements("css selector", ".ytick text")]
    assert labels == ["<b>bold</b>*", "Need*", "&lt;le*", "\\u000a", "東京", "%{x}", "$x$"]


def test_hover_over_averages_shows_mean_intervals_and_counts(browser, written):
    show(browser, written)
    averages = average(records())
    frame = averages.to_frame()
    cell = frame[(frame.stream == "mlp_activation") & (frame.role == averages.roles[2]) & (frame.layer == 1)].iloc[0]
    chart = find(browser, "#average-maps .chart")[1]
    where, mean, normal, bootstrap, count = hover(browser, chart, 1, 2)
    assert where == "Last subject token, block 1"
    assert float(mean.split()[-1]) == pytest.approx(cell["mean"], rel=5.1e-4)
    digit = cell["mean"] * 5.1e-4  # an interval has the mean's digits
    assert [float(x) for x in normal.removeprefix("95 % interval ").split(" … ")] == pytest.approx(
        [cell.low, cell.high], abs=digit
    )
    assert float(bootstrap.split()[-1]) == pytest.approx(cell.boot_high, abs=digit)
    assert count == "3 tokens of 3 facts"


def test_a_line_shows_its_mean_too(browser, written):
    show(browser, written)
    frame = average(records()).to_frame()
    cell = frame[(frame.stream == "block_output") & (frame.role == "further") & (frame.layer == 2)].iloc[0]
    lines = hover(browser, find(browser, "#average-lines .chart")[0], 2, cell["mean"])
    assert lines[0].endswith("block 2")
    assert len(lines) == 5


def test_a_fact_is_opened_and_closed_from_the_keyboard(browser, written):
    from selenium.webdriver.common.keys import Keys

    show(browser, written)
    find(browser, "#search")[0].send_keys("rome", Keys.ENTER)
    assert ids(browser) == ["10"]
    button = find(browser, "[aria-controls=detail-3]")[0]
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    wait(browser, lambda: len(find(browser, "#detail-3 .hm image")) == 3)
    assert "Strongest: " in find(browser, "#detail-3")[0].text
    button.send_keys(Keys.SPACE)
    assert button.get_attribute("aria-expanded") == "false"
    assert find(browser, "#detail-3") == []


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_is_wider_than_the_window(browser, written, width):
    show(browser, written, width)
    open_fact(browser, 0)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ends = """
        const parts = document.querySelectorAll("h1, td, .chart, .chart svg, #controls *");
        return [...parts].map((part) => part.getBoundingClientRect().right);
    """
    assert max(browser.execute_script(ends)) <= width
    for chart in find(browser, ".chart"):
        sizes = "return [arguments[0].clientWidth, arguments[0].querySelector('svg').clientWidth]"
        box, drawing = browser.execute_script(sizes, chart)
        assert abs(box - drawing) <= 1


@pytest.mark.parametrize("width", [1400, 400])
def test_charts_do_not_lie_over_each_other(browser, written, width):
    show(browser, written, width)
    open_fact(browser, 0)
    boxes = [chart.rect for chart in find(browser, ".chart .main-svg:first-child")]
    assert len(boxes) == 9
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = abs(one["x"] - other["x"]) >= min(one["width"], other["width"]) - 1
            assert apart or abs(one["y"] - other["y"]) >= min(one["height"], other["height"]) - 1


def test_charts_follow_the_window_and_the_color_scheme(browser, written):
    show(browser, written, scheme="dark")
    color = "return getComputedStyle(document.querySelector('.xtick text')).fill"
    assert browser.execute_script(color) == "rgb(236, 236, 241)"
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    wait(browser, lambda: browser.execute_script(color) == "rgb(26, 26, 31)")
    size = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    widths = "return [...document.querySelectorAll('.chart svg.main-svg')].every(e => e.clientWidth <= 700)"
    wait(browser, lambda: browser.execute_script(widths))


def test_a_run_without_a_traced_fact_is_a_page_too(browser, tmp_path):
    path = write_report([record(reason="too long")], tmp_path / "report.html")
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert find(browser, "#found")[0].text == "1 of 1 facts"
    assert not find(browser, "#averages")[0].is_displayed()
    assert "No averages" in find(browser, ".note")[0].text
    assert browser.get_log("browser") == []


def test_a_grid_of_nan_and_one_block_are_drawn(browser, tmp_path):
    empty = make_result(prob={stream: np.full((1, 7), np.nan) for stream in STREAMS}, n_layers=1)
    path = write_report([record(empty)], tmp_path / "report.html")
    browser.get_log("browser")
    browser.get(path.as_uri())
    find(browser, "[aria-controls=detail-0]")[0].click()
    wait(browser, lambda: len(find(browser, "#detail-0 .main-svg")) > 0)
    assert browser.get_log("browser") == []


def test_another_metric_changes_tiles_averages_table_and_open_facts(browser, tmp_path):
    given = list(pairs())
    path = write_report(given, tmp_path / "r.html", metrics=("kl", ODD))
    show(browser, path)
    assert [option.text for option in find(browser, "#metric option")] == ["prob", "KL from clean", ODD]
    open_fact(browser, 0)
    assert [mark.text for mark in find(browser, ".pair mark")] == ["t2", "o2"]
    result = given[0].result
    for k, (name, title) in enumerate((("kl", "KL from clean"), (ODD, ODD), ("kl", "KL from clean"))):
        find(browser, "#metric option")[1 + k % 2].click()
        charts = find(browser, "#detail-0 .chart")
        wait(browser, lambda: len(find(browser, "#detail-0 .chart .main-svg .hm image")) == 3)
        for layer, position in ((0, 0), (3, 5)):
            _, value, effect = hover(browser, charts[1], layer, position)
            expected = result.grid("mlp_activation", metric=name)[layer, position]
            shift = result.grid("mlp_activation", "indirect_effect", metric=name)[layer, position]
            assert value.startswith(f"{title} ")
            assert float(value.split()[-1]) == pytest.approx(expected, abs=1e-3, rel=6e-4)
            assert float(effect.split()[-1]) == pytest.approx(shift, rel=6e-4)
        tiles = [tile.text.splitlines()[0] for tile in find(browser, "#tiles > div")]
        assert tiles[2:4] == [f"{title}, clean", f"{title}, corrupted"]
        assert [cell.text for cell in find(browser, "tbody:first-of-type td.number")] == ["0.000", "2.500", "-2.500"]
        best = result.strongest("mlp_activation", 1, metric=name).iloc[0]
        note = charts[1].find_element("xpath", "preceding-sibling::p").text
        assert note.startswith(f"Strongest: t{best.position}, block {best.layer}, ")
        peak = average(given, metric=name).strongest("mlp_activation").iloc[0]
        assert f"block {peak.layer}, " in find(browser, "#average-maps .quiet")[1].text
        assert find(browser, "#average-maps .quiet")[1].text.startswith("Smallest")
    assert browser.get_log("browser") == []


def test_a_page_of_one_metric_has_no_chooser(browser, written):
    assert not show(browser, written).find_element("id", "chooser").is_displayed()
