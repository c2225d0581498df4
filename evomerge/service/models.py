"""The bodies of requests and answers, as OpenAPI documents them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from evomerge.config import NAME
from evomerge.store.pages import Status

RunName = Annotated[str, Path(description="Name of the run.", pattern=NAME, examples=["demo-0"])]
Change = Annotated[str, Field(min_length=3, max_length=4096)]
RunStatus = Literal[
    "queued", "starting", "running", "stopped", "failed", "finished", "interrupted", "cancelled"
]

EXAMPLE_CONFIG = {
    "name": "math-and-code",
    "sources": {"base": "./base", "models": ["./math", "./code"]},
    "space": {"method": "ties", "granularity": {"anchors": 3}},
    "fitness": {"tasks": ["gsm8k"]},
    "budget": {"evaluations": 300},
}


class Body(BaseModel):
    """A request's body: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class ConfigBody(Body):
    """A run's config and what its paths are relative to."""

    config: dict[str, Any] | str = Field(
        description="The run's config: a mapping, or the text of a YAML file.", examples=[EXAMPLE_CONFIG]
    )
    folder: str | None = Field(
        default=None,
        max_length=4096,
        description="What its paths are relative to: a folder on the service's machine below one of its "
        "roots, absolute or relative to the first root. Default: the first root.",
        examples=["team-a"],
    )
    changes: list[Change] = Field(
        default_factory=list,
        max_length=100,
        description="Overrides, as `--set` takes them.",
        examples=[["budget.evaluations=50"]],
    )


class Submission(ConfigBody):
    """A run to queue."""

    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher ones start first.")


class Validation(ConfigBody):
    """A config to check."""

    quick: bool = Field(
        default=False,
        description="Check keys, values and permissions only; else sources and tasks are read too.",
    )


class Resumption(Body):
    """How to go on with a run."""

    evaluations: int | None = Field(default=None, ge=1, le=10**9, description="New budget.")
    workers: int | None = Field(default=None, ge=1, le=10_000, description="New number of workers.")
    changes: list[Change] = Field(
        default_factory=list,
        max_length=100,
        description="Other changes of the sections `budget`, `workers` and `output`, as `--set` takes them.",
    )
    accept_drift: bool = Field(default=False, description="Go on although sources or tasks changed.")
    priority: int | None = Field(default=None, ge=-1000, le=1000)


class Cancellation(Body):
    """How to end a run."""

    now: bool = Field(
        default=False, description="At once; else after the candidates that are running. Both can resume."
    )


class ExportWish(Body):
    """What to export."""

    candidate: int | None = Field(default=None, ge=0, le=2**31 - 1, description="Its number [the winner].")


class Fault(BaseModel):
    """One thing that is wrong."""

    key: str | None = Field(
        default=None, description="Path of the config's key at fault.", examples=["space.method"]
    )
    message: str = Field(description="The line that the command would print.")


class ErrorDetail(Fault):
    """What went wrong."""

    kind: str = Field(description="One word for machines.", examples=["config"])
    others: list[Fault] = Field(
        default_factory=list, description="What else is wrong; the last may say how many are left out."
    )


class ErrorAnswer(BaseModel):
    """The one shape of all errors."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether the service works; says nothing about runs."""

    status: Literal["ok"]
    version: str


class Info(BaseModel):
    """What this service is and allows."""

    version: str
    store: str = Field(description="Where its store is, without password.")
    roots: list[str]
    launcher: Literal["local", "ray"]
    at_once: int
    restarts: int
    running: int
    queued: int
    watchers: int
    most_download: int


class RunLine(BaseModel):
    """One line of the list of runs."""

    name: str
    status: RunStatus
    candidates: int = Field(description="Baselines included.")
    evaluations: int = Field(description="How many the optimizer has proposed.")
    budget: int | None = Field(description="How many it may propose; null before the run has begun.")
    best_search_score: float | None = Field(description="Baselines included.")
    created: float = Field(description="Unix seconds.")
    updated: float
    priority: int | None = Field(description="None: begun without the service.")
    error: str


