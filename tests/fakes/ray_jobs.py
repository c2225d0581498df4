"""A stand-in for the part of Ray's job interface that is used, after the answers of Ray 2.60.

It runs entrypoints as processes of this machine. Ray's own needs `ray[default]`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RayJobs:
    """The jobs of one cluster.

    Attributes:
        jobs: Submission id to the process.
        address: Of its interface.
        submitted: Bodies of all submissions.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, bytes] = {}
        self.submitted: list[dict[str, Any]] = []
        self.token = ""
        self.address = ""

    def submit(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.submitted.append(body)
        name = body["submission_id"]
        if name in self.jobs:
            return 400, f"Job with submission_id {name} already exists. Please use a different submission_id."
        self.jobs[name] = subprocess.Popen(
            shlex.split(body["entrypoint"]),
            env={**os.environ, **body["runtime_env"]["env_vars"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return 200, {"job_id": name, "submission_id": name}

    def status(self, name: str) -> str:
        code = self.jobs[name].poll()
        return "RUNNING" if code is None else "SUCCEEDED" if code == 0 else "FAILED"

    def output(self, name: str) -> str:
        if name not in self.logs and self.status(name) != "RUNNING":
            self.logs[name] = self.jobs[name].communicate()[0]
        return self.logs.get(name, b"").decode()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        _, _, kind, name, *rest = path.split("/")
        if (method, kind, name) == ("POST", "jobs", ""):
            return self.submit(body)
        if name not in self.jobs:
            return 404, f"Job {name} does not exist"
        if method == "POST" and rest == ["stop"]:
            os.killpg(self.jobs[name].pid, signal.SIGTERM)
            return 200, {"stopped": True}
        if rest == ["logs"]:
            return 200, {"logs": self.output(name)}
        return 200, {"submission_id": name, "status": self.status(name)}


@contextmanager
def ray_jobs(token: str = "") -> Iterator[RayJobs]:
    """Serve the interface while the block lasts."""
    cluster = RayJobs()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length) or b"null")
            if token and self.headers.get("authorization") != f"Bearer {token}":
                status, answer = 401, "Unauthorized: Missing authentication token"
            else:
                status, answer = cluster.answer(self.command, self.path, body)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _do

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    cluster.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        for process in cluster.jobs.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
