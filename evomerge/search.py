"""The loop: score the baselines, search, choose among the finalists, measure the winner.

Everything that happened is in the store before anything that follows from it: a candidate before it is
submitted, an outcome before the optimizer is told. So a run that was killed at any moment goes on from
there, and a generational optimizer goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from evomerge.crew import Crew, Health
from evomerge.errors import FitnessError
from evomerge.faults import reached
from evomerge.fitness.measures import SECONDS
from evomerge.fitness.racing import Race, Races
from evomerge.fitness.selection import finalists, kept_baselines, search_score, winner
from evomerge.optimizers import Optimizer
from evomerge.plan import Plan
from evomerge.progress import Activity, Progress
from evomerge.recipe import Recipe
from evomerge.records import Candidate, DocumentSet, Genome, Outcome, Proposal
from evomerge.replay import replay
from evomerge.store import Run, Snapshot
from evomerge.workers.pool import Job, Pool

HEARTBEAT_SECONDS = 10.0


class Search:
    """Drives one run.

    Args:
        run: The driver's handle.
        plan: The run's plan.
        pool: Started workers.
        listener: Called after each outcome.
        notice: Called with lines for people.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        pool: Pool,
        listener: Callable[[Progress], None] = lambda progress: None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._run, self._plan, self._pool, self._listener = run, plan, pool, listener
        self._crew = Crew(run, pool, notice)
        self._activity = Activity(run, pool)
        self._candidates = {candidate.number: _slim(candidate) for candidate in run.candidates()}
        self._fresh: dict[int, Mapping[str, Any]] = {}
        known = run.outcomes(values=False)
        self._outcomes = {(outcome.candidate, outcome.documents): outcome for outcome in known}
        self._beat = self._started = time.monotonic()
        self._health = Health(known)
        self._told = 0
        self._phase, self._done, self._total = "", 0, 0
        self._best: float | None = None
        self._since_best = 0
        racing = plan.config.fitness.racing
        self._races = None if racing is None else Races(racing.rungs, racing.error)
        self._notes = {
            event.data.get("note", event.data.get("reason"))
            for event in run.events(kind=("optimizer", "optimizer_finished"))
        }
        self._recorded: set[str] = set()
        # What a callable does is not all in its file, so another run may have done something else; seconds
        # are those of one machine at one time.
        timed = any(rule.metric == SECONDS for rule in plan.rules.values())
        self._alike = run.alike() if plan.tasks is not None and not timed else []
        self.stopping = False

    def run(self) -> bool:
        """Go on to the end; return False if it was stopped before."""
        for key, ids in self._plan.document_sets().items():
            self._record_documents(key, ids)
        seeded = self._add_seeded()
        self._score("baselines", [(number, "search") for number in seeded])
        if not self.stopping:
            optimizer = self._search(seeded)
        if not self.stopping:
            self._finish(optimizer)
        return not self.stopping

    def _add_seeded(self) -> list[int]:
        """Record the baselines and start recipes; they have the first numbers of the run."""
        wanted = self._plan.seeded
        for number, seeded in enumerate(wanted):
            if number not in self._candidates:
                self._add(seeded.origin, seeded.recipe, genome=seeded.genome)
        return list(range(len(wanted)))

    def _add(
        self,
        origin: str,
        recipe: Recipe,
        *,
        genome: Genome | None = None,
        generation: int = 0,
        index: int | None = None,
    ) -> Candidate:
        number = len(self._candidates)
        candidate = Candidate(number, origin, generation, index, genome, recipe.to_json(), recipe.digest)
        self._run.add_candidate(candidate, self._told)
        reached("candidate_recorded")
        self._candidates[number] = _slim(candidate)
        self._fresh[number] = candidate.recipe
        return candidate

    # The search proper.

    def _search(self, seeded: Sequence[int]) -> Optimizer:
        """Ask and tell until the budget is spent."""
        self._record_phase("search")
        optimizer, owed = self._resumed(seeded)
        reached("replayed")
        budget = self._plan.config.budget
        self._total = budget.evaluations
        self._done = optimizer.asked - len(owed)

        def source() -> Iterator[tuple[int, str] | None]:
            while not self.stopping:
                if owed:
                    yield owed.popleft()
                    continue
                if optimizer.asked >= budget.evaluations or self._out_of_patience():
                    return
                proposal = optimizer.ask()
                if proposal is None and optimizer.finished:
                    return
                yield None if proposal is None else self._proposed(proposal)

        def told(outcome: Outcome) -> None:
            candidate = self._candidates[outcome.candidate]
            self._tell(optimizer, candidate, outcome)

        self._drive(source(), told)
        if not self.stopping and optimizer.finished and optimizer.finished not in self._notes:
            self._run.add_event("optimizer_finished", {"reason": optimizer.finished})
        return optimizer

    def _proposed(self, proposal: Proposal) -> tuple[int, str]:
        reached("asked")
        recipe = self._plan.space.decode(proposal.genome)
        candidate = self._add(
            "optimizer",
            recipe,
            genome=proposal.genome,
            generation=proposal.generation,
            index=proposal.index,
        )
        return candidate.number, self._documents_of(candidate)

    def _documents_of(self, candidate: Candidate) -> str:
        """Return the key of the search documents that a proposal is scored on."""
        resample = self._plan.config.fitness.resample
        documents = DocumentSet("search", None if resample is None else candidate.generation)
        if documents.key not in self._recorded and self._plan.tasks is not None:
            self._record_documents(documents.key, self._plan.tasks.documents(documents))
        return documents.key

    def _record_documents(self, key: str, ids: Mapping[str, Sequence[int]]) -> None:
        self._run.add_document_set(key, ids)
        reached("documents_recorded")
        self._recorded.add(key)

    def _tell(self, optimizer: Optimizer, candidate: Candidate, outcome: Outcome) -> None:
        if candidate.index is None:
            raise ValueError(f"candidate {candidate.number} was not proposed by the optimizer")
        optimizer.tell(candidate.index, outcome.score, outcome.values)
        reached("optimizer_told")
        self._told += 1
        state = optimizer.state()
        snapshot = None if state is None else Snapshot(optimizer.asked, self._told, state)
        # Before the tell: after it nothing would say a lost note again.
        self._add_notes(optimizer)
        self._run.tell([candidate.number], outcome.documents, snapshot)
        reached("tell_recorded")
        self._note_best(outcome)

    def _add_notes(self, optimizer: Optimizer) -> None:
        """Record what the optimizer did by itself; a replay on resume says some of it again."""
        for note in optimizer.drain_notes():
            if note not in self._notes:
                self._notes.add(note)
                self._run.add_event("optimizer", {"note": note})

    def _note_best(self, outcome: Outcome) -> None:
        self._since_best += 1
        score = outcome.score if outcome.status == "ok" else None
        if score is not None and (self._best is None or score > self._best):
            self._best, self._since_best = score, 0

    def _resumed(self, seeded: Sequence[int]) -> tuple[Optimizer, deque[tuple[int, str]]]:
        """Return the optimizer as the run left it, and the proposals that still lack an outcome."""
        optimizer = self._plan.optimizer(self._start(seeded))
        self._told, waiting = replay(optimizer, self._run, self._candidates)
        self._add_notes(optimizer)
        for candidate in self._candidates.values():
            if candidate.index is not None:
                outcome = self._outcomes.get((candidate.number, self._documents_of(candidate)))
                if outcome is not None:
                    self._note_best(outcome)
        for outcome in waiting:
            self._tell(optimizer, self._candidates[outcome.candidate], outcome)
        owed = deque(
            (candidate.number, key)
            for candidate in sorted(self._candidates.values(), key=lambda c: c.number)
            if candidate.index is not None
            and (candidate.number, key := self._documents_of(candidate)) not in self._outcomes
        )
        return optimizer, owed

    def _start(self, seeded: Sequence[int]) -> Genome | None:
        """Return the genome of the best start recipe, the first of equals."""
        scored = [
            (self._outcomes[number, "search"].score, -number)
            for number in seeded
            if self._candidates[number].genome is not None
        ]
        found = max(((s, n) for s, n in scored if s is not None), default=None)
        return None if found is None else self._candidates[-found[1]].genome

    def _out_of_patience(self) -> bool:
        budget = self._plan.config.budget
        if budget.patience is not None and self._since_best >= budget.patience:
            return True
        return budget.hours is not None and time.monotonic() - self._started > budget.hours * 3600

    # The end.

    def _finish(self, optimizer: Optimizer) -> None:
        """Score the finalists on the select documents, the winner and the baselines on the test documents."""
        means = self._add_means(optimizer)
        self._score("select", [(number, "search") for number in means])
        candidates = list(self._candidates.values())
        search = search_score(self._outcomes.values())
        # A run that was extended has the means of its earlier ends too; each is a finalist of its own.
        all_means = [c.number for c in candidates if c.origin == "mean"]
        chosen = finalists(candidates, search, self._plan.config.budget.finalists, all_means)
        baselines = kept_baselines(candidates, search)
        owed = [*chosen, *(c.number for c in baselines)]
        self._score("select", [(number, "select") for number in owed])
        best = winner(chosen, self._outcomes)
        if best is None or self.stopping:
            if not self.stopping:
                reasons = [
                    self._outcomes[n, "select"].reason for n in chosen if (n, "select") in self._outcomes
                ]
                first = f"; the first failure: {reasons[0]}" if reasons else ""
                raise FitnessError(f"no finalist could be scored on the select documents{first}")
            return
        looks = [event.data["winner"] for event in self._run.events(kind="test_opened")]
        if best not in looks:
            self._run.add_event("test_opened", {"winner": best, "look": len(looks) + 1})
            reached("test_opened")
        self._score("test", [(number, "test") for number in [best, *(c.number for c in baselines)]])

    def _add_means(self, optimizer: Optimizer) -> list[int]:
        """Record what the optimizer recommends and never asked for; the same again after a resume."""
        numbers = []
        known = {c.digest: c.number for c in self._candidates.values() if c.origin == "mean"}
        for genome in optimizer.recommendation():
            recipe = self._plan.space.decode(genome)
            if recipe.digest not in known:
                generation = max((c.generation for c in self._candidates.values()), default=0)
                candidate = self._add("mean", recipe, genome=genome, generation=generation)
                known[recipe.digest] = candidate.number
            numbers.append(known[recipe.digest])
        return numbers

    # The machinery.

    def _score(self, phase: str, wanted: Sequence[tuple[int, str]]) -> None:
        """Score candidates on document sets, those that lack an outcome."""
        if self.stopping:
            return
        self._record_phase(phase)
        owed = [pair for pair in wanted if pair not in self._outcomes]
        self._total, self._done = len(wanted), len(wanted) - len(owed)

        def source() -> Iterator[tuple[int, str] | None]:
            for pair in owed:
                if self.stopping:
                    return
                yield pair

        self._drive(source(), lambda outcome: None)

    def _drive(self, source: Iterator[tuple[int, str] | None], take: Callable[[Outcome], None]) -> None:
        """Keep the workers busy with what `source` yields; None means that outcomes are needed first."""
        running, exhausted = 0, False
        while True:
            if self.stopping:
                running -= self._pool.withdraw()
            blocked = False
            while not exhausted and not blocked and self._pool.free() > 0:
                try:
                    pair = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if pair is None:
                    blocked = True
                elif (repeat := self._repeat(*pair)) is not None:
                    self._record(repeat, take)
                else:
                    self._pool.submit(self._job(*pair))
                    reached("submitted")
                    running += 1
            if exhausted and not running:
                return
            if blocked and not running:
                raise RuntimeError("the optimizer waits for outcomes, but none is outstanding")
            self._activity.say(self._phase, self._done, self._total)
            for outcome in self._pool.wait(1.0):
                running -= 1
                self._record(outcome, take)
            self._crew.look()
            if time.monotonic() - self._beat > HEARTBEAT_SECONDS:
                self._run.heartbeat()
                self._beat = time.monotonic()

    def _job(self, number: int, documents: str) -> Job:
        candidate = self._candidates[number]
        deadline = self._plan.config.workers.deadline_seconds * self._length(documents)
        recipe = self._fresh.pop(number, None) or self._run.candidate(number).recipe
        return Job(number, recipe, documents, deadline, self._race(candidate, documents))

    def _race(self, candidate: Candidate, documents: str) -> Race | None:
        """Return what a proposal is raced against; None: it is scored to the end, as all finalists are."""
        if self._races is None or candidate.index is None or documents != "search":
            return None
        last = candidate.generation - 1
        recent = takewhile(
            lambda c: c.index is None or c.generation >= last, reversed(self._candidates.values())
        )
        parents = [c.number for c in recent if c.index is not None and c.generation == last][::-1]
        before = ((number, self._outcomes.get((number, "search"))) for number in parents)
        return self._races.of(candidate.generation, before, self._whole)

    def _whole(self, number: int) -> Outcome | None:
        """Return a candidate's search outcome with its values."""
        return self._run.find_outcome(self._candidates[number].digest, self._plan.fitness_digest, "search")

    def _length(self, documents: str) -> float:
        """Return how many times longer a document set is than the search documents, at least 1."""
        tasks = self._plan.tasks
        if tasks is None:
            return 1.0
        counts = [
            sum(map(len, tasks.documents(DocumentSet.of_key(key)).values())) for key in (documents, "search")
        ]
        return max(1.0, counts[0] / counts[1])

    def _repeat(self, number: int, documents: str) -> Outcome | None:
        """Return the outcome of an equal recipe on the same documents, if this run or one alike has it."""
        digest = self._candidates[number].digest
        found = self._run.find_outcome(digest, self._plan.fitness_digest, documents, self._alike)
        return None if found is None else replace(found, candidate=number, cost={})

    def _record(self, outcome: Outcome, take: Callable[[Outcome], None]) -> None:
        reached("outcome_received")
        self._run.add_outcome(outcome, self._plan.fitness_digest)
        reached("outcome_recorded")
        self._beat = time.monotonic()
        self._activity.took(outcome)
        # Values of documents are read from the store when they are needed; here they would only pile up.
        self._outcomes[outcome.candidate, outcome.documents] = replace(outcome, values={})
        self._fresh.pop(outcome.candidate, None)
        take(outcome)
        self._done += 1
        self._health.add(outcome)
        state = self._pool.state()
        self._listener(
            Progress(
                *(self._phase, self._done, self._total, self._best, outcome.score, self._health.failures),
                *(state.workers, state.deaths),
            )
        )
        self._health.check()

    def _record_phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._run.add_event("phase", {"phase": phase})
            reached("phase_recorded")


def _slim(candidate: Candidate) -> Candidate:
    """Return a candidate without its recipe, which is read from the store when it is needed again."""
    return replace(candidate, recipe={})
