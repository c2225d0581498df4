"""W&B's offline files hold what was written."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="pip install 'evomerge[wandb]'")

from wandb.proto.wandb_internal_pb2 import Record

from tests.contracts.tracker import TrackerContract, plain


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def records(file: Path) -> Iterator[Record]:
    """Yield the records of an offline file: 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def ended(file: Path) -> list[Record]:
    """Return all records; W&B's own process writes them a moment after the run has ended."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = list(records(file))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{file} has no end")


class TestWandbRun(TrackerContract):
    where = "wandb:merging"

    def read(self, folder: Path) -> dict[int, dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        ids = set()
        for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
            ids.add(file.stem)
            for record in ended(file):
                if not record.history.item:
                    continue
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                step = int(items["outcomes"])
                assert step not in found
                found[step] = plain(items)
        assert len(ids) == 1
        return dict(sorted(found.items()))
