"""Drivers as jobs of a Ray cluster, submitted over its REST interface; Ray itself is not loaded.

The cluster's machines must see the service's folder and the store: a shared filesystem and PostgreSQL, or one
machine.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from evomerge.errors import UserError
from evomerge.service.launcher import Driver, Launcher

LIVE = ("PENDING", "RUNNING")
CALL_SECONDS = 15.0
TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 (the variable's name)
"""Ray's own variable for the token of a cluster that wants one."""


class RayLauncher(Launcher):
    """Drivers as Ray jobs; the name of a driver is its submission id, which Ray takes once.

    Args:
        address: Of the cluster's dashboard, such as `http://head:8265`.
        python: The interpreter on the cluster's machines.

    Raises:
        UserError: The address is none. Whether a cluster answers there is not asked yet.
    """

    def __init__(self, address: str, python: str = sys.executable) -> None:
        if not re.fullmatch(r"https?://[^/\s]+/?", address):
            raise UserError(f"--ray-address {address}: expected http://HOST:8265, the cluster's dashboard")
        token = os.environ.get(TOKEN)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._address, self._python = address.rstrip("/"), python
        self._http = httpx.Client(base_url=self._address, headers=headers, timeout=CALL_SECONDS)

    def start(
        self, driver: Driver, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> Mapping[str, Any]:
        """Submit a job."""
        job = {
            "entrypoint": shlex.join([self._python, "-m", "evomerge", *arguments]),
            "submission_id": driver.name,
            "runtime_env": {"env_vars": {"PYTHONUNBUFFERED": "1", **environment}},
        }
        if self._find(driver) is None:
            self._call("POST", "/api/jobs/", json=job)
        return {"ray_job": driver.name}

    def alive(self, driver: Driver) -> bool:
        """Ask the cluster; a job that it does not know has never started or is gone with its cluster."""
        found = self._find(driver)
        return found is not None and found.get("status") in LIVE

    def stop(self, driver: Driver, *, kill: bool = False) -> None:
        """End the job: Ray sends SIGTERM, and kills what is left after 3 s."""
        del kill
        if self.alive(driver):
            self._call("POST", f"/api/jobs/{driver.name}/stop")

    def log(self, driver: Driver, most: int) -> str:
        """Return the end of the job's output."""
        if self._find(driver) is None:
            return ""
        text = str(self._call("GET", f"/api/jobs/{driver.name}/logs").json().get("logs", ""))
        return text.encode()[-most:].decode("utf-8", "replace")

    def _find(self, driver: Driver) -> dict[str, Any] | None:
        answer = self._call("GET", f"/api/jobs/{driver.name}", missing=True)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        found: dict[str, Any] = answer.json()
        return found

    def _call(self, method: str, path: str, *, missing: bool = False, **content: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **content)
        except httpx.HTTPError as problem:
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise UserError(f"--ray-address {self._address}: cannot be reached: {reason}") from None
        if answer.is_error and not (missing and answer.status_code == httpx.codes.NOT_FOUND):
            lines = answer.text.strip().splitlines() or [""]
            raise UserError(
                f"--ray-address {self._address}: {method} {path} was answered {answer.status_code}: "
                f"{lines[-1][:300]}"
            )
        return answer
