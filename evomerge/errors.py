"""Exceptions, by whose fault it is.

```
EvomergeError
├── UserError            the user can mend it: one line for each fault, exit code 2
│   ├── ConfigError      a run config or an override
│   ├── RecipeError      a recipe, or a mergekit file that cannot be read as one
│   ├── SourceError      a checkpoint that is missing, broken, or does not fit the others
│   ├── FitnessError     a task, a metric, a document count, a fitness callable
│   ├── EngineError      an engine that is absent, cannot start, or does not take new weights
│   ├── StoreError       a store or run that is missing, taken, damaged, or of another version
│   │   ├── MissingError     there is no such run or candidate
│   │   ├── ConflictError    the run is not in a state in which this can be done, or the name is taken
│   │   └── LimitError       the service has enough to do; come back later
│   └── ServerError      a service that cannot be reached, or refuses
├── CandidateError       one candidate is at fault: it becomes an outcome, the run goes on
└── LostRunError         another driver has taken the run over; this one must stop writing
```

Messages say what, where, expected, got, and what to do, in one line; other faults of the same input have
lines of their own (`UserError.others`). They quote what others wrote, so
whatever they are made of, they end up short and printable.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

MOST_CHARACTERS = 1200
"""Longest message; a longer one loses its middle."""


_SECRETS = (
    re.compile(r"(://[^\s/:@]*:)[^\s/@]+(?=@)"),  # the password of a URL
    re.compile(r"([?&](?:password|passwd|token|secret|key)=)[^\s&]+", re.IGNORECASE),
    re.compile(r"\b(hf_|sk-|ghp_)[A-Za-z0-9_-]{16,}"),  # tokens of hubs and services
)


def redacted(text: str) -> str:
    """Return a text with the secrets in it replaced by `***`: passwords in URLs, tokens of known forms."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def printable(text: str, keep: str = "") -> str:
    """Return a text in which every character can be printed and moves nothing on a terminal.

    Line breaks, control characters, what turns the direction of writing, and halves of characters become
    backslash escapes, but for those in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def one_line(text: str) -> str:
    """Return a text as one line in which every character can be printed; white space becomes one blank."""
    return printable(" ".join(text.split()))


class EvomergeError(Exception):
    """Any error raised on purpose by evomerge; its message is one printable line without secrets.

    Attributes:
        others: More such lines, for what is wrong besides.
    """

    others: tuple[str, ...] = ()

    def __init__(self, message: object = "") -> None:
        super().__init__(_told(message))

    @property
    def lines(self) -> list[str]:
        """Everything that is wrong, the message first."""
        return [str(self), *self.others]


def _told(message: object) -> str:
    line = redacted(one_line(str(message)))
    if len(line) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2 - 10
        line = f"{line[:half]} [...] {line[-half:]}"
    return line


MOST_FAULTS = 10
"""Most faults that are told beside the first."""


class UserError(EvomergeError):
    """The input or the environment is at fault; shown as one line without traceback, exit code 2.

    Args:
        message: What is wrong.
        others: What else is wrong, whatever is done about the first. More than `MOST_FAULTS` are cut, and the
            last line says how many are left out at least.
    """

    def __init__(self, message: object = "", others: Sequence[object] = ()) -> None:
        super().__init__(message)
        kept = others if len(others) <= MOST_FAULTS else others[: MOST_FAULTS - 1]
        left = len(others) - len(kept)
        self.others = (*map(_told, kept), *([f"and at least {left} more"] if left else []))


class Gathering:
    """Goes on after errors that do not depend on each other, and raises them together at its end.

    ```
    with Gathering() as gathering:
        for path in paths:
            with gathering.kept():
                check(path)
    ```
    """

    def __init__(self) -> None:
        self._problems: list[UserError] = []

    def __enter__(self) -> Gathering:
        return self

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the error of a block for the end."""
        try:
            yield
        except UserError as problem:
            self._problems.append(problem)

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None and self._problems:
            raise together(self._problems)


def together(problems: Sequence[UserError]) -> UserError:
    """Return the first of some errors with the rest as its others."""
    message, *others = [line for problem in problems for line in problem.lines]
    return type(problems[0])(message, others)


class ConfigError(UserError):
    """A run config, a command-line value or an override is wrong."""


class RecipeError(UserError):
    """A recipe is wrong, or a mergekit file has no counterpart here."""


class SourceError(UserError):
    """A checkpoint is missing, broken, or does not fit the others."""


class FitnessError(UserError):
    """A task, metric, document count or fitness callable is wrong."""


class EngineError(UserError):
    """An engine is not installed, cannot start, cannot do what is asked, or keeps old weights."""


class StoreError(UserError):
    """A store or run is missing, taken by another driver, damaged, or of another version."""


class MissingError(StoreError):
    """There is no such run, job, candidate or export."""


class ConflictError(StoreError):
    """A name or key is taken, or the run's state does not allow what is asked."""


class LimitError(StoreError):
    """As many wait or watch as the operator allows."""


class ServerError(UserError):
    """A service cannot be reached, or answers in a way that is none of evomerge's."""


class CandidateError(EvomergeError):
    """One candidate cannot be built or scored (non-finite weights or scores); the run goes on."""


class LostRunError(EvomergeError):
    """The run's epoch moved on: another driver owns it now, and nothing more may be written."""


MOST_NAMES = 30
"""Longest list of known names in a message."""


def closest(word: str, known: Iterable[str]) -> list[str]:
    """Return the known word nearest to `word`, if any is near."""
    return difflib.get_close_matches(word, list(known), n=1)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the known word nearest to `word`, or the list of known words.

    The result is meant to be appended to a message; it is empty when nothing is near and too many are known.
    """
    names = [str(name) for name in known]
    close = closest(word, names)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(sorted(names))}" if 0 < len(names) <= MOST_NAMES else ""
