"""What plain greedy decoding covers; everything else goes through lm-eval's own generation. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_MATTER = {
    # lm-eval turns sampling off
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_length", "use_cache", "pad_token_id"),  # lm-eval gives its own
    *("bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("length_penalty", "early_stopping"),  # of beam search
    *("cache_implementation", "cache_config", "compile_config", "disable_compile"),
    *("_from_model_config", "transformers_version"),
}
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
}


def is_plain_greedy(kwargs: Mapping[str, Any]) -> bool:
    """Whether generation arguments ask for nothing but greedy decoding up to a stop string."""
    known = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
    sampling = kwargs.get("do_sample") or float(kwargs.get("temperature") or 0.0) > 0
    return not sampling and set(kwargs) <= known | {"do_sample", "temperature"}


def is_plain_config(config: Any) -> bool:
    """Whether a generation config leaves greedy decoding as it is."""
    return all(
        name in _NO_MATTER or not value or _NEUTRAL.get(name) == value
        for name, value in config.to_diff_dict().items()
    )


def no_sampling(task: str) -> str:
    """Return the message for a task that wants more than greedy decoding."""
    return (
        f"fitness.tasks.{task}: its generation_kwargs ask for more than greedy decoding, which "
        "workers.engine: vllm does not do; use transformers"
    )
