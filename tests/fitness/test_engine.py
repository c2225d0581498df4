"""The engine alone: batches, sharing of rows, memory, counts. Values are compared in `test_harness`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evomerge.errors import CandidateError, FitnessError
from evomerge.fitness import engine as engine_module
from evomerge.fitness.branches import window_of
from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.engine import Engine
from evomerge.fitness.greedy import is_plain_greedy
from tests.checkpoints.tiny import make_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.set_num_threads(1)
    path = make_model(tmp_path_factory.mktemp("llama"), "llama")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return Engine(model, AutoTokenizer.from_pretrained(path), 128)


@pytest.fixture(autouse=True)
def _fresh(engine: Engine) -> None:
    engine.reset_counts()


def row(length: int, targets: int, start: int = 3) -> TokenRequest:
    ids = tuple(4 + (start * 7 + 5 * k) % 50 for k in range(length + 1))
    return TokenRequest(ids[:-1], ids[len(ids) - targets :])


def alone(engine: Engine, request: TokenRequest) -> tuple[float, bool]:
    """Return the answer by a plain forward of one row."""
    with torch.inference_mode():
        logits = engine.lm.model(torch.tensor([request.tokens])).logits[0, -len(request.targets) :]
    found = torch.log_softmax(logits, -1)
    targets = torch.tensor(request.targets)
    total = found.gather(1, targets[:, None]).sum().item()
    return total, bool((found.argmax(-1) == targets).all())


def test_rows_of_any_length_in_any_batch_are_scored_as_alone(engine: Engine) -> None:
    requests = [row(length, targets, length) for length in (1, 2, 9, 40, 100) for targets in (1, length)]
    for answer, request in zip(engine.loglikelihoods(engine.plan(requests)), requests, strict=True):
        assert answer == pytest.approx(alone(engine, request), rel=1e-5)


def test_a_row_that_several_requests_read_is_forwarded_once(engine: Engine) -> None:
    tokens = row(20, 1).tokens
    requests = [TokenRequest(tokens, (target,)) for target in range(4, 24)]
    requests += [TokenRequest(tokens, (*tokens[-2:], 9)), requests[3]]
    answers = engine.loglikelihoods(engine.plan(requests))
    counted = {"requests": 22, "tokens": 20, "padded_tokens": 20, "unshared_tokens": 22 * 20, "generated": 0}
    assert engine.counts == counted
    for answer, request in zip(answers, requests, strict=True):
        assert answer == pytest.approx(alone(engine, request), rel=1e-5)
    assert answers[3] == answers[-1]


def test_passes_hold_at_most_the_padded_tokens_asked_for(engine: Engine) -> None:
    plan = engine.plan([row(length, 1, k) for k, length in enumerate([50, 3, 60, 10, 9, 8, 7, 30, 200])])
    assert [tuple(step.ids.shape) for step in plan.passes] == [(1, 200), (2, 60), (1, 30), (5, 10)]
    assert sorted(int(i) for step in plan.passes for i in step.scored[2]) == list(range(9))


def test_passes_do_not_depend_on_the_order_of_requests(engine: Engine) -> None:
    requests = [row(5 + k % 7, 2, k) for k in range(30)]
    requests += [TokenRequest((*requests[0].tokens, k), (k + 1,)) for k in range(4, 9)]
    forth, back = engine.plan(requests), engine.plan(requests[::-1])
    for a, b in zip(forth.passes, back.passes, strict=True):
        assert torch.equal(a.ids, b.ids)
    assert engine.loglikelihoods(forth) == engine.loglikelihoods(back)[::-1]


@pytest.mark.parametrize("targets", [1, 20])
def test_the_logits_of_a_pass_stay_within_their_share_of_memory(
    targets: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [row(20, targets, k) for k in range(6)]
    limit = 4 * 64 * 40
    monkeypatch.setattr(engine_module, "MAX_LOGITS_BYTES", limit)
    plan = engine.plan(requests)
    for step in plan.passes:
        assert len(step.places) * 64 * 4 <= limit
    assert len(plan.passes) == (1 if targets == 1 else 3)
    for answer, request in zip(engine.loglikelihoods(plan), requests, strict=True):
        assert answer == pytest.approx(alone(engine, request), rel=1e-5)


def test_no_requests_have_no_answers(engine: Engine) -> None:
    assert engine.loglikelihoods(engine.plan([])) == []
    assert engine.generate([]) == []
    assert engine.counts["requests"] == 0


def test_generation_counts_what_it_forwards_and_stops_when_all_rows_have(engine: Engine) -> None:
    requests = [TokenRequest(row(length, 1).tokens, max_new_tokens=6) for length in (4, 9)]
    texts = engine.generate(requests)
    assert [len(engine.lm.tokenizer(text)["input_ids"]) <= 6 for text in texts] == [True, True]
    written = engine.counts["generated"]
    assert sum(map(len, texts)) <= written <= 12  # a token is a letter, or one that ends the answer
    assert engine.counts["tokens"] == engine.counts["unshared_tokens"] == 13 + written - 2
    assert engine.counts["padded_tokens"] == 2 * (9 + 5)
    engine.reset_counts()
    first = [text[:1] for text in texts]
    stopped = [TokenRequest(request.tokens, (), tuple(first), 6) for request in requests]
    assert engine.generate(stopped) == ["", ""]
    assert engine.counts["padded_tokens"] == 2 * 9


def test_requests_with_other_stops_and_limits_are_answered_beside_each_other(engine: Engine) -> None:
    tokens = row(9, 1).tokens
    long = engine.generate([TokenRequest(tokens, max_new_tokens=8)])[0]
    stop = long[2]
    requests = [
        TokenRequest(tokens, max_new_tokens=3),
        TokenRequest(tokens, stops=(stop,), max_new_tokens=8),
        TokenRequest(tokens, max_new_tokens=8),
    ]
    assert engine.generate(requests) == [long[:3], long.split(stop)[0], long]


@pytest.fixture
def broken(engine: Engine) -> Iterator[Engine]:
    weight = engine.lm.model.model.norm.weight
    kept = weight.data.clone()
    weight.data[0] = float("inf")
    yield engine
    weight.data.copy_(kept)


def test_logits_that_are_not_finite_are_the_candidates_fault(broken: Engine) -> None:
    with pytest.raises(CandidateError, match="log-likelihood of nan"):
        broken.loglikelihoods(broken.plan([row(5, 2)]))
    with pytest.raises(CandidateError, match="logits that are not finite"):
        broken.generate([TokenRequest(row(5, 1).tokens, max_new_tokens=2)])
    with pytest.raises(CandidateError, match="logits that are not finite"):
        broken.check_finite(TokenRequest(row(5, 1).tokens, max_new_tokens=200))


@pytest.mark.parametrize(
    ("kwargs", "plain"),
    [
        ({"until": ["\n"], "max_gen_toks": 3}, True),
        ({"until": [], "do_sample": False, "temperature": 0.0, "max_new_tokens": 3}, True),
        ({"do_sample": None, "temperature": None}, True),
        ({"do_sample": True}, False),
        ({"temperature": 0.2}, False),
        ({"do_sample": True, "temperature": 0.0}, False),
        ({"num_beams": 2}, False),
        ({"max_length": 20}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_only_plain_greedy_decoding_is_done_here(kwargs: dict[str, Any], plain: bool) -> None:
    assert is_plain_greedy(kwargs) is plain


def test_another_model_object_is_forwarded_after_rebinding(engine: Engine, tmp_path: Path) -> None:
    path = make_model(tmp_path / "gpt_neox", "gpt_neox", seed=1)
    other, model = AutoModelForCausalLM.from_pretrained(path).eval(), engine.lm.model
    other.generation_config = GenerationConfig(repetition_penalty=2.0)
    plan = engine.plan([row(5, 2)])
    before = engine.loglikelihoods(plan)
    try:
        engine.rebind(other)
        assert engine.loglikelihoods(plan) != before
        assert engine.loglikelihoods(plan)[0] == pytest.approx(alone(engine, row(5, 2)), rel=1e-5)
        assert not engine.greedy_is_plain
    finally:
        engine.rebind(model)
    assert engine.loglikelihoods(plan) == before
    assert engine.greedy_is_plain


# Shared beginnings.


def branching(examples: int, questions: int, seed: int) -> list[TokenRequest]:
    """Return choices of questions that all begin with the same examples."""
    draw = random.Random(seed)

    def drawn(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(4, 60), k=draw.randint(low, high)))

    shots, requests = drawn(examples, examples), []
    for _ in range(questions):
        question = shots + drawn(5, 20)
        for _ in range(4):
            choice = drawn(1, 6)
            requests.append(TokenRequest((question + choice)[:-1], choice))
    return requests


MIXED = [*branching(0, 6, 1), *branching(100, 12, 2), *branching(40, 3, 3), row(30, 30), row(1, 1)]
WINDOW = {"sliding_window": 30}
KINDS = {
    "llama": ("llama", {}, "sdpa"),
    "llama, eager": ("llama", {}, "eager"),
    "mistral": ("mistral", WINDOW, "sdpa"),
    "qwen2": ("qwen2", {}, "sdpa"),
    "qwen3": ("qwen3", {}, "sdpa"),
    "qwen3, windows": ("qwen3", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}, "sdpa"),
    "gemma2": ("gemma2", WINDOW, "eager"),
    "gemma3": ("gemma3_text", WINDOW, "sdpa"),
    "gemma3, eager": ("gemma3_text", WINDOW, "eager"),
    "gpt_neox": ("gpt_neox", {}, "sdpa"),
    "phi3": ("phi3", WINDOW, "sdpa"),
    "granite": ("granite", {}, "sdpa"),
    "olmo2": ("olmo2", {}, "sdpa"),
    "stablelm": ("stablelm", {}, "sdpa"),
    "smollm3": ("smollm3", {}, "sdpa"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sharing_changes_no_answer(kind: str, tmp_path: Path) -> None:
    model_type, config, attention = KINDS[kind]
    path = make_model(tmp_path, model_type, config=config)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    shared, plain = (Engine(model, tokenizer, 256, share_prefixes=on) for on in (True, False))
    assert shared.not_shared == ""
    if config:
        assert window_of(model) == 30
    answers = shared.loglikelihoods(shared.plan(MIXED))
    for one, other in zip(answers, plain.loglikelihoods(plain.plan(MIXED)), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    assert shared.counts["tokens"] < 0.2 * shared.counts["unshared_tokens"]
    asked = [TokenRequest(r.tokens, stops=("a",), max_new_tokens=9) for r in MIXED[::4]]
    shared.reset_counts()
    assert shared.generate(asked) == plain.generate(asked)
    if not config:
        assert shared.counts["tokens"] < 0.5 * shared.counts["unshared_tokens"]


def test_examples_of_several_lengths_stand_on_each_other(engine: Engine) -> None:
    system = branching(70, 1, 5)[0].tokens[:70]
    requests = [
        TokenRequest(system + request.tokens, request.targets)
        for seed in (6, 7)
        for request in branching(70, 4, seed)
    ]
    plan = engine.plan(requests)
    assert [step.level for step in plan.passes if step.keeps] == [0, 1, 1]
    for answer, request in zip(engine.loglikelihoods(plan), requests, strict=True):
        assert answer == pytest.approx(alone(engine, request), abs=1e-4)


def test_positions_that_are_scored_may_lie_in_what_is_shared(engine: Engine) -> None:
    text = branching(90, 1, 8)[0].tokens[:90]
    ends = [(k, *range(5, 9)) for k in range(4, 20)]
    requests = [TokenRequest((*text, *end), (*text[1:], *end, 9)) for end in ends]
    requests.append(TokenRequest(text, (*text[1:], 5)))
    plan = engine.plan(requests)
    assert any(step.keeps and len(step.places) for step in plan.passes)
    for answer, request in zip(engine.loglikelihoods(plan), requests, strict=True):
        assert answer == pytest.approx(alone(engine, request), rel=1e-5)


def test_a_model_that_follows_no_mask_of_ours_reads_every_row(tmp_path: Path) -> None:
    path = make_model(tmp_path / "moe", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    other = Engine(model, AutoTokenizer.from_pretrained(path), 256)
    assert "mixtral" in other.not_shared
    requests = branching(0, 3, 1)
    answers = other.loglikelihoods(other.plan(requests))
    assert other.counts["tokens"] == sum(map(len, {request.tokens for request in requests}))
    for answer, request in zip(answers, requests, strict=True):
        assert answer == pytest.approx(alone(other, request), rel=1e-4)


@contextlib.contextmanager
def memory_for(model: torch.nn.Module, tokens: int) -> Iterator[list[int]]:
    """Let a model run out of memory in passes of more tokens; yields the sizes of those it was given."""
    sizes: list[int] = []

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def test_passes_are_made_smaller_where_memory_runs_out(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    engine = Engine(model, tokenizer, 1024)
    requests = branching(0, 40, 1)
    asked = [TokenRequest(r.tokens, stops=("a",), max_new_tokens=9) for r in requests[::4]]
    plan = engine.plan(requests)
    expected, texts = engine.loglikelihoods(plan), engine.generate(asked)
    engine.reset_counts()
    with memory_for(model, 300) as sizes:
        found = engine.loglikelihoods(plan)
        assert max(sizes) > 300
        assert engine.counts["requests"] == len(requests)
        sizes.clear()
        assert engine.loglikelihoods(plan) == found
        assert max(sizes) <= 300  # what was found is kept for the next candidate
        assert engine.generate(asked) == texts
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    with memory_for(model, 3), pytest.raises(FitnessError, match="out of memory with"):
        engine.loglikelihoods(plan)


def test_rows_that_have_stopped_leave_the_batch(engine: Engine) -> None:
    requests = [TokenRequest(row(8, 1, k).tokens, max_new_tokens=30) for k in range(8)]
    whole = engine.generate(requests)
    engine.reset_counts()
    stop = whole[0][0]
    stopped = engine.generate([TokenRequest(r.tokens, (), (stop,), 30) for r in requests])
    assert stopped == [text.split(stop)[0] for text in whole]
    most = max(len(text) for text in stopped)
    assert engine.counts["padded_tokens"] < 8 * (8 + most)
