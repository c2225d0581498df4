"""Ways to break a checkpoint folder, each a function that gets the folder of a sound one."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoints.tiny import edit_json

Break = Callable[[Path], None]
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(folder: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """Write `model.safetensors` from a header (object, text or bytes) and data, whatever sense they make."""
    text = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else None
    text = json.dumps(header).encode() if text is None else text
    head = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(head + text + data)


def raw(data: bytes) -> Break:
    return lambda folder: void((folder / "model.safetensors").write_bytes(data))


def header(value: Any, data: bytes = bytes(8), **more: Any) -> Break:
    return lambda folder: write(folder, value, data, **more)


def entry(**changes: Any) -> Break:
    return header({"a": {**ENTRY, **changes}})


def named(name: str) -> Break:
    return header({name: ENTRY})


def text(file: str, content: str | bytes) -> Break:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: void((folder / file).write_bytes(data))


def config(**changes: Any) -> Break:
    return lambda folder: edit_json(folder / "config.json", **changes)


def without(*names: str) -> Break:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def renamed(to: str) -> Break:
    return lambda folder: void((folder / "model.safetensors").rename(folder / to))


def replaced(make: Callable[[Path], Any]) -> Break:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make(folder / "model.safetensors")

    return change


def index(value: Any) -> Break:
    """Turn the weights into one shard with an index of the given content."""

    def change(folder: Path) -> None:
        renamed("model-00001-of-00001.safetensors")(folder)
        (folder / "model.safetensors.index.json").write_text(
            value if isinstance(value, str) else json.dumps(value)
        )

    return change


def weight_map(**changes: Any) -> Break:
    """Turn the weights into one shard with a right index, then change the index; None removes a tensor."""

    def change(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        names = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        names.pop("__metadata__", None)
        full = {**dict.fromkeys(names, "model-00001-of-00001.safetensors"), **changes}
        index({"weight_map": {name: shard for name, shard in full.items() if shard is not None}})(folder)

    return change


def outside_link(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def void(_: object) -> None:
    """Drop a result."""


TWO = {"a": ENTRY, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
NORM = "model.norm.weight"

BROKEN: dict[str, tuple[Break, str]] = {
    "01 empty file": (raw(b""), "cut off"),
    "02 seven bytes": (raw(b"1234567"), "cut off"),
    "03 header of length 0": (raw(bytes(8)), "JSON"),
    "04 header longer than file": (header("{}", length=1000), "cut off"),
    "05 header length 100000001": (header("{}", length=100_000_001), "at most 8,388,608"),
    "06 header length 2**64-1": (header("{}", length=2**64 - 1), "at most"),
    "07 header not UTF-8": (header(b'{"\xff\xfe": 1}'), "UTF-8"),
    "08 header {": (header("{"), "not valid JSON"),
    "09a header []": (header("[]"), "not a JSON object"),
    "09b header null": (header("null"), "not a JSON object"),
    "10 byte order mark": (header("\ufeff{}"), "not a JSON object"),
    "11 junk behind": (header("{} x"), "not valid JSON"),
    "12 deep header": (header('{"a":' + "[" * 200_000), "JSON"),
    "13 negative offset": (entry(data_offsets=[-8, 0]), "data_offsets"),
    "14 begin behind end": (entry(data_offsets=[8, 0]), "data_offsets"),
    "15 float offset": (entry(data_offsets=[0.0, 8]), "data_offsets"),
    "16 three offsets": (entry(data_offsets=[0, 8, 8]), "data_offsets"),
    "16b no list": (entry(data_offsets="0-8"), "data_offsets"),
    "17 data too short": (header({"a": ENTRY}, bytes(7)), "cut off"),
    "18 data too long": (header({"a": ENTRY}, b"\0" * 8 + b"PK\x03\x04zip"), "after the last tensor"),
    "19a hole at the start": (header({"b": TWO["b"]}, bytes(16)), "hole"),
    "19b hole between": (header({**TWO, "b": {**ENTRY, "data_offsets": [9, 17]}}, bytes(17)), "hole"),
    "20a overlap in full": (header({"a": ENTRY, "b": ENTRY}), "overlaps"),
    "20b overlap in part": (header({**TWO, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
    "21 size mismatch": (entry(shape=[3]), "needs 12"),
    "22a product beyond 64 bits": (entry(shape=[2**62, 2**62]), "needs"),
    "22b dimension beyond 64 bits": (entry(shape=[2**70]), "shape"),
    "22c offset of 4000 digits": (entry(data_offsets=[0, 10**4000]), "data_offsets"),
    "23 negative dimension": (entry(shape=[-2]), "shape"),
    "23b true as dimension": (entry(shape=[True, 2]), "shape"),
    "24a dtype F33": (entry(dtype="F33"), "unknown dtype"),
    "24b dtype f32": (entry(dtype="f32"), "unknown dtype"),
    "24c dtype 7": (entry(dtype=7), "unknown dtype"),
    "25 half a byte": (entry(dtype="F4", shape=[15]), "needs 7.5"),
    "26 no dtype": (header({"a": {"shape": [2], "data_offsets": [0, 8]}}), "dtype"),
    "26b entry is a list": (header({"a": [1, 2]}), "expected an object"),
    "27a metadata number": (header({"__metadata__": {"format": 1}, "a": ENTRY}), "__metadata__"),
    "27b metadata list": (header({"__metadata__": [], "a": ENTRY}), "__metadata__"),
    "28 duplicate tensor": (header('{"a": %s, "a": %s}' % ((json.dumps(ENTRY),) * 2)), "duplicate key 'a'"),
    "29a duplicate metadata": (header('{"__metadata__": {"x": "1", "x": "2"}}', b""), "duplicate"),
    "29b unknown field": (entry(stride=[1]), "unknown fields"),
    "29c duplicate field": (
        header('{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}'),
        "duplicate",
    ),
    "30 no tensor at all": (header({}, b""), "no tensor"),
    "31a name with path": (named("../../etc/x"), "tensor name"),
    "31b name empty": (named(""), "tensor name"),
    "31c name with NUL": (named("a\0b"), "tensor name"),
    "31d name with newline": (named("a\nb"), "tensor name"),
    "31e long name": (named("a" * 600), "tensor name"),
    "31f surrogate": (header('{"\\ud800": 1}'), "half a character"),
    "32 rank 10000": (entry(shape=[1] * 10_000), "shape"),
    "33a 60000 tensors": (
        header({f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(60_000)}, b""),
        "more tensors than the 50,000",
    ),
    "33b header of 9 MiB": (header("{" + " " * 9 * 2**20 + "}"), "at most 8,388,608"),
    "35a pickle": (raw(b"\x80\x04\x95\x10\x02\x00\x00\x00\x00\x00\x00}"), "pickle"),
    "35b lfs pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "35c lfs pointer as config": (text("config.json", "version https://git-lfs.github.com/spec/v1\n"), "lfs"),
    "36 zip": (raw(b"PK\x03\x04\x14\x00\x08\x08" + bytes(99)), "zip archive"),
    "37a folder as file": (replaced(Path.mkdir), "not a regular file"),
    "37b pipe as file": (replaced(os.mkfifo), "not a regular file"),
    "37c device as file": (replaced(lambda path: path.symlink_to("/dev/null")), "symlink out of"),
    "38a link out of the folder": (outside_link, "symlink out of"),
    "38b config is a link": (
        lambda folder: (
            (folder / "config.json").rename(folder.parent / "config.json"),
            (folder / "config.json").symlink_to("../config.json"),
        ),
        "symlink out of",
    ),
    "38c dangling link": (replaced(lambda path: path.symlink_to("nothing")), "cannot be read"),
    "40a only pytorch_model.bin": (renamed("pytorch_model.bin"), "convert"),
    "40b only model.ckpt": (renamed("model.ckpt"), "convert"),
    "40c adapter": (
        lambda folder: (
            renamed("adapter_model.safetensors")(folder),
            text("adapter_config.json", "{}")(folder),
        ),
        "adapter",
    ),
    "40d nothing": (without("model.safetensors"), "neither"),
    "41 shard missing": (weight_map(**{NORM: "model-00002-of-00002.safetensors"}), "missing"),
    "42a index leads out": (weight_map(**{NORM: "../../../etc/passwd.safetensors"}), "leads out"),
    "42b index absolute": (weight_map(**{NORM: "/etc/passwd.safetensors"}), "leads out"),
    "42c index with NUL": (weight_map(**{NORM: "a\0.safetensors"}), "leads out"),
    "42d index names a pickle": (weight_map(**{NORM: "pytorch_model.bin"}), "expected a .safetensors"),
    "43a tensor not in its shard": (
        weight_map(extra="model-00001-of-00001.safetensors"),
        "'extra' is missing",
    ),
    "43b tensor not in the index": (weight_map(**{NORM: None}), "is there, but not listed"),
    "44a index is a list": (index([]), "JSON object"),
    "44b index without weight_map": (index({"metadata": {}}), "weight_map"),
    "44c weight_map a list": (index({"weight_map": ["a"]}), "weight_map"),
    "44d weight_map of numbers": (index({"weight_map": {"a": 1}}), "weight_map"),
    "44e weight_map empty": (index({"weight_map": {}}), "weight_map"),
    "44f index not JSON": (index("{"), "not valid JSON"),
    "44g index of 65 MiB": (index(" " * 65 * 2**20), "larger than"),
    "45a no config": (without("config.json"), "config.json"),
    "45b config not JSON": (text("config.json", "{,}"), "not valid JSON"),
    "45c config a list": (text("config.json", "[]"), "JSON object"),
    "45d no model_type": (config(model_type=None), "model_type"),
    "45e model_type a number": (config(model_type=3), "model_type"),
    "45f architectures empty": (config(architectures=[]), "architectures"),
    "45g config not UTF-8": (text("config.json", b"\xff\xfe{\x00}\x00"), "UTF-8"),
    "45h config deep": (text("config.json", "[" * 100_000), "JSON"),
    "46a auto_map": (config(auto_map={"AutoConfig": "x.C"}), "Python code"),
    "46b python file": (text("modeling_x.py", "print(1)"), "Python code"),
}
"""Name (number of the row in reference/reliability.md) to the change and a part of the message."""
