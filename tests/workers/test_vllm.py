"""Workers with vLLM, on the stand-in of `tests/fakes`: scores beside the transformers engine's, and swaps."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import CandidateError, EngineError, UserError
from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.engine import Engine
from evomerge.fitness.harness import Harness
from evomerge.fitness.settings import FitnessSettings
from evomerge.fitness.vllm_engine import VllmEngine
from evomerge.merging.weights import MergedWeights
from evomerge.recipe import Recipe, SourceRef, parse_recipe
from evomerge.workers.pool import Job
from evomerge.workers.resident import TransformersResident, VllmResident
from evomerge.workers.settings import WorkerSpec, vllm_refuses
from evomerge.workers.worker import Worker
from tests.checkpoints.tiny import edit_json, make_llama
from tests.contracts.pool import plan_of
from tests.e2e.world import TASKS as TASK_SETTINGS
from tests.e2e.world import make_world, write_config
from tests.fitness import tiny_tasks as tiny

FAKES = Path(__file__).resolve().parents[1] / "fakes"
TASKS = ("choice", "answer", "cloze", "text")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `a` and `b`, which have learned sums from one start, and `tasks`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    path = make_llama(folder / "start", hidden=48, config={"max_position_embeddings": 384})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    tiny.train_on_sums(model, tokenizer, 100)
    for seed, name in enumerate(("base", "a", "b")):
        if seed:
            tiny.train_on_sums(model, tokenizer, 20, seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    answer = tiny.greedy_answers(model, tokenizer)
    tiny.write_choice(folder / "tasks", "choice", 16)
    tiny.write_generation(folder / "tasks", "answer", 16, answer=answer)
    tiny.write_cloze(folder / "tasks", "cloze", 16, answer=answer)
    tiny.write_text(folder / "tasks", "text", 16)
    return folder


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in, without faults."""
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    module = importlib.import_module("vllm")
    yield module
    del sys.modules["vllm"]


def ref(folder: Path, name: str) -> SourceRef:
    return SourceRef(name=name, path=name, fingerprint=Checkpoint.open(folder / name).fingerprint)


def recipe_of(folder: Path, a: float = 0.7, b: float = 0.5, **more: Any) -> Recipe:
    sources = [
        {**ref(folder, name).model_dump(exclude_none=True), "parameters": {"weight": weight}}
        for name, weight in (("a", a), ("b", b))
    ]
    base = ref(folder, "base").model_dump(exclude_none=True)
    data = {"method": "task_arithmetic", "sources": sources, "base": base, **more}
    return parse_recipe({key: value for key, value in data.items() if value is not None}, "recipe")


def spec_of(folder: Path, engine: str = "vllm", **more: Any) -> WorkerSpec:
    fitness = {
        "tasks": TASKS,
        "include_paths": ("tasks",),
        "documents": {"search": 12, "select": 2, "test": 1},
    }
    data: dict[str, Any] = {
        "sources": tuple(ref(folder, name) for name in ("base", "a", "b")),
        "reference": "base",
        "tokenizer": "base",
        "fitness": FitnessSettings.model_validate(fitness),
        "base_dir": str(folder),
        "seed": 3,
        "engine": engine,
    }
    return WorkerSpec(**{**data, **more})


def opened(folder: Path) -> dict[str, Checkpoint]:
    return {name: Checkpoint.open(folder / name) for name in ("base", "a", "b")}


def resident_of(folder: Path, **more: Any) -> VllmResident:
    return VllmResident(spec_of(folder, **more), opened(folder))


def plain_engine(folder: Path, recipe: Recipe) -> Engine:
    resident = TransformersResident(spec_of(folder, "transformers", device="cpu"), opened(folder))
    resident.apply(recipe)
    engine = resident.engine()
    assert isinstance(engine, Engine)
    return engine


def job(recipe: Recipe) -> Job:
    return Job(0, recipe.to_json(), "search", math.inf)


