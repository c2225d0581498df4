"""Every broken file gets a line for each fault and exit code 2, quickly and in little memory; nothing crashes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.malformed.cases import CASES

pytestmark = pytest.mark.timeout(7200)  # the long form takes about a quarter of an hour

SHORT, LONG = 560, 22_400
"""Mutations of each form: multiples of the number of targets."""

MOST_SECONDS = 1.0
MOST_BYTES = 200 * 2**20

SLOW = "unknown task"
"""Then lm-eval's own thousands of task files have been read, to say what is like it: that takes seconds."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, repository: Path, long: bool) -> list[dict[str, Any]]:
    """Run all cases and mutations in one process of its own; return what each was answered with."""
    folder = tmp_path_factory.mktemp("malformed")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    arguments = [str(folder), "0", str(LONG if long else SHORT)]
    command = [sys.executable, "-m", "tests.malformed.probe", *arguments]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} in {lines[-1:]}: {done.stderr[-3000:]}"
    return [line for line in lines if "begin" not in line]


@pytest.fixture(scope="module")
def by_name(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {answer["case"]: answer for answer in answers if "case" in answer}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_is_refused_in_one_line(name: str, by_name: dict[str, dict[str, Any]]) -> None:
    answer = by_name[name]
    assert not answer["problem"], answer["problem"]
    assert answer["code"] == 2, "it was accepted"
    assert re.search(CASES[name][2], answer["line"], re.DOTALL), answer["line"]
    assert answer["seconds"] < MOST_SECONDS
    assert answer["nbytes"] < MOST_BYTES


def test_mutated_files_are_refused_in_one_line_or_read(answers: list[dict[str, Any]], long: bool) -> None:
    mutations = [answer for answer in answers if "mutation" in answer]
    assert len(mutations) == (LONG if long else SHORT)
    read = sum(answer["code"] == 0 for answer in mutations)
    timed = [answer for answer in mutations if SLOW not in answer["line"]]
    slowest = max(timed, key=lambda answer: answer["seconds"])
    largest = max(answers, key=lambda answer: answer["nbytes"])
    faults = [answer for answer in mutations if answer["problem"]]
    print(f"{len(mutations)} mutations, {read} read, {len(faults)} faults")
    print(f"slowest {slowest}\nlargest {largest}")
    assert not faults, f"{len(faults)} faults, the first: {faults[0]}"
    assert {answer["code"] for answer in mutations} == {0, 2}
    assert 0.05 < read / len(mutations) < 0.9  # mutations that all fail at the first brace would show nothing
    assert slowest["seconds"] < MOST_SECONDS, slowest
    assert largest["nbytes"] < MOST_BYTES, largest
