"""A run as one HTML file: result, figures, failures, time, recipe and lineage. Nothing in it is loaded."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from evomerge.checkpoints.whole import write_whole
from evomerge.errors import RecipeError, UserError
from evomerge.recipe import Recipe, parse_recipe
from evomerge.records import SPLITS
from evomerge.report import figures
from evomerge.report.depth import WHOLE, by_parameter
from evomerge.report.figures import Drawing, Estimate, Look
from evomerge.report.niches import population_section, segment_coefficients
from evomerge.report.path_figure import path_context
from evomerge.report.summary import Summary
from evomerge.store import RunView

MOST_REASONS = 20
OVERALL = "score over all tasks"
PHASES = ("merge", "evaluate", "other")

_TEMPLATE = Path(__file__).with_name("page.html")

_WHERE = {
    "test": "on test documents, by which nothing was chosen",
    "select": "on select documents, on which the winner was chosen: not yet the result",
    "search": "on search documents, which guide the search: optimistic, and not the result",
}


def write_report(run: RunView, target: Path) -> Path:
    """Write a run's report as one HTML file, all or nothing.

    Args:
        run: The run, in any state.
        target: The file; one that exists is replaced.

    Returns:
        The target.

    Raises:
        UserError: The file cannot be written, or the store cannot be read.
    """
    if target.is_dir():
        raise UserError(f"{target}: it is a directory; give the name of a file")
    page = render(run).encode("utf-8")
    try:
        write_whole(target, page)
    except OSError as problem:
        text = f"{target}: the report cannot be written ({problem.strerror}); choose another file"
        raise UserError(text) from None
    return target


def render(run: RunView) -> str:
    """Return the page."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: figures.clean(value) if type(value) is str else value,
    )
    environment.filters.update(number=_number, estimate=_estimate, interval=_interval)
    environment.filters.update(length_of=_length, moment=_moment)
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(_context(Summary(run)))


def _context(summary: Summary) -> dict[str, Any]:
    run, data = summary.run, summary.to_json()
    best = data["best"]
    models = [*([best] if best else []), *data["baselines"]]
    looks = {row["candidate"]: _look(row["name"], place) for place, row in enumerate(data["baselines"])}
    if best:
        looks[best["candidate"]] = Look("winner" if summary.chosen else "best on search", "winner", "o")
    recipe = _recipe(summary)
    # Of a path, what is left to show over depth is the merge that it runs through, if it is one.
    merge = recipe.reference.recipe if recipe and recipe.path else recipe
    events = run.events(kind=("drift_accepted", "started", "optimizer", "optimizer_finished"))
    return {
        **data,
        "verdict": summary.verdict,
        "measured": data["gain"] is not None and data["gain"]["low"] is not None,
        "models": models,
        "looks": looks,
        "progress": _progress(summary, looks),
        "recipe": recipe,
        "recipe_text": recipe.to_yaml() if recipe else json.dumps(best["recipe"], indent=2) if best else "",
        "path": path_context(recipe, looks, _look),
        "coefficients": _coefficients(merge, run.facts, looks),
        "population": population_section(run, summary.best),
        "task_scores": _tasks(summary, models, looks),
        "gain_drawing": _gains(data["gains"]),
        "reasons": _reasons(summary),
        "most_reasons": MOST_REASONS,
        "times": _times(summary),
        "documents": _documents(summary),
        "drift": [line for e in events if e.kind == "drift_accepted" for line in e.data.get("changes", [])],
        "sessions": sum(event.kind == "started" for event in events),
        "ended": [str(e.data.get("reason", "")) for e in events if e.kind == "optimizer_finished"],
        "noted": [str(e.data.get("note", "")) for e in events if e.kind == "optimizer"],
        "facts": run.facts,
        "optimizer": (run.config.get("optimizer") or {}).get("name"),
        "seed": run.config.get("seed", 0),
    }


