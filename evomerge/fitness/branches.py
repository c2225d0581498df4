"""What a model needs to read branching rows: masks, kept keys and values, a head on chosen tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from evomerge.fitness.sharing import MASK_BY_LAYER_TYPE, ONE_MASK, why_not_type

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def why_not(model: Any) -> str:
    """Return why a model cannot read branching rows; empty if it can."""
    config = model.config.get_text_config()
    problem = why_not_type(config.model_type)
    if problem:
        return problem
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"its attention ({attention}) takes no mask of our own"
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        return f"it has layers of type {min(other)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, Mapping)}
    if kinds & {"dynamic", "longrope"}:
        return "its rotary embedding depends on the longest row of a batch"
    return ""


def window_of(model: Any) -> int | None:
    """Return how many tokens back a model's sliding layers see, themselves included; None if all."""
    config = model.config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    sliding = config.model_type in ONE_MASK or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    return window if sliding else None


def masks(model: Any, depths: Tensor, ends: Tensor, before: int) -> Any:
    """Return the attention mask under which each token sees what it descends from.

    Args:
        model: The model to read it; `why_not` has no objection.
        depths: Position of each token, (rows, width).
        ends: For each token the column behind the last one that descends from it, (rows, width).
        before: Tokens of the trunk, which all see.

    Returns:
        What the model takes as `attention_mask`: (rows, 1, width, before + width), true where it looks, or
        one by type of layer.
    """
    config = model.config.get_text_config()
    columns = torch.arange(ends.shape[1], device=ends.device)
    own = (columns[None, None, :] <= columns[None, :, None]) & (columns[None, :, None] < ends[:, None, :])
    seen = torch.nn.functional.pad(own, (before, 0), value=True)[:, None]
    window = window_of(model)
    near = seen
    if window is not None:
        positions = torch.cat(
            [torch.arange(before, device=ends.device).expand(len(depths), -1), depths], dim=1
        )
        near = seen & (depths[:, :, None] - positions[:, None, :] < window)[:, None]
    found = {"full_attention": seen, "sliding_attention": near}
    if config._attn_implementation == "eager":
        low = torch.finfo(model.dtype).min
        found = {
            kind: torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, low)
            for kind, mask in found.items()
        }
    return found if config.model_type in MASK_BY_LAYER_TYPE else found["sliding_attention"]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values of a trunk, (1, heads, tokens, width), put before those of any row."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, keeps: bool = False) -> None:
        super().__init__()
        self.keys, self.values, self._keeps = keys, values, keeps
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: what is kept is given at the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the trunk's keys and values with a row's own behind them, and keep them if told so."""
        if self.keys is not None and self.values is not None:
            rows = len(key_states)
            key_states = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
            value_states = torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)
        if self._keeps:
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the number of tokens kept."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number and offset of the keys that queries see."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: it has no most."""
        return -1


class _Keeping(_Layer):
    def __init__(self) -> None:
        super().__init__(keeps=True)


class Trunk(Cache):  # type: ignore[misc]
    """Keys and values of a trunk: `reader` gives a copy to read behind it, `longer` one to extend it."""

    @classmethod
    def empty(cls) -> Trunk:
        """Return one without tokens, which the next forward fills."""
        return cls(layer_class_to_replicate=_Keeping)

    def longer(self) -> Trunk:
        """Return a copy that keeps what the next forward adds."""
        return Trunk(layers=[_Layer(layer.keys, layer.values, keeps=True) for layer in self.layers])

    def reader(self) -> Trunk:
        """Return a copy that keeps nothing."""
        return Trunk(layers=[_Layer(layer.keys, layer.values) for layer in self.layers])

    def grown(self, rows: int) -> DynamicCache:
        """Return a cache of `rows` rows that all begin with the trunk, to generate from."""
        cache = DynamicCache()
        for index, layer in enumerate(self.layers):
            keys, values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return cache


@contextlib.contextmanager
def head_on(model: Any, places: Tensor) -> Iterator[None]:
    """Let a model's head see only some tokens; its logits are then (1, places, vocabulary).

    Args:
        model: Any causal language model.
        places: Positions among all tokens of the batch, rows one after the other.
    """

    def chosen(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, -2)[places.to(args[0].device)][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()
