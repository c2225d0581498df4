"""The web application: routes, errors in one shape, and what starts and ends with it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from evomerge import __version__
from evomerge.errors import ConfigError, ConflictError, LimitError, MissingError, StoreError, UserError
from evomerge.service.admission import key_of
from evomerge.service.feed import Hub
from evomerge.service.guard import Guard, error_body
from evomerge.service.launcher import Launcher, LocalLauncher
from evomerge.service.metrics import Metrics
from evomerge.service.models import ErrorAnswer, Health, Info
from evomerge.service.parts import Parts
from evomerge.service.ray_launcher import RayLauncher
from evomerge.service.routes import configs, exports, results, runs
from evomerge.service.settings import ServiceSettings
from evomerge.service.shown import ShownRuns
from evomerge.service.supervisor import Supervisor
from evomerge.store import Store
from evomerge.store.jobs import JobQueue

PREFIX = "/api/v1"
STATIC = Path(__file__).parent / "static"

_log = logging.getLogger(__name__)

_KINDS: tuple[tuple[type[UserError], int, str], ...] = (
    (MissingError, 404, "missing"),
    (ConflictError, 409, "conflict"),
    (LimitError, 429, "busy"),
    (StoreError, 503, "store"),
    (ConfigError, 422, "config"),
    (UserError, 422, "input"),
)
"""The HTTP status and kind of each of our errors; the first that fits."""


def make_parts(settings: ServiceSettings) -> Parts:
    """Open the store and return the parts, none of them started."""
    launcher: Launcher = LocalLauncher()
    if settings.ray_address is not None:
        launcher = RayLauncher(settings.ray_address, settings.ray_python)
    store = Store.open(settings.store)
    queue = JobQueue(store, settings.identity)
    supervisor = Supervisor(settings, store, queue, launcher)
    hub = Hub(store, settings.most_watchers)
    return Parts(settings, store, queue, supervisor, hub, Metrics(store, queue, hub), ShownRuns(store))


def make_app(parts: Parts) -> Guard:
    """Return the application over parts; its lifespan starts and ends the supervisor."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        parts.supervisor.start()
        try:
            yield
        finally:
            parts.supervisor.close()
            parts.store.close()

    answers: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorAnswer} for code in (400, 401, 403, 404, 405, 408, 409, 413, 421, 422, 429, 503)
    }
    app = FastAPI(
        title="evomerge",
        version=__version__,
        summary="Submit searches for merge recipes, watch them, and take their winners away.",
        lifespan=lifespan,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        responses=answers,
    )
    _add_errors(app)
    api = APIRouter(prefix=PREFIX)
    api.include_router(_about(parts))
    for module in (configs, runs, results, exports):
        api.include_router(module.router(parts))
    app.include_router(api)
    _add_metrics(app, parts.metrics)
    _add_dashboard(app)
    return Guard(app, parts.settings, parts.metrics.observe)


def _about(parts: Parts) -> APIRouter:
    routes = APIRouter(tags=["service"])

    @routes.get("/health")
    def health() -> Health:
        """Say that the service works. The only route without a token."""
        return Health(status="ok", version=__version__)

    @routes.get("/info")
    def info() -> Info:
        """Say what this service is and allows."""
        settings = parts.settings
        return Info(
            version=__version__,
            store=parts.store.location,
            roots=[str(root) for root in settings.roots],
            launcher="local" if settings.ray_address is None else "ray",
            at_once=settings.at_once,
            restarts=settings.restarts,
            running=len(parts.queue.jobs("running")),
            queued=len(parts.queue.jobs("queued")),
            watchers=parts.hub.watchers,
            most_download=settings.most_download,
        )

    return routes


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    def prometheus() -> Response:
        """Return figures of the service and its runs for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_dashboard(app: FastAPI) -> None:
    """Serve the dashboard's files; they hold no data and need no token."""

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def ours(request: Request, problem: UserError) -> JSONResponse:
        del request
        status, kind = next((s, k) for cls, s, k in _KINDS if isinstance(problem, cls))
        about_keys = isinstance(problem, ConfigError)
        told = [{"message": line, "key": key_of(line) if about_keys else None} for line in problem.lines]
        return JSONResponse(error_body(kind, str(problem), told[0]["key"], told[1:]), status)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        if first["loc"][0] == "path":
            return JSONResponse(error_body("missing", f"there is nothing at {request.url.path}"), 404)
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse(error_body("input", f"{place}: {first['msg']}"), 422)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, problem: HTTPException) -> JSONResponse:
        kind = {404: "missing", 405: "method"}.get(problem.status_code, "input")
        line = f"{request.method} {request.url.path}: {problem.detail}"
        return JSONResponse(error_body(kind, line), problem.status_code, headers=problem.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, problem: Exception) -> JSONResponse:
        _log.error("%s %s", request.method, request.url.path, exc_info=problem)
        return JSONResponse(error_body("internal", "the service met a fault of its own; see its log"), 500)
