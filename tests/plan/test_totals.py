"""Cost of a whole config: how often each program runs, and the arithmetic on its bounds."""

from __future__ import annotations

import dataclasses
import types

import jax
import pytest

from qstar.errors import UserError
from qstar.flags import parse_overrides, read_config
from qstar.plan import host, totals
from qstar.plan.cases import programs
from qstar.plan.program import Plan
from qstar.plan.steps import Assumed
from qstar.plan.topology import CHIPS, GIB, Topology, open_topology
from qstar.train import flops
from qstar.train.flops import peak


def plan(name: str, seconds: float, **values) -> Plan:
    return Plan(name, True, {}, {}, 0, 0, 0, compiled=True, times={"compute": seconds}, **values)


def test_a_config_of_star_runs_as_many_updates_and_rollouts_as_its_loops_say():
    values = {"n_iters": "3", "steps": "lin:100:10", "problems_per_iter": "5000"}
    config = read_config("configs/star_gsm8k.py", [(f"--config.loop.{k}", v) for k, v in values.items()])
    # Two arms, of which one samples a second time with hints.
    assert totals.runs(config, Assumed()) == ({"fine-tuning": 2 * (100 + 110 + 120)}, 3 * 5000 * (2 + 1))


@pytest.mark.parametrize(
    "config, problems, expected",
    [
        # 64 sums in two loops, in one arm with hints; 150 updates of the base, on rows of the same shape.
        ("star_arithmetic:smoke", 7473, ({"fine-tuning": 150 + 2 * (20 + 24)}, 2 * 64 * (1 + 2))),
        ("star_gsm8k", 100, ({"fine-tuning": 2 * (40 + 48 + 57 + 69 + 82 + 99 + 119 + 29 * 125)}, 36 * 100 * 3)),
        # Ten passes over 100 rows at most. Below: G_SFT alone; and before three rounds of RPO on 8 pairs of 1,800 problems.
        ("v_star_arithmetic:arms=sft", 7473, ({"fine-tuning": 1500 + 300}, 0)),
        ("v_star_arithmetic:arms=rpo", 7473, ({"fine-tuning": 1500 + 300, "RPO": 3 * 450}, 3 * 1800 * 16)),
        ("grpo_arithmetic", 7473, ({"RL: gradient": 240, "RL: measuring": 120, "base": 1200}, 120 * 32 * 8)),
    ],
)
def test_stages_before_the_loops_and_the_problems_there_are_count(config, problems, expected):
    assert totals.runs(read_config(config), Assumed(problems=problems)) == expected


def names(config: str, *flags: str) -> dict[str, int]:
    """The programs of a config on one device, with the tokens of each."""
    found = read_config(config, parse_overrides([f"--config.{flag}" for flag in flags]))
    return {p.name: p.tokens for p in programs(found, jax.devices()[:1], Assumed())}


def test_generated_text_is_planned_at_the_length_of_its_documents():
    found = names("quiet_star_tiny:arms=same_text,documents=2")
    assert found == {"same_text: update": 32 * 18, "base": 128 * 38}


def test_generators_trained_on_pairs_have_a_program():
    assert names("v_star_arithmetic:arms=rpo")["RPO"] and "DPO" not in names("v_star_arithmetic:arms=sft")


@pytest.mark.parametrize(
    "config, flag, said",
    [
        ("quiet_star_tiny:smoke", "thoughts.talk_token=1", "config.thoughts.talk_token is unknown .did you mean talk_tokens"),
        ("quiet_star_tiny:smoke", "train.lora_rank=16", "Quiet-STaR trains all of a model"),
        ("star_arithmetic:smoke", "arms.rationalisation.preset=sta", "preset='sta' is unknown .did you mean star"),
        ("star_arithmetic:smoke", "arms.foo=1", "config.arms.foo=1 must be of type dict"),
        ("distil:smoke", "seed=1", "plan does not take it; it takes star, v_star"),
        ("guided_cot_synth:smoke", "seed=1", "plan does not take questions and models that are generated"),
        ("grpo_gsm8k:model=flan-t5-small", "train.lora_rank=4", "config.train.lora_rank=4 is for decoders"),
    ],
)  # fmt: skip
def test_what_the_method_refuses_is_refused_here_too(config, flag, said):
    with pytest.raises(UserError, match=said):
        names(config, flag)


def test_rl_of_an_encoder_decoder_is_planned():
    assert "sampling: responses, 256 rows of 256 and 256 tokens" in names("grpo_gsm8k:model=flan-t5-small")


