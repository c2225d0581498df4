"""The drawings by themselves: sizes, limits, and what is left out where there is too much."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from evomerge.report import figures
from evomerge.report.figures import Estimate, Look, Panel, TaskRows

LOOKS = [Look(f"model{i}", f"s{i % 8}", figures.MARKERS[i % 8]) for i in range(20)]


def _check(drawing: figures.Drawing) -> None:
    for text in (drawing.wide, drawing.narrow):
        root = ET.fromstring(text)
        assert root.get("role") == "img"
        assert root.get("width") is None
        ids = [node.get("id") for node in root.iter() if node.get("id")]
        assert len(ids) == len(set(ids))
    assert 'viewBox="0 0 820 ' in drawing.wide
    assert 'viewBox="0 0 350 ' in drawing.narrow


def test_thousands_of_candidates() -> None:
    points = [(n, 0.3 + n % 97 / 200) for n in range(1, 20_001)]
    failed = list(range(5, 20_000, 9))
    drawing = figures.progress(points, failed, [(LOOKS[0], 0.4)], (7, 0.3), "many")
    _check(drawing)
    assert len(drawing.wide) < 600_000


@pytest.mark.parametrize("points", [[], [(1, 0.5)], [(1, 0.5), (2, 0.5)], [(1, -1e9), (2, 0.5), (3, 1e12)]])
def test_few_or_odd_scores(points: list[tuple[int, float]]) -> None:
    _check(figures.progress(points, [], [(LOOKS[0], 0.5)], None, "few"))


def test_many_baselines_do_not_overlap() -> None:
    drawing = figures.progress([(1, 0.5)], [], [(look, 0.4) for look in LOOKS], None, "baselines")
    assert drawing.wide.count(">model") == figures.MOST_LINES


def test_scores_far_below_lie_outside_the_frame() -> None:
    scores = [0.5 + i / 1000 for i in range(100)]
    low, high = figures.frame([*scores, -50.0], [0.4])
    assert -1 < low < 0.4
    assert 0.599 < high < 1
    assert figures.frame([], []) == (0.0, 1.0)
    low, high = figures.frame([0.5], [])
    assert low < 0.5 < high


def test_labels_are_moved_apart_within_the_frame() -> None:
    assert figures.spread([1.0, 1.0, 1.0], 1.0, 0.0, 10.0) == [1.0, 2.0, 3.0]
    assert figures.spread([9.5, 9.6, 9.7], 1.0, 0.0, 10.0) == [8.0, 9.0, 10.0]
    assert figures.spread([], 1.0, 0.0, 1.0) == []


def test_panels_tasks_and_gains() -> None:
    lines = [(look, [0.1 * i for i in range(80)]) for look in LOOKS[:3]]
    for count in (1, 2, 5):
        _check(figures.coefficients([Panel(f"weight {i}", "weight", lines) for i in range(count)], "panels"))
    flat = [(LOOKS[0], [0.5] * 4)]
    _check(figures.coefficients([Panel("weight", "weight", flat)], "flat"))
    rows = [(f"task{i}", [(look, Estimate(0.5, 0.4, 0.6)) for look in LOOKS[:6]]) for i in range(57)]
    odd = [("ppl", [(LOOKS[0], Estimate(3.0)), (LOOKS[1], Estimate(3000.0))])]
    drawing = figures.tasks([TaskRows("score", rows), TaskRows("perplexity", odd)], "tasks")
    _check(drawing)
    assert "$" not in drawing.wide
    _check(figures.gains([("a & <b>", Estimate(0.0)), ("c" * 90, Estimate(-3.0, -9.0, 2.0))], "gains"))


def test_text_is_cleaned_and_no_formula() -> None:
    assert figures.clean("a\x1b[1m\u202eb\udc80\x00\n") == "a[1mb\n"
    assert figures.shortened("a  b\n" + "c" * 50, 8) == "a b ccc\u2026"
    drawing = figures.gains([("$x_1$ <b>", Estimate(1.0, 0.5, 2.0))], 'a "label" <b>')
    assert ">$x_1$ &lt;b&gt;<" in drawing.wide
    assert 'aria-label="a &quot;label&quot; &lt;b&gt;"' in drawing.wide


def test_equal_input_gives_equal_drawings() -> None:
    first, second = (figures.gains([("base", Estimate(1.0, 0.5, 2.0))], "gain") for _ in range(2))
    assert first == second
    assert figures.amount(Estimate(-1.25, -2.0, 0.5)) == "\u22121.2 (\u22122.0 to +0.5)"
