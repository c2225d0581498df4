"""The tables of promises and moments are what the tests and the documentation are about."""

from __future__ import annotations

import json
import re
from pathlib import Path

from evomerge.faults import CRASH_POINTS
from tests.faults.promises import PROMISES, Book


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


def test_books_of_several_processes_add_up_to_one() -> None:
    whole, parts = Book(), (Book(), Book())
    for number in range(6):
        for book in (whole, parts[number % 2]):
            with book.trying("node joins"):
                book.report("node joins", lost=number, recover=float(-number))
            if number:
                book.report("raylet frozen", detect=2.0 * number, late_results_offered=number)
    together = Book()
    for part in parts:
        together.add(Book.from_json(json.loads(json.dumps(part.to_json()))))
    assert list(together.lines()) == list(whole.lines())
    assert "offered 15" in "".join(together.lines())
    assert "detect 10.00 s" in "".join(together.lines())