# Scores


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_worker_scores_tasks_as_with_transformers(parallel: int, world: Path, vllm: ModuleType) -> None:
    plain = Worker(spec_of(world, "transformers", device="cpu"))
    worker = Worker(spec_of(world, tensor_parallel=parallel, gpu_share=1 / 2 if parallel == 1 else 1.0))
    for recipe in (recipe_of(world), recipe_of(world, 1.4, -0.8), recipe_of(world)):
        ours, theirs = worker.run(job(recipe)), plain.run(job(recipe))
        assert (ours.status, theirs.status) == ("ok", "ok"), ours.reason
        for name in ("choice", "answer", "cloze"):
            assert ours.tasks[name] == theirs.tasks[name]
        for mine, other in zip(ours.values["text"], theirs.values["text"], strict=True):
            assert mine == pytest.approx(other, rel=1e-6, abs=1e-4)
        assert ours.values["answer"] == theirs.values["answer"]
        for count in ("requests", "unshared_tokens", "generated", "truncated"):
            assert ours.cost[count] == theirs.cost[count]
    assert theirs.tasks["choice"].metric != pytest.approx(0.0)
    arguments = vllm.made[-1].arguments
    assert arguments["tensor_parallel_size"] == parallel
    assert arguments["gpu_memory_utilization"] == (0.45 if parallel == 1 else 0.9)
    assert arguments["distributed_executor_backend"] == (None if parallel == 1 else "mp")
    assert arguments["dtype"] == "float32"


def test_each_request_is_answered_as_by_the_transformers_engine(world: Path, vllm: ModuleType) -> None:
    recipe = recipe_of(world)
    resident, plain = resident_of(world), plain_engine(world, recipe)
    resident.apply(recipe)
    engine = resident.engine()
    rows = [
        engine.encode_pair(f"D: {a}+2\nA:", text) for a in range(5) for text in (" 3", " four", " 3\n\nD")
    ]
    rows += [engine.encode_pair("", "D: 1+1"), rows[0]]
    ours, theirs = engine.loglikelihoods(engine.plan(rows)), plain.loglikelihoods(plain.plan(rows))
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}
    assert engine.counts["requests"] == len(rows)
    prompts = [tuple(engine.lm.tok_encode(f"D: {a}+{b}\nA:")) for a in range(5) for b in range(3)]
    requests = [
        TokenRequest(prompt, (), stops, limit)
        for prompt in (*prompts, prompts[0])
        for stops, limit in ((("\n\n", "D:", "</s>"), 12), (("</s>",), 7), ((": 1", "A"), 20))
    ]
    assert engine.generate(requests) == plain.generate(requests)
    assert engine.count_tokens("D: 1") == 4


def test_a_prompt_as_long_as_the_context_is_scored(world: Path, vllm: ModuleType) -> None:
    resident = resident_of(world)
    engine = resident.engine()
    whole = "D: 1+1\nA: 2\n\n" * 40
    row = engine.encode_pair(whole, " three")
    assert len(row.tokens) == 384 - 2
    assert row.cut
    ((total, _),) = engine.loglikelihoods(engine.plan([row]))
    plain = plain_engine(world, parse_own(world))
    assert total == pytest.approx(plain.loglikelihoods(plain.plan([row]))[0][0], abs=1e-4)


def parse_own(folder: Path) -> Recipe:
    source = ref(folder, "base").model_dump(exclude_none=True)
    return parse_recipe({"method": "linear", "sources": [source]}, "recipe")


@pytest.mark.parametrize("shared", [True, False])
def test_a_prompt_that_begins_as_another_is_read_from_the_cache(
    shared: bool, world: Path, vllm: ModuleType
) -> None:
    fitness = spec_of(world).fitness.model_copy(update={"share_prefixes": shared})
    engine = resident_of(world, fitness=fitness).engine()
    begins = tuple(5 + k % 40 for k in range(64))
    requests = [TokenRequest((*begins, k), (), ("</s>",), 1) for k in range(4, 8)]
    engine.reset_counts()
    engine.generate(requests)
    assert engine.counts["tokens"] == (65 + 3 * 1 if shared else 4 * 65)
    assert engine.counts["unshared_tokens"] == 4 * 65


# Weights


def test_weights_come_one_by_one_in_the_order_of_the_layers(world: Path, vllm: ModuleType) -> None:
    resident = resident_of(world)
    resident.apply(recipe_of(world))
    llm = vllm.made[-1]
    assert len(llm.reloads) == 3  # others, the first again, and the recipe
    names = llm.reloads[-1].names
    assert set(names) == set(Checkpoint.open(world / "base").tensors)
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_rolled_weights_differ_in_every_matrix(world: Path) -> None:
    origin = resident_origin(world)
    plain, rolled = (dict(MergedWeights(origin, recipe_of(world), turned)) for turned in (False, True))
    assert plain.keys() == rolled.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, rolled[name].roll(-1, dims=0))
        assert not torch.equal(tensor, rolled[name])


