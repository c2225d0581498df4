"""Loading tasks: what is refused and how it is said, splits, draws, fingerprints. No model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import FitnessError
from evomerge.fitness.settings import FitnessSettings
from evomerge.fitness.tasks import TaskSet
from evomerge.records import SPLITS, DocumentSet
from tests.fitness import tiny_tasks as tiny

COUNTS = {"search": 10, "select": 6, "test": 4}


def settings(folder: Path, *tasks: str | Mapping[str, Any], **more: Any) -> FitnessSettings:
    data = {"tasks": tasks, "include_paths": [str(folder)], "documents": COUNTS, **more}
    return FitnessSettings.model_validate(data)


def task_set(folder: Path, *tasks: str | Mapping[str, Any], seed: int = 1, **more: Any) -> TaskSet:
    return TaskSet(settings(folder, *tasks, **more), seed, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the four tiny tasks."""
    return tiny.write_tasks(tmp_path / "tasks")


def refusal(folder: Path, *tasks: str | Mapping[str, Any], **more: Any) -> str:
    """Return the message of the error, which has to be one line."""
    with pytest.raises(FitnessError) as caught:
        task_set(folder, *tasks, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Splits


def test_the_splits_are_disjoint_and_have_the_counts_asked_for(folder: Path) -> None:
    ids = task_set(folder, "choice").tasks["choice"].ids
    assert {split: len(ids[split]) for split in SPLITS} == COUNTS
    assert len({i for split in SPLITS for i in ids[split]}) == 20
    assert all(list(ids[split]) == sorted(ids[split]) for split in SPLITS)
    assert ids["search"] != tuple(range(10))


def test_a_test_split_of_the_rest_takes_every_document_left(folder: Path) -> None:
    ids = task_set(folder, "choice", documents={"search": 10, "select": 6}).tasks["choice"].ids
    assert sorted(i for split in SPLITS for i in ids[split]) == list(range(24))


def test_another_seed_gives_another_split_and_the_same_seed_the_same(folder: Path) -> None:
    first, again = task_set(folder, "choice"), task_set(folder, "choice")
    assert first.tasks["choice"].ids == again.tasks["choice"].ids
    assert first.tasks["choice"].ids != task_set(folder, "choice", seed=2).tasks["choice"].ids


def test_the_split_of_a_task_does_not_depend_on_the_other_tasks(folder: Path) -> None:
    alone = task_set(folder, "answer", documents={"search": 4, "select": 4})
    among = task_set(folder, "choice", "answer", "cloze", documents={"search": 4, "select": 4})
    assert alone.tasks["answer"].ids == among.tasks["answer"].ids


def test_counts_of_one_task_replace_those_of_the_section(folder: Path) -> None:
    entry = {"name": "choice", "documents": {"search": 3, "select": 2, "test": 1}}
    tasks = task_set(folder, entry, "cloze", documents={"search": 5, "select": 5}).tasks
    assert [len(tasks["choice"].ids[split]) for split in SPLITS] == [3, 2, 1]
    assert [len(tasks["cloze"].ids[split]) for split in SPLITS] == [5, 5, 6]


def group(folder: Path, sizes: Mapping[str, int]) -> None:
    for seed, (name, size) in enumerate(sizes.items()):
        tiny.write_choice(folder, name, size, seed=seed)
    tiny.write_group(folder, "all", list(sizes))


def test_the_counts_of_a_group_are_shared_out_by_size_and_add_up(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 33, "c": 17}
    group(tmp_path, sizes)
    chosen = task_set(tmp_path, "all", documents={"search": 25, "select": 13, "test": 11})
    for split, count in {"search": 25, "select": 13, "test": 11}.items():
        parts = {name: len(loaded.ids[split]) for name, loaded in chosen.tasks.items()}
        assert sum(parts.values()) == count
        assert all(abs(parts[name] - count * sizes[name] / 60) <= 1 for name in sizes)
    assert sum(rule.weight for rule in chosen.rules.values()) == pytest.approx(1)
    assert chosen.rules["b"].weight == pytest.approx(33 / 60)


# Draws


def test_a_draw_is_a_subset_of_the_search_split_with_the_count_asked_for(folder: Path) -> None:
    chosen = task_set(folder, "choice", "cloze", resample=4, documents={"search": 9, "select": 4})
    for number in range(5):
        drawn = chosen.documents(DocumentSet("search", number))
        for name, ids in drawn.items():
            assert len(ids) == len(set(ids)) == 4
            assert ids == sorted(ids)
            assert set(ids) <= set(chosen.tasks[name].ids["search"])


def test_draws_differ_from_each_other_and_are_the_same_when_drawn_again(folder: Path) -> None:
    chosen, again = (task_set(folder, "choice", resample=4) for _ in range(2))
    draws = [chosen.documents(DocumentSet("search", number))["choice"] for number in range(8)]
    assert len({tuple(ids) for ids in draws}) > 5
    assert again.documents(DocumentSet("search", 3))["choice"] == draws[3]
    other = task_set(folder, "choice", resample=4, seed=2)
    assert other.documents(DocumentSet("search", 3))["choice"] != draws[3]


def test_a_draw_takes_every_document_without_resample(folder: Path) -> None:
    chosen = task_set(folder, "choice")
    assert chosen.documents(DocumentSet("search", 3)) == chosen.documents(DocumentSet("search"))


def test_a_draw_of_a_group_is_shared_out_by_size(tmp_path: Path) -> None:
    group(tmp_path, {"a": 10, "b": 30, "c": 20})
    chosen = task_set(tmp_path, "all", resample=12, documents={"search": 24, "select": 6})
    drawn = chosen.documents(DocumentSet("search", 0))
    assert {name: len(ids) for name, ids in drawn.items()} == {"a": 2, "b": 6, "c": 4}


# Refusals


def test_an_unknown_task_names_the_nearest_one(folder: Path) -> None:
    message = refusal(folder, "choise")
    assert message == 'fitness.tasks.choise: unknown task "choise"; did you mean "choice"?'


def test_a_task_file_that_is_not_yaml_is_named_where_its_task_is_missing(folder: Path) -> None:
    (folder / "broken.yaml").write_text("task: broken\noutput_type: [multiple_choice\n")
    message = refusal(folder, "broken")
    assert 'unknown task "broken"' in message
    assert f"{folder / 'broken.yaml'} cannot be read: while parsing" in message
    assert task_set(folder, "choice").tasks.keys() == {"choice"}


def test_an_unknown_metric_names_the_nearest_one(folder: Path) -> None:
    message = refusal(folder, {"name": "choice", "metric": "acc_nrm"})
    assert message == 'fitness.tasks.choice.metric: unknown metric "acc_nrm"; did you mean "acc_norm"?'


def test_an_unknown_filter_names_those_there_are(folder: Path) -> None:
    message = refusal(folder, {"name": "answer", "metric": "exact_match,strict"})
    assert message == 'fitness.tasks.answer.filter: unknown filter "strict"; known: none'


def test_more_documents_than_there_are_is_an_error_with_the_numbers(folder: Path) -> None:
    message = refusal(folder, "choice", documents={"search": 20, "select": 10, "test": 5})
    assert "20 search + 10 select + 5 test documents asked for, but the task has 24 documents" in message
    assert message.endswith("lower the counts")
    message = refusal(folder, "choice", documents={"search": 20, "select": 4})
    assert "20 search + 4 select + rest test" in message
    assert message.endswith("lower the counts")


def test_too_few_documents_for_every_task_of_a_group_is_an_error(tmp_path: Path) -> None:
    group(tmp_path, {"a": 10, "b": 90})
    message = refusal(tmp_path, "all", documents={"search": 5, "select": 20})
    assert "fitness.tasks.a.documents: its share of the counts is 0 search + 2 select" in message
    assert message.endswith("raise the counts")


def test_a_task_without_documents_is_an_error(folder: Path) -> None:
    (folder / "choice_test.json").write_text("")
    assert "fitness.tasks.choice" in refusal(folder, "choice")


def test_a_missing_data_file_is_an_error_in_one_line(folder: Path) -> None:
    (folder / "choice_test.json").unlink()
    message = refusal(folder, "choice")
    assert message.startswith("fitness.tasks.choice: cannot be loaded: FileNotFoundError")


def test_a_dataset_of_the_hub_is_an_error_in_one_line_when_offline(folder: Path) -> None:
    tiny.write_choice(folder, "remote", dataset_path="nobody/nothing", dataset_kwargs=None)
    message = refusal(folder, "remote")
    assert message.startswith("fitness.tasks.remote: cannot be loaded: ")


def test_a_task_reached_by_itself_and_by_its_group_is_an_error(tmp_path: Path) -> None:
    group(tmp_path, {"a": 20, "b": 20})
    assert '"a" is reached twice' in refusal(tmp_path, "all", "a")


@pytest.mark.parametrize(
    ("metric", "aggregation"), [("f1", "f1"), ("bleu", "bleu"), ("mcc", "matthews_corrcoef")]
)
def test_a_metric_without_a_value_per_document_is_refused(
    metric: str, aggregation: str, folder: Path
) -> None:
    tiny.write_choice(folder, "other", metric_list=[tiny.metric(metric, aggregation), tiny.metric("acc")])
    message = refusal(folder, "other")
    called = {"f1": "f1_score"}.get(aggregation, aggregation)
    assert f'"{metric}" is aggregated by {called}, which has no value per document' in message
    chosen = task_set(folder, {"name": "other", "metric": "acc"})
    assert chosen.rules["other"].metric == "acc"


def test_an_aggregation_of_the_tasks_own_that_is_called_mean_is_refused(folder: Path) -> None:
    (folder / "code.py").write_text("def mean(values):\n    return 7\n")
    tiny.write_choice(folder, "own")
    text = (folder / "own.yaml").read_text().replace("aggregation: mean", "aggregation: !function code.mean")
    (folder / "own.yaml").write_text(text)
    assert "has no value per document" in refusal(folder, "own", trust_code=[str(folder)])


def test_tasks_that_run_what_a_model_writes_must_be_allowed(folder: Path) -> None:
    tiny.write_generation(folder, "code", unsafe_code=True)
    assert "set fitness.allow_unsafe_code" in refusal(folder, "code")
    assert task_set(folder, "code", allow_unsafe_code=True, documents={"search": 2, "select": 2}).tasks


def test_tasks_with_images_are_refused(folder: Path) -> None:
    tiny.write_generation(folder, "image", doc_to_image=["a"])
    assert "needs images or sound" in refusal(folder, "image")


def test_an_include_path_that_is_missing_is_an_error(folder: Path) -> None:
    assert "no such directory" in refusal(folder / "nowhere", "choice")


# Trust


def coded(folder: Path, name: str = "coded") -> Path:
    """Write a task with Python code, which leaves a mark when it runs."""
    (folder / "code.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\ndef text(doc):\n    return f\"D: {{doc['a']}}\"\n"
    )
    tiny.write_choice(folder, name, functions={"doc_to_text": "code.text"})
    return folder / "ran"


def test_code_in_a_directory_that_is_not_trusted_does_not_run(folder: Path) -> None:
    mark = coded(folder)
    message = refusal(folder, "coded")
    assert message.startswith(f"{folder / 'coded.yaml'}: runs Python code on loading; read it, then list")
    assert not mark.exists()


def test_code_in_a_trusted_directory_runs_and_its_hash_is_recorded(folder: Path) -> None:
    mark = coded(folder)
    chosen = task_set(folder, "coded", trust_code=[str(folder)])
    assert mark.exists()
    assert {name.removeprefix(f"{folder}/") for name in chosen.code} >= {"coded.yaml", "code.py"}
    assert all(len(value) == 64 for value in chosen.code.values())
    before = chosen.fingerprint
    (folder / "code.py").write_text((folder / "code.py").read_text() + "# another line\n")
    assert task_set(folder, "coded", trust_code=[str(folder)]).fingerprint != before


@pytest.mark.parametrize("suffix", ["", ".txt", ".yaml"])
def test_code_that_is_included_from_elsewhere_does_not_run(suffix: str, folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mark = coded(elsewhere)
    template = elsewhere / f"template{suffix}"
    (elsewhere / "coded.yaml").rename(template)
    (folder / "innocent.yaml").write_text(f"include: {template}\ntask: innocent\n")
    message = refusal(folder, "innocent")
    assert "runs Python code on loading (code.text)" in message
    assert not mark.exists()


def test_a_template_cannot_run_code(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    payload = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    tiny.write_choice(folder, "evil", doc_to_text=payload)
    assert "SecurityError" in refusal(folder, "evil")
    assert not mark.exists()


# Direction


@pytest.mark.parametrize(("name", "higher"), [("choice", True), ("text", False)])
def test_the_direction_of_a_metric_is_the_tasks_own(name: str, higher: bool, folder: Path) -> None:
    chosen = task_set(folder, name, documents={"search": 4, "select": 4})
    assert chosen.rules[name].higher_is_better is higher


# Fingerprints


def test_equal_settings_and_data_have_equal_fingerprints(folder: Path) -> None:
    assert task_set(folder, "choice", "text", documents={"search": 4, "select": 4}).fingerprint == (
        task_set(folder, "choice", "text", documents={"search": 4, "select": 4}).fingerprint
    )


def test_the_fingerprint_stays_when_the_folder_moves(tmp_path: Path) -> None:
    found = []
    for place in ("here", "far/away"):
        folder = tmp_path / place
        tiny.write_tasks(folder)
        tiny.write_choice(folder, "shots", num_fewshot=1)
        counts = {"search": 4, "select": 4}
        found.append(task_set(folder, "choice", "answer", "shots", documents=counts))
    assert found[0].fingerprint == found[1].fingerprint


def test_the_fingerprint_stays_when_a_folder_with_trusted_code_moves(tmp_path: Path) -> None:
    data, found = tmp_path / "data", []
    tiny.write_choice(data, "choice")
    for place in ("here", "far/away"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("def text(doc):\n    return f\"D: {doc['a']}\"\n")
        text = (data / "choice.yaml").read_text()
        text = text.replace(f"doc_to_text: {_yaml(tiny.SUM)}", "doc_to_text: !function code.text")
        assert "!function" in text
        (folder / "choice.yaml").write_text(text)
        found.append(task_set(folder, "choice", trust_code=[str(folder)]))
    assert found[0].fingerprint == found[1].fingerprint


def _yaml(value: str) -> str:
    return yaml.safe_dump({"k": value}).partition(": ")[2].strip()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"num_fewshot": 2},
        {"metric": "acc_norm"},
        {"weight": 2.0},
        {"system_prompt": "Be right."},
        {"chat_template": True},
        {"resample": 5},
        {"documents": {"search": 9, "select": 6, "test": 4}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_changes_with(change: dict[str, Any], folder: Path) -> None:
    keys = {"num_fewshot", "metric", "weight"}
    entry = {"name": "choice", "num_fewshot": 1, **{k: v for k, v in change.items() if k in keys}}
    more = {k: v for k, v in change.items() if k not in keys}
    before = task_set(folder, {"name": "choice", "num_fewshot": 1}).fingerprint
    assert task_set(folder, entry, **more).fingerprint != before


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_fingerprint_changes_with_one_document_prompt_or_example(folder: Path) -> None:
    entry = {"name": "choice", "num_fewshot": 1}
    more: dict[str, Any] = {"documents": {"search": 10, "select": 10}}
    found = {task_set(folder, entry, **more).fingerprint}
    rewrite(folder / "choice_test.json", '"gold": 3', '"gold": 2')
    found.add(task_set(folder, entry, **more).fingerprint)
    rewrite(folder / "choice.yaml", "A:'", "B:'")
    found.add(task_set(folder, entry, **more).fingerprint)
    rewrite(folder / "choice_train.json", '"gold": 1', '"gold": 0')
    found.add(task_set(folder, entry, **more).fingerprint)
    assert len(found) == 4


def test_splits_draws_and_fingerprint_are_the_same_in_another_process(folder: Path) -> None:
    tasks: list[str | Mapping[str, Any]] = [{"name": "choice", "num_fewshot": 1}, "answer", "text"]
    chosen = task_set(folder, *tasks, documents={"search": 4, "select": 4}, resample=2)
    data = settings(folder, *tasks, documents={"search": 4, "select": 4}, resample=2).model_dump_json()
    code = (
        "import json, sys; from pathlib import Path\n"
        "from evomerge.fitness.settings import FitnessSettings\n"
        "from evomerge.fitness.tasks import TaskSet\n"
        "from evomerge.records import DocumentSet\n"
        "s = TaskSet(FitnessSettings.model_validate_json(sys.argv[1]), 1, Path('.'))\n"
        "ids = {n: t.ids for n, t in s.tasks.items()}\n"
        "print(json.dumps([s.fingerprint, ids, s.documents(DocumentSet('search', 3))]))"
    )
    here = {name: {k: list(v) for k, v in loaded.ids.items()} for name, loaded in chosen.tasks.items()}
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, data],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
        )
        fingerprint, ids, drawn = json.loads(done.stdout.splitlines()[-1])
        assert fingerprint == chosen.fingerprint
        assert ids == here
        assert drawn == chosen.documents(DocumentSet("search", 3))
