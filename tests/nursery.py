"""A process that has everything loaded and forks a child for every command: `evomerge` within milliseconds.

The children are real processes that run the real command line, so they can be killed, limited and starved
like those a user starts; what they save is an interpreter's ten seconds of imports and compilation. There is
one nursery for a whole pytest process, from the first command on. `Nursery` talks to it: a JSON line for a
command, one for what became of it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

ENVIRONMENT = dict(os.environ)
"""What the nursery itself sees: nothing that a test has set."""


@dataclass(frozen=True)
class Done:
    """What became of a command: exit code (negative: the signal), output, the moments it passed."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    passed: list[str]

    @property
    def killed(self) -> bool:
        return self.returncode == -signal.SIGKILL


class Nursery:
    """Commands that run in a folder.

    Args:
        folder: Their working directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, *arguments: str | Path, timeout: float = 120.0, **more: Any) -> Done:
        """Run a command to its end, as `start` and `wait` do."""
        return self.wait(self.start(*arguments, **more), timeout)

    def start(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        crash: str | None = None,
        file_bytes: int | None = None,
        constants: Mapping[str, Any] | None = None,
        workers: int | None = None,
        terminal: str | None = None,
    ) -> int:
        """Start a command, the first of a session of its own; return its process id.

        Args:
            arguments: Of `evomerge`.
            env: More environment.
            crash: Where it is to die, see `evomerge.faults.arm`.
            file_bytes: Longest file it may write.
            constants: `module.NAME` -> value, set before it begins.
            workers: Use a `ShuffledPool` of this many.
            terminal: A tty to write to, which becomes its own.
        """
        order = {
            "arguments": [str(one) for one in arguments],
            "folder": str(self._folder.absolute()),
            "env": {**os.environ, **(env or {})},
            "crash": crash,
            "file_bytes": file_bytes,
            "constants": constants,
            "workers": workers,
            "terminal": terminal,
        }
        return int(_server().ask(order)["pid"])

    def wait(self, pid: int, timeout: float = 120.0) -> Done:
        """Wait for a command that was started; kill it after so many seconds, and raise TimeoutError."""
        answer = _server().ask({"wait": pid, "timeout": timeout})
        if answer.pop("hung"):
            raise TimeoutError(f"killed after {timeout} s: {answer}")
        return Done(**answer)

    def ended(self, pid: int) -> Done | None:
        """Return what became of a command; None while it runs."""
        answer = _server().ask({"look": pid})
        return Done(**answer) if answer else None

    def printed(self, pid: int) -> tuple[str, str]:
        """Return what a command that runs has written on its standard output and error."""
        answer = _server().ask({"printed": pid})
        return answer["stdout"], answer["stderr"]


class _Server:
    """The process, as its clients see it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt is for pytest alone
        )

    def ask(self, order: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery has died")
        return json.loads(line)

    def close(self) -> None:
        with self._process:
            pass  # closes its input, at the end of which it ends


@cache
def _server() -> _Server:
    made = _Server()
    atexit.register(made.close)
    return made


# What follows runs in the nursery and its children.


def serve(folder: Path) -> None:
    """Fork a child for each line that asks for one, and say what became of it when asked."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up(folder / "world")
    started: dict[int, float] = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer: Any
        if "arguments" in order:
            pid = os.fork()
            if pid == 0:
                try:
                    child(order, folder)
                finally:  # whatever happens to its output: what is tidied up at the end is not its own
                    os._exit(1)
            started[pid] = time.monotonic()
            while os.getsid(pid) != pid:  # so that its group can be killed from now on
                time.sleep(0.001)
            answer = {"pid": pid}
        elif "printed" in order:
            answer = printed(folder, order["printed"])
        elif "look" in order:
            answer = look(folder, order["look"], started)
        else:
            answer = reap(folder, order["wait"], order["timeout"], started)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in started:  # nobody waits for them any more
        os.kill(pid, signal.SIGKILL)


def reap(folder: Path, pid: int, timeout: float, started: dict[int, float]) -> dict[str, Any]:
    """Return what became of a child, which is killed when the time is over."""
    deadline = time.monotonic() + timeout
    hung = False
    while (answer := look(folder, pid, started)) is None:
        time.sleep(0.002)
        if time.monotonic() > deadline and not hung:
            hung = True
            os.kill(pid, signal.SIGKILL)
    return {**answer, "hung": hung}


def look(folder: Path, pid: int, started: dict[int, float]) -> dict[str, Any] | None:
    """Return what became of a child; None while it runs."""
    ended = os.waitpid(pid, os.WNOHANG)
    if ended == (0, 0):
        return None
    seconds = time.monotonic() - started.pop(pid)
    passed = folder / f"passed-{pid}"
    answer = {
        "returncode": os.waitstatus_to_exitcode(ended[1]),
        **printed(folder, pid),
        "seconds": seconds,
        "passed": json.loads(passed.read_text()) if passed.exists() else [],
    }
    for path in folder.glob(f"*-{pid}"):
        path.unlink()
    return answer


def printed(folder: Path, pid: int) -> dict[str, str]:
    """Return what a child has written by now."""
    paths = {name: folder / f"{name}-{pid}" for name in ("stdout", "stderr")}
    return {name: path.read_text(errors="replace") if path.exists() else "" for name, path in paths.items()}


def child(order: dict[str, Any], folder: Path) -> None:
    """Become an `evomerge`; never returns."""
    from evomerge import faults
    from evomerge.cli import main

    os.setsid()
    # A terminal that is opened by the leader of a session becomes its own, and takes it along when it goes.
    terminal = order["terminal"]
    null = os.open(terminal or os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = folder / f"{name}-{os.getpid()}"
        os.dup2(null if terminal else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["env"])
    os.environ.pop(faults.VARIABLE, None)
    if order["crash"]:
        os.environ[faults.VARIABLE] = order["crash"]
    for name, value in (order["constants"] or {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    if order["workers"]:
        use_workers(order["workers"])
    if order["file_bytes"] is not None:
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
        (folder / f"passed-{os.getpid()}").write_text(json.dumps(faults.passed))
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
    from tests.e2e.world import make_world

    for name in ("datasets", "lm_eval.tasks", "evomerge.fitness.harness"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    make_world(folder)
    with Store.open(folder / "store.db") as store:
        view = start(read_config(folder / "config.yaml"), folder, store)
        write_report(view, folder / "report.html")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="evomerge-nursery-") as place:
        os.environ["XDG_CACHE_HOME"] = os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        serve(Path(place))
