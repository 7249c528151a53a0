"""Instances of JSON schemas, deterministic and made of what the user wrote where it fits.

Called by `scripted_text` (structured output) and `scripted_tools` (arguments). Every instance is checked with
`jsonschema` before it leaves; what cannot be filled is an `InvalidRequest` that names the place. Scalars are in
`scripted_scalars`; nothing is ever fetched: a `$ref` outside the schema is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import referencing.exceptions
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from actors.engines.scripted_material import Material
from actors.engines.scripted_scalars import number_candidates, string_candidates
from actors.engines.scripted_schema_check import Unfillable, check_nesting, check_references
from actors.errors import InvalidRequest

# Objects and arrays inside each other: deeper than this only what is required is filled, so recursion ends.
RICH_DEPTH = 4
MAX_DEPTH = 32
MAX_FILLS = 5_000  # values tried for one instance
_SIGNS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties"),
    "array": ("items", "prefixItems", "minItems", "contains", "uniqueItems"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # keywords that give a schema without `type` away; anything else becomes a string


def instance(schema: Any, material: Material, *, param: str) -> Any:
    """A value that is valid against `schema`.

    Args:
        schema: a JSON schema; draft 2020-12 unless `$schema` says otherwise.
        material: values to prefer.
        param: the request field that holds the schema, for errors.

    Raises:
        InvalidRequest: the schema is none, refers to something outside itself, or no instance was found.
    """
    try:
        check_nesting(schema)
        validator = _validator(schema)
        resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
        check_references(schema, resolver)
        value = _Filler(validator, resolver, material).fill(schema, "$")
        wrong = best_match(validator.iter_errors(value))
    except SchemaError as error:
        raise InvalidRequest(
            f"not a JSON schema: {error.message} at {error.json_path}", param=param
        ) from error
    except referencing.exceptions.Unresolvable as error:
        raise InvalidRequest(f"the schema has a $ref that leads nowhere: {error.ref}", param=param) from error
    except Unfillable as error:
        place, why = error.args
        raise InvalidRequest(f"cannot fill the schema at {place}: {why}", param=param) from error
    except (re.error, ArithmeticError, ValueError) as error:
        raise InvalidRequest(f"cannot use a pattern or number of the schema: {error}", param=param) from error
    if wrong is not None:
        raise InvalidRequest(f"cannot fill the schema at {wrong.json_path}: {wrong.message}", param=param)
    return value


def _validator(schema: Any) -> Any:
    """A validator of the schema's own draft that knows nothing outside the schema."""
    if isinstance(schema, Mapping) and not isinstance(schema.get("$schema", ""), str):
        raise SchemaError("$schema is not a string", path=["$schema"])
    validator_class = validator_for(schema, default=Draft202012Validator)
    validator_class.check_schema(schema)
    return validator_class(schema, registry=Registry(), format_checker=validator_class.FORMAT_CHECKER)


