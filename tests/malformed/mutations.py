"""Seeded mutations of sound files: of their bytes, and of the data that they hold."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-3, -1.5, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "0", "nan", "true", "~", "../..", "/etc/passwd", "./one", "a\0b", "\x1b[31mred\x1b[0m"),
    *(
        "a\nb",
        "\u202eabc",
        "\ud800",
        "\U0001f600",
        "é" * 300,
        "x" * 5000,
        "{{ 1/0 }}",
        "${HOME}",
        "%s%n",
        "-x",
    ),
    *([], [[]], [None], [1, 2], [0.1, 0.2, 0.3], ["a", "b"], [{}], {}, {"": 1}, {"a": {"b": {"c": []}}}),
    *({"__class__": "x"}, {"value": 1}, {"value": []}, [{"value": 0.5}], {"low": 1, "high": 0}),
)
"""Values that sound files do not hold in most places."""

PIECES: tuple[bytes, ...] = (
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\t",
        b"\r",
        b"\0",
        b"- ",
        b"#",
        b"&a ",
        b"*a",
        b"!!python/name:os.system ",
    ),
    *(
        b"!function a.b",
        b"<<: ",
        b"? ",
        b"|",
        b">",
        b"%YAML 1.1\n",
        b"---\n",
        b"...\n",
        b"\xff",
        b"\xc3\x28",
        b"\xed\xa0\x80",
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xe2\x80\xae",
        b"\x1b[2J",
        b"1e999",
        b"-",
        b"9" * 30,
        b"NaN",
        b"Infinity",
        b"null",
        b"\\u0000",
        b"\\ud800",
    ),
    *(b"@", b"`", b"%", b"../", b"0x", b"1_0", b"12:30", b"\xc2\x85", b"\xe2\x80\xa8"),
)
"""Pieces of text that mean something to a parser, or should not be there at all."""


def of_bytes(data: bytes, random: Random) -> bytes:
    """Return a file with one to four changes of its bytes."""
    raw = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(raw))
        kind = random.randrange(6)
        if kind == 0:
            raw[at : at + random.randint(0, 8)] = random.choice(PIECES)
        elif kind == 1:
            del raw[at : at + random.choice((1, 2, 8, 64, 4096))]
        elif kind == 2:
            raw[at:at] = random.randbytes(random.randint(1, 8))
        elif kind == 3 and raw:
            raw[min(at, len(raw) - 1)] ^= 1 << random.randrange(8)
        elif kind == 4:
            start = random.randint(0, len(raw))
            raw[at:at] = raw[start : start + random.randint(1, 200)]
        else:
            del raw[at:]
    return bytes(raw)


def of_data(data: Any, random: Random) -> Any:
    """Return plain data with one to three of its values or keys changed."""
    data = copy.deepcopy(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return random.choice(NASTY)
        owner, key = random.choice(places)
        kind = random.randrange(8)
        if kind < 2:
            owner[key] = _nudged(owner[key], random)
        elif kind < 4:
            owner[key] = copy.deepcopy(random.choice(NASTY))
        elif kind == 4:
            del owner[key]
        elif kind == 5:
            other, place = random.choice(places)
            if _has(other, place):
                owner[key] = copy.deepcopy(other[place])
        elif kind == 6 and isinstance(owner, dict):
            owner[random.choice(NASTY_NAMES)] = owner.pop(key)
        elif kind == 6:
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner[key] = [owner[key]] if random.random() < 0.5 else {"value": owner[key]}
    return data


NASTY_NAMES = (
    "",
    "a",
    "\0",
    "\x1b[31m",
    "\ud800",
    "name",
    "path",
    "weight",
    "__proto__",
    "x" * 600,
    "0",
    "base",
)


def _nudged(value: Any, random: Random) -> Any:
    """Return another value of the same kind, not far from it where it is a number."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + random.choice((-2, -1, 1, 2, 10, -value))
    if isinstance(value, float):
        return value * random.choice((-1, 0, 0.5, 2, 1e6, 1e-9)) + random.choice((0, 0.25))
    if isinstance(value, str):
        return (
            value[::-1]
            if random.random() < 0.3
            else value + random.choice(("", "x", " ", "/", "-", "\u00e9"))
        )
    return value


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(pairs):
        yield data, key
        yield from _places(value)


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else key < len(owner)


