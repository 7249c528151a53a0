"""The error hierarchy survives pickling and the wire."""

from __future__ import annotations

import pickle

import msgspec
import pytest

from actors.errors import EngineFailed, ShoalError, from_wire


def _all(root: type[ShoalError]) -> list[type[ShoalError]]:
    return [root, *(found for child in root.__subclasses__() for found in _all(child))]


def _full(cls: type[ShoalError]) -> ShoalError:
    return cls("what is wrong", "messages[0]", 2.5, {"x-ratelimit-limit-requests": "60"})


def _fields(error: ShoalError) -> tuple[object, ...]:
    return (type(error), error.message, error.param, error.retry_after_s, error.headers, str(error))


@pytest.mark.parametrize("cls", _all(ShoalError), ids=lambda cls: cls.__name__)
def test_an_error_keeps_every_field_through_pickle(cls: type[ShoalError]) -> None:
    error = _full(cls)
    assert _fields(pickle.loads(pickle.dumps(error))) == _fields(error)  # noqa: S301  our own bytes


@pytest.mark.parametrize("cls", _all(ShoalError), ids=lambda cls: cls.__name__)
def test_an_error_keeps_every_field_over_the_wire(cls: type[ShoalError]) -> None:
    error = _full(cls)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(error.to_wire()))
    assert _fields(from_wire(wire)) == _fields(error)


@pytest.mark.parametrize("cls", _all(ShoalError), ids=lambda cls: cls.__name__)
def test_an_error_with_a_message_alone_survives_both(cls: type[ShoalError]) -> None:
    error = cls("only this")
    assert _fields(pickle.loads(pickle.dumps(error))) == _fields(error)  # noqa: S301  our own bytes
    assert _fields(from_wire(error.to_wire())) == _fields(error)


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in _all(ShoalError)]
    assert len(set(codes)) == len(codes)


def test_every_status_is_an_error_status() -> None:
    assert all(400 <= cls.status_code < 600 for cls in _all(ShoalError))


def test_an_unknown_code_becomes_a_plain_error_with_its_message() -> None:
    error = from_wire({"code": "from_a_newer_version", "message": "something"})
    assert _fields(error) == _fields(ShoalError("something"))


def test_a_wire_form_with_nothing_in_it_is_an_internal_error() -> None:
    assert from_wire({}).message == "internal error"


def test_a_subclass_is_caught_as_its_parent_after_the_wire() -> None:
    with pytest.raises(ShoalError, match="died"):
        raise from_wire(EngineFailed("it died").to_wire())
