"""Routes of what a run found and what it does now."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from evomerge.errors import MissingError, UserError
from evomerge.recipe import Recipe
from evomerge.report.depth import over_depth, steps
from evomerge.report.population import Population
from evomerge.report.recipes import as_mergekit, recipe_of
from evomerge.service.commands import run_command
from evomerge.service.models import Logs, RunConfigAnswer, RunName, Winner, Workers
from evomerge.service.parts import Parts

MOST = 2**31 - 1
REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def router(parts: Parts) -> APIRouter:
    """Return the routes over a service's parts."""
    routes = APIRouter(prefix="/runs/{name}", tags=["results"])
    store = parts.store

    @routes.get("/config")
    def run_config(name: RunName) -> RunConfigAnswer:
        """Return the run's config, and what its paths are relative to."""
        view = store.find(name)
        if view is not None:
            return RunConfigAnswer(config=view.config, folder=str(view.facts.get("base_dir", "")))
        job = parts.queue.job(name)
        if job is None:
            raise MissingError(f'there is no run "{name}"')
        return RunConfigAnswer(config=dict(job.config), folder=job.folder)

    @routes.get("/winner")
    def winner(name: RunName) -> Winner:
        """Return the winner, or the best so far, with its parameters over depth or its layer path."""
        view, data = store.run(name), parts.shown.get(name)
        kept = {key: data[key] for key in ("best", "gains", "verdict")}
        if data["best"] is None:
            return Winner(**kept, layers=0, parameters=[], path=[])
        recipe = recipe_of(view, data["best"]["candidate"])
        layers = int(view.facts.get("layers") or 0)
        return Winner(
            **kept, layers=layers, parameters=over_depth(_merge_of(recipe), layers), path=steps(recipe)
        )

    @routes.get("/recipe")
    def recipe(
        name: RunName,
        candidate: Annotated[int | None, Query(ge=0, le=MOST, description="Its number [the winner].")] = None,
        format: Literal["evomerge", "mergekit"] = "evomerge",
    ) -> dict[str, Any]:
        """Return the recipe of the winner or of any candidate: what `evomerge recipe --json` prints."""
        found = recipe_of(store.run(name), candidate)
        return as_mergekit(found) if format == "mergekit" else found.to_json()

    @routes.get("/population")
    def population(name: RunName) -> dict[str, Any]:
        """Return who lives in a run with niches: what `evomerge population RUN --json` prints."""
        return Population(store.run(name)).to_json()

    _add_driver(routes, parts)
    return routes


def _add_driver(routes: APIRouter, parts: Parts) -> None:
    store, settings = parts.store, parts.settings

    @routes.get("/report", response_class=FileResponse, responses={200: {"content": {"text/html": {}}}})
    def report(name: RunName) -> FileResponse:
        """Return the run's report, one HTML file, as it would be written now."""
        view = store.run(name)
        file = settings.folder / "reports" / f"{name}-{view.updated:.3f}.html"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            for old in file.parent.glob(f"{name}-[0-9]*.[0-9][0-9][0-9].html"):
                if re.fullmatch(r"-\d+\.\d{3}\.html", old.name.removeprefix(name)):
                    old.unlink(missing_ok=True)
            run_command(["report", name, "--out", file], settings.store, UserError)
        headers = {"content-security-policy": REPORT_POLICY}
        return FileResponse(file, media_type="text/html", filename=f"{name}.html", headers=headers)

    @routes.get("/logs")
    def logs(name: RunName, bytes: Annotated[int, Query(ge=1, le=1 << 20)] = 1 << 16) -> Logs:
        """Return the end of what the run's driver has written, without control characters."""
        if parts.queue.job(name) is None:
            store.run(name)
            raise MissingError(f'run "{name}" was begun without the service, which has no log of it')
        return Logs(text=_CONTROL.sub("", parts.supervisor.log(name, bytes)))

    @routes.get("/workers")
    def workers(name: RunName) -> Workers:
        """Return what each worker does now; empty while nothing drives the run."""
        view = store.run(name)
        said = view.activity() if view.owner_alive else None
        if said is None:
            return Workers(at=None, phase="", done=0, total=0, deaths=0, busy_share=None, workers=[])
        return Workers(at=said[0], **said[1])


def _merge_of(recipe: Recipe) -> Recipe:
    """Return the merge whose parameters vary over depth; of a path, the one that it runs through."""
    inner = recipe.reference.recipe if recipe.path else None
    return recipe if inner is None else inner
