"""Named ways to break a file of the sound world, and a part of the one line that must answer each."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.checkpoints.broken import BROKEN, ENTRY

Change = Callable[[Path], object]
Case = tuple[str, Change, str]
"""Command of `COMMANDS`, what breaks the world, and a regular expression for a part of the line."""

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


def put(file: str, content: str | bytes) -> Change:
    """Return what gives a file another content."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda world: (world / file).write_bytes(data)


def instead(file: str, make: Callable[[Path], object]) -> Change:
    """Return what puts something that is no file in the place of one."""

    def change(world: Path) -> None:
        (world / file).unlink()
        make(world / file)

    return change


def changed(file: str, **keys: Any) -> Change:
    """Return what sets keys of a JSON or YAML file; a double underscore goes one level down."""

    def change(world: Path) -> None:
        path = world / file
        data = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        for key, value in keys.items():
            *way, last = key.split("__")
            node = data
            for part in way:
                node = node[int(part) if part.isdigit() else part]
            node[int(last) if last.isdigit() else last] = value
        path.write_text(json.dumps(data) if path.suffix == ".json" else yaml.safe_dump(data))

    return change


def without(file: str, key: str) -> Change:
    """Return what removes a key of a JSON file."""

    def change(world: Path) -> None:
        data = json.loads((world / file).read_text())
        del data[key]
        (world / file).write_text(json.dumps(data))

    return change


def weights(file: str, header: Any, data: bytes = bytes(8)) -> Change:
    """Return what writes a safetensors file of a header and data."""
    text = json.dumps(header).encode()
    return put(file, struct.pack("<Q", len(text)) + text + data)


def renamed(file: str, other: str) -> Change:
    """Return what gives a file another name."""
    return lambda world: (world / file).rename(world / other)


def both(*changes: Change) -> Change:
    """Return all changes as one."""
    return lambda world: [change(world) for change in changes]


def of_checkpoint(name: str) -> Case:
    """Return a case of `tests.checkpoints.broken` in the source `one`."""
    change, part = BROKEN[name]
    return "merge", lambda world: change(world / "one"), re.escape(part)


def loop(path: Path) -> None:
    """Make a symlink that leads to itself."""
    path.symlink_to(path.name)


def nested(text: str, levels: int, end: str = "") -> str:
    """Return a text repeated, and its end as often."""
    return text * levels + end * levels


BOMB = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(9))
"""Nine to the ninth values in a few hundred bytes."""

CHECKPOINTS: dict[str, Case] = {f"checkpoint {name}": of_checkpoint(name) for name in BROKEN}