def _look(name: str, place: int) -> Look:
    """Return how the baseline at a place of the list is drawn."""
    marker = figures.MARKERS[(place + place // figures.SERIES) % len(figures.MARKERS)]
    return Look(name, f"s{place % figures.SERIES}", marker)


def _recipe(summary: Summary) -> Recipe | None:
    if summary.best is None:
        return None
    with contextlib.suppress(RecipeError):
        return parse_recipe(summary.recipe(summary.best), f"candidate {summary.best}")
    return None


# Figure 1: the search.


def _progress(summary: Summary, looks: Mapping[int, Look]) -> dict[str, Any] | None:
    """Return the figure of the search and what its caption says; None before the first score."""
    asked = [(c.number, (c.index or 0) + 1, o.score) for c, o in summary.progress()]
    points = [(place, score) for _, place, score in asked if score is not None]
    failed = [place for _, place, score in asked if score is None]
    best = summary.best
    baselines = [(look, summary.search[n]) for n, look in looks.items() if n != best and n in summary.search]
    if not points and not baselines:
        return None
    winner = None
    if best in summary.search:
        place = next((place for number, place, _ in asked if number == best), len(asked) + 1)
        winner = (place, summary.search[best])
    label = f"Search scores of {len(points)} candidates in the order of evaluation; {len(failed)} have none."
    if points:
        top = max(points, key=lambda point: point[1])
        label += f" The best is {top[1]:.3f} at evaluation {top[0]}."
    label += "".join(f" {look.name}: {score:.3f}." for look, score in baselines)
    low, _ = figures.frame([s for _, s in points], [s for _, s in baselines])
    return {
        "drawing": figures.progress(points, failed, baselines, winner, label),
        "points": len(points),
        "thinned": len(points) > figures.MOST_POINTS,
        "below": sum(score < low for _, score in points),
        "failed": len(failed),
        "hidden": max(0, len(baselines) - figures.MOST_LINES),
        "winner": winner is not None,
        "mean": best is not None and summary.candidates[best].origin == "mean",
    }


# Figure 2: the recipe over depth.


def _coefficients(
    recipe: Recipe | None, facts: Mapping[str, Any], looks: Mapping[int, Look]
) -> dict[str, Any]:
    """Return a figure of what varies over depth, and rows for what is one number."""
    layers = int(facts.get("layers") or 0)
    empty: dict[str, Any] = {"drawing": None, "looks": [], "names": [], "constants": [], "whole": []}
    if recipe is None:
        return empty
    owners = [source.name for source in recipe.sources]
    by_name = {look.name: look for number, look in looks.items()} | {WHOLE: Look(WHOLE, "ink", "o")}
    for place, owner in enumerate(owners):
        # Sources that were no baselines, as in a run that is not that far.
        by_name.setdefault(owner, _look(owner, place))
    if recipe.segments:
        return segment_coefficients(recipe, facts, by_name) or empty
    panels, constants, whole = [], [], []
    for (parameter, tensors), rules in by_parameter(recipe).items():
        if layers > 1 and any(isinstance(rule.value, tuple) for rule in rules.values()):
            depths = [layer / (layers - 1) for layer in range(layers)]
            lines = [(by_name[o], [float(rule.at(d)) for d in depths]) for o, rule in rules.items()]
            panels.append(figures.Panel(f"{parameter}, {tensors}", parameter, lines))
        elif WHOLE in rules:
            whole.append((parameter, tensors, rules[WHOLE].value))
        else:
            cells = [rules[name].value if name in rules else None for name in owners]
            constants.append((parameter, tensors, cells))
    drawn = {look.name: look for panel in panels for look, _ in panel.lines}
    return {
        "drawing": figures.coefficients(panels, _panels_in_words(panels)) if panels else None,
        "looks": list(drawn.values()),
        "names": owners,
        "constants": constants,
        "whole": whole,
    }


def _panels_in_words(panels: Sequence[figures.Panel]) -> str:
    parts = ["The winner's parameters from the first layer to the last."]
    for panel in panels:
        ends = ", ".join(f"{look.name} {line[0]:.2f} to {line[-1]:.2f}" for look, line in panel.lines)
        parts.append(f"{panel.title}: {ends}.")
    return " ".join(parts)


# Figure 3: tasks. Figure 4: gains.


def _tasks(
    summary: Summary, models: Sequence[Mapping[str, Any]], looks: Mapping[int, Look]
) -> dict[str, Any]:
    """Return a figure of scores by task on the best documents there are, and what it is drawn from."""
    split = next((s for s in ("test", "select") if models and models[0][s]), "search")
    scores: dict[int, Mapping[str, Any]] = {}
    for model in models:
        found = _on_search(summary, model["candidate"]) if split == "search" else model[split]
        if found:
            scores[model["candidate"]] = found
    rules = summary.rules
    names = list(dict.fromkeys(task for found in scores.values() for task in found["tasks"]))
    rows: dict[str, list[tuple[Look, Estimate]]] = {}
    if len(names) > 1:
        rows[OVERALL] = [(looks[n], _estimate(found)) for n, found in scores.items()]
    for name in names:
        rows[name] = [
            (looks[n], _estimate(found["tasks"][name]))
            for n, found in scores.items()
            if name in found["tasks"]
        ]
    groups: dict[str, list[tuple[str, list[tuple[Look, Estimate]]]]] = {}
    for name, row in rows.items():
        rule = rules.get(name)
        share = all(0 <= estimate.value <= 1 for _, estimate in row)
        metric = "score" if share else rule.metric if rule else name
        if rule is not None and not rule.higher_is_better:
            metric += " (lower is better)"
        groups.setdefault(metric, []).append((name, row))
    drawn = [figures.TaskRows(metric, found) for metric, found in groups.items()]
    label = f"Scores of {len(scores)} models on {len(names)} tasks; the table below has the numbers."
    return {
        "drawing": figures.tasks(drawn, label) if drawn else None,
        "looks": [looks[number] for number in scores],
        "rows": list(rows.items()),
        "where": _WHERE[split],
        "stderr": split == "search",
    }


def _on_search(summary: Summary, number: int) -> dict[str, Any] | None:
    """Return the scores on all search documents, or on the draw of the candidate's generation."""
    draw = f"search@{summary.candidates[number].generation}"
    return summary.scores(number, "search") or summary.scores(number, draw)


def _estimate(found: Mapping[str, Any]) -> Estimate:
    value = found["score"] if "score" in found else found["metric"]
    low, high, stderr = found.get("low"), found.get("high"), found["stderr"]
    if low is None and stderr:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    return _between(value, low, high)


def _between(value: float, low: float | None, high: float | None) -> Estimate:
    """Return an estimate; an interval without width comes from single numbers and says nothing."""
    return Estimate(value) if low == high else Estimate(value, low, high)


def _gains(gains: Sequence[Mapping[str, Any]]) -> Drawing | None:
    if not gains:
        return None
    rows = [
        (
            g["over"],
            _between(100 * g["mean"], *(None if g[e] is None else 100 * g[e] for e in ("low", "high"))),
        )
        for g in gains
    ]
    words = "; ".join(f"{name} {figures.amount(gain)}" for name, gain in rows)
    return figures.gains(rows, f"Gain of the winner in points over each baseline: {words}.")


# Tables.


def _reasons(summary: Summary) -> list[dict[str, Any]]:
    """Return failures by status and reason, most frequent first; reasons that differ in numbers are one."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for failure in summary.failures():
        reason = figures.shortened(failure["reason"], 400) or "no reason given"
        key = (failure["status"], re.sub(r"\d+", "0", reason))
        row = found.setdefault(key, {"status": failure["status"], "reason": reason, "numbers": []})
        row["numbers"].append(failure["candidate"])
    return sorted(found.values(), key=lambda row: -len(row["numbers"]))


def _times(summary: Summary) -> dict[str, Any]:
    """Return worker seconds by split and phase, and wall time."""
    rows: dict[str, dict[str, float]] = {}
    for outcome in summary.outcomes.values():
        row = rows.setdefault(
            outcome.documents.partition("@")[0], {"scored": 0, "repeats": 0, **dict.fromkeys(PHASES, 0.0)}
        )
        cost = outcome.cost
        merge, evaluate = cost.get("merge", 0.0), cost.get("evaluate", 0.0)
        row["scored"] += 1
        row["repeats"] += not cost
        row["merge"] += merge
        row["evaluate"] += evaluate
        row["other"] += max(0.0, cost.get("total", 0.0) - merge - evaluate)
    total = {phase: sum(row[phase] for row in rows.values()) for phase in PHASES}
    busy = sum(total.values())
    wall = summary.run.updated - summary.run.created
    return {
        "rows": [(split, rows[split]) for split in SPLITS if split in rows],
        "total": total,
        "scored": sum(row["scored"] for row in rows.values()),
        "repeats": sum(row["repeats"] for row in rows.values()),
        "shares": [(phase, 100 * seconds / busy) for phase, seconds in total.items()] if busy else [],
        "wall": wall,
        "rate": 60 * len(summary.outcomes) / wall if wall > 0 else None,
        "busy": busy / wall if wall > 0 else None,
    }


def _documents(summary: Summary) -> dict[str, Any]:
    """Return the number of documents of each split, by task and in all."""
    sets = {split: summary.run.document_set(split) or {} for split in SPLITS}
    draws = sorted({key for _, key in summary.outcomes if "@" in key})
    drawn = summary.run.document_set(draws[0]) if draws else None
    names = list(dict.fromkeys(name for found in sets.values() for name in found))
    return {
        "rows": [(name, [len(sets[split].get(name, ())) for split in SPLITS]) for name in names],
        "total": [sum(map(len, sets[split].values())) for split in SPLITS],
        "draws": len(draws),
        "drawn": sum(map(len, drawn.values())) if drawn else None,
    }


# Numbers for people.


def _number(value: Any) -> str:
    """Return a number with three decimals, a switch or choice as it is, a dash for nothing."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool | str):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(f"{part:.3f}" for part in value)
    return f"{value:.3f}".replace("-", "\u2212")


def _interval(found: Estimate) -> str:
    """Return `0.480 to 0.544`; nothing where there is no interval."""
    return "" if found.low is None else f"{_number(found.low)} to {_number(found.high)}"


def _length(seconds: float) -> str:
    """Return a length of time, such as `3 min 20 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
