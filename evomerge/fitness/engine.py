"""Answers lm-eval requests with a resident transformers model, reading each distinct token once.

Log-likelihoods: requests share what they begin with. Few-shot examples and system prompts are forwarded once
and their keys and values kept; the choices of one question are branches of one row under a mask of our own
(`prefixes`, `batches`, `branches`). The head is applied only to the positions that are scored.
Generation: greedy, behind the shared beginning (`generation`). What greedy decoding alone does not cover goes
through lm-eval's own `HFLM.generate_until`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomerge.errors import CandidateError, FitnessError
from evomerge.fitness.batches import Limits, Pass, Plan, Planner
from evomerge.fitness.branches import Trunk, head_on, masks, why_not, window_of
from evomerge.fitness.contract import ScoringEngine
from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.generation import Decoding, Prompts, prompts
from evomerge.fitness.prefixes import Costs
from evomerge.fitness.tasks import lm_eval_quiet

MAX_LOGITS_BYTES = 2**30
MAX_MASK_BYTES = 2**28
CPU_BATCH_TOKENS = 1024
"""Padded tokens in one forward for log-likelihoods on a CPU: more do not fit its caches and are slower."""
FEWEST_TOKENS = 16
"""Where memory runs out, batches are halved down to this many tokens."""
STOCK_BATCH = 16
"""Rows at once where lm-eval's own generation is used."""
SAMPLING_SEED = 1234
"""lm-eval's default, for tasks that sample answers."""
CPU_STAGE_TOKENS = 64.0
"""What one more pass costs on a CPU, in tokens."""
LAYER_WEIGHTS = 3e10
"""Products that a GPU does while one layer's kernels are started: 0.15 ms at 400 TFLOP/s, roughly."""
FEWEST_STAGE_TOKENS, MOST_STAGE_TOKENS = 256.0, 8192.0

T = TypeVar("T")


