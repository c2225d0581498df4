"""The demo's world: a tiny base model, experts fine-tuned from it, and lm-eval tasks that test their skills.

```
folder/
├── world.json         written last: the digest of what was built, and where
├── base/  reverse/  sort/  shift/  pick/      Hugging Face directories
├── documents/         one JSON lines file per task
└── tasks/             one lm-eval YAML per task
```

The experts come, as in life, from teams with different habits. Most were tuned gently and rehearsed the other
skills meanwhile; the one for sorting was tuned hard with hardly any rehearsal, so it is the best at sorting,
has forgotten much else, and a large share of it spoils a merge. So no single scale suits all of them.

This module loads no torch; training does, and only when nothing usable lies in the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from evomerge.demo.skills import LONG, SHORT, SKILLS, Document, Skill, task_documents
from evomerge.errors import UserError

Progress = Callable[[str, int, int], None]

FORMAT = 1
"""Raised whenever the same settings would give another world."""
MARK = "world.json"
MOST_TOKENS = LONG[1] + 1
"""What an answer needs: its letters and the newline that ends it."""


@dataclass(frozen=True)
class ExpertSettings:
    """How one expert is fine-tuned from the base.

    Attributes:
        skill: What it is taught; also its name.
        steps: Training steps.
        rate: Learning rate.
        own_weight: Weight of its skill in its documents, where each other skill has weight 1. The others are
            rehearsal: without any, experts forget so much that they can hardly be merged.
    """

    skill: str
    steps: int
    rate: float
    own_weight: float = 3.0


@dataclass(frozen=True)
class WorldSettings:
    """Everything but the seed that decides what a world is; the defaults make the demo.

    Attributes:
        hidden: Width of the models.
        layers: Depth of the models.
        heads: Attention heads.
        intermediate: Width inside the feed-forward blocks.
        batch: Documents per training step.
        warm_up: Steps until the full rate.
        base_steps: Training steps of the base.
        base_rate: Its learning rate.
        base_mixture: Weight of each skill in its documents.
        long_share: Share of long documents wherever a skill is not the one being taught.
        experts: The experts.
        documents: Documents per task.
        threads: Torch threads of the training; the weights depend on it.
    """

    hidden: int = 128
    layers: int = 6
    heads: int = 4
    intermediate: int = 344
    batch: int = 64
    warm_up: int = 15
    base_steps: int = 350
    base_rate: float = 2e-3
    base_mixture: tuple[tuple[str, float], ...] = (
        ("reverse", 1.2),
        ("sort", 1.0),
        ("shift", 1.0),
        ("pick", 0.4),
    )
    long_share: float = 0.35
    experts: tuple[ExpertSettings, ...] = (
        ExpertSettings("reverse", 100, 4e-4),
        ExpertSettings("sort", 100, 2e-3, own_weight=25.0),
        ExpertSettings("shift", 100, 4e-4),
        ExpertSettings("pick", 80, 8e-4),
    )
    documents: int = 800
    threads: int = 2

    def __post_init__(self) -> None:
        """Refuse settings that cannot make a world."""
        skills = [expert.skill for expert in self.experts]
        unknown = sorted({*skills, *(name for name, _ in self.base_mixture)} - set(SKILLS))
        if unknown:
            raise UserError(f"unknown demo skill {unknown[0]!r}; known: {', '.join(SKILLS)}")
        if not skills or len(set(skills)) < len(skills):
            raise UserError(f"a demo world needs experts with different skills, got {skills}")
        counts = [self.documents, self.base_steps, self.batch, self.threads]
        if min(*counts, *(expert.steps for expert in self.experts)) < 1:
            raise UserError("documents, steps, batch and threads of a demo world must be at least 1")

    def digest(self, seed: int) -> str:
        """Return the identity of the world that these settings and a seed make."""
        content = {"format": FORMAT, "seed": seed, "settings": asdict(self), "long": LONG, "short": SHORT}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class World:
    """A finished world.

    Attributes:
        folder: Where it lies.
        base: The checkpoint every expert was fine-tuned from.
        experts: The experts' checkpoints by the skill they were taught.
        tasks_path: The folder of lm-eval YAML files, for `include_path`.
        tasks: The tasks' names, one per expert, in the same order.
    """

    folder: Path
    base: Path
    experts: dict[str, Path]
    tasks_path: Path
    tasks: tuple[str, ...]


def build_world(
    folder: Path,
    *,
    seed: int = 0,
    settings: WorldSettings | None = None,
    progress: Progress | None = None,
) -> World:
    """Train the models and write the tasks, or reuse what an earlier call with equal arguments made.

    Args:
        folder: Where the world is to lie; an older world there is replaced, anything else is refused.
        seed: Equal seeds and settings give equal weights on one machine, and equal documents anywhere.
        settings: Sizes and training; the demo's own if None.
        progress: Called with a stage, what is done of it, and how much there is to do.

    Returns:
        The world, complete.

    Raises:
        UserError: If `folder` holds something that is not a demo world.
    """
    settings = settings or WorldSettings()
    folder = folder.expanduser().resolve()
    digest = settings.digest(seed)
    if _mark(folder) is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something that is not a demo world; give a new or empty folder")
    mark = _mark(folder)
    if mark is None or mark.get("digest") != digest:
        _build(folder, digest, seed, settings, progress or _silent)
    elif mark.get("folder") != str(folder):
        # The folder was moved since: only the tasks know absolute paths.
        _write_tasks(folder, folder, settings)
        _write_mark(folder, folder, digest)
    return _world(folder, settings)


def _silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def _world(folder: Path, settings: WorldSettings) -> World:
    names = [expert.skill for expert in settings.experts]
    return World(
        folder=folder,
        base=folder / "base",
        experts={name: folder / name for name in names},
        tasks_path=folder / "tasks",
        tasks=tuple(_task_name(name) for name in names),
    )


def _build(folder: Path, digest: str, seed: int, settings: WorldSettings, progress: Progress) -> None:
    """Build beside the folder and rename, so that a half-built world is never taken for a whole one."""
    from evomerge.demo.training import train_models

    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        banned: set[str] = set()
        (building / "documents").mkdir()
        for expert in settings.experts:
            documents = task_documents(SKILLS[expert.skill], settings.documents, seed)
            banned.update(str(document["prompt"]) for document in documents)
            _write_documents(building, expert.skill, documents)
        train_models(building, settings=settings, seed=seed, banned=frozenset(banned), progress=progress)
        _write_tasks(building, folder, settings)
        _write_mark(building, folder, digest)
        building.chmod(0o755)  # mkdtemp makes it private
        _move(building, folder, digest)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _move(building: Path, folder: Path, digest: str) -> None:
    """Put a finished world in its place, unless another process has put the same one there first."""
    if (mark := _mark(folder)) is not None:
        if mark.get("digest") == digest:
            return
        shutil.rmtree(folder)
    try:
        os.replace(building, folder)
    except OSError as error:
        if (_mark(folder) or {}).get("digest") != digest:
            raise UserError(f"cannot put the demo world in {folder}: {error}") from error


def _mark(folder: Path) -> dict[str, str] | None:
    """Return what a finished world says about itself; None if there is none."""
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "digest" in content else None


def _write_mark(where: Path, folder: Path, digest: str) -> None:
    content = {"digest": digest, "folder": str(folder)}
    (where / MARK).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_documents(where: Path, name: str, documents: list[Document]) -> None:
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (where / "documents" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _write_tasks(where: Path, folder: Path, settings: WorldSettings) -> None:
    """Write the tasks into `where` with the paths they will have in `folder`."""
    tasks = where / "tasks"
    tasks.mkdir(exist_ok=True)
    for expert in settings.experts:
        task = _task(SKILLS[expert.skill], folder / "documents" / f"{expert.skill}.jsonl")
        text = yaml.safe_dump(task, sort_keys=False, width=100)
        (tasks / f"{task['task']}.yaml").write_text(text, encoding="utf-8")


def _task_name(skill: str) -> str:
    return f"demo_{skill}"


def _task(skill: Skill, documents: Path) -> dict[str, object]:
    """Return a skill's lm-eval task: greedy exact match, or the likeliest of its choices."""
    task: dict[str, object] = {
        "task": _task_name(skill.name),
        "tag": "evomerge_demo",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        # The prompt ends in `=` and the answer follows at once.
        "target_delimiter": "",
    }
    if skill.multiple_choice:
        scoring: dict[str, object] = {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
        }
        metric = "acc"
    else:
        scoring = {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": MOST_TOKENS},
        }
        metric = "exact_match"
    scoring["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    return task | scoring | {"metadata": {"version": FORMAT, "description": skill.title}}
