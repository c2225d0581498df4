"""Nothing that was downloaded runs: no pickle is opened, no code beside weights or tasks is executed."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evomerge.errors import FitnessError
from evomerge.fitness.settings import FitnessSettings
from evomerge.fitness.tasks import TaskSet
from evomerge.store import Store
from tests.e2e.world import TASKS, evomerge, make_world, write_config

PICKLES = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "x.ckpt",
    "x.pkl",
)
CODE = ("usercustomize.py", "conftest.py", "setup.py")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world with pickles and Python beside everything."""
    folder = tmp_path / "world"
    shutil.copytree(pristine, folder)
    for task in (folder / "tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace(str(pristine.resolve()), str(folder.resolve())))
    bomb = pickle.dumps(Bomb(folder / "mark"))
    for place in ("base", "one", "two", "tasks"):
        for name in PICKLES:
            (folder / place / name).write_bytes(bomb)
    for name in CODE:
        (folder / "tasks" / name).write_text(f"open({str(folder / 'mark')!r}, 'w')")
    monkeypatch.chdir(folder)
    return folder


def watched(
    world: Path, repository: Path, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a command; return how it ended, and what it opened, unpickled, executed and connected to."""
    log = world.parent / "log"
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "NUMBA_CACHE_DIR": str(world.parent / "numba"),
    }
    command = [sys.executable, "-m", "tests.security.watched", str(log), *arguments]
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, check=False)
    return done, log.read_text().splitlines()


def test_a_whole_run_opens_no_pickle_and_runs_no_code_that_came_with_models_or_tasks(
    world: Path, repository: Path
) -> None:
    workers = {"pool": "inline", "threads": 1}
    write_config(world, fitness=TASKS, budget={"evaluations": 4, "finalists": 1}, workers=workers)
    done, events = watched(world, repository, "run", "config.yaml", "--set", "output.export=true")
    assert done.returncode == 0, done.stderr
    assert not (world / "mark").exists()
    here = str(world.resolve())
    opened = [line for line in events if line.startswith("open ") and here in line]
    assert any("model.safetensors" in line for line in opened)  # the watcher sees what is opened
    assert not [line for line in opened if line.split()[1].strip("'").endswith((*PICKLES, ".bin", ".pt"))]
    # What is unpickled at all are numba's own caches and copies within libraries: nothing of the system.
    loaded = [line for line in events if line.startswith("pickle.find_class")]
    assert not [
        line
        for line in loaded
        if any(f"'{name}'" in line for name in ("os", "posix", "subprocess", "builtins.eval"))
    ]
    assert not [line for line in events if line.startswith("os.system")]
    assert not [
        line
        for line in events
        if line.startswith("socket.connect")
        and "127.0.0.1" not in line
        and "AF_UNIX" not in line
        and "('" in line
    ]


def test_a_run_lists_the_trusted_code_with_its_hashes(world: Path) -> None:
    for name in CODE:
        (world / "tasks" / name).unlink()
    (world / "tasks" / "code.py").write_text("def text(document):\n    return document['q']\n")
    task = world / "tasks" / "choice.yaml"
    task.write_text(task.read_text().replace("doc_to_text: '{{q}}'", "doc_to_text: !function code.text"))
    assert "!function" in task.read_text()
    write_config(world, fitness=TASKS)
    done = evomerge(world, "validate", "config.yaml")
    assert done.returncode == 2
    assert "trust_code" in done.stderr
    write_config(world, fitness={**TASKS, "trust_code": ["tasks"]}, budget={"evaluations": 4, "finalists": 1})
    done = evomerge(world, "run", "config.yaml")
    assert done.returncode == 0, done.stderr
    with Store.open("runs/evomerge.db") as store:
        code = store.run("small").facts["code"]
    assert set(code) == {"tasks/choice.yaml", "tasks/written.yaml", "tasks/code.py"}
    assert {len(digest) for digest in code.values()} == {64}


def test_a_metric_that_is_a_script_is_not_run(world: Path) -> None:
    evil = world / "evil"
    evil.mkdir()
    (evil / "evil.py").write_text(f"open({str(world / 'mark')!r}, 'w')")
    task = world / "tasks" / "choice.yaml"
    for metric in ({"metric": "./evil"}, {"metric": str(evil)}, {"metric": "acc", "hf_evaluate": True}):
        data = {**yaml.safe_load(task.read_text()), "metric_list": [metric]}
        task.write_text(yaml.safe_dump(data))
        with pytest.raises(FitnessError, match="never run"):
            TaskSet(FitnessSettings.model_validate(TASKS), 0, world)
    assert not (world / "mark").exists()


def test_data_whose_loading_runs_code_is_not_loaded(world: Path) -> None:
    task = world / "tasks" / "choice.yaml"
    data = yaml.safe_load(task.read_text())
    data["dataset_kwargs"]["data_files"]["test"] = str(world / "tasks" / "x.pkl")
    task.write_text(yaml.safe_dump({**data, "dataset_path": "pandas"}))
    with pytest.raises(FitnessError, match="whose loading runs code"):
        TaskSet(FitnessSettings.model_validate(TASKS), 0, world)
    assert not (world / "mark").exists()


def test_a_task_that_runs_what_a_model_writes_needs_consent(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    task = world / "tasks" / "choice.yaml"
    task.write_text(task.read_text() + "unsafe_code: true\n")
    with pytest.raises(FitnessError, match="allow_unsafe_code"):
        TaskSet(FitnessSettings.model_validate(TASKS), 0, world)
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    assert TaskSet(FitnessSettings.model_validate({**TASKS, "allow_unsafe_code": True}), 0, world).tasks
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


def test_a_template_that_breaks_out_of_its_sandbox_is_refused(world: Path) -> None:
    task = world / "tasks" / "choice.yaml"
    reach = "{{ q.__class__.__base__.__subclasses__() }}"
    task.write_text(task.read_text().replace("'{{q}}'", f"'{reach}'"))
    with pytest.raises(FitnessError, match="SecurityError"):
        TaskSet(FitnessSettings.model_validate(TASKS), 0, world)
