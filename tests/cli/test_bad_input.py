"""Everything a user can get wrong: one clear line, exit code 2, nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import main
from evomerge.store import Store
from tests.e2e.world import TASKS, make_world, write_config


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def world(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "world"
    shutil.copytree(pristine, folder)
    for task in (folder / "tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace(str(pristine.resolve()), str(folder.resolve())))
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Return all files with a hash, and folders; of a store only that it is there, since reading it writes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts and not path.name.endswith(("-wal", "-shm")):
            hashed = path.is_file() and ".db" not in path.name
            content = hashlib.sha256(path.read_bytes()).hexdigest() if hashed else ""
            found[str(path.relative_to(folder))] = content
    return found


def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """Run a command that must be refused; return its one line."""
    (line,) = complaints(folder, monkeypatch, capsys, *arguments)
    return line


def complaints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[str]:
    """Run a command that must be refused; return its lines, one a fault."""
    before = tree(folder)
    monkeypatch.setattr(sys, "argv", ["evomerge", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main()
    out, err = capsys.readouterr()
    assert raised.value.code == 2, err
    assert tree(folder) == before
    lines = [
        line
        for line in err.strip().splitlines()
        if line not in ("reading sources and tasks", "starting workers", "loading")
    ]
    assert "Traceback" not in err + out
    return lines


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def nan_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "one" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, {"format": "pt"})


def only_pickle(folder: Path) -> None:
    (folder / "one" / "model.safetensors").unlink()
    (folder / "one" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def truncated(folder: Path) -> None:
    path = folder / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lying_header(folder: Path) -> None:
    path = folder / "one" / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def other_shape(folder: Path) -> None:
    from tests.checkpoints.tiny import make_llama

    shutil.rmtree(folder / "one")
    make_llama(folder / "one", seed=1, layers=3, vocab=96, hidden=32)


def other_family(folder: Path) -> None:
    rewrite(folder / "one" / "config.json", lambda c: c.update(model_type="mistral"))


def empty_task(folder: Path) -> None:
    (folder / "tasks" / "choice.json").write_text("")


def untrusted_code(folder: Path) -> None:
    path = folder / "tasks" / "choice.yaml"
    path.write_text(path.read_text() + "process_results: !function code.results\n")


def tasks(**changes: Any) -> dict[str, Any]:
    return {"fitness": {**TASKS, **changes}}


SOURCES: list[tuple[str, Callable[[Path], None], str]] = [
    ("a missing source", lambda f: shutil.rmtree(f / "one"), "one"),
    ("a source without weights", lambda f: (f / "one" / "model.safetensors").unlink(), "one"),
    ("an unreadable config", lambda f: (f / "one" / "config.json").write_text("{"), "config.json"),
    ("a pickle", only_pickle, "pytorch_model.bin"),
    ("truncated weights", truncated, "model.safetensors"),
    ("a lying header", lying_header, "header"),
    ("other shapes", other_shape, "hidden_size"),
    ("another family", other_family, "model_type"),
    ("weights that are not finite", nan_weights, "NaN"),
]


def ended_well(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evomerge", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code in (None, 0)


def test_places_that_cannot_be(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, then outputs below a file, under too long a name, and a budget that is spent."""
    ended_well(monkeypatch, "run", "config.yaml", "--set", "budget.evaluations=4")
    for out in ("config.yaml/report.html", "x" * 300 + "/report.html", "new/" + "x" * 300):
        line = refused(world, monkeypatch, capsys, "report", "small", "--out", out)
        assert re.search(r"cannot be made|cannot be written|choose another", line), line
    capsys.readouterr()
    ended_well(monkeypatch, "resume", "small", "--evaluations", "3")
    out, err = capsys.readouterr()
    assert "note: --evaluations 3: the run has 4 already, so nothing more is searched" in err
    assert "resume small --evaluations 8" in out


