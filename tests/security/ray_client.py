"""Starts a Ray as runs do, and says who can talk to it: one line of JSON."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil

CONNECT = """
import logging, sys, ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
print("connected", ray.cluster_resources()["CPU"])
"""


def main() -> None:
    """Start it, list what listens, and connect without a token, with a wrong one, and with the right one."""
    from evomerge.workers.own_ray import OwnRay, prepare_own

    prepare_own()
    import ray

    own = OwnRay(ray, num_cpus=1, log_to_driver=False, logging_level=logging.ERROR)
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    found: dict[str, object] = {"mode": oct(token.stat().st_mode), "folder": oct(token.parent.stat().st_mode)}
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found["listening"] = sorted(
        {c.laddr.ip for p in mine for c in p.net_connections() if c.status == "LISTEN"}
    )
    address = ray.get_runtime_context().gcs_address
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    quick = {
        "RAY_NUM_REDIS_GET_RETRIES": "2",
        "RAY_gcs_rpc_server_connect_timeout_s": "1",
        "HOME": "/nonexistent",
    }
    modes = {
        "without": {"RAY_AUTH_MODE": "disabled"},
        "wrong": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        "right": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
    }
    for name, mode in modes.items():
        command = [sys.executable, "-c", CONNECT, address]
        done = subprocess.run(
            command, env={**plain, **quick, **mode}, capture_output=True, text=True, check=False
        )
        found[name] = done.stdout.strip() if done.returncode == 0 else "refused"
    own.stop()
    found["after"] = [name for name in os.environ if name.startswith("RAY_AUTH")]
    found["left"] = token.parent.exists()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
