"""Reading user files strictly: YAML traps, one-line errors, canonical JSON."""

import json
import math
import re
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from evomerge.errors import ConfigError, RecipeError
from evomerge.strict import (
    MAX_BYTES,
    MAX_DEPTH,
    StrictModel,
    canonical_json,
    dump_yaml,
    parse_yaml,
    read_text,
    read_yaml,
    validated,
)

PRINTED = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(PRINTED, max_size=12),
    st.sampled_from(
        ["1e-3", "1e3", "010", "08", "0x1f", "1:30", "2026-01-01", "no", "~", "=", "<<", "1_000", ".5"]
    ),
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(PRINTED, max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


class Inner(StrictModel):
    """A section."""

    low: float | None = None
    count: int = Field(default=1, ge=1)


class Outer(StrictModel):
    """A file."""

    span: float | str | Inner = 0.0
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()
    test: int | Literal["rest"] = "rest"
    flag: bool = False
    name: str = Field(default="x", pattern="^[a-z]+$")


def read(text):
    return parse_yaml(text, "file.yaml", ConfigError)


def refusal(text):
    with pytest.raises(ConfigError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith("file.yaml: ")
    assert "\n" not in message
    return message.removeprefix("file.yaml: ")


def fault(data):
    with pytest.raises(ConfigError) as caught:
        validated(Outer, data, "c", ConfigError)
    message = str(caught.value)
    assert message.startswith("c: ")
    assert "\n" not in message
    return message.removeprefix("c: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", 'not valid YAML: line 3: the key "a" is given twice'),
        ("x:\n  a: {b: 1, b: 2}", 'not valid YAML: line 2: the key "b" is given twice'),
        ("1: a\n1: b", 'not valid YAML: line 2: the key "1" is given twice'),
        ("a: &x [1]\nb: *x", "line 2: alias *x: not allowed; write the value out"),
        ("? [a]\n: b", "not valid YAML: line 1: a key is not a name"),
        ("a: [1", "not valid YAML: line 1: expected ',' or ']', but got '<stream end>'"),
        ("--- 1\n--- 2", "not valid YAML: line 2: but found another document"),
    ],
)
def test_yaml_that_loses_or_hides_something_is_refused_with_its_line(text, message):
    assert refusal(text) == message


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [x]",
        "!!python/name:os.system",
        "!!timestamp x",
        "!!set {x}",
        "!mine x",
    ],
)
def test_tags_are_refused_whatever_they_would_construct(tag):
    assert "line 2: tag " in refusal(f"a: 1\nb: {tag}")


def test_a_key_with_a_line_break_still_gives_one_line():
    assert refusal('"a\\nb": 1\n"a\\nb": 2') == 'not valid YAML: line 2: the key "a b" is given twice'


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_a_depth_bomb_is_refused_at_once(opening):
    assert refusal(opening * 100_000) == f"nested more than {MAX_DEPTH} levels deep"
    assert read("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


def test_an_alias_bomb_is_refused_before_it_grows():
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "alias *a" in refusal(bomb)


def test_text_over_the_limit_is_refused_unread():
    assert refusal("a" * (MAX_BYTES + 1)).startswith("too large")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 0.001), ("1e3", 1000.0), ("-2.5E+2", -250.0), (".5", 0.5), ("5.", 5.0), ("+7", 7)),
        *(("010", 10), ("08", 8), ("0x1F", 31), ("0o17", 15), ("-0", 0), (".inf", math.inf)),
        *(("1:30", "1:30"), ("1_000", "1_000"), ("2026-01-01", "2026-01-01"), ("2026-13-45", "2026-13-45")),
        *(
            ("'1e-3'", "1e-3"),
            ("1e", "1e"),
            ("e3", "e3"),
            (".", "."),
            ("-", [None]),
            ("=", "="),
            ("<<", "<<"),
        ),
        *(
            ("no", False),
            ("off", False),
            ("yes", True),
            ("True", True),
            ("~", None),
            ("", None),
            ("'no'", "no"),
        ),
    ],
)
def test_scalars_mean_what_people_mean_by_them(text, value):
    assert read(f"a: {text}" if text != "-" else "a:\n  -") == {"a": value}
    found = read(f"a: {text}" if text != "-" else "a:\n  -")["a"]
    assert type(found) is type(value)


def test_not_a_number_is_read_and_left_to_the_model_to_refuse():
    assert math.isnan(read("low: .nan")["low"])
    assert fault({"inner": {"low": math.nan}}) == "inner.low: expected a finite number, got NaN"


@given(DATA)
def test_what_is_dumped_comes_back_equal(data):
    assert read(dump_yaml({"data": data})) == {"data": data}


@given(DATA)
def test_what_is_dumped_contains_neither_tag_nor_alias(data):
    for event in yaml.parse(dump_yaml([data, data])):
        assert not isinstance(event, yaml.AliasEvent)
        assert getattr(event, "tag", None) is None


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text):
    refused = ""
    try:
        read(text)
    except ConfigError as problem:
        refused = str(problem)
    assert len(refused.splitlines()) <= 1


