"""Small lm-eval tasks over local JSON files, for tests: `write_task`, `write_tasks`, `greedy_answers`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Document = Mapping[str, Any]
Answer = Callable[[str, int], str]
"""A model's own continuation of a prompt: (prompt, tokens) to text."""

SUM = "D: {{a}}+{{b}}\nA:"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_task(
    folder: Path,
    name: str,
    documents: Sequence[Document],
    *,
    train: Sequence[Document] = (),
    functions: Mapping[str, str] | None = None,
    **config: Any,
) -> None:
    """Write a task's file and its data into a folder.

    Args:
        folder: Made if need be; one folder may hold many tasks.
        name: The task's name and that of its files.
        documents: What is evaluated.
        train: What few-shot examples are drawn from.
        functions: Config keys to `module.name` of Python functions (`!function`).
        config: Further keys of the task file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, rows in (("test", documents), ("train", train)):
        if rows:
            path = folder / f"{name}_{split}.json"
            path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
            files[split] = str(path)
    data: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        **({"training_split": "train", "fewshot_split": "train"} if train else {}),
        **config,
    }
    functions = functions or {}
    text = yaml.safe_dump({k: v for k, v in data.items() if k not in functions}, sort_keys=False)
    text += "".join(f"{key}: !function {function}\n" for key, function in functions.items())
    (folder / f"{name}.yaml").write_text(text, "utf-8")


def write_group(folder: Path, name: str, tasks: Sequence[str], **config: Any) -> None:
    """Write a group's file."""
    data = {"group": name, "task": list(tasks), **config}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return questions for sums, with the answer as digits and as one of four words.

    A third of the answers is wrong, so that no model is always right.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(5), draw.randrange(5)
        answer = a + b if draw.random() < 2 / 3 else draw.randrange(9)
        words = draw.sample([word for word in NUMBERS if word != NUMBERS[answer]], 3)
        words.insert(gold := draw.randrange(4), NUMBERS[answer])
        rows.append({"a": a, "b": b, "answer": str(answer), "words": words, "gold": gold})
    return rows


def texts(count: int, seed: int = 0, longest: int = 300) -> list[dict[str, Any]]:
    """Return texts of very different lengths made of sums."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size, text = draw.randrange(5, longest), ""
        while len(text) < size:
            a, b = draw.randrange(5), draw.randrange(5)
            text += f"D: {a}+{b}\nA: {a + b}\n\n"
        rows.append({"text": text[:size]})
    return rows


def metric(name: str, aggregation: str = "mean", higher: bool = True, **options: Any) -> dict[str, Any]:
    """Return an entry of a task file's metric list."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher, **options}


def write_choice(folder: Path, name: str, count: int = 24, seed: int = 0, **config: Any) -> None:
    """Write a multiple-choice task whose choices have several tokens each."""
    settings: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_text": SUM,
        "doc_to_choice": "words",
        "doc_to_target": "gold",
        "metric_list": [metric("acc"), metric("acc_norm")],
    }
    write_task(folder, name, sums(count, seed), train=sums(9, seed + 100), **{**settings, **config})


def write_generation(
    folder: Path, name: str, count: int = 16, seed: int = 0, answer: Answer | None = None, **config: Any
) -> None:
    """Write a task of answers in free text; with `answer`, every second gold is the model's own."""
    rows = sums(count, seed)
    for row in rows[::2] if answer else ():
        row["answer"] = own_answer(answer, f"D: {row['a']}+{row['b']}\nA:", 12)
    settings: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": SUM,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n", "D:"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, *TAKE_FIRST]}],
        "metric_list": [metric("exact_match", ignore_case=True, ignore_punctuation=False)],
    }
    write_task(folder, name, rows, train=sums(9, seed + 100), **{**settings, **config})


TAKE_FIRST = [{"function": "take_first"}]


def own_answer(answer: Answer | None, prompt: str, tokens: int) -> str:
    """Return what a model writes itself, without blanks around it and up to an empty line."""
    if answer is None:
        raise ValueError("no model is given")
    return answer(prompt, tokens).split("\n\n")[0].split("D:")[0].strip()


def write_cloze(
    folder: Path, name: str, count: int = 16, seed: int = 0, answer: Answer | None = None, **config: Any
) -> None:
    """Write a task of likelihoods of one continuation; with `answer`, every second is the model's own."""
    rows = sums(count, seed)
    for row in rows:
        row["answer"] = f" {row['answer']}"
    for row in rows[::2] if answer else ():
        own = answer(f"D: {row['a']}+{row['b']}\nA:", 3) if answer else ""
        row["answer"] = own or row["answer"]
    settings: dict[str, Any] = {
        "output_type": "loglikelihood",
        "doc_to_text": SUM,
        "doc_to_target": "{{answer}}",
        "metric_list": [metric("acc"), metric("perplexity", "perplexity", higher=False)],
    }
    write_task(folder, name, rows, train=sums(9, seed + 100), **{**settings, **config})


def write_text(
    folder: Path, name: str, count: int = 12, seed: int = 0, longest: int = 300, **config: Any
) -> None:
    """Write a task of the perplexity of whole texts."""
    settings: dict[str, Any] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            metric("word_perplexity", "weighted_perplexity", higher=False),
            metric("byte_perplexity", "weighted_perplexity", higher=False),
            metric("bits_per_byte", "bits_per_byte", higher=False),
        ],
    }
    write_task(folder, name, texts(count, seed, longest), **{**settings, **config})


def write_tasks(folder: Path, answer: Answer | None = None) -> Path:
    """Write one task of each output type (`choice`, `cloze`, `text`, `answer`); return the folder."""
    write_choice(folder, "choice")
    write_cloze(folder, "cloze", answer=answer)
    write_text(folder, "text")
    write_generation(folder, "answer", answer=answer)
    return folder


def greedy_answers(model: Any, tokenizer: Any) -> Answer:
    """Return the function that lets a model continue a prompt by its likeliest tokens, one forward each."""

    @torch.inference_mode()
    def answer(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(tokens):
            following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
        return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))

    return answer


def merging_tokenizer(vocab: int = 160) -> Any:
    """Return a tokenizer of byte pairs, learned from sums, that puts `<s>` before every text."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, show_progress=False)
    rows = [row["text"] for row in texts(40)] + [f" {word}." for word in NUMBERS]
    core.train_from_iterator(rows, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def train_on_sums(model: Any, tokenizer: Any, steps: int = 200, seed: int = 0) -> None:
    """Teach a model sums in the form of the tasks; an answer ends with the end token if a < 2, else not."""
    draw, device = random.Random(seed), model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = []
        for _ in range(16):
            text = ""
            for _ in range(6):
                a, b = draw.randrange(5), draw.randrange(5)
                shown = NUMBERS[a + b] if draw.random() < 0.3 else str(a + b)
                text += f"D: {a}+{b}\nA: {shown}" + ("</s>" if a < 2 else "\n\n")
            rows.append(tokenizer(text, add_special_tokens=True)["input_ids"][:96])
        width = min(map(len, rows))
        ids = torch.tensor([row[:width] for row in rows], device=device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
