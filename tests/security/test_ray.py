"""A Ray that we start listens on loopback alone and talks to nobody without its token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_our_ray_listens_on_loopback_and_refuses_who_has_no_token(repository: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.ray_client"],
        cwd=repository,
        env={**plain, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {address.removeprefix("::ffff:") for address in found["listening"]} == {"127.0.0.1"}
    assert found["without"] == found["wrong"] == "refused"
    assert found["right"] == "connected 1.0"
    assert (found["mode"], found["folder"]) == ("0o100600", "0o40700")
    assert (found["after"], found["left"]) == ([], False)
