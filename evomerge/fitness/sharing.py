"""Which models can read requests that share their beginning. No torch."""

from __future__ import annotations

ONE_MASK = frozenset({"llama", "mistral", "gpt_neox", "phi3", "granite", "olmo2", "stablelm"})
"""Model types whose layers all take one attention mask."""

MASK_BY_LAYER_TYPE = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"})
"""Model types that take a mask for each type of layer."""


def why_not_type(model_type: str) -> str:
    """Return why models of a type cannot share beginnings; empty if they can."""
    if model_type in ONE_MASK | MASK_BY_LAYER_TYPE:
        return ""
    return f"models of type {model_type} are not known to follow a mask and positions of our own"