class _Filler:
    """Fills one schema, depth first."""

    def __init__(self, validator: Any, resolver: Any, material: Material) -> None:
        self._validator = validator
        self._resolver = resolver
        self._material = material
        self._fills = 0

    def fill(self, schema: Any, path: str, depth: int = 0) -> Any:
        """A value for `schema`, most likely valid."""
        self._fills += 1
        if self._fills > MAX_FILLS:
            raise Unfillable(path, f"no instance among the first {MAX_FILLS} values")
        if depth > MAX_DEPTH:
            raise Unfillable(path, f"what is required nests deeper than {MAX_DEPTH} levels")
        if schema is False:
            raise Unfillable(path, "nothing is valid here")
        if schema is True or not schema:
            return self._string({}, path)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._enum(schema, path)
        return self._combined(schema, path, depth)

    def _combined(self, schema: Mapping[str, Any], path: str, depth: int) -> Any:
        if "$ref" in schema:
            target = self._resolver.lookup(schema["$ref"]).contents
            return self.fill(_merge(_without(schema, "$ref"), target), path, depth)
        if "allOf" in schema:
            return self.fill(_merge(_without(schema, "allOf"), *schema["allOf"]), path, depth)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._alternative(schema, keyword, path, depth)
        return self._typed(schema, path, depth)

    def _typed(self, schema: Mapping[str, Any], path: str, depth: int) -> Any:
        kind = _kind(schema, rich=depth < RICH_DEPTH)
        if kind == "object":
            return self._object(schema, path, depth)
        if kind == "array":
            return self._array(schema, path, depth)
        if kind in {"integer", "number"}:
            return self._number({**schema, "type": kind}, path)
        if kind == "string":
            return self._string(schema, path)
        return True if kind == "boolean" else None

    def _enum(self, schema: Mapping[str, Any], path: str) -> Any:
        values = [value for value in schema["enum"] if self._valid(schema, value)]
        if not values:
            raise Unfillable(path, "no value of the enum is valid")
        return next((value for value in values if self._material.mentions(value)), values[0])

    def _alternative(self, schema: Mapping[str, Any], keyword: str, path: str, depth: int) -> Any:
        alternatives = list(schema[keyword])
        if depth >= RICH_DEPTH:
            alternatives.sort(key=_may_nest)  # stable: leaves first
        why = "no alternative is valid"
        for alternative in alternatives:
            merged = _merge(_without(schema, keyword), alternative)
            try:
                value = self.fill(merged, path, depth)
            except Unfillable as error:
                why = error.args[1]
                continue
            if self._valid(schema, value):
                return value
        raise Unfillable(path, why)

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
        known: Mapping[str, Any] = schema.get("properties", {})
        required = list(schema.get("required", ()))
        most = schema.get("maxProperties", math.inf)
        value: dict[str, Any] = {}
        for name in dict.fromkeys([*known, *required]):
            optional = name not in required
            missing = len(set(required) - set(value))
            if optional and (depth >= RICH_DEPTH or len(value) + missing >= most):
                continue
            try:
                value[name] = self.fill(known.get(name, _other(schema)), f"{path}.{name}", depth + 1)
            except Unfillable:
                if not optional:
                    raise
        while len(value) < schema.get("minProperties", 0):
            name = f"key{len(value) + 1}"
            value.setdefault(name, self.fill(_other(schema), f"{path}.{name}", depth + 1))
        return value

    def _array(self, schema: Mapping[str, Any], path: str, depth: int) -> list[Any]:
        first = schema.get("prefixItems", [])
        rest = schema.get("items", schema.get("contains", True))
        if isinstance(rest, list):  # up to draft 2019-09, `items` could be a tuple
            first, rest = rest, schema.get("additionalItems", True)
        wanted = max(
            schema.get("minItems", 0), len(first), 1 if depth < RICH_DEPTH and rest is not False else 0
        )
        wanted = min(wanted, schema.get("maxItems", wanted))
        values: list[Any] = []
        for at in range(wanted):
            item = first[at] if at < len(first) else rest
            value = self.fill(item, f"{path}[{at}]", depth + 1)
            if schema.get("uniqueItems") and value in values:
                value = self._another(item, value, values, f"{path}[{at}]")
            values.append(value)
        return values

    def _another(self, schema: Any, value: Any, used: list[Any], path: str) -> Any:
        """A value like `value` that is not among `used`."""
        likes: Iterable[Any] = schema.get("enum", ()) if isinstance(schema, Mapping) else ()
        if isinstance(value, bool):
            likes = (not value,)
        elif isinstance(value, int | float):
            likes = (value + step for step in range(1, 2 * len(used) + 2))
        elif isinstance(value, str) and not likes:
            likes = (f"{value} {number}" for number in range(2, len(used) + 3))
        for like in likes:
            if like not in used and self._valid(schema, like):
                return like
        raise Unfillable(path, "not enough different values")

    def _number(self, schema: Mapping[str, Any], path: str) -> Any:
        taken = self._material.number(lambda value: self._valid(schema, value))
        return taken if taken is not None else self._first(schema, number_candidates(schema), path)

    def _string(self, schema: Mapping[str, Any], path: str) -> Any:
        if "format" not in schema:
            taken = self._material.string(lambda value: self._valid(schema, value))
            if taken is not None:
                return taken
        return self._first(schema, string_candidates(schema, self._material.text), path)

    def _first(self, schema: Mapping[str, Any], candidates: Iterable[Any], path: str) -> Any:
        for candidate in candidates:
            if self._valid(schema, candidate):
                return candidate
        raise Unfillable(path, f"no value found that fits {dict(schema)}")

    def _valid(self, schema: Any, value: Any) -> bool:
        return bool(self._validator.evolve(schema=schema).is_valid(value))


def _kind(schema: Mapping[str, Any], *, rich: bool) -> str:
    """The type to fill: the first that is not null, but null where it ends a recursion."""
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return kinds
    if kinds:
        others = [kind for kind in kinds if kind != "null"]
        return str(others[0]) if others and (rich or len(others) == len(kinds)) else "null"
    return next((kind for kind, signs in _SIGNS.items() if any(sign in schema for sign in signs)), "string")


def _other(schema: Mapping[str, Any]) -> Any:
    """What properties must be that have no schema of their own."""
    return schema.get("additionalProperties", True)


def _may_nest(schema: Any) -> bool:
    return isinstance(schema, Mapping) and any(
        key in schema for key in ("$ref", "properties", "items", "allOf")
    )


def _without(schema: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != keyword}


def _merge(*schemas: Any) -> Any:
    """One schema that asks for all of `schemas`, as far as filling needs it; validation has the last word."""
    merged: dict[str, Any] = {}
    for schema in schemas:
        if schema is False:
            return False
        for key, value in ({} if schema is True else schema).items():
            if key == "properties":
                old = merged.get(key, {})
                both = {name: {"allOf": [old[name], value[name]]} for name in old.keys() & value.keys()}
                merged[key] = {**old, **value, **both}
            elif key == "required":
                merged[key] = [*merged.get(key, ()), *value]
            elif key in {"allOf", "anyOf", "oneOf", "$ref"} and key in merged:
                merged["allOf"] = [*merged.get("allOf", ()), {key: value}]
            else:
                merged[key] = value
    return merged
