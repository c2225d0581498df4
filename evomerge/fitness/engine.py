"""Forward passes for lm-eval requests over a resident transformers model.

Log-likelihoods: requests sorted by length, padded on the right, one forward per batch, the head applied
only to the positions that are scored. Generation: greedy, padded on the left, with a key-value cache, until
every row has met its stop string. What greedy decoding alone does not cover goes through lm-eval's own
`HFLM.generate_until`.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.fitness.tasks import lm_eval_quiet

MAX_LOGITS_BYTES = 2**30


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


def is_plain_greedy(kwargs: Mapping[str, Any]) -> bool:
    """Whether generation arguments ask for nothing but greedy decoding up to a stop string."""
    known = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
    sampling = kwargs.get("do_sample") or float(kwargs.get("temperature") or 0.0) > 0
    return not sampling and set(kwargs) <= known | {"do_sample", "temperature"}


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
            self.lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
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
        self.greedy_is_plain = _plain_generation(model.generation_config)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def reset_counts(self) -> None:
        """Start counting requests and tokens anew."""
        self.counts = {"requests": 0.0, "tokens": 0.0, "padded_tokens": 0.0}

    def encode(self, instance: Any) -> list[TokenRequest]:
        """Return an instance's rows; several only for rolling log-likelihoods longer than the context."""
        lm, kind = self.lm, instance.request_type
        if kind == "generate_until":
            return [self._encode_generation(*instance.args)]
        if kind == "loglikelihood_rolling":
            return [self._row(*window) for window in self._windows(instance.args[0])]
        context, continuation = instance.args
        if context:
            return [self._row(*lm._encode_pair(context, continuation))]
        ids = lm.tok_encode(continuation, add_special_tokens=False)
        if ids[0] == lm.prefix_token_id:
            return [self._row(ids[:1], ids[1:])]
        return [self._row([lm.prefix_token_id], ids)]

    def _row(self, context: list[int], continuation: list[int]) -> TokenRequest:
        kept = (context + continuation)[-(self.lm.max_length + 1) :]
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
            room = self.lm.max_length - normal["max_gen_toks"]
            ids, _ = self.lm.tok_batch_encode([context], left_truncate_len=room)
        return TokenRequest(tuple(ids[0].tolist()), stops=tuple(stops), max_new_tokens=normal["max_gen_toks"])

    @torch.inference_mode()
    def loglikelihoods(self, requests: Sequence[TokenRequest]) -> list[tuple[float, bool]]:
        """Return (sum of the targets' log-probabilities, whether greedy decoding gives the targets) per row.

        Raises:
            CandidateError: One is not finite.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for rows in self._batches(requests):
            batch = [requests[i] for i in rows]
            width = max(len(request.tokens) for request in batch)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            row_of: list[int] = []
            column_of: list[int] = []
            target_of: list[int] = []
            first = width
            for row, request in enumerate(batch):
                length = len(request.tokens)
                ids[row, :length] = torch.tensor(request.tokens)
                start = length - len(request.targets)
                first = min(first, start)
                row_of += [row] * len(request.targets)
                column_of += range(start, length)
                target_of += request.targets
            logits = self._logits(ids.to(self._model.device), width - first)
            picked = logits[row_of, [column - first for column in column_of]]
            targets = torch.tensor(target_of, device=picked.device)
            log_probs = torch.log_softmax(picked, dim=-1)
            chosen = log_probs.gather(1, targets[:, None])[:, 0]
            rows_tensor = torch.tensor(row_of, device=picked.device)
            # Summed in float32 and rounded once, as torch sums a slice of half-precision numbers.
            sums = torch.zeros(len(batch), device=picked.device).index_add_(0, rows_tensor, chosen.float())
            misses = torch.zeros(len(batch), device=picked.device)
            misses.index_add_(0, rows_tensor, (log_probs.argmax(-1) != targets).float())
            totals, missed = sums.to(chosen.dtype).tolist(), misses.tolist()
            for i, total, miss in zip(rows, totals, missed, strict=True):
                if total != total or total in (float("inf"), float("-inf")):
                    raise CandidateError(f"the model gives a log-likelihood of {total}")
                answers[i] = (total, miss == 0)
            self._count(batch, width)
        return answers

    def _logits(self, ids: Tensor, keep: int) -> Tensor:
        """Return logits of the last `keep` positions, (rows, keep, vocabulary)."""
        if self._keeps:
            logits: Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
            return logits
        return self._model(input_ids=ids, use_cache=False).logits[:, -keep:]  # type: ignore[no-any-return]

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
            for rows in self._batches([requests[i] for i in members], extra=limit):
                batch = [requests[members[row]] for row in rows]
                for row, text in zip(rows, self._greedy(batch, stops, limit), strict=True):
                    answers[members[row]] = text
        return answers

    def _greedy(self, batch: Sequence[TokenRequest], stops: tuple[str, ...], limit: int) -> list[str]:
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
        texts, open_rows, cache = [""] * len(batch), set(range(len(batch))), None
        start = 0
        for step in range(limit):
            end = width + step
            kwargs: dict[str, Any] = {"logits_to_keep": 1} if self._keeps else {}
            if self._positions:
                kwargs["position_ids"] = positions[:, start:end]
            output = self._model(
                input_ids=ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **kwargs
            )
            logits = output.logits[:, -1]
            if step == 0 and not bool(torch.isfinite(logits).all()):
                raise CandidateError("the model gives logits that are not finite")
            ids, cache, start = logits.argmax(-1, keepdim=True), output.past_key_values, end
            for row, token in enumerate(ids[:, 0].tolist()):
                if row in open_rows:
                    written[row].append(token)
            # Decoding a long answer at every step is quadratic; stopping a few steps late changes nothing.
            if step < 64 or step % 8 == 0 or step == limit - 1:
                self._close(open_rows, written, texts, stops)
            if not open_rows:
                break
        self._count(batch, width + step)
        return [self._cut(text, stops) for text in texts]

    def _close(
        self, open_rows: set[int], written: list[list[int]], texts: list[str], stops: tuple[str, ...]
    ) -> None:
        """Take out of `open_rows` those that have met a stop string or an end token."""
        rows = sorted(open_rows)
        ended = {row: next((i for i, t in enumerate(written[row]) if t in self._ends), None) for row in rows}
        decoded = self.lm.tokenizer.batch_decode(
            [written[row][: ended[row]] for row in rows], skip_special_tokens=True
        )
        for row, text in zip(rows, decoded, strict=True):
            texts[row] = text
            if ended[row] is not None or any(stop and stop in text for stop in stops):
                open_rows.discard(row)

    @staticmethod
    def _cut(text: str, stops: tuple[str, ...]) -> str:
        for stop in stops:
            if stop:
                text = text.split(stop)[0]
        return text

    def _batches(self, requests: Sequence[TokenRequest], extra: int = 0) -> Iterator[list[int]]:
        """Yield row numbers, longest rows first, at most `batch_tokens` padded tokens a batch."""
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].tokens), requests[i].tokens))
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        start = 0
        while start < len(order):
            width = len(requests[order[start]].tokens) + extra
            scored = max(1, len(requests[order[start]].targets))
            rows = max(1, min(self._batch_tokens // width, MAX_LOGITS_BYTES // (4 * scored * vocabulary)))
            yield order[start : start + rows]
            start += rows

    def _count(self, batch: Sequence[TokenRequest], width: int) -> None:
        self.counts["requests"] += len(batch)
        self.counts["tokens"] += sum(len(request.tokens) for request in batch)
        self.counts["padded_tokens"] += len(batch) * width


def _plain_generation(config: Any) -> bool:
    """Whether a generation config leaves greedy decoding as it is."""
    neutral: dict[str, tuple[Any, ...]] = {
        "repetition_penalty": (None, 1.0),
        "encoder_repetition_penalty": (None, 1.0),
        "no_repeat_ngram_size": (None, 0),
        "encoder_no_repeat_ngram_size": (None, 0),
        "min_length": (None, 0),
        "min_new_tokens": (None, 0),
        "num_beams": (None, 1),
        "guidance_scale": (None, 1.0),
        "bad_words_ids": (None, []),
        "sequence_bias": (None, {}),
        "suppress_tokens": (None, []),
        "begin_suppress_tokens": (None, []),
        "forced_bos_token_id": (None,),
        "forced_eos_token_id": (None,),
        "exponential_decay_length_penalty": (None,),
    }
    return all(getattr(config, name, None) in values for name, values in neutral.items())
