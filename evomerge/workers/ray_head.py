"""The Ray under a pool: one of our own on this machine, or a running cluster; and whether it is still there.

Ray ends a driver that lost its head after a minute, without an exception. So the head is watched here, and
found gone before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from typing import Any

import psutil

from evomerge.errors import UserError
from evomerge.workers.own_ray import OwnRay, prepare_own

HEAD = ("gcs_server", "raylet")
"""The processes without which our own Ray is none."""

LOOK_SECONDS = 1.0
"""Least time between looks at our own Ray."""

PROBE_SECONDS = 5.0
"""Least time between looks at a cluster."""

SILENCE_SECONDS = 20.0
"""How long a cluster's head may not answer; Ray itself waits for 60 s."""


class RayHead:
    """A connection to Ray.

    Args:
        address: Of a running cluster; None: a Ray of our own.

    Attributes:
        ray: The module, once connected.
        own: Whether it was started here and ends with us.
    """

    def __init__(self, address: str | None) -> None:
        self.ray: Any = None
        self.own = False
        self._wanted = address
        self._ours: OwnRay | None = None
        self._parts: list[psutil.Process] = []
        self._address: tuple[str, int] | None = None
        self._looked = self._answered = 0.0

    def connect(self) -> None:
        """Connect to the cluster, or start a Ray here.

        Raises:
            UserError: There is no cluster at the address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not self._wanted:
            prepare_own()
        import ray

        self.ray = ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if ray.is_initialized():
            pass
        elif self._wanted:
            try:
                ray.init(address=self._wanted, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as problem:
                text = (str(problem).splitlines() or [""])[0]
                raise UserError(f"workers.ray_address: {self._wanted}: cannot connect: {text}") from None
        else:
            self._start(quiet)
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._answered = time.monotonic()

    def _start(self, quiet: dict[str, Any]) -> None:
        self._ours, self.own = OwnRay(self.ray, **quiet), True
        self._parts = [part for part in psutil.Process().children() if _name(part) in HEAD]

    def gone(self) -> str:
        """Return why there is no Ray any more; empty while there is."""
        now = time.monotonic()
        if now - self._looked < (LOOK_SECONDS if self.own else PROBE_SECONDS):
            return ""
        self._looked = now
        if self.own:
            return next((f"{name} died" for part in self._parts if (name := _dead(part))), "")
        if self._address is None or _answers(self._address):
            self._answered = now
        silent = now - self._answered
        return f"its head has not answered for {silent:.0f} s" if silent > SILENCE_SECONDS else ""

    def stop(self) -> None:
        """Stop our own Ray; leave a cluster alone."""
        ours, self._ours, self.own = self._ours, None, False
        if ours is not None:
            with contextlib.suppress(Exception):
                ours.stop()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _dead(process: psutil.Process) -> str:
    """Return the name of a process that has died, also if nobody has waited for it; else nothing."""
    try:
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        alive = False
    return "" if alive else _name(process) or "a process of it"


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True