FILES: dict[str, Case] = {
    "config.json is a folder": ("merge", instead("one/config.json", Path.mkdir), "config.json"),
    "config.json is a pipe": ("merge", instead("one/config.json", os.mkfifo), "config.json"),
    "config.json is a loop": ("merge", instead("one/config.json", loop), "config.json"),
    "config.json is a device": ("merge", instead("one/config.json", lambda p: p.symlink_to("/dev/zero")), "config.json"),
    "config.json with a key twice": ("merge", put("one/config.json", '{"model_type": "llama", "model_type": "x"}'), "duplicate key"),
    "config.json 100 levels deep": ("validate", put("one/config.json", nested('{"a":', 100, "}").replace(":}", ":1}")), "levels deep"),
    "config.json of empty lists": ("merge", put("one/config.json", '{"a": [' + "[]," * 400_000 + "[]]}"), "more values"),
    "config.json with half a character": ("merge", changed("one/config.json", note="\ud800"), "half a character"),
    "config.json with an integer of 5000 digits": ("merge", put("one/config.json", '{"model_type": ' + "9" * 5000 + "}"), "not valid JSON"),
    "config.json with escapes in the type": ("merge", changed("one/config.json", model_type="\x1b[31mred\u202e"), "model_type"),
    "config.json with -1 layers": ("merge", changed("base/config.json", num_hidden_layers=-1), "num_hidden_layers"),
    "config.json with 1e999 layers": ("merge", changed("base/config.json", num_hidden_layers=float("inf")), "num_hidden_layers"),
    "config.json with a quantization": ("merge", changed("one/config.json", quantization_config={"bits": 4}), "quantised"),
    "config.json with text_config and auto_map": ("merge", changed("one/config.json", auto_map={"AutoModel": "m.M"}), "never run"),
    "index of a million entries": ("merge", both(renamed("one/model.safetensors", "one/m.safetensors"), put("one/model.safetensors.index.json", '{"weight_map": {' + ",".join(f'"t{n}":"m.safetensors"' for n in range(10**6)) + "}}")), "more values"),
    "index with a tensor twice": ("merge", both(renamed("one/model.safetensors", "one/m.safetensors"), put("one/model.safetensors.index.json", '{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}')), "duplicate key"),
    "weights of another shape": ("merge", weights("one/model.safetensors", {"model.norm.weight": ENTRY}), "one"),
    "the weights are a socket's name": ("merge", instead("one/model.safetensors", loop), "model.safetensors"),
    "source is a file": ("merge", both(lambda w: (w / "one").rename(w / "x"), put("one", "text")), "one"),
    "source is a loop": ("merge", both(lambda w: (w / "one").rename(w / "x"), lambda w: loop(w / "one")), "one"),
    "source is empty": ("validate", both(lambda w: (w / "one").rename(w / "x"), lambda w: (w / "one").mkdir()), "config.json"),
    "source under the name of another": ("merge", lambda w: [(w / "two").rename(w / "x"), (w / "two").symlink_to("one")], "same checkpoint"),
    "tokenizer.json is a list": ("validate", put("one/tokenizer.json", "[]"), "JSON object"),
    "tokenizer.json is a pointer": ("validate", put("one/tokenizer.json", LFS), "git lfs"),
    "tokenizer.json with ids of infinity": ("union", put("wider/tokenizer.json", '{"model": {"vocab": {"a": 1e999}}}'), "tokenizer.json"),
    "tokenizer.json with negative ids": ("union", put("wider/tokenizer.json", '{"model": {"vocab": {"a": -1}}}'), "tokenizer.json"),
    "tokenizer.json with ids of 2**60": ("union", put("wider/tokenizer.json", '{"model": {"vocab": {"a": 1152921504606846976}}}'), "tokenizer.json"),
    "tokenizer.json with added tokens that are none": ("union", changed("wider/tokenizer.json", added_tokens=[3]), "tokenizer.json"),
    "tokenizer.json of four million lists": ("validate", put("one/tokenizer.json", '{"a": [' + "[]," * 4_000_000 + "[]]}"), "more values"),
    "tokenizer.json of 65 MiB": ("validate", put("one/tokenizer.json", b" " * 65 * 2**20), "larger than"),
    "tokenizer.json of a kind that the parser lacks": ("union", changed("one/tokenizer.json", model={"type": "Nothing", "vocab": {"a": 0}}), "tokenizers library"),
    "tokenizer.json is a pipe": ("union", instead("wider/tokenizer.json", os.mkfifo), "tokenizer"),
    "tokenizer of other words": ("merge", put("one/tokenizer.json", '{"model": {"vocab": {"a": 0}}}'), "vocabulary differs"),
    "tokenizer_config.json cut off": ("union", both(changed("union.yaml", chat_template="auto"), put("one/tokenizer_config.json", '{"a"')), "tokenizer_config.json"),
    "generation_config.json a text": ("merge", put("base/generation_config.json", '"x"'), "generation_config.json"),
    "generation_config.json 500 levels deep": ("merge", put("base/generation_config.json", '{"a":' + nested("[", 500, "]") + "}"), "levels deep"),
}  # fmt: skip

