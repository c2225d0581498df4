"""Greedy decoding: prompts padded on the left behind the beginning that they share, with a key-value cache.

Every row stops where the stock command stops it at its default batch size of 1; rows that have stopped leave
the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.prefixes import Tokens, beginnings

LEAVES = 0.75
"""Rows that have stopped leave the batch once no more than this part of it is open."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts that are generated from together.

    Attributes:
        trunk: Tokens that all begin with, forwarded once; may be empty.
        rests: What follows in each, longest first, none empty.
        requests: For each of them the requests that have this prompt.
        stops: Strings that end an answer.
        limit: Most tokens of an answer.
    """

    trunk: Tokens
    rests: tuple[Tokens, ...]
    requests: tuple[tuple[int, ...], ...]
    stops: tuple[str, ...]
    limit: int


def prompts(requests: Sequence[TokenRequest], stage: float | None, most: int) -> Iterator[Prompts]:
    """Yield requests by what they can share.

    Args:
        requests: Generation requests.
        stage: Cost of one more pass, in tokens; None: no beginning is shared.
        most: Most tokens of a batch, padding and answers included.
    """
    groups: dict[tuple[tuple[str, ...], int], dict[Tokens, list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for i, request in enumerate(requests):
        groups[request.stops, request.max_new_tokens][request.tokens].append(i)
    for (stops, limit), readers in groups.items():
        rows = sorted(readers)
        found = [(0, range(len(rows)))] if stage is None else beginnings(rows, stage)
        shared = [(length, [rows[i] for i in part]) for length, part in found if length]
        alone = [rows[i] for length, part in found if not length for i in part]
        for length, own in [*shared, (0, alone)]:
            own.sort(key=lambda row: (-len(row), row))
            begin = 0
            while begin < len(own):
                count = max(1, most // (len(own[begin]) + limit))
                part = own[begin : begin + count]
                begin += count
                yield Prompts(
                    own[0][:length],
                    tuple(row[length:] for row in part),
                    tuple(tuple(readers[row]) for row in part),
                    stops,
                    limit,
                )


class Decoding:
    """Generates from one batch of prompts.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        ends: Ids that end an answer.
        forward: Optional arguments that the model's forward knows.
    """

    def __init__(self, model: Any, tokenizer: Any, ends: set[int], forward: frozenset[str]) -> None:
        self._model, self._tokenizer, self._ends = model, tokenizer, ends
        self._keeps, self._positions = "logits_to_keep" in forward, "position_ids" in forward
        self.padded_tokens = 0

    def run(self, batch: Prompts, trunk: Any) -> list[list[int]]:
        """Return the ids that each prompt is continued by.

        Args:
            batch: The prompts.
            trunk: Keys and values of their beginning, `branches.Trunk`; None if it is empty.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        rows, before = len(batch.rests), len(batch.trunk)
        width = len(batch.rests[0])
        mask = torch.ones((rows, before + width + batch.limit), dtype=torch.long)
        ids = torch.zeros((rows, width), dtype=torch.long)
        for row, rest in enumerate(batch.rests):
            mask[row, before : before + width - len(rest)] = 0
            ids[row, width - len(rest) :] = torch.tensor(rest)
        device = self._model.device
        ids, mask = ids.to(device), mask.to(device)
        cache = None if trunk is None else trunk.grown(rows)
        written: list[list[int]] = [[] for _ in batch.rests]
        present, stopped = list(range(rows)), set[int]()
        lookback = self._lookback(batch.stops)
        start, end = before, before + width
        while True:
            logits, cache = self._step(ids, mask, cache, start, end)
            ids = logits.argmax(-1, keepdim=True)
            # The largest logit is NaN if any is.
            if end == before + width and not bool(torch.isfinite(logits.gather(1, ids)).all()):
                raise CandidateError("the model gives logits that are not finite")
            tokens = ids[:, 0].tolist()
            open_rows = [(i, row) for i, row in enumerate(present) if row not in stopped]
            for i, row in open_rows:
                written[row].append(tokens[i])
            recent = self._tokenizer.batch_decode([written[row][-lookback:] for _, row in open_rows])
            for (i, row), text in zip(open_rows, recent, strict=True):
                if tokens[i] in self._ends or any(stop in text for stop in batch.stops):
                    stopped.add(row)
            if len(written[open_rows[0][1]]) == batch.limit or len(stopped) == rows:
                return written
            left = [i for i, row in enumerate(present) if row not in stopped]
            if len(left) <= LEAVES * len(present) and hasattr(cache, "batch_select_indices"):
                chosen = torch.tensor(left)  # on the CPU: layers may lie on several devices
                cache.batch_select_indices(chosen)
                ids, mask, present = ids[chosen], mask[chosen], [present[i] for i in left]
            start, end = end, end + 1

    def _step(self, ids: Tensor, mask: Tensor, cache: Any, start: int, end: int) -> tuple[Tensor, Any]:
        """Return the last position's logits, (rows, vocabulary), and the grown cache."""
        kwargs: dict[str, Any] = {"logits_to_keep": 1} if self._keeps else {}
        if self._positions:
            kwargs["position_ids"] = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        output = self._model(
            input_ids=ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **kwargs
        )
        self.padded_tokens += ids.numel()
        return output.logits[:, -1], output.past_key_values

    def _lookback(self, stops: tuple[str, ...]) -> int:
        """Return how many of the last tokens are searched for stop strings, as lm-eval does."""
        encode = self._tokenizer.encode
        return 2 + max((len(encode(stop, add_special_tokens=False)) for stop in stops), default=0)
