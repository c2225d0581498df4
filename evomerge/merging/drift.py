"""How far sources are from their base before anything is merged: whether a merge of them can work at all.

Every tensor of every model is read once, in turn; memory holds a few tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.merging.locks import GroupDrift, Pair, ratio

LARGE_DRIFT = 0.1
"""Drift of a part, relative to the base's norm, above which it is large. Fine-tuning stays below, alike in
all parts; continued pre-training does not, and there few entries can stand for a whole delta (DARE)."""

REPLACED_DRIFT = 1.0
"""Drift above which nothing of the base's part need be left: unrelated matrices of one norm give 1.41, the
sides of a random change of basis 0.8 to 3."""

UNRELATED_COSINE = 0.2
"""Cosine with the base's weights below which matrices are unrelated: independent ones give 0 up to the root
of their number of entries, while a delta of as much as the base's own norm still gives 0.7."""

Verdict = Literal["fits", "large drift", "locked", "unaligned", "not finite"]

_ATTENTION = ("q", "k", "v", "o", "attention")
_MATRICES = (*_ATTENTION, "mlp", "embedding", "head")
_PARTS = (*_MATRICES, "attention bias", "attention norm", "norm", "other")

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class PartDrift:
    """How far one part of a source is from the base's, over all its tensors.

    Attributes:
        entries: Number of entries compared.
        changed: How many of them differ.
        difference: Squared norm of the delta.
        reference: Squared norm of the base's part.
        product: Scalar product of the delta and the base's part.
        largest: Largest relative drift of a single tensor.
        largest_name: Its name.
    """

    entries: int = 0
    changed: int = 0
    difference: float = 0.0
    reference: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    largest_name: str = ""

    @property
    def relative(self) -> float:
        """Norm of the delta over the norm of the base's part; infinite where only the base is all zero."""
        return ratio(self.difference, self.reference)

    @property
    def cosine(self) -> float | None:
        """Cosine of the source's own weights with the base's; None where either is all zero."""
        norm = self.reference + 2.0 * self.product + self.difference
        if self.reference <= 0 or norm <= 0:
            return None
        return (self.reference + self.product) / math.sqrt(self.reference * norm)

    def add(self, name: str, entries: int, changed: int, squares: tuple[float, float, float]) -> None:
        """Count one tensor; `squares` are its difference, reference and product."""
        self.entries += entries
        self.changed += changed
        self.difference += squares[0]
        self.reference += squares[1]
        self.product += squares[2]
        drift = ratio(*squares[:2])
        if not self.largest_name or drift > self.largest:
            self.largest, self.largest_name = drift, name


@dataclass(slots=True)
class ProductDrift:
    """How far the products of a source's attention heads are from the base's; see `merging.locks`.

    Attributes:
        groups: Number of groups of heads compared.
        locked: How many have weights that are far apart while their products agree.
        locked_raw: Largest raw drift among those.
        locked_product: Largest drift of the products among those.
        difference: Squared norm of what differs between the products.
        reference: Squared norm of the base's products.
        largest: Largest relative drift of a single group's products.
        largest_place: Its layer and group.
    """

    groups: int = 0
    locked: int = 0
    locked_raw: float = 0.0
    locked_product: float = 0.0
    difference: float = 0.0
    reference: float = 0.0
    largest: float = 0.0
    largest_place: str = ""

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the base's products."""
        return ratio(self.difference, self.reference)

    def add(self, layer: int, drifts: Sequence[GroupDrift]) -> None:
        """Count the groups of one layer."""
        for group, drift in enumerate(drifts):
            self.groups += 1
            self.difference += drift.difference
            self.reference += drift.reference
            if drift.locked:
                self.locked += 1
                self.locked_raw = max(self.locked_raw, drift.raw)
                self.locked_product = max(self.locked_product, drift.product)
            if not self.largest_place or drift.product > self.largest:
                self.largest, self.largest_place = drift.product, f"layer {layer} group {group}"


