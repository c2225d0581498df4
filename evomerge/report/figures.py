"""The report's figures: SVG text, drawn with matplotlib, that takes its colours and font from the page.

Every figure is drawn twice, for a desktop's and for a phone's width; the page shows one of the two. Text
stays text, and each colour becomes a CSS variable, so that one drawing serves light and dark pages.
"""

from __future__ import annotations

import html
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

COLOURS = dict(
    pair.split()
    for pair in (
        *("page #ffffff", "ink #1b2430", "soft #5a6675", "line #d3d9e0", "band #f2f4f7", "bad #b42330"),
        *("winner #c2410c", "s0 #2161a6", "s1 #2b7a4b", "s2 #7546ad", "s3 #0e7a87"),
        *("s4 #ab3275", "s5 #756700", "s6 #86583a", "s7 #526075"),
    )
)
"""CSS variable to its value on a light page; the page's style sheet holds those for a dark one."""

MARKERS = ("s", "^", "D", "v", "P", "X", "p", "h")
SERIES = 8
MOST_POINTS = 1500
MOST_LINES = 10
LONG = 12

_RC: dict[str, Any] = {
    **{"svg.fonttype": "none", "text.parse_math": False},
    **{"axes.facecolor": "none", "figure.facecolor": "none"},
    **{"axes.edgecolor": COLOURS["line"], "axes.labelcolor": COLOURS["soft"], "text.color": COLOURS["ink"]},
    **{"xtick.color": COLOURS["line"], "xtick.labelcolor": COLOURS["soft"], "grid.color": COLOURS["line"]},
    **{"ytick.color": COLOURS["line"], "ytick.labelcolor": COLOURS["soft"], "grid.linewidth": 0.7},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **{"xtick.major.size": 3, "ytick.major.size": 0, "axes.titlesize": "medium"},
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure as two pieces of SVG: for wide pages and for phones."""

    wide: str
    narrow: str


@dataclass(frozen=True, slots=True)
class Look:
    """How a model is drawn in every figure: its name, a key of `COLOURS`, and a marker."""

    name: str
    colour: str
    marker: str

    @property
    def ink(self) -> str:
        """Its colour."""
        return COLOURS[self.colour]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the ends of its interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One parameter of the winner over the layers.

    Attributes:
        title: What it shows.
        scale: Panels of one scale share the vertical axis.
        lines: One value per layer for each look.
    """

    title: str
    scale: str
    lines: Sequence[tuple[Look, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Tasks whose metrics share an axis.

    Attributes:
        metric: What the axis shows.
        rows: Task name, and each look's estimate.
    """

    metric: str
    rows: Sequence[tuple[str, Sequence[tuple[Look, Estimate]]]]


def clean(text: str) -> str:
    """Return the text without control, direction and surrogate characters; line ends stay."""
    return "".join(
        c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def shortened(text: str, limit: int) -> str:
    """Return the text on one line, cut to `limit` characters."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def progress(
    points: Sequence[tuple[int, float]],
    failed: Sequence[int],
    baselines: Sequence[tuple[Look, float]],
    winner: tuple[int, float] | None,
    label: str,
) -> Drawing:
    """Draw the search: scores over evaluation numbers, best so far, baselines as lines.

    Args:
        points: Evaluation number and score, in order.
        failed: Evaluation numbers without a score.
        baselines: Their search scores.
        winner: Where the winner stands; None: nowhere.
        label: What the figure says, for those who cannot see it.
    """

    def paint(width: int) -> Figure:
        narrow = width < 500
        right, height = (96, 300) if narrow else (150, 350)
        figure, axes = _axes(width, height, left=50, right=right, top=12, bottom=44)
        low, high = frame([s for _, s in points], [s for _, s in baselines])
        last = max([2, *(n for n, _ in points), *failed, *([winner[0]] if winner else [])])
        axes.set(ylim=(low, high), xlim=(0.5 - last * 0.01, last * 1.01 + 0.5))
        axes.set(xlabel="evaluation", ylabel="search score")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(visible=False, axis="x")
        inside = _thinned([point for point in points if point[1] >= low])
        below = _thinned([point for point in points if point[1] < low])
        dots = {"ls": "none", "mec": "none", "color": COLOURS["soft"], "alpha": 0.55}
        axes.plot(*_columns(inside), marker="o", ms=4 if len(points) < 400 else 2.8, **dots)
        axes.plot([n for n, _ in below], [low] * len(below), marker="v", ms=5, clip_on=False, **dots)
        bad = {"ls": "none", "marker": "x", "ms": 5, "mew": 1.3, "color": COLOURS["bad"]}
        marks = failed[:: math.ceil(len(failed) / MOST_POINTS) or 1]
        axes.plot(marks, [0.025] * len(marks), transform=axes.get_xaxis_transform(), **bad)
        if points:
            axes.step(*_columns(_records(points, last)), where="post", color=COLOURS["winner"], lw=1.6)
        if winner:
            axes.plot(*winner, "*", ms=13, color=COLOURS["winner"], mec="none", clip_on=False, zorder=5)
        _lines(axes, baselines, (low, high), height - 56, right - 14)
        return figure

    return both(paint, "progress", label)


def coefficients(panels: Sequence[Panel], label: str) -> Drawing:
    """Draw parameters over the layers, one panel each."""

    def paint(width: int) -> Figure:
        columns = 1 if width < 500 else min(3 if len(panels) > 4 else 2, len(panels))
        rows = math.ceil(len(panels) / columns)
        cell, row_height = width / columns, 190
        figure = Figure(figsize=(width / 72, rows * row_height / 72))
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            axes = axes_at(figure, column * cell + 42, row * row_height + 26, cell - 54, row_height - 26 - 42)
            values = [v for p in panels if p.scale == panel.scale for _, line in p.lines for v in line]
            span = (max(values) - min(values)) or 1.0
            axes.set(ylim=(min(values) - 0.08 * span, max(values) + 0.08 * span))
            axes.set_title(shortened(panel.title, int(cell / 7)), loc="left", fontweight="bold", pad=8)
            axes.xaxis.set(label_text="layer", major_locator=MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            for look, line in panel.lines:
                marked = {"marker": look.marker, "ms": 4.5, "markevery": max(1, round(len(line) / 8))}
                axes.plot(range(len(line)), line, color=look.ink, lw=1.6, mec="none", **marked)
        return figure

    return both(paint, "coefficients", label)


def tasks(groups: Sequence[TaskRows], label: str) -> Drawing:
    """Draw each task's scores as dots with intervals."""

    def paint(width: int) -> Figure:
        title = 17 if width < 500 else 0
        dense = sum(len(group.rows) for group in groups) > LONG
        most = max(len(estimates) for group in groups for _, estimates in group.rows)
        row = max(16.0, (4.6 if dense else 7.5) * most + 7) + title
        heights = [row * len(group.rows) for group in groups]
        figure = Figure(figsize=(width / 72, (sum(heights) + 60 * len(groups) + 4) / 72))
        names = [name for group in groups for name, _ in group.rows]
        left = 14.0 if title else 24.0 + 7.0 * min(38, max(map(len, names)))
        top = 20.0
        for group, height in zip(groups, heights, strict=True):
            axes = axes_at(figure, left, top, width - left - 16, height)
            _task_panel(axes, group, row, title, int(width / 6.5) if title else 38)
            top += height + 60
        return figure

    return both(paint, "tasks", label)


def gains(rows: Sequence[tuple[str, Estimate]], label: str) -> Drawing:
    """Draw the winner's gains in points, with a line at zero."""

    def paint(width: int) -> Figure:
        narrow = width < 500
        row = 44 if narrow else 30
        left = 14.0 if narrow else 30.0 + 7.2 * min(30, max(len(name) for name, _ in rows))
        right = 14.0 if narrow else 24.0 + 6.8 * max(len(amount(gain)) for _, gain in rows)
        margins = {"left": left, "right": right, "top": 8, "bottom": 48}
        figure, axes = _axes(width, len(rows) * row + 56, **margins)
        for index, (name, gain) in enumerate(rows):
            y = index + (0.72 if narrow else 0.5)
            colour = COLOURS["winner" if (gain.low or 0) > 0 else "soft"]
            _dot(axes, gain, y, colour, "o", size=7, line=2.0)
            if narrow:
                _at(axes, 0.0, index + 0.3, f"{shortened(name, 30)}  {amount(gain)}", boxed=True)
            else:
                _at(axes, -0.02, y, shortened(name, 30), ha="right")
                _at(axes, 1.02, y, amount(gain))
        axes.axvline(0, color=COLOURS["ink"], lw=1.2)
        ends = [0.0, *(v for _, g in rows for v in (g.value, g.low, g.high) if v is not None)]
        pad = 0.06 * (max(ends) - min(ends)) or 1.0
        axes.set(xlim=(min(ends) - pad, max(ends) + pad), ylim=(len(rows), 0), yticks=[])
        axes.set(xlabel="gain in points (0: no difference)")
        axes.spines.left.set_visible(False)
        return figure

    return both(paint, "gains", label)


def _task_panel(axes: Any, group: TaskRows, row: float, title: float, letters: int) -> None:
    """Draw one axis of tasks; `row` is a row's height and `title` its part for the task's name."""
    for index, (name, estimates) in enumerate(group.rows):
        if index % 2 == 0:
            axes.axhspan(index, index + 1, color=COLOURS["band"], lw=0, zorder=0)
        if title:
            _at(axes, 0.01, index + 0.5 * title / row, shortened(name, letters))
        else:
            _at(axes, -0.015, index + 0.5, shortened(name, letters), ha="right")
        free = (row - title - 7) / row
        for place, (look, estimate) in enumerate(estimates):
            y = index + title / row + 3.5 / row + free * (place + 0.5) / len(estimates)
            size, line = (6.5, 1.7) if look.colour == "winner" else (4.6, 0.9)
            _dot(axes, estimate, y, look.ink, look.marker, size=size, line=line)
    found = [e for _, estimates in group.rows for _, e in estimates]
    ends = [v for e in found for v in (e.value, e.low, e.high) if v is not None]
    if min(ends) > 0 and max(ends) > max(1.0, 20 * min(ends)):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    else:
        pad = 0.03 * (max(ends) - min(ends)) or 0.05
        axes.set_xlim(min(ends) - pad, max(ends) + pad)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labeltop=len(group.rows) > LONG)
    axes.set(ylim=(len(group.rows), 0), yticks=[], xlabel=shortened(group.metric, 48))
    axes.spines.left.set_visible(False)


def _dot(axes: Any, found: Estimate, y: float, colour: str, marker: str, *, size: float, line: float) -> None:
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [y, y], color=colour, lw=line, solid_capstyle="round", alpha=0.75)
    axes.plot([found.value], [y], marker, color=colour, ms=size, mec="none", zorder=4)


def _lines(
    axes: Any, baselines: Sequence[tuple[Look, float]], ends: tuple[float, float], height: float, room: float
) -> None:
    """Draw baselines as horizontal lines with their names at the right, none over another."""
    shown = sorted(sorted(baselines, key=lambda pair: -pair[1])[:MOST_LINES], key=lambda pair: pair[1])
    places = spread([value for _, value in shown], 13 * (ends[1] - ends[0]) / height, *ends)
    right = axes.get_yaxis_transform()
    for (look, value), place in zip(shown, places, strict=True):
        axes.axhline(value, color=look.ink, lw=1.1, ls=(0, (5, 3)))
        axes.plot([1.0, 1.03], [value, place], transform=right, color=look.ink, lw=0.8, clip_on=False)
        text = shortened(look.name, int(room / 6.8))
        axes.text(1.04, place, text, transform=right, color=look.ink, va="center")


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return ascending values moved apart so that neighbours differ by `gap`, within the ends if they fit."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else max(value, low))
    ceiling = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def frame(scores: Sequence[float], baselines: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the score axis: the baselines and all scores but those far below the rest."""
    if not scores and not baselines:
        return 0.0, 1.0
    top, floor = max([*scores, *baselines]), min([*scores, *baselines])
    middle = sorted(scores)[len(scores) // 2] if scores else top
    low = max(floor, top - 3 * max(top - middle, top - min(baselines, default=top), 1e-9))
    pad = 0.06 * (top - low) or 0.05
    return low - pad, top + pad


def _records(points: Sequence[tuple[int, float]], last: int) -> list[tuple[int, float]]:
    """Return where the best score so far changes, and its end."""
    found: list[tuple[int, float]] = []
    for number, score in points:
        if not found or score > found[-1][1]:
            found.append((number, score))
    return [*found, (last, found[-1][1])]


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    return points[:: math.ceil(len(points) / MOST_POINTS) or 1]


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [number for number, _ in points], [score for _, score in points]


def amount(gain: Estimate) -> str:
    """Return a gain in points with its interval."""
    ends = "" if gain.low is None or gain.high is None else f" ({gain.low:+.1f} to {gain.high:+.1f})"
    return f"{gain.value:+.1f}{ends}".replace("-", "\u2212")


def _at(axes: Any, x: float, y: float, text: str, *, ha: str = "left", boxed: bool = False) -> None:
    behind = {"facecolor": COLOURS["page"], "edgecolor": "none", "pad": 1.0}
    where = axes.get_yaxis_transform()
    axes.text(x, y, text, transform=where, ha=ha, va="center", bbox=behind if boxed else None)


def _axes(
    width: int, height: float, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width / 72, height / 72))
    return figure, axes_at(figure, left, top, width - left - right, height - top - bottom)


def axes_at(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Add axes at a place in units of the SVG, from its upper left corner."""
    full_width, full_height = (float(side) * 72 for side in figure.get_size_inches())
    bottom = full_height - top - height
    return figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height)
    )


