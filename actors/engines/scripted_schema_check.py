"""Refusal of JSON schemas that no walk would ever leave.

Called by `scripted_schema` before it fills a schema. A schema comes from a user: one that refers to itself in
place, or nests without measure, would take the interpreter's stack (and the validator's native code) with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

MAX_NESTING = 64  # objects and lists inside each other; a nested property takes two
_REFS = ("$ref", "$dynamicRef", "$recursiveRef")
_IDS = ("$id", "id")
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")  # these apply to the same value
_DATA = ("const", "enum", "default", "examples")  # what is inside these is no schema


class Unfillable(Exception):
    """No value can be given for the place `args[0]`; `args[1]` says why."""


def check_nesting(schema: Any) -> None:
    """To be called before anything else walks through `schema`, whatever it is.

    Raises:
        Unfillable: it nests too deeply.
    """
    level = [schema]
    for _ in range(MAX_NESTING + 1):
        level = [inner for node in level for inner in _inside(node)]
        if not level:
            return
    raise Unfillable("$", f"it nests too deeply: more than {MAX_NESTING} objects and lists")


def check_references(schema: Any, resolver: Any) -> None:
    """Follow every reference of a schema that its meta-schema accepts.

    Args:
        schema: the schema.
        resolver: a `referencing` resolver for it.

    Raises:
        Unfillable: a reference is no schema or leads back to where it stands, or a subschema has a base of its own.
        referencing.exceptions.Unresolvable: a reference leads nowhere.
    """
    same_value: dict[int, list[int]] = {}  # a subschema's id() → those that apply to the same value
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, Mapping):
            if node is not schema and any(isinstance(node.get(keyword), str) for keyword in _IDS):
                raise Unfillable("$", "a $id inside the schema is not supported")
            same_value[id(node)] = [id(other) for other in _in_place(node, resolver)]
            stack += [value for key, value in node.items() if key not in _DATA]
        elif isinstance(node, list):
            stack += node
    try:
        TopologicalSorter(same_value).prepare()
    except CycleError:
        raise Unfillable("$", "a $ref leads back to itself without end") from None


def _inside(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, Mapping) else node if isinstance(node, list) else []


def _in_place(schema: Mapping[str, Any], resolver: Any) -> Iterator[Mapping[str, Any]]:
    for keyword in _REFS:
        target = schema.get(keyword)
        if isinstance(target, str):  # else a property of that name
            found = resolver.lookup(target).contents
            if isinstance(found, Mapping):
                yield found
            elif not isinstance(found, bool):
                raise Unfillable("$", f"{target} is not a schema")
    for keyword in _IN_PLACE:
        inner = schema.get(keyword)
        yield from (
            part for part in (inner if isinstance(inner, list) else [inner]) if isinstance(part, Mapping)
        )
