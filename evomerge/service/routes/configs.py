"""Routes of configs: check one, and what one may say."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from evomerge.errors import ConfigError
from evomerge.service.admission import admit, folder_of, parse_submitted
from evomerge.service.commands import run_json
from evomerge.service.models import Validation
from evomerge.service.parts import Parts
from evomerge.strict import dump_yaml


def router(parts: Parts) -> APIRouter:
    """Return the routes over a service's parts."""
    routes = APIRouter(prefix="/configs", tags=["configs"])
    settings = parts.settings

    @routes.post("/validate")
    def validate_config(wish: Validation) -> dict[str, Any]:
        """Check a config and say what a run would do: what `evomerge validate --json` prints.

        What is wrong is an error whose `key` is the key's path.
        """
        folder = folder_of(settings, wish.folder)
        config = parse_submitted(wish.config, wish.changes)
        admit(config, folder, settings)
        if wish.quick:
            return {"summary": {"run": config.name}, "warnings": []}
        with tempfile.TemporaryDirectory(dir=settings.folder) as place:
            file = Path(place) / "config"
            file.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")
            try:
                found: dict[str, Any] = run_json(
                    ["validate", file, "--relative-to", folder], settings.store, ConfigError
                )
            except ConfigError as problem:
                first, *others = (line.removeprefix(f"{file}: ") for line in problem.lines)
                raise ConfigError(first, others) from None
        return found

    @routes.get("/schema")
    def config_schema() -> dict[str, Any]:
        """Return the JSON schema of configs: what `evomerge schema` prints."""
        from evomerge.config import json_schema

        return json_schema()

    @routes.get("/methods")
    def merge_methods() -> list[dict[str, Any]]:
        """List the merge methods with their parameters: what `evomerge methods --json` prints."""
        from evomerge.catalogue import CATALOGUE

        return [dataclasses.asdict(method) for method in CATALOGUE.values()]

    return routes