def resident_origin(folder: Path) -> Any:
    from evomerge.merging.weights import Origin

    spec = spec_of(folder)
    return Origin(spec.sources, spec.reference, spec.base_dir)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stale", "other weights change nothing"),
        ("sticky", "the first weights do not come back"),
        ("cache", "its prefix cache cannot be emptied"),
        ("silent cache", "tokens of the old weights are still cached"),
    ],
)
def test_an_engine_that_keeps_old_weights_is_refused_at_the_start(
    fault: str, message: str, world: Path, vllm: ModuleType
) -> None:
    vllm.faults.add(fault)
    with pytest.raises(EngineError, match=rf"vllm 0\.33\.0 keeps old weights .*: .*{message}.*transformers"):
        Worker(spec_of(world))


@pytest.mark.parametrize("fault", ["stale", "silent cache"])
def test_an_engine_that_stops_taking_weights_is_found_at_the_next_candidate(
    fault: str, world: Path, vllm: ModuleType
) -> None:
    worker = Worker(spec_of(world))
    assert worker.run(job(recipe_of(world))).status == "ok"
    vllm.faults.add(fault)
    with pytest.raises(EngineError, match="keeps old weights"):
        worker.run(job(recipe_of(world, 0.1, 0.9)))
    vllm.faults.clear()
    assert worker.run(job(recipe_of(world, 0.1, 0.9))).status == "ok"


def test_the_same_weights_must_answer_alike(world: Path, vllm: ModuleType) -> None:
    resident = resident_of(world)
    resident.apply(recipe_of(world))
    resident.apply(recipe_of(world))
    engine = resident.engine()
    assert isinstance(engine, VllmEngine)
    weights = MergedWeights(resident_origin(world), recipe_of(world), rolled=True)
    with pytest.raises(EngineError, match="the same weights answer otherwise than before"):
        engine.load(recipe_of(world).digest, weights, weights)


def test_recipes_of_equal_weights_are_told_from_an_engine_that_keeps_old_ones(
    world: Path, vllm: ModuleType
) -> None:
    resident = resident_of(world)
    for recipe in (recipe_of(world, 0.0, 0.0), parse_own(world)):
        resident.apply(recipe)
    assert len(vllm.made[-1].reloads) == 2 + 1 + 3  # the last in doubt: others in between, and again


# What cannot be scored


@pytest.mark.parametrize("parallel", [1, 2])
def test_recipes_without_a_model_are_invalid_and_leave_the_engine_whole(
    parallel: int, world: Path, vllm: ModuleType
) -> None:
    worker = Worker(spec_of(world, tensor_parallel=parallel))
    before = worker.run(job(recipe_of(world)))
    zero = recipe_of(world, 1.0, -1.0, method="linear", base=None)
    overflow = recipe_of(world, 1e8, -1e8, dtype="float16")
    for recipe, reason in ((zero, "sum to"), (overflow, "not finite")):
        outcome = worker.run(job(recipe))
        assert outcome.status == "invalid", outcome.reason
        # From other processes only NaN comes back, not the reason.
        assert (reason if parallel == 1 else "not finite") in outcome.reason
        assert worker.run(job(recipe_of(world))).values == before.values


def test_requests_whose_answers_are_not_finite_are_the_candidates_fault(
    world: Path, vllm: ModuleType
) -> None:
    engine = resident_of(world).engine()
    row = engine.encode_pair("D: 1+1\nA:", " 2")
    weight = dict(vllm.made[-1]._model.named_parameters())["model.norm.weight"]
    weight.data.fill_(math.nan)
    with pytest.raises(CandidateError, match="log-likelihood of nan"):
        engine.loglikelihoods(engine.plan([row]))
    with pytest.raises(CandidateError, match="not finite"):
        engine.generate([TokenRequest(row.tokens, (), ("</s>",), 3)])
    with pytest.raises(CandidateError, match="not finite"):
        engine.check_finite(TokenRequest(row.tokens, (), ("</s>",), 3))


def test_no_request_is_no_work(world: Path, vllm: ModuleType) -> None:
    engine = resident_of(world).engine()
    assert engine.loglikelihoods(engine.plan([])) == engine.generate([]) == []


# What is refused


def test_without_the_package_one_line_says_how_to_install_it(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"workers.engine: .*pip install 'evomerge\[vllm\]'") as raised:
        Worker(spec_of(world))
    assert "\n" not in str(raised.value)


def test_an_engine_that_cannot_start_is_refused_in_one_line(world: Path, vllm: ModuleType) -> None:
    vllm.faults.add("start")
    with pytest.raises(EngineError, match="vllm cannot start: RuntimeError: Failed to infer") as raised:
        Worker(spec_of(world))
    assert "\n" not in str(raised.value)


