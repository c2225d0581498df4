"""Tokens and passwords stay where they are: not in the store, a report, a card, a log or a line of error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evomerge.config import read_config
from evomerge.drive import make_pool, start
from evomerge.errors import ConfigError, UserError, redacted
from evomerge.plan import Plan
from evomerge.store import Store
from tests.e2e.world import evomerge, evomerge_anew, make_world, write_config

HUB, PASSWORD = "hf_" + "Qz7" * 11, "p4ss-W0rd!"
URL = f"postgresql://me:{PASSWORD}@127.0.0.1:1/runs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_no_file_that_a_run_writes_holds_a_secret(world: Path) -> None:
    """The fitness raises errors that hold them, the environment and the config's store too."""
    (world / "fitness.py").write_text(
        (world / "fitness.py").read_text()
        + f"""
def telling(model, tokenizer, request):
    if request.recipe.method == "task_arithmetic" and request.recipe.parameters["lambda"][0].value == 0.6:
        raise RuntimeError("cannot reach {URL} with {HUB} at https://x/?token=" + {PASSWORD!r})
    return score(model, tokenizer, request)
"""
    )
    write_config(
        world,
        fitness={"function": "fitness.py:telling"},
        budget={"evaluations": 4, "finalists": 1},
        store=URL,
        output={"report": True, "export": True},
    )
    environment = {"HF_TOKEN": HUB, "HUGGING_FACE_HUB_TOKEN": HUB, "PGPASSWORD": PASSWORD}
    done = evomerge_anew(world, "run", "config.yaml", "--store", "runs/s.db", env=environment)
    assert done.returncode == 0, done.stderr
    shown = evomerge(world, "show", "small", "--store", "runs/s.db", env=environment)
    assert "cannot reach postgresql://me:***@127.0.0.1:1/runs with hf_***" in shown.stdout.replace("\n", " ")
    written = [path for path in (world / "runs").rglob("*") if path.is_file()]
    assert {"report.html", "README.md", "s.db"} <= {path.name for path in written}
    for path in written:
        assert HUB.encode() not in path.read_bytes(), path
        assert PASSWORD.encode() not in path.read_bytes(), path
    for text in (done.stdout, done.stderr, shown.stdout, shown.stderr):
        assert HUB not in text
        assert PASSWORD not in text


def test_a_store_that_cannot_be_reached_is_named_without_its_password(world: Path) -> None:
    for arguments in (("runs", "--store", URL), ("run", "config.yaml", "--store", URL)):
        done = evomerge(world, *arguments)
        assert done.returncode == 2
        assert PASSWORD not in done.stdout + done.stderr


def test_workers_do_not_inherit_the_password_of_the_store(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_STORE", URL)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    config = read_config(write_config(world, workers={"pool": "ray", "count": 1}))
    pool = make_pool(Plan(config, world))
    assert PASSWORD not in str(pool._environment())  # type: ignore[attr-defined]
    assert pool._environment()["EVOMERGE_STORE"] == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {URL}", "see postgresql://me:***@127.0.0.1:1/runs"),
        ("postgresql://u@h/d?password=x&sslmode=on", "postgresql://u@h/d?password=***&sslmode=on"),
        (f"token {HUB}", "token hf_***"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("sources.base: 10:30", "sources.base: 10:30"),
    ],
)
def test_what_is_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert str(UserError(text)) == shown


def test_a_stored_config_has_no_password(world: Path, tmp_path: Path) -> None:
    config = read_config(write_config(world, store=URL, budget={"evaluations": 4, "finalists": 1}))
    with Store.open(tmp_path / "s.db") as store:
        assert start(config, world, store).config["store"] == "postgresql://me:***@127.0.0.1:1/runs"


def test_a_message_is_short_and_printable() -> None:
    line = str(ConfigError("a\x1b[31m\u202e\ud800\n b" + "x" * 10_000))
    assert line.isprintable()
    assert line.startswith("a\\x1b[31m\\u202e\\ud800 bxxx")
    assert len(line) < 1300


os.environ.setdefault("HF_HUB_OFFLINE", "1")
