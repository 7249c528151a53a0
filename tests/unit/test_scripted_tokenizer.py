"""The scripted tokenizer is exact, reversible and the same everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines import scripted_tokenizer as tokenizer
from actors.errors import InvalidRequest

TEXT = st.text(st.characters(exclude_categories=()), max_size=200)  # lone surrogates, NUL, everything


@given(TEXT)
def test_the_pieces_joined_are_the_text(text: str) -> None:
    assert "".join(tokenizer.split(text)) == text


@given(TEXT)
def test_ids_decode_to_the_text_without_having_seen_it(text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= token < 2**32 for token in ids)
    assert tokenizer.decode(ids) == text


@given(TEXT, st.integers(0, 50))
def test_a_text_cut_after_a_token_has_the_same_tokens_up_to_there(text: str, cut: int) -> None:
    ids = tokenizer.encode(text)[:cut]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_whitespace_goes_with_the_following_word() -> None:
    assert tokenizer.split("The cat  sat.\n\nYes") == ["The", " cat", " ", " sat", ".", "\n", "\nYes"]


def test_ids_are_stable_across_releases() -> None:
    assert tokenizer.encode("Hi é") == [0x4869, 0x20C3A9]


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (-1, "negative"),
        (2**32, "more than four bytes"),
        (0xFF, "no UTF-8"),
        (int.from_bytes(b"a b", "big"), "two pieces in one id"),
    ],
)
def test_a_foreign_id_is_refused(token: int, why: str) -> None:
    with pytest.raises(InvalidRequest, match=f"token id {token} "):
        tokenizer.decode([token])
