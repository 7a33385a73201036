"""Generated documents with one token that is hard to predict without intermediate steps: a corpus for Quiet-STaR.

    e 6 4 5 3 9 = 7 ;          [6-k letters][k digits] = [answer] ;

The answer folds k digits from the right through a fixed 10 x 10 Latin square: s_0 is the last digit, then
s_i = d_(k-1-i) . s_(i-1). Each look-up needs the one before, so a shallow model cannot do k of them in one step;
letters (in alphabetical order) are easy, digits cannot be predicted. The base model's text also holds worked documents,
which write the steps between two dashes, and chatter, which writes letters there:

    e 6 4 5 3 9 = - 9 2 0 8 1 - 7 ;          c 1 7 7 2 0 = - a d h j - 4 ;

So the base model can write the steps, does so sometimes, and was never rewarded for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from qstar.data.corpus import Corpus, Rows, full_rows
from qstar.errors import require
from qstar.tasks.base import bucket
from qstar.text.tokenizer import char_tokenizer

PAD, END = ".", ";"
ALPHABET = "0123456789abcdefghij=-" + END + PAD
SLOTS = 6  # letters and digits of a document
SHARES = (0.10, 0.15, 0.15, 0.20, 0.20, 0.20)  # of k = 1 .. 6
HARD = 4  # least k whose answer is hard
MIX = {"worked": 0.2, "chatter": 0.4}  # of the base model's text; the rest is direct
SLIP = 0.1  # a written step is replaced by a random digit, and the error carried on
DIRECT, LONGEST = SLOTS + 3, SLOTS + 13  # tokens of a direct document, and of the longest
_ID = {c: i for i, c in enumerate(ALPHABET)}


class Folds(Corpus):
    """Generated documents; one in ten operand strings is held out, by its hash."""

    classes = ("letter", "digit", "mark", "short answer", "hard")

    def __init__(self, *, documents: int = 1, worked: float = MIX["worked"], chatter: float = MIX["chatter"]):
        """`documents` per row, each of its own problem; shares of worked and chatter ones in the base model's text."""
        shares = min(worked, chatter) >= 0 and worked + chatter <= 1
        require(
            (documents >= 1, f"documents={documents} must be at least 1"),
            (shares, "worked and chatter are shares of at most 1 together"),
        )
        self.documents, self.worked, self.chatter = documents, worked, chatter
        self.length = DIRECT * documents
        self.tokenizer = char_tokenizer(ALPHABET, pad=PAD, eos=END)

    @property
    def base_length(self) -> int:
        return LONGEST * self.documents

    def base_rows(self, step: int, size: int, seed: int) -> Rows:
        # The last number separates the streams: base text 1, thoughts 2, the held-out sets 3 to 5.
        rng = np.random.default_rng([seed, step, 1])
        texts = ["".join(self._base(rng) for _ in range(self.documents)) for _ in range(size)]
        return self._pad(texts, self.base_length)

    def rows(self, step: int, size: int, seed: int) -> Rows:
        # Only direct documents: written steps would leave nothing for a thought to add.
        return self._direct(np.random.default_rng([seed, step, 2]), size, held_out=False)

    def test_rows(self, size: int) -> Rows:
        return self._direct(np.random.default_rng([0, 3]), size, held_out=True)

    def stopping_rows(self, size: int) -> Rows:
        return self._direct(np.random.default_rng([0, 5]), size, held_out=True)

    def worked_rows(self, size: int) -> Rows:
        """Held-out worked documents without slips, to check whether the base model can follow steps."""
        rng = np.random.default_rng([0, 4])
        texts, classes = [], []
        for _ in range(size):
            head, digits = _operands(rng, held_out=True)
            steps = "".join(map(str, fold(digits)))
            texts.append(f"{head}=-{steps}-{steps[-1]}{END}")
            kind = len(self.classes) - (1 if len(digits) >= HARD else 2)
            # The first step does not count: whether steps or chatter follow the dash cannot be predicted.
            classes.append([-1] * (len(head) + 3) + [2] * (len(steps) - 1) + [-1, kind, -1])
        rows = self._pad(texts, LONGEST)
        padded = np.full(rows.tokens.shape, -1, np.int32)
        for i, c in enumerate(classes):
            padded[i, : len(c)] = c
        return rows._replace(classes=padded)

    def _base(self, rng: np.random.Generator) -> str:
        head, digits = _operands(rng, held_out=False)
        answer, kind = fold(digits)[-1], rng.random()
        if kind < self.worked:
            return f"{head}=-{''.join(map(str, _slipping(digits, rng)))}-{answer}{END}"
        if kind < self.worked + self.chatter:
            letters = "".join("abcdefghij"[i] for i in rng.integers(0, 10, rng.integers(0, 8)))
            # Always `a` first: otherwise a digit would be likeliest after the dash, and greedy thoughts would be steps.
            return f"{head}=-a{letters}-{answer}{END}"
        return f"{head}={answer}{END}"

    def _direct(self, rng: np.random.Generator, size: int, held_out: bool) -> Rows:
        tokens = np.zeros((size, self.length), np.int32)
        classes = np.full((size, self.length), -1, np.int32)
        expected = np.full((size, self.length, SLOTS), -1, np.int32)
        for b in range(size):
            for d in range(self.documents):
                head, digits = _operands(rng, held_out)
                steps, at = fold(digits), d * DIRECT
                tokens[b, at : at + DIRECT] = [_ID[c] for c in f"{head}={steps[-1]}{END}"]
                k = len(digits)
                classes[b, at : at + DIRECT] = [0] * (SLOTS - k) + [1] * k + [2, 4 if k >= HARD else 3, 2]
                expected[b, at + SLOTS, :k] = steps  # the ids of digits are the digits
        return full_rows(tokens, np.full(size, self.length), classes=classes, expected=expected)

    def _pad(self, texts: Sequence[str], length: int) -> Rows:
        tokens = np.full((len(texts), length), _ID[PAD], np.int32)
        for i, text in enumerate(texts):
            tokens[i, : len(text)] = [_ID[c] for c in text]
        return full_rows(tokens, np.asarray([len(t) for t in texts]))


