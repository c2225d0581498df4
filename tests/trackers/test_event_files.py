"""TensorBoard reads what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="pip install 'evomerge[tensorboard]'")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evomerge.store import Store
from evomerge.trackers.targets import parse_target
from tests.contracts.tracker import TrackerContract, begin, score, track


class TestEventFiles(TrackerContract):
    where = "tensorboard:tb"

    def read(self, folder: Path) -> dict[int, dict[str, float]]:
        loaded = EventAccumulator(str(folder / "tb" / "small"), size_guidance={"scalars": 0}).Reload()
        found: dict[int, dict[str, float]] = {}
        for name in loaded.Tags()["scalars"]:
            for event in loaded.Scalars(name):
                assert name not in found.setdefault(event.step, {})
                found[event.step][name] = event.value
        return dict(sorted(found.items()))


def test_config_and_result_are_texts(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a.db") as store:
        run = begin(store)
        score(run, [0, 1])
        track(run, parse_target("tensorboard:tb", tmp_path))
    loaded = EventAccumulator(str(tmp_path / "tb" / "small")).Reload()
    texts = {
        name: loaded.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in ("config", "result")
    }
    assert "name: cma_es" in texts["config"]
    assert texts["result"].startswith("finished. No winner has been chosen yet.")


def test_another_run_of_that_name_is_refused(tmp_path: Path) -> None:
    target = parse_target("tensorboard:tb", tmp_path)
    with Store.open(tmp_path / "a.db") as first, Store.open(tmp_path / "b.db") as second:
        runs = [begin(first), begin(second)]
        score(runs[0], [0])
        track(runs[0], target)
        with pytest.raises(AssertionError, match='has another run "small"'):
            track(runs[1], target)


def test_a_torn_end_of_a_file_is_written_again(tmp_path: Path) -> None:
    target = parse_target("tensorboard:tb", tmp_path)
    with Store.open(tmp_path / "a.db") as store:
        run = begin(store)
        score(run, [0, 1, 2])
        track(run, target, status=None)
        (file,) = (tmp_path / "tb" / "small").glob("events*")
        file.write_bytes(file.read_bytes()[:-20])
        assert track(run, target, status=None) == [2]
    assert list(TestEventFiles().read(tmp_path)) == [1, 2, 3]
