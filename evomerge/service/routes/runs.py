"""Routes of runs: list, submit, show, watch, end, go on."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from evomerge.config import NAME
from evomerge.errors import MissingError
from evomerge.report.overview import overview
from evomerge.service import jobs
from evomerge.service.feed import EventStream
from evomerge.service.models import (
    Cancellation,
    CandidatePage,
    CandidateWhole,
    Resumption,
    RunLine,
    RunName,
    RunPage,
    RunStatus,
    Submission,
)
from evomerge.service.parts import Parts
from evomerge.store.pages import Sort, Status, candidate_page, whole_candidate

MOST = 2**31 - 1
Key = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        description="A repeated submission with the same key makes no second run.",
    ),
]
Number = Annotated[int, Query(ge=0, le=MOST)]
After = Annotated[int, Query(ge=0, le=MOST, description="Id of the last event that you have.")]


def router(parts: Parts) -> APIRouter:
    """Return the routes over a service's parts."""
    routes = APIRouter(prefix="/runs", tags=["runs"])
    store = parts.store

    @routes.get("")
    def list_runs(
        status: RunStatus | None = None,
        after: Annotated[str | None, Query(pattern=NAME, description="`next` of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> RunPage:
        """List runs, the newest first: those in the store, and those that wait."""
        found = overview(store, status=status, after=after, limit=limit, newest_first=True)
        return RunPage.model_validate(found)

    @routes.post("", status_code=201, responses={200: {"model": RunLine, "description": "Known already"}})
    def submit_run(wish: Submission, response: Response, idempotency_key: Key = None) -> RunLine:
        """Queue a run. Submitting the same again returns the same run (200 instead of 201)."""
        line, new = jobs.submit(parts, wish, idempotency_key)
        response.status_code = 201 if new else 200
        return RunLine.model_validate(line)

    @routes.get("/{name}")
    def show_run(name: RunName) -> dict[str, Any]:
        """Show what a run found: what `evomerge show --json` prints."""
        return dict(parts.shown.get(name))

    @routes.post("/{name}/cancel")
    def cancel_run(name: RunName, wish: Cancellation | None = None) -> RunLine:
        """End a run after the candidates that are running, or at once; one that waits leaves the queue."""
        return RunLine.model_validate(jobs.cancel(parts, name, now=wish.now if wish else False))

    @routes.post("/{name}/resume")
    def resume_run(name: RunName, wish: Resumption | None = None) -> RunLine:
        """Go on with a run that has ended, with another budget or number of workers if wanted."""
        return RunLine.model_validate(jobs.resume(parts, name, wish or Resumption()))

    _add_progress(routes, parts)
    return routes


def _add_progress(routes: APIRouter, parts: Parts) -> None:
    store = parts.store

    @routes.get("/{name}/candidates")
    def list_candidates(
        name: RunName,
        status: Status | None = None,
        sort: Sort = "number",
        descending: bool = False,
        offset: Number = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> CandidatePage:
        """List candidates with their outcomes; sorted by score, those without one come last."""
        view = store.run(name)
        found = candidate_page(
            store, view, status=status, sort=sort, descending=descending, offset=offset, limit=limit
        )
        return CandidatePage.model_validate(found)

    @routes.get("/{name}/candidates/{number}")
    def show_candidate(name: RunName, number: int) -> CandidateWhole:
        """Show one candidate with genome and recipe."""
        if not 0 <= number <= MOST:
            raise MissingError(f'run "{name}": there is no candidate {number}')
        return CandidateWhole.model_validate(whole_candidate(store, store.run(name), number))

    @routes.get(
        "/{name}/events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"example": EVENTS}}}},
    )
    async def follow_events(
        name: RunName, after: After = 0, last_event_id: Annotated[str | None, Header()] = None
    ) -> Any:
        """Follow a run as server-sent events, from the beginning or behind an event that you have.

        Events of the run's log have an id. `state` has the run's line whenever it changed, `end` is the last.
        """
        place = after
        if last_event_id is not None and last_event_id.isdecimal():
            place = min(int(last_event_id), MOST)
        return EventStream(parts.hub, await parts.hub.watch(name), place)


EVENTS = (
    'event: state\ndata: {"name":"demo-0","status":"running","candidates":12,"best_search_score":0.71}\n\n'
    'id: 17\nevent: outcome\ndata: {"id":17,"at":1760000000.0,"kind":"outcome","data":{"candidate":11,'
    '"documents":"search","status":"ok","score":0.71}}\n\n'
    'event: end\ndata: {"status":"finished"}\n\n'
)
