"""Chunking: every character is in a chunk, no chunk is too big, no overlap is too long, cuts fall well."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import InvalidRequest
from actors.policies.chunking import Chunking, cut, document_version, make_chunks, rough_tokens


def words(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def byte_tokens(text: str) -> list[tuple[int, int]]:
    """Like byte-level BPE on rare characters: several tokens with one character's span."""
    return [(at, at + 1) for at, char in enumerate(text) for _ in char.encode("utf-8", "replace")]


PROSE = st.text(st.sampled_from("ab é😀日.!?。\n\t ,"), max_size=4000)
ANY = st.text(max_size=1500)
SIZES = st.integers(100, 300).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(0, size // 2)),
)


def tokens_in(spans: list[tuple[int, int]], start: int, end: int) -> int:
    return sum(start <= token_start < end for token_start, _ in spans)


@given(text=st.one_of(PROSE, ANY), sizes=SIZES, tokenize=st.sampled_from([words, byte_tokens, rough_tokens]))
@settings(max_examples=200, deadline=None)
def test_chunks_cover_the_text_within_size_and_overlap(text: str, sizes: tuple[int, int], tokenize) -> None:
    chunking = Chunking(max_chunk_size_tokens=sizes[0], chunk_overlap_tokens=sizes[1])
    spans = cut(text, chunking, tokenize)
    tokens = tokenize(text)
    covered = set()
    for start, end in spans:
        assert text[start:end].strip() == text[start:end] != ""
        assert tokens_in(tokens, start, end) <= sizes[0]
        covered.update(range(start, end))
    for (_, before_end), (start, _) in pairwise(spans):
        assert tokens_in(tokens, start, before_end) <= sizes[1]
    if tokens:
        assert all(at in covered for at, char in enumerate(text) if not char.isspace())
    assert [start for start, _ in spans] == sorted({start for start, _ in spans})


def test_chunk_offsets_give_back_the_text_exactly() -> None:
    text = "One. Two!\n\nThree? " * 200
    spans = cut(text, Chunking(max_chunk_size_tokens=100, chunk_overlap_tokens=20), words)
    chunks = make_chunks(text, spans, vector_store_id="vs_1", file_id="file-1", version="v")
    assert len(chunks) > 3
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    assert len({chunk.chunk_id for chunk in chunks}) == len(chunks)


def test_a_chunk_ends_with_a_paragraph_when_one_ends_in_its_second_half() -> None:
    text = "word " * 70 + "end.\n\n" + "Next sentence here. " * 40
    first, second = cut(text, Chunking(max_chunk_size_tokens=100, chunk_overlap_tokens=0), words)[:2]
    assert text[slice(*first)].endswith("end.")
    assert text[slice(*second)].startswith("Next")


def test_a_chunk_ends_with_a_sentence_when_no_paragraph_does() -> None:
    text = "Seven words stand in this one sentence. " * 60
    spans = cut(text, Chunking(max_chunk_size_tokens=100, chunk_overlap_tokens=30), words)
    assert all(text[slice(*span)].endswith(".") for span in spans)
    assert all(text[slice(*span)].startswith("Seven") for span in spans)


def test_a_word_is_never_cut_when_a_space_is_near() -> None:
    text = "unbelievably long " * 300
    spans = cut(text, Chunking(max_chunk_size_tokens=100, chunk_overlap_tokens=50))
    assert {word for span in spans for word in text[slice(*span)].split()} == {"unbelievably", "long"}


def test_a_text_without_any_space_is_still_cut() -> None:
    text = "x" * 100_000
    spans = cut(text, Chunking(max_chunk_size_tokens=100, chunk_overlap_tokens=0), byte_tokens)
    assert "".join(text[slice(*span)] for span in spans) == text


def test_white_space_alone_has_no_chunk() -> None:
    assert cut(" \n\t ", Chunking()) == []
    assert cut("", Chunking()) == []


def test_a_short_text_is_one_chunk() -> None:
    assert cut("  hello world ", Chunking()) == [(2, 13)]


def test_the_version_depends_on_bytes_strategy_and_model() -> None:
    base = document_version("sha", Chunking(), "minilm")
    assert base == document_version("sha", Chunking(), "minilm")
    others = {
        document_version("other", Chunking(), "minilm"),
        document_version("sha", Chunking(max_chunk_size_tokens=400, chunk_overlap_tokens=0), "minilm"),
        document_version("sha", Chunking(), "bge"),
    }
    assert len(others | {base}) == 4


@pytest.mark.parametrize(("size", "overlap"), [(99, 0), (4097, 0), (100, 51), (100, -1)])
def test_sizes_out_of_bounds_are_refused_by_name(size: int, overlap: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Chunking(max_chunk_size_tokens=size, chunk_overlap_tokens=overlap)
    assert "chunking_strategy.static" in (caught.value.param or "")