class Engine(ScoringEngine):
    """Answers token requests with the model's present weights.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokenizer: Its tokenizer.
        batch_tokens: Most padded tokens in one forward; None: by free memory.
        share_prefixes: Whether to read what requests begin with alike once.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_tokens: int | None = None, *, share_prefixes: bool = True
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        with lm_eval_quiet():
            super().__init__(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=STOCK_BATCH))
        self.rebind(model)
        self.not_shared = why_not(model) if share_prefixes else "fitness.share_prefixes is off"
        self._batch_tokens = batch_tokens or _tokens_that_fit(model)
        on_cpu = model.device.type == "cpu"
        self._pass_tokens = min(self._batch_tokens, CPU_BATCH_TOKENS) if on_cpu else self._batch_tokens

    def rebind(self, model: Any) -> None:
        """Forward another model from now on, of the same architecture."""
        self._model = self.lm._model = model
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self._read_generation_config(model.generation_config)

    # Log-likelihoods.

    def plan(self, requests: Sequence[TokenRequest]) -> Plan:
        """Return the passes for log-likelihood requests; which rows share one depends on no order."""
        config = self._model.config.get_text_config()
        limits = Limits(
            tokens=self._pass_tokens,
            logits=MAX_LOGITS_BYTES // (4 * int(config.vocab_size)),
            looks=MAX_MASK_BYTES // 4,
            stage=self._costs().stage,
        )
        return Planner(None if self.not_shared else self._costs(), limits).plan(requests)

    def _costs(self) -> Costs:
        """Return costs in units of one token's products with the weights.

        From a layer's shapes alone: workers whose first candidates have other numbers of layers plan alike.
        """
        config = self._model.config.get_text_config()
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        values = head * (getattr(config, "num_key_value_heads", None) or heads)
        weights = config.hidden_size * (2 * head * heads + 2 * values + 3 * _inner(config))
        stage = CPU_STAGE_TOKENS
        if self._model.device.type != "cpu":
            stage = min(MOST_STAGE_TOKENS, max(FEWEST_STAGE_TOKENS, LAYER_WEIGHTS / weights))
        return Costs(stage, 2 * head * heads / weights, self._pass_tokens)

    def loglikelihoods(self, plan: Plan) -> list[tuple[float, bool]]:
        """Return (sum of the targets' log-probabilities, whether greedy decoding gives them) per request.

        Raises:
            CandidateError: One is not finite.
            FitnessError: There is not enough memory for the smallest batch.
        """

        def smaller() -> None:
            self._pass_tokens //= 2
            plan.passes = self.plan(plan.requests).passes

        return self._fitting(lambda: self._loglikelihoods(plan), smaller)

    @torch.inference_mode()
    def _loglikelihoods(self, plan: Plan) -> list[tuple[float, bool]]:
        trunks: list[Trunk] = []
        found: list[Tensor] = []
        hits: list[Tensor] = []
        dtype = torch.float32
        for step in plan.passes:
            del trunks[step.level :]
            logits, trunk = self._forward(step, trunks[-1] if trunks else None)
            if trunk is not None:
                trunks.append(trunk)
            if not step.scored.numel():
                continue
            place, targets, *_ = step.scored.to(logits.device)
            log_probs = torch.log_softmax(logits, dim=-1)
            dtype = log_probs.dtype
            found.append(log_probs[place, targets].float())
            hits.append((log_probs.argmax(-1)[place] == targets).float())
        if not plan.requests:
            return []
        self._count(
            requests=len(plan.requests),
            tokens=sum(step.tokens for step in plan.passes),
            padded_tokens=sum(step.ids.numel() for step in plan.passes),
            unshared_tokens=plan.alone,
        )
        scored = torch.cat([step.scored[2:] for step in plan.passes], dim=1)
        return _summed(plan.requests, scored, torch.cat(found).cpu(), torch.cat(hits).cpu(), dtype)

    def _forward(self, step: Pass, trunk: Trunk | None) -> tuple[Tensor, Trunk | None]:
        """Return the logits of a pass at its places, (places, vocabulary), and the trunk it is."""
        model, kwargs = self._model, {}
        device = model.device
        if step.ends is not None and step.depths is not None:
            depths = step.depths.to(device, torch.long)
            kwargs["position_ids"] = depths
            kwargs["attention_mask"] = masks(model, depths, step.ends.to(device), step.before)
        kept = None
        if step.keeps:
            kept = trunk.longer() if trunk else Trunk.empty()
            kwargs["past_key_values"] = kept
        elif trunk:
            kwargs["past_key_values"] = trunk.reader()
        with head_on(model, step.places.to(device)):
            output = model(input_ids=step.ids.to(device, torch.long), use_cache=step.keeps, **kwargs)
        return output.logits[0], kept

    # Generation.

    def generate(self, requests: Sequence[TokenRequest]) -> list[str]:
        """Return each row's greedy continuation, cut at its first stop string.

        Raises:
            CandidateError: The model's logits are not finite.
            FitnessError: There is not enough memory for the smallest batch.
        """

        def smaller() -> None:
            self._batch_tokens //= 2

        return self._fitting(lambda: self._generate(requests), smaller)

    @torch.inference_mode()
    def _generate(self, requests: Sequence[TokenRequest]) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text

        answers = [""] * len(requests)
        decoding = Decoding(self._model, self.lm.tokenizer, self._ends, self._accepted)
        kept: tuple[tuple[int, ...], Trunk | None] = ((), None)
        tokens = generated = 0
        for batch in prompts(requests, self._prompt_stage(requests), self._batch_tokens):
            if batch.trunk != kept[0]:
                kept = (batch.trunk, self._trunk(batch) if batch.trunk else None)
                tokens += len(batch.trunk)
                decoding.padded_tokens += len(batch.trunk)
            written = decoding.run(batch, kept[1])
            tokens += sum(map(len, batch.rests)) + sum(len(ids) - 1 for ids in written)
            generated += sum(len(ids) * len(own) for ids, own in zip(written, batch.requests, strict=True))
            for ids, own in zip(written, batch.requests, strict=True):
                text = self.lm.tokenizer.decode(ids, skip_special_tokens=True)
                answer = postprocess_generated_text(text, list(batch.stops), None)
                for i in own:
                    answers[i] = answer
        self._count(
            requests=len(requests),
            tokens=tokens,
            padded_tokens=decoding.padded_tokens,
            unshared_tokens=sum(len(request.tokens) for request in requests) + generated - len(requests),
            generated=generated,
        )
        return answers

    def _prompt_stage(self, requests: Sequence[TokenRequest]) -> float | None:
        """Return what a pass for a shared beginning costs; None if no beginning can be shared."""
        window = window_of(self._model)
        longest = max((len(r.tokens) + r.max_new_tokens for r in requests), default=0)
        # With padding between the shared beginning and the rest, a window would be counted over the padding.
        if self.not_shared or (window is not None and longest > window):
            return None
        return self._costs().stage

    def _trunk(self, batch: Prompts) -> Trunk:
        trunk = Trunk.empty()
        ids = torch.tensor([batch.trunk], device=self._model.device)
        with head_on(self._model, torch.zeros(1, dtype=torch.long, device=ids.device)):
            self._model(input_ids=ids, past_key_values=trunk, use_cache=True)
        return trunk

    def generate_as_stock(self, instances: Sequence[Any]) -> list[str]:
        """Return the texts of lm-eval's own generation, for what greedy decoding alone does not cover."""
        beams = self._model.generation_config.num_beams
        # With beams, lm-eval looks for stop strings in the wrong rows of a batch.
        several = any((instance.args[1].get("num_beams") or beams or 1) > 1 for instance in instances)
        self.lm.batch_size_per_gpu = 1 if several else STOCK_BATCH
        torch.manual_seed(SAMPLING_SEED)
        with lm_eval_quiet():
            texts: list[str] = self.lm.generate_until(list(instances), disable_tqdm=True)
        self._count(requests=len(texts))
        return texts

    # Both.

    def _fitting(self, work: Callable[[], T], smaller: Callable[[], None]) -> T:
        """Do the work, again with smaller batches as long as memory runs out."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, RuntimeError) as problem:
                if not _out_of_memory(problem):
                    raise
                if min(self._pass_tokens, self._batch_tokens) // 2 < FEWEST_TOKENS:
                    raise FitnessError(
                        f"out of memory with {self._pass_tokens} tokens at once; free memory or use fewer "
                        "workers on this device"
                    ) from None
            # Outside the handler, where the failed pass's tensors are gone.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            smaller()


def _summed(
    requests: Sequence[TokenRequest], scored: Tensor, found: Tensor, hits: Tensor, dtype: torch.dtype
) -> list[tuple[float, bool]]:
    """Return each request's answer from its tokens' log-probabilities.

    Args:
        requests: All requests.
        scored: For every scored token its request and its number in it, (2, scored).
        found: Log-probabilities, (scored).
        hits: 1 where greedy decoding gives the token.
        dtype: Of the model's logits.

    Raises:
        CandidateError: A sum is not finite.
    """
    order = torch.argsort(scored[0] * (int(scored[1].max()) + 1) + scored[1])
    found, hits = found[order], hits[order] > 0
    lengths = torch.tensor([len(request.targets) for request in requests])
    starts = lengths.cumsum(0) - lengths
    sums, whole = torch.empty(len(requests), dtype=dtype), torch.empty(len(requests), dtype=torch.bool)
    for length in sorted({len(request.targets) for request in requests}):
        own = (lengths == length).nonzero()[:, 0]
        places = starts[own, None] + torch.arange(length)
        # Summed in float32 and rounded once, as torch sums a slice of half-precision numbers.
        sums[own] = found[places].sum(dim=1).to(dtype)
        whole[own] = hits[places].all(dim=1)
    bad = sums[~sums.isfinite()]
    if len(bad):
        raise CandidateError(f"the model gives a log-likelihood of {float(bad[0])}")
    return list(zip(sums.tolist(), whole.tolist(), strict=True))


def _out_of_memory(problem: RuntimeError) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)


def _inner(config: Any) -> int:
    """Return the width inside a feed-forward block."""
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def _tokens_that_fit(model: Any) -> int:
    """Return how many tokens of one pass take about a third of the free memory, a power of two."""
    if model.device.type != "cuda":
        return 8192
    devices = {parameter.device for parameter in model.parameters()}
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices if device.type == "cuda")
    config = model.config.get_text_config()
    # Of one layer at a time: input, normed input, queries, keys, values, output, and the inner part.
    per_token = model.dtype.itemsize * (8 * config.hidden_size + 3 * _inner(config))
    fits = int(free / 3 / per_token)
    return min(65536, max(1024, 1 << max(0, fits.bit_length() - 1)))