def test_files_that_cannot_be_read_are_named(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"a" * (MAX_BYTES + 1))
    expected = {
        tmp_path / "absent.yaml": "cannot be read (No such file or directory)",
        tmp_path: "not a regular file",
        binary: "not a text file in UTF-8",
        large: "larger than the 1,048,576 bytes allowed for this kind of file",
    }
    for path, message in expected.items():
        with pytest.raises(RecipeError) as caught:
            read_text(path, RecipeError)
        assert str(caught.value) == f"{path}: {message}"


def test_a_file_is_read_like_a_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1, é]", "utf-8")
    assert read_yaml(path, ConfigError) == {"a": [1, "é"]}
    path.write_text("a: [1, 2", "utf-8")
    with pytest.raises(ConfigError, match=f"^{path}: not valid YAML: line 1: "):
        read_yaml(path, ConfigError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nner": {}}, 'unknown key "nner"; did you mean "inner"?'),
        ({"inner": {"cuont": 1}}, 'inner: unknown key "cuont"; did you mean "count"?'),
        ({"items": [{}, {"lwo": 1}]}, 'items.1: unknown key "lwo"; did you mean "low"?'),
        ({"span": {"lwo": 1}}, 'span: unknown key "lwo"; did you mean "low"?'),
        ({1: 2}, 'unknown key "1"; known: flag, inner, items, name, span, test'),
        ({"span": {"low": "x"}}, 'span.low: expected a number, got "x"'),
        ({"span": {"count": 0}}, "span.count: expected at least 1, got 0"),
        ({"span": [1]}, "span: expected a number or a text or a mapping, got [1]"),
        ({"items": {"low": 1}}, 'items: expected a list, got {"low": 1}'),
        ({"items": [3]}, "items.0: expected a mapping, got 3"),
        ({"inner": None}, "inner: expected a mapping, got null"),
        ({"inner": {"count": 1.5}}, "inner.count: expected a whole number, got 1.5"),
        ({"inner": {"count": True}}, "inner.count: expected a number, got true"),
        ({"inner": {"low": False}}, "inner.low: expected a number, got false"),
        (
            {"inner": {"count": "1e3"}},
            'inner.count: expected a whole number, got "1e3" (a text: write numbers without quotes)',
        ),
        ({"test": "all"}, "test: expected a whole number or 'rest', got \"all\""),
        ({"flag": "maybe"}, 'flag: expected true or false, got "maybe"'),
        ({"name": "A"}, 'name: expected a text that matches ^[a-z]+$, got "A"'),
        (
            {"name": False},
            "name: expected a text, got false (YAML reads yes, no, on and off as true and false: "
            "put texts in quotes)",
        ),
        ([], "expected a mapping, got []"),
    ],
)
def test_faults_name_the_key_what_was_expected_and_what_was_got(data, message):
    assert fault(data) == message


def test_all_faults_are_told_wrong_names_first():
    data = {"span": {"low": "x", "cuont": 1}, "nme": "A", "inner": {"count": 0, "low": "y"}, "flag": 3}
    with pytest.raises(ConfigError) as caught:
        validated(Outer, data, "c", ConfigError)
    assert caught.value.lines == [
        'c: unknown key "nme"; did you mean "name"?',
        'c: span: unknown key "cuont"; did you mean "count"?',
        'c: span.low: expected a number, got "x"',
        'c: inner.low: expected a number, got "y"',
        "c: inner.count: expected at least 1, got 0",
        "c: flag: expected true or false, got 3",
    ]


class Named(StrictModel):
    """A thing whose name has no default."""

    name: str
    path: str


def test_a_key_that_is_misspelt_is_not_missing_too():
    with pytest.raises(ConfigError) as caught:
        validated(Named, {"nam": "x"}, "c", ConfigError)
    assert caught.value.lines == [
        'c: unknown key "nam"; did you mean "name"?',
        "c: path: missing; it has no default",
    ]


def test_of_many_faults_the_first_are_told_and_the_rest_counted():
    with pytest.raises(ConfigError) as caught:
        validated(Outer, {"items": [{"lwo": 1, "count": 0}] * 20_000}, "c", ConfigError)
    assert len(caught.value.lines) == 11
    assert caught.value.lines[:2] == [
        f'c: items.{i}: unknown key "lwo"; did you mean "low"?' for i in range(2)
    ]
    assert re.fullmatch(r"and at least \d{3} more", caught.value.lines[-1])


def test_long_values_are_cut_and_line_breaks_removed():
    message = fault({"flag": "a\nb" * 100})
    assert len(message) < 130
    assert "..." in message


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Outer().flag = True


@given(DATA)
def test_canonical_json_is_one_text_per_value(data):
    text = canonical_json(data)
    assert json.loads(text) == data
    assert canonical_json(json.loads(text)) == text


def test_canonical_json_ignores_the_order_of_keys_and_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.0, "é"]}) == '{"a":[1.0,"é"],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(math.nan)
