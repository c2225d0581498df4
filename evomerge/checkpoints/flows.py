"""How layers read and write the hidden state, by family: what a layer path and its scales need. No torch.

With c the running product of the scales, a hidden state of c times g goes through the layers as g does if
every write to it is divided by c, and if the norms that read it are negated where c is negative: norms of
this kind do not see its length (up to their epsilon). So scales fold into the weights of a plain model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError

_ATTENTION, _MLP = "self_attn.o_proj", "mlp.down_proj"
_BEFORE, _AFTER = "input_layernorm", "post_attention_layernorm"


@dataclass(frozen=True, slots=True)
class Flow:
    """How the layers of a family read and write the hidden state; modules are named within a layer.

    Attributes:
        writes: Modules whose output is added to the hidden state.
        reads: Norms that the hidden state goes through on its way into a layer.
        final: The norm behind the last layer.
        offset: What is added to the weight of a norm before it is used.
        sandwich: Whether `writes` are norms too.
        unscalable: Why scales cannot be folded; empty if they can.
    """

    writes: tuple[str, ...] = (_ATTENTION, _MLP)
    reads: tuple[str, ...] = (_BEFORE, _AFTER)
    final: str = "model.norm"
    offset: float = 0.0
    sandwich: bool = False
    unscalable: str = ""

    def folded(self, module: str, kind: str, factor: float) -> tuple[float, float]:
        """Return what a tensor is multiplied by, and what is added then.

        Args:
            module: Name within the layer, or of the final norm.
            kind: `weight` or `bias`.
            factor: The product of the scales up to the layer.
        """
        multiplier, offset = 1.0, 0.0
        if module in self.writes:
            multiplier, offset = 1.0 / factor, self.offset if self.sandwich else 0.0
        elif module in (*self.reads, self.final) and factor < 0 and kind == "weight":
            multiplier, offset = -1.0, self.offset
        return multiplier, (multiplier - 1.0) * offset if kind == "weight" else 0.0


_SANDWICH = ("post_attention_layernorm", "post_feedforward_layernorm")
_PLAIN = Flow()
_GEMMA2 = Flow(writes=_SANDWICH, reads=(_BEFORE, "pre_feedforward_layernorm"), offset=1.0, sandwich=True)
_GPT_NEOX = Flow(writes=("attention.dense", "mlp.dense_4h_to_h"), final="gpt_neox.final_layer_norm")
_OLMO2 = Flow(
    writes=_SANDWICH,
    reads=(),
    sandwich=True,
    unscalable="its layers read the hidden state without a norm, so that they see its length",
)

FLOWS: dict[str, Flow] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _PLAIN),
    "gemma": Flow(offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt_neox": _GPT_NEOX,
    "olmo2": _OLMO2,
}
"""Value of `model_type` to how its layers work."""

_OWN_CACHE = "its cache is not one of keys and values for each layer, so that layers cannot be repeated"
_SHARED_CACHE = "some of its layers read the cache of other layers"
_EXPERTS = "its experts are fused in memory, so that files and live model differ"
_REFUSED: dict[str, str] = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2"), _OWN_CACHE),
    **dict.fromkeys(
        ("recurrent_gemma", "falcon_h1", "lfm2", "rwkv", "qwen3_next", "granitemoehybrid"), _OWN_CACHE
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), _SHARED_CACHE),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe"), _EXPERTS),
    "gemma3": "only models of text alone are supported, such as gemma3_text",
}


def flow_of(config: Mapping[str, Any]) -> Flow:
    """Return how the layers of a model work.

    Args:
        config: Of the model.

    Raises:
        RecipeError: A model of this family cannot have a layer path; with the reason.
    """
    kind = str(config.get("model_type"))
    if kind in FLOWS:
        return FLOWS[kind]
    reason = _REFUSED.get(kind, "it is not known how its layers read and write the hidden state")
    raise RecipeError(
        f"path: models of type {kind} are not supported: {reason}; expected one of {', '.join(FLOWS)}"
    )


def layer_types(config: Mapping[str, Any]) -> list[str] | None:
    """Return the kind of attention of each layer; None for families that have one kind.

    Configs of older versions of transformers imply it by the layer's number, which a path changes.
    """
    found = config.get("layer_types")
    if isinstance(found, list):
        return found
    kind, layers = config.get("model_type"), range(int(config.get("num_hidden_layers") or 0))
    if kind == "gemma2":
        sliding = [i % 2 == 0 for i in layers]
    elif kind == "gemma3_text":
        pattern = int(config.get("sliding_window_pattern") or 6)
        sliding = [(i + 1) % pattern != 0 for i in layers]
    elif kind in ("qwen2", "qwen3"):
        used = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
        first = config.get("max_window_layers", 28)
        sliding = [bool(used) and i >= first for i in layers]
    else:
        return None
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]
