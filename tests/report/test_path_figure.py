"""The report's figure of a layer path."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from evomerge.recipe import LayerPath
from evomerge.report.figures import Look
from evomerge.report.path_figure import path_drawing, path_in_words

LOOKS = {"a": Look("a", "s0", "s"), "b": Look("b", "s1", "^")}


@pytest.mark.parametrize(
    "steps", [["a 0"], ["a 0-3", "b 2-3", "a 3"], ["a 0-3", "b 2-3 -1.5", "a 3 0.5"], ["a 0-99", "b 0-99"]]
)
def test_a_path_is_drawn_at_both_widths(steps: list[str]) -> None:
    path = LayerPath.model_validate(steps)
    drawing = path_drawing(path, LOOKS)
    for text in (drawing.wide, drawing.narrow):
        root = ET.fromstring(text)
        assert root.get("role") == "img"
        assert root.get("aria-label") == path_in_words(path)
        assert ("scale before it" in text) == path.scaled


def test_a_path_is_told_in_stretches() -> None:
    path = LayerPath.model_validate(["a 0-3", "b 3 0.5", "b 3", "a 4-5"])
    words = "The winner runs through 8 layers: a 0 to 3, b 3, b 3, a 4 to 5. Scales lie before some of them."
    assert path_in_words(path) == words
