from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.policies.citations import MarkerFilter, attribute
from actors.types import Passage


def passage(name: str, text: str) -> Passage:
    return Passage(
        chunk_id=name, file_id=f"file-{name}", filename=f"{name}.md", vector_store_id="vs", text=text, score=1
    )


FISH = passage("fish", "Herring swim in large shoals near the coast of Norway.")
WHALE = passage("whale", "Whales are mammals and breathe air with their lungs.")
CAR = passage("car", "A gearbox transmits torque from the engine to the wheels.")


def clean(text: str, passages: int = 5) -> tuple[str, list[tuple[int, int]]]:
    found = MarkerFilter(passages)
    return found.feed(text) + found.flush(), found.marks


@pytest.mark.parametrize(
    ("text", "cleaned", "marks"),
    [
        ("It swims [1].", "It swims.", [(8, 1)]),
        ("It swims[1].", "It swims.", [(8, 1)]),
        ("It swims [1, 3].", "It swims.", [(8, 1), (8, 3)]),
        ("It swims [1-3].", "It swims.", [(8, 1), (8, 2), (8, 3)]),
        ("It swims [1][2].", "It swims.", [(8, 1), (8, 2)]),
        ("It swims [^2].", "It swims.", [(8, 2)]),
        ("It swims 【1】.", "It swims.", [(8, 1)]),
        ("It swims 【1†source】.", "It swims.", [(8, 1)]),
        ("It swims 【4:0†guide.pdf】.", "It swims.", [(8, 4)]),
        ("It swims (source 1).", "It swims.", [(8, 1)]),
        ("It swims (Sources: 1 and 2).", "It swims.", [(8, 1), (8, 2)]),
        ("It swims (see passage 2).", "It swims.", [(8, 2)]),
        ("It swims [Source 2].", "It swims.", [(8, 2)]),
        ("It swims [doc #2].", "It swims.", [(8, 2)]),
        ("[1] It swims.", " It swims.", [(0, 1)]),
        ("Of 【9】 none.", "Of none.", []),
    ],
)
def test_markers_of_many_notations_are_taken_out(text, cleaned, marks):
    assert clean(text) == (cleaned, marks)


@pytest.mark.parametrize(
    "text",
    [
        "The list has [9] items.",  # there are five passages
        "In [2024] and [note] it rained (see below) (1) (12 km) [ ] [] [1.5] [-1].",
        "Call `rows[1]` or\n```\nrows[2] = (source 1)\n```\nto see.",
        "An open [1",
        "An open (source",
        "Ends with spaces  ",
    ],
)
def test_what_is_no_marker_stays_as_it_is(text):
    assert clean(text) == (text, [])


def test_code_ends_where_its_own_backticks_end():
    assert clean("`a[1]` [1] ``x ` [2]`` [2]")[0] == "`a[1]` ``x ` [2]``"


@given(
    st.lists(
        st.sampled_from(
            [
                "[",
                "]",
                "1",
                "2",
                ", ",
                " ",
                "`",
                "```",
                "(",
                ")",
                "source ",
                "【",
                "】",
                "†",
                "a",
                "see",
                "\n",
            ]
        )
    )
)
def test_a_text_in_pieces_is_cleaned_as_the_whole(pieces):
    found = MarkerFilter(5)
    streamed = "".join(found.feed(piece) for piece in pieces) + found.flush()
    assert (streamed, found.marks) == clean("".join(pieces))


def test_brackets_within_corner_brackets_do_not_end_them():
    found = MarkerFilter(5)
    assert ["".join(found.feed(piece)) for piece in ["It swims 【", "1", "[x]", "】."]] + [found.flush()] == [
        "It swims", "", "", ".", "",
    ]  # fmt: skip
    assert found.marks == [(8, 1)]


def test_plain_text_is_not_held_back():
    found = MarkerFilter(3)
    assert [found.feed(piece) for piece in ["Whales", " breathe", " air", " (like", " us)", "."]] == [
        "Whales", " breathe", " air", " (like", " us)", ".",
    ]  # fmt: skip


def test_the_models_own_marks_are_the_citations():
    found = attribute("It swims. It breathes.", [FISH, WHALE], [(9, 2), (9, 2), (22, 1)])
    assert [(citation.passage, citation.index) for citation in found] == [(WHALE, 9), (FISH, 22)]


def test_without_marks_a_sentence_belongs_to_the_passage_that_shares_its_words():
    text = "The herring swim in large shoals. They do it at 3.5 knots! Whales breathe air."
    found = attribute(text, [CAR, WHALE, FISH], [])
    assert [(citation.passage, citation.index) for citation in found] == [(FISH, 33), (WHALE, len(text))]


def test_sentences_in_a_row_from_one_passage_are_one_citation():
    text = "Herring swim in shoals. The shoals are large."
    found = attribute(text, [FISH, WHALE], [])
    assert [(citation.passage, citation.index) for citation in found] == [(FISH, len(text))]


def test_an_answer_that_nothing_supports_cites_the_best_passage_at_its_end():
    text = "I am not certain about photosynthesis."
    found = attribute(text, [FISH, WHALE], [])
    assert [(citation.passage, citation.index) for citation in found] == [(FISH, len(text))]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_answer_cites_nothing(text):
    assert attribute(text, [FISH], []) == ()


def test_without_passages_nothing_is_cited():
    assert attribute("text", [], []) == ()
