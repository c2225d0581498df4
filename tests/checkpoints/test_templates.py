"""Chat templates: what the known ones render, which one a checkpoint brings, and which one is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evomerge.checkpoints.templates import KNOWN, chosen_template, read_template
from evomerge.errors import RecipeError
from tests.checkpoints.tiny import edit_json, make_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go"},
]
RENDERED = {
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n"
    "### Instruction:\nGo\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n"
    "[|user|]Go\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nGo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind.\n\nHi [/INST] Yes?</s> [INST] Go [/INST]",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates_render_their_format(name: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = chosen_template(name, [])
    render = tokenizer.apply_chat_template
    assert render(TALK, chat_template=text, add_generation_prompt=True, tokenize=False) == RENDERED[name]
    closed = render(TALK[:3], chat_template=text, tokenize=False)
    assert RENDERED[name].startswith(closed)
    alone = render(TALK[1:2], chat_template=text, tokenize=False)
    assert ("Be kind" in alone, "Hi" in alone) == (False, True)


def test_exaone_begins_with_an_empty_system_turn(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(TALK[1:2], chat_template=KNOWN["exaone"], tokenize=False)
    assert text == "[|system|][|endofturn|]\n[|user|]Hi\n"


@pytest.mark.parametrize("name", ["mistral", "alpaca"])
def test_roles_out_of_place_are_refused(name: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talk = [TALK[1], {"role": "tool", "content": "?"}]
    with pytest.raises(Exception, match=f"{name}: .* tool"):
        tokenizer.apply_chat_template(talk, chat_template=KNOWN[name], tokenize=False)


def test_the_template_that_transformers_takes_is_read(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    assert read_template(folder) is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert read_template(folder) == "processor"
    several = [{"name": "tool", "template": "tools"}, {"name": "default", "template": "several"}]
    edit_json(config, chat_template=several)
    assert (
        read_template(folder) == AutoTokenizer.from_pretrained(folder).chat_template["default"] == "several"
    )
    edit_json(config, chat_template="one")
    assert read_template(folder) == AutoTokenizer.from_pretrained(folder).chat_template == "one"
    (folder / "chat_template.jinja").write_text("file")
    assert read_template(folder) == AutoTokenizer.from_pretrained(folder).chat_template == "file"


def test_auto_takes_what_most_have(tmp_path: Path) -> None:
    folders = []
    for number, text in enumerate(("x", " y\n", "x ", "y", "")):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        if text:
            (folders[-1] / "chat_template.jinja").write_text(text)
    assert chosen_template("auto", folders) == "x"
    assert chosen_template("auto", folders[1:]) == "y"
    assert chosen_template("auto", folders[4:]) is None
    assert chosen_template(None, folders) is None


def test_only_names_and_jinja_are_taken() -> None:
    text = "{{ messages[0]['content'] }}"
    assert chosen_template(text, []) == text
    for wrong in ("chatlm", "{{ x }}", "a text without any braces"):
        with pytest.raises(RecipeError, match="chat_template: .* neither a Jinja text nor a known name"):
            chosen_template(wrong, [])
