"""What may be written as a target."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.trackers.targets import parse_target


def test_paths_are_relative_to_the_folder() -> None:
    target = parse_target("optuna:a/b.db", Path("/runs"))
    assert (target.path, target.is_url, str(target)) == (Path("/runs/a/b.db"), False, "optuna:a/b.db")


def test_passwords_are_not_shown() -> None:
    target = parse_target("optuna:postgresql://me:secret@host/db", Path())
    assert target.is_url
    assert str(target) == "optuna:postgresql://***@host/db"


@pytest.mark.parametrize("text", ["optuna", "optuna:", "tensorbord:tb", "", ":x"])
def test_other_words_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="expected KIND:WHERE") as raised:
        parse_target(text, Path())
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'evomerge\[wandb\]'"):
        parse_target("wandb:x", Path())
