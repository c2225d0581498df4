"""Forward passes for lm-eval requests over a resident transformers model.

Log-likelihoods: rows sorted by length, padded on the right, one forward per batch, the head applied only to
the positions that are scored. Rows that the model would read twice (choices of one token) are read once.
Generation: greedy, padded on the left, with a key-value cache; every row stops where the stock command
stops it at its default batch size of 1. What greedy decoding alone does not cover goes through lm-eval's
own `HFLM.generate_until`.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError, FitnessError
from evomerge.fitness.greedy import is_plain_config
from evomerge.fitness.tasks import lm_eval_quiet

MAX_LOGITS_BYTES = 2**30
CPU_BATCH_TOKENS = 1024
"""Padded tokens in one forward for log-likelihoods on a CPU: more do not fit its caches and are slower."""
STOCK_BATCH = 16
"""Rows at once where lm-eval's own generation is used."""
SAMPLING_SEED = 1234
"""lm-eval's default, for tasks that sample answers."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One row to forward.

    Attributes:
        tokens: What the model reads.
        targets: Log-likelihood: the continuation, whose last entry the model never reads. Empty for
            generation.
        stops: Generation: strings that end the answer.
        max_new_tokens: Generation: most tokens to generate.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """One forward for log-likelihoods.

    Attributes:
        ids: Distinct rows, (rows, width), padded with 0 on the right.
        keep: How many of the last positions need logits.
        scored: For every scored token: its row, its position among those kept, and its id, (3, scored).
        place: For every scored token: its request in `requests` and its position there, (2, scored).
        requests: The requests answered, as numbers in the plan.
        length: Most scored tokens of one request.
        tokens: Tokens read, without padding.
    """

    ids: Tensor
    keep: int
    scored: Tensor
    place: Tensor
    requests: tuple[int, ...]
    length: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The batches that answer a list of log-likelihood requests, made once and used for every candidate."""

    batches: tuple[_Batch, ...]
    size: int


