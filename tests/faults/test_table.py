"""The tables of promises and moments are what the tests and the documentation are about."""

from __future__ import annotations

import re
from pathlib import Path

from evomerge.faults import CRASH_POINTS
from tests.faults.promises import PROMISES


def test_every_promise_has_a_test() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tried = set(re.findall(r'(?:mark\.promise|book\.trying)\("([a-z ]+)"\)', text))
    assert tried == set(PROMISES)


def test_every_moment_is_in_the_code_and_in_the_documentation(repository: Path) -> None:
    code = "".join(path.read_text() for path in (repository / "evomerge").rglob("*.py"))
    assert set(re.findall(r'\breached\("(\w+)"\)', code)) == set(CRASH_POINTS)
    page = (repository / "docs" / "reliability.md").read_text()
    for name, point in CRASH_POINTS.items():
        assert f"| `{name}` | {point.where} | {point.repeats} | {point.left} |" in page
