"""What clients may have done to runs: submit, resume, cancel."""

from __future__ import annotations

from typing import Any

from evomerge.config import CHANGEABLE, parse_config
from evomerge.errors import ConfigError, ConflictError
from evomerge.report.overview import one_run
from evomerge.service.admission import admit, digest_of, folder_of, parse_submitted
from evomerge.service.models import Resumption, Submission
from evomerge.service.parts import Parts


def submit(parts: Parts, wish: Submission, key: str | None) -> tuple[dict[str, Any], bool]:
    """Queue a run.

    Returns:
        Its line, and whether the submission is new.

    Raises:
        UserError: The config is wrong or not allowed, or its name is taken.
    """
    folder = folder_of(parts.settings, wish.folder)
    config = parse_submitted(wish.config, wish.changes)
    admit(config, folder, parts.settings)
    data = config.model_dump(mode="json")
    job, new = parts.queue.submit(
        config.name,
        data,
        str(folder),
        digest=digest_of(config, folder),
        priority=wish.priority,
        key=key,
        most=parts.settings.most_jobs,
    )
    parts.supervisor.wake()
    return one_run(parts.store, job.name), new


def resume(parts: Parts, name: str, wish: Resumption) -> dict[str, Any]:
    """Queue a driver that goes on with a run; return the run's line.

    Raises:
        UserError: There is no such run, it has a driver, or a change is not allowed.
    """
    if parts.store.find(name) is None and parts.queue.job(name) is not None:
        raise ConflictError(f'run "{name}" has not begun; cancel it, or submit it again')
    view = parts.store.run(name)
    changes = list(wish.changes)
    changes += [f"budget.evaluations={wish.evaluations}"] if wish.evaluations else []
    changes += [f"workers.count={wish.workers}"] if wish.workers else []
    _check_changes(name, view.config, changes)
    options = [part for change in changes for part in ("--set", change)]
    options += ["--accept-drift"] if wish.accept_drift else []
    if view.owner_alive:
        raise ConflictError(f'run "{name}" is driven by {view.owner}; cancel it first')
    parts.queue.resume(name, view.config, view.facts["base_dir"], options, wish.priority)
    parts.supervisor.wake()
    return one_run(parts.store, name)


def _check_changes(name: str, config: dict[str, Any], changes: list[str]) -> None:
    """Refuse changes of what makes the run, and of what the operator decides."""
    before = parse_config(config, f"run {name}").model_dump(mode="json")
    after = parse_config(config, f"run {name}", changes).model_dump(mode="json")
    for section, value in after.items():
        if section not in CHANGEABLE and value != before[section]:
            raise ConfigError(
                f"{section}: cannot change while a run lasts; only {', '.join(sorted(CHANGEABLE))} can"
            )
    operators = (("store", None), ("trackers", None), ("output", "folder"), ("workers", "ray_address"))
    for section, key in operators:
        old, new = before[section], after[section]
        if (old if key is None else old[key]) != (new if key is None else new[key]):
            raise ConfigError(f"{section}{f'.{key}' if key else ''}: the service's operator decides this")


def cancel(parts: Parts, name: str, *, now: bool) -> dict[str, Any]:
    """End a run, or take it from the queue; return its line.

    Raises:
        MissingError: There is no such run.
        ConflictError: It has ended.
    """
    parts.queue.cancel(name, immediately=now)
    parts.supervisor.wake()
    return one_run(parts.store, name)
