"""The service's own folder: token, identity, and one service only."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.service.state import identity_of, only_one, own_folder, token_of


def test_the_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    old = os.umask(0)
    try:
        with own_folder(folder) as begun:
            token = token_of(folder)
            begun()
    finally:
        os.umask(old)
    assert len(token) >= 43
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert token_of(folder) == token
    assert token_of(make(tmp_path / "other")) != token
    assert identity_of(folder) == identity_of(folder) != identity_of(tmp_path / "other")


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def start(folder: Path, fails: type[BaseException], *, late: bool = False) -> None:
    """Begin a service that fails, before or after it has begun."""
    with own_folder(folder) as begun:
        token_of(folder)
        identity_of(folder)
        if late:
            begun()
        raise fails


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        start(tmp_path / "new" / "state", UserError)
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    token = token_of(tmp_path)
    (tmp_path / "jobs").mkdir()
    with pytest.raises(UserError):
        start(tmp_path, UserError)
    assert {path.name for path in tmp_path.iterdir()} == {"token", "jobs"}
    assert token_of(tmp_path) == token


def test_what_goes_wrong_after_the_start_removes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "state", KeyboardInterrupt, late=True)
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"lock", "token", "identity"}


def test_a_service_that_is_refused_takes_nothing_from_the_one_that_runs(tmp_path: Path) -> None:
    with own_folder(tmp_path) as begun:
        token = token_of(tmp_path)
        begun()
        with pytest.raises(UserError, match="serves it already"), own_folder(tmp_path):
            raise AssertionError("two services on one folder")
        assert token_of(tmp_path) == token


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 31, "two words of more than thirty-two letters", "é" * 40]
)
def test_a_weak_token_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(UserError, match="token"):
        token_of(tmp_path)


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    token_of(tmp_path)
    (tmp_path / "token").chmod(0o640)
    with pytest.raises(UserError, match="others may read it; run: chmod 600"):
        token_of(tmp_path)


def test_a_second_service_on_the_folder_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom evomerge.service.state import only_one\n"
        "with only_one(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} serves it already"), only_one(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with only_one(tmp_path):
        pass
