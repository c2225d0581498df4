"""Whose Python code may run when task files are loaded. No torch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import FitnessError
from evomerge.fitness.settings import FitnessSettings
from evomerge.reading import is_folder, read_bytes

MAX_BYTES = 2**22
MAX_DEPTH = 64
MOST_FILES = 20_000
MOST_NODES = 100_000
"""Most values of a task file with all its aliases written out."""

_PICKLING = ("pandas", "cache", "generator", "spark")
"""Builders of `datasets` that take pickles or functions, in some of its versions."""

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as lm-eval chooses it


@contextlib.contextmanager
def only_trusted_functions(trusted: Sequence[Path]) -> Iterator[None]:
    """Refuse code that task files outside lm-eval and the trusted folders would run, included files too.

    That is `!function`; metrics that lm-eval does not know, for which the `evaluate` library runs a script of
    the Hugging Face hub or of a folder of that name; and data whose loading runs code.
    """
    import datasets
    import lm_eval
    from lm_eval.api import registry
    from lm_eval.api import task as task_module
    from lm_eval.tasks import _yaml_loader

    allowed = [Path(lm_eval.__file__).resolve().parent, *trusted]
    stock = _yaml_loader._import_func_in_yml

    def guarded(qualified: str, base_dir: Path) -> Any:
        if not any(base_dir.resolve().is_relative_to(folder) for folder in allowed):
            raise FitnessError(
                f"{base_dir}: a task file there runs Python code on loading ({qualified}); read it, then "
                "list its folder in fitness.include_paths and fitness.trust_code"
            )
        return stock(qualified, base_dir)

    known = task_module.get_metric

    def own_metric(name: Any, hf_evaluate_metric: bool = False) -> Any:
        if hf_evaluate_metric or name not in registry.metric_registry:
            raise FitnessError(
                f"a task file has the metric {str(name)[:80]!r}, which is none of lm-eval's own; others are "
                "scripts of the evaluate library, which are never run"
            )
        return known(name)

    load = datasets.load_dataset

    def load_data(path: str, *rest: Any, **options: Any) -> Any:
        if path in _PICKLING:
            raise FitnessError(
                f"a task file has data of the kind {str(path)[:80]!r}, whose loading runs code (pickle or a "
                "script); give it as json, csv or parquet"
            )
        return load(path, *rest, **options)

    _yaml_loader._import_func_in_yml = guarded
    task_module.get_metric = own_metric
    datasets.load_dataset = load_data
    try:
        yield
    finally:
        datasets.load_dataset = load
        _yaml_loader._import_func_in_yml = stock
        task_module.get_metric = known


def trusted_code(settings: FitnessSettings, base_dir: Path) -> dict[str, str]:
    """Return a hash for every file of the trusted directories; refuse code in directories not trusted.

    Loading a task file with `!function` runs Python from its directory.
    """
    hashes = {}
    for path in settings.include_paths:
        folder = (base_dir / path).resolve()
        if not is_folder(folder):
            raise FitnessError(f"fitness.include_paths: {path}: no such directory ({folder})")
        trusted = path in settings.trust_code
        for file in _task_files(folder):
            data = read_bytes(file, MAX_BYTES, FitnessError)
            if file.suffix == ".yaml":
                _fault_of(file, data)
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


def _task_files(folder: Path) -> list[Path]:
    """Return the YAML and Python files below a directory, by name; FitnessError if it holds too much."""
    found = []
    for count, file in enumerate(folder.rglob("*")):
        if count > MOST_FILES:
            raise FitnessError(
                f"fitness.include_paths: {folder}: more than {MOST_FILES:,} files; name the folder with the "
                "task files alone"
            )
        if file.suffix in (".yaml", ".yml", ".py") and not is_folder(file):
            found.append(file)
    return sorted(found)


def unreadable(folders: Sequence[Path]) -> str:
    """Return a remark on the first task file that lm-eval skips because it cannot read it; else nothing."""
    for folder in folders:
        for file in _task_files(folder):
            fault = (
                _fault_of(file, read_bytes(file, MAX_BYTES, FitnessError)) if file.suffix == ".yaml" else ""
            )
            if fault:
                return f" ({file} cannot be read: {fault})"
    return ""


def _fault_of(file: Path, data: bytes) -> str:
    """Return why a file is no YAML; refuse what grows without end when its aliases are written out."""
    open_sizes: list[int] = [0]
    anchors: dict[str | None, int] = {}
    names: list[str | None] = [None]
    try:
        for event in yaml.parse(data, Loader=_Parser):
            size = 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_sizes.append(1)
                names.append(event.anchor)
                if len(open_sizes) > MAX_DEPTH:
                    raise FitnessError(f"{file}: nested more than {MAX_DEPTH} levels deep")
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                size, name = open_sizes.pop(), names.pop()
            elif isinstance(event, yaml.AliasEvent):
                size, name = anchors.get(event.anchor, 1), None
            elif isinstance(event, yaml.ScalarEvent):
                name = event.anchor
            else:
                continue
            if name is not None:
                anchors[name] = size
            open_sizes[-1] += size
            if open_sizes[-1] > MOST_NODES:
                raise FitnessError(f"{file}: more values than the {MOST_NODES:,} that a task file may have")
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        return str(problem)
    return ""
