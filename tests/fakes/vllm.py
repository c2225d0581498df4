"""A stand-in for vLLM 0.33: the documented calls that evomerge makes, over a transformers model on the CPU.

Put this folder on `sys.path`. As there: weights are loaded from files first; `collective_rpc` hands objects
on as they are in process and pickled otherwise; `reload_weights` takes names of the checkpoint and leaves the
prefix cache alone; prompts with `prompt_logprobs` do not read that cache, but all write to it, in blocks of
16 tokens; a prompt must leave room for one more token. `faults` makes it misbehave.
"""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

__version__ = "0.33.0"

BLOCK = 16
faults: set[str] = set()
"""`stale`: reloading does nothing. `sticky`: layer 1 takes new weights only once. `cache`: the prefix cache
is kept, and said to be so; `silent cache`: kept, but said to be empty. `start`: there is no GPU."""

made: list[LLM] = []
"""Every engine of the session, newest last."""


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True.")
        if any(not text for text in self.stop or ()):
            raise ValueError("stop cannot contain an empty string.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int | None


@dataclass
class Reload:
    """What one `reload_weights` was given."""

    names: list[str] = field(default_factory=list)


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        enable_prefix_caching: bool | None = None,
        enable_chunked_prefill: bool | None = None,
        distributed_executor_backend: str | None = None,
        generation_config: str = "auto",
    ) -> None:
        if "start" in faults:
            raise RuntimeError("Failed to infer device type,\nplease set VLLM_LOGGING_LEVEL=DEBUG")
        assert max_num_batched_tokens is None or max_num_batched_tokens >= (max_num_seqs or 256)
        self.arguments = {key: value for key, value in locals().items() if key != "self"}
        self._in_process = (
            os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0" and tensor_parallel_size == 1
        )
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        config = SimpleNamespace(max_model_len=self._model.config.max_position_embeddings)
        self.llm_engine = SimpleNamespace(model_config=config)
        self._blocks: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        self.reloads: list[Reload] = []
        made.append(self)

    # Weights.

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
    ) -> list[Any]:
        assert method == "reload_weights"
        assert not args
        if not self._in_process:
            kwargs = pickle.loads(pickle.dumps(kwargs))
        return [self._reload_weights(**(kwargs or {}))]

    def _reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        reload = Reload()
        self.reloads.append(reload)
        own = dict(self._model.named_parameters(remove_duplicate=False))
        for name, tensor in weights_iterator:
            reload.names.append(name)
            assert own[name].shape == tensor.shape
            again = len(self.reloads) > 1 and ".layers.1." in name
            if "stale" in faults or ("sticky" in faults and again):
                continue
            own[name].data.copy_(tensor)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if not faults & {"cache", "silent cache"}:
            self._blocks.clear()
        return "cache" not in faults

    # Requests.

    def generate(
        self,
        prompts: Sequence[TokensPrompt],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert len(prompts) == len(sampling_params)
        return [
            self._answer(prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    @torch.inference_mode()
    def _answer(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        room = self.llm_engine.model_config.max_model_len - len(prompt)
        if room < 1:
            raise ValueError(f"The prompt ({len(prompt)} tokens) is longer than the maximum model length")
        assert params.temperature == 0
        scored = params.prompt_logprobs is not None
        shares = self.arguments["enable_prefix_caching"] is not False
        cache, cached = (DynamicCache(), 0) if scored or not shares else self._cached(prompt)
        logits = self._forward(prompt[cached:], cache)
        self._keep(prompt, cache)
        tables = None
        if scored:
            tables = [None, *map(self._table, logits[:-1], prompt[1:])]
        written: list[int] = []
        chosen: list[dict[int, Logprob]] = []
        limit = min(params.max_tokens or room, room)
        ends = {*(params.stop_token_ids or ()), self._model.config.eos_token_id}
        while True:
            written.append(int(logits[-1].argmax()))
            chosen.append(self._table(logits[-1], written[-1]))
            text = ""
            if params.detokenize:
                text = self._tokenizer.decode(written, skip_special_tokens=params.skip_special_tokens)
            found = [at for stop in params.stop or () if (at := text.find(stop)) >= 0]
            if found or written[-1] in ends or len(written) == limit:
                break
            logits = self._forward(written[-1:], cache)
        text = text[: min(found)] if found else text
        output = CompletionOutput(text, written, chosen if params.logprobs is not None else None)
        return RequestOutput(prompt, tables, [output], cached)

    def _forward(self, ids: list[int], cache: DynamicCache) -> Tensor:
        return self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0].float()

    def _table(self, logits: Tensor, token: int) -> dict[int, Logprob]:
        found = torch.log_softmax(logits, -1)
        top = int(found.argmax())
        rank = int((found > found[token]).sum()) + 1
        return {token: Logprob(float(found[token]), rank), top: Logprob(float(found[top]), 1)}

    def _cached(self, prompt: list[int]) -> tuple[DynamicCache, int]:
        """Return keys and values of the longest beginning of whole blocks; the last token is always read."""
        cache, ends = DynamicCache(), range(BLOCK, len(prompt), BLOCK)
        known = list(itertools.takewhile(lambda end: tuple(prompt[:end]) in self._blocks, ends))
        for end in known:
            for layer, (keys, values) in enumerate(self._blocks[tuple(prompt[:end])]):
                cache.update(keys, values, layer)
        return cache, known[-1] if known else 0

    def _keep(self, prompt: list[int], cache: DynamicCache) -> None:
        for end in range(BLOCK, len(prompt) + 1, BLOCK):
            span = slice(end - BLOCK, end)
            self._blocks.setdefault(
                tuple(prompt[:end]),
                [
                    (layer.keys[:, :, span].clone(), layer.values[:, :, span].clone())
                    for layer in cache.layers
                ],
            )