@dataclass(slots=True)
class SourceDrift:
    """What is known of one source.

    Attributes:
        name: The source.
        parts: Part of the model to its drift: `q`, `k`, `v`, `o` (matrices; `attention` where they are not
            told apart), `attention bias`, `attention norm`, `mlp`, `norm`, `embedding`, `head`, `other`.
        products: `vo` and `qk` to the drift of those products; empty where heads are not known.
        non_finite: Names of tensors that hold NaN or infinity; they are in no other figure.
        skipped: Names of tensors that only one of the two has, or in other shapes, or no floats.
    """

    name: str
    parts: dict[str, PartDrift] = field(default_factory=dict)
    products: dict[Pair, ProductDrift] = field(default_factory=dict)
    non_finite: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def judge(self) -> tuple[Verdict, str]:
        """Return the verdict and the figures that it rests on, in plain words."""
        if self.non_finite:
            more = f" and {len(self.non_finite) - 1} more" if self.non_finite[1:] else ""
            return "not finite", f"NaN or infinity in {self.non_finite[0]}{more}: the checkpoint is damaged"
        cosines = [self._cosine(_ATTENTION), self._cosine(("mlp",))]
        if all(cosine is not None and cosine < UNRELATED_COSINE for cosine in cosines):
            figures = " and ".join(f"{cosine:.2f}" for cosine in cosines)
            return "unaligned", (
                f"attention and mlp have cosines of {figures} with the base's weights: another "
                "initialisation, or units in another order; a merge will fail"
            )
        locked = [f"{pair}: {_locked(drift)}" for pair, drift in self.products.items() if drift.locked]
        if locked:
            return "locked", (
                f"attention is re-parameterised ({'; '.join(locked)}), as models are on purpose so that they "
                "cannot be merged; a merge will fail, and evomerge does not undo it"
            )
        drifts = {part: drift.relative for part, drift in self.parts.items() if part in _MATRICES}
        if not drifts or max(drifts.values()) <= LARGE_DRIFT:
            return "fits", _span(drifts)
        return "large drift", _large(drifts)

    def to_json(self) -> dict[str, Any]:
        """Return every figure as plain data; null stands for infinity and for what is undefined."""
        verdict, reason = self.judge()
        return {
            "name": self.name,
            "verdict": verdict,
            "reason": reason,
            "parts": {part: _part_json(drift) for part, drift in self.parts.items()},
            "products": {pair: _product_json(drift) for pair, drift in self.products.items()},
            "non_finite": self.non_finite,
            "skipped": self.skipped,
        }

    def _cosine(self, parts: Sequence[str]) -> float | None:
        whole = PartDrift()
        for part in parts:
            if part in self.parts:
                one = self.parts[part]
                whole.add(part, one.entries, one.changed, (one.difference, one.reference, one.product))
        return whole.cosine


@dataclass(frozen=True, slots=True)
class Inspection:
    """Sources against their base.

    Attributes:
        base: Name of what they are compared with.
        sources: One for each other model.
        cosines: Part to the cosine of every pair of sources' deltas, None where one of them is zero; the
            last, `all`, is over all parts.
        notes: What was not compared, for the reader.
    """

    base: str
    sources: tuple[SourceDrift, ...]
    cosines: dict[str, list[list[float | None]]]
    notes: tuple[str, ...]

    def warnings(self) -> list[str]:
        """Return one line for each source that does not simply fit."""
        judged = [(source.name, *source.judge()) for source in self.sources]
        return [f'"{name}" {verdict}: {reason}' for name, verdict, reason in judged if verdict != "fits"]

    def to_json(self) -> dict[str, Any]:
        """Return every figure as plain data."""
        return {
            "base": self.base,
            "sources": [source.to_json() for source in self.sources],
            "cosines": self.cosines,
            "notes": list(self.notes),
        }


def _locked(drift: ProductDrift) -> str:
    return (
        f"in {drift.locked} of {drift.groups} groups of heads weights drift up to {drift.locked_raw:.2f} "
        f"and their products {drift.locked_product:.2g}"
    )


def _span(drifts: Mapping[str, float]) -> str:
    if not drifts:
        return "no matrices to compare"
    return f"relative drift {min(drifts.values()):.2g} to {max(drifts.values()):.2g}"


def _large(drifts: Mapping[str, float]) -> str:
    large = [f"{part} {drift:.2f}" for part, drift in drifts.items() if drift > LARGE_DRIFT]
    replaced = any(drift > REPLACED_DRIFT for drift in drifts.values())
    advice = "; some of it is replaced rather than tuned" if replaced else ""
    return f"{', '.join(large)}: more than fine-tuning; dropping entries at random is risky{advice}"


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _part_json(drift: PartDrift) -> dict[str, Any]:
    return {
        "relative": _finite(drift.relative),
        "cosine": _finite(drift.cosine),
        "entries": drift.entries,
        "changed": drift.changed,
        "largest": _finite(drift.largest),
        "largest_tensor": drift.largest_name,
    }


def _product_json(drift: ProductDrift) -> dict[str, Any]:
    return {
        "relative": _finite(drift.relative),
        "groups": drift.groups,
        "locked": drift.locked,
        "locked_raw": _finite(drift.locked_raw),
        "locked_product": _finite(drift.locked_product),
        "largest": _finite(drift.largest),
        "largest_place": drift.largest_place,
    }
