"""The lm-eval tasks of a run: loaded, checked, split into disjoint documents. No torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import FitnessError, Gathering, nearest
from evomerge.fitness.measures import MEASURES, check_measure
from evomerge.fitness.racing import rung_sizes
from evomerge.fitness.scoring import KINDS, TaskRule
from evomerge.fitness.settings import DocumentCounts, FitnessSettings, TaskSettings
from evomerge.fitness.trust import only_trusted_functions, trusted_code, unreadable
from evomerge.records import SPLITS, DocumentSet
from evomerge.seeding import stream
from evomerge.strict import canonical_json

OWN_TASKS = "; it is none of lm-eval's own, and others are looked for in fitness.include_paths"

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
        measures: Rules of the measures that enter the score beside it, by their name in the scores.
        ids: Split to the sorted positions of its documents in the task's evaluation documents.
    """

    name: str
    task: Any
    rule: TaskRule
    filter: str
    measures: Mapping[str, TaskRule]
    ids: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One lm-eval task as the config reaches it.

    Attributes:
        wanted: The config's entry: this task, or a group or tag that it belongs to.
        name: lm-eval's name.
        task: lm-eval's object.
        size: Its documents.
        before: Documents of the entry's tasks before it.
        total: Documents of all the entry's tasks.
        siblings: Number of the entry's tasks.
        group: lm-eval's object of the entry if it is a group.
    """

    wanted: TaskSettings
    name: str
    task: Any
    size: int
    before: int
    total: int
    siblings: int
    group: Any

    def part(self, count: int) -> int:
        """Return how many of the entry's `count` documents fall to this task."""
        return _part(count, self.before, self.size, self.total)


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
        if settings.allow_unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the second consent that such metrics ask for
        self.tasks: dict[str, LoadedTask] = {}
        with lm_eval_quiet(), Gathering() as gathering:
            for leaf in _load(settings, base_dir, gathering):
                with gathering.kept():
                    self._add(leaf)

    def _add(self, leaf: _Leaf) -> None:
        if leaf.name in self.tasks:
            raise FitnessError(f'fitness.tasks: "{leaf.name}" is reached twice; list it once')
        self.tasks[leaf.name] = loaded = self._prepared(leaf)
        if self.settings.racing and loaded.rule.kind != "mean":
            raise FitnessError(
                f"fitness.racing: {leaf.name}'s {loaded.rule.metric} is no mean over documents; "
                "choose another metric or leave out racing"
            )

    def _prepared(self, leaf: _Leaf) -> LoadedTask:
        where, task, wanted = f"fitness.tasks.{leaf.name}", leaf.task, leaf.wanted
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
        rule = _rule(where, leaf)
        filters = [ensemble.name for ensemble in getattr(task, "_filters", [])] or ["none"]
        chosen = wanted.filter or filters[0]
        if chosen not in filters:
            raise FitnessError(f'{where}.filter: unknown filter "{chosen}"{nearest(chosen, filters)}')
        counts = wanted.documents or self.settings.documents
        measures = {}
        for name, weight in wanted.also.items():
            check_measure(f"{where}.also", name, task)
            share = rule.weight / wanted.weight * weight
            measures[f"{leaf.name}:{name}"] = TaskRule("mean", share, MEASURES[name], name, rule.group)
        return LoadedTask(leaf.name, task, rule, chosen, measures, _split(where, leaf, counts, self._seed))

    @property
    def rules(self) -> dict[str, TaskRule]:
        """Task name to its rule; `task:measure` to that of a measure beside it."""
        found: dict[str, TaskRule] = {}
        for name, loaded in self.tasks.items():
            found |= {name: loaded.rule, **loaded.measures}
        return found

    def task_of(self, name: str) -> str:
        """Return the task that a key of `rules` belongs to."""
        return name if name in self.tasks else name.rpartition(":")[0]

    def documents(self, documents: DocumentSet) -> dict[str, list[int]]:
        """Return task name to the positions of the set's documents, sorted."""
        chosen = {}
        for name, loaded in self.tasks.items():
            ids = list(loaded.ids[documents.split])
            if documents.draw is not None:
                random = stream(self._seed, "draw", name, documents.draw)
                count = self._drawn(name, documents.split)
                ids = sorted(int(i) for i in random.choice(ids, size=count, replace=False))
            chosen[name] = ids
        return chosen

    def rungs(self, documents: DocumentSet, shares: Sequence[float]) -> list[dict[str, list[int]]]:
        """Return for each rung of a race task name to the places of its documents in the document set.

        Args:
            documents: The set.
            shares: Ascending shares of each task's documents; the last rung has the rest.
        """
        found: list[dict[str, list[int]]] = [{} for _ in (*shares, 1.0)]
        for name, ids in self.documents(documents).items():
            order = stream(self._seed, "rungs", name).permutation(len(ids))
            before = 0
            for rung, size in zip(found, rung_sizes(shares, len(ids)), strict=True):
                rung[name] = sorted(int(i) for i in order[before:size])
                before = size
        return found

    def _drawn(self, name: str, split: str) -> int:
        """Return how many documents of a task are drawn; a group's are shared out by size."""
        group = self.tasks[name].rule.group
        sizes = {n: len(t.ids[split]) for n, t in self.tasks.items() if t.rule.group == group}
        total, before = sum(sizes.values()), 0
        wanted = min(self.settings.resample or total, total)
        for other, size in sizes.items():
            if other == name:
                return max(1, _part(wanted, before, size, total))
            before += size
        raise KeyError(name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides a score besides the model: prompts, documents, metrics."""
        digest = hashlib.sha256()
        with lm_eval_quiet():
            for name, loaded in self.tasks.items():
                task = loaded.task
                config = {k: v for k, v in task.dump_config().items() if k not in _WHERE_DATA_LIES}
                head: list[Any] = [name, str(task.VERSION), loaded.filter, loaded.rule.to_json(), config]
                head += [[key, rule.to_json()] for key, rule in loaded.measures.items()]
                digest.update(canonical_json(_plain(head)).encode())
                documents = task.eval_docs
                for split in SPLITS:
                    for i in loaded.ids[split]:
                        digest.update(canonical_json(_plain([split, i, documents[i]])).encode())
                if task.get_config("num_fewshot"):
                    for document in task.fewshot_docs() or ():
                        digest.update(canonical_json(_plain(["example", document])).encode())
        shared = self.settings.model_dump(
            include={"chat_template", "system_prompt", "fewshot_as_multiturn", "resample"}
        )
        # The hashes of trusted files without their folders: a task directory may be moved.
        code = sorted(self.code.values())
        digest.update(canonical_json([shared, code]).encode())
        return digest.hexdigest()


_WHERE_DATA_LIES = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")
"""Keys of a task's config that say where its documents come from; the documents themselves are hashed."""


def _load(settings: FitnessSettings, base_dir: Path, gathering: Gathering) -> Iterator[_Leaf]:
    """Yield the tasks that the config reaches; what is wrong with one keeps no other back."""
    adapt_templates()
    folders = [(base_dir / path).resolve() for path in settings.include_paths]
    trusted = [(base_dir / path).resolve() for path in settings.trust_code]
    paths = [str(folder) for folder in folders]
    own = _manager(paths, defaults=False) if paths else None
    known = set(own.all_tasks) if own else set()
    # Reading the thousands of built-in task files takes seconds; it is left out where own tasks suffice.
    for task in settings.tasks:
        remark = unreadable(folders) if task.name not in known else ""
        if remark:
            raise FitnessError(f'fitness.tasks.{task.name}: unknown task "{task.name}"{remark}')
    if not all(task.name in known for task in settings.tasks):
        own = _manager(paths, defaults=True)
        known = set(own.all_tasks)
    if own is None:
        raise FitnessError("fitness.tasks: no task is given")
    for wanted in settings.tasks:
        with gathering.kept():
            if wanted.name not in known:
                near = nearest(wanted.name, known) or OWN_TASKS
                raise FitnessError(f'fitness.tasks.{wanted.name}: unknown task "{wanted.name}"{near}')
            yield from _leaves(wanted, own, trusted)


def _leaves(wanted: TaskSettings, register: Any, trusted: Sequence[Path]) -> Iterator[_Leaf]:
    """Yield the tasks of one entry of the config."""
    where = f"fitness.tasks.{wanted.name}"
    try:
        with only_trusted_functions(trusted):
            loaded = register.load([wanted.name])
        leaves = [(name, task, len(task.eval_docs)) for name, task in sorted(loaded["tasks"].items())]
    except FitnessError:
        raise
    except Exception as problem:  # lm-eval and datasets raise whatever their readers raise
        text = (str(problem).splitlines() or [""])[0]
        raise FitnessError(f"{where}: cannot be loaded: {type(problem).__name__}: {text}") from problem
    total, before = sum(size for *_, size in leaves), 0
    group = loaded.get("groups", {}).get(wanted.name)
    for name, task, size in leaves:
        if size == 0:
            raise FitnessError(f"{where}: task {name} has no documents")
        yield _Leaf(wanted, name, task, size, before, total, len(leaves), group)
        before += size


def _manager(paths: Sequence[str], *, defaults: bool) -> Any:
    """Return lm-eval's register of the tasks in some folders, and of its own if wanted."""
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=list(paths) or None, include_defaults=defaults)
    except Exception as problem:  # whatever its reader raises
        text = (str(problem).splitlines() or [""])[0]
        raise FitnessError(
            f"fitness.include_paths: task files cannot be read: {type(problem).__name__}: {text}"
        ) from problem


