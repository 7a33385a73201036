import collections
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from qstar.data import batches
from qstar.errors import UserError


def rows(count, start=0):
    numbers = np.arange(start, start + count, dtype=np.int32)
    return {"tokens": np.stack([numbers, -numbers], 1), "mask": numbers.astype(np.float32)[:, None]}


def ids(batch):
    return batch["tokens"][:, 0].tolist()


def test_a_batch_is_a_pure_function_of_its_step():
    first, second = (batches(rows(10), 4, seed=3) for _ in range(2))
    onwards = [ids(first[step]) for step in range(12)]
    assert ids(second[7]) == onwards[7]  # a resumed run asks for step 7 first
    assert [ids(second[step]) for step in reversed(range(12))] == onwards[::-1]


def test_keys_stay_aligned():
    batch = batches(rows(10), 4, seed=0)[5]
    assert batch["tokens"].shape == (4, 2) and batch["tokens"].dtype == np.int32
    assert np.array_equal(batch["tokens"][:, 0], batch["mask"][:, 0])
    assert np.array_equal(batch["tokens"][:, 0], -batch["tokens"][:, 1])


def test_every_epoch_has_every_row_once_and_its_own_order():
    loader = batches(rows(10), 4, seed=1)
    stream = sum([ids(loader[step]) for step in range(10)], [])
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_the_recorded_one():
    """A run that goes on after an upgrade of numpy or qstar reads the rows it would have read."""
    loader = batches(rows(10), 10, seed=0)
    assert [ids(loader[step]) for step in (0, 1)] == [
        [0, 9, 4, 5, 8, 2, 7, 1, 6, 3],
        [2, 7, 5, 1, 9, 8, 0, 3, 6, 4],
    ]


def test_every_place_of_an_epoch_holds_every_row_equally_often():
    """In 2,000 epochs of 5 rows, each of the 25 pairs comes 400 times but for four standard deviations (18)."""
    loader = batches(rows(5), 10_000, seed=0)
    counts = collections.Counter((i % 5, row) for i, row in enumerate(ids(loader[0])))
    assert len(counts) == 25 and max(abs(n - 400) for n in counts.values()) < 72


def test_seeds_differ():
    assert ids(batches(rows(50), 50, seed=0)[0]) != ids(batches(rows(50), 50, seed=1)[0])


def test_batch_larger_than_the_data_repeats_it():
    assert collections.Counter(ids(batches(rows(3), 9, seed=0)[0])) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("share, expected", [(0.15, 5), (0.0, 0), (1.0, 32), (0.5, 16)])
def test_mix_fills_its_share_of_every_batch(share, expected):
    loader = batches(rows(20), 32, seed=0, mix=(rows(7, start=1000), share))
    for step in range(4):
        assert sum(number >= 1000 for number in ids(loader[step])) == expected
        assert len(ids(loader[step])) == 32


def test_mixed_rows_cycle_through_all_of_the_other_set():
    loader = batches(rows(20), 10, seed=0, mix=(rows(6, start=1000), 0.3))
    seen = [n for step in range(4) for n in ids(loader[step]) if n >= 1000]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(1000, 1006))


def test_mix_does_not_share_the_order_of_the_main_rows():
    loader = batches(rows(64), 128, seed=0, mix=(rows(64, start=1000), 0.5))
    batch = ids(loader[0])
    assert [n + 1000 for n in batch[:64]] != batch[64:]


@pytest.mark.parametrize(
    "message, call",
    [
        ("no rows", lambda: batches(rows(0), 4, seed=0)),
        ("no rows", lambda: batches({}, 4, seed=0)),
        ("no rows", lambda: batches(rows(5), 4, seed=0, mix=(rows(0), 0.5))),
        ("share 1.5", lambda: batches(rows(5), 4, seed=0, mix=(rows(5), 1.5))),
        ("batch size 0", lambda: batches(rows(5), 0, seed=0)),
        ("differ in their number", lambda: batches({"a": np.zeros(3), "b": np.zeros(4)}, 2, seed=0)),
        ("same keys, shapes", lambda: batches(rows(5), 2, seed=0, mix=({"tokens": np.zeros((3, 5))}, 0.5))),
    ],
)
def test_bad_input_is_refused(message, call):
    with pytest.raises(UserError, match=message):
        call()


def test_negative_steps_are_refused():
    with pytest.raises(IndexError):
        batches(rows(5), 2, seed=0)[-1]


def test_text_data_and_tasks_import_no_jax():
    """Nor does using them: worker processes judge answers without jax."""
    code = (
        "import sys, qstar.errors, qstar.text, qstar.data, qstar.tasks\n"
        "from qstar.text import char_tokenizer\n"
        "task = qstar.tasks.make_task('arithmetic')\n"
        "char_tokenizer('.$0', pad='.', eos='$').encode('00')\n"
        "for name in ('gsm8k', 'commonsense_qa'): qstar.tasks.make_task(name)\n"
        "assert task.problems('test')\n"
        "import numpy as np; qstar.data.batches({'x': np.zeros(3)}, 2, seed=0)[0]\n"
        "assert not {'jax', 'jaxlib', 'torch'} & set(sys.modules)\n"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
