"""One self-contained page about a run: figures, throughput over time, and a timeline of its first requests.

No script, no font and no picture comes from outside, so that the page can be kept, mailed and opened years later.
"""

import html
import math
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Figure", "Phase", "Report", "Section", "Series", "Span", "Timeline", "throughput", "write_report"]


@dataclass(frozen=True)
class Figure:
    """One line of a table: ``value`` as it shall be read; ``note`` says against what, or how it was counted."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    figures: list[Figure]


@dataclass(frozen=True)
class Series:
    """One line of the throughput plot: ``points`` are ``(cycle, bytes per cycle)``; ``limit`` is drawn dashed beside it."""

    name: str
    points: list[tuple[float, float]]
    limit: float | None = None


@dataclass(frozen=True)
class Phase:
    """A named stretch of the run, from cycle ``begin`` to cycle ``end``."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Span:
    """One thing that took from cycle ``begin`` to cycle ``end``, of the kind ``lane``; ``text`` is shown on pointing."""

    lane: str
    begin: int
    end: int
    text: str = ""


@dataclass(frozen=True)
class Timeline:
    """Spans in lanes, in the order of ``lanes``; cycle ``origin`` is shown as 0."""

    title: str
    lanes: list[str]
    spans: list[Span]
    origin: int = 0


@dataclass(frozen=True)
class Report:
    """Everything on the page; ``good`` decides the colour of ``verdict``."""

    title: str
    verdict: str
    good: bool
    facts: dict[str, str]
    sections: list[Section]
    series: list[Series] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)


