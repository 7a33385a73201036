"""RL with adapters: the same as training through merged kernels, from one copy of the base."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from qstar.data.sources import read_jsonl
from qstar.errors import UserError
from qstar.methods import reinforce as R
from qstar.models import lora, scoring
from qstar.runs import stages
from qstar.sample.batching import generate
from qstar.train import rl
from tests.methods.test_reinforce import RL, T5, Fatal, Killed, Next, start, train
from tests.train.problem import same

SETTINGS = R.ReinforceSettings(
    updates=3, prompts=8, batch_size=32, lr=2e-2, warmup=0, max_new_tokens=2, log_every=1, save_every=1,
    lora_rank=2, lora_alpha=4.0, lora_targets=("q", "up"), clip=0.0,
)  # fmt: skip


def by_merged_kernels(settings, group):
    """The adapters after GRPO's updates, computed with merged kernels throughout, and the group's formula in numpy."""
    base, s = start(), rl.RLSettings(estimator="grpo", **RL)
    adapters = stages.fresh_adapters(base, settings.lora, 1)
    tx = optax.chain(optax.scale_by_adam(b1=settings.b1, b2=settings.b2), optax.scale(-settings.lr))
    moments, world = tx.init(adapters), Next()
    how = dict(config=base.config, settings=s, limit=scoring.text_limit(base.config))
    for update in range(settings.updates):
        merged = lora.merge(base.params, adapters, 2.0)
        prompts = world.prompts(update)
        found = generate(
            base.replace(params=merged), prompts, n=group, max_new_tokens=2,
            seed=R.stable_seed(1, "rollout", update),
        )  # fmt: skip
        flat = [done for row in found for done in row]
        prompt = scoring.pad_prompts(base.config, [p for p in prompts for _ in range(group)], 16)
        response, mask = scoring.pad_responses([d.tokens for d in flat], 2)
        old, ref = (np.asarray(rl.measure({"policy": p}, *prompt, response, **how)[0]) for p in (merged, base.params))
        scores = world.score(update, found).scores.reshape(-1, group)
        advantages = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + 1e-4)
        zeros = np.zeros_like(old)
        batch = rl.Experience(
            *prompt, response, mask, old, ref, zeros, advantages.reshape(-1, 1) * mask, zeros,
            np.full(len(flat), s.kl_weight, np.float32),
        )  # fmt: skip

        def loss(adapters, batch=batch):
            policy = lora.merge(base.params, adapters, 2.0)
            (total, weight), _ = rl.rl_loss({"policy": policy}, batch, None, **how)
            return total / weight

        step, moments = tx.update(jax.grad(loss)(adapters), moments)
        adapters = optax.apply_updates(adapters, step)
    return lora.merge(base.params, adapters, 2.0)


def test_an_update_of_adapters_is_that_of_merged_kernels(tmp_path):
    model, _ = train(tmp_path, rl.RLSettings(estimator="grpo", **RL), SETTINGS)
    wanted = by_merged_kernels(SETTINGS, 4)
    changed = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start().params), jax.tree.leaves(wanted))]
    assert sum(x > 1e-3 for x in changed) == 2  # q and up alone
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    adapters, settings = lora.load_adapters(start().config, tmp_path / "arm" / "adapter")
    same(lora.merge(start().params, adapters, settings.scale), model.params)


@pytest.mark.parametrize("estimator", ["grpo", "ppo"])
def test_adapters_learn_it_too_and_a_killed_run_ends_with_the_same_bits(estimator, tmp_path):
    settings = dataclasses.replace(SETTINGS, updates=20, lr=5e-2, clip=1.0, lora_rank=8, lora_targets=lora.KERNELS)
    s = rl.RLSettings(estimator=estimator, **RL)
    whole, summary = train(tmp_path / "whole", s, settings)
    assert summary["score_last"] > summary["score_first"] + 0.2, summary
    with pytest.raises(Killed):
        train(tmp_path / "killed", s, settings, environment=Fatal(5))
    again, resumed = train(tmp_path / "killed", s, settings)
    same(again.params, whole.params)
    assert resumed == summary
    for one in (tmp_path / "whole").rglob("update_*.jsonl"):
        assert one.read_bytes() == (tmp_path / "killed" / one.relative_to(tmp_path / "whole")).read_bytes()


def test_the_state_holds_adapters_alone_and_the_base_keeps_its_dtype(tmp_path, monkeypatch):
    seen = {}

    def spy(params, *args, **how):
        seen.update(params)
        return stages.run_updates(params, *args, **how)

    monkeypatch.setattr(R, "run_updates", spy)
    half = start().replace(params=jax.tree.map(lambda x: x.astype("bfloat16"), start().params))
    model, _ = train(tmp_path, rl.RLSettings(estimator="grpo", **RL), dataclasses.replace(SETTINGS, updates=1), half)
    assert seen.keys() == {"policy"} and seen["policy"]["layers"].keys() == {"q", "up"}
    assert {str(x.dtype) for x in jax.tree.leaves(seen)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}


def test_a_watch_is_given_parameters_that_can_be_sampled_from(tmp_path):
    def watch(update, params):
        found.append([generate(start().replace(params=p), [[1, 2]], max_new_tokens=2, temperature=0.0)[0][0].logprobs
                      for p in (params, lora.plain(params))])  # fmt: skip

    found = []
    train(tmp_path, rl.RLSettings(estimator="grpo", **RL), SETTINGS, watch=watch)
    assert len(found) == 3 and all(a == b for a, b in found)


def test_adapters_of_an_encoder_decoder_are_refused(tmp_path):
    with pytest.raises(UserError, match="lora_rank=2 is for decoders"):
        train(tmp_path, rl.RLSettings(estimator="rloo", **RL), SETTINGS, model=start(T5))


def test_completions_are_logged_with_rewards_and_advantages(tmp_path):
    settings = dataclasses.replace(SETTINGS, updates=3, log_every=2, lora_rank=0, log_completions=10)
    train(tmp_path, rl.RLSettings(estimator="grpo", group=4, no_eos_penalty=0.5), settings)
    files = sorted((tmp_path / "arm" / "completions").glob("*.jsonl"))
    assert [f.name for f in files] == ["update_000002.jsonl", "update_000003.jsonl"]
    rows = read_jsonl(files[0])
    assert [(r["arm"], r["update"], r["group"], r["sample"]) for r in rows] == [
        ("x", 2, i // 4, i % 4) for i in range(10)
    ]
    assert [r["prompt"] for r in rows[::4]] == Next().prompts(1)[:3]
    for r in rows:
        assert r["score"] == pytest.approx(r["rewards"]["next"] - 0.5) and r["rewards"]["no_eos_penalty"] == -0.5
        assert r["n_tokens"] == 2 and r["truncated"]
    group = np.asarray([r["score"] for r in rows[:4]])
    wanted = (group - group.mean()) / (group.std(ddof=1) + 1e-4)
    np.testing.assert_allclose([r["advantage"] for r in rows[:4]], wanted, atol=1e-5)
