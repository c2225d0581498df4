"""What the harness asks of whatever holds the model: tokens in, log-likelihoods and texts out.

Two engines keep this contract: `engine.Engine` forwards a transformers model itself, `vllm_engine.VllmEngine`
leaves that to vLLM. How they get their weights is the worker's business (`workers.resident`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evomerge.fitness.batches import Plan
from evomerge.fitness.encoding import Encoder, TokenRequest
from evomerge.fitness.greedy import is_plain_config


class ScoringEngine(ABC):
    """Answers token requests with the present weights.

    Args:
        lm: lm-eval's `HFLM` around a model of the architecture; it makes the prompts and tokens.

    Attributes:
        lm: Likewise.
        counts: See `harness.Evaluation`; since the last `reset_counts`.
        greedy_is_plain: Whether the model's generation config leaves greedy decoding as it is.
    """

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self._encoder = Encoder(lm)
        self.counts: dict[str, float] = {}
        self.reset_counts()

    def encode(self, instance: Any) -> list[TokenRequest]:
        """Return an lm-eval instance's rows; see `Encoder.encode`."""
        return self._encoder.encode(instance)

    def encode_pair(self, context: str, continuation: str) -> TokenRequest:
        """Return the row that asks for a continuation's log-likelihood; see `Encoder.pair`."""
        return self._encoder.pair(context, continuation)

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the tokenizer makes of a text."""
        return len(self.lm.tokenizer.encode(text, add_special_tokens=False))

    @property
    def layers(self) -> int:
        """Number of decoder layers of the present model."""
        return int(self.lm.model.config.get_text_config().num_hidden_layers)

    def reset_counts(self) -> None:
        """Start counting anew."""
        self.counts = dict.fromkeys(
            ("requests", "tokens", "padded_tokens", "unshared_tokens", "generated"), 0.0
        )

    @abstractmethod
    def plan(self, requests: Sequence[TokenRequest]) -> Plan:
        """Return how log-likelihood requests are answered, the same for every candidate."""

    @abstractmethod
    def loglikelihoods(self, plan: Plan) -> list[tuple[float, bool]]:
        """Return (sum of the targets' log-probabilities, whether greedy decoding gives them) per request.

        Raises:
            CandidateError: One is not finite.
        """

    @abstractmethod
    def generate(self, requests: Sequence[TokenRequest]) -> list[str]:
        """Return each row's greedy continuation, cut at its first stop string.

        Raises:
            CandidateError: The model's logits are not finite.
        """

    @abstractmethod
    def generate_as_stock(self, instances: Sequence[Any]) -> list[str]:
        """Return the texts of lm-eval's own generation, for what greedy decoding alone does not cover.

        Raises:
            FitnessError: The engine cannot.
        """

    def check_finite(self, request: TokenRequest) -> None:
        """Forward one generation request.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        counts = dict(self.counts)
        self.generate([replace(request, max_new_tokens=1)])
        self.counts = counts

    def _read_generation_config(self, config: Any) -> None:
        """Take over what a model's generation config says of greedy decoding and of ends."""
        self.greedy_is_plain = is_plain_config(config)
        ends = config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def _count(self, **counts: float) -> None:
        for name, count in counts.items():
            self.counts[name] += count
