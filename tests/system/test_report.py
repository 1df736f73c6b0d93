"""The report page: complete, well formed, self-contained, and its drawings are to scale."""

import re
from html.parser import HTMLParser

import pytest

from ringwall.sim.report import Figure, Phase, Report, Section, Series, Span, Timeline, throughput, write_report

VOID = {"meta"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects tags and visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open or self.open[-1] != "style":
            self.text.append(text)


def read(path):
    page = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open, f"not closed: {reader.open}"
    return page, reader


def report(**other):
    sections = [Section("Requests", [Figure("reads", "1,234", "of 1,300")])]
    return Report("A <run> & more", "0 differences", True, {"seed": "12"}, sections, **other)


def test_report(tmp_path):
    """SIM-REPORT-1: the page holds every figure, escapes what it is given, and refers to nothing outside itself."""
    spans = [Span("walk", 100, 180, "page <0>"), Span("walk", 120, 200), Span("data", 180, 180)]
    page, reader = read(write_report(tmp_path / "r" / "index.html", report(
        series=[Series("read", [(0, 1.0), (50, 4.0), (100, 2.0)], 8.0)], phases=[Phase("all", 0, 100)],
        timelines=[Timeline("First", ["walk", "data"], spans, 100)])))  # fmt: skip
    text = " ".join(reader.text)
    drawn = ["limit 8 (dashed)", "walk: 0 to 80 page <0>"]
    for wanted in ["A <run> & more", "0 differences", "12", "reads", "1,234", "of 1,300", *drawn]:
        assert wanted in text, wanted
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link", page)
    assert {"svg", "table", "style"} <= {tag for tag, _ in reader.tags}
    bars = [a for tag, a in reader.tags if tag == "rect" and "rx" in a]
    assert len(bars) == 3
    first, second, point = bars
    assert float(first["width"]) == pytest.approx(float(second["width"]))
    assert first["y"] != second["y"], "two spans that overlap share a row"
    assert float(second["x"]) - float(first["x"]) == pytest.approx(float(first["width"]) / 4, abs=0.1)
    assert 0 < float(point["width"]) < 4, "an instant is drawn as a mark"
    line = next(a["points"] for tag, a in reader.tags if tag == "polyline").split()
    xs, ys = zip(*(map(float, point.split(",")) for point in line), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    zero = 282
    assert (zero - ys[1]) / (zero - ys[0]) == pytest.approx(4, rel=0.01)


def test_report_of_nothing(tmp_path):
    """SIM-REPORT-2: a run without transfers and with a bad verdict makes a page, too."""
    page, reader = read(write_report(tmp_path / "index.html", Report("t", "3 differences", False, {}, [], [Series("read", [])])))
    assert 'class="verdict bad"' in page
    assert "svg" not in {tag for tag, _ in reader.tags}


def test_throughput():
    """SIM-REPORT-3: no byte is lost or counted twice in the windows, whatever their number."""
    transfers = [(n * n % 977 + 10 * n, n + 1) for n in range(200)]
    transfers.sort()
    total = sum(size for _, size in transfers)
    begin, end = transfers[0][0], transfers[-1][0] + 1
    for windows in (1, 7, 160, 100000):
        points = throughput(transfers, windows=windows)
        width = -(-(end - begin) // windows)
        sizes = [min(width, end - begin - n * width) for n in range(len(points))]
        assert sum(value * size for (_, value), size in zip(points, sizes, strict=True)) == pytest.approx(total)
        assert len(points) <= windows
    assert throughput([]) == []
    assert throughput([(5, 64)], begin=0, end=8, windows=1) == [(4.0, 8.0)]
