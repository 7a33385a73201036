"""Generated documents: what they say is true, what is held out stays out."""

import re

import numpy as np

from qstar.tasks.base import bucket
from qstar.tasks.fold_digits import ALPHABET, PAD, Folds, fold, table


def texts(rows):
    return ["".join(ALPHABET[i] for i in row).rstrip(PAD) for row in rows.tokens]


def test_the_table_is_a_latin_square_that_neither_commutes_nor_associates():
    t = table()
    assert all(sorted(line) == list(range(10)) for line in (*t, *t.T))
    assert np.any(t != t.T) and any(
        t[t[a, b], c] != t[a, t[b, c]] for a in range(10) for b in range(10) for c in range(10)
    )


def test_direct_documents_are_a_run_of_letters_digits_and_their_fold():
    rows = Folds().rows(3, 200, 0)
    for text, classes, expected in zip(texts(rows), rows.classes, rows.expected):
        letters, digits, answer = re.fullmatch(r"([a-j]*)(\d+)=(\d);", text).groups()
        assert len(letters) + len(digits) == 6
        assert all((ord(b) - ord(a)) % 10 == 1 for a, b in zip(letters, letters[1:]))
        steps = [int(digits[-1])]
        for d in digits[-2::-1]:
            steps.append(table()[int(d), steps[-1]])
        assert int(answer) == steps[-1] == fold([int(d) for d in digits])[-1]
        assert classes.tolist() == [0] * len(letters) + [1] * len(digits) + [2, 4 if len(digits) >= 4 else 3, 2]
        assert expected[6].tolist() == steps + [-1] * (6 - len(steps))
        assert np.all(np.delete(expected, 6, axis=0) == -1)


def test_shares_of_the_lengths_and_of_the_kinds_in_the_base_text():
    kinds = {"worked": 0, "chatter": 0, "direct": 0}
    lengths = np.zeros(7)
    for text in texts(Folds().base_rows(0, 4000, 0)):
        middle = re.fullmatch(r"[a-j]*(\d+)=(?:-(\w+)-)?\d;", text)
        lengths[len(middle[1])] += 1
        kinds["direct" if middle[2] is None else "chatter" if middle[2][0] == "a" else "worked"] += 1
    np.testing.assert_allclose(lengths[1:] / 4000, [0.10, 0.15, 0.15, 0.20, 0.20, 0.20], atol=0.03)
    np.testing.assert_allclose([kinds[k] / 4000 for k in ("worked", "chatter", "direct")], [0.2, 0.4, 0.4], atol=0.03)


def test_written_steps_slip_now_and_then_and_the_answer_stays_true():
    right = total = 0
    for text in texts(Folds(worked=1.0, chatter=0.0).base_rows(0, 2000, 1)):
        digits, steps, answer = re.fullmatch(r"[a-j]*(\d+)=-(\d+)-(\d);", text).groups()
        digits = [int(d) for d in digits]
        assert int(answer) == fold(digits)[-1] and len(steps) == len(digits)
        before = None
        for d, s in zip(digits[::-1], map(int, steps)):
            right += s == (d if before is None else table()[d, before])
            before, total = s, total + 1
    assert abs(right / total - 0.91) < 0.015  # one slip in ten is right by chance


def test_held_out_operands_are_never_trained_on():
    corpus = Folds()

    def operands(rows):
        return {d for t in texts(rows) for d in re.findall(r"\d{3,}(?==)", t)}

    test = operands(corpus.test_rows(500)) | operands(corpus.worked_rows(300))
    train = set().union(*(operands(f(s, 100, 0)) for s in range(20) for f in (corpus.rows, corpus.base_rows)))
    assert not test & train and len(test) > 200
    assert all(bucket(d, 10) == 0 for d in test)


def test_rows_depend_on_step_and_seed_alone():
    one, other = Folds(), Folds()
    assert np.array_equal(one.rows(7, 5, 1).tokens, other.rows(7, 5, 1).tokens)
    assert not np.array_equal(one.rows(7, 5, 1).tokens, one.rows(8, 5, 1).tokens)
    assert not np.array_equal(one.rows(7, 5, 1).tokens, one.rows(7, 5, 2).tokens)


def test_several_documents_stand_in_a_row():
    rows = Folds(documents=3).rows(0, 4, 0)
    assert rows.tokens.shape == (4, 27) and all(t.count(";") == 3 for t in texts(rows))
    assert np.all(rows.expected[:, [6, 15, 24], 0] >= 0)
