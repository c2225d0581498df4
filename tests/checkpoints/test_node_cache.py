"""Copies of sources on a node's own disk: made once, checked, bounded, shared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.checkpoints.node_cache import FOLDER, LIMIT, NodeCache
from evomerge.checkpoints.opening import open_checkpoint
from evomerge.errors import SourceError, UserError
from evomerge.recipe import SourceRef, parse_recipe
from tests.checkpoints.tiny import make_llama


@pytest.fixture
def refs(tmp_path: Path) -> dict[str, SourceRef]:
    """Three sources with fingerprints, on what stands for a shared filesystem."""
    found = {}
    for seed, name in enumerate(("one", "two", "three")):
        make_llama(tmp_path / "shared" / name, seed=seed)
        fingerprint = open_checkpoint(str(tmp_path / "shared" / name)).fingerprint
        found[name] = SourceRef(name=name, path=f"shared/{name}", fingerprint=fingerprint)
    return found


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_a_source_is_copied_once_and_is_the_same_model(refs: dict[str, SourceRef], tmp_path: Path) -> None:
    folder = tmp_path / "local"
    local = NodeCache(folder).localized(refs["one"], tmp_path)
    assert local.path == str(folder / str(refs["one"].fingerprint))
    assert local.identity == refs["one"].identity
    assert open_checkpoint(local.path).fingerprint == refs["one"].fingerprint
    written = {file: file.stat().st_mtime_ns for file in Path(local.path).iterdir()}
    shutil.rmtree(tmp_path / "shared")
    assert NodeCache(folder).localized(refs["one"], tmp_path) == local, "the original is not needed any more"
    assert {file: file.stat().st_mtime_ns for file in Path(local.path).iterdir()} == written


def test_a_damaged_copy_is_made_again(refs: dict[str, SourceRef], tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "local")
    weights = Path(cache.localized(refs["one"], tmp_path).path) / "model.safetensors"
    cache.close()
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\0\1\2\3")
    cache.localized(refs["one"], tmp_path)
    assert weights.read_bytes() == good


def test_a_source_that_changed_is_refused_and_leaves_nothing(
    refs: dict[str, SourceRef], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "shared" / "one")
    shutil.copytree(tmp_path / "shared" / "two", tmp_path / "shared" / "one")
    with pytest.raises(SourceError, match="source one .* has changed since the run began"):
        NodeCache(tmp_path / "local").localized(refs["one"], tmp_path)
    assert entries(tmp_path / "local") == set()


def test_what_a_killed_worker_left_is_swept(refs: dict[str, SourceRef], tmp_path: Path) -> None:
    left = tmp_path / "local" / f".{refs['one'].fingerprint}"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    NodeCache(tmp_path / "local").localized(refs["one"], tmp_path)
    assert entries(tmp_path / "local") == {refs["one"].fingerprint}


def test_the_oldest_entry_that_nobody_uses_makes_room(refs: dict[str, SourceRef], tmp_path: Path) -> None:
    folder = tmp_path / "local"
    most = int(2.5 * size(tmp_path / "shared" / "one"))
    users = [NodeCache(folder, most) for _ in range(3)]
    for age, (user, name) in enumerate(zip(users, ("one", "two"), strict=False)):
        user.localized(refs[name], tmp_path)
        os.utime(folder / f"{refs[name].fingerprint}.lock", (age, age))
    before = {str(refs["one"].fingerprint), str(refs["two"].fingerprint)}
    assert users[2].localized(refs["three"], tmp_path) == refs["three"], "in use: read where it lies"
    assert entries(folder) == before
    users[1].close()  # the newer one
    assert users[2].localized(refs["three"], tmp_path).path.startswith(str(folder))
    assert entries(folder) == {str(refs["one"].fingerprint), str(refs["three"].fingerprint)}


def test_workers_that_start_together_copy_once(refs: dict[str, SourceRef], tmp_path: Path) -> None:
    code = (
        "import sys, shutil\nfrom pathlib import Path\n"
        "from evomerge.checkpoints.node_cache import NodeCache\n"
        "from evomerge.recipe import SourceRef\ncopies = []\nplain = shutil.copyfile\n"
        "shutil.copyfile = lambda *a: (copies.append(a), plain(*a))\n"
        "cache = NodeCache(Path('local'))\nsys.stdin.readline()\n"
        f"ref = SourceRef.model_validate({refs['one'].model_dump()!r})\n"
        "print(len(copies), cache.localized(ref, Path('.')).path, len(copies))\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for worker in workers:
        worker.stdin.write("\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
    told = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert len({path for _, path, _ in told}) == 1
    assert sorted(int(copies) > 0 for *_, copies in told) == [False, False, True]


def test_a_recipe_has_its_sources_copied(refs: dict[str, SourceRef], tmp_path: Path) -> None:
    data = {
        "method": "linear",
        "sources": [refs[name].model_dump(exclude_none=True) for name in ("one", "two")],
    }
    nested = SourceRef(name="merged", path="merged.yaml", recipe=parse_recipe(data, "merged.yaml"))
    local = NodeCache(tmp_path / "local").localized(nested, tmp_path)
    assert local.identity == nested.identity
    assert local.recipe is not None
    assert {Path(ref.path).parent for ref in local.recipe.refs} == {tmp_path / "local"}


def test_the_node_says_where_and_how_much(tmp_path: Path) -> None:
    assert NodeCache.of_node({}) is None
    assert NodeCache.of_node({FOLDER: str(tmp_path / "x"), LIMIT: "0.5"}) is not None
    for limit in ("much", "0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"{LIMIT}: expected GiB above 0"):
            NodeCache.of_node({FOLDER: str(tmp_path), LIMIT: limit})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{FOLDER}: .*name a local folder"):
        NodeCache.of_node({FOLDER: str(tmp_path / "file" / "x")})
