"""Instances of JSON schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from actors.engines.scripted_material import Material
from actors.engines.scripted_schema import instance
from actors.errors import InvalidRequest

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "right": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["name", "left", "right"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "height": {"type": ["null", "number"]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2, "uniqueItems": True},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {"type": "object", "properties": {"zip": {"type": "string", "pattern": r"^\d{5}$"}}}
    },
}
SCHEMAS: dict[str, Any] = {
    "anything": True,
    "const": {"const": {"a": [1]}},
    "enum": {"enum": ["red", "green"]},
    "nested objects": PERSON,
    "recursion through anyOf": TREE,
    "recursion through arrays": {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    },
    "anyOf": {"anyOf": [{"type": "string", "maxLength": 0, "minLength": 1}, {"type": "integer"}]},
    "oneOf takes exactly one": {"oneOf": [{"type": "number"}, {"type": "integer"}, {"type": "string"}]},
    "allOf merges": {
        "allOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"a": {"minimum": 10}, "b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    "narrow numbers": {"type": "number", "exclusiveMinimum": 0.25, "exclusiveMaximum": 0.3},
    "multiples": {"type": "number", "multipleOf": 0.1, "minimum": 0.35, "maximum": 0.45},
    "large multiples": {"type": "integer", "multipleOf": 7, "minimum": 100},
    "only a maximum": {"type": "integer", "maximum": -5},
    "array of one length": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
    "no items allowed": {"type": "array", "maxItems": 0},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "integer"}],
        "items": False,
        "minItems": 2,
    },
    "unique numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "uniqueItems": True},
    "unique enum": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 3, "uniqueItems": True},
    "lengths": {"type": "string", "minLength": 40, "maxLength": 41},
    "short": {"type": "string", "maxLength": 3},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{3}-\d{2,}(x|y)?$"},
    "pattern with length": {"type": "string", "pattern": "^a+b*$", "minLength": 12},
    "negated set": {"type": "string", "pattern": "^[^a-z]{4}$"},
    "only punctuation": {"type": "string", "pattern": r"^[^\w]{2}\W$"},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2},
    "few properties": {
        "type": "object",
        "properties": {"a": {}, "b": {}, "c": {}},
        "maxProperties": 1,
        "required": ["c"],
    },
    "required without a schema": {"type": "object", "required": ["x"]},
    "null": {"type": "null"},
    "no type but signs": {"required": ["a"], "properties": {"a": {"minimum": 3}}},
    "not": {"type": "integer", "not": {"const": 1}},
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"x": {"type": "integer"}},
        "type": "array",
        "items": [{"$ref": "#/definitions/x"}, {"type": "string"}],
        "minItems": 2,
    },
}


def fill(schema: Any, text: str = "Anna has 3 apples and 4.5 pears") -> Any:
    return instance(schema, Material(text), param="response_format")


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_the_instance_is_valid_and_the_same_every_time(schema: Any) -> None:
    value = fill(schema)
    validator_for(schema, default=Draft202012Validator)(schema).validate(value)
    assert json.loads(json.dumps(value)) == value == fill(schema)


@pytest.mark.parametrize(
    "kind", ["date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
)
def test_known_formats_are_kept(kind: str) -> None:
    value = fill({"type": "string", "format": kind}, "no such thing in here")
    assert Draft202012Validator.FORMAT_CHECKER.conforms(value, kind)
    assert value != "no such thing in here"


def test_a_format_is_taken_from_the_text_where_it_stands_there() -> None:
    text = "Write to ann@example.org about 2026-10-01"
    assert fill({"type": "string", "format": "email"}, text) == "ann@example.org"
    assert fill({"type": "string", "format": "date"}, text) == "2026-10-01"
    assert fill({"type": "string", "format": "date"}, "on 2026-13-45") != "2026-13-45"


def test_a_pattern_is_looked_for_in_the_text() -> None:
    assert fill({"type": "string", "pattern": r"^[A-Z]{2}-\d+$"}, "see ticket AB-123 please") == "AB-123"


def test_numbers_and_strings_of_the_text_are_used_in_order() -> None:
    schema = {
        "properties": {
            "count": {"type": "integer"},
            "weight": {"type": "number"},
            "who": {"type": "string"},
            "title": {"type": "string"},
        }
    }
    text = 'Take 12 boxes of 3.5 kg, call it "big order", says Anna Blum'
    assert fill(schema, text) == {"count": 12, "weight": 3.5, "who": "big order", "title": "Anna Blum"}


def test_a_number_that_does_not_fit_is_left_for_the_next_field() -> None:
    schema = {"properties": {"percent": {"type": "integer", "maximum": 100}, "year": {"type": "integer"}}}
    assert fill(schema, "In 2026 it was 40 percent") == {"percent": 40, "year": 2026}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "no-such-type"}, r"not a JSON schema"),
        ({"properties": {"a": {"minimum": "x"}}}, r"\$\.properties\.a\.minimum"),
        (
            {"properties": {"a": {"properties": {"b": False}, "required": ["b"]}}, "required": ["a"]},
            r"\$\.a\.b",
        ),
        ({"type": "integer", "minimum": 5, "maximum": 4}, r"at \$"),
        ({"properties": {"x": {"$ref": "#/$defs/gone"}}}, "leads nowhere"),
        ({"$ref": "https://example.com/schema.json"}, "leads nowhere"),
        ({"$ref": "#"}, "without end"),
        ({"oneOf": [{}, {"$ref": "#"}]}, "without end"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, r"\$\.a\.a\.a.*nests deeper than 32"),
        ({"const": [[[]]], "allOf": [{"$ref": "#/const"}]}, "is not a schema"),
        ({"type": "array", "minItems": 10**9}, "no instance among"),
        ({"type": "string", "minLength": 10**9}, r"at \$"),
        ({"type": "string", "pattern": "(unclosed"}, "."),
        ({"type": "string", "pattern": r"^(?<=x)y\b\B$"}, r"at \$"),
        ({"type": "array", "items": {"enum": ["a"]}, "minItems": 2, "uniqueItems": True}, r"\$\[1\]"),
        ({"type": "number", "minimum": 1e400}, "."),
        ({"allOf": [{"type": "string"}, False]}, r"at \$"),
        ({"enum": ["a"], "type": "integer"}, r"no value of the enum"),
        ({"$schema": []}, "not a JSON schema"),
        ({"minimum": 3, "properties": {"a": {"$ref": "#/minimum"}}, "required": ["a"]}, "is not a schema"),
    ],
)
def test_what_cannot_be_filled_is_refused_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(InvalidRequest, match=place) as refused:
        fill(schema)
    assert refused.value.param == "response_format"


def test_a_very_deep_schema_is_refused() -> None:
    schema: Any = {"type": "string"}
    for _ in range(2000):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    with pytest.raises(InvalidRequest, match="too deeply"):
        fill(schema)


def _range(kind: str, low_key: str, high_key: str, low: int, size: int) -> dict[str, Any]:
    return {"type": kind, low_key: low, high_key: low + size}


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.builds(
        _range,
        st.just("integer"),
        *map(st.just, ("minimum", "maximum")),
        st.integers(-50, 50),
        st.integers(0, 9),
    ),
    st.builds(
        _range,
        st.just("string"),
        *map(st.just, ("minLength", "maxLength")),
        st.integers(0, 60),
        st.integers(0, 9),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.integers() | st.text(max_size=5), min_size=1, max_size=4)
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": [name for name in required if name in properties],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
            st.lists(st.sampled_from("abcd"), unique=True),
        ),
        st.builds(lambda item, n: {"type": "array", "items": item, "minItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda many: {"anyOf": many}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda one: {"allOf": [one]}, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(TREES, st.text(max_size=60))
def test_every_satisfiable_schema_of_common_keywords_is_filled(schema: Any, text: str) -> None:
    Draft202012Validator(schema).validate(fill(schema, text))
