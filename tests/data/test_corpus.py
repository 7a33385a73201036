"""Text corpora: rows by step, crops and packs, held-out documents."""

import json

import numpy as np
import pytest

from qstar.data.corpus import TextCorpus
from qstar.errors import UserError
from qstar.text.tokenizer import char_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "
TOKENIZER = char_tokenizer(LETTERS + "$.", pad=".", eos="$")


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(LETTERS[i] for i in rng.integers(0, 36, n)) for n in rng.integers(5, 60, 300)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path, texts


def decoded(rows, b):
    return "".join((LETTERS + "$.")[i] for i, s in zip(rows.tokens[b], rows.segment_ids[b]) if s)


def test_a_crop_is_a_piece_of_one_document(source):
    path, texts = source
    corpus = TextCorpus(path, TOKENIZER, length=16)
    rows = corpus.rows(0, 50, 0)
    for b in range(50):
        piece = decoded(rows, b)
        assert any(piece in t + "$" for t in texts)
        assert len(piece) == 16 or any(piece == t + "$" for t in texts)  # shorter only if the document is
        assert rows.positions[b][: len(piece)].tolist() == list(range(len(piece)))
    assert np.array_equal(rows.mask[:, 1:], rows.segment_ids[:, 1:] > 0)


def test_a_pack_holds_documents_one_after_the_other(source):
    path, texts = source
    rows = TextCorpus(path, TOKENIZER, length=64, mode="pack").rows(0, 20, 0)
    assert np.all(rows.segment_ids > 0)
    for b in range(20):
        pieces = decoded(rows, b).split("$")
        # The last one is a crop where the row is full, with the end of its document or without.
        assert all(p in texts for p in pieces[:-2]) and all(any(p in t for t in texts) for p in pieces)
        starts = np.flatnonzero(rows.positions[b] == 0)
        assert len(starts) == rows.segment_ids[b].max()


def test_no_arm_learns_to_predict_across_documents_of_a_pack(source):
    """The targets of plain training are those of the thinking loss, token by token (so is a student's divisor)."""
    from qstar.thoughts.layout import text_targets
    from qstar.types import Batch

    rows = TextCorpus(source[0], TOKENIZER, length=32, mode="pack").rows(0, 8, 0)
    _, weights = text_targets(Batch(*rows[:4]))
    assert (rows.segment_ids[:, 1:] != rows.segment_ids[:, :-1]).sum() >= 5
    np.testing.assert_array_equal(rows.mask[:, 1:], weights)


def test_held_out_documents_are_never_trained_on(source):
    path, texts = source
    corpus = TextCorpus(path, TOKENIZER, length=64)
    test = {decoded(corpus.test_rows(200), b) for b in range(200)}
    train = {decoded(corpus.rows(s, 200, 0), b) for s in range(20) for b in range(200)}
    assert test and not test & train
    assert len(test) + len(train) == len(texts)  # crops of 64 hold the whole of these documents


@pytest.mark.parametrize("mode", ["crop", "pack"])
def test_the_end_of_a_document_longer_than_a_row_is_drawn_too(source, mode):
    rows = TextCorpus(source[0], TOKENIZER, length=4, mode=mode).rows(0, 200, 0)
    assert (rows.tokens == TOKENIZER.eos_id).sum() > 5


def test_a_document_that_ends_with_eos_gets_no_second_one(tmp_path):
    path = tmp_path / "ended.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["one$", "two"]))
    corpus = TextCorpus(path, TOKENIZER, length=8)
    assert {decoded(rows, 0) for rows in (corpus.rows(0, 1, 0), corpus.test_rows(1))} == {"one$", "two$"}


def test_copies_of_a_document_are_on_one_side(tmp_path):
    path = tmp_path / "copies.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["one", "two", "same", "same", " "]))
    corpus = TextCorpus(path, TOKENIZER, length=8)
    assert {decoded(corpus.test_rows(9), b) for b in range(9)} == {"same$"}
    assert "same$" not in {decoded(corpus.rows(0, 99, 0), b) for b in range(99)}


def test_what_stops_training_is_not_reported_even_as_a_copy(tmp_path):
    path = tmp_path / "copies.jsonl"
    texts = [f"text {a} {b}" for a in "abcdefgh" for b in "abcdefgh" for _ in range(2)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    corpus = TextCorpus(path, TOKENIZER, length=16, held_out=4)
    corpus.hold_out_stopping()
    stop, test = ({decoded(rows(40), b) for b in range(40)} for rows in (corpus.stopping_rows, corpus.test_rows))
    assert stop and test and not stop & test


def test_every_held_out_document_is_measured_before_one_is_measured_again(source):
    corpus = TextCorpus(source[0], TOKENIZER, length=16, held_out=4)
    documents = corpus.test_rows(50).documents.tolist()
    count = len(set(documents))
    assert count > 5 and max(map(documents.count, documents)) - min(map(documents.count, documents)) <= 1


def test_rows_are_a_function_of_the_step(source):
    one, other = (TextCorpus(source[0], TOKENIZER, length=16) for _ in range(2))
    assert np.array_equal(one.rows(5, 4, 1).tokens, other.rows(5, 4, 1).tokens)
    assert not np.array_equal(one.rows(5, 4, 1).tokens, one.rows(6, 4, 1).tokens)


def test_mistakes_are_named(source, tmp_path):
    with pytest.raises(UserError, match="mode='crp'"):
        TextCorpus(source[0], TOKENIZER, mode="crp")
    with pytest.raises(UserError, match="nowhere.jsonl"):
        TextCorpus(tmp_path / "nowhere.jsonl", TOKENIZER)
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "abc"}\n{"text": "abc"}\n{"text": ""}\n')
    with pytest.raises(UserError, match="1 different documents with text; at least 2"):
        TextCorpus(one, TOKENIZER)
    with pytest.raises(UserError, match="held_out=1"):
        TextCorpus(source[0], TOKENIZER, held_out=1)
