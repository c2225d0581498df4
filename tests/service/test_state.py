"""The service's own folder: token, identity, and one service only."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.service.state import identity_of, make_folder, only_one, token_of


def test_the_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    old = os.umask(0)
    try:
        make_folder(folder)
        token = token_of(folder)
    finally:
        os.umask(old)
    assert len(token) >= 43
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert token_of(folder) == token
    assert token_of(make(tmp_path / "other")) != token
    assert identity_of(folder) == identity_of(folder) != identity_of(tmp_path / "other")


def make(folder: Path) -> Path:
    make_folder(folder)
    return folder


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
