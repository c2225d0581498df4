"""Runs commands in one process and says what each did: exit code, lines, seconds, memory.

A process of its own, so that a crash or a hang ends it and not the tests, and its memory can be limited.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import io
import json
import resource
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.malformed.world import COMMANDS, make_sound

HANGING = 120
"""Seconds after which a command counts as hanging, on a busy machine too: the process dumps its stacks and ends."""

CEILING = 3 * 2**30
"""Bytes of address space beyond those of the warm process."""

MOST_LINES = 11
"""Most lines of error: ten faults, and one that counts the others."""

CHATTER = ("note: ", "reading sources and tasks")
"""How lines on standard error begin that are no error."""


@dataclass(frozen=True)
class Answer:
    """What a command did.

    Attributes:
        code: Its exit code.
        line: Its first line of error; empty if it ended well. A line for each further fault may follow.
        problem: What it did that no command may do; empty if nothing.
        seconds: Processor time that it took.
        elapsed: Time on the clock.
        nbytes: How much memory it took at most, beyond what the process had before.
    """

    code: int
    line: str
    problem: str
    seconds: float
    elapsed: float
    nbytes: int


class World:
    """A world that can be broken and made whole again.

    Args:
        folder: Where it is made; what is broken lies in its folder `work`, the working directory.
    """

    def __init__(self, folder: Path) -> None:
        self.path = make_sound(folder / "work")
        self._pristine = folder / "pristine"
        shutil.copytree(self.path, self._pristine)

    def restore(self) -> None:
        """Make all files sound again."""
        _remove(self.path)
        shutil.copytree(self._pristine, self.path)

    def mend(self, file: str) -> None:
        """Make one file sound again, and remove what a command wrote."""
        (self.path / file).write_bytes((self._pristine / file).read_bytes())
        for name in ("out", "out.json"):
            _remove(self.path / name)

    def sound(self, file: str) -> bytes:
        """Return the content that a file has in the sound world."""
        return (self._pristine / file).read_bytes()

    def answer(self, command: str) -> Answer:
        """Run a command of `COMMANDS` as the command line does."""
        with contextlib.chdir(self.path):
            return _run(COMMANDS[command])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for folder in path.rglob("*"):
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o755)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def limit_memory() -> None:
    """Let the process take no more than `CEILING` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + CEILING
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _run(arguments: tuple[str, ...]) -> Answer:
    from evomerge.cli import main

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["evomerge", *arguments]
    code, problem = 0, ""
    before = _reset_peak()
    faulthandler.dump_traceback_later(HANGING, exit=True)
    began, started = time.process_time(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        code, problem = 1, traceback.format_exc()
    seconds, elapsed = time.process_time() - began, time.perf_counter() - started
    faulthandler.cancel_dump_traceback_later()
    lines = [line for line in err.getvalue().splitlines() if line and not line.startswith(CHATTER)]
    problem = problem or _problem(code, lines, err.getvalue() + out.getvalue())
    return Answer(code, lines[0] if code and lines else "", problem, seconds, elapsed, _peak() - before)


def _problem(code: int, lines: list[str], printed: str) -> str:
    if code not in (0, 2):
        return f"exit code {code}: {printed}"
    if "Traceback" in printed:
        return printed
    strange = {letter for letter in printed if not letter.isprintable() and letter != "\n"}
    if strange:
        return f"prints {sorted(strange)}"
    if code == 2 and not 1 <= len(lines) <= MOST_LINES:
        return f"not 1 to {MOST_LINES} lines: {lines}"
    if code == 2 and not all(line.startswith("evomerge: ") and len(line) < 2000 for line in lines):
        return f"a line that names no fault, or is too long: {lines}"
    if code == 2 and len(set(lines)) < len(lines):
        return f"a fault is told twice: {lines}"
    return ""


def _reset_peak() -> int:
    """Forget the highest memory so far; return what there is now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def warmed(folder: Path) -> World:
    """Return a world after each command has run once in it, sound; AssertionError if one did not end well."""
    world = World(folder)
    for name in COMMANDS:
        answer = world.answer(name)
        assert (answer.code, answer.problem) == (0, ""), f"{name}: {answer}"
        world.restore()
    gc.collect()
    gc.freeze()  # so that a collection before each command looks at little
    limit_memory()
    return world


def main(folder: Path, first: int, mutations: int) -> None:
    """Run all named cases and some mutations; print a JSON line before and after each."""
    from tests.malformed.cases import CASES
    from tests.malformed.mutations import mutated

    say = functools.partial(print, file=sys.__stdout__, flush=True)
    world = warmed(folder)
    for name, (command, change, _) in CASES.items():
        say(json.dumps({"begin": name}))
        world.restore()
        change(world.path)
        say(json.dumps({"case": name, **asdict(world.answer(command))}))
    world.restore()
    for number in range(first, first + mutations):
        say(json.dumps({"begin": number}))
        file, command, content = mutated(number, world.sound)
        (world.path / file).write_bytes(content)
        say(json.dumps({"mutation": number, "file": file, **asdict(world.answer(command))}))
        world.mend(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