def of_json(data: bytes, random: Random) -> bytes:
    """Return a JSON file with other data."""
    return json.dumps(of_data(json.loads(data), random)).encode()


def of_yaml(data: bytes, random: Random) -> bytes:
    """Return a YAML file with other data."""
    changed = of_data(yaml.safe_load(data), random)
    try:
        return yaml.safe_dump(changed, allow_unicode=random.random() < 0.5, sort_keys=False).encode()
    except UnicodeEncodeError:
        return yaml.safe_dump(changed, sort_keys=False).encode("utf-8", "surrogatepass")


def of_header(data: bytes, random: Random) -> bytes:
    """Return a safetensors file with another header over the same data."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(of_data(json.loads(data[8 : 8 + length]), random)).encode()
    claimed = len(header) if random.random() < 0.9 else random.choice((0, 1, 7, 2**24, 2**63, 2**64 - 1))
    return struct.pack("<Q", claimed) + header + data[8 + length :]


def of_task(data: bytes, random: Random) -> bytes:
    """Return a task file with other data or bytes that still names its task, which lm-eval looks for first."""
    name = b"task: choice\n"
    mutate = random.choice((of_yaml, of_yaml, of_bytes))
    return mutate(data.replace(name, b""), random) + b"\n" + name


Mutation = Callable[[bytes, Random], bytes]

TARGETS: tuple[tuple[str, str, tuple[Mutation, ...]], ...] = (
    ("one/model.safetensors", "merge", (of_header, of_bytes)),
    ("one/model.safetensors", "validate", (of_header, of_bytes)),
    ("one/config.json", "merge", (of_json, of_json, of_bytes)),
    ("base/config.json", "merge", (of_json, of_json, of_bytes)),
    ("base/config.json", "validate", (of_json, of_json, of_bytes)),
    ("one/config.json", "stack", (of_json, of_bytes)),
    ("one/config.json", "inspect", (of_json, of_bytes)),
    ("one/tokenizer.json", "validate", (of_json, of_bytes)),
    ("wider/tokenizer.json", "union", (of_json, of_json, of_bytes)),
    ("one/tokenizer.json", "union", (of_json, of_json, of_bytes)),
    ("one/tokenizer_config.json", "union", (of_json, of_bytes)),
    ("base/generation_config.json", "merge", (of_json, of_bytes)),
    ("lora/adapter_config.json", "adapters", (of_json, of_json, of_bytes)),
    ("lora/adapter_model.safetensors", "adapters", (of_header, of_bytes)),
    ("lora/adapter_config.json", "adapted", (of_json, of_bytes)),
    ("lora/adapter_model.safetensors", "adapted", (of_header, of_bytes)),
    ("recipe.yaml", "merge", (of_yaml, of_yaml, of_bytes)),
    ("union.yaml", "union", (of_yaml, of_yaml, of_bytes)),
    ("mergekit.yaml", "mergekit", (of_yaml, of_yaml, of_bytes)),
    ("stack.yaml", "stack", (of_yaml, of_yaml, of_bytes)),
    ("adapters.yaml", "adapters", (of_yaml, of_yaml, of_bytes)),
    ("evolve.yaml", "evolve", (of_yaml, of_yaml, of_bytes)),
    ("config.yaml", "validate", (of_yaml, of_yaml, of_bytes)),
    ("niches.yaml", "population", (of_yaml, of_bytes)),
    ("population.json", "population", (of_json, of_json, of_bytes)),
    ("tasks.yaml", "tasks", (of_yaml, of_bytes)),
    ("tasks/choice.yaml", "tasks", (of_task,)),
    ("tasks/choice.json", "tasks", (of_bytes,)),
)
"""A file, a command that reads it, and the mutations that are drawn from."""


def mutated(number: int, sound: Callable[[str], bytes]) -> tuple[str, str, bytes]:
    """Return file, command and content of a case; equal numbers give equal cases."""
    file, command, mutations = TARGETS[number % len(TARGETS)]
    random = Random(number)
    return file, command, random.choice(mutations)(sound(file), random)