def _rule(where: str, leaf: _Leaf) -> TaskRule:
    from lm_eval.api.registry import get_aggregation

    wanted, task = leaf.wanted, leaf.task
    aggregations = task.aggregation()
    metric = wanted.metric or next(iter(aggregations), None)
    measured = metric in MEASURES and metric not in aggregations
    if measured:
        check_measure(f"{where}.metric", str(metric), task)
        aggregations = {metric: get_aggregation("mean")}
    if metric is None or metric not in aggregations:
        raise FitnessError(
            f'{where}.metric: unknown metric "{metric}"{nearest(str(metric), [*aggregations, *MEASURES])}'
        )
    # By identity: a function of the task's own may be called `mean` and do something else.
    kinds = {get_aggregation(kind): kind for kind in KINDS} | {get_aggregation("nanmean"): "mean"}
    kind = kinds.get(aggregations[metric])
    if kind is None:
        name = getattr(aggregations[metric], "__name__", "a function of its own")
        raise FitnessError(
            f'{where}.metric: "{metric}" is aggregated by {name}, which has no value per document and so no '
            f"honest interval; choose a metric aggregated by one of {', '.join(KINDS)}"
        )
    means = getattr(leaf.group, "aggregate_metric_list", None) or ()
    alike = any(mean.metric == metric and not mean.weight_by_size for mean in means)
    return TaskRule(
        kind=kind,
        weight=wanted.weight * (1 / leaf.siblings if alike else leaf.size / leaf.total),
        higher_is_better=MEASURES[metric] if measured else bool(task.higher_is_better().get(metric, True)),
        metric=metric,
        group=wanted.name,
    )


