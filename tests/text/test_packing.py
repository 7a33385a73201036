import random

import numpy as np
import pytest

from qstar.errors import UserError
from qstar.text import Example, pack


def random_examples(count, length, seed=0):
    """Documents with distinct tokens throughout, so that each can be found again in the rows."""
    rng, token, examples = random.Random(seed), 1, []
    for _ in range(count):
        size = rng.randint(2, length)
        ids = list(range(token, token + size))
        split = rng.randint(0, size - 1)
        examples.append(Example(ids[:split], ids[split:]))
        token += size
    return examples


def documents(arrays):
    """(tokens, mask, positions) of every segment, read back one cell at a time."""
    found = []
    for row in range(arrays["tokens"].shape[0]):
        by_segment = {}
        for column in range(arrays["tokens"].shape[1]):
            segment = int(arrays["segment_ids"][row, column])
            cell = [float(arrays[key][row, column]) for key in ("tokens", "mask", "positions")]
            by_segment.setdefault(segment, []).append(cell)
        by_segment.pop(0, None)
        assert sorted(by_segment) == list(range(1, len(by_segment) + 1))
        found += [tuple(map(list, zip(*cells, strict=True))) for cells in by_segment.values()]
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss_on_prompt", [True, False])
def test_every_document_comes_back_whole(packed, loss_on_prompt):
    examples = random_examples(40, 30)
    arrays = pack(examples, 30, packed=packed, loss_on_prompt=loss_on_prompt)
    back = {tuple(tokens): (mask, positions) for tokens, mask, positions in documents(arrays)}
    assert len(back) == 40
    for example in examples:
        mask, positions = back[tuple([*example.prompt, *example.completion])]
        predicted = [loss_on_prompt] * len(example.prompt) + [True] * len(example.completion)
        predicted[0] = False  # nothing comes before the first token
        assert mask == predicted
        assert positions == list(range(len(mask)))


def test_dtypes_shapes_and_padding():
    arrays = pack([Example([5], [6, 7])], 5)
    assert {key: (value.shape, value.dtype.name) for key, value in arrays.items()} == {
        "tokens": ((1, 5), "int32"),
        "segment_ids": ((1, 5), "int32"),
        "positions": ((1, 5), "int32"),
        "mask": ((1, 5), "float32"),
    }
    assert arrays["tokens"].tolist() == [[5, 6, 7, 0, 0]]
    assert arrays["mask"].tolist() == [[0, 1, 1, 0, 0]]
    assert arrays["segment_ids"].tolist() == [[1, 1, 1, 0, 0]]


def test_first_fit_decreasing_against_the_textbook():
    sizes = random.Random(4).choices(range(1, 51), k=200)
    arrays = pack([Example([], [1] * size) for size in sizes], 50)
    bins = []  # the plain algorithm: each size, largest first, into the first bin with room
    for size in sorted(sizes, reverse=True):
        for content in bins:
            if sum(content) + size <= 50:
                content.append(size)
                break
        else:
            bins.append([size])
    packed = [[int((row == s).sum()) for s in range(1, row.max() + 1)] for row in arrays["segment_ids"]]
    assert packed == bins


def test_ties_keep_the_order_given():
    arrays = pack([Example([token], [token]) for token in (7, 8, 9)], 4)
    assert arrays["tokens"].tolist() == [[7, 7, 8, 8], [9, 9, 0, 0]]


def test_unpacked_is_one_document_per_row_in_order():
    examples = random_examples(5, 8)
    arrays = pack(examples, 8, packed=False)
    assert [row[0] for row in arrays["tokens"]] == [[*e.prompt, *e.completion][0] for e in examples]
    assert arrays["segment_ids"].max() == 1


def test_packing_is_deterministic():
    first, second = (pack(random_examples(50, 20), 20) for _ in range(2))
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_document_that_does_not_fit_names_both_lengths():
    with pytest.raises(UserError, match="document 1 has 6 tokens but a row has 5"):
        pack([Example([1], [2]), Example([1, 2, 3], [4, 5, 6])], 5)
    assert pack([Example([1, 2], [3, 4, 5])], 5)["tokens"].shape == (1, 5)


def test_empty_document_is_refused_and_no_documents_are_no_rows():
    with pytest.raises(UserError, match="document 0 has no tokens"):
        pack([Example([], [])], 5)
    assert pack([], 5)["tokens"].shape == (0, 5)
