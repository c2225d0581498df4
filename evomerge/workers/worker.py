"""What one worker does with one job: build the model, score it, and answer with an outcome.

It never raises for a bad candidate: the candidate's fault comes back as an outcome.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import torch

from evomerge.checkpoints.opening import open_checkpoint
from evomerge.errors import CandidateError, EvomergeError
from evomerge.fitness.function import evaluate_function, load_function
from evomerge.fitness.harness import Evaluation, Harness
from evomerge.fitness.racing import Race
from evomerge.fitness.tasks import TaskSet
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe, parse_recipe
from evomerge.records import DocumentSet, Outcome
from evomerge.workers.pool import Job
from evomerge.workers.settings import WorkerSpec


class Worker:
    """Owns one device and one live model.

    Args:
        spec: What to load; the first job pays for building the model.

    Raises:
        UserError: A source or task does not work; weights that are not finite are found here.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        base_dir = Path(spec.base_dir)
        opened = {ref.name: open_checkpoint(ref.path, ref.revision, base_dir) for ref in spec.sources}
        for checkpoint in opened.values():
            checkpoint.scan_finite()
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._live = LiveModel(
            {ref.identity: opened[ref.name] for ref in spec.sources},
            opened[spec.reference],
            opened[spec.tokenizer],
            device=device,
            dtype=spec.dtype,
            budget_bytes=None if spec.memory_gib is None else int(spec.memory_gib * 2**30),
        )
        self._function = load_function(spec.fitness.function, base_dir) if spec.fitness.function else None
        self._tasks = None if self._function else TaskSet(spec.fitness, spec.seed, base_dir)
        self._harness: Harness | None = None

    def run(self, job: Job) -> Outcome:
        """Build and score one candidate."""
        started = time.perf_counter()
        try:
            return self._run(job, started)
        except CandidateError as problem:
            return self._failed(job, "invalid", str(problem), started)
        except EvomergeError as problem:
            return self._failed(job, "failed", str(problem), started)
        # Whatever a task or callable raises, `sys.exit` too, costs this candidate only.
        except (Exception, SystemExit) as problem:
            place = traceback.extract_tb(problem.__traceback__)[-1]
            text = (str(problem).splitlines() or [""])[0]
            reason = f"{type(problem).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
            return self._failed(job, "failed", reason, started)

    def _run(self, job: Job, started: float) -> Outcome:
        recipe = parse_recipe(dict(job.recipe), "recipe")
        self._live.apply(recipe)
        self._live.model.eval()  # a callable may have left it in training mode
        merged = time.perf_counter()
        evaluation = self._evaluate(recipe, DocumentSet.of_key(job.documents), job.race)
        ended = time.perf_counter()
        return Outcome(
            candidate=job.candidate,
            documents=job.documents,
            status="stopped" if evaluation.stopped else "ok",
            score=evaluation.score,
            stderr=evaluation.stderr,
            tasks=evaluation.tasks,
            values=evaluation.values,
            cost={
                "merge": merged - started,
                "evaluate": ended - merged,
                "total": ended - started,
                **evaluation.counts,
            },
        )

    def _evaluate(self, recipe: Recipe, documents: DocumentSet, race: Race | None) -> Evaluation:
        live = self._live
        if self._function is not None:
            return evaluate_function(
                self._function, live.model, live.tokenizer, recipe, documents, self._spec.seed
            )
        if self._tasks is None:
            raise ValueError("a worker has neither tasks nor a function")
        if self._harness is None:
            self._harness = Harness(self._tasks, live.model, live.tokenizer)
        self._harness.rebind(live.model)
        return self._harness.evaluate(documents, race)

    @staticmethod
    def _failed(job: Job, status: str, reason: str, started: float) -> Outcome:
        seconds = time.perf_counter() - started
        return Outcome(
            candidate=job.candidate,
            documents=job.documents,
            status="invalid" if status == "invalid" else "failed",
            reason=reason,
            cost={"total": seconds},
        )
