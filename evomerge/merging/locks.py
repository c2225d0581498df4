"""What attention computes from its weights, and whether two models compute the same with other weights.

Scores depend on queries and keys only through their products, and what attention writes depends on values
and outputs only through theirs. An invertible matrix put between the two factors changes the weights and not
the model; that is how a model is locked against merging (MergeLock, arXiv 2509.01548). What such a matrix may
be, where heads share keys and values, queries and keys are rotated, or both are normalised, is derived here
and not taken from that paper:

- One matrix for every group of query heads that share a key head and a value head.
- Between values and outputs, any invertible one.
- Between rotated queries and keys, one that commutes with every rotation: a complex number for each frequency
  pair, so that the product of each pair is what stays.
- Between normalised queries and keys, signs and a scale on the weights; the gains of the norm take the rest.

Products are never formed: `<A'B, C'D>`, summed over the rows, needs only the Grams of A, C and of B, D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evomerge.checkpoints.source import Checkpoint

LOCKED_RAW = 0.3
"""Least raw drift of a group of heads that counts as re-parameterised: three times what fine-tuning drifts,
and well below a random change of basis (0.8 to 3 in the examples that this is tested on)."""

LOCKED_SHARE = 0.25
"""Most drift of the products for each unit of raw drift where only the basis changed. Independent drifts of
the two factors add up, so that training gives about 1.4; a lock gives what training and rounding left."""

Pair = Literal["qk", "vo"]

_FULLY_ROTARY = (
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "granite", "smollm3"),
)
"""Model types with q, k, v and o projections of their own, whose rotation turns dimensions i and i + size / 2
of a head together, with norms of queries and keys, if any, for each head."""


@dataclass(frozen=True, slots=True)
class Attention:
    """How the attention heads of a model lie in its tensors.

    Attributes:
        heads: Number of query heads.
        groups: Number of key heads, which is that of value heads; `heads / groups` query heads share one.
        size: Length of a query, key or value of one head.
        rotary: For each layer, whether queries and keys are rotated.
        gain_offset: What the gain of a norm is above its stored weight: 1 in Gemma, else 0.
    """

    heads: int
    groups: int
    size: int
    rotary: tuple[bool, ...]
    gain_offset: float

    def fits(self, pair: Pair, shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether the tensors of a pair (see `group_drifts`) have the shapes that follow from the heads."""
        wide, narrow, size = self.heads * self.size, self.groups * self.size, (self.size,)
        if any(len(shape) != 2 for shape in shapes[:2]):
            return False
        if pair == "vo":
            return shapes[0][0] == narrow and shapes[1][1] == wide
        gains = shapes[2:]
        return shapes[0][0] == wide and shapes[1][0] == narrow and gains in ([], [size, size])


def attention_of(checkpoint: Checkpoint, layers: int) -> Attention | None:
    """Return how the heads of a checkpoint lie in its tensors; None where that is not known here.

    Args:
        checkpoint: Only its config is read.
        layers: Number of decoder layers.
    """
    config = checkpoint.text_config
    kind = checkpoint.config["model_type"]
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if kind not in _FULLY_ROTARY or type(heads) is not int or type(hidden) is not int or heads < 1:
        return None
    groups = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    if type(groups) is not int or groups < 1 or heads % groups or type(size) is not int or size % 2:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary = config.get("no_rope_layers") or [1] * layers  # 1 where there is rotation, whatever the name says
    unsaid = kind == "smollm3" and not config.get("no_rope_layers")  # its default leaves every fourth out
    if unsaid or not isinstance(rope, Mapping) or not isinstance(rotary, list):
        return None
    nested = [settings for settings in rope.values() if isinstance(settings, Mapping)]
    if any(settings.get("partial_rotary_factor", 1.0) != 1.0 for settings in (config, rope, *nested)):
        return None
    if len(rotary) != layers:
        return None
    offset = 1.0 if kind.startswith("gemma") else 0.0
    return Attention(heads, groups, size, tuple(bool(layer) for layer in rotary), offset)


@dataclass(frozen=True, slots=True)
class GroupDrift:
    """How far one group of heads of one source is from the base's.

    Attributes:
        raw: Drift of the weights that a change of basis would have to move, relative to the base: of both
            factors, so the lesser; with norms of queries and keys, which let one side move alone, the larger.
        difference: Squared norm of what differs between the products, summed over the group's heads.
        reference: Squared norm of the base's products.
    """

    raw: float
    difference: float
    reference: float

    @property
    def product(self) -> float:
        """Drift of the products, relative to the base's."""
        return ratio(self.difference, self.reference)

    @property
    def locked(self) -> bool:
        """Whether the weights are far apart while their products agree."""
        return self.raw >= LOCKED_RAW and self.product <= LOCKED_SHARE * self.raw