@pytest.mark.parametrize("verb", ["validate", "run"])
def test_everything_that_is_missing_is_told_at_once(
    verb: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["./one", "./absent", "./nowhere"]
    write_config(world, sources={"models": models}, fitness={"function": "none.py:score"})
    lines = complaints(world, monkeypatch, capsys, verb, "config.yaml")
    assert [line.partition(":")[0] for line in lines] == ["evomerge"] * 3
    for line, part in zip(lines, ("./absent: no such", "./nowhere: no such", "none.py: cannot"), strict=True):
        assert part in line
    write_config(world, fitness={**TASKS, "tasks": ["choice", {"name": "choice", "metric": "x"}, "chois"]})
    assert "listed twice" in refused(world, monkeypatch, capsys, verb, "config.yaml")
    tasks = [{"name": "choice", "metric": "x"}, {"name": "written", "filter": "y"}]
    write_config(world, fitness={**TASKS, "tasks": tasks})
    lines = complaints(world, monkeypatch, capsys, verb, "config.yaml")
    assert [line.split(":")[1] for line in lines] == [
        *(" fitness.tasks.choice.metric", " fitness.tasks.written.filter")
    ]


@pytest.mark.parametrize(("change", "named"), [s[1:] for s in SOURCES], ids=[s[0] for s in SOURCES])
@pytest.mark.parametrize("verb", ["validate", "run"])
def test_a_broken_source_is_refused(
    verb: str,
    change: Callable[[Path], None],
    named: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(world)
    assert named in refused(world, monkeypatch, capsys, verb, "config.yaml")


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown key", {"budgets": {}}, 'did you mean "budget"'),
    ("an unknown nested key", {"budget": {"evaluation": 3}}, 'did you mean "evaluations"'),
    ("a zero budget", {"budget": {"evaluations": 0}}, "budget.evaluations"),
    ("a negative budget", {"budget": {"hours": -1}}, "budget.hours"),
    ("an unknown method", {"space": {"method": "tise"}}, 'did you mean "ties"'),
    ("reversed bounds", {"space": {"method": "ties", "parameters": {"weight": {"low": 1, "high": 0}}}}, "low must be below high"),
    ("bounds without meaning", {"space": {"method": "ties", "parameters": {"density": {"low": 0, "high": 2}}}}, "density.high"),
    ("a parameter of another method", {"space": {"method": "linear", "parameters": {"density": 0.5}}}, "density"),
    ("nothing free", {"space": {"method": "linear", "parameters": {"weight": 1.0}}}, "nothing is free"),
    ("a split that no tensor has", {"space": {"method": "linear", "split": ["attenton"]}}, "attenton"),
    ("a method without its base", {"sources": {"models": ["./one", "./two"]}}, "sources.base"),
    ("slerp of three", {"space": {"method": "slerp"}, "sources": {"models": ["./base", "./one", "./two"]}}, "slerp takes 2"),
    ("a source given twice", {"sources": {"base": "./base", "models": ["./one", {"name": "again", "path": "./one"}]}}, "one"),
    ("names used twice", {"sources": {"base": "./base", "models": ["./one", {"name": "one", "path": "./two"}]}}, "used twice"),
    ("an unknown optimizer", {"optimizer": {"name": "cmaes"}}, 'did you mean "cma_es"'),
    ("an unknown optimizer setting", {"optimizer": {"name": "cma_es", "popsize": 4}}, "population"),
    ("a population of one", {"optimizer": {"name": "cma_es", "population": 1}}, "optimizer.population"),
    ("an unknown task", tasks(tasks=["chioce"]), 'did you mean "choice"'),
    ("an unknown metric", tasks(tasks=[{"name": "choice", "metric": "acc_nrom"}]), "acc"),
    ("an unknown filter", tasks(tasks=[{"name": "choice", "filter": "strict"}]), "strict"),
    ("more documents than there are", tasks(documents={"search": 80, "select": 30, "test": 30}), "has 90"),
    ("a split without documents", tasks(documents={"search": 60, "select": 30, "test": "rest"}), "each split needs"),
    ("a weight of zero", tasks(tasks=[{"name": "choice", "weight": 0}]), "weight"),
    ("no such task folder", tasks(include_paths=["nowhere"]), "nowhere"),
    ("neither tasks nor a function", {"fitness": {}}, "either tasks or a function"),
    ("a function that is not there", {"fitness": {"function": "absent.py:score"}}, "absent.py"),
    ("a function that its file has not", {"fitness": {"function": "fitness.py:scroe"}}, 'did you mean "score"'),
    ("a name that is a path", {"name": "../up"}, "name"),
    ("a negative seed", {"seed": -1}, "seed"),
    ("a text for a number", {"seed": "many"}, "seed"),
    ("resampling without generations", {**tasks(resample=10), "optimizer": {"name": "random"}}, "fitness.resample"),
    ("drawing more than there is", tasks(resample=31), "resample"),
    ("results below a file", {"output": {"folder": "config.yaml/x"}}, "config.yaml is no directory; name another"),
    ("a store that cannot be reached", {"store": "postgresql://nobody@127.0.0.1:1/none"}, "127.0.0.1"),
    ("a start that is not there", {"optimizer": {"name": "cma_es", "start": ["absent.yaml"]}}, "absent.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), [c[1:] for c in CONFIGS], ids=[c[0] for c in CONFIGS])
def test_a_wrong_config_is_refused(
    changes: dict[str, Any],
    named: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(world, **changes)
    line = complaints(world, monkeypatch, capsys, "run", "config.yaml")[0]
    assert named in line


@pytest.mark.parametrize(
    ("change", "named"),
    [(empty_task, "choice"), (untrusted_code, "trust_code")],
    ids=["a task without documents", "a task that runs code"],
)
def test_a_wrong_task_is_refused(
    change: Callable[[Path], None],
    named: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(world)
    write_config(world, **tasks())
    assert named in refused(world, monkeypatch, capsys, "validate", "config.yaml")


TEXTS = [
    ("an empty file", "", "expected a mapping"),
    ("a list", "- a", "expected a mapping"),
    ("broken YAML", "name: [", "not valid YAML"),
    ("a key given twice", "name: a\nname: b\n", "given twice"),
    ("an alias", "name: &a x\nsources: *a\n", "alias"),
    ("a Python tag", "name: !!python/object/apply:os.system ['true']\n", "not allowed"),
]


@pytest.mark.parametrize(("text", "named"), [t[1:] for t in TEXTS], ids=[t[0] for t in TEXTS])
def test_a_file_that_is_no_config_is_refused(
    text: str, named: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "config.yaml").write_text(text)
    assert named in refused(world, monkeypatch, capsys, "validate", "config.yaml")


COMMANDS = [
    (("run", "absent.yaml"), "absent.yaml"),
    (("run", "config.yaml", "--set", "budget"), "section.key=value"),
    (("run", "config.yaml", "--set", "budget.evaluations=none"), "budget.evaluations"),
    (("show", "absent", "--store", "new.db"), "new.db"),
    (
        ("validate", "config.yaml", "--set", "workers.engine=vllm"),
        "workers.engine: vllm only scores tasks; with fitness.function, use transformers",
    ),
    (("merge", "config.yaml", "out"), "config.yaml"),
    (("merge", "absent.yaml", "out"), "absent.yaml"),
    (("evaluate", "absent", "config.yaml"), "absent"),
    (
        ("population", "import", "x.json", "config.yaml", "y.json"),
        "optimizer.name: expected niches, which alone takes founders, got cma_es",
    ),
    (("track", "small", "--to", "tensorbord:x"), 'did you mean "tensorboard"'),
    (("run", "config.yaml", "--store", "config.yaml/new/runs.db"), "config.yaml is no directory"),
]


@pytest.mark.parametrize(("arguments", "named"), COMMANDS, ids=[" ".join(c[0]) for c in COMMANDS])
def test_a_wrong_command_is_refused(
    arguments: tuple[str, ...],
    named: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert named in refused(world, monkeypatch, capsys, *arguments)


def test_a_fitness_that_always_fails_stops_the_run_early_with_the_first_error(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(world, fitness={"function": "fitness.py:broken"})
    monkeypatch.setattr(sys, "argv", ["evomerge", "run", "config.yaml"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert "the benchmark is down" in capsys.readouterr().err
    with Store.open("runs/evomerge.db") as store:
        (view,) = store.runs()
        assert view.status == "failed"
        assert "the benchmark is down" in view.error
        assert len(view.outcomes()) == 5


def test_candidates_that_score_nan_are_invalid_and_the_run_ends_well(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(
        world, fitness={"function": "fitness.py:sometimes_nan"}, budget={"evaluations": 16, "finalists": 16}
    )
    monkeypatch.setattr(sys, "argv", ["evomerge", "run", "config.yaml", "--json"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == "finished"
    with Store.open("runs/evomerge.db") as store:
        statuses = {o.status for o in store.run("small").outcomes()}
    assert statuses == {"ok", "invalid"}


def test_an_output_folder_that_exists_is_never_touched(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "method": "linear",
        "sources": [{"name": "one", "path": "./one"}, {"name": "two", "path": "./two"}],
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (world / "out").mkdir()
    (world / "out" / "precious").write_text("data")
    assert "exists" in refused(world, monkeypatch, capsys, "merge", "recipe.yaml", "out")


def test_a_full_disk_leaves_no_half_written_model(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource
    import subprocess

    recipe = {"method": "linear", "sources": [{"name": "one", "path": "./one"}]}
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def small_disk() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-B", "-m", "evomerge", "merge", "recipe.yaml", "out"],
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
        env={**os.environ, "XDG_CACHE_HOME": str(world / "cache")},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (world / "out").exists()
    assert not list(world.glob(".out*"))
