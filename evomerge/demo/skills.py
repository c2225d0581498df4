"""The skills of the demo world, and the documents that teach and test them.

Every skill turns a short string into another one: `R` reverses, `S` sorts, `C` shifts each letter, `P` picks
the letter at a position from the end. A *long* document is what the tasks ask; a *short* one is the same
skill on fewer letters. The base learns mostly the short form of every skill, an expert the long form of one,
so each expert has something to add, and what it adds is not just the base trained for longer.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import UserError
from evomerge.seeding import derive

LETTERS = string.ascii_lowercase
"""What prompts and answers are written in; digits and tags appear in prompts only."""
LONG = (5, 7)
"""Least and greatest number of letters in a long document."""
SHORT = (2, 4)
"""The same for a short one."""
CHOICES = 4
"""Options of a multiple-choice document."""

Document = dict[str, str | int | list[str]]


def _reverse(draw: random.Random, length: int) -> tuple[str, str]:
    text = "".join(draw.choices(LETTERS, k=length))
    return f"R{text}=", text[::-1]


def _sort(draw: random.Random, length: int) -> tuple[str, str]:
    text = "".join(draw.choices(LETTERS, k=length))
    return f"S{text}=", "".join(sorted(text))


def _shift(draw: random.Random, length: int) -> tuple[str, str]:
    by = draw.randint(1, 2)
    text = "".join(draw.choices(LETTERS, k=length))
    return f"C{by}{text}=", "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in text)


def _pick(draw: random.Random, length: int) -> tuple[str, str]:
    # Distinct letters, so that the other letters of the string can be the wrong choices.
    place = draw.randint(1, length)
    text = "".join(draw.sample(LETTERS, length))
    return f"P{place}{text}=", text[-place]


@dataclass(frozen=True)
class Skill:
    """One thing the models can learn.

    Attributes:
        name: Also the name of its expert; its task is `demo_<name>`.
        title: One line for people.
        make: Draws a prompt and its answer for a number of letters.
        multiple_choice: Whether its task offers choices, or asks the model to write the answer.
    """

    name: str
    title: str
    make: Callable[[random.Random, int], tuple[str, str]]
    multiple_choice: bool = False


SKILLS: Mapping[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("reverse", "write a string backwards", _reverse),
        Skill("sort", "sort the letters of a string", _sort),
        Skill("shift", "shift each letter along the alphabet", _shift),
        Skill("pick", "pick a letter by its position from the end", _pick, multiple_choice=True),
    )
}


def task_documents(skill: Skill, count: int, seed: int) -> list[Document]:
    """Return `count` different long documents of a skill, in random order, fixed by the seed."""
    draw = random.Random(derive(seed, "demo documents", skill.name))  # noqa: S311
    answers: dict[str, str] = {}
    for _ in range(100 * count):
        if len(answers) == count:
            break
        prompt, answer = skill.make(draw, draw.randint(*LONG))
        answers[prompt] = answer
    if len(answers) < count:
        raise UserError(f"skill {skill.name!r} has only {len(answers)} documents, {count} asked for")
    documents: list[Document] = []
    for prompt, answer in answers.items():
        document: Document = {"prompt": prompt, "answer": answer}
        if skill.multiple_choice:
            others = sorted(set(prompt[2:-1]) - {answer})
            choices = [answer, *draw.sample(others, CHOICES - 1)]
            draw.shuffle(choices)
            document |= {"choices": choices, "label": choices.index(answer)}
        documents.append(document)
    return documents


class TrainingDocuments:
    """An endless stream of training documents that never repeats a task's document.

    Args:
        mixture: Weight of each skill.
        long_share: Share of long documents in each skill that is not the own one.
        own: The skill that is taught in its long form only; None for the base.
        banned: Prompts that the tasks ask.
        seed: Equal arguments give equal streams.
    """

    def __init__(
        self,
        mixture: Mapping[str, float],
        *,
        long_share: float,
        own: str | None,
        banned: frozenset[str],
        seed: int,
    ) -> None:
        self._names: Sequence[str] = list(mixture)
        self._weights = [mixture[name] for name in self._names]
        self._long_share = long_share
        self._own = own
        self._banned = banned
        self._draw = random.Random(derive(seed, "demo training", own or "base"))  # noqa: S311

    def batch(self, size: int) -> list[tuple[str, str]]:
        """Return the next `size` pairs of prompt and answer."""
        pairs: list[tuple[str, str]] = []
        while len(pairs) < size:
            name = self._draw.choices(self._names, self._weights)[0]
            long = name == self._own or self._draw.random() < self._long_share
            prompt, answer = SKILLS[name].make(self._draw, self._draw.randint(*(LONG if long else SHORT)))
            if prompt not in self._banned:
                pairs.append((prompt, answer))
        return pairs
