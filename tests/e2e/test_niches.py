"""A search with niches over segments: killed, resumed, exported, and read as a population."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.store import Store
from tests.e2e.test_resume import SLOW, kill
from tests.e2e.world import evomerge, history, make_world, start, wait_for_outcomes, write_config

SEGMENTS = {
    "name": "seg",
    "sources": {"models": ["./base", "./one", "./two"]},
    "space": {"kind": "segments", "cells": 64, "chromosomes": [["attention"]]},
    "optimizer": {"name": "niches", "size": 5},
    "fitness": {"function": "fitness.py:solved"},
    "budget": {"evaluations": 24, "finalists": 3},
    "baselines": None,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_config(folder, "seg.yaml", **SEGMENTS)
    done = evomerge(folder, "run", "seg.yaml", "--store", "whole.db")
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(world: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "killed.db")
    process = start(world, "run", "seg.yaml", "--store", store, env=SLOW)
    assert wait_for_outcomes(process, store, "seg", 17), process.stderr.read()
    kill(process)
    done = evomerge(world, "resume", "seg", "--store", store)
    assert done.returncode == 0, done.stderr
    assert history(store, "seg") == history(world / "whole.db", "seg")


def test_the_exported_model_is_the_table_over_the_sources(world: Path, tmp_path: Path) -> None:
    with Store.open(world / "whole.db", create=False) as opened:
        candidates = [c for c in opened.run("seg").candidates() if c.index is not None]
    child = max(candidates, key=lambda c: len(c.genome or ()))
    assert len(child.genome or ()) > 8, "it has segments"
    target = tmp_path / "out"
    number = str(child.number)
    done = evomerge(world, "export", "seg", str(target), "--candidate", number, "--store", "whole.db")
    assert done.returncode == 0, done.stderr
    assert not (target / "mergekit.yaml").exists()
    found = load_file(target / "model.safetensors")
    sources = [load_file(world / name / "model.safetensors") for name in ("base", "one", "two")]
    tables = child.recipe["segments"]
    filled = [0, 0]
    for name, place in layout_of(Checkpoint.open(world / "base")).places.items():
        table = 0 if place.role == "attention" else 1
        size = sources[0][name].numel()
        entries = torch.arange(filled[table], filled[table] + size)
        starts = torch.tensor(tables[table]["starts"])
        rows = torch.tensor(tables[table]["coefficients"], dtype=torch.float64)
        factors = rows[torch.searchsorted(starts, entries, right=True) - 1]
        want = sum(factors[:, i] * source[name].flatten().double() for i, source in enumerate(sources))
        torch.testing.assert_close(found[name].flatten().double(), want, rtol=1e-6, atol=1e-8)
        filled[table] += size


@pytest.mark.ray
def test_two_workers_are_recorded_in_order_of_arrival_and_resumed(world: Path, tmp_path: Path) -> None:
    write_config(
        world, "two.yaml", **{**SEGMENTS, "name": "two"}, workers={"pool": "ray", "count": 2, "threads": 1}
    )
    store = str(tmp_path / "two.db")
    process = start(world, "run", "two.yaml", "--store", store, env=SLOW)
    assert wait_for_outcomes(process, store, "two", 14), process.stderr.read()
    kill(process)
    before = history(store, "two")
    done = evomerge(world, "resume", "two", "--store", store, "--set", "workers.pool=inline")
    assert done.returncode == 0, done.stderr
    after = history(store, "two")
    assert after["candidates"][: len(before["candidates"])] == before["candidates"]
    assert after["status"] == "finished"


REFUSED = {
    "another optimizer": (
        {"optimizer": {"name": "cma_es"}},
        "a space of kind segments needs the optimizer niches",
    ),
    "fresh documents": ({"fitness": {"function": "f.py:x", "resample": 5}}, "fitness.resample"),
    "no such role": ({"space": {"kind": "segments", "chromosomes": [["expert"]]}}, "space.chromosomes"),
    "a role twice": ({"space": {"kind": "segments", "chromosomes": [["mlp"], ["mlp"]]}}, "none twice"),
    "one source": ({"sources": {"models": ["./one"]}}, "segments need two or more sources, got 1"),
    "mutation": ({"optimizer": {"name": "niches", "mutation": 0.1}}, "optimizer.mutation"),
    "unknown split": ({"space": {"kind": "segments", "splits": "word"}}, "space.splits"),
    "a method": ({"space": {"kind": "segments", "method": "ties"}}, 'unknown key "method"'),
    "no niches": ({"optimizer": {"name": "nichs"}}, 'did you mean "niches"?'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case: str, world: Path) -> None:
    changes, message = REFUSED[case]
    write_config(world, "bad.yaml", **{**SEGMENTS, **changes})
    done = evomerge(world, "validate", "bad.yaml")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_scores_that_cannot_be_shared_end_the_run_in_one_line(world: Path, tmp_path: Path) -> None:
    write_config(
        world, "bad.yaml", **{**SEGMENTS, "name": "bad", "fitness": {"function": "fitness.py:score"}}
    )
    done = evomerge(world, "run", "bad.yaml", "--store", str(tmp_path / "bad.db"))
    assert done.returncode == 2
    assert "optimizer niches needs scores from 0 to 1: task near has -" in done.stderr
    assert "Traceback" not in done.stderr
