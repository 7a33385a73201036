"""Seeds of up to 64 bits draw differently; longer ones are refused in one line."""

import itertools

import jax
import numpy as np
import pytest

import qstar
from qstar.__main__ import main
from qstar.errors import UserError
from qstar.tree import random_key

SEEDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1)
BAD = (-1, 2**64, 2**70, 10**20)


@pytest.mark.parametrize("seed", [s for s in SEEDS if s < 2**32])
def test_a_short_seed_is_jaxs_own(seed):
    np.testing.assert_array_equal(jax.random.key_data(random_key(seed)), jax.random.key_data(jax.random.key(seed)))


def test_seeds_of_64_bits_are_those_of_jax_with_64_bit_numbers():
    found = [tuple(np.asarray(jax.random.key_data(random_key(seed)))) for seed in SEEDS]
    assert len(set(found)) == len(SEEDS)
    with jax.enable_x64(True):
        for seed, key in zip(SEEDS[:-2], found):
            assert tuple(np.asarray(jax.random.key_data(jax.random.key(seed)))) == key


def test_completions_depend_on_every_bit(shared):
    model = qstar.load(shared("weights/stories260k"))
    texts = [qstar.generate(model, ["Once"], max_new_tokens=48, seed=s)[0][0].text for s in SEEDS]
    assert all(a != b for a, b in itertools.combinations(texts, 2))
    for seed in BAD:
        with pytest.raises(UserError, match=f"seed={seed} must be a whole number from 0"):
            qstar.generate(model, ["Once"], max_new_tokens=2, seed=seed)


@pytest.mark.parametrize("seed", BAD)
@pytest.mark.parametrize("command", [
    "sample --model=m --prompt=x --seed={}", "evaluate --model=m --task=gsm8k --seed={}", "compare --out=x --seed={}",
    "train --config=configs/star_arithmetic.py:smoke --workdir=/nowhere/x --config.seed={}",
    "train --config=configs/quiet_star_tiny.py:smoke --workdir=/nowhere/x --config.seed={}",
])  # fmt: skip
def test_the_command_line_refuses_longer_ones(command, seed, capfd, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert main(command.format(seed).split()) == 2
    line = capfd.readouterr().err
    assert len(line.splitlines()) == 1 and "seed" in line and str(seed) in line
