"""Cost of a whole config: how often each program runs, and the arithmetic on its bounds."""

from __future__ import annotations

import dataclasses

import pytest

from qstar.errors import UserError
from qstar.flags import read_config
from qstar.plan import totals
from qstar.plan.program import Plan
from qstar.plan.steps import Assumed
from qstar.plan.topology import CHIPS, GIB, Topology, open_topology
from qstar.train.flops import peak


def plan(name: str, seconds: float, **values) -> Plan:
    return Plan(name, True, {}, {}, 0, 0, 0, compiled=True, times={"compute": seconds}, **values)


def test_a_config_of_star_runs_as_many_updates_and_rollouts_as_its_loops_say():
    values = {"n_iters": "3", "steps": "lin:100:10", "problems_per_iter": "5000"}
    config = read_config("configs/star_gsm8k.py", [(f"--config.loop.{k}", v) for k, v in values.items()])
    # Two arms, of which one samples a second time with hints.
    assert totals.runs(config, Assumed()) == ({"fine-tuning": 2 * (100 + 110 + 120)}, 3 * 5000 * (2 + 1))


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


def test_a_device_of_tpu7x_is_half_a_chip():
    assert (
        2 * CHIPS["tpu7x"].flops == 2.307e15 and CHIPS["tpu7x"].devices == 2 and peak("TPU7x") == CHIPS["tpu7x"].flops
    )