def ratio(difference: float, reference: float) -> float:
    """Return the relative drift from two squared norms: 0 if nothing differs, infinite against a zero."""
    if difference <= 0:
        return 0.0
    return (difference / reference) ** 0.5 if reference > 0 else float("inf")


def group_drifts(
    attention: Attention, pair: Pair, models: Sequence[Sequence[Tensor]], layer: int
) -> list[list[GroupDrift]]:
    """Compare the products of one layer's heads.

    Biases are left out: the products of the matrices alone tell a change of basis as well.

    Args:
        attention: How the heads lie in the tensors.
        pair: `vo`: a value matrix (groups * size, hidden) and an output matrix (hidden, heads * size). `qk`:
            a query matrix (heads * size, hidden), a key matrix (groups * size, hidden), and the weights
            (size) of the norms of queries and keys if there are any.
        models: Those tensors of the base, then of each source; finite, any floating dtypes.
        layer: Index of the layer.

    Returns:
        For each source, the drift of each group.
    """
    cross = _rotated if pair == "qk" and attention.rotary[layer] else _plain
    drifts: list[list[GroupDrift]] = [[] for _ in models[1:]]
    for group in range(attention.groups):
        # Only one group of every model is held in float64 at a time.
        raw = [_factors(attention, pair, tensors, group) for tensors in models]
        gained = len(models[0]) == 4
        gains = [[gain.double() + attention.gain_offset for gain in tensors[2:]] for tensors in models]
        parts = [_normalised(*pairs) for pairs in zip(raw, gains, strict=True)] if gained else raw
        first = parts[0]
        reference = cross(first[0], first[0], first[1], first[1])
        for source, (many, one) in enumerate(parts[1:]):
            mixed = cross(first[0], many, first[1], one)
            difference = max(0.0, reference - 2.0 * mixed + cross(many, many, one, one))
            sides = [_drift(*side) for side in zip(raw[0], raw[source + 1], strict=True)]
            sides += [_drift(*side) for side in zip(gains[0], gains[source + 1], strict=True)]
            moved = max(sides) if gained else min(sides)
            drifts[source].append(GroupDrift(moved, difference, reference))
    return drifts


def _factors(
    attention: Attention, pair: Pair, tensors: Sequence[Tensor], group: int
) -> tuple[Tensor, Tensor]:
    """Return a group's part of each factor: (heads, size, hidden) of o or q, and (size, hidden) of v or k."""
    size, shared = attention.size, attention.heads // attention.groups
    wide = slice(group * shared * size, (group + 1) * shared * size)
    narrow = slice(group * size, (group + 1) * size)
    many, one = (tensors[1][:, wide].T, tensors[0][narrow]) if pair == "vo" else tensors[:2]
    if pair == "qk":
        many, one = many[wide], one[narrow]
    return many.double().reshape(shared, size, -1), one.double()


def _normalised(factors: tuple[Tensor, Tensor], gains: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factors of each head with the scale that the norm removes removed, and the gains put in."""
    many, one = (
        torch.nn.functional.normalize(factor.flatten(-2), dim=-1).view_as(factor) * gain[:, None]
        for factor, gain in zip(factors, gains, strict=True)
    )
    return many, one


def _drift(base: Tensor, other: Tensor) -> float:
    return ratio(float((other - base).square().sum()), float(base.square().sum()))


def _plain(many: Tensor, other_many: Tensor, one: Tensor, other_one: Tensor) -> float:
    """Return the scalar product of two models' products: sum over rows a, b of <m_a, m'_b> <o_a, o'_b>."""
    return float(((many @ other_many.transpose(-1, -2)) * (one @ other_one.T)).sum())


def _rotated(many: Tensor, other_many: Tensor, one: Tensor, other_one: Tensor) -> float:
    """Return the same where each frequency pair is one complex row, and its product conj(q) k counts."""
    queries = _pair_products(many, other_many)
    keys = _pair_products(one, other_one)
    return float((queries.conj() * keys).real.sum())


def _pair_products(rows: Tensor, others: Tensor) -> Tensor:
    """Return <row, other> for each frequency pair: (heads, size, hidden) to (heads, size / 2), complex."""
    real, imaginary = rows.chunk(2, dim=-2)
    other_real, other_imaginary = others.chunk(2, dim=-2)
    return torch.complex(
        (real * other_real).sum(-1) + (imaginary * other_imaginary).sum(-1),
        (real * other_imaginary).sum(-1) - (imaginary * other_real).sum(-1),
    )
