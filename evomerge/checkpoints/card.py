"""The README.md of an exported model: Hugging Face metadata, results, lineage, recipe. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.checkpoints.files import inside, read_bytes
from evomerge.errors import SourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
_MAX_README = 16 * 2**20


@dataclass(frozen=True, slots=True)
class SourceCard:
    """One model that was merged.

    Attributes:
        name: Its name in the recipe.
        location: Hub id or folder.
        revision: Its revision on the hub; None: the default branch, or a folder.
        fingerprint: SHA-256 of its content.
        license: From its own model card, see `read_license`; None if unknown.
    """

    name: str
    location: str
    revision: str | None
    fingerprint: str
    license: str | None

    @property
    def hub_id(self) -> str | None:
        """The hub id, or None if the location is a folder."""
        is_id = _HUB_ID.fullmatch(self.location) and not Path(self.location).exists()
        return self.location if is_id else None


@dataclass(frozen=True, slots=True)
class Row:
    """One model's results.

    Attributes:
        name: The model: the winner, a source, a baseline.
        scores: Task to metric and its standard error (None: unknown).
        overall: Score and the ends of its 95 % interval (None: unknown).
    """

    name: str
    scores: Mapping[str, tuple[float, float | None]]
    overall: tuple[float, float | None, float | None]


def model_card(
    *,
    name: str,
    base_models: Sequence[SourceCard],
    method: str,
    recipe_yaml: str,
    results: Sequence[Row] = (),
    gain: tuple[float, float, float] | None = None,
    gain_over: str = "the best baseline",
    warnings: Sequence[str] = (),
) -> str:
    """Return the text of README.md.

    Args:
        name: Title of the model.
        base_models: Everything that was merged, the base included.
        method: Merge method, or what was searched; becomes a tag.
        recipe_yaml: The recipe as YAML.
        results: One row a model, the winner first; all on the same held-out documents.
        gain: Winner minus the best baseline, and the ends of its 95 % interval; None: not measured.
        gain_over: Name of that baseline.
        warnings: Lines that a reader must see, for example about the evidence.
    """
    license_keys, notes = _license(base_models)
    metadata: dict[str, Any] = {
        "base_model": list(dict.fromkeys(source.hub_id for source in base_models if source.hub_id)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **license_keys,
        "tags": ["merge", "evomerge", method],
    }
    if not metadata["base_model"]:
        del metadata["base_model"], metadata["base_model_relation"]
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {_inline(name)}",
        f"A merge of {len(base_models)} models by `{_inline(method)}`, found with evomerge. "
        "It loads as any model of its architecture; no further code is needed.",
        *(f"> **Note:** {_inline(line)}" for line in (*notes, *warnings)),
        *_results(results, gain, gain_over),
        "## Merged models",
        _table(("name", "source", "revision", "license", "fingerprint"), map(_lineage, base_models)),
        "## Recipe",
        _fenced(recipe_yaml),
    ]
    return "\n\n".join(parts) + "\n"


def read_license(path: Path) -> str | None:
    """Return the license that the README.md in a checkpoint folder names; None if there is none to read.

    It is the hub's license id, or `other:NAME` for a license that has none.
    """
    try:
        text = read_bytes(inside(path.resolve(), "README.md"), _MAX_README).decode("utf-8", "replace")
        match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
    except (SourceError, yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    named = data.get("license")
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if not isinstance(named, str) or not named.strip():
        return None
    title = data.get("license_name") if named == "other" else None
    return f"other:{title}" if isinstance(title, str) and title else named


def _license(sources: Sequence[SourceCard]) -> tuple[dict[str, str], list[str]]:
    """Return the license keys of the metadata, and what a reader must know about them."""
    unknown = [source.name for source in sources if source.license is None]
    if unknown:
        note = f"License unknown for {', '.join(unknown)}; ask the authors before you pass this model on."
        return {}, [note]
    known = {source.license or "" for source in sources}
    if len(known) == 1:
        license_id, _, title = known.pop().partition(":")
        return {"license": license_id, **({"license_name": title} if title else {})}, []
    listed = ", ".join(f"{source.name}: {source.license}" for source in sources)
    return {"license": "other"}, [
        f"The merged models have different licenses ({listed}); all of their terms apply."
    ]


def _results(results: Sequence[Row], gain: tuple[float, float, float] | None, over: str) -> list[str]:
    if not results:
        return []
    tasks = list(dict.fromkeys(task for row in results for task in row.scores))
    rows = [
        [row.name, _interval(*row.overall), *(_score(row.scores.get(task)) for task in tasks)]
        for row in results
    ]
    parts = [
        "## Results",
        "On held-out documents. Score: mean over tasks with 95 % interval. Tasks: metric ± standard error.",
        _table(("model", "score", *tasks), rows),
    ]
    if gain is not None:
        verdict = (
            "better than" if gain[1] > 0 else "worse than" if gain[2] < 0 else "not shown to differ from"
        )
        sentence = f"Gain over {_inline(over)}: {_interval(*gain, sign='+')}."
        parts.append(f"{sentence} The merge is {verdict} it on these documents.")
    return parts


def _lineage(source: SourceCard) -> list[str]:
    where = f"[{source.hub_id}](https://huggingface.co/{source.hub_id})" if source.hub_id else None
    return [
        source.name,
        where or f"`{_inline(source.location)}`",
        source.revision or "",
        source.license or "unknown",
        f"`{source.fingerprint}`",
    ]


def _interval(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    bounds = "" if low is None or high is None else f" [{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{mean:{sign}.4f}{bounds}"


def _score(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return ""
    metric, stderr = score
    return f"{metric:.4f}" if stderr is None else f"{metric:.4f} ± {stderr:.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """Return a text that stays one line of Markdown and brings no HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"