@pytest.mark.parametrize("config", ["quiet_star_tiny:smoke", "guided_cot_hotpotqa:smoke", "star_gsm8k:smoke"])
def test_adapters_are_proposed_to_methods_that_take_them(config, monkeypatch):
    monkeypatch.setattr(host, "estimate", lambda *a, **k: host.Estimate((), 0))
    fits = host.changes_that_fit(read_config(config), Assumed(), 0, 1)
    assert any("lora_rank" in flags for flags in fits) == (config == "star_gsm8k:smoke") and fits


def test_adapters_in_rl_need_no_gradient_of_the_weights():
    found = read_config("grpo_gsm8k:smoke", parse_overrides(["--config.train.lora_rank=4"]))
    step = programs(found, jax.devices()[:1], Assumed())[0]
    config = types.SimpleNamespace(matmul_params=1000, vocab_size=10, hidden_size=10, num_layers=0, num_heads=1,
                                   head_dim=1, sliding_window=None, windowed_share=0)  # fmt: skip
    full, lora = (flops.respond(config, 2, 3, 4, back=True, lora=lora)[0] for lora in (False, True))
    assert "4 N" in step.rule and full == 1.5 * lora == 6 * (900 * 14 + 100 * 8)


def test_rl_takes_its_gradient_steps_from_prompts_groups_and_epochs():
    config = read_config("configs/grpo_gsm8k.py", [])
    s, group, arms = config.train, config.rl.group, len(config.arms)
    steps, rollouts = totals.runs(config, Assumed())
    assert rollouts == arms * s.updates * s.prompts * group
    assert steps["RL: gradient"] == arms * s.updates * s.get("epochs", 1) * -(-s.prompts * group // s.batch_size)


@pytest.mark.parametrize("kind, chips", [("v5e", 8), ("tpu7x", 4)])
def test_the_cost_is_the_sum_over_programs_and_in_chips_not_devices(monkeypatch, kind, chips):
    monkeypatch.setattr(totals, "runs", lambda config, assumed: ({"fine-tuning": 1000, "DPO": 0}, 400))
    plans = [plan("fine-tuning", 3.0, tokens=8192), plan("sampling: prefill of 4 prompts", 0.5, rollouts=4),
             plan("sampling: 8 tokens of 16 rows", 14.0, tokens=128, rollouts=16)]  # fmt: skip
    said = "\n".join(totals.lines(plans, None, Assumed(), Topology(kind, CHIPS[kind], (None,) * 8, True)))
    # 1,000 steps of 3 s; a rollout takes 0.5 / 4 + 14 / 16 = 1 s
    assert "3 s per step, 1,000 steps, 0.833 h" in said and "1e+03 ms each, 400 of them" in said
    assert f"at least 0.944 h, {chips * 3400 / 3600:.3g} chip-hours" in said
    assert not totals.lines([dataclasses.replace(plans[0], compiled=False)], None, Assumed(), None)


def test_what_was_left_out_is_named(monkeypatch):
    monkeypatch.setattr(totals, "runs", lambda config, assumed: ({"fine-tuning": 10, "DPO": 5}, 400))
    found = totals.lines([plan("fine-tuning", 3.0)], None, Assumed(), Topology("x", CHIPS["v5e"], (None,), True))
    assert found[-1].endswith("without DPO, rollouts)")


def test_gpus_are_simulated_with_their_own_memory_and_rates():
    found = open_topology("h200:1")
    assert not found.real and found.chip.hbm == 139 * GIB and found.chip.flops == peak("NVIDIA H200")
    assert open_topology("gpu:1").chip == open_topology("h100:1").chip
    with pytest.raises(UserError, match="tpu7x:2x2x1, h100:8"):
        open_topology("b300:8")


@pytest.mark.parametrize("kind, name, rate", [("NVIDIA H200", "NVIDIA H200", 4.8e12),
                                              ("NVIDIA A100", "NVIDIA A100 (at an H100's rates)", 3.35e12)])  # fmt: skip
def test_this_machines_gpus_are_planned_by_what_they_are(kind, name, rate, monkeypatch):
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: {"bytes_limit": 100})
    monkeypatch.setattr(jax, "devices", lambda platform: [device])
    chip = open_topology("gpu").chip
    assert (chip.name, chip.hbm, chip.bandwidth, chip.flops) == (name, 100, rate, peak(kind))


def test_a_device_of_tpu7x_is_half_a_chip():
    assert (
        2 * CHIPS["tpu7x"].flops == 2.307e15 and CHIPS["tpu7x"].devices == 2 and peak("TPU7x") == CHIPS["tpu7x"].flops
    )
