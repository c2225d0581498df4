"""The lm-eval tasks of a run: loaded, checked, split into disjoint documents. No torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import FitnessError, nearest
from evomerge.fitness.scoring import KINDS, TaskRule
from evomerge.fitness.settings import DocumentCounts, FitnessSettings, TaskSettings
from evomerge.records import SPLITS, DocumentSet
from evomerge.seeding import stream
from evomerge.strict import canonical_json

FEWSHOT_SEED = 1234
"""lm-eval's default, so that stock runs see the same examples."""


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """One lm-eval task, ready to build requests.

    Attributes:
        name: lm-eval's name.
        task: lm-eval's object.
        rule: How its document values enter the score.
        filter: The filter whose answers are scored.
        ids: Split to the sorted positions of its documents in the task's evaluation documents.
    """

    name: str
    task: Any
    rule: TaskRule
    filter: str
    ids: Mapping[str, tuple[int, ...]]


class TaskSet:
    """The tasks of a run and their splits; equal settings, seed and data give equal splits.

    Args:
        settings: The fitness section.
        seed: The run's seed.
        base_dir: What include paths are relative to.

    Raises:
        FitnessError: A task, metric or filter is unknown, documents are missing, or code is not trusted.
    """

    def __init__(self, settings: FitnessSettings, seed: int, base_dir: Path) -> None:
        self.settings = settings
        self._seed = seed
        self.code = trusted_code(settings, base_dir)
        self.tasks: dict[str, LoadedTask] = {}
        with lm_eval_quiet():
            for wanted, name, task, size, share in _load(settings, base_dir):
                if name in self.tasks:
                    raise FitnessError(f'fitness.tasks: "{name}" is reached twice; list it once')
                self.tasks[name] = self._prepared(wanted, name, task, size, share)

    def _prepared(
        self, wanted: TaskSettings, name: str, task: Any, size: int, share: tuple[int, int]
    ) -> LoadedTask:
        where = f"fitness.tasks.{name}"
        if getattr(task, "UNSAFE_CODE", False) and not self.settings.allow_unsafe_code:
            raise FitnessError(
                f"{where}: executes code that the model writes; set fitness.allow_unsafe_code to allow it"
            )
        if getattr(task, "MULTIMODAL", False):
            raise FitnessError(f"{where}: needs images or sound; only text tasks can be scored")
        if wanted.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=wanted.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        rule = _rule(wanted, where, task, size, share)
        filters = [ensemble.name for ensemble in getattr(task, "_filters", [])] or ["none"]
        chosen = wanted.filter or filters[0]
        if chosen not in filters:
            raise FitnessError(f'{where}.filter: unknown filter "{chosen}"{nearest(chosen, filters)}')
        counts = wanted.documents or self.settings.documents
        return LoadedTask(name, task, rule, chosen, _split(where, name, size, counts, share, self._seed))

    @property
    def rules(self) -> dict[str, TaskRule]:
        """Task name to its rule."""
        return {name: loaded.rule for name, loaded in self.tasks.items()}

    def documents(self, documents: DocumentSet) -> dict[str, list[int]]:
        """Return task name to the positions of the set's documents, sorted."""
        chosen = {}
        for name, loaded in self.tasks.items():
            ids = list(loaded.ids[documents.split])
            if documents.draw is not None:
                random = stream(self._seed, "draw", name, documents.draw)
                count = min(self.settings.resample or len(ids), len(ids))
                ids = sorted(int(i) for i in random.choice(ids, size=count, replace=False))
            chosen[name] = ids
        return chosen

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides a score besides the model: prompts, documents, metrics."""
        digest = hashlib.sha256()
        with lm_eval_quiet():
            for name, loaded in self.tasks.items():
                config = {
                    k: v
                    for k, v in loaded.task.dump_config().items()
                    if k not in ("dataset_kwargs", "metadata")
                }
                head = [name, str(loaded.task.VERSION), loaded.filter, loaded.rule.to_json(), config]
                digest.update(canonical_json(_plain(head)).encode())
                documents = loaded.task.eval_docs
                for split in SPLITS:
                    for i in loaded.ids[split]:
                        digest.update(canonical_json(_plain([split, i, documents[i]])).encode())
        shared = self.settings.model_dump(
            include={"chat_template", "system_prompt", "fewshot_as_multiturn", "resample"}
        )
        digest.update(canonical_json([shared, self.code]).encode())
        return digest.hexdigest()


def _load(
    settings: FitnessSettings, base_dir: Path
) -> Iterator[tuple[TaskSettings, str, Any, int, tuple[int, int]]]:
    """Yield (setting, leaf name, task, documents, (documents before it in its group, of the group))."""
    from lm_eval.tasks import TaskManager

    cache_templates()
    paths = [str((base_dir / path).resolve()) for path in settings.include_paths]
    own = TaskManager(include_path=paths, include_defaults=False) if paths else None
    known = set(own.all_tasks) if own else set()
    # Reading the thousands of built-in task files takes seconds; it is left out where own tasks suffice.
    if not all(task.name in known for task in settings.tasks):
        own = TaskManager(include_path=paths or None)
        known = set(own.all_tasks)
    if own is None:
        raise FitnessError("fitness.tasks: no task is given")
    for wanted in settings.tasks:
        where = f"fitness.tasks.{wanted.name}"
        if wanted.name not in known:
            raise FitnessError(f'{where}: unknown task "{wanted.name}"{nearest(wanted.name, known)}')
        try:
            loaded = own.load([wanted.name])
            leaves = [(name, task, len(task.eval_docs)) for name, task in sorted(loaded["tasks"].items())]
        except Exception as problem:  # lm-eval and datasets raise whatever their readers raise
            text = (str(problem).splitlines() or [""])[0]
            raise FitnessError(f"{where}: cannot be loaded: {type(problem).__name__}: {text}") from problem
        total, before = sum(size for *_, size in leaves), 0
        for name, task, size in leaves:
            if size == 0:
                raise FitnessError(f"{where}: task {name} has no documents")
            yield wanted, name, task, size, (before, total)
            before += size


def _rule(wanted: TaskSettings, where: str, task: Any, size: int, share: tuple[int, int]) -> TaskRule:
    aggregations = task.aggregation()
    metric = wanted.metric or next(iter(aggregations), None)
    if metric is None or metric not in aggregations:
        raise FitnessError(f'{where}.metric: unknown metric "{metric}"{nearest(str(metric), aggregations)}')
    kind = getattr(aggregations[metric], "__name__", "?")
    kind = {"nanmean": "mean"}.get(kind, kind)
    if kind not in KINDS:
        raise FitnessError(
            f'{where}.metric: "{metric}" is aggregated by {kind}, which has no value per document and so no '
            f"honest interval; choose a metric aggregated by one of {', '.join(KINDS)}"
        )
    return TaskRule(
        kind=kind,
        weight=wanted.weight * size / share[1],
        higher_is_better=bool(task.higher_is_better().get(metric, True)),
        metric=metric,
        group=wanted.name,
    )


def _split(
    where: str, name: str, size: int, counts: DocumentCounts, share: tuple[int, int], seed: int
) -> dict[str, tuple[int, ...]]:
    """Cut a task's documents into disjoint splits; a group's counts are shared out by size."""
    before, total = share

    def part(count: int) -> int:
        return count * (before + size) // total - count * before // total

    order = stream(seed, "split", name).permutation(size)
    search, select = part(counts.search), part(counts.select)
    test = size - search - select if counts.test == "rest" else part(counts.test)
    if min(search, select, test) < 1 or search + select + test > size:
        wanted = f"{search} search + {select} select + {counts.test if counts.test == 'rest' else test} test"
        raise FitnessError(
            f"{where}.documents: {wanted} documents asked for, but the task has {size} and each split needs "
            "at least one; lower the counts"
        )
    cuts = {"search": (0, search), "select": (search, search + select)}
    cuts["test"] = (search + select, search + select + test)
    return {split: tuple(sorted(int(i) for i in order[a:b])) for split, (a, b) in cuts.items()}


def trusted_code(settings: FitnessSettings, base_dir: Path) -> dict[str, str]:
    """Return a hash for every file of the trusted directories; refuse code in directories not trusted.

    Loading a task file with `!function` runs Python from its directory.
    """
    hashes = {}
    for path in settings.include_paths:
        folder = (base_dir / path).resolve()
        if not folder.is_dir():
            raise FitnessError(f"fitness.include_paths: {path}: no such directory ({folder})")
        trusted = path in settings.trust_code
        for file in sorted(folder.rglob("*")):
            if file.suffix not in (".yaml", ".yml", ".py") or not file.is_file():
                continue
            data = file.read_bytes()
            codes = file.suffix != ".py" and (
                b"!function" in data or b"\nclass:" in data or data[:6] == b"class:"
            )
            if codes and not trusted:
                raise FitnessError(
                    f"{file}: runs Python code on loading; read it, then list {path!r} in fitness.trust_code"
                )
            if trusted:
                hashes[f"{path}/{file.relative_to(folder)}"] = hashlib.sha256(data).hexdigest()
    return hashes


def cache_templates() -> None:
    """Let lm-eval compile each Jinja template once; it compiles them again for every document."""
    from lm_eval import utils

    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = functools.lru_cache(maxsize=4096)(utils.env.from_string)


@contextlib.contextmanager
def lm_eval_quiet() -> Iterator[None]:
    """Silence the progress bars and notices of lm-eval and datasets for a block of code."""
    import datasets
    from lm_eval.api import task as task_module

    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bar = task_module.tqdm
    task_module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        task_module.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _plain(data: Any) -> Any:
    """Return JSON data; what JSON lacks (functions, dates, NaN) becomes its text without addresses."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return [_plain(value) for value in data]
    if data is None or isinstance(data, str | bool | int):
        return data
    if isinstance(data, float):
        return data if data == data and abs(data) != float("inf") else repr(data)
    if callable(data):
        return getattr(data, "__qualname__", type(data).__name__)
    return str(data)