ADAPTERS: dict[str, Case] = {
    "adapter of another kind": ("adapters", changed("lora/adapter_config.json", peft_type="IA3"), "expected LORA"),
    "adapter config a list": ("adapters", put("lora/adapter_config.json", "[]"), "JSON object"),
    "adapter config cut off": ("adapted", put("lora/adapter_config.json", '{"peft_type": "LO'), "not valid JSON"),
    "adapter of rank 0": ("adapters", changed("lora/adapter_config.json", r=0), "positive integer"),
    "adapter of another rank": ("adapters", changed("lora/adapter_config.json", r=3), "rank 3"),
    "adapter of rank 10**30": ("adapters", changed("lora/adapter_config.json", r=10**30), "positive integer"),
    "adapter of alpha NaN": ("adapters", changed("lora/adapter_config.json", lora_alpha=float("nan")), "lora_alpha"),
    "adapter that is a variant": ("adapters", changed("lora/adapter_config.json", use_something=True), "variant"),
    "adapter with a pattern that never ends": ("adapters", changed("lora/adapter_config.json", rank_pattern={"(a+)+$": 2}), "pattern"),
    "adapter with code": ("adapters", changed("lora/adapter_config.json", auto_map={"x": "y"}), "not supported"),
    "adapter whose weights are a pickle": ("adapters", renamed("lora/adapter_model.safetensors", "lora/adapter_model.bin"), "pickled adapters"),
    "adapter with one factor": ("adapters", weights("lora/adapter_model.safetensors", {"base_model.model.m.lora_A.weight": ENTRY}), "factor B is missing"),
    "adapter of integers": ("adapters", weights("lora/adapter_model.safetensors", {"base_model.model.m.lora_A.weight": {**ENTRY, "dtype": "I32"}}), "stored as I32"),
    "adapter cut off": ("adapted", put("lora/adapter_model.safetensors", b"\x10"), "cut off"),
    "adapter for another base": ("adapted", both(lambda w: (w / "base").rename(w / "x"), lambda w: (w / "base").symlink_to("wider"), changed("lora/adapter_config.json", target_modules=[])), "vocab|hidden|differs|tensors"),
    "adapter whose base is a number": ("adapters", changed("lora/adapter_config.json", base_model_name_or_path=3), "expected a text"),
    "adapter file without a method": ("adapters", put("adapters.yaml", "adapters: [./lora]"), "method"),
    "adapter file whose method is a list": ("adapters", put("adapters.yaml", "method: [sum]\nadapters: [./lora]"), "method"),
    "adapter file with a name of 5000 letters": ("adapters", put("adapters.yaml", f"method: sum\nadapters: [{'x' * 5000}]"), "x{100}"),
    "adapter file with rank 0": ("adapters", changed("adapters.yaml", rank=0), "rank"),
}  # fmt: skip

TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "expected a mapping|expected a recipe|got nothing|NoneType|mapping"),
    "a list": ("- a", "mapping"),
    "a number": ("3", "mapping"),
    "cut off": ("a: [1, 2", "not valid YAML"),
    "tabs": ("a:\n\t- b", "not valid YAML"),
    "not UTF-8": (b"a: \xff", "UTF-8"),
    "UTF-16": ("a: b".encode("utf-16"), "UTF-8"),
    "NUL": (b"a: b\0c", "not valid YAML"),
    "NUL written out": ('a: "b\\0c"', "NUL"),
    "half a character": ('a: "\\ud800"', "half a character"),
    "a bomb": (BOMB, "alias"),
    "an alias": ("a: &x 1\nb: *x", "alias"),
    "a merge key": ("a: &x {b: 1}\nc:\n  <<: *x", "alias"),
    "a Python object": ("a: !!python/object/apply:os.system ['true']", "tag"),
    "a function": ("a: !function os.system", "tag"),
    "a key twice": ("a: 1\na: 2", "given twice"),
    "a list as a key": ("? [a]\n: 1", "key"),
    "5000 levels": (nested("[", 5000, "]"), "levels deep"),
    "50000 levels of mappings": (nested("{a: ", 50_000), "levels deep"),
    "60000 values": ("a: [" + "1," * 60_000 + "]", "more values"),
    "2 MiB": (b"#" * 2 * 2**20, "larger than"),
    "escapes": ('"\\e[31mred": 1', "."),
    "two documents": ("a: 1\n---\na: 2", "not valid YAML"),
    "an integer of 5000 digits": ("a: " + "9" * 5000, "not valid YAML"),
    "a pointer of git-lfs": (LFS, "."),
}
"""What is no good YAML file of any kind: its content, and a part of the line."""

YAML_FILES = {"config.yaml": "validate", "recipe.yaml": "merge", "mergekit.yaml": "mergekit", "adapters.yaml": "adapters", "evolve.yaml": "evolve"}  # fmt: skip

YAMLS: dict[str, Case] = {
    f"{file} is {name}": (command, put(file, content), f"{file}.*({part})")
    for file, command in YAML_FILES.items()
    for name, (content, part) in TEXTS.items()
}
YAMLS |= {f"{file} is a pipe": (command, instead(file, os.mkfifo), "not a regular file") for file, command in YAML_FILES.items()}  # fmt: skip
YAMLS |= {f"{file} is a folder": (command, instead(file, Path.mkdir), "not a regular file") for file, command in YAML_FILES.items()}  # fmt: skip
YAMLS |= {f"{file} is a loop": (command, instead(file, loop), "cannot be read") for file, command in YAML_FILES.items()}  # fmt: skip

