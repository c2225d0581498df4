"""A process that has everything loaded and forks a child for every command: `evomerge` within milliseconds.

The children are real processes that run the real command line, so they can be killed, limited and starved
like those a user starts. `Nursery` talks to it: a JSON line for a command, one for what became of it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """What became of a command: exit code (negative: the signal), output, the moments it passed."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    passed: Sequence[str]

    @property
    def killed(self) -> bool:
        return self.returncode == -signal.SIGKILL


class Nursery:
    """A nursery whose commands run in the folder of a world.

    Args:
        folder: The world; a nursery warms up with its config `config.yaml`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery", str(self._folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *rest: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        crash: str | None = None,
        file_bytes: int | None = None,
        constants: Mapping[str, Any] | None = None,
        workers: int | None = None,
        timeout: float = 120.0,
    ) -> Done:
        """Run a command to its end.

        Args:
            arguments: Of `evomerge`.
            env: More environment.
            crash: Where it is to die, see `evomerge.faults.arm`.
            file_bytes: Longest file it may write.
            constants: `module.NAME` -> value, set before it begins.
            workers: Use a `ShuffledPool` of this many.
            timeout: Seconds after which it is killed and the test fails.
        """
        pid = self.start(
            *arguments, env=env, crash=crash, file_bytes=file_bytes, constants=constants, workers=workers
        )
        return self.wait(pid, timeout)

    def start(self, *arguments: str | Path, **more: Any) -> int:
        """Start a command, return its process id; `more` is what `run` takes, or `terminal`: a tty."""
        return int(self._ask({"arguments": [str(one) for one in arguments], **more})["pid"])

    def wait(self, pid: int, timeout: float = 120.0) -> Done:
        """Wait for a command that was started."""
        answer = self._ask({"wait": pid, "timeout": timeout})
        if answer.pop("hung"):
            raise TimeoutError(f"killed after {timeout} s: {answer}")
        return Done(**answer)

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery has died")
        found: dict[str, Any] = json.loads(line)
        return found


# What follows runs in the nursery and its children.


def serve(folder: Path) -> None:
    """Fork a child for each line that comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.chdir(folder)
    warm_up(folder)
    started: dict[int, float] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid = int(order["wait"])
            answer = reap(folder, pid, order["timeout"])
            answer["seconds"] = time.monotonic() - started.pop(pid)
        else:
            pid = os.fork()
            if pid == 0:
                child(order, folder)
            started[pid] = time.monotonic()
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


def reap(folder: Path, pid: int, timeout: float) -> dict[str, Any]:
    """Return what became of a child, which is killed when the time is over."""
    deadline = time.monotonic() + timeout
    hung = False
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        time.sleep(0.002)
        if time.monotonic() > deadline and not hung:
            hung = True
            os.kill(pid, signal.SIGKILL)
    answer = {"returncode": os.waitstatus_to_exitcode(ended[1]), "hung": hung, "passed": []}
    for name in ("stdout", "stderr", "passed"):
        path = folder / f".{name}-{pid}"
        text = path.read_text(errors="replace") if path.exists() else ""
        answer[name] = json.loads(text or "[]") if name == "passed" else text
        path.unlink(missing_ok=True)
    return answer


def child(order: dict[str, Any], folder: Path) -> None:
    """Become an `evomerge`; never returns."""
    from evomerge import faults
    from evomerge.cli import main

    os.setsid()
    # A terminal that is opened by the leader of a session becomes its own, and takes it along when it goes.
    terminal = order.get("terminal")
    null = os.open(terminal or os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = folder / f".{name}-{os.getpid()}"
        os.dup2(null if terminal else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(order.get("env") or {})
    os.environ.pop(faults.VARIABLE, None)
    if order.get("crash"):
        os.environ[faults.VARIABLE] = order["crash"]
    for name, value in (order.get("constants") or {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    if order.get("workers"):
        use_workers(order["workers"])
    if order.get("file_bytes") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    sys.argv = ["evomerge", *order["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if faults.passed:
        (folder / f".passed-{os.getpid()}").write_text(json.dumps(faults.passed))
    os._exit(code)


def use_workers(count: int) -> None:
    """Let the driver use a pool that answers in another order."""
    from evomerge import drive
    from tests.faults.shuffled import ShuffledPool

    drive.make_pool = lambda plan: ShuffledPool(plan.worker_spec(1), count)  # type: ignore[assignment]


def warm_up(folder: Path) -> None:
    """Load and compile what the commands need: one run in this process."""
    import torch

    from evomerge.config import read_config
    from evomerge.drive import start
    from evomerge.report.page import write_report
    from evomerge.store import Store

    torch.set_num_threads(1)
    path = folder / ".warm-up.db"
    with Store.open(path) as store:
        view = start(read_config(folder / "config.yaml"), folder, store)
        write_report(view, folder / ".warm-up.html")
    for file in folder.glob(".warm-up*"):
        file.unlink()


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve())
