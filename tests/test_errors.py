"""Errors with more than one thing to tell."""

import pickle

import pytest

from evomerge.errors import MOST_FAULTS, Gathering, RecipeError, SourceError, UserError, together


def test_an_error_has_a_line_for_each_fault_each_short_and_printable():
    problem = UserError("a\nb", ["c\x1b", "x" * 5000])
    assert problem.lines[:2] == ["a b", r"c\x1b"]
    assert len(problem.lines[2]) < 1200
    assert str(problem) == "a b"
    assert pickle.loads(pickle.dumps(problem)).lines == problem.lines


def test_more_faults_than_may_be_told_are_counted():
    problem = UserError("0", list(range(1, 30)))
    assert problem.lines == [*map(str, range(MOST_FAULTS)), "and at least 20 more"]
    assert UserError(*([problem.lines[0], problem.lines[1:]])).lines == problem.lines
    assert UserError("0", list(range(MOST_FAULTS))).lines[-1] == "9"


def test_errors_together_are_the_first_with_the_lines_of_all():
    problem = together([SourceError("a", ["b"]), RecipeError("c", ["d"])])
    assert isinstance(problem, SourceError)
    assert problem.lines == ["a", "b", "c", "d"]


def gather(*problems: BaseException | None) -> None:
    with Gathering() as gathering:
        for problem in problems:
            with gathering.kept():
                if problem is not None:
                    raise problem


def test_what_is_gathered_is_raised_at_the_end():
    gather(None, None)
    with pytest.raises(SourceError) as caught:
        gather(SourceError("a"), None, RecipeError("c"))
    assert caught.value.lines == ["a", "c"]


def test_what_is_no_user_error_is_not_kept():
    with pytest.raises(ZeroDivisionError):
        gather(SourceError("a"), ZeroDivisionError())