RECIPES: dict[str, Case] = {
    "a weight of infinity": ("merge", changed("recipe.yaml", sources__0__parameters={"weight": float("inf")}), "weight"),
    "a weight of 1e300": ("merge", changed("recipe.yaml", sources__0__parameters={"weight": 1e300}), "weight"),
    "a weight of 10**400": ("merge", changed("recipe.yaml", sources__0__parameters={"weight": 10**400}), "weight"),
    "a weight that is true": ("merge", changed("recipe.yaml", sources__0__parameters={"weight": True}), "weight"),
    "a rule without a value": ("merge", changed("recipe.yaml", sources__0__parameters={"weight": [{"value": []}]}), "empty list"),
    "a density of -1": ("merge", changed("recipe.yaml", sources__0__parameters={"density": -1}), "density"),
    "no sources": ("merge", changed("recipe.yaml", sources=[]), "sources"),
    "a source without a path": ("merge", changed("recipe.yaml", sources=[{"name": "a"}]), "path"),
    "a source named as a path": ("merge", changed("recipe.yaml", sources__0__name="../up"), "name"),
    "a source at /etc/passwd": ("merge", changed("recipe.yaml", sources__0__path="/etc/passwd"), "passwd"),
    "a source whose path has 5000 letters": ("merge", changed("recipe.yaml", sources__0__path="./" + "x" * 5000), "x{100}"),
    "a source given twice": ("merge", changed("recipe.yaml", sources__0__path="./two"), "same checkpoint"),
    "a seed of 2**64": ("merge", changed("recipe.yaml", seed=2**64), "seed"),
    "a version that is to come": ("merge", changed("recipe.yaml", evomerge=2), "evomerge"),
    "a method that is a list": ("merge", changed("recipe.yaml", method=["ties"]), "method"),
    "mergekit: a method that it lacks": ("mergekit", changed("mergekit.yaml", merge_method="\x1b[31mx"), "merge_method"),
    "mergekit: models that are texts": ("mergekit", changed("mergekit.yaml", models=["one"]), "models"),
    "mergekit: models and slices": ("mergekit", changed("mergekit.yaml", slices=[]), "either models or slices"),
    "mergekit: a model that is a number": ("mergekit", changed("mergekit.yaml", models__0__model=3), "path or hub id"),
    "mergekit: a layer range backwards": ("stack", changed("stack.yaml", slices__0__sources__0__layer_range=[2, 0]), "layer_range"),
    "mergekit: a layer range beyond": ("stack", changed("stack.yaml", slices__0__sources__0__layer_range=[0, 99]), "layers"),
    "mergekit: trust_remote_code": ("mergekit", changed("mergekit.yaml", trust_remote_code=True), "unknown key"),
    "evolve: no models": ("evolve", changed("evolve.yaml", genome__models=[]), "genome.models"),
    "evolve: a genome that is a list": ("evolve", changed("evolve.yaml", genome=[]), "genome"),
    "evolve: a limit of -1": ("evolve", changed("evolve.yaml", limit=-1), "search"),
}  # fmt: skip

