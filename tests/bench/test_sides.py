"""Both sides of the benchmarks do the same work, on a pretrained model and on a random one."""

import json

import pytest
from conftest import shared

from qstar.bench import common, generate, train
from qstar.errors import UserError
from qstar.models.encdec import EncDecConfig
from qstar.models.hf_config import to_hf


@pytest.mark.parametrize("adapters", [False, True])
def test_both_sides_train_the_same_model_on_the_same_rows(adapters):
    pytest.importorskip("peft")
    folder = str(shared("weights/stories260k"))
    options = dict(folder=folder, rows=2, length=16, adapters=adapters)
    ours, theirs = train.ours_update(**options), train.torch_update(**options)
    # B starts at zero and A is drawn differently: the first update of adapters moves B alone, by a rate's sign.
    assert ours() == pytest.approx(theirs(), rel=1e-5)
    assert ours() == pytest.approx(theirs(), rel=1e-2)


def test_both_sides_sample_as_many_tokens():
    options = dict(folder=str(shared("weights/stories260k")), prompts=2, samples=2, length=3, new=4)
    assert generate.ours_plain(**options)() == generate.theirs_plain(**options)["run"]() == 2 * 2 * 4


def test_a_model_that_is_no_decoder_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf(EncDecConfig())))
    with pytest.raises(UserError, match=f"^bench: {tmp_path} is no decoder"):
        common.read_config(str(tmp_path))
