"""The Slurm script starts Ray over its nodes and a run; both are processes of this machine here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evomerge.store import Store
from tests.e2e.world import make_world, write_config

pytestmark = pytest.mark.ray

COMMANDS = {
    "srun": """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
[ "$1" = hostname ] && { echo 127.0.0.1; exit; }
echo "$*" >> "$SRUN_LOG"
exec "$@"
""",
    "scontrol": """#!/usr/bin/env bash
[ "$1 $2" = "show hostnames" ] && tr , '\\n' <<< "$3"
""",
}


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What Slurm gives a job of two nodes, and its commands; everything that Ray leaves is swept."""
    folder = Path(tempfile.mkdtemp(prefix="evo-", dir="/tmp"))  # the paths of Ray's sockets must be short
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "SRUN_LOG": str(tmp_path / "srun.log"),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_CPUS_ON_NODE": "1",
        "EVOMERGE_BIN": str(Path(sys.executable).parent),
        "EVOMERGE_RAY_PORT": str(port),
    }
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or []):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_the_script_runs_a_search_over_the_nodes_and_goes_on_with_it(
    environment: dict[str, str], tmp_path: Path, repository: Path
) -> None:
    world = make_world(tmp_path / "world")
    write_config(
        world, "mine.yaml", name="other", workers={"pool": "ray", "count": 2}, budget={"evaluations": 6}
    )
    script = [str(repository / "scripts/slurm/evomerge.sbatch"), "mine.yaml", "runs.db"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*script, *more],
            cwd=world,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    starts = (tmp_path / "srun.log").read_text().splitlines()
    assert [("--head" in line, "--address=" in line) for line in starts] == [(True, False), (False, True)]
    with Store.open(world / "runs.db") as store:
        view = store.run("mine")
        assert view.status == "finished"
        assert sum(c.origin == "optimizer" for c in view.candidates()) == 6
    left = [p for p in psutil.process_iter(["cmdline", "status"]) if environment["RAY_TMPDIR"] in str(p.info)]
    assert [p for p in left if p.info["status"] != "zombie" and "raylet" in str(p.info)] == []
    again = run("--set", "budget.evaluations=8", "--set", "workers.pool=inline")
    assert again.returncode == 0, again.stderr
    with Store.open(world / "runs.db") as store:
        assert sum(c.origin == "optimizer" for c in store.run("mine").candidates()) == 8


def test_the_script_says_what_it_needs(repository: Path) -> None:
    script = repository / "scripts/slurm/evomerge.sbatch"
    done = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "usage")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
