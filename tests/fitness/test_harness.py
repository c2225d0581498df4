"""The harness against lm-eval itself, on the same model object and the same documents."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evomerge.errors import CandidateError, FitnessError
from evomerge.fitness.harness import Evaluation, Harness
from evomerge.fitness.settings import FitnessSettings
from evomerge.fitness.tasks import TaskSet, lm_eval_quiet
from evomerge.records import DocumentSet
from tests.checkpoints.tiny import make_model
from tests.fitness import tiny_tasks as tiny

COUNTS = {"search": 12, "select": 2, "test": 1}
SEARCH = DocumentSet("search")
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
FAMILIES = ("llama", "gemma2", "qwen2", "gpt_neox", "mistral")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """Family to (model, tokenizer); the llama has learned sums, `bfloat16` is the same in that dtype."""
    made: dict[str, tuple[Any, Any]] = {}
    extra: dict[str, dict[str, Any]] = {
        "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "sliding_window": 32},
        "mistral": {"sliding_window": 16},
    }

    def model_of(family: str) -> tuple[Any, Any]:
        if family not in made:
            if family == "bfloat16":
                model, tokenizer = model_of("llama")
                path = tmp_path_factory.mktemp("half")
                model.save_pretrained(path)
                made[family] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), tokenizer
            else:
                config = {"max_position_embeddings": 96, **extra.get(family, {})}
                path = make_model(tmp_path_factory.mktemp(family), family, hidden=48, config=config)
                tokenizer = AutoTokenizer.from_pretrained(path)
                tokenizer.chat_template = CHAT
                model = AutoModelForCausalLM.from_pretrained(path)
                if family == "llama":
                    torch.manual_seed(0)
                    tiny.train_on_sums(model, tokenizer)
                made[family] = model.eval(), tokenizer
        return made[family]

    return model_of


@pytest.fixture(scope="module")
def llama(models: Callable[[str], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The llama that has learned sums."""
    return models("llama")


def task_set(folder: Path, *tasks: str | Mapping[str, Any], **settings: Any) -> TaskSet:
    fitness = FitnessSettings.model_validate(
        {"tasks": tasks, "include_paths": [str(folder)], "documents": COUNTS, **settings}
    )
    return TaskSet(fitness, 7, folder)