class Engine:
    """Answers token requests with the model's present weights.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokenizer: Its tokenizer.
        batch_tokens: Most padded tokens in one forward.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int) -> None:
        from lm_eval.models.huggingface import HFLM

        with lm_eval_quiet():
            # lm-eval's own wrapper encodes, so that tokens are the stock command's in every corner case.
            self.lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=STOCK_BATCH)
        self._batch_tokens = batch_tokens
        self.counts: dict[str, float] = {}
        self.rebind(model)
        self.reset_counts()

    def rebind(self, model: Any) -> None:
        """Forward another model from now on."""
        self._model = self.lm._model = model
        accepted = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in accepted
        self._positions = "position_ids" in accepted
        self.greedy_is_plain = is_plain_config(model.generation_config)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def reset_counts(self) -> None:
        """Start counting requests and tokens anew."""
        self.counts = {"requests": 0.0, "tokens": 0.0, "padded_tokens": 0.0}

    def encode(self, instance: Any) -> list[TokenRequest]:
        """Return an instance's rows; several only for rolling log-likelihoods longer than the context.

        Raises:
            FitnessError: The request cannot be scored; lm-eval stops at it too.
        """
        try:
            return self._encode(instance)
        except FitnessError as problem:
            raise FitnessError(f"fitness.tasks.{instance.task_name}: {problem}") from None

    def _encode(self, instance: Any) -> list[TokenRequest]:
        lm, kind = self.lm, instance.request_type
        if kind == "generate_until":
            return [self._encode_generation(*instance.args)]
        if kind == "loglikelihood_rolling":
            return [self._row(*window) for window in self._windows(instance.args[0])]
        context, continuation = instance.args
        if context:
            return [self._row(*lm._encode_pair(context, continuation))]
        ids = lm.tok_encode(continuation, add_special_tokens=False)
        if ids[:1] == [lm.prefix_token_id]:
            return [self._row(ids[:1], ids[1:])]
        return [self._row([lm.prefix_token_id], ids)]

    def _row(self, context: list[int], continuation: list[int]) -> TokenRequest:
        limit = self.lm.max_length
        if not context or not 0 < len(continuation) <= limit:
            raise FitnessError(
                f"a continuation of {len(continuation)} tokens after a context of {len(context)}: expected a "
                f"context and 1 to {limit} tokens, as many as the model reads at once"
            )
        kept = (context + continuation)[-(limit + 1) :]
        return TokenRequest(tuple(kept[:-1]), tuple(continuation))

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        from lm_eval import utils

        yield from map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows(
                token_list=self.lm.tok_encode(text),
                prefix_token=self.lm.prefix_token_id,
                max_seq_len=self.lm.max_length,
                context_len=1,
            ),
        )

    def _encode_generation(self, context: str, kwargs: dict[str, Any]) -> TokenRequest:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        with lm_eval_quiet():
            normal = normalize_gen_kwargs(kwargs, self.lm.max_gen_toks)
            eos = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
            stops = handle_stop_sequences(normal["until"], eos=eos)
            limit = normal["max_gen_toks"]
            if not 0 < limit < self.lm.max_length:
                raise FitnessError(
                    f"generation_kwargs ask for {limit} tokens: expected 1 to {self.lm.max_length - 1}, "
                    "fewer than the model reads at once"
                )
            ids, _ = self.lm.tok_batch_encode([context], left_truncate_len=self.lm.max_length - limit)
        if not ids.numel():
            raise FitnessError("an empty prompt, and the tokenizer puts no token before it")
        return TokenRequest(tuple(ids[0].tolist()), stops=tuple(stops), max_new_tokens=limit)

    def plan(self, requests: Sequence[TokenRequest]) -> Plan:
        """Return the batches for log-likelihood requests; which rows share one depends on no order."""
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            sharing[request.tokens].append(i)
        rows = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
        starts = [len(row) - max(len(requests[i].targets) for i in sharing[row]) for row in rows]
        on_cpu = self._model.device.type == "cpu"
        most = min(self._batch_tokens, CPU_BATCH_TOKENS) if on_cpu else self._batch_tokens
        batches = []
        for part in self._parts([len(row) for row in rows], starts, most):
            members = [(row, i) for row, tokens in enumerate(rows[part]) for i in sharing[tokens]]
            batches.append(_batch(rows[part], min(starts[part]), members, requests))
        return Plan(tuple(batches), len(requests))

    def _parts(
        self, lengths: Sequence[int], starts: Sequence[int], most: int, extra: int = 0
    ) -> Iterator[slice]:
        """Yield runs of rows that are forwarded together.

        Args:
            lengths: Tokens of each row, longest first.
            starts: First position of each row that needs logits.
            most: Most padded tokens in one run.
            extra: Tokens to come after each row.
        """
        position_bytes = 4 * int(self._model.config.get_text_config().vocab_size)
        begin = 0
        while begin < len(lengths):
            width, first, end = lengths[begin] + extra, starts[begin], begin + 1
            while end < len(lengths):
                rows, lowest = end + 1 - begin, min(first, starts[end])
                logits = rows * (lengths[begin] - lowest) * position_bytes
                if rows * width > most or logits > MAX_LOGITS_BYTES:
                    break
                first, end = lowest, end + 1
            yield slice(begin, end)
            begin = end

    @torch.inference_mode()
    def loglikelihoods(self, plan: Plan) -> list[tuple[float, bool]]:
        """Return (sum of the targets' log-probabilities, whether greedy decoding gives them) per request.

        Raises:
            CandidateError: One is not finite.
        """
        device = self._model.device
        sums, hits = [], []
        for batch in plan.batches:
            logits = self._logits(batch.ids.to(device, torch.long), batch.keep)
            rows, columns, targets = batch.scored.to(device)
            places = tuple(batch.place.to(device))
            log_probs = torch.log_softmax(logits[rows, columns], dim=-1)
            # Summed in float32 and rounded once, as torch sums a slice of half-precision numbers.
            parts = torch.zeros((len(batch.requests), batch.length), device=device)
            parts[places] = log_probs.gather(1, targets[:, None])[:, 0].float()
            misses = torch.zeros((len(batch.requests), batch.length), dtype=torch.bool, device=device)
            misses[places] = log_probs.argmax(-1) != targets
            sums.append(parts.sum(1).to(log_probs.dtype))
            hits.append(~misses.any(1))
            self._count(len(batch.requests), batch.tokens, batch.ids.numel())
        answers: list[tuple[float, bool]] = [(0.0, False)] * plan.size
        if sums:
            order = [i for batch in plan.batches for i in batch.requests]
            for i, total, hit in zip(order, torch.cat(sums).tolist(), torch.cat(hits).tolist(), strict=True):
                if not math.isfinite(total):
                    raise CandidateError(f"the model gives a log-likelihood of {total}")
                answers[i] = (total, hit)
        return answers

    def _logits(self, ids: Tensor, keep: int) -> Tensor:
        """Return logits of the last `keep` positions, (rows, keep, vocabulary)."""
        if self._keeps:
            logits: Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
            return logits
        return self._model(input_ids=ids, use_cache=False).logits[:, -keep:]  # type: ignore[no-any-return]

    def generate_as_stock(self, instances: Sequence[Any]) -> list[str]:
        """Return the texts of lm-eval's own generation, for what greedy decoding alone does not cover."""
        beams = self._model.generation_config.num_beams
        # With beams, lm-eval looks for stop strings in the wrong rows of a batch.
        several = any((instance.args[1].get("num_beams") or beams or 1) > 1 for instance in instances)
        self.lm.batch_size_per_gpu = 1 if several else STOCK_BATCH
        torch.manual_seed(SAMPLING_SEED)
        with lm_eval_quiet():
            texts: list[str] = self.lm.generate_until(list(instances), disable_tqdm=True)
        self.counts["requests"] += len(texts)
        return texts

    def check_finite(self, request: TokenRequest) -> None:
        """Forward one generation request.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        counts = dict(self.counts)
        self.generate([replace(request, max_new_tokens=1)])
        self.counts = counts

    @torch.inference_mode()
    def generate(self, requests: Sequence[TokenRequest]) -> list[str]:
        """Return each row's greedy continuation, cut at its first stop string.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        answers = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[request.stops, request.max_new_tokens].append(i)
        for (stops, limit), members in groups.items():
            members.sort(key=lambda i: (-len(requests[i].tokens), requests[i].tokens))
            lengths = [len(requests[i].tokens) for i in members]
            starts = [length - 1 for length in lengths]
            for part in self._parts(lengths, starts, self._batch_tokens, extra=limit):
                texts = self._greedy([requests[i] for i in members[part]], stops, limit)
                for i, text in zip(members[part], texts, strict=True):
                    answers[i] = text
        return answers

    def _greedy(self, batch: Sequence[TokenRequest], stops: tuple[str, ...], limit: int) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text

        width = max(len(request.tokens) for request in batch)
        device = self._model.device
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros((len(batch), width + limit), dtype=torch.long)
        mask[:, width:] = 1
        for row, request in enumerate(batch):
            ids[row, width - len(request.tokens) :] = torch.tensor(request.tokens)
            mask[row, width - len(request.tokens) : width] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        written: list[list[int]] = [[] for _ in batch]
        open_rows, cache, start, end = list(range(len(batch))), None, 0, width
        lookback = self._lookback(stops)
        while open_rows and end < width + limit:
            kwargs: dict[str, Any] = {"logits_to_keep": 1} if self._keeps else {}
            if self._positions:
                kwargs["position_ids"] = positions[:, start:end]
            output = self._model(
                input_ids=ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **kwargs
            )
            logits = output.logits[:, -1]
            ids, cache, start, end = logits.argmax(-1, keepdim=True), output.past_key_values, end, end + 1
            # The largest logit is NaN if any is.
            if start == width and not bool(torch.isfinite(logits.gather(1, ids)).all()):
                raise CandidateError("the model gives logits that are not finite")
            tokens = ids[:, 0].tolist()
            for row in open_rows:
                written[row].append(tokens[row])
            recent = self.lm.tokenizer.batch_decode([written[row][-lookback:] for row in open_rows])
            open_rows = [
                row
                for row, text in zip(open_rows, recent, strict=True)
                if tokens[row] not in self._ends and not any(stop in text for stop in stops)
            ]
        self._count(len(batch), sum(len(request.tokens) for request in batch), len(batch) * (end - 1))
        texts = self.lm.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [postprocess_generated_text(text, list(stops), None) for text in texts]

    def _lookback(self, stops: tuple[str, ...]) -> int:
        """Return how many of the last tokens are searched for stop strings, as lm-eval does."""
        encode = self.lm.tokenizer.encode
        return 2 + max((len(encode(stop, add_special_tokens=False)) for stop in stops), default=0)

    def _count(self, requests: int, tokens: int, padded_tokens: int) -> None:
        self.counts["requests"] += requests
        self.counts["tokens"] += tokens
        self.counts["padded_tokens"] += padded_tokens


def _batch(
    rows: Sequence[tuple[int, ...]],
    first: int,
    members: Sequence[tuple[int, int]],
    requests: Sequence[TokenRequest],
) -> _Batch:
    """Return the batch of `rows`, longest first.

    Args:
        rows: Distinct rows.
        first: The first position that is scored in any of them.
        members: (row, request) pairs.
        requests: All requests of the plan.
    """
    ids = torch.zeros((len(rows), len(rows[0])), dtype=torch.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    scored: list[tuple[int, int, int]] = []
    place: list[tuple[int, int]] = []
    for number, (row, i) in enumerate(members):
        targets = requests[i].targets
        column = len(rows[row]) - len(targets) - first
        scored += [(row, column + k, target) for k, target in enumerate(targets)]
        place += [(number, k) for k in range(len(targets))]
    return _Batch(
        ids=ids,
        keep=len(rows[0]) - first,
        scored=torch.tensor(scored).T.contiguous(),
        place=torch.tensor(place).T.contiguous(),
        requests=tuple(i for _, i in members),
        length=max(len(requests[i].targets) for _, i in members),
        tokens=sum(map(len, rows)),
    )
