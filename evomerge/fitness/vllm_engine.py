"""Answers lm-eval requests with a resident vLLM engine, whose weights are replaced in place.

Written against the documented calls of vLLM 0.33 (`LLM.generate`, `LLM.collective_rpc("reload_weights")`,
`LLM.reset_prefix_cache`). Not run with vLLM itself: it was tested on a small stand-in for these calls.

Prompts and tokens are the stock `hf` command's, as with the other engine; the arithmetic is vLLM's. vLLM must
write a token behind every prompt, so what is longer than the context loses two tokens more at its beginning.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evomerge.errors import CandidateError, EngineError
from evomerge.fitness.batches import Plan
from evomerge.fitness.contract import ScoringEngine
from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.greedy import no_sampling
from evomerge.fitness.tasks import lm_eval_quiet

MEMORY = 0.9
"""Part of a GPU's memory that the workers on it share; vLLM's own default for one."""
MAX_LOGITS_BYTES = 2**30
"""Most memory for the logits of one step: where prompts are scored, every token of it has some."""
MAX_ROWS = 256
"""Most requests in one step."""
PROBE_TOKENS = 48
"""Length of the probe: some blocks of the prefix cache, 16 tokens each."""
SAME = 0.02
"""Log-probabilities of the probe that differ by no more, in nats, are those of the same weights."""

Weights = Iterable[tuple[str, Tensor]]
"""Names of the checkpoint to tensors, layer after layer."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How vLLM is started.

    Attributes:
        model: Folder of a checkpoint of the architecture; its weights are loaded first.
        tokenizer: Folder of the tokenizer.
        dtype: What the model runs in: `float32`, `bfloat16` or `float16`.
        tensor_parallel: GPUs that the model is spread over.
        gpu_share: Part of each GPU that is ours, up to 1.
        batch_tokens: Most tokens in one step; None: as many as keep their logits within 1 GiB.
        share_prefixes: Whether vLLM keeps its prefix cache.
    """

    model: Path
    tokenizer: Path
    dtype: str
    tensor_parallel: int = 1
    gpu_share: float = 1.0
    batch_tokens: int | None = None
    share_prefixes: bool = True


class VllmEngine(ScoringEngine):
    """Owns an `LLM` in this process.

    Args:
        settings: How it is started.

    Raises:
        EngineError: vLLM is not installed or cannot start, or the model's generation config asks for more
            than greedy decoding.
    """

    def __init__(self, settings: VllmSettings) -> None:
        self._vllm = _imported()
        shell = _shell(settings.model)
        self._read_generation_config(shell.generation_config)
        if not self.greedy_is_plain:
            raise EngineError(
                f"workers.engine: vllm decodes greedily, but {settings.model / 'generation_config.json'} "
                "asks for more (a penalty, beams, ...); take that out, or use transformers"
            )
        vocabulary = int(shell.config.get_text_config().vocab_size)
        self._llm = self._started(settings, vocabulary)
        super().__init__(_lm(shell, settings.tokenizer, self._llm.llm_engine.model_config.max_model_len))
        known = min(len(self.lm.tokenizer), vocabulary)
        self._probe_tokens = [(7 + 31 * i) % known for i in range(min(PROBE_TOKENS, self.lm.max_length))]
        self._loaded: tuple[str, list[float]] | None = None

    def _started(self, settings: VllmSettings, vocabulary: int) -> Any:
        tokens = min(settings.batch_tokens or 8192, MAX_LOGITS_BYTES // (4 * vocabulary))
        several = {"distributed_executor_backend": "mp"} if settings.tensor_parallel > 1 else {}
        try:
            return self._vllm.LLM(
                model=str(settings.model),
                tokenizer=str(settings.tokenizer),
                dtype=settings.dtype,
                tensor_parallel_size=settings.tensor_parallel,
                gpu_memory_utilization=round(MEMORY * settings.gpu_share, 4),
                max_num_batched_tokens=max(tokens, MAX_ROWS),
                max_num_seqs=MAX_ROWS,
                enable_prefix_caching=settings.share_prefixes,
                enable_chunked_prefill=True,
                trust_remote_code=False,
                generation_config="vllm",  # the model's own would set limits of its own
                seed=0,
                **several,
            )
        except Exception as problem:  # whatever vLLM raises where a GPU or memory is missing
            text = " ".join(str(problem).split())[:300]
            raise EngineError(
                f"workers.engine: vllm cannot start: {type(problem).__name__}: {text}"
            ) from problem

    # Weights.

    def check_reloading(self, own: Weights, others: Weights) -> None:
        """Check once that weights can be replaced and put back.

        Args:
            own: The weights that vLLM has loaded from its checkpoint.
            others: Any other weights.

        Raises:
            EngineError: New weights do not show, or the old ones do not come back whole.
        """
        self._check_reloading(self._probe(), own, others)

    def _check_reloading(self, before: Sequence[float], own: Weights, others: Weights) -> None:
        self._reload(others)
        if _near(before, self._probe()):
            raise self._stale("other weights change nothing")
        self._reload(own)
        if not _near(before, self._probe()):
            raise self._stale("the first weights do not come back")

    def load(self, digest: str, weights: Weights, others: Weights) -> None:
        """Replace the weights.

        Args:
            digest: Their identity.
            weights: All tensors of the checkpoint.
            others: Any other weights; loaded in between if these seem to have changed nothing.

        Raises:
            CandidateError: The model's log-probabilities are not finite.
            EngineError: vLLM does not take them.
        """
        before, self._loaded = self._loaded, None
        self._reload(weights)
        probe = self._probe()
        if not all(map(math.isfinite, probe)):
            raise CandidateError("the model gives log-probabilities that are not finite")
        if before is not None and before[0] == digest and not _near(probe, before[1]):
            raise self._stale("the same weights answer otherwise than before")
        if before is not None and before[0] != digest and probe == before[1]:
            # Near the end of a search weights may differ by less than the probe shows.
            self._check_reloading(probe, weights, others)
        self._loaded = digest, probe

    def _reload(self, weights: Weights) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        # `reload_weights` leaves the keys and values of the old weights in place.
        if not self._llm.reset_prefix_cache():
            raise self._stale("its prefix cache cannot be emptied")

    def _probe(self) -> list[float]:
        """Return log-probabilities of a fixed prompt's tokens and of the one written behind it."""
        # First as a generation: prompts that are scored never read the prefix cache.
        cached = self._answers([self._probe_tokens], max_tokens=1)[0]
        if cached.num_cached_tokens:
            raise self._stale(f"{cached.num_cached_tokens} tokens of the old weights are still cached")
        scored = self._answers([self._probe_tokens], max_tokens=1, logprobs=1, prompt_logprobs=1)[0]
        found = [
            each[token].logprob
            for token, each in zip(self._probe_tokens[1:], scored.prompt_logprobs[1:], strict=True)
        ]
        return [*found, _first_logprob(scored)]

    def _stale(self, what: str) -> EngineError:
        version = getattr(self._vllm, "__version__", "of an unknown version")
        return EngineError(
            f"workers.engine: vllm {version} keeps old weights after reload_weights: {what}; scores would be "
            "wrong. Use transformers, or the vllm this was written for (0.33)"
        )

    # Log-likelihoods.

    def plan(self, requests: Sequence[TokenRequest]) -> Plan:
        """Return the requests: vLLM makes its own batches."""
        return Plan(requests)

    def loglikelihoods(self, plan: Plan) -> list[tuple[float, bool]]:
        """Return (sum of the targets' log-probabilities, whether each is the likeliest) per request.

        Raises:
            CandidateError: One is not finite.
        """
        wanted = [(*request.tokens, request.targets[-1]) for request in plan.requests]
        prompts = sorted(set(wanted))
        answers = self._answers(prompts, max_tokens=1, prompt_logprobs=1, detokenize=False)
        answer_to = dict(zip(prompts, answers, strict=True))
        found = []
        for prompt, request in zip(wanted, plan.requests, strict=True):
            tables = answer_to[prompt].prompt_logprobs[-len(request.targets) :]
            chosen = [table[target] for table, target in zip(tables, request.targets, strict=True)]
            total = math.fsum(each.logprob for each in chosen)
            if not math.isfinite(total):
                raise CandidateError(f"the model gives a log-likelihood of {total}")
            found.append((total, all(each.rank == 1 for each in chosen)))
        tokens = sum(len(prompt) - 1 for prompt in prompts)
        self._count(requests=len(wanted), tokens=tokens, padded_tokens=tokens, unshared_tokens=plan.alone)
        return found

    # Generation.

    def generate(self, requests: Sequence[TokenRequest]) -> list[str]:
        """Return each row's greedy continuation, cut at its first stop string.

        Raises:
            CandidateError: The model's log-probabilities are not finite.
        """
        from lm_eval.models.utils import postprocess_generated_text

        wanted = [(request.tokens, request.stops, request.max_new_tokens) for request in requests]
        distinct = sorted(set(wanted))
        params = [
            # Ends are stops here too, and special tokens are text: what stops the stock command stops this.
            self._params(
                max_tokens=limit,
                stop=list(stops),
                stop_token_ids=sorted(self._ends),
                logprobs=1,
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
            )
            for _, stops, limit in distinct
        ]
        answers = self._run([tokens for tokens, _, _ in distinct], params)
        texts: dict[Any, tuple[str, int]] = {}
        tokens = 0
        for key, answer in zip(distinct, answers, strict=True):
            if not math.isfinite(_first_logprob(answer)):
                raise CandidateError("the model gives log-probabilities that are not finite")
            ids = list(answer.outputs[0].token_ids)
            text = self.lm.tokenizer.decode(ids, skip_special_tokens=True)
            texts[key] = postprocess_generated_text(text, list(key[1]), None), len(ids)
            tokens += len(key[0]) - (answer.num_cached_tokens or 0) + len(ids) - 1
        generated = sum(texts[key][1] for key in wanted)
        self._count(
            requests=len(wanted),
            tokens=tokens,
            padded_tokens=tokens,
            unshared_tokens=sum(len(request.tokens) for request in requests) + generated - len(wanted),
            generated=generated,
        )
        return [texts[key][0] for key in wanted]

    def generate_as_stock(self, instances: Sequence[Any]) -> list[str]:
        """Refuse: sampling and beams are lm-eval's and need a transformers model.

        Raises:
            EngineError: Always.
        """
        raise EngineError(no_sampling(instances[0].task_name))

    # Both.

    def _answers(self, prompts: Sequence[Sequence[int]], **params: Any) -> list[Any]:
        return self._run(prompts, [self._params(**params)] * len(prompts))

    def _params(self, **params: Any) -> Any:
        return self._vllm.SamplingParams(temperature=0.0, **params)

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        answers: list[Any] = self._llm.generate(inputs, list(params), use_tqdm=False) if inputs else []
        return answers


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= SAME for a, b in zip(one, other, strict=True))


