"""The page as a reader sees it. Screenshots go to $MOEQ_ARTEFACTS, else to tests/artefacts."""

import os
import shutil
from pathlib import Path

import pytest
from written_checkpoint import write_checkpoint

from moeq_plugin.report.directory import read_directory
from moeq_plugin.report.page import render, render_comparison

pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]
ARTEFACTS = Path(os.environ.get("MOEQ_ARTEFACTS") or Path(__file__).parents[1] / "artefacts")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
NAMES = {
    "load-natural", "load-sampled", "effective-tokens", "bits", "bits-of-experts", "losses",
    "pareto", "jaccard", "router-kl",
}  # fmt: skip
PHONE, DESK = 390, 1100
# what each chart drew: cells of a heatmap are an image, bars and points are paths
MARKS = """() => Object.fromEntries([...document.querySelectorAll(".chart")].map(div => [
  div.id.replace("chart-", ""),
  div.querySelectorAll("image, .barlayer .point path, .scatterlayer .points path").length]))"""
# pairs of words of one chart whose boxes overlap by more than a pixel
OVERLAPS = """() => [...document.querySelectorAll(".chart")].flatMap(div => {
  const texts = [...div.querySelectorAll("svg text")].filter(t => t.textContent.trim());
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
    Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1).map(([b]) => [div.id, a, b]));
})"""
# words that reach out of their chart, where they are cut off
CLIPPED = """() => [...document.querySelectorAll(".chart")].flatMap(div => {
  const box = div.getBoundingClientRect();
  return [...div.querySelectorAll("svg text")].filter(t => {
    const r = t.getBoundingClientRect();
    return r.width && (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 ||
      r.bottom > box.bottom + 1);
  }).map(t => [div.id, t.textContent]);
})"""
# ratio of luminances (WCAG 2) of all kinds of text against the paper, charts included
CONTRAST = """() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = (color) => {
    const [low, high] = [paper, luminance(color)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const html = [...document.querySelectorAll("h1, p, dt, dd, td, th, figcaption, a, strong")]
    .map(e => [e.tagName, ratio(getComputedStyle(e).color)]);
  const svg = [...document.querySelectorAll(".chart svg text")]
    .map(e => [e.textContent, ratio(getComputedStyle(e).fill)]);
  return [...html, ...svg].filter(([, r]) => r < 4.5);
}"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("report") / "some-moe-W4")
    found = read_directory(directory)
    found.front = [
        {
            "num_bytes": size,
            "bits_per_weight": size / 5e3,
            "loss": 1e7 / size**2,
            "counts": {"W4": 9},
        }
        for size in (12_000, 15_000, 21_000, 30_000)
    ]
    path = directory / "report.html"
    path.write_text(render(found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Reader:
    """An open page, with what it complained about and what it asked the network for."""

    def __init__(self, browser, path, width, scheme):
        self.page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=1
        )
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.wait()

    def wait(self):
        self.page.wait_for_function("document.documentElement.dataset.drawn", timeout=120_000)
        self.page.wait_for_timeout(400)

    def color(self, selector="body", name="backgroundColor"):
        script = f"e => getComputedStyle(e).{name}"
        return self.page.eval_on_selector(selector, script)


@pytest.fixture(
    scope="module", params=[(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")],
    ids=lambda param: f"{param[1]}-{param[0]}",
)  # fmt: skip
def reader(request, browser, page_file):
    width, scheme = request.param
    opened = Reader(browser, page_file, width, scheme)
    opened.width, opened.scheme = width, scheme
    yield opened
    opened.page.close()


def test_nothing_is_complained_about_or_fetched(reader):
    assert reader.complaints == []
    assert [
        url[:60] for url in reader.requests if not url.startswith(("file:", "data:", "blob:"))
    ] == []
    assert sum(url.startswith("file:") for url in reader.requests) == 1


def test_every_chart_is_drawn(reader):
    marks = reader.page.evaluate(MARKS)
    assert set(marks) == NAMES
    assert all(marks.values()), marks
    assert marks["pareto"] == 4 + 3 + 1
    assert marks["bits"] == 6


def test_the_page_does_not_scroll_sideways(reader):
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= reader.width


def test_no_words_overlap_and_none_are_cut_off(reader):
    assert reader.page.evaluate(OVERLAPS) == []
    assert reader.page.evaluate(CLIPPED) == []


def test_all_text_has_contrast(reader):
    assert reader.page.evaluate(CONTRAST) == []


def test_a_screenshot_is_kept(reader):
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    path = ARTEFACTS / f"report-{reader.scheme}-{reader.width}.png"
    reader.page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 50_000


def test_values_show_on_hover(browser, page_file):
    opened = Reader(browser, page_file, DESK, "light")
    for name, expected in (("effective-tokens", "effective tokens"), ("bits", "bits per weight")):
        plot = opened.page.locator(f"#chart-{name} .nsewdrag").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        opened.page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.85 * box["height"])
        opened.page.wait_for_selector(f"#chart-{name} .hoverlayer text")
        text = opened.page.locator(f"#chart-{name} .hoverlayer").text_content()
        assert expected in text, text
    opened.page.close()


def test_charts_follow_the_scheme_without_a_reload(browser, page_file):
    opened = Reader(browser, page_file, DESK, "light")
    bar = "#chart-bits .barlayer .point path"
    before = opened.color(), opened.color(bar, "fill")
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_timeout(3000)
    after = opened.color(), opened.color(bar, "fill")
    assert before[0] != after[0]
    assert before[1] != after[1]
    opened.page.close()


def test_paper_is_white_even_for_who_reads_in_the_dark(browser, page_file):
    opened = Reader(browser, page_file, DESK, "dark")
    bar = "#chart-bits .barlayer .point path"
    dark = opened.color(bar, "fill")
    ARTEFACTS.mkdir(parents=True, exist_ok=True)

    printed = opened.page.pdf(
        path=ARTEFACTS / "report.pdf", prefer_css_page_size=True, print_background=True
    )
    assert printed.startswith(b"%PDF")

    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened.page.wait_for_timeout(2000)
    assert opened.color(bar, "fill") != dark
    assert opened.color("h1", "color") == "rgb(31, 36, 40)"
    widths = opened.page.evaluate(
        "[...document.querySelectorAll('.chart .main-svg')].map(e => e.clientWidth)"
    )
    assert max(widths) <= 680

    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.page.wait_for_timeout(2000)
    assert opened.color(bar, "fill") == dark
    opened.page.close()


def test_no_column_of_a_comparison_is_cut_off(browser, tmp_path):
    names = ("reference_moe-W8A16", "reference_moe-W4A16-balanced", "reference_moe-3.0bits-best")
    several = [read_directory(write_checkpoint(tmp_path / name)) for name in names]
    path = tmp_path / "report.html"
    path.write_text(render_comparison(several), encoding="utf-8")
    opened = Reader(browser, path, 1200, "light")
    widths = opened.page.evaluate(
        "[...document.querySelectorAll('.table')].map(e => [e.scrollWidth, e.clientWidth])"
    )
    opened.page.close()
    assert widths and all(needed <= there for needed, there in widths)
