"""A worker: the main promise against the stock command line, and what it does with bad candidates."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import UserError
from evomerge.fitness.settings import FitnessSettings
from evomerge.fitness.tasks import TaskSet
from evomerge.merging.stream import open_sources, write_model
from evomerge.recipe import Recipe, SourceRef, parse_recipe
from evomerge.records import DocumentSet, Outcome
from evomerge.workers.inline import InlinePool
from evomerge.workers.pool import Job
from evomerge.workers.settings import WorkerSpec
from evomerge.workers.worker import Worker
from tests.checkpoints.tiny import make_llama
from tests.fitness import tiny_tasks as tiny

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
COUNTS = {"search": 24, "select": 5, "test": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `a` and `b`, which have learned sums from one start, and `tasks`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    path = make_llama(folder / "base", hidden=48, config={"max_position_embeddings": 128})
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    tiny.train_on_sums(model, tokenizer, 140)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, do_sample=True, temperature=0.7, repetition_penalty=1.2
    )
    for seed, name in enumerate(("base", "a", "b")):
        if seed:
            tiny.train_on_sums(model, tokenizer, 40, seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "base" / "generation_config.json").rename(folder / "penalty.json")
    answer = tiny.greedy_answers(model, tokenizer)
    tiny.write_choice(folder / "tasks", "choice", 32)
    tiny.write_generation(folder / "tasks", "answer", 32, answer=answer)
    tiny.write_cloze(folder / "tasks", "cloze", 32, answer=answer)
    tiny.write_text(folder / "tasks", "text", 32)
    return folder


def ref(folder: Path, name: str) -> SourceRef:
    return SourceRef(name=name, path=name, fingerprint=Checkpoint.open(folder / name).fingerprint)


def recipe_of(
    folder: Path, a: float = 0.7, b: float = 0.5, method: str = "task_arithmetic", **more: Any
) -> Recipe:
    sources = [
        {**ref(folder, name).model_dump(exclude_none=True), "parameters": {"weight": weight}}
        for name, weight in (("a", a), ("b", b))
    ]
    base = {} if method == "linear" else {"base": ref(folder, "base").model_dump(exclude_none=True)}
    return parse_recipe({"method": method, "sources": sources, **base, **more}, "recipe")


def spec_of(folder: Path, **fitness: Any) -> WorkerSpec:
    data = {"tasks": ("choice", "answer"), "include_paths": ("tasks",), "documents": COUNTS, **fitness}
    if "function" in fitness:
        data = fitness
    return WorkerSpec(
        sources=tuple(ref(folder, name) for name in ("base", "a", "b")),
        reference="base",
        tokenizer="base",
        fitness=FitnessSettings.model_validate(data),
        base_dir=str(folder),
        seed=3,
        device="cpu",
    )


def job(recipe: Recipe, documents: str = "search", candidate: int = 0) -> Job:
    return Job(candidate, recipe.to_json(), documents, math.inf)


def command_line(model: Path, folder: Path, samples: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Return the results that the stock command writes."""
    out = model.parent / f"{model.name}-results"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"pretrained={model},dtype=auto", "--include_path", str(folder / "tasks")),
            *(
                "--tasks",
                ",".join(samples),
                "--samples",
                json.dumps(samples),
                "--output_path",
                str(out),
                *more,
            ),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "DISABLE_MULTIPROC": "1", "HF_HUB_OFFLINE": "1"},
        cwd=model.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text())["results"]
    return found


# The main promise


@pytest.mark.parametrize("penalty", [False, True], ids=["plain", "examples, chat and penalty"])
def test_the_stock_command_prints_the_scores_of_the_worker_for_the_exported_model(
    penalty: bool, world: Path, tmp_path: Path
) -> None:
    written = world / "base" / "generation_config.json"
    if penalty:
        written.write_bytes((world / "penalty.json").read_bytes())
        shots = [{"name": name, "num_fewshot": 2} for name in ("choice", "answer")]
        fitness = {
            "tasks": shots,
            "chat_template": True,
            "fewshot_as_multiturn": True,
            "system_prompt": "Add.",
        }
        options = ["--num_fewshot", "2", "--apply_chat_template", "--system_instruction", "Add."]
    else:
        fitness, options = {"tasks": ("choice", "answer", "cloze", "text")}, []
    try:
        spec, recipe = spec_of(world, **fitness), recipe_of(world)
        outcome = Worker(spec).run(job(recipe, "search"))
        model = write_model(recipe, open_sources(recipe, world), tmp_path / "merged")
    finally:
        written.unlink(missing_ok=True)
    assert outcome.status == "ok", outcome.reason
    samples = TaskSet(spec.fitness, spec.seed, world).documents(DocumentSet("search"))
    found = command_line(model, world, samples, *options)
    for name, metric in (("choice", "acc"), ("answer", "exact_match"), ("cloze", "acc")):
        if name in samples:
            assert outcome.tasks[name].metric == found[name][f"{metric},none"]
            error = found[name][f"{metric}_stderr,none"]
            assert outcome.tasks[name].stderr == pytest.approx(error, rel=1e-12)
            assert found[name]["sample_len"] == 24
            if name != "answer" or not penalty:  # under the penalty few answers are those of the task
                assert 0 < outcome.tasks[name].metric < 1
    if "text" in samples:
        assert outcome.tasks["text"].metric == pytest.approx(found["text"]["word_perplexity,none"], rel=1e-5)