class RunPage(BaseModel):
    """A page of the list of runs."""

    runs: list[RunLine]
    total: int
    next: str | None = Field(description="Give it as `after` for the next page; null at the end.")


class OutcomeRecord(BaseModel):
    """A candidate's outcome on one document set."""

    documents: str
    split: Literal["search", "select", "test"]
    status: Literal["ok", "stopped", "invalid", "failed"]
    score: float | None
    stderr: float | None
    tasks: dict[str, tuple[float, float | None]] = Field(description="Metric and standard error by task.")
    reason: str
    cost: dict[str, float]
    at: float = Field(description="Unix seconds.")


class CandidateLine(BaseModel):
    """One candidate, without genome and recipe."""

    number: int
    origin: str
    generation: int
    index: int | None = Field(description="The optimizer's; null for those that it did not propose.")
    digest: str
    status: Status
    score: float | None = Field(description="On the search documents.")
    outcomes: list[OutcomeRecord]


class CandidatePage(BaseModel):
    """A page of candidates."""

    total: int
    candidates: list[CandidateLine]


class CandidateWhole(CandidateLine):
    """One candidate with all that decides it."""

    genome: list[Any] | None
    recipe: dict[str, Any]


class RunConfigAnswer(BaseModel):
    """A run's config."""

    config: dict[str, Any]
    folder: str = Field(description="What its paths are relative to.")


class DepthParameter(BaseModel):
    """One parameter of a merge, for one group of tensors."""

    parameter: str
    tensors: str = Field(examples=["all tensors"])
    values: dict[str, Any] = Field(
        description="Source, or `merge`, to one value for each layer or to one value."
    )


class PathStep(BaseModel):
    """One layer of a layer path."""

    source: str
    layer: int
    scale: float


class Winner(BaseModel):
    """The winner, or the best so far."""

    best: dict[str, Any] | None = Field(description="As in `GET runs/NAME`.")
    gains: list[dict[str, Any]]
    verdict: str
    layers: int
    parameters: list[DepthParameter]
    path: list[PathStep] = Field(description="Of a layer path; empty for a plain merge.")


class CurvePoint(BaseModel):
    """One evaluation, or some in a row."""

    at: int = Field(description="The last of them, from 1.")
    candidate: int | None = Field(description="Who scored best of them; null if none has a score.")
    score: float | None = Field(description="Its score on the search documents.")
    best: float | None = Field(description="Best so far.")
    mean: float | None = Field(description="Mean of the last 20 scores.")
    failed: int = Field(description="How many of them are invalid or failed.")


class Curve(BaseModel):
    """How the search went. Candidates that racing stopped are left out."""

    evaluations: int
    event: int = Field(description="The newest event of the log then.")
    points: list[CurvePoint]


class RunGain(BaseModel):
    """What a run gained."""

    gain: dict[str, Any] | None = Field(description="Over the best baseline, as in `GET runs/NAME`.")
    verdict: str


class Logs(BaseModel):
    """The end of what a run's driver has written."""

    text: str


class WorkerNow(BaseModel):
    """One worker and what it does."""

    worker: int
    state: Literal["starting", "idle", "busy"]
    candidate: int | None = None
    documents: str | None = None
    since: float | None = Field(default=None, description="Unix seconds.")


class Workers(BaseModel):
    """What a run's workers do, as the driver last said."""

    at: float | None = Field(description="When it said so, in Unix seconds; null: never.")
    phase: str
    done: int
    total: int
    deaths: int
    busy_share: float | None = Field(description="Part of the workers' time in this session spent on jobs.")
    workers: list[WorkerNow]


class ExportFile(BaseModel):
    """One file of an exported model."""

    name: str
    bytes: int
    download: bool = Field(description="Small enough to be sent over HTTP.")


class ExportState(BaseModel):
    """How far an export is."""

    id: int
    run: str
    candidate: int | None
    state: Literal["queued", "running", "done", "failed"]
    path: str = Field(description="On the service's machine.")
    error: str
    created: float
    updated: float
    files: list[ExportFile] = Field(description="Empty until it is done.")


class Exports(BaseModel):
    """A run's exports."""

    exports: list[ExportState]