def test_a_generation_config_with_a_penalty_is_refused(world: Path, vllm: ModuleType) -> None:
    file = world / "base" / "generation_config.json"
    before = file.read_bytes()
    try:
        edit_json(file, repetition_penalty=1.2)
        with pytest.raises(EngineError, match=r"generation_config.json asks for more \(a penalty"):
            Worker(spec_of(world))
    finally:
        file.write_bytes(before)


def test_slices_and_foreign_sources_are_refused(world: Path, vllm: ModuleType) -> None:
    resident = resident_of(world)
    slices = [{"layers": {name: [0, 1] for name in ("base", "a", "b")}}]
    with pytest.raises(EngineError, match="slices"):
        resident.apply(recipe_of(world, slices=slices))
    foreign = recipe_of(world).to_json()
    foreign["base"]["fingerprint"] = "0" * 64
    with pytest.raises(UserError, match="source base .* is not among the checkpoints"):
        resident.apply(parse_recipe(foreign, "recipe"))


@pytest.mark.parametrize("kind", ["a path", "recipes as sources"])
def test_a_recipe_with_other_layers_or_recipes_inside_is_refused(kind: str, world: Path) -> None:
    inner = recipe_of(world).to_json()
    source: dict[str, Any] = {"name": "a", "path": "a"}
    data: dict[str, Any] = {"method": "passthrough", "sources": [source]}
    if kind == "a path":
        data["path"] = {"layers": ["a 1", "a 0"]}
    else:
        source["recipe"] = inner
    assert vllm_refuses(parse_recipe(data, "recipe")) == (
        f"workers.engine: vllm keeps the layers it has; recipes with {kind} need transformers"
    )


def test_sampling_is_refused(world: Path, vllm: ModuleType) -> None:
    tiny.write_generation(
        world / "tasks",
        "sampled",
        8,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0},
    )
    fitness = FitnessSettings.model_validate(
        {"tasks": ["sampled"], "include_paths": ["tasks"], "documents": {"search": 4, "select": 2, "test": 1}}
    )
    worker = Worker(spec_of(world, fitness=fitness))
    with pytest.raises(EngineError, match=r"tasks.sampled: its generation_kwargs ask for more than greedy"):
        worker.run(job(recipe_of(world)))


# What a config says of it


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("small"))
    write_config(folder, fitness=TASK_SETTINGS, workers={"engine": "vllm", "gpus": 0.25})
    return folder


def test_a_plan_tells_workers_the_engine(small: Path) -> None:
    plan = plan_of(small, "space.dtype=bfloat16")
    spec = plan.worker_spec(1)
    assert (spec.engine, spec.tensor_parallel, spec.gpu_share, spec.dtype) == ("vllm", 1, 0.25, "bfloat16")
    spread = plan_of(small, "workers={engine: vllm, tensor_parallel: 4}").worker_spec(1)
    assert (spread.tensor_parallel, spread.gpu_share, spread.dtype) == (4, 1.0, None)
    other = plan_of(small, "workers.engine=transformers")
    assert other.worker_spec(1).engine == "transformers"
    assert other.fitness_digest != plan.fitness_digest  # numbers of one engine are not those of the other


def test_a_plan_refuses_what_the_engine_cannot_do(small: Path) -> None:
    with pytest.raises(UserError, match=r"workers.engine: vllm only scores tasks; with fitness.function"):
        plan_of(small, "fitness={function: fitness.py:score}")
    names = ("base", "one", "two")
    recipe = {
        "method": "task_arithmetic",
        "base": {"name": "base", "path": "base"},
        "sources": [{"name": name, "path": name} for name in names[1:]],
        "slices": [{"layers": {name: [0, 2] for name in names}}],
    }
    (small / "sliced.yaml").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=r"workers.engine: .* recipes with slices need transformers"):
        plan_of(small, "optimizer.start=[sliced.yaml]")
    task = small / "tasks" / "written.yaml"
    (small / "tasks" / "sampled.yaml").write_text(
        task.read_text()
        .replace("task: written", "task: sampled")
        .replace("max_gen_toks: 3", "do_sample: true")
    )
    with pytest.raises(UserError, match=r"fitness.tasks.sampled: its generation_kwargs .* use transformers"):
        plan_of(small, "fitness.tasks=[sampled]")


def test_a_harness_takes_any_engine(world: Path, vllm: ModuleType) -> None:
    worker = Worker(spec_of(world))
    assert worker.run(job(recipe_of(world))).status == "ok"
    assert isinstance(worker._harness, Harness)
    assert isinstance(worker._harness.engine, VllmEngine)
