"""Reinforcement learning on sampled responses: a record (`Experience`), a clipped loss, three advantage estimators.

    PPO    A_t = sum_k (gamma lambda)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t     1707.06347, 1506.02438
    RLOO   A   = S - mean of the other responses' S to the same prompt                       2402.14740
    GRPO   A   = (S - mean of the group) / (its std + 1e-4)                        2402.03300; without std: 2503.20783

    loss = mean over tokens of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),   rho = exp(logp - old logp)

The divergence from the reference is in one of two places (x ~ pi, r = ref / pi):

    in the reward, -beta k1 with k1 = -log r     its expected gradient is that of KL(pi, ref) (k3 there would not be)
    in the loss, beta k2 with k2 = (log r)^2 / 2, or beta rho k3 with k3 = r - 1 - log r     the same gradient on policy
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from qstar.errors import Settings, bounded, require
from qstar.mesh import mesh_jit
from qstar.models import decoder, heads, scoring
from qstar.models.vocabulary import token_logprobs
from qstar.train.losses import SumWeight
from qstar.tree import masked_mean
from qstar.types import Metrics, Params

ESTIMATORS = ("ppo", "rloo", "grpo")
# k1 as a loss has no gradient at all in expectation, and k3 without rho has that of KL(ref, pi): neither is offered.
PLACES = ("reward", "k2", "ratio_k3", "none")
DEFAULT_PLACE = {"ppo": "reward", "rloo": "reward", "grpo": "k2"}


@dataclasses.dataclass(frozen=True)
class RLSettings(Settings):
    """The loss and its advantages. A config's `rl` section. Hashable: static under `jit`."""

    estimator: str = bounded("grpo", choices=ESTIMATORS)
    group: int = bounded(8, ge=1)  # responses per prompt; PPO needs no more than 1
    clip: float = bounded(0.2, gt=0)
    kl_weight: float = bounded(0.05, ge=0)
    kl_in: str = bounded("", choices=("", *PLACES))  # "k2" and "ratio_k3" are in the loss; "" = reward, but k2 for GRPO
    kl_target: float = bounded(0.0, ge=0)  # nats per response that an adaptive weight aims at; 0 = the weight is fixed
    kl_horizon: int = bounded(10_000, gt=0)  # responses over which it adapts
    gamma: float = bounded(1.0, ge=0, le=1)
    lam: float = bounded(0.95, ge=0, le=1)  # of generalised advantage estimation
    value_clip: float = bounded(0.2, gt=0)
    value_weight: float = bounded(0.5, ge=0)
    value_trunk: bool = True  # the value loss also trains what it shares with the policy
    entropy_weight: float = bounded(0.0, ge=0)
    whiten: bool = True  # PPO's advantages, over the batch
    divide_by_std: bool = True  # GRPO; False is Dr. GRPO
    mean_over: str = bounded("tokens", choices=("tokens", "sequences"))  # "sequences": each response weighs the same
    no_eos_penalty: float = bounded(1.0, ge=0)  # taken off the score of a response that did not end
    score_limit: float = bounded(10.0, gt=0)  # scores are clipped to plus or minus this
    temperature: float = bounded(1.0, gt=0)  # of the rollouts; log-probabilities are of the same distribution

    def __post_init__(self):
        super().__post_init__()
        alone = f"group={self.group} must be at least 2 for {self.estimator}: it compares the responses to a prompt"
        require((self.group >= 2 or self.estimator == "ppo", alone))

    @property
    def place(self) -> str:
        """The place of the divergence from the reference, of `PLACES`."""
        return self.kl_in or DEFAULT_PLACE[self.estimator]


class Experience(flax.struct.PyTreeNode):
    """Scored responses to prompts; those to one prompt are `group` adjacent rows. [B, R] is float32 but for ids."""

    prompt: jax.Array  # [B, I] int32
    prompt_mask: jax.Array  # [B, I] int32, see `scoring.response_states`
    response: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R]: 1 for the response's tokens, the EOS that ended it among them
    old_logprobs: jax.Array  # [B, R] under the policy that sampled it
    ref_logprobs: jax.Array  # [B, R] under the reference
    values: jax.Array  # [B, R], 0 without a value head
    advantages: jax.Array  # [B, R]
    returns: jax.Array  # [B, R]: targets of the values
    kl_weight: jax.Array  # [B], one number: dynamic, and it is split with the batch