CONFIGS: dict[str, Case] = {
    "a typing error": ("validate", changed("config.yaml", budgets={}), "did you mean"),
    **{f"a population of {value!r}": ("validate", changed("config.yaml", optimizer__population=value), "population") for value in (0, 1, -3, 4.5, "8", True, float("nan"))},
    **{f"a budget of {value!r}": ("validate", changed("config.yaml", budget__evaluations=value), "evaluations") for value in (0, -1, 4.5, True, float("inf"), float("nan"))},
    **{f"a sigma of {value!r}": ("validate", changed("config.yaml", optimizer__sigma=value), "sigma") for value in (0, -1, 7, float("nan"))},
    **{f"a seed of {value!r}": ("validate", changed("config.yaml", seed=value), "seed") for value in (-1, 2**64, "x")},
    "bounds that are reversed": ("validate", changed("config.yaml", space__parameters={"lambda": {"low": 1, "high": 0}}), "low must be below high"),
    "wrong keys in all sections": ("validate", changed("config.yaml", budget={"evaluatons": 3}, workers={"counts": 1}, sede=1), "did you mean"),
    "two thousand wrong parameters": ("validate", changed("config.yaml", space__parameters={f"lambda{n}": {"low": "x"} for n in range(2_000)}), 'did you mean "lambda"'),
    "ten thousand wrong numbers": ("validate", changed("config.yaml", baselines={"task_arithmetic": ["x"] * 10_000}), "expected a number"),
    "bounds of NaN": ("validate", changed("config.yaml", space__parameters={"lambda": {"low": float("nan"), "high": 1}}), "lambda"),
    "a metric that the task lacks": ("tasks", changed("tasks.yaml", fitness__tasks=[{"name": "choice", "metric": "x"}]), "metric"),
    "a task twice": ("tasks", changed("tasks.yaml", fitness__tasks=["choice", "choice"]), "twice"),
    "a task of weight -1": ("tasks", changed("tasks.yaml", fitness__tasks=[{"name": "choice", "weight": -1}]), "weight"),
    "no task": ("tasks", changed("tasks.yaml", fitness__tasks=[]), "tasks"),
    "a formula": ("validate", changed("config.yaml", fitness={"objective": "__import__('os')"}), "unknown key"),
    "a function that is no name": ("validate", changed("config.yaml", fitness={"function": "os;:x"}), "os"),
    "a function in a pipe": ("validate", instead("fitness.py", os.mkfifo), "not a regular file"),
    "a store of an unknown kind": ("validate", changed("config.yaml", name="a/b"), "name"),
    "a name with escapes": ("validate", changed("config.yaml", name="\x1b[31mred"), "name"),
    "founders that are no population": ("population", put("population.json", "{}"), "population"),
    "population cut off": ("population", put("population.json", '{"evomerge": 1'), "not valid JSON"),
    "population is a pipe": ("population", instead("population.json", os.mkfifo), "not a regular file"),
    "population 200 levels deep": ("population", put("population.json", '{"a":' + nested("[", 200, "]") + "}"), "levels deep"),
    "population with NaN": ("population", changed("population.json", individuals__0__score=float("nan")), "individuals.0.score"),
    "population out of range": ("population", changed("population.json", individuals__0__genome=[7.0, 0.5]), "individual 0"),
    "population without individuals": ("population", changed("population.json", individuals=[]), "individuals"),
    "population of other sources": ("population", changed("population.json", sources__0__fingerprint="0" * 64), "is none of this run"),
}  # fmt: skip

TASK_FILES: dict[str, Case] = {
    "task file cut off": ("tasks", put("tasks/choice.yaml", "task: [choice"), "cannot be read"),
    "task file of a bomb": ("tasks", put("tasks/choice.yaml", "task: choice\n" + BOMB), "more values"),
    "task file 100 levels deep": ("tasks", put("tasks/choice.yaml", "task: choice\na: " + nested("[", 100, "]")), "levels deep"),
    "task file of 5 MiB": ("tasks", put("tasks/choice.yaml", b"#" * 5 * 2**20), "larger than"),
    "task file is a pipe": ("tasks", instead("tasks/choice.yaml", os.mkfifo), "not a regular file"),
    "task file with a function": ("tasks", put("tasks/choice.yaml", "task: choice\ndoc_to_text: !function evil.text\n"), "trust_code"),
    "task file that includes one with a function": ("tasks", both(put("evil.yaml", "doc_to_text: !function evil.text\n"), put("tasks/choice.yaml", "task: choice\ninclude: ../evil.yaml\ndataset_path: json\noutput_type: multiple_choice\n")), "trust_code"),
    "task file whose metric is a script": ("tasks", changed("tasks/choice.yaml", metric_list=[{"metric": "./evil"}]), "never run"),
    "task file whose metric comes from the hub": ("tasks", changed("tasks/choice.yaml", metric_list=[{"metric": "acc", "hf_evaluate": True}]), "never run"),
    "task file whose data is a pickle": ("tasks", both(changed("tasks/choice.yaml", dataset_path="pandas"), put("tasks/choice.json", b"\x80\x04N.")), "pickle"),
    "task file whose data is a script": ("tasks", both(put("evil.py", "raise SystemExit(9)"), changed("tasks/choice.yaml", dataset_path="./evil.py")), "cannot be loaded"),
    "task file with a template that cannot be read": ("tasks", changed("tasks/choice.yaml", doc_to_text="{{ q"), "choice"),
    "task file with a template that breaks out": ("tasks", changed("tasks/choice.yaml", doc_to_text="{{ q.__class__.__mro__[1].__subclasses__() }}"), "SecurityError"),
    "task data empty": ("tasks", put("tasks/choice.json", ""), "choice"),
    "task data is no JSON": ("tasks", put("tasks/choice.json", "{{{"), "choice"),
    "task data is missing": ("tasks", lambda world: (world / "tasks/choice.json").unlink(), "choice"),
}  # fmt: skip

CASES: dict[str, Case] = {**CHECKPOINTS, **FILES, **ADAPTERS, **YAMLS, **RECIPES, **CONFIGS, **TASK_FILES}
"""Name to case."""
