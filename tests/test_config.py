"""The run config: reading, messages, overrides, schema."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

import evomerge
from evomerge.config import CHANGEABLE, RunConfig, json_schema, overridden, parse_config, read_config
from evomerge.errors import ConfigError
from evomerge.plan import drift
from evomerge.spaces.settings import Granularity, Span

SCHEMA = Path(evomerge.__file__).parent / "config.schema.json"

MINIMAL = """
sources: {base: ./base, models: [./math, org/code]}
space: {method: ties}
fitness: {tasks: [arc_easy]}
"""

FULL = """
name: demo
seed: 3
sources:
  base: {name: start, path: ./base}
  models:
    - ./math
    - {path: org/code, revision: v1}
space:
  method: dare_ties
  parameters:
    weight: {low: 0.1, high: 1.2, granularity: {anchors: 3}}
    density: {low: 1e-1, high: 1, log: true}
    lambda: 0.8
    rescale: {choices: [expectation, none]}
    normalize: no
  granularity: layer
  split: [attention, mlp]
  seed: {count: 4}
  dtype: bfloat16
  tokenizer: start
optimizer: {name: cma_es, sigma: 0.2, start: [warm.yaml]}
fitness:
  tasks:
    - arc_easy
    - {name: gsm8k, weight: 2, metric: "exact_match,strict-match", num_fewshot: 5, documents: {search: 50}}
  include_paths: [tasks]
  trust_code: [tasks]
  documents: {search: 200, select: 100, test: rest}
  resample: 20
  chat_template: yes
budget: {evaluations: 60, hours: 1.5, patience: 30, finalists: 5}
baselines: {task_arithmetic: [0.3, 0.5]}
workers: {pool: ray, count: auto, cpus: 2, resources: {TPU: 1}, device: cpu}
store: runs.db
output: {export: true}
"""

EVOLVE = """
genome:
  models:
    - org/math-7b
    - ./code@v2
    - org/base-7b
  merge_method: dare_ties
  base_model: org/base-7b
  tokenizer_source: org/math-7b
  layer_granularity: 8
  normalize: false
  allow_negative_weights: true
  filters: [self_attn, mlp]
tasks:
  - name: gsm8k
    weight: 0.4
    metric: exact_match,strict-match
  - arc_easy
