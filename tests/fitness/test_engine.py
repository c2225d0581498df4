"""The engine alone: batches, sharing of rows, memory, counts. Values are compared in `test_harness`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evomerge.errors import CandidateError
from evomerge.fitness import engine as engine_module
from evomerge.fitness.engine import Engine, TokenRequest
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
    assert engine.counts == {"requests": 22, "tokens": 20, "padded_tokens": 20}
    for answer, request in zip(answers, requests, strict=True):
        assert answer == pytest.approx(alone(engine, request), rel=1e-5)
    assert answers[3] == answers[-1]


def test_batches_hold_at_most_the_padded_tokens_asked_for(engine: Engine) -> None:
    plan = engine.plan([row(length, 1, k) for k, length in enumerate([50, 3, 60, 10, 9, 8, 7, 30, 200])])
    sizes = [tuple(batch.ids.shape) for batch in plan.batches]
    assert sizes == [(1, 200), (2, 60), (4, 30), (2, 7)]
    assert sorted(i for batch in plan.batches for i in batch.requests) == list(range(9))


def test_batches_do_not_depend_on_the_order_of_requests(engine: Engine) -> None:
    requests = [row(5 + k % 7, 2, k) for k in range(30)]
    forth, back = engine.plan(requests), engine.plan(requests[::-1])
    for a, b in zip(forth.batches, back.batches, strict=True):
        assert torch.equal(a.ids, b.ids)
    assert engine.loglikelihoods(forth) == engine.loglikelihoods(back)[::-1]


@pytest.mark.parametrize("targets", [1, 20])
def test_the_logits_of_a_batch_stay_within_their_share_of_memory(
    targets: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One row has a long continuation, so that many positions of every row beside it need logits.
    requests = [row(20, 1, k) for k in range(5)] + [row(20, targets, 9)]
    limit = 4 * 64 * 40
    monkeypatch.setattr(engine_module, "MAX_LOGITS_BYTES", limit)
    plan = engine.plan(requests)
    for batch in plan.batches:
        assert len(batch.ids) * batch.keep * 64 * 4 <= limit
    assert len(plan.batches) == 1 if targets == 1 else len(plan.batches) > 1
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
    assert engine.counts == {"requests": 2, "tokens": 13, "padded_tokens": 2 * (9 + 5)}
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
