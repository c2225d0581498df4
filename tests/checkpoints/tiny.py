"""Tiny checkpoints for tests, made without network: `make_llama`, `make_model`, `make_tokenizer`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789.,:?!+-*/=()\n"
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2"),
    *("mixtral", "qwen2_moe", "qwen3_moe"),
)
"""Every model type whose tiny model `make_model` can make, besides any other plain one."""


def make_tokenizer(path: Path, vocab: int = 64, extra: tuple[str, ...] = ()) -> None:
    """Save a tokenizer of single characters with `vocab` ids (4 special ones first) into a folder.

    `extra` replaces the last ids' tokens. Characters outside the vocabulary become `<unk>`.
    """
    fillers = [f"<{number}>" for number in range(vocab)]
    tokens = [*SPECIAL, *LETTERS, *fillers][: vocab - len(extra)] + list(extra)
    core = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


def make_model(
    path: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 16,
    vocab: int = 64,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model of a type with random weights drawn from `seed`, and its tokenizer; return the folder.

    Equal arguments give equal weights; other seeds give other weights. `config` overrides config keys.
    """
    settings: dict[str, Any] = {
        **{"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden},
        **{"num_hidden_layers": layers, "num_attention_heads": 2, "max_position_embeddings": 256},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    if model_type != "gpt_neox":
        settings |= {"num_key_value_heads": 1, "head_dim": hidden // 2}
    if "moe" in model_type or model_type == "mixtral":
        settings |= {
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        }
        settings |= {"num_local_experts" if model_type == "mixtral" else "num_experts": 2}
    made = AutoConfig.for_model(model_type, **{**settings, **(config or {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made)
        for parameter in model.parameters():  # norms and biases too, so that every tensor depends on the seed
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        make_tokenizer(path, vocab)
    return path


def make_llama(
    path: Path,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 16,
    vocab: int = 64,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Path:
    """Save a tiny llama checkpoint with tokenizer; the other arguments are those of `make_model`."""
    return make_model(
        path, "llama", seed=seed, layers=layers, hidden=hidden, vocab=vocab, dtype=dtype, **more
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    data = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}), "utf-8")
