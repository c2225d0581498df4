"""Whether a fitness callable is there, found out without importing it, which may load torch."""

from __future__ import annotations

import ast
from pathlib import Path

from evomerge.errors import FitnessError, nearest
from evomerge.strict import read_text


def check_callable(spec: str, base_dir: Path) -> None:
    """Look for the name in the file; a module is only looked at by its name.

    Args:
        spec: `module:name` or `file.py:name`.
        base_dir: What the file is relative to.

    Raises:
        FitnessError: It is neither, or the file cannot be read, is no Python, or has no such name.
    """
    where, _, name = spec.rpartition(":")
    if not where.endswith(".py"):
        if not all(part.isidentifier() for part in where.split(".")):
            raise FitnessError(
                f"fitness.function: {spec}: expected module:name or file.py:name, got no name of a module"
            )
        return
    file = base_dir / where
    try:
        tree = ast.parse(read_text(file, FitnessError), str(file))
    except SyntaxError as problem:
        raise FitnessError(f"fitness.function: {file}: line {problem.lineno}: {problem.msg}") from None
    nodes = list(ast.walk(tree))
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    words |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    if name not in words:
        raise FitnessError(f'fitness.function: {spec}: the file has no "{name}"{nearest(name, words)}')