def throughput(transfers, *, windows=160, begin=None, end=None):
    """Return the points of a :class:`Series` from ``transfers``, a list of ``(cycle, bytes)`` in order of time.

    The run is cut into equal windows; a point is the mean of its window, at its middle.
    """
    if not transfers:
        return []
    begin = transfers[0][0] if begin is None else begin
    end = transfers[-1][0] + 1 if end is None else end
    width = max(1, math.ceil((end - begin) / windows))
    sums = [0] * max(1, math.ceil((end - begin) / width))
    for when, size in transfers:
        if begin <= when < end:
            sums[(when - begin) // width] += size
    return [(begin + (n + 0.5) * width, total / min(width, end - begin - n * width)) for n, total in enumerate(sums)]


def write_report(path, report):
    """Write ``report`` as one HTML file and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(report), encoding="utf-8")
    return path


_STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#1b1f24;--soft:#5d6570;--line:#e3e4e1;--good:#1a7f4b;
  --bad:#c0352b;--c0:#2a6fdb;--c1:#d9730d;--c2:#1c8c7a;--c3:#8a4fd0;--c4:#b8860b;--c5:#c2377f;--c6:#5b7083}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--card:#1c2026;--ink:#e8eaed;--soft:#9aa3ae;--line:#31363e;
  --good:#4cc38a;--bad:#f2776d;--c0:#6aa5ff;--c1:#f59a4a;--c2:#4fc4af;--c3:#b48cf0;--c4:#e0b84a;--c5:#ee7fb4;
  --c6:#94a9bd}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 6px}
h2{font-size:17px;margin:0 0 12px}
.verdict{font-weight:600}
.good{color:var(--good)}
.bad{color:var(--bad)}
.facts{display:flex;flex-wrap:wrap;gap:4px 22px;margin:10px 0 26px;color:var(--soft);font-size:13px}
.facts b{color:var(--ink);font-weight:500}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:18px;margin-bottom:18px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-bottom:18px;
  overflow-x:auto}
.cards .card{margin:0}
table{border-collapse:collapse;width:100%;font-size:14px}
td{padding:4px 0;border-top:1px solid var(--line);vertical-align:top}
tr:first-child td{border-top:0}
td.v{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-left:14px;font-weight:500}
.note{color:var(--soft);font-size:12.5px}
svg{display:block;width:100%;height:auto;min-width:640px}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.grid{stroke:var(--line)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin:0 0 8px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.dash{stroke-dasharray:5 4}
"""


def _text(value):
    return html.escape(str(value), quote=True)


def _page(report):
    facts = "".join(f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in report.facts.items())
    parts = [
        f"<h1>{_text(report.title)}</h1>",
        f'<div class="verdict {"good" if report.good else "bad"}">{_text(report.verdict)}</div>',
        f'<div class="facts">{facts}</div>',
        '<div class="cards">' + "".join(map(_table, report.sections)) + "</div>" if report.sections else "",
        _plot(report.series, report.phases) if any(series.points for series in report.series) else "",
        *(_timeline(timeline) for timeline in report.timelines if timeline.spans),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(report.title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def _table(section):
    rows = []
    for figure in section.figures:
        note = f'<div class="note">{_text(figure.note)}</div>' if figure.note else ""
        rows.append(f'<tr><td>{_text(figure.name)}{note}</td><td class="v">{_text(figure.value)}</td></tr>')
    return f'<section class="card"><h2>{_text(section.title)}</h2><table>{"".join(rows)}</table></section>'


def _ticks(low, high, count):
    """Return at most about ``count`` round numbers from ``low`` to ``high``."""
    span = max(high - low, 1e-9)
    raw = span / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= raw)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value):
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


_WIDTH, _LEFT, _RIGHT = 1040, 56, 18


def _scale(low, high, begin, end):
    return lambda value: round(begin + (value - low) / max(high - low, 1e-9) * (end - begin), 2)


def _x_axis(x, low, high, top, bottom, origin=0):
    out = []
    for tick in _ticks(low - origin, high - origin, 9):
        at = x(tick + origin)
        out.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{bottom}"/>')
        out.append(f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{_number(tick)}</text>')
    out.append(f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 34}" text-anchor="end">cycles</text>')
    return out


def _plot(series, phases):
    height, top, bottom = 330, 26, 282
    cycles = [point[0] for one in series for point in one.points] + [c for p in phases for c in (p.begin, p.end)]
    low, high = min(cycles), max(cycles)
    peak = max([value for one in series for _, value in one.points] + [one.limit or 0 for one in series]) * 1.08 or 1
    x, y = _scale(low, high, _LEFT, _WIDTH - _RIGHT), _scale(0, peak, bottom, top)
    out = _x_axis(x, low, high, top, bottom)
    for tick in _ticks(0, peak, 6):
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{_number(tick)}</text>')
    for phase in phases:
        out.append(f'<line class="grid" x1="{x(phase.begin)}" x2="{x(phase.begin)}" y1="8" y2="{bottom}"/>')
        if x(phase.end) - x(phase.begin) > 7 * len(phase.name) + 8:
            out.append(f'<text x="{x(phase.begin) + 5}" y="18">{_text(phase.name)}</text>')
    legend = []
    for n, one in enumerate(series):
        colour = f"var(--c{n % 7})"
        if one.points:
            line = " ".join(f"{x(c)},{y(v)}" for c, v in one.points)
            area = f"{x(one.points[0][0])},{bottom} {line} {x(one.points[-1][0])},{bottom}"
            out.append(f'<polygon points="{area}" fill="{colour}" opacity=".13"/>')
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>')
        limit = ""
        if one.limit is not None:
            at = y(one.limit)
            ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"'
            out.append(f'<line class="dash" {ends} stroke="{colour}" stroke-width="1.5"/>')
            limit = f", limit {_number(round(one.limit, 2))} (dashed)"
        legend.append(f'<span><i style="background:{colour}"></i>{_text(one.name + limit)}</span>')
    return (
        '<section class="card"><h2>Throughput over the run</h2><div class="note">payload bytes per cycle</div>'
        f'<div class="legend">{"".join(legend)}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Throughput over the run">{"".join(out)}</svg></section>'
    )


def _rows(spans):
    """Return ``[(row, span)]`` so that spans of one row do not overlap: the first row that is free."""
    placed, ends = [], []
    for span in sorted(spans, key=lambda s: (s.begin, s.end)):
        row = next((n for n, end in enumerate(ends) if end <= span.begin), len(ends))
        ends[row : row + 1] = [max(span.end, span.begin + 1)]
        placed.append((row, span))
    return placed


def _timeline(timeline):
    low = min(span.begin for span in timeline.spans)
    high = max(span.end for span in timeline.spans)
    left, bar, gap, top = 132, 9, 3, 10
    x = _scale(low, max(high, low + 1), left, _WIDTH - _RIGHT)
    out, at = [], top
    for n, lane in enumerate(timeline.lanes):
        placed = _rows([span for span in timeline.spans if span.lane == lane])
        rows = max([row for row, _ in placed], default=0) + 1
        tall = rows * (bar + gap) + 8
        if n % 2 == 0:
            out.append(f'<rect x="0" y="{at}" width="{_WIDTH}" height="{tall}" fill="var(--line)" opacity=".35"/>')
        out.append(f'<text x="8" y="{at + tall / 2 + 4}">{_text(lane)}</text>')
        for row, span in placed:
            begin, end = x(span.begin), x(max(span.end, span.begin))
            text = f"{lane}: {span.begin - timeline.origin:,} to {span.end - timeline.origin:,} {span.text}".strip()
            wide = max(round(end - begin, 2), 2.5)
            out.append(
                f'<rect x="{begin}" y="{at + 4 + row * (bar + gap)}" width="{wide}" height="{bar}" rx="2" '
                f'fill="var(--c{n % 7})"><title>{_text(text)}</title></rect>'
            )
        at += tall
    axis = _x_axis(x, low, max(high, low + 1), top, at, timeline.origin)
    return (
        f'<section class="card"><h2>{_text(timeline.title)}</h2>'
        f'<svg viewBox="0 0 {_WIDTH} {at + 42}" role="img" aria-label="{_text(timeline.title)}">'
        f"{''.join(axis + out)}</svg></section>"
    )
