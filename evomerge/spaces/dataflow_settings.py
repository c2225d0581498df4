"""The `space` section of runs that search layer paths."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from evomerge.recipe import Dtype
from evomerge.strict import StrictModel

Scales = Literal["none", "slot", "matrix", "network"]
Operation = Literal["skip", "repeat", "borrow", "insert"]


class PathSettings(StrictModel):
    """What all spaces of layer paths have in common.

    Attributes:
        max_layers: Most layers of a path; memory for keys and values grows with it. None: no limit.
        max_parameters: Most parameters of the exported model; None: no limit.
        dtype: Of the exported weights; None: as in the sources.
        tokenizer: None, or the first source: embedding, head and tokenizer are always its own.
    """

    max_layers: int | None = Field(default=None, ge=2)
    max_parameters: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    tokenizer: str | None = None

    @property
    def scaled(self) -> bool:
        """Whether paths may have scales."""
        return False


class DataFlowSettings(PathSettings):
    """Layer paths as in arXiv 2403.13187, section 3.2: which slots of a long sequence of layers are used.

    The sequence has all layers of all sources in order, `repeats` times. A path begins with the first layer
    of the first source and ends with its last. The search starts at the first source as it is.

    Attributes:
        kind: `data_flow`.
        repeats: How often the sequence of layers is repeated; each layer can be used as often.
        scales: Of the hidden state before each layer: `none`, one number for each `slot`, a `matrix` with
            one for each pair of layers, or a small `network` of both layers' numbers and the step.
        scale_range: Scales lie within 1 minus and 1 plus this; above 1 they may be negative.
        hidden: Units of the network.
        unused: How far below use a slot lies at the start that is not used then, in sixths of its range: at
            2 one candidate in 44 uses it, at the paper's 0 every second.
    """

    kind: Literal["data_flow"]
    repeats: int = Field(default=1, ge=1, le=20)
    scales: Scales = "slot"
    scale_range: float = Field(default=0.5, gt=0, le=10)
    hidden: int = Field(default=4, ge=1, le=64)
    unused: float = Field(default=2.0, ge=0, le=2.9)

    @property
    def scaled(self) -> bool:
        """Whether paths may have scales."""
        return self.scales != "none"


class LayerEditsSettings(PathSettings):
    """Layer paths as a few edits of the first source: stretches of consecutive layers.

    Attributes:
        kind: `layer_edits`.
        edits: Most edits of one path.
        longest: Most layers of one edit.
        operations: What an edit may do: `skip` the stretch, `repeat` it, `borrow` the same layers of another
            source in its place, or `insert` them behind it.
        scale_range: Where above 0, each edit has a scale within 1 minus and 1 plus this, of the hidden state
            before its stretch; the layer behind it takes it back.
    """

    kind: Literal["layer_edits"]
    edits: int = Field(default=2, ge=1, le=16)
    longest: int = Field(default=4, ge=1, le=64)
    operations: tuple[Operation, ...] = ("skip", "repeat", "borrow")
    scale_range: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def scaled(self) -> bool:
        """Whether paths may have scales."""
        return self.scale_range > 0

    @field_validator("operations")
    @classmethod
    def _distinct(cls, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if not operations or len(set(operations)) != len(operations):
            raise ValueError(f"expected distinct operations, at least one, got {list(operations)}")
        return operations
