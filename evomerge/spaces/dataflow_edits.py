"""Layer paths as a few edits of the first source: few genes, of which most are whole numbers or choices.

A search over single inputs (arXiv 2507.07996) found that programs that help are contiguous, and two thirds of
them at most two layers long; that is what this space can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evomerge.errors import ConfigError
from evomerge.paths import LayerPath
from evomerge.records import Genome
from evomerge.spaces.dataflow import PathSpace, Stacks
from evomerge.spaces.dataflow_settings import LayerEditsSettings
from evomerge.spaces.dimensions import Dimension, check_genome

Layers = list[tuple[str, int]]
Kind = Literal["real", "integer", "categorical"]


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit.

    Attributes:
        operation: `skip`, `repeat`, `borrow` or `insert`.
        first: First layer of the stretch in the first source.
        end: The layer behind its last.
        other: Whose layers are borrowed or inserted; empty for the first source.
        scale: Of the hidden state before the stretch that the edit puts in; taken back behind it.
    """

    operation: str
    first: int
    end: int
    other: str = ""
    scale: float = 1.0


class LayerEditsSpace(PathSpace):
    """Each edit has an operation (the first choice is none), a place, a length, and where needed a source.

    Edits never touch the first and the last layer. They hold for layers of the first source as they are
    before any edit; where two overlap, the layers they share belong to the one with the lower number.
    """

    def __init__(self, settings: LayerEditsSettings, stacks: Stacks) -> None:
        super().__init__(settings, stacks)
        self.settings = settings
        self.depth = stacks.counts[stacks.first]
        if self.depth < 3:
            raise ConfigError(
                f"space: {stacks.first} has {self.depth} layers; edits leave the first and the last one alone"
            )
        self.others = tuple(ref.name for ref in stacks.refs[1:])
        alone = {"borrow", "insert"} & set(settings.operations)
        if alone and not self.others:
            raise ConfigError(f"space.operations: {min(alone)} needs a second source")
        self.operations = ("none", *settings.operations)
        self._kinds = self._genes_of_an_edit()
        self.dimensions = tuple(
            Dimension(f"edit {number + 1} {label}", *kind)
            for number in range(settings.edits)
            for label, kind in self._kinds.items()
        )

    def _genes_of_an_edit(self) -> dict[str, tuple[Kind, int]]:
        inner = self.depth - 2
        kinds: dict[str, tuple[Kind, int]] = {
            "operation": ("categorical", len(self.operations)),
            "first": ("integer", inner),
            "length": ("integer", min(self.settings.longest, inner)),
        }
        if len(self.others) > 1 and {"borrow", "insert"} & set(self.operations):
            kinds["source"] = ("categorical", len(self.others))
        if self.settings.scale_range:
            kinds["scale"] = ("real", 0)
        return kinds

    @property
    def title(self) -> str:
        """What it searches, for people."""
        count = self.settings.edits
        return f"layer paths of up to {count} edit{'s' if count > 1 else ''} of {self.stacks.first}"

    def centre(self) -> Genome:
        """Return the genome of the first source as it is: no edit, the places spread evenly."""
        genes: list[float] = []
        for number in range(self.settings.edits):
            for label, (_, size) in self._kinds.items():
                if label == "first":
                    genes.append(float((2 * number + 1) * size // (2 * self.settings.edits)))
                else:
                    genes.append(0.5 if label == "scale" else 0.0)
        return tuple(genes)

    def edits(self, genome: Genome) -> list[Edit]:
        """Return the edits of a genome that do something, cut to layers that no earlier one has."""
        check_genome(self.dimensions, genome)
        taken: set[int] = set()
        found: list[Edit] = []
        width = len(self._kinds)
        for number in range(self.settings.edits):
            genes = dict(zip(self._kinds, genome[number * width :], strict=False))
            operation = self.operations[int(genes["operation"])]
            if operation == "none":
                continue
            first = 1 + int(genes["first"])
            end = min(first + 1 + int(genes["length"]), self.depth - 1)
            end = next((layer for layer in range(first, end) if layer in taken), end)
            if end <= first:
                continue
            taken |= set(range(first, end))
            other = ""
            if operation in ("borrow", "insert"):
                other = self.others[int(genes.get("source", 0))]
            scale = 1.0 + self.settings.scale_range * (2.0 * genes.get("scale", 0.5) - 1.0)
            found.append(Edit(operation, first, end, other, scale))
        return sorted(found, key=lambda edit: edit.first)

    def path(self, genome: Genome) -> LayerPath:
        """Return the path of a genome; if it is too long, edits from the last one on are left out.

        Raises:
            ValueError: The genome is not in the dimensions' coding.
        """
        edits = self.edits(genome)
        while True:
            steps = self._steps(edits)
            if self.longest is None or len(steps) <= self.longest or not edits:
                return self._path(steps)
            edits.pop()

    def _steps(self, edits: Sequence[Edit]) -> list[tuple[str, int, float]]:
        """Return source, layer and scale of each step."""
        first = self.stacks.first
        steps: list[tuple[str, int, float]] = []
        at, back = 0, 1.0
        for edit in [*edits, Edit("skip", self.depth, self.depth)]:
            own = [(first, layer) for layer in range(at, edit.first)]
            own += [(first, layer) for layer in range(edit.first, edit.end)] * (
                edit.operation in ("repeat", "insert")
            )
            for name, layer in own:
                steps.append((name, layer, back))
                back = 1.0
            put: Layers = []
            if edit.operation != "skip":
                put = [self._of(edit.other or first, layer) for layer in range(edit.first, edit.end)]
            for place, (name, layer) in enumerate(put):
                steps.append((name, layer, back * edit.scale if place == 0 else 1.0))
                back = 1.0 / edit.scale if place == len(put) - 1 else 1.0
            at = edit.end
        return steps

    def _of(self, source: str, layer: int) -> tuple[str, int]:
        """Return the layer of a source at the depth of a layer of the first one."""
        last = self.stacks.counts[source] - 1
        return source, round(layer * last / (self.depth - 1))

    def genome(self, path: LayerPath) -> Genome:
        """Return the genome whose path is nearest to a path: found by trying edits one at a time.

        Raises:
            ConfigError: No genome has these layers in this order.
        """
        wanted = [(step.source, step.layer) for step in path.layers]
        genome = list(self.centre())
        width = len(self._kinds)
        for number in range(self.settings.edits):
            steps = [(step.source, step.layer) for step in self.path(tuple(genome)).layers]
            if steps == wanted:
                return tuple(genome)
            genome[number * width : (number + 1) * width] = self._best_edit(genome, number, wanted)
        if [(step.source, step.layer) for step in self.path(tuple(genome)).layers] != wanted:
            raise ConfigError(
                f"the path is not {self.stacks.first} with up to {self.settings.edits} edits of up to "
                f"{self.settings.longest} layers"
            )
        return tuple(genome)

    def _best_edit(self, genome: Sequence[float], number: int, wanted: Layers) -> list[float]:
        """Return the genes of the edit after which the path agrees longest with the wanted one."""
        width = len(self._kinds)
        own = list(genome[number * width : (number + 1) * width])
        labels = list(self._kinds)
        best, most = own, -1
        sources = range(self._kinds["source"][1]) if "source" in self._kinds else [0]
        for operation in range(1, len(self.operations)):
            for first in range(self._kinds["first"][1]):
                for length in range(self._kinds["length"][1]):
                    for source in sources:
                        genes = dict(zip(labels, own, strict=True))
                        genes |= {"operation": float(operation), "first": float(first)}
                        genes |= {"length": float(length)}
                        if "source" in genes:
                            genes["source"] = float(source)
                        tried = [*genome[: number * width], *genes.values(), *genome[(number + 1) * width :]]
                        steps = [(s.source, s.layer) for s in self.path(tuple(tried)).layers]
                        same = _agreement(steps, wanted)
                        if same > most:
                            best, most = list(genes.values()), same
        return best


def _agreement(one: Layers, other: Layers) -> int:
    """Return how many steps agree from the front; all of the longer one if they are equal."""
    if one == other:
        return max(len(one), len(other)) + 1
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)