def measure(
    params: dict[str, Params],
    prompt: jax.Array,
    prompt_mask: jax.Array,
    response: jax.Array,
    *,
    config: scoring.AnyConfig,
    settings: RLSettings,
    limit: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log-probabilities, entropies and values of the response tokens, each float32 [B, R].

    Args: params: {"policy": ..., and "value" if there is one}. limit: ids from here on are never drawn.
    """
    # Old, reference and new log-probabilities come from this function, in one dtype, so that rho is 1 until the policy
    # changes: to 1e-6 in float32. In bfloat16 a minibatch is rounded otherwise than the whole batch, and rho is within
    # about 1% of 1 (2 layers, measured: .989 to 1.011; more layers, more); the sampler's log-probabilities differ by as
    # much, and are not used.
    states = scoring.response_states(params["policy"], config, prompt, prompt_mask, response)
    temperature, head = settings.temperature, decoder.head(params["policy"], config)
    logprobs, _, entropy = token_logprobs(states, head, response, temperature=temperature, limit=limit, entropy=True)
    if "value" not in params:
        return logprobs, entropy, jnp.zeros_like(logprobs)
    trunk = states if settings.value_trunk else jax.lax.stop_gradient(states)
    return logprobs, entropy, heads.critic(params["value"], trunk)


measure_jit = mesh_jit(measure, static_argnames=("config", "settings", "limit"))


def score_with_penalty(scores: Any, ended: Any, settings: RLSettings) -> jax.Array:
    """Returns float32 [B]: scores less the penalty for responses that did not end, clipped."""
    # An integer array of scores would cut 0.7 down to 0.
    scores = jnp.asarray(scores, jnp.float32) - settings.no_eos_penalty * (1.0 - jnp.asarray(ended, jnp.float32))
    return jnp.clip(scores, -settings.score_limit, settings.score_limit)


def token_rewards(scores: jax.Array, k1: jax.Array, mask: jax.Array, kl_weight: Any) -> jax.Array:
    """Returns float32 [B, R]: -kl_weight * k1 at every token, and the score at the last one."""
    last = jnp.arange(mask.shape[1]) == jnp.sum(mask > 0, axis=1, keepdims=True) - 1
    return (-kl_weight * k1 + jnp.where(last, scores[:, None], 0.0)) * mask


def gae(rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, lam: float) -> jax.Array:
    """Generalised advantage estimation (1506.02438) within each response: float32 [B, R], 0 where the mask is."""
    # A response ends where its mask ends, also one that was cut off at `max_new_tokens`: no value is bootstrapped after
    # it. `no_eos_penalty` distinguishes the two.
    following = jnp.concatenate([(values * mask)[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    delta = (rewards + gamma * following - values) * mask

    def back(after: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = now + gamma * lam * after
        return total, total

    return jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)[1].T * mask


def leave_one_out(scores: jax.Array, group: int) -> jax.Array:
    """RLOO: each score [B] less the mean of the other ones of its group; sums to 0 in every group."""
    s = rearrange(scores, "(prompt group) -> prompt group", group=group)
    others = (reduce(s, "prompt group -> prompt 1", "sum") - s) / (group - 1)
    return rearrange(s - others, "prompt group -> (prompt group)")


def group_normalised(scores: jax.Array, group: int, divide_by_std: bool = True) -> jax.Array:
    """GRPO: each score [B] less its group's mean, over the group's standard deviation (n - 1) plus 1e-4."""
    s = rearrange(scores, "(prompt group) -> prompt group", group=group)
    centred = s - reduce(s, "prompt group -> prompt 1", "mean")
    if divide_by_std:
        # 1e-4: a group of equal scores has advantages of 0, not 0 / 0.
        centred = centred / (jnp.std(s, axis=1, ddof=1, keepdims=True) + 1e-4)
    return rearrange(centred, "prompt group -> (prompt group)")


def whitened(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns x [B, R] with mean 0 and standard deviation 1 over the mask; a lone token becomes 0, not NaN."""
    centred = x - masked_mean(x, mask)
    return centred / (jnp.sqrt(masked_mean(jnp.square(centred), mask)) + 1e-8) * mask


def estimate(
    scores: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    kl_weight: Any,
    settings: RLSettings,
) -> tuple[jax.Array, jax.Array]:
    """Returns advantages and returns, float32 [B, R], of scores [B] (see the module's docstring)."""
    k1 = (old_logprobs - ref_logprobs) * mask
    reward_kl_weight = kl_weight if settings.place == "reward" else 0.0
    if settings.estimator == "ppo":
        # The targets of the values are from the raw advantages: whitened ones are on another scale.
        raw = gae(token_rewards(scores, k1, mask, reward_kl_weight), values, mask, settings.gamma, settings.lam)
        return (whitened(raw, mask) if settings.whiten else raw), (raw + values) * mask
    # Without a critic a response is one action: its divergence is summed and taken off its score.
    returns = scores - reward_kl_weight * jnp.sum(k1, axis=1)
    if settings.estimator == "rloo":
        each = leave_one_out(returns, settings.group)
    else:
        each = group_normalised(returns, settings.group, settings.divide_by_std)
    return each[:, None] * mask, jnp.zeros_like(mask)


estimate_jit = jax.jit(estimate, static_argnames="settings")


def adapted(kl_weight: float, kl: float, responses: int, settings: RLSettings) -> float:
    """Returns the weight after a batch of `responses` with `kl` nats each (1909.08593, section 2.2)."""
    if not settings.kl_target:
        return kl_weight
    # Clipped at 20%, as in the paper: one unusual batch moves the weight little.
    error = min(max(kl / settings.kl_target - 1.0, -0.2), 0.2)
    return kl_weight * (1.0 + error * responses / settings.kl_horizon)


def rl_loss(
    params: dict[str, Params],
    batch: Experience,
    rng: jax.Array,
    *,
    config: scoring.AnyConfig,
    settings: RLSettings,
    limit: int,
) -> tuple[SumWeight, Metrics]:
    """The clipped loss, value loss, divergence and entropy bonus, as one sum over tokens with its weight."""
    del rng
    sequences = batch.prompt, batch.prompt_mask, batch.response
    found = measure(params, *sequences, config=config, settings=settings, limit=limit)
    return surrogate(*found, batch, settings)


def surrogate(
    logprobs: jax.Array, entropy: jax.Array, values: jax.Array, batch: Experience, settings: RLSettings
) -> tuple[SumWeight, Metrics]:
    """`rl_loss` from what `measure` found, all [B, R]."""
    s, mask = settings, batch.mask
    # "sequences": every response weighs 1, whatever its length.
    each = mask if s.mean_over == "tokens" else mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
    weight = jnp.sum(each)
    # Padding may hold any number: it is masked before it is exponentiated, or its gradient would be NaN.
    log_ratio = jnp.where(mask > 0, logprobs - batch.old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    limited = jnp.clip(ratio, 1.0 - s.clip, 1.0 + s.clip)
    # The larger of the two losses, a pessimistic bound: clipping never hides that the policy got worse (1707.06347,
    # section 3).
    policy_loss = jnp.maximum(-batch.advantages * ratio, -batch.advantages * limited)
    total = policy_loss - s.entropy_weight * entropy
    log_r = jnp.where(mask > 0, batch.ref_logprobs - logprobs, 0.0)
    if s.place == "k2":
        total = total + batch.kl_weight[:, None] * 0.5 * jnp.square(log_r)
    elif s.place == "ratio_k3":
        total = total + batch.kl_weight[:, None] * ratio * (jnp.exp(log_r) - 1.0 - log_r)
    value_loss = jnp.zeros_like(total)
    if s.estimator == "ppo":
        near = jnp.clip(values, batch.values - s.value_clip, batch.values + s.value_clip)
        value_loss = 0.5 * jnp.maximum(jnp.square(values - batch.returns), jnp.square(near - batch.returns))
        total = total + s.value_weight * value_loss

    def over(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jnp.where(mask > 0, x * each, 0.0)), weight

    metrics = {
        "loss": over(total),
        "policy_loss": over(policy_loss),
        "entropy": over(entropy),
        "clip_fraction": over((jnp.abs(ratio - 1.0) > s.clip).astype(jnp.float32)),
        "approx_kl": over(ratio - 1.0 - log_ratio),  # nats per token from the policy that wrote the responses
        "tokens": (jnp.sum(mask), jnp.float32(0)),
    }
    if s.estimator == "ppo":
        metrics["value_loss"] = over(value_loss)
    return over(total), metrics