# Outcomes


@pytest.fixture(scope="module")
def worker(world: Path) -> Worker:
    return Worker(spec_of(world))


def test_an_outcome_has_scores_values_and_what_it_cost(world: Path, worker: Worker) -> None:
    outcome = worker.run(job(recipe_of(world), "select", candidate=7))
    assert (outcome.candidate, outcome.documents, outcome.status) == (7, "select", "ok")
    assert {name: len(values) for name, values in outcome.values.items()} == {"choice": 5, "answer": 5}
    assert outcome.score == pytest.approx(sum(task.metric for task in outcome.tasks.values()) / 2)
    seconds = {"merge", "evaluate", "total"}
    counts = {"requests", "tokens", "padded_tokens", "unshared_tokens", "generated", "truncated"}
    counts |= {"documents", "skipped_documents"}
    assert seconds | counts == outcome.cost.keys()
    parts = outcome.cost["merge"] + outcome.cost["evaluate"]
    assert 0 < outcome.cost["merge"] < parts == pytest.approx(outcome.cost["total"])
    assert outcome.cost["requests"] == 5 * 4 + 5
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_each_candidate_has_its_own_scores_in_any_order(world: Path, worker: Worker) -> None:
    recipes = [recipe_of(world, a, b) for a, b in ((0.7, 0.5), (1.5, -1.0), (0.0, 3.0))]
    forth = [worker.run(job(recipe)) for recipe in recipes]
    back = [worker.run(job(recipe)) for recipe in reversed(recipes)][::-1]
    assert [outcome.values for outcome in forth] == [outcome.values for outcome in back]
    assert len({outcome.score for outcome in forth}) == 3


def test_another_worker_gives_the_same_outcome(world: Path, worker: Worker) -> None:
    recipe = recipe_of(world)
    first, second = worker.run(job(recipe)), Worker(spec_of(world, batch_tokens=128)).run(job(recipe))
    assert (first.score, first.values, first.tasks) == (second.score, second.values, second.tasks)


def test_a_second_candidate_tokenises_nothing(world: Path) -> None:
    worker = Worker(spec_of(world, tasks=("choice", "cloze")))
    first = worker.run(job(recipe_of(world)))
    assert worker._harness is not None
    worker._harness.engine.lm.tokenizer = None
    second = worker.run(job(recipe_of(world, 0.2, 0.1)))
    assert (second.status, second.reason) == ("ok", "")
    assert second.cost["requests"] == first.cost["requests"]


def test_draws_of_the_search_documents_are_scored(world: Path) -> None:
    worker = Worker(spec_of(world, resample=6))
    outcomes = [worker.run(job(recipe_of(world), f"search@{draw}")) for draw in (0, 1, 0)]
    assert [len(outcome.values["choice"]) for outcome in outcomes] == [6, 6, 6]
    assert outcomes[0].values == outcomes[2].values
    assert outcomes[0].documents == "search@0"


def test_a_recipe_without_a_model_is_invalid_and_the_next_candidate_is_scored(
    world: Path, worker: Worker
) -> None:
    outcome = worker.run(job(recipe_of(world, 1.0, -1.0, "linear")))
    assert outcome.status == "invalid"
    assert "sum to" in outcome.reason
    assert outcome.score is None
    assert worker.run(job(recipe_of(world))).status == "ok"


