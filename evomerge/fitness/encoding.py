"""From lm-eval's requests to tokens, exactly as the stock command's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evomerge.errors import FitnessError
from evomerge.fitness.tasks import lm_eval_quiet


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One row to forward.

    Attributes:
        tokens: What the model reads.
        targets: Log-likelihood: the continuation, whose last entry the model never reads. Empty for
            generation.
        stops: Generation: strings that end the answer.
        max_new_tokens: Generation: most tokens to generate.
        cut: Tokens left out at the beginning because the model reads no more at once.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0
    cut: int = 0


class Encoder:
    """Encodes requests by lm-eval's own wrapper: tokens are the stock command's in every corner case.

    Args:
        lm: lm-eval's `HFLM` around the model.
    """

    def __init__(self, lm: Any) -> None:
        self._lm = lm

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
        _lm, kind = self._lm, instance.request_type
        if kind == "generate_until":
            return [self._generation(*instance.args)]
        if kind == "loglikelihood_rolling":
            return [self._row(*window) for window in self._windows(instance.args[0])]
        return [self.pair(*instance.args)]

    def pair(self, context: str, continuation: str) -> TokenRequest:
        """Return the row that asks for a continuation's log-likelihood after a context, even an empty one."""
        lm = self._lm
        if context:
            return self._row(*lm._encode_pair(context, continuation))
        ids = lm.tok_encode(continuation, add_special_tokens=False)
        if ids[:1] == [lm.prefix_token_id]:
            return self._row(ids[:1], ids[1:])
        return self._row([lm.prefix_token_id], ids)

    def _row(self, context: list[int], continuation: list[int]) -> TokenRequest:
        limit = self._lm.max_length
        if not context or not 0 < len(continuation) <= limit:
            raise FitnessError(
                f"a continuation of {len(continuation)} tokens after a context of {len(context)}: expected a "
                f"context and 1 to {limit} tokens, as many as the model reads at once"
            )
        whole = context + continuation
        kept = whole[-(limit + 1) :]
        return TokenRequest(tuple(kept[:-1]), tuple(continuation), cut=len(whole) - len(kept))

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        from lm_eval import utils

        yield from map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows(
                token_list=self._lm.tok_encode(text),
                prefix_token=self._lm.prefix_token_id,
                max_seq_len=self._lm.max_length,
                context_len=1,
            ),
        )

    def _generation(self, context: str, kwargs: dict[str, Any]) -> TokenRequest:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        lm = self._lm
        with lm_eval_quiet():
            normal = normalize_gen_kwargs(kwargs, lm.max_gen_toks)
            eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
            stops = handle_stop_sequences(normal["until"], eos=eos)
            limit = normal["max_gen_toks"]
            if not 0 < limit < lm.max_length:
                raise FitnessError(
                    f"generation_kwargs ask for {limit} tokens: expected 1 to {lm.max_length - 1}, "
                    "fewer than the model reads at once"
                )
            whole, _ = lm.tok_batch_encode([context])
            ids = whole[0].tolist()
        kept = ids[-(lm.max_length - limit) :]
        if not kept:
            raise FitnessError("an empty prompt, and the tokenizer puts no token before it")
        return TokenRequest(tuple(kept), stops=tuple(stops), max_new_tokens=limit, cut=len(ids) - len(kept))
