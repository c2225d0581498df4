"""A run config made into checked parts: sources, layout, space, tasks, baselines. No torch.

`validate`, `run`, `resume` and `evaluate` all begin here, so a config that one accepts all accept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.checkpoints.flows import flow_of
from evomerge.checkpoints.layout import Layout, check_compatible, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.whole import why_not_made
from evomerge.config import RunConfig
from evomerge.errors import ConfigError, Gathering, RecipeError
from evomerge.fitness.callables import check_callable
from evomerge.fitness.greedy import is_plain_greedy, no_sampling
from evomerge.fitness.measures import MEASURES
from evomerge.fitness.scoring import TaskRule
from evomerge.fitness.sharing import why_not_type
from evomerge.fitness.tasks import TaskSet
from evomerge.mergekit import read_any_recipe
from evomerge.merging.nested import MergedCheckpoint, open_source
from evomerge.optimizers import Optimizer, create
from evomerge.population import founders, read_population
from evomerge.recipe import Recipe, SourceRef, parse_recipe
from evomerge.records import SPLITS, DocumentSet, Genome
from evomerge.spaces.dataflow import whole_path
from evomerge.spaces.making import Depths, make_space
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.segments import SegmentSpace
from evomerge.spaces.settings import ParameterSettings, SegmentsSettings
from evomerge.strict import canonical_json
from evomerge.workers.settings import NO_FUNCTION, WorkerSpec, vllm_refuses

LIBRARIES = ("torch", "transformers", "lm-eval", "datasets", "cmaes", "optuna", "numpy", "ray")

SPAN = {"low", "high", "log", "choices"}
"""What the facts say of a parameter's bounds."""


@dataclass(frozen=True, slots=True)
class Seeded:
    """A recipe that is scored before the optimizer proposes any."""

    origin: str
    recipe: Recipe
    genome: Genome | None = None