def stock(
    model: Any,
    tokenizer: Any,
    tasks: TaskSet,
    documents: DocumentSet = SEARCH,
    *,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    system: str | None = None,
    chat: bool = False,
    multiturn: bool = False,
) -> dict[str, Any]:
    """Return what `lm_eval.evaluate` gives, with tasks made ready as `simple_evaluate` does."""
    settings = tasks.settings
    with lm_eval_quiet(), contextlib.redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=list(settings.include_paths), include_defaults=False)
        loaded = manager.load([task.name for task in settings.tasks])
        for task in loaded["tasks"].values():
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config("num_fewshot", num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(1234)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        torch.manual_seed(1234)
        found: dict[str, Any] = lm_eval.evaluate(
            lm,
            loaded,
            samples=tasks.documents(documents),
            # One bootstrap replicate has no spread; the closed forms are computed.
            bootstrap_iters=0 if tasks.tasks.keys() & {"text", "cloze"} else 1,
            system_instruction=system,
            apply_chat_template=chat,
            fewshot_as_multiturn=multiturn,
        )
    return found


def check(tasks: TaskSet, ours: Evaluation, theirs: Mapping[str, Any], tolerance: float = 2e-5) -> None:
    """Compare metric, standard error, values per document and every single response."""
    for name, loaded in tasks.tasks.items():
        key = f"{loaded.rule.metric},{loaded.filter}"
        result = theirs["results"][name]
        samples = [s for s in theirs["samples"][name] if s["filter"] == loaded.filter]
        values = [sample[loaded.rule.metric] for sample in samples]
        exact = all(value in (0, 1) for value in values)
        assert len(ours.values[name]) == len(values) == result["sample_len"]
        if exact:
            assert list(ours.values[name]) == values
            assert ours.tasks[name].metric == result[key]
        else:
            for number, value in zip(ours.values[name], values, strict=True):
                assert number == pytest.approx(value, rel=tolerance, abs=tolerance)
            assert ours.tasks[name].metric == pytest.approx(result[key], rel=tolerance)
        error = result[f"{loaded.rule.metric}_stderr,{loaded.filter}"]
        if loaded.rule.kind == "mean" and error != "N/A":
            assert ours.tasks[name].stderr == pytest.approx(error, rel=1e-9)
        for mine, sample in zip(by_document(loaded.task), samples, strict=True):
            for given, resps in zip(mine, sample["resps"], strict=True):
                assert len(given) == len(resps)
                for a, b in zip(given, resps, strict=True):
                    same_answer(a, b, tolerance)


def by_document(task: Any) -> Iterator[list[Any]]:
    """Yield each document's responses."""
    rows: dict[int, list[Any]] = {}
    for instance in task.instances:
        rows.setdefault(instance.doc_id, []).append(instance.resps)
    yield from rows.values()


def same_answer(a: Any, b: Any, tolerance: float) -> None:
    if isinstance(a, str):
        assert a == b
    elif isinstance(a, tuple):
        assert a[0] == pytest.approx(b[0], rel=tolerance, abs=tolerance)
        assert a[1] == b[1]
    else:
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def both(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *tasks: str | Mapping[str, Any],
    theirs: Mapping[str, Any] | None = None,
    tolerance: float = 2e-5,
    **settings: Any,
) -> tuple[TaskSet, Evaluation, dict[str, Any]]:
    """Score with both and compare."""
    chosen = task_set(folder, *tasks, **settings)
    ours = Harness.of_model(chosen, model, tokenizer).evaluate(SEARCH)
    found = stock(model, tokenizer, chosen, **(theirs or {}))
    check(chosen, ours, found, tolerance)
    return chosen, ours, found


def between(evaluation: Evaluation, *names: str) -> None:
    """Check that accuracies are such that an error could show."""
    for name in names or evaluation.tasks:
        assert 0.1 < evaluation.tasks[name].metric < 0.95, name


# The families


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_type_gives_the_metrics_and_responses_of_stock_lm_eval(
    family: str, models: Callable[[str], tuple[Any, Any]], tmp_path: Path
) -> None:
    model, tokenizer = models(family)
    folder = tiny.write_tasks(tmp_path, tiny.greedy_answers(model, tokenizer))
    names = ("choice", "cloze", {"name": "text", "documents": {"search": 8, "select": 2}}, "answer")
    _, ours, _ = both(folder, model, tokenizer, *names)
    between(ours, "choice", "cloze", "answer")
    assert ours.tasks["text"].metric > 1


def test_a_bfloat16_model_gives_the_metrics_of_stock_lm_eval(
    models: Callable[[str], tuple[Any, Any]], tmp_path: Path
) -> None:
    model, tokenizer = models("bfloat16")
    folder = tiny.write_tasks(tmp_path, tiny.greedy_answers(model, tokenizer))
    # The same sums of bfloat16 numbers may differ in their last digit between batch shapes.
    _, ours, _ = both(folder, model, tokenizer, "choice", "cloze", "answer", tolerance=0.02)
    between(ours)


def test_a_tokenizer_with_merges_and_a_start_token_gives_the_tokens_of_stock(tmp_path: Path) -> None:
    tokenizer = tiny.merging_tokenizer()
    config = {"max_position_embeddings": 64}
    path = make_model(tmp_path / "model", vocab=len(tokenizer), hidden=32, tokenizer=False, config=config)
    model = AutoModelForCausalLM.from_pretrained(path)
    tiny.write_tasks(tmp_path / "tasks", tiny.greedy_answers(model, tokenizer))
    tasks: list[dict[str, Any]] = [{"name": name, "num_fewshot": 2} for name in ("cloze", "answer")]
    tasks += [{"name": "choice", "num_fewshot": 2, "metric": "acc_norm"}]
    tasks += [{"name": "text", "documents": {"search": 8, "select": 2}}]
    both(tmp_path / "tasks", model, tokenizer, *tasks, theirs={"num_fewshot": 2, "batch_size": 3})


# Log-likelihoods


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_mutual_info"])
@pytest.mark.parametrize("shots", [None, 2])
def test_each_metric_of_multiple_choice_equals_stock_at_any_batch_size(
    metric: str, shots: int | None, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    metrics = [tiny.metric(name) for name in ("acc", "acc_norm", "acc_mutual_info")]
    tiny.write_choice(tmp_path, "choice", metric_list=metrics, description="Add {{a}}.\n")
    entry = {"name": "choice", "metric": metric, "num_fewshot": shots}
    theirs = {"num_fewshot": shots, "batch_size": 5}
    _, ours, _ = both(tmp_path, *llama, entry, theirs=theirs, batch_tokens=256)
    between(ours)


def test_choices_of_one_token_share_one_forward_and_equal_stock(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice", doc_to_choice=list("0123"), doc_to_target="{{gold}}")
    chosen, ours, _ = both(tmp_path, *llama, "choice", theirs={"batch_size": 7})
    questions = {
        f"D: {doc['a']}+{doc['b']}\nA: "
        for doc in (chosen.tasks["choice"].task.eval_docs[i] for i in chosen.documents(SEARCH)["choice"])
    }
    assert ours.counts["requests"] == 48
    assert ours.counts["tokens"] <= sum(map(len, questions))
    assert ours.counts["unshared_tokens"] == 48 * len("D: 1+2\nA: ")


def test_examples_that_all_documents_share_are_read_once_and_equal_stock(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    shots = {"num_fewshot": 5, "fewshot_config": {"sampler": "first_n"}}
    tiny.write_choice(tmp_path, "choice", **shots)
    tiny.write_generation(tmp_path, "answer", answer=tiny.greedy_answers(*llama), **shots)
    _, ours, _ = both(tmp_path, *llama, "choice", "answer", theirs={"batch_size": 4})
    assert ours.counts["tokens"] < 0.25 * ours.counts["unshared_tokens"]
    between(ours, "choice")


def test_equal_choices_tie_and_the_first_one_wins_as_in_stock(llama: tuple[Any, Any], tmp_path: Path) -> None:
    tiny.write_choice(tmp_path, "choice", doc_to_choice=["five", "one", "one", "five"])
    both(tmp_path, *llama, "choice", batch_tokens=64)


@pytest.mark.parametrize("metric", ["acc", "perplexity"])
def test_each_metric_of_a_likelihood_task_equals_stock(
    metric: str, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_cloze(tmp_path, "cloze", answer=tiny.greedy_answers(*llama))
    _, ours, _ = both(tmp_path, *llama, {"name": "cloze", "metric": metric}, theirs={"batch_size": 4})
    assert ours.score == (1 if metric == "acc" else -1) * ours.tasks["cloze"].metric


@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "bits_per_byte"])
def test_texts_longer_than_the_context_are_cut_into_the_windows_of_stock(
    metric: str, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_text(tmp_path, "text", 15)
    _, ours, _ = both(tmp_path, *llama, {"name": "text", "metric": metric}, theirs={"batch_size": 3})
    assert ours.counts["requests"] > 12
    assert ours.score == -ours.tasks["text"].metric


def test_an_empty_context_and_one_that_ends_in_blanks_are_encoded_as_stock_does(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "empty", doc_to_text="", target_delimiter="")
    tiny.write_choice(tmp_path, "blanks", doc_to_text="D: {{a}}+{{b}}\nA:  ")
    both(tmp_path, *llama, "empty", "blanks")


def test_contexts_longer_than_the_model_reads_lose_their_start_as_in_stock(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice")
    tiny.write_generation(tmp_path, "answer", answer=tiny.greedy_answers(*llama))
    tasks = [{"name": name, "num_fewshot": 9} for name in ("choice", "answer")]
    _, ours, _ = both(tmp_path, *llama, *tasks, theirs={"num_fewshot": 9})
    assert ours.counts["truncated"] == 48 + 12
    assert ours.counts["unshared_tokens"] > 48 * 90


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"doc_to_choice": ["a" * 200, "b"], "doc_to_target": "0"}, "continuation of 201 tokens"),
        ({"doc_to_text": "   "}, "after a context of 0"),
    ],
)
def test_requests_at_which_stock_stops_are_errors_that_name_the_task(
    config: Mapping[str, Any], message: str, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice", **config)
    chosen = task_set(tmp_path, "choice")
    with pytest.raises(FitnessError, match=f"fitness.tasks.choice: .*{message}"):
        Harness.of_model(chosen, *llama).evaluate(SEARCH)
    with pytest.raises(AssertionError):
        stock(*llama, chosen)


def test_a_choice_without_tokens_is_an_error_where_stock_may_call_it_certain(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    # Stock stops at it too, unless another choice of the document has one token and answers in its place.
    config: dict[str, Any]
    config = {"doc_to_text": "", "target_delimiter": "", "doc_to_choice": ["<s>", "b"], "doc_to_target": "0"}
    tiny.write_choice(tmp_path, "choice", **config)
    with pytest.raises(FitnessError, match="continuation of 0 tokens"):
        Harness.of_model(task_set(tmp_path, "choice"), *llama).evaluate(SEARCH)


# Few-shot, chat


@pytest.mark.parametrize("system", [None, "Be right."])
@pytest.mark.parametrize(("chat", "multiturn"), [(False, False), (True, False), (True, True)])
def test_prompts_with_examples_system_prompt_and_chat_template_are_those_of_stock(
    multiturn: bool, system: str | None, chat: bool, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice", num_fewshot=2)
    tiny.write_generation(tmp_path, "answer", num_fewshot=1, answer=tiny.greedy_answers(*llama))
    settings: dict[str, Any]
    settings = {"system_prompt": system, "chat_template": chat, "fewshot_as_multiturn": multiturn}
    theirs = {"system": system, "chat": chat, "multiturn": multiturn, "batch_size": 4}
    chosen, _, found = both(tmp_path, *llama, "choice", "answer", theirs=theirs, **settings)
    for name, loaded in chosen.tasks.items():
        prompts = [instance.args[0] for instance in loaded.task.instances]
        assert prompts == [row[0] for s in found["samples"][name] for row in s["arguments"]]
        assert ("<u>" in prompts[0]) == chat
        assert ("Be right." in prompts[0]) == bool(system)
        assert len(set(prompts)) > 8


def test_examples_drawn_by_the_first_n_sampler_and_from_the_evaluated_split_are_those_of_stock(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "first", fewshot_config={"sampler": "first_n", "split": "train"})
    tiny.write_choice(tmp_path, "same", fewshot_split="test", training_split=None)
    tasks = [{"name": name, "num_fewshot": 2} for name in ("first", "same")]
    both(tmp_path, *llama, *tasks, theirs={"num_fewshot": 2})


def test_a_task_with_no_examples_of_its_own_keeps_none_as_in_stock(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice", num_fewshot=0)
    chosen, *_ = both(tmp_path, *llama, {"name": "choice", "num_fewshot": 3}, theirs={"num_fewshot": 3})
    assert chosen.tasks["choice"].task.config.num_fewshot == 0


# Generation


@pytest.mark.parametrize("limit", [1, 3, 70])
def test_generation_stops_where_stock_stops_at_any_limit(
    limit: int, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    kwargs = {"until": ["\n\n", "D:", "never"], "max_gen_toks": limit}
    answer = tiny.greedy_answers(*llama)
    tiny.write_generation(tmp_path, "answer", answer=answer, generation_kwargs=kwargs)
    for batch_size in (1, 5):
        both(tmp_path, *llama, "answer", theirs={"batch_size": batch_size})


@pytest.mark.parametrize("until", [[], "\n", ["</s>", "\n\n"], ["A: 4", "\n\nD"]])
def test_every_kind_of_stop_string_gives_the_text_of_stock(
    until: Any, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    kwargs = {"until": until, "max_new_tokens": 30, "temperature": 0.0}
    tiny.write_generation(tmp_path, "answer", generation_kwargs=kwargs)
    chosen, *_ = both(tmp_path, *llama, "answer")
    texts = [answer for (answers,) in by_document(chosen.tasks["answer"].task) for answer in answers]
    assert len(set(texts)) > 3


def test_end_tokens_of_the_generation_config_end_an_answer_and_show_only_if_they_are_not_special(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = llama
    newline = tokenizer("\n")["input_ids"][0]
    kwargs = {"until": ["\n\n"], "max_gen_toks": 20}
    tiny.write_generation(tmp_path, "answer", generation_kwargs=kwargs)
    with generation_config(model, eos_token_id=[2, newline]):
        chosen, *_ = both(tmp_path, model, tokenizer, "answer")
        texts = [answer for (answers,) in by_document(chosen.tasks["answer"].task) for answer in answers]
        assert any(text.endswith("\n") for text in texts)


def test_a_special_token_as_stop_string_ends_an_answer_as_in_stock_with_batch_size_one(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    # With larger batches stock goes on until all rows have met it, and then decodes what follows it.
    model, tokenizer = llama
    tiny.write_generation(tmp_path, "answer", generation_kwargs={"until": ["</s>"], "max_gen_toks": 40})
    with generation_config(model, eos_token_id=None):
        chosen, *_ = both(tmp_path, model, tokenizer, "answer")
        ended = [
            len(answer) < 5 for (answers,) in by_document(chosen.tasks["answer"].task) for answer in answers
        ]
        assert 0 < sum(ended) < len(ended)


def test_filters_are_picked_by_name_and_give_the_values_of_stock(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    filters = [
        {
            "name": "strict",
            "filter": [{"function": "regex", "regex_pattern": "^ ([0-4])"}, *tiny.TAKE_FIRST],
        },
        {
            "name": "loose",
            "filter": [
                {"function": "regex", "regex_pattern": "([0-9]|[A-Z])", "group_select": -1},
                {"function": "lowercase"},
                *tiny.TAKE_FIRST,
            ],
        },
    ]
    kwargs = {"until": ["D:"], "max_gen_toks": 12}
    tiny.write_generation(tmp_path, "answer", filter_list=filters, generation_kwargs=kwargs)
    first = both(tmp_path, *llama, "answer")[1]
    strict = both(tmp_path, *llama, {"name": "answer", "filter": "strict"})[1]
    loose = both(tmp_path, *llama, {"name": "answer", "metric": "exact_match,loose"})[1]
    assert first.values == strict.values != loose.values
    between(strict)


def test_repeated_answers_are_voted_on_as_in_stock(llama: tuple[Any, Any], tmp_path: Path) -> None:
    votes = [{"name": "vote", "filter": [{"function": "majority_vote"}, *tiny.TAKE_FIRST]}]
    tiny.write_generation(tmp_path, "answer", repeats=2, filter_list=votes)
    tiny.write_choice(tmp_path, "choice", repeats=2)
    both(tmp_path, *llama, "answer", "choice")


def test_sampled_answers_come_from_stock_and_are_the_same_each_time(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    kwargs = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    tiny.write_generation(tmp_path, "answer", repeats=3, generation_kwargs=kwargs)
    chosen = task_set(tmp_path, "answer")
    harness = Harness.of_model(chosen, *llama)
    first = harness.evaluate(SEARCH)
    texts = list(by_document(chosen.tasks["answer"].task))
    assert any(len(set(answers)) > 1 for (answers,) in texts)
    torch.manual_seed(5)
    assert harness.evaluate(SEARCH).values == first.values
    assert list(by_document(chosen.tasks["answer"].task)) == texts
    check(chosen, first, stock(*llama, chosen, batch_size=16))


@contextlib.contextmanager
def generation_config(model: Any, **changes: Any) -> Iterator[None]:
    """Give a model another generation config for a while."""
    before = model.generation_config
    model.generation_config = GenerationConfig(**{**before.to_diff_dict(), **changes})
    try:
        yield
    finally:
        model.generation_config = before


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({"repetition_penalty": 1.5}, False),
        ({"no_repeat_ngram_size": 2}, False),
        ({"max_new_tokens": 3}, False),
        ({"suppress_tokens": [7]}, False),
        ({"num_beams": 2}, False),
        ({"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": []}, True),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 3, "max_length": 20}, True),
    ],
)
def test_a_generation_config_changes_answers_as_it_does_in_stock(
    changes: Mapping[str, Any], plain: bool, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = llama
    tiny.write_generation(tmp_path, "answer", generation_kwargs={"until": ["D:"], "max_gen_toks": 10})
    chosen = task_set(tmp_path, "answer")
    with generation_config(model, **changes):
        harness = Harness.of_model(chosen, model, tokenizer)
        assert harness.engine.greedy_is_plain == plain
        ours = harness.evaluate(SEARCH)
        check(chosen, ours, stock(model, tokenizer, chosen))


@pytest.mark.parametrize("limit", [0, 96])
def test_asking_for_no_tokens_or_more_than_the_model_reads_is_an_error(
    limit: int, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_generation(tmp_path, "answer", generation_kwargs={"until": [], "max_gen_toks": limit})
    with pytest.raises(FitnessError, match="expected 1 to 95"):
        Harness.of_model(task_set(tmp_path, "answer"), *llama).evaluate(SEARCH)


def test_an_empty_prompt_for_an_answer_is_an_error(llama: tuple[Any, Any], tmp_path: Path) -> None:
    tiny.write_generation(tmp_path, "answer", doc_to_text="")
    with pytest.raises(FitnessError, match="answer: an empty prompt"):
        Harness.of_model(task_set(tmp_path, "answer"), *llama).evaluate(SEARCH)


# Groups


def group(folder: Path, by_size: bool = True) -> None:
    tiny.write_choice(folder, "small", 20, seed=1)
    tiny.write_choice(folder, "large", 60, seed=2)
    means = [{"metric": "acc", "weight_by_size": by_size}]
    tiny.write_group(folder, "pair", ["large", "small"], aggregate_metric_list=means)


@pytest.mark.parametrize("by_size", [True, False])
def test_the_score_of_a_group_is_the_mean_that_stock_reports(
    by_size: bool, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    group(tmp_path, by_size)
    counts = {"search": 40, "select": 8, "test": 4}
    _, ours, found = both(tmp_path, *llama, "pair", documents=counts)
    assert {name: len(values) for name, values in ours.values.items()} == {"large": 30, "small": 10}
    assert ours.score == pytest.approx(found["groups"]["pair"]["acc,none"], rel=1e-12)
    assert ours.tasks["large"].metric != ours.tasks["small"].metric


def test_tasks_and_groups_count_by_their_weights(llama: tuple[Any, Any], tmp_path: Path) -> None:
    group(tmp_path)
    tiny.write_choice(tmp_path, "other")
    entries: list[str | Mapping[str, Any]]
    entries = [{"name": "pair", "weight": 3, "documents": {"search": 40, "select": 4}}, "other"]
    _, ours, found = both(tmp_path, *llama, *entries)
    mean, other = found["groups"]["pair"]["acc,none"], found["results"]["other"]["acc,none"]
    assert ours.score == pytest.approx((3 * mean + other) / 4, rel=1e-12)
    errors = {name: ours.tasks[name].stderr or 0 for name in ours.tasks}
    shares = {"large": 3 / 4 * 60 / 80, "small": 3 / 4 * 20 / 80, "other": 1 / 4}
    combined = math.sqrt(sum((shares[name] * errors[name]) ** 2 for name in errors))
    assert ours.stderr == pytest.approx(combined, rel=1e-12)


def test_a_tag_stands_for_its_tasks(llama: tuple[Any, Any], tmp_path: Path) -> None:
    tiny.write_choice(tmp_path, "one", 20, seed=1, tag="both")
    tiny.write_choice(tmp_path, "two", 20, seed=2, tag=["both"])
    counts = {"search": 20, "select": 4}
    _, ours, _ = both(tmp_path, *llama, "both", documents=counts)
    assert {name: len(values) for name, values in ours.values.items()} == {"one": 10, "two": 10}
    assert ours.score == pytest.approx((ours.tasks["one"].metric + ours.tasks["two"].metric) / 2)


# What must not change a value


def test_values_do_not_depend_on_batch_size_or_on_what_else_is_scored(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_tasks(tmp_path, tiny.greedy_answers(*llama))
    names = ("choice", "answer", "cloze")
    counts = {"search": 6, "select": 2}
    whole = Harness.of_model(task_set(tmp_path, *names, "text", documents=counts), *llama).evaluate(SEARCH)
    narrow = task_set(tmp_path, *reversed(names), batch_tokens=64, documents=counts)
    ours = Harness.of_model(narrow, *llama).evaluate(SEARCH)
    for name in names:
        assert ours.values[name] == whole.values[name]
        assert ours.tasks[name] == whole.tasks[name]
    assert ours.counts["requests"] < whole.counts["requests"]


def test_a_drawn_document_has_the_value_it_has_in_the_whole_split(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice", num_fewshot=1)
    chosen = task_set(tmp_path, "choice", resample=5)
    harness = Harness.of_model(chosen, *llama)
    whole = dict(
        zip(chosen.documents(SEARCH)["choice"], harness.evaluate(SEARCH).values["choice"], strict=True)
    )
    for draw in range(8):  # more draws than are kept, and back to the first
        documents = DocumentSet("search", draw % 6)
        drawn = chosen.documents(documents)["choice"]
        assert harness.evaluate(documents).values["choice"] == tuple(whole[i] for i in drawn)


def test_other_weights_get_their_own_scores_without_new_requests_or_tokens(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = llama
    tiny.write_tasks(tmp_path, tiny.greedy_answers(model, tokenizer))
    chosen = task_set(tmp_path, "choice", "cloze")
    harness = Harness.of_model(chosen, model, tokenizer)
    harness.prepare("search")
    instances = [id(i) for loaded in chosen.tasks.values() for i in loaded.task.instances]
    first = harness.evaluate(SEARCH)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    harness.engine.lm.tokenizer = None  # nothing can be tokenised from here on
    try:
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        second = harness.evaluate(SEARCH)
        check(chosen, second, stock(model, tokenizer, chosen))
    finally:
        model.load_state_dict(weights)
    assert second.values != first.values
    assert harness.evaluate(SEARCH).values == first.values
    assert instances == [id(i) for loaded in chosen.tasks.values() for i in loaded.task.instances]


# Broken candidates


@pytest.mark.parametrize("name", ["choice", "cloze", "text", "answer"])
def test_weights_that_are_not_finite_make_the_candidate_invalid(
    name: str, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = llama
    tiny.write_tasks(tmp_path)
    harness = Harness.of_model(
        task_set(tmp_path, name, documents={"search": 6, "select": 2}), model, tokenizer
    )
    weight = model.model.norm.weight
    kept = weight.data.clone()
    try:
        weight.data[0] = float("nan")
        with pytest.raises(CandidateError, match=r"nan|not finite"):
            harness.evaluate(SEARCH)
    finally:
        weight.data.copy_(kept)


def test_weights_that_are_not_finite_make_the_candidate_invalid_in_sampling_too(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = llama
    tiny.write_generation(
        tmp_path, "answer", generation_kwargs={"until": [], "do_sample": True, "max_gen_toks": 4}
    )
    harness = Harness.of_model(task_set(tmp_path, "answer"), model, tokenizer)
    kept = model.model.norm.weight.data.clone()
    try:
        model.model.norm.weight.data[0] = float("nan")
        with pytest.raises(CandidateError, match="not finite"):
            harness.evaluate(SEARCH)
    finally:
        model.model.norm.weight.data.copy_(kept)
