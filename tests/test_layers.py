"""The layers of docs/design.md: imports point down, never in a circle, and the driver stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import evomerge

PACKAGE = Path(evomerge.__file__).parent

LAYERS = (
    ("__main__", "cli", "demo"),
    ("service",),
    ("drive", "evaluate", "soup"),
    (
        "search",
        "crew",
        "replay",
        "progress",
        "plan",
        "config",
        "report",
        "sourcing",
        "population",
        "trackers",
    ),
    ("workers",),
    ("merging", "fitness"),
    ("spaces", "optimizers", "store", "checkpoints"),
    (
        *("recipe", "paths", "rules", "segments", "slices", "stacking", "tokens", "catalogue", "records"),
        "strict",
        *("mergekit", "mergekit_evolve", "mergekit_filters", "mergekit_methods", "mergekit_models"),
        *("mergekit_slices", "mergekit_tokens", "mergekit_writer"),
    ),
    ("reading",),
    ("errors", "faults", "seeding"),
)
"""From top to bottom; a part may import from its own layer and from those below it."""

DEPTH = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}

LIGHT = (
    *("evomerge", "evomerge.cli", "evomerge.drive", "evomerge.plan", "evomerge.search", "evomerge.store"),
    *("evomerge.optimizers", "evomerge.workers.ray_pool", "evomerge.workers.inline"),
    *("evomerge.service.server", "evomerge.service.client", "evomerge.trackers.live"),
    "evomerge.trackers.optuna_study",
)
HEAVY = ("torch", "ray", "transformers", "lm_eval")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported(node: ast.AST, typing: bool) -> Iterator[str]:
    """Yield the names of our own modules imported anywhere below a node, in functions too."""
    if not typing and is_type_checking(node):
        return
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        # `from a import b` imports the module a.b if there is one, else a.
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in MODULES else str(node.module) for name in names]
    else:
        names = []
    yield from (name for name in names if name.split(".")[0] == "evomerge")
    for child in ast.iter_child_nodes(node):
        yield from imported(child, typing)


def imports_of(module: str, *, typing: bool) -> set[str]:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    return set(imported(tree, typing)) - {module}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle, none if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        path.append(node)
        found = next((f for n in sorted(graph.get(node, ())) if (f := visit(n))), [])
        path.pop()
        done.add(node)
        return found

    return next((found for node in sorted(graph) if (found := visit(node))), [])


def test_every_part_of_the_package_has_a_layer():
    assert {part_of(module) for module in MODULES} - {""} == set(DEPTH)


def test_imports_never_point_up():
    upward = [
        f"{module} imports {target}"
        for module in MODULES
        for target in sorted(imports_of(module, typing=True))
        if part_of(module) and part_of(target) and DEPTH[part_of(target)] < DEPTH[part_of(module)]
    ]
    assert upward == []


def test_no_module_imports_itself_in_a_circle():
    assert circle({module: imports_of(module, typing=False) for module in MODULES}) == []


def test_no_part_imports_itself_through_another_part():
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        targets = {part_of(target) for target in imports_of(module, typing=True)}
        graph.setdefault(part_of(module), set()).update(targets - {part_of(module), ""})
    assert circle(graph) == []


def test_the_checks_find_what_they_are_for():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    code = (
        "from evomerge import cli\ndef f():\n    import evomerge.store.run\n"
        "if TYPE_CHECKING:\n    import evomerge.plan"
    )
    assert set(imported(ast.parse(code), True)) == {"evomerge.cli", "evomerge.store.run", "evomerge.plan"}
    assert set(imported(ast.parse(code), False)) == {"evomerge.cli", "evomerge.store.run"}


def test_what_the_driver_imports_loads_no_heavy_library():
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, [heavy for heavy in {HEAVY!r} if heavy in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"{name} []" for name in LIGHT]


def test_importing_the_package_loads_nothing_else_of_it():
    code = "import evomerge, sys; print(sorted(m for m in sys.modules if m.startswith('evomerge')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['evomerge']"


def test_the_command_shows_its_help_without_loading_a_heavy_library():
    code = (
        "import sys\nfrom evomerge.cli import main\nsys.argv = ['evomerge', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('LOADED', [heavy for heavy in {HEAVY!r} if heavy in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, loaded = run.stdout.splitlines()
    assert loaded == "LOADED []"
    for command in ("run", "resume", "validate", "merge", "export", "evaluate", "schema"):
        assert any(line.split()[:1] == [command] for line in shown)