def _split(where: str, leaf: _Leaf, counts: DocumentCounts, seed: int) -> dict[str, tuple[int, ...]]:
    """Cut a task's documents into disjoint splits; a group's counts are shared out by size."""
    size, grouped = leaf.size, leaf.total > leaf.size
    order = stream(seed, "split", leaf.name).permutation(size)
    search, select = leaf.part(counts.search), leaf.part(counts.select)
    test = size - search - select if counts.test == "rest" else leaf.part(counts.test)
    if min(search, select, test) < 1 or search + select + test > size:
        wanted = f"{search} search + {select} select + {counts.test if counts.test == 'rest' else test} test"
        share = f"its share of the counts is {wanted}" if grouped else f"{wanted} documents asked for"
        few = grouped and search + select < size
        raise FitnessError(
            f"{where}.documents: {share}, but the task has {size} documents and each split needs at least "
            f"one; {'raise' if few else 'lower'} the counts"
        )
    cuts = {"search": (0, search), "select": (search, search + select)}
    cuts["test"] = (search + select, search + select + test)
    return {split: tuple(sorted(int(i) for i in order[a:b])) for split, (a, b) in cuts.items()}


def _part(count: int, before: int, size: int, total: int) -> int:
    """Return how many of `count` fall to the task that has `size` of `total` documents behind `before`."""
    return count * (before + size) // total - count * before // total


def adapt_templates() -> None:
    """Let lm-eval compile each Jinja template once (it does so for every document), and run it in a sandbox.

    Templates of task files are not covered by trust, and plain Jinja runs any Python.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True
        )
        sandbox.filters.update(utils.env.filters)
        sandbox.from_string = functools.lru_cache(maxsize=4096)(sandbox.from_string)  # type: ignore[assignment]
        utils.env = sandbox


@contextlib.contextmanager
def lm_eval_quiet() -> Iterator[None]:
    """Silence the progress bars and notices of lm-eval and datasets for a block of code."""
    import datasets
    from lm_eval.api import task as task_module

    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    bar = task_module.tqdm
    task_module.tqdm = functools.partial(bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    if isinstance(data, set | frozenset):
        return sorted(_plain(value) for value in data)
    if data is None or isinstance(data, str | bool | int):
        return data
    if isinstance(data, float):
        return data if data == data and abs(data) != float("inf") else repr(data)
    if callable(data):
        return getattr(data, "__qualname__", type(data).__name__)
    return str(data)
