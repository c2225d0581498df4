"""Who can share beginnings is said before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.config import parse_config
from evomerge.plan import Plan
from tests.checkpoints.tiny import make_model
from tests.fitness import tiny_tasks as tiny


@pytest.mark.parametrize(("kind", "shares"), [("llama", True), ("gemma2", True), ("mixtral", False)])
def test_a_plan_warns_of_models_that_read_every_request_whole(
    kind: str, shares: bool, tmp_path: Path
) -> None:
    for seed, name in enumerate(("one", "two")):
        make_model(tmp_path / name, kind, seed=seed)
    tiny.write_choice(tmp_path / "tasks", "choice")
    data: dict[str, Any] = {
        "name": "small",
        "sources": {"models": ["one", "two"]},
        "space": {"method": "linear"},
        "fitness": {
            "tasks": ["choice"],
            "include_paths": ["tasks"],
            "documents": {"search": 4, "select": 4, "test": 4},
        },
    }
    warned = [w for w in Plan(parse_config(data, "config"), tmp_path).warnings if "share_prefixes" in w]
    assert bool(warned) != shares
    if warned:
        assert "mixtral" in warned[0]
        data["fitness"] = {**data["fitness"], "share_prefixes": False}
        quiet = Plan(parse_config(data, "config"), tmp_path).warnings
        assert not any("share_prefixes" in warning for warning in quiet)