def test_weights_that_overflow_are_invalid_and_the_next_candidate_is_scored(
    world: Path, worker: Worker
) -> None:
    before = worker.run(job(recipe_of(world)))
    outcome = worker.run(job(recipe_of(world, 1e8, -1e8, dtype="float16")))
    assert outcome.status == "invalid"
    assert "nan" in outcome.reason or "finite" in outcome.reason
    assert worker.run(job(recipe_of(world))).values == before.values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": "search@many"}, "ValueError: invalid literal"),
        ({"documents": "nowhere"}, "KeyError: 'nowhere'"),
        ({"recipe": {"method": "magic"}}, "recipe: "),
        ({"recipe": 3}, "TypeError: 'int' object is not iterable"),
    ],
)
def test_a_job_that_makes_no_sense_fails_in_one_line(
    change: Mapping[str, Any], message: str, world: Path, worker: Worker
) -> None:
    data = {"candidate": 1, "recipe": recipe_of(world).to_json(), "documents": "search", "deadline": 1.0}
    outcome = worker.run(Job(**{**data, **change}))
    assert outcome.status == "failed"
    assert message in outcome.reason
    assert "\n" not in outcome.reason
    assert outcome.cost["total"] >= 0


def test_a_source_with_nan_is_refused_at_the_start(world: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b", "tasks"):
        (tmp_path / name).symlink_to(world / name)
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    for file in (world / "b").iterdir():
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight"):
        Worker(spec_of(tmp_path))


# Callables


def function_spec(world: Path, tmp_path: Path, body: str) -> WorkerSpec:
    file = tmp_path / "mine.py"
    file.write_text(
        f"import math, sys\nimport numpy as np\ndef score(model, tokenizer, request):\n    {body}\n"
    )
    return spec_of(world, function=f"{file}:score")


def test_a_callable_gets_the_merged_model_in_eval_mode(world: Path, tmp_path: Path) -> None:
    body = (
        "on = model.training; model.train()\n"
        "    total = float(model.model.norm.weight.double().sum())\n"
        "    return {'training': [float(on)], 'total': total, 'split': len(request.split)}"
    )
    worker = Worker(function_spec(world, tmp_path, body))
    for a in (0.0, 1.0):
        outcome = worker.run(job(recipe_of(world, a, 0.0), "select"))
        model = load_file(world / ("a" if a else "base") / "model.safetensors")
        assert outcome.values["training"] == (0.0,)
        assert outcome.values["split"] == (6.0,)
        assert outcome.values["total"][0] == pytest.approx(model["model.norm.weight"].double().sum().item())
        assert outcome.cost.keys() == {"merge", "evaluate", "total"}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("return np.float32(0.25)", "ok", ""),
        ("return float('nan')", "invalid", "score is nan"),
        ("return {'a': [1.0, math.inf]}", "invalid", "a is inf"),
        ("return [1e308] * 3", "invalid", "score is inf"),
        ("return None", "failed", "fitness.function: score: expected numbers, got NoneType None"),
        ("return 'good'", "failed", "fitness.function: score: expected numbers, got str 'good'"),
        ("return True", "failed", "fitness.function: score: expected numbers, got bool True"),
        ("return [[1]]", "failed", "fitness.function: score: expected numbers, got list [1]"),
        ("return {}", "failed", "fitness.function: returned an empty mapping"),
        ("raise ValueError('first\\nsecond')", "failed", "ValueError: first (mine.py:4)"),
        ("assert False", "failed", "AssertionError:  (mine.py:4)"),
        ("sys.exit(3)", "failed", "SystemExit: 3 (mine.py:4)"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_whatever_a_callable_does_becomes_an_outcome(
    body: str, status: str, reason: str, world: Path, tmp_path: Path
) -> None:
    outcome = Worker(function_spec(world, tmp_path, body)).run(job(recipe_of(world)))
    assert (outcome.status, outcome.reason) == (status, reason)


# In the driver itself


def test_the_inline_pool_answers_as_a_worker_one_job_at_a_time(world: Path, worker: Worker) -> None:
    jobs = [job(recipe_of(world, 0.1 * k), candidate=k) for k in range(2)]
    pool = InlinePool(spec_of(world))
    assert (pool.free(), pool.wait(0.0), pool.state().workers) == (0, [], 0)
    with pool:
        assert pool.free() == 1
        pool.submit(jobs[0])
        assert (pool.free(), pool.state().running) == (0, 1)
        found = pool.wait(0.0)
        pool.submit(jobs[1])
        found += pool.wait(0.0)
        assert pool.wait(0.0) == []
    pool.close()
    assert pool.state().workers == 0
    assert [outcome.values for outcome in found] == [worker.run(each).values for each in jobs]