def both(paint: Callable[[int], Figure], key: str, label: str) -> Drawing:
    """Return a figure for wide pages and for phones; no other figure of a page has its key."""
    return Drawing(*(_svg(paint, width, f"{key}-{width}", label) for width in (820, 350)))


def _svg(paint: Callable[[int], Figure], width: int, key: str, label: str) -> str:
    """Return a drawing as an SVG element to be put in a page."""
    buffer = io.StringIO()
    size = 11 if width < 500 else 12
    with (
        style.context(["default", {**_RC, "svg.hashsalt": key, "font.size": size}]),
        warnings.catch_warnings(),
    ):
        # Letters that matplotlib's font lacks are drawn by the reader's browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        FigureCanvasSVG(paint(width)).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    box = text.partition('viewBox="')[2].partition('"')[0]
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _adapted(tag[0], key), body)
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{html.escape(clean(label))}"'
        f' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{body.strip()}'
    )


def _adapted(tag: str, key: str) -> str:
    """Return a tag with ids that no other figure has, the page's colours and font."""
    tag = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", tag)
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", tag)
    tag = re.sub(r" font-family: [^;]*;", "", tag).replace(
        "stroke: #000000; stroke-opacity: 0", "stroke: none"
    )
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], colour[0]), tag)


_VARIABLES: Mapping[str, str] = {value: f"var(--{name}, {value})" for name, value in COLOURS.items()}
