"""STaR and V-STaR's generators with a T5; what cannot be trained with one is refused before anything is sampled."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import shared

import qstar
from configs import quiet_star_text, star_gsm8k, v_star_gsm8k
from qstar.data.sources import read_jsonl, write_jsonl
from qstar.errors import UserError
from qstar.methods import quiet_eval, quiet_star, star, v_star
from qstar.models import scoring
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model
from qstar.plan.cases import programs
from qstar.plan.steps import Assumed
from qstar.runs.rollouts import to_example
from qstar.runs.stages import TrainSettings, pack_rows
from qstar.text.packing import Example
from qstar.text.tokenizer import load_tokenizer
from qstar.train import losses, metrics
from qstar.types import Responses
from tests.methods.stub import Silent

SMALL = EncDecConfig(vocab_size=512, hidden_size=16, num_layers=1, num_decoder_layers=1, num_heads=2, head_dim=8,
                     intermediate_size=16, eos_id=2)  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5") / "model"
    params = jax.jit(functools.partial(scoring.init, SMALL))(jax.random.key(0))
    qstar.save(qstar.Model(SMALL, params, load_tokenizer(shared("weights/stories260k"))), folder)
    return folder


@pytest.fixture
def data(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(40)]
    for name in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    return tmp_path / "data"


def config_of(module, t5, data, **changes):
    made = module.get_config(f"smoke,model={t5},data={data}")
    made.sample.update(max_new_tokens=8)
    made.train.update(row_length=64, lora_rank=0)
    made.evaluate.update(limit=4, split="test")
    for name, values in changes.items():
        if name == "arms":
            made.arms = values
        else:
            made[name].update(values)
    return made


def test_star_and_rft_train_a_t5(t5, data, tmp_path):
    loop = {"n_iters": 2, "problems_per_iter": 8, "steps": "lin:6:0", "include_sft_data": True}
    arms = {"star": {"preset": "star"}, "rft": {"preset": "rft", "k": 2, "n_iters": 1, "steps": "lin:6:0"}}
    star.run(config_of(star_gsm8k, t5, data, loop=loop, arms=arms), tmp_path / "run", Silent())
    rows = metrics.read(tmp_path / "run")
    for arm, loops in (("star", 2), ("rft", 1)):
        assert [r["iteration"] for r in rows if r["arm"] == arm and r["stage"] == "iteration"] == list(range(loops + 1))
        losses = [r["loss"] for r in rows if r["arm"] == arm and r["stage"] == "train" and r["iteration"] == loops]
        assert losses[-1] < losses[0] and np.isfinite(losses).all()
    sampled = read_jsonl(tmp_path / "run" / "star" / "rationales" / "iter_001.jsonl")
    assert {r["hinted"] for r in sampled} == {False, True}


def test_v_stars_generators_train_a_t5(t5, data, tmp_path):
    small = {"loop": {"n_iters": 1, "problems_per_iter": 8, "k": 2}, "select": {"samples": 2, "limit": 2}}
    made = config_of(
        v_star_gsm8k, t5, data, **small, sft={"problems": 8}, arms={"star_dagger": {"preset": "star_dagger"}}
    )
    v_star.run(made, tmp_path / "run", Silent())
    rows = [r for r in metrics.read(tmp_path / "run") if r["stage"] == "iteration"]
    assert [r["iteration"] for r in rows] == [0, 1] and rows[1]["trained_rows"] > 0


@pytest.mark.parametrize("module, method, changes, line", [
    (star_gsm8k, star, {"train": {"lora_rank": 4}}, "config.train.lora_rank=4 is for decoders"),
    (star_gsm8k, star, {"train": {"loss_on_prompt": True}}, "config.train.loss_on_prompt=True is for decoders"),
    (star_gsm8k, star, {"model": {"piece_tokens": 64}}, "config.model.piece_tokens: pieces are of thoughts"),
    (v_star_gsm8k, v_star, {"arms": {"v_star": {"preset": "v_star"}}}, "cannot be trained by 'dpo'"),
    (v_star_gsm8k, v_star, {"arms": {"rpo": {"preset": "rpo"}}}, "cannot be trained by 'rpo'"),
])  # fmt: skip
def test_what_a_t5_cannot_be_trained_by_is_refused_before_anything_is_sampled(
    t5, data, tmp_path, module, method, changes, line
):
    with pytest.raises(UserError, match=line):
        method.run(config_of(module, t5, data, **changes), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_quiet_star_refuses_a_t5_at_once(t5, tmp_path, monkeypatch):
    monkeypatch.setattr("qstar.methods.quiet_data.make_corpus", None)  # nothing is read
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"a story number {i}"} for i in range(5)])
    config = quiet_star_text.get_config(f"smoke,model={t5},data={tmp_path}/text.jsonl")
    with pytest.raises(UserError, match="config.model.path=.*encoder-decoder .T5. cannot think") as e:
        quiet_star.run(config, tmp_path / "run", Silent())
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("thoughts", [False, True])
def test_metrics_of_quiet_star_refuse_a_t5(thoughts):
    with pytest.raises(UserError, match="for decoders, not for an encoder-decoder .T5."):
        quiet_eval.thinking_config(Model(EncDecConfig(), {}), thoughts)


@pytest.mark.parametrize("module", [star_gsm8k, v_star_gsm8k])
def test_a_plan_of_fine_tuning_a_t5_is_refused(t5, data, module):
    with pytest.raises(UserError, match="config.model.path=.*: plans of this method are for decoders, not for a T5"):
        programs(config_of(module, t5, data), jax.devices()[:1], Assumed())


def test_a_t5_is_trained_on_what_its_encoder_read_and_its_decoder_wrote(t5):
    model = qstar.load(t5)
    example = to_example(model.tokenizer, "Q: one?\nA:", " two")
    assert example.prompt == model.tokenizer.encode_prompt("Q: one?\nA:")
    assert example.completion == [*model.tokenizer.encode(" two"), 2]


def test_the_loss_of_responses_is_that_of_transformers(tmp_path):
    sizes = dict(vocab_size=50, d_model=32, d_kv=6, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=4)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(2, 50, n).tolist()  # noqa: E731
    examples = [Example(ids(3 + 4 * i), [*ids(1 + 3 * i), 1]) for i in range(4)]

    theirs.save_pretrained(tmp_path)
    ours = qstar.load(tmp_path)
    rows = pack_rows(examples, TrainSettings(row_length=64), ours.config)
    (total, weight), found = losses.response_loss({"policy": ours.params}, Responses(**rows), None, config=ours.config)
    labels = torch.tensor(np.where(rows["mask"] > 0, rows["response"], -100)).long()
    with torch.no_grad():
        expected = theirs(torch.tensor(rows["prompt"]), torch.tensor(rows["prompt_mask"]), labels=labels).loss
    assert weight == sum(len(x.completion) for x in examples) == found["tokens"][0]
    assert float(total / weight) == pytest.approx(float(expected), rel=1e-4)
