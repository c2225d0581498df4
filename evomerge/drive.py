"""One driver session: take the run, start the workers, search, let go. Loads no torch.

The store is opened first and written last: a config, source, task or cluster that does not work leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from evomerge.config import CHANGEABLE, RunConfig, parse_config
from evomerge.errors import ConfigError, LostRunError, StoreError, UserError, redacted
from evomerge.faults import reached
from evomerge.plan import Plan, drift
from evomerge.progress import Progress
from evomerge.search import Search
from evomerge.sourcing import with_recipes
from evomerge.store import Run, RunView, Store
from evomerge.trackers.live import LiveTracking
from evomerge.trackers.targets import Target, parse_target
from evomerge.workers.inline import InlinePool
from evomerge.workers.pool import Pool
from evomerge.workers.ray_pool import RayPool

Listener = Callable[[Progress], None]
Notice = Callable[[str], None]


HASTY_SECONDS = 3.0
"""How long trackers have after a second Ctrl-C."""


def _silent(text: str) -> None:
    del text


def make_pool(plan: Plan) -> Pool:
    """Return the config's pool, not yet started."""
    settings = plan.config.workers
    cores = os.cpu_count() or 1
    if settings.pool == "inline":
        return InlinePool(plan.worker_spec(settings.threads or cores))
    return RayPool(plan.worker_spec(settings.threads or max(1, int(settings.cpus))), settings)


def start(
    config: RunConfig,
    base_dir: Path,
    store: Store,
    *,
    listener: Listener = lambda progress: None,
    notice: Notice = _silent,
) -> RunView:
    """Create a run and drive it until it is finished or stopped.

    Args:
        config: The run's config.
        base_dir: What its paths are relative to.
        store: Where it is kept.
        listener: Called after each outcome.
        notice: Called with lines for people.

    Returns:
        The run as it is then.

    Raises:
        UserError: Something in the config does not work; the store is as it was.
    """
    if store.find(config.name) is not None:
        raise StoreError(
            f'run "{config.name}" exists already; go on with it by `evomerge resume {config.name}`, '
            "or choose another name with --name"
        )
    targets = trackers_of(config, base_dir)
    notice("reading sources and tasks")
    config = with_recipes(config, base_dir, store)
    plan = Plan(config, base_dir)
    for warning in plan.warnings:
        notice(f"warning: {warning}")
    notice("starting workers")
    with make_pool(plan) as pool:
        run = store.create_run(config.name, _kept(config), plan.facts())
        reached("run_created")
        return _drive(run, plan, pool, store, listener, notice, targets)


def resume(
    name: str,
    store: Store,
    *,
    overrides: Sequence[str] = (),
    accept_drift: bool = False,
    listener: Listener = lambda progress: None,
    notice: Notice = _silent,
) -> RunView:
    """Go on with a run.

    Args:
        name: The run.
        store: Where it is kept.
        overrides: Changes of the config's sections in `CHANGEABLE`, as `section.key=value`.
        accept_drift: Go on although sources or tasks changed; the change is recorded.
        listener: Called after each outcome.
        notice: Called with lines for people.

    Raises:
        UserError: The run is driven by another process, or what it was made of has changed.
    """
    view = store.run(name)
    if view.owner_alive:
        raise StoreError(f'run "{name}" is driven by {view.owner}; stop that process first')
    config = parse_config(view.config, f"run {name}", overrides)
    _check_unchanged(view, config)
    targets = trackers_of(config, Path(view.facts["base_dir"]))
    notice("reading sources and tasks")
    plan = Plan(config, Path(view.facts["base_dir"]))
    changed = drift(view.facts, plan.facts())
    if changed and not accept_drift:
        raise StoreError(f"run {name}: {changed[0]}; restore it, or go on with --accept-drift")
    notice("starting workers")
    with make_pool(plan) as pool:
        run = store.take_run(name)
        reached("run_taken")
        run.set_config(_kept(config))
        if changed:
            run.add_event("drift_accepted", {"changes": changed})
            run.set_facts({**plan.facts(), "drift": [*view.facts.get("drift", []), *changed]})
        return _drive(run, plan, pool, store, listener, notice, targets)


def trackers_of(config: RunConfig, base_dir: Path) -> list[Target]:
    """Return where a config has its run tracked.

    Raises:
        ConfigError: A kind is unknown, or its package is not installed.
    """
    try:
        return [parse_target(text, base_dir) for text in config.trackers]
    except UserError as problem:
        raise ConfigError(f"trackers: {problem}") from None


def _kept(config: RunConfig) -> dict[str, Any]:
    """Return a config as it is stored: without the password of the store."""
    data = config.model_dump(mode="json")
    return {**data, "store": redacted(config.store) if config.store else None}


def _check_unchanged(view: RunView, config: RunConfig) -> None:
    # What was stored is read anew: the version that stored it may not have known every key.
    before = parse_config(view.config, f"run {view.name}").model_dump(mode="json")
    for section, value in config.model_dump(mode="json").items():
        if section not in CHANGEABLE and value != before[section]:
            raise ConfigError(
                f"{section}: cannot change while a run lasts; only {', '.join(sorted(CHANGEABLE))} can. "
                "Start a new run with this config"
            )


def _drive(
    run: Run,
    plan: Plan,
    pool: Pool,
    store: Store,
    listener: Listener,
    notice: Notice,
    targets: Sequence[Target],
) -> RunView:
    search = Search(run, plan, pool, listener, notice)
    run.set_status("running")
    run.add_event("started", {"pid": os.getpid(), "workers": pool.state().workers})
    tracking = LiveTracking(run, targets, notice)

    def let_go(status: str, error: str = "") -> None:
        tracking.end(status, error)
        run.release(status, error)

    try:
        with _stopping(search, notice), _asked_to_stop(run):
            finished = search.run()
        reached("search_ended")
        let_go("finished" if finished else "stopped")
        reached("run_released")
    except LostRunError:
        raise
    except KeyboardInterrupt:
        run.release("stopped")
        pool.close(kill=True)
        tracking.end("stopped", seconds=HASTY_SECONDS)
    except SystemExit:
        run.release("stopped")
        tracking.end("stopped", seconds=HASTY_SECONDS)
        raise
    except BaseException as problem:
        text = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
        # Where the store is at fault this fails too; what came first is what the user must know.
        with contextlib.suppress(StoreError, LostRunError):
            let_go("failed", redacted(text))
        raise
    return store.run(run.name)


ASKED_SECONDS = 1.0
"""How often a driver looks whether it was asked to stop."""


@contextmanager
def _asked_to_stop(run: Run) -> Iterator[None]:
    """Do at a request in the store what Ctrl-C does; it may come from another machine."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended, main = threading.Event(), threading.main_thread().ident or 0

    def look() -> None:
        obeyed = 0
        while not ended.wait(ASKED_SECONDS):
            try:
                wanted = {"": 0, "stop": 1, "now": 2}[run.requested()]
            except StoreError:
                continue  # the search meets the same error and says so
            while obeyed < wanted:
                obeyed += 1
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.1)

    watcher = threading.Thread(target=look, name="requests", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def _stopping(search: Search, notice: Notice) -> Iterator[None]:
    """Stop after the running candidates at the first SIGINT, SIGTERM or SIGHUP, at once at another SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if search.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        search.stopping = True
        notice("stopping after the candidates that are running; Ctrl-C again stops at once")

    before = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
