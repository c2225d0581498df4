"""Chat templates: those known by name, those that checkpoints bring, and the choice among them. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from evomerge.checkpoints.files import inside, read_bytes, read_json, show
from evomerge.errors import RecipeError, nearest

_SHORTEST = 20  # characters; a shorter text is a name that is not known
_MAX_TEMPLATE = 2**20

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

_MISTRAL = """\
{%- set told = messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if told else messages -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- set expected = 'assistant' if loop.index0 % 2 else 'user' -%}
{%- if message['role'] != expected -%}
{{- raise_exception('mistral: expected a turn of ' + expected + ', got ' + message['role']) -}}
{%- endif -%}
{%- if expected == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}
{%- else -%}
{%- set before = messages[0]['content'] + '\\n\\n' if told and loop.first else '' -%}
{{- ' [INST] ' + before + message['content'] + ' [/INST]' -}}
{%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- set headings = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} -%}
{%- for message in messages -%}
{%- if not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] | trim -}}
{%- elif message['role'] in headings -%}
{{- '### ' + headings[message['role']] + ':\\n' + message['content'] | trim -}}
{%- else -%}
{{- raise_exception('alpaca: unknown role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:\\n' -}}{%- endif -%}
"""

_EXAONE = """\
{%- if messages[0]['role'] != 'system' -%}{{- '[|system|][|endofturn|]\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '[|' + message['role'] + '|]' + message['content'] -}}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}
"""

KNOWN = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Jinja text of each template that a recipe can name, over `messages` with `role` and `content`.

The names are mergekit's. The formats are those the models were trained on: `chatml` and `mistral` render what
mergekit's do, while its `alpaca`, `exaone` and `llama3` put line breaks and spaces between turns besides.
"""


def chosen_template(wanted: str | None, folders: Iterable[Path]) -> str | None:
    """Return the Jinja text that a recipe's `chat_template` stands for.

    Args:
        wanted: `auto`, a name in `KNOWN`, a Jinja text, or None.
        folders: Of the recipe's checkpoints, in order, for `auto`: the template that most of them bring, the
            first of those that as many bring.

    Returns:
        None to leave the tokenizer's own template, also for `auto` where no checkpoint brings any.

    Raises:
        RecipeError: It is neither a known name nor a Jinja text.
        SourceError: A checkpoint's template cannot be read.
    """
    if wanted is None or wanted in KNOWN:
        return wanted and KNOWN[wanted]
    if wanted == "auto":
        found = [text.strip() for folder in folders if (text := read_template(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{" not in wanted or len(wanted) < _SHORTEST:
        hint = nearest(wanted, ["auto", *KNOWN])
        raise RecipeError(f"chat_template: {show(wanted)} is neither a Jinja text nor a known name{hint}")
    return wanted


def read_template(folder: Path) -> str | None:
    """Return the chat template in a checkpoint folder, None if it has none.

    Looked for in `chat_template.jinja`, which transformers prefers, then in `tokenizer_config.json`, whose
    template called `default` counts where it has several, then in `chat_template.json` (of a processor).

    Raises:
        SourceError: A file cannot be read.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_bytes(inside(folder, "chat_template.jinja"), _MAX_TEMPLATE).decode("utf-8", "replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            template = read_json(inside(folder, name)).get("chat_template")
            if isinstance(template, list):
                named = [entry for entry in template if isinstance(entry, dict)]
                template = next((e.get("template") for e in named if e.get("name") == "default"), None)
            if isinstance(template, str) and template:
                return template
    return None