class Plan:
    """What a config says, checked against the files it names.

    Args:
        config: The config.
        base_dir: What its paths are relative to.

    Attributes:
        checkpoints: Source name to checkpoint, the base first.
        refs: Source name to what recipes say of it, with its fingerprint.
        paths: Whether layer paths are searched.
        layout: The layout that all sources share.
        space: The space.
        seeded: What is scored before the optimizer proposes anything: baselines and recipes to start from.
        tasks: The tasks; None for a callable.
        warnings: What is odd but allowed.

    Raises:
        UserError: Something in the config does not fit what is there.
    """

    def __init__(self, config: RunConfig, base_dir: Path) -> None:
        self.config = config
        self.base_dir = base_dir
        self.checkpoints = self._opened()
        self.paths = config.space.kind in ("data_flow", "layer_edits", "joint")
        sliced = self.paths and config.space.kind != "joint"
        self.warnings: list[str] = list(check_compatible(self.checkpoints, sliced=sliced))
        self.layout: Layout = layout_of(next(iter(self.checkpoints.values())))
        self.refs: dict[str, SourceRef] = {ref.name: self._read(ref) for ref in config.sources.all}
        self.space = make_space(
            config.space,
            self._base(),
            [self.refs[ref.name] for ref in config.sources.models],
            list(self.layout.places.values()),
            self.layout.num_layers,
            self._depths(),
            self.checkpoints,
        )
        self._check_space()
        self.seeded = self._seeded()
        self.tasks = TaskSet(config.fitness, config.seed, base_dir) if config.fitness.tasks else None
        if not self.optimizer().generational and config.fitness.racing:
            raise ConfigError(
                f"fitness.racing: needs an optimizer with generations, such as cma_es; "
                f"{config.optimizer.name} has none"
            )
        if config.workers.engine == "vllm":
            self._check_vllm()
        elif self.tasks and config.fitness.share_prefixes:
            model = next(iter(self.checkpoints.values())).config
            problem = why_not_type(model.get("text_config", model)["model_type"])
            if problem:
                self.warnings.append(f"fitness.share_prefixes: {problem}; every request is forwarded whole")

    def _opened(self) -> dict[str, Checkpoint]:
        """Open the sources; what is wrong with them, the callable and the output is told at once."""
        opened = {}
        with Gathering() as gathering:
            for ref in self.config.sources.all:
                with gathering.kept():
                    opened[ref.name] = open_source(ref, self.base_dir)
            with gathering.kept():
                if self.config.fitness.function is not None:
                    check_callable(self.config.fitness.function, self.base_dir)
            with gathering.kept():
                self._check_output()
        return opened

    def _check_output(self) -> None:
        """Refuse a folder in which the results could not be written when the search has ended."""
        folder = self.config.output.folder
        problem = why_not_made(Path(folder)) if folder is not None else ""
        if problem:
            raise ConfigError(f"output.folder: {folder}: {problem}; name another")

    def _read(self, ref: SourceRef) -> SourceRef:
        """Return what recipes say of a source, by its content."""
        found = self.checkpoints[ref.name]
        known: dict[str, Any] = {"fingerprint": found.fingerprint}
        if isinstance(found, MergedCheckpoint):
            known["recipe"] = found.recipe
        return ref.model_copy(update=known)

    def _depths(self) -> Depths:
        layouts = {name: layout_of(found) for name, found in self.checkpoints.items()}
        first = self.checkpoints[self.config.sources.models[0].name]
        inside = [
            math.prod(first.tensors[name].shape)
            for name, place in self.layout.places.items()
            if place.layer == 0 and name in first.tensors
        ]
        layers = sum(inside)
        other = first.num_parameters - layers * layouts[self.config.sources.models[0].name].num_layers
        return Depths({name: layout.num_layers for name, layout in layouts.items()}, layers, other)

    def _check_vllm(self) -> None:
        """Refuse what the engine vllm cannot do."""
        if self.tasks is None:
            raise ConfigError(NO_FUNCTION)
        recipes = [self.space.decode(self.space.centre()), *(seeded.recipe for seeded in self.seeded)]
        for problem in filter(None, map(vllm_refuses, recipes)):
            raise ConfigError(problem)
        for name, loaded in self.tasks.tasks.items():
            task = loaded.task
            if task.OUTPUT_TYPE == "generate_until" and not is_plain_greedy(task.config.generation_kwargs):
                raise ConfigError(no_sampling(name))

    def _base(self) -> SourceRef | None:
        base = self.config.sources.base
        return self.refs[base.name] if base else None

    def _check_space(self) -> None:
        """Decode the centre once, so that whatever the method refuses is refused before a run."""
        method = self.space.method
        if method.needs_base and self.config.sources.base is None:
            raise ConfigError(f"sources.base: method {method.name} works on deltas from a base; name one")
        tokenizer = self.config.space.tokenizer
        if tokenizer is not None and tokenizer not in self.refs:
            raise ConfigError(f'space.tokenizer: "{tokenizer}" is none of {", ".join(self.refs)}')
        if self.paths:
            self._check_flow()
        try:
            self.space.decode(self.space.centre())
        except RecipeError as problem:
            raise ConfigError(f"space: {problem}") from None

    def _check_flow(self) -> None:
        """Raise ConfigError if models of this family cannot have the paths of the space."""
        section = self.config.space
        try:
            flow = flow_of(next(iter(self.checkpoints.values())).config)
        except RecipeError as problem:
            raise ConfigError(f"space.kind: {section.kind}: {problem}") from None
        if (
            not isinstance(section, ParameterSettings | SegmentsSettings)
            and flow.unscalable
            and section.scaled
        ):
            raise ConfigError(
                f"space: scales cannot be folded into models of this family: {flow.unscalable}; write "
                "scales: none for data_flow, scale_range: 0 for layer_edits"
            )

    def optimizer(self, start: Genome | None = None) -> Optimizer:
        """Return the config's optimizer at its beginning."""
        wanted = self.config.optimizer
        if start is None and self.paths:
            start = self.space.centre()
        more = self._for_niches() if wanted.name == "niches" else {}
        return create(wanted.name, self.space.dimensions, self.config.seed, wanted.settings, start, **more)

    def _for_niches(self) -> dict[str, Any]:
        """Return what the optimizer niches takes besides: it looks at documents, and at segments."""
        for name, rule in self.rules.items():
            if rule.kind != "mean" or not rule.higher_is_better or rule.metric in MEASURES:
                raise ConfigError(
                    f"fitness.tasks: niches need scores from 0 to 1, higher is better, but {name} is "
                    f"{rule.metric}; choose another metric, or another optimizer"
                )
        weights = {name: rule.weight for name, rule in self.rules.items()} or None
        coding = self.space if isinstance(self.space, SegmentSpace) else None
        return {"weights": weights, "coding": coding, "founders": self._founders}

    @cached_property
    def _founders(self) -> list[Genome]:
        """The individuals of the population that the optimizer begins from."""
        path = self.config.optimizer.settings.get("founders")
        if path is None:
            return []
        sources = [self.refs[ref.name] for ref in self.config.sources.models]
        return founders(read_population(self.base_dir / path), self.space, sources)

    def _seeded(self) -> tuple[Seeded, ...]:
        """Return the baselines and the recipes to start from, in the order in which they are scored."""
        models = [self.refs[ref.name] for ref in self.config.sources.models]
        found = [Seeded(f"source:{ref.name}", self._whole(ref)) for ref in self.refs.values()]
        even = len({layout_of(found).num_layers for found in self.checkpoints.values()}) == 1
        if len(models) > 1 and even:
            found.append(Seeded("baseline:uniform", self._linear(models)))
        base = self._base()
        if base is not None and even:
            for scale in self.config.baselines.task_arithmetic:
                recipe = self._recipe("task_arithmetic", models, base, {"lambda": scale})
                found.append(Seeded(f"baseline:task_arithmetic@{scale:g}", recipe))
        for path in self.config.optimizer.start:
            recipe = self._fingerprinted(read_any_recipe(self.base_dir / path), path)
            genome, _ = self.space.encode(recipe)
            found.append(Seeded(f"start:{Path(path).name}", recipe, genome))
        return tuple(found)

    def _whole(self, ref: SourceRef) -> Recipe:
        """Return the recipe of a source as it is; a path where paths are searched, so that it is resident."""
        if self.paths:
            return whole_path(ref, layout_of(self.checkpoints[ref.name]).num_layers, self.config.space.dtype)
        return self._linear([ref])

    def _linear(self, refs: list[SourceRef]) -> Recipe:
        return self._recipe("linear", refs, None, {})

    def _recipe(
        self, method: str, refs: list[SourceRef], base: SourceRef | None, parameters: dict[str, Any]
    ) -> Recipe:
        known = {ref.name for ref in (*refs, *([base] if base else []))}
        tokenizer = self.config.space.tokenizer
        data = {
            "method": method,
            "base": base.model_dump(exclude_none=True) if base else None,
            "sources": [ref.model_dump(exclude_none=True) for ref in refs],
            "parameters": parameters,
            "tokenizer": tokenizer if tokenizer in known else None,
            "dtype": self.config.space.dtype,
        }
        return parse_recipe(data, "baseline")

    def _fingerprinted(self, recipe: Recipe, where: str) -> Recipe:
        """Return a recipe file with this run's sources in place of its own, matched by path, else name."""
        data = recipe.to_json()
        by_path = {str(self.checkpoints[name].path): ref for name, ref in self.refs.items()}
        for entry in [*data["sources"], *([data["base"]] if "base" in data else [])]:
            resolved = str((self.base_dir / where).parent.joinpath(entry["path"]).resolve())
            ref = by_path.get(resolved) or self.refs.get(entry["name"])
            if ref is None:
                raise ConfigError(f"optimizer.start: {where}: {entry['name']} is not a source of this run")
            entry.update(ref.model_dump(exclude_none=True))
        return parse_recipe(data, where)

    def worker_spec(self, threads: int) -> WorkerSpec:
        """Return what each worker needs to know."""
        workers = self.config.workers
        reference = self.config.sources.all[0].name
        return WorkerSpec(
            sources=tuple(self.refs.values()),
            reference=reference,
            tokenizer=self.config.space.tokenizer or reference,
            fitness=self.config.fitness,
            base_dir=str(self.base_dir),
            seed=self.config.seed,
            device=workers.device,
            dtype=workers.dtype or (self.config.space.dtype if workers.engine == "vllm" else None),
            threads=threads,
            memory_gib=workers.memory_gib,
            engine=workers.engine,
            tensor_parallel=workers.tensor_parallel,
            gpu_share=workers.gpu_share,
            gpus=workers.whole_gpus,
        )

    @cached_property
    def fitness_digest(self) -> str:
        """SHA-256 over everything that decides a score besides the model."""
        if self.tasks is not None:
            engine, tasks = self.config.workers.engine, self.tasks.fingerprint
            if engine == "transformers":
                return tasks
            return hashlib.sha256(canonical_json([tasks, engine]).encode()).hexdigest()
        spec = self.config.fitness.function or ""
        file = self.base_dir / spec.partition(":")[0]
        code = file.read_bytes() if file.is_file() else b""
        return hashlib.sha256(canonical_json([spec, self.config.seed]).encode() + code).hexdigest()

    @property
    def rules(self) -> dict[str, TaskRule]:
        """Task name to rule; empty for a callable, whose rules show only in what it returns."""
        return self.tasks.rules if self.tasks else {}

    def facts(self) -> dict[str, Any]:
        """Return what must not change while the run lasts, and what people will want to know."""
        more: dict[str, Any] = {}
        if isinstance(self.space, SegmentSpace):
            more["chromosomes"] = self.space.facts()
        if isinstance(self.space, ParameterSpace):
            more["spans"] = [gene.span.model_dump(include=SPAN) for gene in self.space.genes]
        if self.config.optimizer.settings.get("founders") is not None:
            more["founders"] = [list(genome) for genome in self._founders]
        return {
            **more,
            "sources": {name: ref.model_dump(exclude_none=True) for name, ref in self.refs.items()},
            "fitness": self.fitness_digest,
            "space": [[d.label, d.kind, d.size] for d in self.space.dimensions],
            "rules": {name: rule.to_json() for name, rule in self.rules.items()},
            "code": self.tasks.code if self.tasks else {},
            "base_dir": str(self.base_dir),
            "layers": self.layout.num_layers,
            "family": self.layout.family,
            "parameters": next(iter(self.checkpoints.values())).num_parameters,
            "versions": {name: _version(name) for name in LIBRARIES},
        }

    def document_sets(self) -> dict[str, dict[str, list[int]]]:
        """Return the documents of the three splits."""
        if self.tasks is None:
            return {}
        return {split: self.tasks.documents(DocumentSet(split)) for split in SPLITS}

    def scan_sources(self) -> None:
        """Read every weight once; raise SourceError if one is not finite."""
        for checkpoint in self.checkpoints.values():
            checkpoint.scan_finite()


def drift(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what changed between the facts of a run's start and those of its resume, one line each."""
    changed = []
    for name, source in now["sources"].items():
        known = before["sources"].get(name, {}).get("fingerprint")
        if known != source["fingerprint"]:
            changed.append(
                f"source {name} ({source['path']}) changed: fingerprint {str(known)[:12]} at the start, "
                f"{source['fingerprint'][:12]} now"
            )
    if before["fitness"] != now["fitness"]:
        changed.append(
            "the fitness (tasks, documents, prompts, engine, or the function's file) changed: fingerprint "
            f"{before['fitness'][:12]} at the start, {now['fitness'][:12]} now"
        )
    if [list(d) for d in before["space"]] != now["space"]:
        changed.append("the space has other dimensions than at the start")
    if before.get("founders") != now.get("founders"):
        changed.append("the population that the run began from is another one now")
    return changed


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
