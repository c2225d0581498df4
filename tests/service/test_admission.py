"""Which configs a client may send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigError
from evomerge.service.admission import admit, digest_of, folder_of, key_of, parse_submitted
from evomerge.service.settings import ServiceSettings
from tests.service.live import settings_in

CONFIG: dict[str, Any] = {
    "name": "mine",
    "sources": {"base": "./base", "models": ["./one", "org/name"]},
    "space": {"method": "task_arithmetic"},
    "fitness": {"tasks": ["arc_easy"]},
}


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    settings = settings_in(tmp_path)
    (settings.roots[0] / "team").mkdir()
    (tmp_path / "outside").mkdir()
    (settings.roots[0] / "link").symlink_to(tmp_path / "outside")
    return settings


def check(settings: ServiceSettings, folder: str | None = None, **changes: Any) -> None:
    place = folder_of(settings, folder)
    admit(parse_submitted({**CONFIG, **changes}), place, settings)


def test_what_lies_below_a_root_is_taken(settings: ServiceSettings) -> None:
    root = settings.roots[0]
    check(settings)
    check(settings, "team")
    check(settings, str(root / "team"), sources={"models": ["../one", f"{root}/two", "a+b", "run:other"]})
    check(settings, fitness={"function": "team/fitness.py:score"})
    check(settings, fitness={"tasks": ["x"], "include_paths": ["team"], "trust_code": ["team"]})


SOURCES = [
    "/etc",
    "../x",
    "~/x",
    "~root/x",
    "link/x",
    "team/../../x",
    "one+../x",
    "../x+one",
    "./one/../../x",
]


@pytest.mark.parametrize("path", SOURCES)
def test_sources_outside_are_refused(settings: ServiceSettings, path: str) -> None:
    for sources in ({"base": path, "models": ["./one"]}, {"models": ["./one", {"name": "x", "path": path}]}):
        with pytest.raises(ConfigError, match="sources: .*path: .*(outside the folders|cannot be resolved)"):
            check(settings, sources=sources)
    recipe = {"method": "linear", "sources": [{"name": "n", "path": path}, {"name": "m", "path": "./one"}]}
    with pytest.raises(ConfigError, match="outside the folders|cannot be resolved"):
        check(settings, sources={"models": [{"name": "deep", "recipe": recipe, "path": "x"}]})


@pytest.mark.parametrize("path", ["/etc", "../tasks", "link", "team/../../tasks"])
def test_tasks_and_code_outside_are_refused(settings: ServiceSettings, path: str) -> None:
    for fitness in (
        {"tasks": ["x"], "include_paths": [path]},
        {"tasks": ["x"], "include_paths": [path], "trust_code": [path]},
        {"tasks": [f"{path}/task.yaml"]},
        {"function": f"{path}/fitness.py:score"},
    ):
        with pytest.raises(ConfigError, match="fitness.*outside the folders"):
            check(settings, fitness=fitness)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fitness": {"function": "os:system"}}, "fitness.function"),
        ({"fitness": {"function": "some.module:score"}}, "fitness.function"),
        ({"fitness": {"tasks": ["humaneval"], "allow_unsafe_code": True}}, "fitness.allow_unsafe_code"),
        ({"store": "other.db"}, "store"),
        ({"output": {"folder": "/tmp/x"}}, "output.folder"),
        ({"trackers": ["optuna:/tmp/x.db"]}, "trackers"),
        ({"workers": {"ray_address": "ray://evil:10001"}}, "workers.ray_address"),
        ({"optimizer": {"name": "cma_es", "start": ["/etc/passwd"]}}, "optimizer.start.0"),
        ({"optimizer": {"name": "niches", "founders": "../f.json"}}, "optimizer.founders"),
        ({"space": {"method": "nonsense"}}, "space.method"),
        ({"name": "../x"}, "name"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_the_operator_decides_is_refused_by_its_key(
    settings: ServiceSettings, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(settings, **changes)
    assert key in str(caught.value)
    if key != "unknown":
        assert key_of(str(caught.value)) == key


def test_all_that_is_not_allowed_is_told(settings: ServiceSettings) -> None:
    changes = {"store": "x.db", "trackers": ["optuna:x.db"], "fitness": {"function": "/etc/x.py:score"}}
    with pytest.raises(ConfigError) as caught:
        check(settings, sources={"models": ["/etc/a", "/etc/b"]}, **changes)
    assert [key_of(line) for line in caught.value.lines] == [
        *("store", "trackers", "sources", "sources", "fitness.function")
    ]


def test_the_operator_can_allow_unsafe_tasks(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, allow_unsafe_code=True)
    check(settings, fitness={"tasks": ["humaneval"], "allow_unsafe_code": True})


@pytest.mark.parametrize("folder", ["/", "..", "link", "/etc", "none", "team/../..", "a\0b", "x" * 4097])
def test_folders_outside_or_absent_are_refused(settings: ServiceSettings, folder: str) -> None:
    with pytest.raises(ConfigError, match="folder: "):
        folder_of(settings, folder)


def test_overrides_are_checked_too(settings: ServiceSettings) -> None:
    config = parse_submitted(CONFIG, ["sources.models.0=/etc/x"])
    with pytest.raises(ConfigError, match="outside the folders"):
        admit(config, settings.roots[0], settings)


def test_a_yaml_text_is_a_config(settings: ServiceSettings) -> None:
    text = "name: mine\nsources: {base: ./base, models: [./one, org/name]}\n"
    text += "space: {method: task_arithmetic}\nfitness: {tasks: [arc_easy]}\n"
    assert parse_submitted(text) == parse_submitted(CONFIG)
    for bad in ("- a list", "", "a: *x", "!!python/object:os.system {}", "a: 1\na: 2"):
        with pytest.raises(ConfigError, match="config"):
            parse_submitted(bad)


def test_digests_tell_submissions_apart(settings: ServiceSettings) -> None:
    root = settings.roots[0]
    first = digest_of(parse_submitted(CONFIG), root)
    assert digest_of(parse_submitted({**CONFIG, "seed": 0}), root) == first  # the default
    assert digest_of(parse_submitted({**CONFIG, "seed": 1}), root) != first
    assert digest_of(parse_submitted(CONFIG), root / "team") != first
