"""Folders that are made for something, and go with it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from evomerge.checkpoints.whole import made_folder, why_not_made
from evomerge.errors import StoreError


def test_a_folder_stays_if_the_block_ends_well(tmp_path: Path) -> None:
    with made_folder(tmp_path / "a" / "b", mode=0o700):
        pass
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_what_was_made_goes_if_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "a" / "b" / "c"):
        raise KeyboardInterrupt
    assert (tmp_path / "a").is_dir()
    assert list((tmp_path / "a").iterdir()) == []


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    def fail() -> None:
        (tmp_path / "a" / "theirs").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "a" / "b"):
        fail()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = r"file/below: cannot be made \(Not a directory\); give another folder"
    with (
        pytest.raises(StoreError, match=expected),
        made_folder(tmp_path / "file" / "below", error=StoreError),
    ):
        raise AssertionError("it was made")


def test_why_a_folder_could_not_be_made_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert why_not_made(tmp_path) == why_not_made(tmp_path / "a" / "b") == ""
    assert why_not_made(tmp_path / "file" / "b") == f"{tmp_path / 'file'} is no directory"
    assert why_not_made(tmp_path / "file") == f"{tmp_path / 'file'} is no directory"