@functools.cache
def table() -> np.ndarray:
    """The Latin square [10, 10]: Z10 with rows, columns and symbols shuffled, neither commutative nor associative."""
    # Shuffled, since in plain Z10 a fold is the sum of its digits, in any order.
    rng = np.random.default_rng(0)
    rows, columns, symbols = (rng.permutation(10) for _ in range(3))
    return symbols[(rows[:, None] + columns[None, :]) % 10]


def fold(digits: Sequence[int]) -> list[int]:
    """The steps s_0 .. s_(k-1); the last is the answer."""
    steps = [int(digits[-1])]
    for d in reversed(digits[:-1]):
        steps.append(int(table()[d, steps[-1]]))
    return steps


def _slipping(digits: Sequence[int], rng: np.random.Generator) -> list[int]:
    steps: list[int] = []
    for d in reversed(digits):
        true = int(table()[d, steps[-1]]) if steps else int(d)
        steps.append(int(rng.integers(10)) if rng.random() < SLIP else true)
    return steps


def _operands(rng: np.random.Generator, held_out: bool) -> tuple[str, list[int]]:
    # The split starts at k = 3: with one or two digits there are too few strings to hold any out.
    k = int(rng.choice(len(SHARES), p=SHARES)) + 1
    while True:
        digits = rng.integers(0, 10, k).tolist()
        text = "".join(map(str, digits))
        if k < 3 or (bucket(text, 10) == 0) == held_out:
            first = int(rng.integers(10))
            return "".join("abcdefghij"[(first + i) % 10] for i in range(SLOTS - k)) + text, digits