limit: 200
num_fewshot: 3
shuffle: false
"""


def data(text=MINIMAL):
    return {"name": "x", **yaml.safe_load(text)}


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


def changed(key, value):
    """A minimal config with one key, given by its path, set to a value."""
    found = data()
    node = found
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[int(last) if isinstance(node, list) else last] = value
    return found


def refusal(found, *overrides):
    with pytest.raises(ConfigError) as caught:
        parse_config(found, "c.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("c.yaml: ")


def test_a_minimal_config_is_named_after_its_file_and_filled_with_defaults(tmp_path):
    config = read_config(write(tmp_path, MINIMAL, "my-run.yaml"))
    assert config.name == "my-run"
    assert [(ref.name, ref.path) for ref in config.sources.all] == [
        ("base", "./base"),
        ("math", "./math"),
        ("code", "org/code"),
    ]
    assert config.fitness.tasks[0].name == "arc_easy"
    assert (config.optimizer.name, config.optimizer.settings, config.budget.evaluations) == (
        "cma_es",
        {},
        100,
    )


def test_a_full_config_is_read(tmp_path):
    config = read_config(write(tmp_path, FULL))
    assert config.space.parameters["weight"] == Span(low=0.1, high=1.2, granularity=Granularity(anchors=3))
    assert config.space.parameters["density"] == Span(low=0.1, high=1.0, log=True)
    assert config.space.parameters["normalize"] is False
    assert config.space.granularity == Granularity(layers=1)
    assert config.optimizer.settings == {"sigma": 0.2}
    task = config.fitness.tasks[1]
    assert (task.metric, task.filter, task.weight) == ("exact_match", "strict-match", 2.0)
    assert config.fitness.chat_template is True
    assert config.workers.resources == {"TPU": 1.0}


@pytest.mark.parametrize("text", [MINIMAL, FULL, EVOLVE])
def test_a_config_survives_the_store(tmp_path, text):
    config = read_config(write(tmp_path, text))
    stored = json.loads(json.dumps(config.model_dump(mode="json"), allow_nan=False))
    assert parse_config(stored, "run") == config


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("./a b", "a-b"), ("/x/mödel/", "m-del"), ("org/Model-7B_v1.0", "Model-7B_v1.0")),
        *((".", "model"), ("../", "model"), (".hidden", "hidden"), ("x" * 300, "x" * 100)),
    ],
)
def test_a_bare_path_names_its_source(path, name):
    config = parse_config(changed("sources.models.0", path), "c")
    assert (config.sources.models[0].name, config.sources.models[0].path) == (name, path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("budgt", {}, 'unknown key "budgt"; did you mean "budget"?'),
        ("name", "a b", 'name: expected a text that matches ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$, got "a b"'),
        ("seed", True, "seed: expected a number, got true"),
        ("budget", None, "budget: expected a mapping, got null"),
        ("budget.evaluations", 0, "budget.evaluations: expected at least 1, got 0"),
        ("budget.evaluations", 1.5, "budget.evaluations: expected a whole number, got 1.5"),
        ("budget.evaluatons", 5, 'budget: unknown key "evaluatons"; did you mean "evaluations"?'),
        ("budget.hours", float("nan"), "budget.hours: expected a finite number, got NaN"),
        ("budget.hours", 0, "budget.hours: expected more than 0, got 0"),
        ("budget.finalists", 101, "budget.finalists: expected at most 100, got 101"),
        ("fitness.tasks", [], "fitness: give either tasks or a function"),
        ("fitness.tasks", "arc", 'fitness.tasks: expected a list, got "arc"'),
        ("fitness.tasks", ["a", "a"], 'fitness.tasks: "a" is listed twice'),
        ("fitness.tasks.0", 3, "fitness.tasks.0: expected a mapping, got 3"),
        (
            "fitness.tasks.0",
            {"name": "a", "weight": -1},
            "fitness.tasks.0.weight: expected more than 0, got -1",
        ),
        ("fitness.tasks.0", {"nam": "a"}, 'fitness.tasks.0: unknown key "nam"; did you mean "name"?'),
        (
            "fitness.documents.test",
            "all",
            "fitness.documents.test: expected a whole number or 'rest', got \"all\"",
        ),
        ("fitness.documents.test", 0, "fitness.documents.test: expected at least 1 or rest, got 0"),
        ("fitness.resample", 101, "fitness.resample: 101 exceeds the 100 search documents of arc_easy"),
        ("fitness.trust_code", ["x"], 'fitness.trust_code: "x" is not one of include_paths'),
        (
            "fitness.function",
            "f.py",
            'fitness.function: expected a text that matches ^[^:]+:[A-Za-z_][A-Za-z0-9_]*$, got "f.py"',
        ),
        ("space.method", "tiess", 'space.method: unknown merge method "tiess"; did you mean "ties"?'),
        ("space.parameters.weight.low", "x", 'space.parameters.weight.low: expected a number, got "x"'),
        (
            "space.parameters.weight",
            {"lo": 1},
            'space.parameters.weight: unknown key "lo"; did you mean "low"?',
        ),
        ("space.parameters.density", 5, "space.parameters.density: expected 0.0 to 1.0, got 5.0"),
        (
            "space.parameters.wieght",
            1,
            'space.parameters: method "ties" has no parameter "wieght"; did you mean "weight"?',
        ),
        ("space.granularity", {"layer": 1}, 'space.granularity: unknown key "layer"; did you mean "layers"?'),
        ("space.seed", {"count": 1}, "space.seed.count: expected at least 2, got 1"),
        ("space.dtype", "fp16", "space.dtype: expected 'float32', 'bfloat16' or 'float16', got \"fp16\""),
        ("optimizer.name", "cmaes", 'optimizer.name: unknown optimizer "cmaes"; did you mean "cma_es"?'),
        ("optimizer.sgima", 1, 'optimizer.sgima: unknown setting of "cma_es"; did you mean "sigma"?'),
        ("optimizer.nme", "x", 'optimizer.nme: unknown setting of "cma_es"; did you mean "name"?'),
        ("optimizer.sigma", -1, "optimizer.sigma: must be above 0 and at most 1, got -1"),
        ("optimizer.start", "a.yaml", 'optimizer.start: expected a list, got "a.yaml"'),
        ("baselines.task_arithmetic", [0.1, "x"], 'baselines.task_arithmetic.1: expected a number, got "x"'),
        ("sources.models", [], "sources.models: expected at least 1 item(s), got []"),
        (
            "sources.models",
            ["./a", "b/a"],
            'sources: the name "a" is used twice; give each source its own `name`',
        ),
        ("sources.models.0", {"pth": "x"}, 'sources.models.0: unknown key "pth"; did you mean "path"?'),
        ("sources.models.0", {"path": ""}, 'sources.models.0.path: expected at least 1 character(s), got ""'),
        (
            "sources.models.0",
            {"name": False, "path": "x"},
            "sources.models.0.name: expected a text, got false (YAML reads yes, no, on and off as true and "
            "false: put texts in quotes)",
        ),
        ("workers.device", "gpu", "workers.device: expected 'auto', 'cpu' or 'cuda', got \"gpu\""),
        ("workers.resources", {"TPU": "x"}, 'workers.resources.TPU: expected a number, got "x"'),
        ("workers.engine", "sglang", "workers.engine: expected 'transformers' or 'vllm', got \"sglang\""),
        (
            "workers.tensor_parallel",
            2,
            "workers.tensor_parallel: needs engine: vllm; with transformers, gpus: 2 "
            "spreads the model by layer",
        ),
        ("workers.gpus", 1.5, "workers.gpus: expected a fraction up to 1, or whole GPUs, got 1.5"),
        ("workers", {"gpus": 2, "device": "cpu"}, "workers.gpus: 2 GPUs hold no model with device: cpu"),
        ("workers", {"engine": "vllm", "device": "cpu"}, "workers.device: engine vllm needs a GPU; got cpu"),
        (
            "workers",
            {"engine": "vllm", "gpus": 2},
            "workers.gpus: expected above 0 and at most 1 with engine vllm, got 2",
        ),
        (
            "workers",
            {"engine": "vllm", "gpus": 0},
            "workers.gpus: expected above 0 and at most 1 with engine vllm, got 0",
        ),
        (
            "workers",
            {"engine": "vllm", "tensor_parallel": 4, "gpus": 1},
            "workers.gpus: expected 4, as tensor_parallel says, with engine vllm, got 1",
        ),
    ],
)
def test_faults_name_the_key_what_was_expected_and_what_was_got(key, value, message):
    assert refusal(changed(key, value)) == message


WRONG = """
sources: {base: ./base, models: [./math, ./code], modls: 1}
space:
  method: ties
  parameters:
    wieght: {low: x}
    density: {low: y, high: z}
