"""Where a run is tracked, written KIND:WHERE."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from evomerge.errors import UserError, nearest
from evomerge.trackers.base import Tracker

_KINDS = {
    "optuna": ("optuna", "evomerge.trackers.optuna_study:OptunaStudy"),
    "tensorboard": ("tensorboard", "evomerge.trackers.event_files:EventFiles"),
    "wandb": ("wandb", "evomerge.trackers.wandb_run:WandbRun"),
    "mlflow": ("mlflow", "evomerge.trackers.mlflow_run:MlflowRun"),
}
"""Kind to the package it needs and its tracker."""


@dataclass(frozen=True, slots=True)
class Target:
    """A place to track a run at.

    Attributes:
        kind: `optuna`, `tensorboard`, `wandb` or `mlflow`.
        where: A file, folder, project or URL; what the kind takes.
        folder: What relative paths are relative to.
    """

    kind: str
    where: str
    folder: Path

    def __str__(self) -> str:
        """Show it for messages, without a password."""
        return f"{self.kind}:{re.sub(r'//[^/@]*@', '//***@', self.where)}"

    @property
    def path(self) -> Path:
        """`where` as a path."""
        return (self.folder / Path(self.where).expanduser()).absolute()

    @property
    def is_url(self) -> bool:
        """Whether `where` is a URL."""
        return "://" in self.where

    def make(self) -> Tracker:
        """Return the tracker; loads its package."""
        module, _, name = _KINDS[self.kind][1].partition(":")
        return cast(Tracker, getattr(importlib.import_module(module), name)(self))


def parse_target(text: str, folder: Path) -> Target:
    """Return the target that `KIND:WHERE` means.

    Args:
        text: As in the config's `trackers`, or `--to`.
        folder: What relative paths are relative to.

    Raises:
        UserError: The kind is unknown, or its package is not installed.
    """
    kind, colon, where = text.partition(":")
    if kind not in _KINDS or not colon or not where:
        hint = nearest(kind, _KINDS) if kind not in _KINDS else ""
        raise UserError(f"tracker {text}: expected KIND:WHERE, such as tensorboard:tb{hint}")
    package = _KINDS[kind][0]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"tracker {kind}: the package {package} is not installed; pip install 'evomerge[{kind}]'"
        )
    return Target(kind, where, folder)
