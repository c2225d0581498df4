"""Whose Python code may run when task files are loaded. No torch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import FitnessError
from evomerge.fitness.settings import FitnessSettings


@contextlib.contextmanager
def only_trusted_functions(trusted: Sequence[Path]) -> Iterator[None]:
    """Refuse `!function` in task files outside lm-eval and the trusted folders, included files too."""
    import lm_eval
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

    _yaml_loader._import_func_in_yml = guarded
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml = stock


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
