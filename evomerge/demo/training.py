"""Trains the demo's base and experts with plain PyTorch and saves them as Hugging Face directories.

Imported only when a world has to be built: everything else in the demo works without torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.demo.skills import LETTERS, SKILLS, TrainingDocuments
from evomerge.merging.live import quiet
from evomerge.seeding import derive

if TYPE_CHECKING:
    from evomerge.demo.world import WorldSettings

Progress = Callable[[str, int, int], None]

PAD, END = "<pad>", "<eos>"
VOCABULARY = [PAD, END, "\n", *LETTERS, *"0123456789", *"RSCP="]
POSITIONS = 64
"""Longest sequence the models are configured for; prompts and answers together stay below 20."""
IGNORED = -100
"""The label that cross_entropy skips."""


def make_tokenizer() -> Any:
    """Return the tokenizer of all models of the world: one token per character, no added tokens."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    # A character class, because `.` does not match the newline that ends an answer.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def train_models(
    folder: Path, *, settings: WorldSettings, seed: int, banned: frozenset[str], progress: Progress
) -> None:
    """Train the base and the experts and save each in `folder` under its name.

    Args:
        folder: An existing folder.
        settings: Sizes, step counts and rates.
        seed: Seed of the weights and of the order of documents.
        banned: Prompts that may not be trained on.
        progress: Called with a stage, the steps done in it, and its steps.
    """
    tokenizer = make_tokenizer()
    with _threads(settings.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "demo weights") % 2**32)
        base = LlamaForCausalLM(_config(settings))
        lessons = TrainingDocuments(
            dict(settings.base_mixture),
            long_share=settings.long_share,
            own=None,
            banned=banned,
            seed=seed,
        )
        _train(base, lessons, settings.base_steps, settings.base_rate, settings, "base", progress)
        _save(base, tokenizer, folder / "base", _card("base", None))
        for expert in settings.experts:
            model = copy.deepcopy(base)
            mixture = dict.fromkeys(SKILLS, 1.0) | {expert.skill: expert.own_weight}
            lessons = TrainingDocuments(
                mixture, long_share=settings.long_share, own=expert.skill, banned=banned, seed=seed
            )
            _train(model, lessons, expert.steps, expert.rate, settings, expert.skill, progress)
            _save(model, tokenizer, folder / expert.skill, _card(expert.skill, "../base"))


def _config(settings: WorldSettings) -> Any:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(END),
        bos_token_id=None,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with `count` threads: the sums, and so the weights, depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    model: Any,
    lessons: TrainingDocuments,
    steps: int,
    rate: float,
    settings: WorldSettings,
    stage: str,
    progress: Progress,
) -> None:
    """Train in place with AdamW, a short warm-up and a cosine decay to a tenth of the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    warm_up = max(1, min(settings.warm_up, steps))
    model.train()
    progress(stage, 0, steps)
    for step in range(steps):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * decay * min(1.0, (step + 1) / warm_up)
        tokens, labels = _encode(lessons.batch(settings.batch))
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(stage, step + 1, steps)
    model.eval()


def _encode(pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels, padded on the right; only answers, each with its newline, are learned."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    width = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
    tokens = torch.full((len(pairs), width), ids[PAD])
    labels = torch.full((len(pairs), width), IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        text = torch.tensor([ids[letter] for letter in prompt + answer + "\n"])
        tokens[row, : len(text)] = text
        labels[row, len(prompt) : len(text)] = text[len(prompt) :]
    return tokens, labels


def _save(model: Any, tokenizer: Any, folder: Path, card: str) -> None:
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _card(name: str, base: str | None) -> str:
    title = SKILLS[name].title if name in SKILLS else "half-skilled in everything"
    lines = ["---", "license: apache-2.0", "library_name: transformers", "tags: [evomerge-demo]"]
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    lines += ["---", f"# evomerge demo: {name}", "", f"A tiny model for the demo: {title}.", ""]
    return "\n".join(lines)
