"""A Ray of our own: on loopback, behind a token, in a folder that only this user can read.

Whoever can talk to a Ray can run code as its user (CVE-2023-48022), so ours listens on 127.0.0.1 alone and
takes no connection without the token, which is made anew each time.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

FOLDERS = Path("/tmp")  # noqa: S108
"""Where Ray keeps its sockets, whose paths may have at most 107 characters."""

FOLDER_PREFIX = "evomerge-ray-"

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Off, Ray takes 127.0.0.1 for its node's address and listens nowhere else, as on macOS and Windows."""

_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def prepare_own() -> None:
    """Set what Ray reads when it is imported; to be called before that."""
    os.environ.setdefault(_LOOPBACK, "0")


class OwnRay:
    """A Ray that was started here.

    Args:
        ray: The module.
        options: For `ray.init`.
    """

    def __init__(self, ray: Any, **options: Any) -> None:
        _sweep()
        self._ray = ray
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=FOLDERS))
        self._before = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_MODE", *_TOKEN)}
        inner = self._folder / "r"  # Ray lets everybody into the folder that it is given
        inner.mkdir()
        token = self._folder / "token"
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        self._reread()
        try:
            ray.init(address="local", include_dashboard=False, _temp_dir=str(inner), **options)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it, and remove its folder; the environment is as it was before."""
        try:
            self._ray.shutdown()
        finally:
            self._restore()

    def _restore(self) -> None:
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._reread()
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _reread() -> None:
        """Let Ray read mode and token again, which it does once for a process."""
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _sweep() -> None:
    """Remove what drivers that were killed left behind."""
    for folder in FOLDERS.glob(f"{FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
