"""How tests are spread: long files first, all tests with Ray in one process."""

from __future__ import annotations

from pathlib import Path

from tests.parallel import LONG, RAY, place, unit


def test_every_file_that_is_named_is_there(repository: Path) -> None:
    assert len({*RAY, *LONG}) == len(RAY) + len(LONG)
    assert [name for name in (*RAY, *LONG) if not (repository / name).is_file()] == []


def test_a_file_stays_together_and_all_files_with_ray_do() -> None:
    one, other = (f"{RAY[number]}::test_x[a::b]" for number in (0, 1))
    assert unit(one) == unit(other) != unit(f"{LONG[0]}::test_x")
    assert unit("tests/test_paths.py::Test::test_x[1]") == unit("tests/test_paths.py::test_y")
    assert place(one) < place(f"{LONG[0]}::x") < place(f"{LONG[-1]}::x") < place("tests/test_paths.py::x")