def _first_logprob(answer: Any) -> float:
    """Return the log-probability of the first token that was written."""
    first = answer.outputs[0]
    return float(first.logprobs[0][first.token_ids[0]].logprob)


def _imported() -> Any:
    # With the engine in a process of its own, weights would have to be pickled, which vLLM allows for plain
    # data only; read when vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as problem:
        raise EngineError(
            f"workers.engine: vllm cannot be imported ({problem}); install it with "
            "pip install 'evomerge[vllm]', or use transformers"
        ) from None
    return vllm


def _shell(path: Path) -> Any:
    """Return a model without weights, for its configs."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if (path / "generation_config.json").is_file():
        shell.generation_config = GenerationConfig.from_pretrained(path)
    return shell


def _lm(shell: Any, tokenizer: Path, context: int) -> Any:
    """Return lm-eval's wrapper, which makes prompts and tokens.

    Args:
        shell: A model without weights.
        tokenizer: Folder of its tokenizer.
        context: Most tokens of a prompt and what is written behind it.
    """
    from lm_eval.models.huggingface import HFLM

    with lm_eval_quiet():
        lm = HFLM(pretrained=shell, tokenizer=AutoTokenizer.from_pretrained(tokenizer))
        # A prompt is what the model reads and the last target; one more token is written behind it.
        lm._max_length = min(lm.max_length, context - 2)
    return lm