optimizer: {sgima: 3, population: 1}
fitness: {tasks: [{nam: a}]}
budget: {evaluations: 0, hours: -1}
"""


def test_all_faults_that_do_not_depend_on_each_other_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(data(WRONG), "c.yaml")
    assert [line.removeprefix("c.yaml: ") for line in caught.value.lines] == [
        'sources: unknown key "modls"; did you mean "models"?',
        'fitness.tasks.0: unknown key "nam"; did you mean "name"?',
        'space.parameters: method "ties" has no parameter "wieght"; did you mean "weight"?',
        'space.parameters.wieght.low: expected a number, got "x"',
        'space.parameters.density.low: expected a number, got "y"',
        'space.parameters.density.high: expected a number, got "z"',
        'optimizer.sgima: unknown setting of "cma_es"; did you mean "sigma"?',
        "optimizer.population: must be 2 or more, got 1",
        "budget.evaluations: expected at least 1, got 0",
        "budget.hours: expected more than 0, got -1",
    ]


def test_a_misspelt_parameter_with_wrong_bounds_is_named_first():
    found = changed("space.parameters", {"weight": {"low": 2, "high": 1}, "densty": {"low": 3, "high": 2}})
    with pytest.raises(ConfigError) as caught:
        parse_config(found, "c.yaml")
    assert caught.value.lines == [
        'c.yaml: space.parameters: method "ties" has no parameter "densty"; did you mean "density"?',
        "c.yaml: space.parameters.weight: low must be below high, got 2.0 and 1.0",
        "c.yaml: space.parameters.densty: low must be below high, got 3.0 and 2.0",
    ]


def test_ranges_that_the_method_does_not_allow_are_all_told():
    spans = {"density": {"low": 2, "high": 3}, "normalize": {"low": 0, "high": 1}}
    found = changed("space.parameters", spans)
    with pytest.raises(ConfigError) as caught:
        parse_config(found, "c.yaml")
    assert caught.value.lines == [
        "c.yaml: space.parameters.density.low: expected 0.0 to 1.0, got 2.0",
        "c.yaml: space.parameters.normalize: a switch or choice has no range; write free or choices",
    ]


@pytest.mark.parametrize("kind", ["parametre", 3, None])
def test_an_unknown_kind_of_space_is_refused(kind):
    assert refusal(changed("space.kind", kind)).startswith(f'space.kind: unknown kind of space "{kind}"')


def test_missing_sections_are_named():
    found = data()
    del found["sources"]
    assert refusal(found) == "sources: missing; it has no default"


def test_fresh_documents_need_generations():
    found = changed("fitness.resample", 10)
    found["optimizer"] = {"name": "random"}
    assert refusal(found) == (
        "fitness.resample: fresh documents for each generation need the optimizer cma_es, got random"
    )


@pytest.mark.parametrize(
    ("text", "kind"), [("", "nothing"), ("[1]", "a list"), ("abc", "a text"), ("3", "a value")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, kind):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value) == f"{path}: expected a mapping with sources, space and fitness, got {kind}"


def test_messages_name_the_file(tmp_path):
    path = write(tmp_path, MINIMAL + "budgt: {}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: unknown key")


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("budget.evaluations=7", lambda c: c.budget.evaluations == 7),
        ("budget.hours=1e-3", lambda c: c.budget.hours == 0.001),
        ("space.parameters.weight={low: 0.5, high: 1}", lambda c: c.space.parameters["weight"].low == 0.5),
        ("space.parameters.weight.low=0.5", lambda c: c.space.parameters["weight"].low == 0.5),
        ("sources.models.1=./new", lambda c: c.sources.models[1].path == "./new"),
        ("sources.models=[./one]", lambda c: len(c.sources.models) == 1),
        ("store=", lambda c: c.store is None),
        ("store=a=b.db", lambda c: c.store == "a=b.db"),
        ("fitness.chat_template=no", lambda c: c.fitness.chat_template is False),
        ("optimizer.sigma=0.3", lambda c: c.optimizer.settings == {"sigma": 0.3}),
    ],
)
def test_an_override_sets_one_key(tmp_path, override, found):
    assert found(read_config(write(tmp_path, MINIMAL), [override]))


def test_overrides_reach_into_items_of_lists():
    config = parse_config(
        data(FULL), "c", ["fitness.tasks.1.weight=5", "fitness.tasks.1.documents.search=70"]
    )
    assert (config.fitness.tasks[1].weight, config.fitness.tasks[1].documents.search) == (5.0, 70)


def test_later_overrides_win_and_the_data_stays_as_it_was():
    found = data()
    before = copy.deepcopy(found)
    assert parse_config(found, "c", ["seed=1", "seed=2"]).seed == 2
    assert found == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.evaluations", "--set budget.evaluations: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("seed=[1", "--set seed: not valid YAML: line 1: expected ',' or ']', but got '<stream end>'"),
        ("sources.models.5=./x", "--set sources.models.5: 5 is not the number of an item (0 to 1)"),
        ("sources.models.a=./x", "--set sources.models.a: a is not the number of an item (0 to 1)"),
        ("name.x=3", "--set name.x: x lies below a value that is no section"),
        ("budgt.evaluations=3", 'unknown key "budgt"; did you mean "budget"?'),
        ("budget.evaluatons=3", 'budget: unknown key "evaluatons"; did you mean "evaluations"?'),
        ("budget.evaluations=many", 'budget.evaluations: expected a whole number, got "many"'),
        ("budget..evaluations=3", 'budget: unknown key ""; known: evaluations, finalists, hours, patience'),
    ],
)
def test_wrong_overrides_are_named(override, message):
    assert refusal(data(), override) == message


def test_an_override_of_a_list_item_keeps_the_others():
    assert overridden({"a": [1, {"b": 2}]}, "a.1.b=3") == {"a": [1, {"b": 3}]}
    assert overridden({"a": (1, 2)}, "a.0=9") == {"a": [9, 2]}


def test_what_a_resumed_run_may_change_are_whole_sections():
    assert set(RunConfig.model_fields) > CHANGEABLE
    assert {"sources", "space", "optimizer", "fitness", "seed", "name", "baselines"}.isdisjoint(CHANGEABLE)


FACTS = {
    "sources": {"a": {"path": "./a", "fingerprint": "1" * 64}},
    "fitness": "f" * 64,
    "space": [["weight a", "real", 0]],
}


def test_unchanged_facts_do_not_drift():
    assert drift(FACTS, json.loads(json.dumps(FACTS))) == []
    assert drift({**FACTS, "space": [("weight a", "real", 0)]}, FACTS) == []


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            {"sources": {"a": {"path": "./a", "fingerprint": "2" * 64}}},
            "source a (./a) changed: fingerprint 111111111111 at the start, 222222222222 now",
        ),
        (
            {"fitness": "e" * 64},
            "the fitness (tasks, documents, prompts, engine, or the function's file) changed: "
            "fingerprint ffffffffffff at the start, "
            "eeeeeeeeeeee now",
        ),
        ({"space": [["weight a", "real", 0]] * 2}, "the space has other dimensions than at the start"),
    ],
)
def test_changed_facts_are_named(now, message):
    assert drift(FACTS, {**FACTS, **now}) == [message]


def test_a_mergekit_evolve_config_is_read_as_it_is(tmp_path):
    config = read_config(write(tmp_path, EVOLVE, "evolve.yml"))
    assert config.name == "evolve"
    assert [(ref.name, ref.path, ref.revision) for ref in config.sources.all] == [
        ("base-7b", "org/base-7b", None),
        ("math-7b", "org/math-7b", None),
        ("code", "./code", "v2"),
    ]
    assert config.sources.base == config.sources.all[0]
    space = config.space
    assert (space.method, space.granularity, space.split) == (
        "dare_ties",
        Granularity(layers=8),
        ("self_attn", "mlp"),
    )
    assert space.parameters["weight"] == Span(low=-1.0, high=1.0)
    assert space.parameters["density"] == Span(low=0.01, high=1.0)
    assert (space.parameters["normalize"], space.parameters["rescale"]) == (False, "l1")
    assert (space.tokenizer, space.dtype) == ("math-7b", "bfloat16")
    tasks = [(t.name, t.weight, t.metric, t.filter, t.num_fewshot) for t in config.fitness.tasks]
    assert tasks == [("gsm8k", 0.4, "exact_match", "strict-match", 3), ("arc_easy", 1.0, "acc", "none", 3)]
    assert (config.fitness.documents.search, config.fitness.documents.select) == (200, 200)
    assert (config.fitness.chat_template, config.fitness.fewshot_as_multiturn) == (True, True)
    assert (config.optimizer.name, config.optimizer.settings) == ("cma_es", {"lr_adapt": False})


def test_a_mergekit_evolve_config_takes_overrides(tmp_path):
    config = read_config(write(tmp_path, EVOLVE), ["budget.evaluations=9", "fitness.tasks.1.weight=3"])
    assert (config.budget.evaluations, config.fitness.tasks[1].weight) == (9, 3.0)


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_every_method_of_mergekit_evolve_has_a_space(tmp_path, method):
    found = yaml.safe_load(EVOLVE)
    found["genome"] |= {"merge_method": method, "models": ["./a", "./b"], "tokenizer_source": "union"}
    for key in ("filters", "layer_granularity", "normalize"):
        del found["genome"][key]
    config = read_config(write(tmp_path, yaml.safe_dump(found)))
    assert config.space.granularity == Granularity(anchors=1)
    free = {name for name, span in config.space.parameters.items() if isinstance(span, Span)}
    assert free == {"slerp": {"t"}, "ties": {"weight", "density"}}.get(method, {"weight"})
    assert config.space.parameters.get("normalize") is {"slerp": None, "task_arithmetic": False}.get(
        method, True
    )
    assert [ref.name for ref in config.sources.models] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limits": 3}, 'limits: unknown key; did you mean "limit"?'),
        ({"random_init": True}, "random_init: not supported; leave it out"),
        ({"tasks": None}, "tasks: expected a list, got None"),
        ({"tasks": [3]}, "tasks.0: expected a name or a mapping, got 3"),
        ({"genome.model": []}, 'genome.model: unknown key; did you mean "models"?'),
        ({"genome.smooth": True}, "genome.smooth: not supported; leave it out"),
        ({"genome.models": "./a"}, "genome.models: expected a list, got './a'"),
        ({"genome.models": [3]}, "genome.models.0: expected a path or hub id, got 3"),
        (
            {"genome.merge_method": "dare_linear"},
            'genome.merge_method: mergekit-evolve has no method "dare_linear"',
        ),
        ({"genome.merge_method": "slerp"}, "genome.models: slerp takes 2 models here, got 3"),
        (
            {"genome.tokenizer_source": "org/other"},
            "genome.tokenizer_source: org/other is none of the models",
        ),
        ({"genome.layer_granularity": "x"}, 'space.granularity.layers: expected a whole number, got "x"'),
        ({"genome": 3}, "genome: expected a mapping"),
    ],
)
def test_what_mergekit_evolve_has_and_we_do_not_is_refused_by_name(tmp_path, changes, message):
    found = yaml.safe_load(EVOLVE)
    for key, value in changes.items():
        section, _, inner = key.rpartition(".")
        (found[section] if section else found)[inner] = value
    path = write(tmp_path, yaml.safe_dump(found))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value) == f"{path}: {message}"


def test_the_schema_is_valid_and_accepts_what_the_config_accepts():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in (MINIMAL, FULL):
        jsonschema.validate(yaml.safe_load(text.replace("1e-1", "0.1")), schema)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("budgt", {}), ("budget.evaluations", 0), ("fitness.tasks.0", {"nam": "x"}), ("seed", "x")),
        *(("space.granularity", "layers"), ("optimizer.name", "cmaes"), ("sources.models", [])),
    ],
)
def test_the_schema_refuses_what_the_config_refuses(key, value):
    refusal(changed(key, value))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(key, value), json_schema())


def test_every_key_of_the_schema_is_described():
    schema = json_schema()
    for name, definition in schema["$defs"].items():
        for model in definition.get("anyOf", [definition]):
            for key, described in model.get("properties", {}).items():
                assert described.get("description"), f"{name}.{key}"


def test_the_shipped_schema_is_the_one_the_command_prints():
    run = subprocess.run(
        [sys.executable, "-m", "evomerge", "schema"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert json.loads(run.stdout) == json_schema()
    wrong = "stale; write it anew with: evomerge schema > evomerge/config.schema.json"
    assert SCHEMA.read_text("utf-8") == run.stdout, wrong
