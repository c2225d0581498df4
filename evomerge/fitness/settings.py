"""The `fitness` section of a run config. No torch, no lm-eval."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from evomerge.errors import nearest
from evomerge.fitness.measures import MEASURES
from evomerge.strict import StrictModel


class DocumentCounts(StrictModel):
    """How many documents of a task go to each split; the splits never share a document.

    Attributes:
        search: Scored for every candidate.
        select: Scored for the finalists and the baselines, to choose the winner.
        test: Scored at the very end, to report; `rest`: all that are left.
    """

    search: int = Field(default=100, ge=1)
    select: int = Field(default=100, ge=1)
    test: int | Literal["rest"] = "rest"

    @field_validator("test")
    @classmethod
    def _at_least_one(cls, test: int | str) -> int | str:
        if isinstance(test, int) and test < 1:
            raise ValueError(f"expected at least 1 or rest, got {test}")
        return test


class TaskSettings(StrictModel):
    """One lm-eval task or group.

    Attributes:
        name: As lm-eval knows it.
        weight: Its share in the score.
        metric: The metric to search for, such as `acc_norm`; None: the task's first. Besides the task's own:
            `gold_loglikelihood` (of the right answer, per byte), `output_tokens` (length of the answers),
            `layers` (of the model) and `seconds` (per document; equal recipes then score differently).
        also: Such a measure to its weight in the score beside the metric; a tiny weight breaks ties.
        filter: The filter whose answers are scored; None: the task's first.
        num_fewshot: Examples in the prompt; None: as the task says.
        documents: Counts for this task; None: those of the fitness section. For a group they are shared
            out among its tasks in proportion to their sizes.
    """

    name: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    metric: str | None = None
    also: dict[str, float] = Field(default_factory=dict)
    filter: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    documents: DocumentCounts | None = None

    @model_validator(mode="before")
    @classmethod
    def _split_metric(cls, data: Any) -> Any:
        """Accept a bare name, and lm-eval's `metric,filter`."""
        if isinstance(data, str):
            return {"name": data}
        if isinstance(data, dict) and isinstance(data.get("metric"), str) and "," in data["metric"]:
            metric, _, filter_name = data["metric"].partition(",")
            return {**data, "metric": metric, "filter": data.get("filter") or filter_name}
        return data

    @field_validator("also")
    @classmethod
    def _known_measures(cls, also: dict[str, float]) -> dict[str, float]:
        for name, weight in also.items():
            if name not in MEASURES:
                raise ValueError(f'unknown measure "{name}"{nearest(name, MEASURES)}')
            if not 0 < weight < float("inf"):
                raise ValueError(f"{name}: expected a weight above 0, got {weight}")
        return also

    @model_validator(mode="after")
    def _measured_once(self) -> Self:
        if self.metric in self.also:
            raise ValueError(f"also: {self.metric} is the metric already")
        return self


class RacingSettings(StrictModel):
    """Stop scoring a candidate that cannot come among the parents; see `fitness.racing`.

    Attributes:
        rungs: Shares of the search documents after which a candidate is compared, ascending.
        error: Probability of stopping a candidate that would have come out above the last parent of the
            generation before.
    """

    rungs: tuple[float, ...] = Field(default=(0.25, 0.5), min_length=1, max_length=10)
    error: float = Field(default=0.05, gt=0, lt=0.5)

    @field_validator("rungs")
    @classmethod
    def _ascending(cls, rungs: tuple[float, ...]) -> tuple[float, ...]:
        if list(rungs) != sorted(set(rungs)) or not 0 < rungs[0] <= rungs[-1] < 1:
            raise ValueError(f"expected ascending shares between 0 and 1, got {list(rungs)}")
        return rungs


class FitnessSettings(StrictModel):
    """How candidates are scored: lm-eval tasks, or one Python callable.

    Attributes:
        tasks: The tasks; the score is the weighted mean of their metrics, negated where lower is better.
        function: `module:name` or `path/to/file.py:name` of a callable instead of tasks; see
            `fitness.function`.
        include_paths: Directories with task files of your own, relative to the config.
        trust_code: Those of them whose Python code may run; needed where a task file uses `!function`.
        allow_unsafe_code: Allow tasks that execute what a model writes.
        documents: Document counts per task.
        resample: Draw this many search documents per task anew for each generation; None: always all.
        racing: Stop hopeless candidates early, with `optimizer: cma_es`; None: score all to the end.
        chat_template: Wrap prompts in the tokenizer's chat template.
        system_prompt: Put before every prompt.
        fewshot_as_multiturn: Give the examples as turns of a conversation; None: with a chat template, as
            the stock command does.
        batch_tokens: Most padded tokens in one forward pass; None: as many as fit into free memory.
            Give a number where workers on unlike GPUs must agree in the last digit.
        share_prefixes: Forward what requests begin with alike (few-shot examples, the question before its
            choices) once per candidate.
    """

    tasks: tuple[TaskSettings, ...] = ()
    function: str | None = Field(default=None, pattern=r"^[^:]+:[A-Za-z_][A-Za-z0-9_]*$")
    include_paths: tuple[str, ...] = ()
    trust_code: tuple[str, ...] = ()
    allow_unsafe_code: bool = False
    documents: DocumentCounts = DocumentCounts()
    resample: int | None = Field(default=None, ge=1)
    racing: RacingSettings | None = None
    chat_template: bool = False
    system_prompt: str | None = None
    fewshot_as_multiturn: bool | None = None
    batch_tokens: int | None = Field(default=None, ge=64)
    share_prefixes: bool = True

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.tasks) == bool(self.function):
            raise ValueError("give either tasks or a function")
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'tasks: "{name}" is listed twice')
        for path in self.trust_code:
            if path not in self.include_paths:
                raise ValueError(f'trust_code: "{path}" is not one of include_paths')
        if self.racing and (self.function or self.resample):
            other = "a function" if self.function else "resample"
            raise ValueError(f"racing: needs tasks whose search documents stay the same; leave out {other}")
        if self.resample is not None:
            if self.function:
                raise ValueError("resample: needs tasks")
            for task in self.tasks:
                search = (task.documents or self.documents).search
                if self.resample > search:
                    raise ValueError(
                        f"resample: {self.resample} exceeds the {search} search documents of {task.name}"
                    )
        return self
