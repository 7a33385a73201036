"""The train step: gradient accumulation, the only division of sums by weights, and the guard against NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from qstar.mesh import mesh_jit
from qstar.train.losses import SumWeight, nonzero
from qstar.train.state import TrainState
from qstar.types import Metrics, Params

Loss = Callable[..., tuple[SumWeight, Metrics]]


def make_step(loss: Loss, tx: optax.GradientTransformation, accumulate: int = 1) -> Callable[..., Any]:
    """Returns the jitted update `step(state, batch, lr, frozen={}) -> (state, metrics)`; the state is donated.

    Args:
      loss: `loss(params, batch, rng) -> ((sum, weight), metrics)`; params by role, metrics as (sum, weight), a count
        as (sum, 0).
      tx: the optimiser's direction, over all of `state.params` (`state.optimizer_for` trains a part of them); the
        update is minus `lr` (a scalar, dynamic) times it.
      frozen: roles that the loss reads beside `state.params`: no gradient, copy or checkpoint is made of them.
      accumulate: micro-batches per update, split from the batch's leading axis; the update is the same for all values.

    Returns:
      The step. Its metrics are float32 scalars: those of the loss, `grad_norm`, and `skipped` (1 where the loss or the
      gradient was not finite: parameters and moments are then unchanged).
    """

    def sums(params: Any, frozen: Any, batch: Any, rng: jax.Array) -> tuple[Any, Any]:
        # The gradient is of the sum: its divisor is known only after the last micro-batch.
        def total(params: Any) -> tuple[jax.Array, Any]:
            (value, weight), metrics = loss({**params, **frozen}, batch, rng)
            return value, (value, weight, metrics)

        return jax.grad(total, has_aux=True)(params)

    def step(
        state: TrainState, batch: Any, lr: jax.Array, frozen: dict[str, Params] | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        frozen = frozen or {}
        # The key depends on the seed and the step alone: a run that resumes draws the same numbers.
        rng = jax.random.fold_in(state.rng, state.step)
        if accumulate == 1:
            grads, (value, weight, metrics) = sums(state.params, frozen, batch, rng)
        else:
            micro = jax.tree.map(lambda x: split_micro(x, accumulate), batch)
            first = jax.tree.map(lambda x: x[0], micro)
            # The shapes of the sums alone, for the scan's carry: the loss is not run for them.
            shapes = jax.eval_shape(sums, state.params, frozen, first, rng)
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def body(carry: Any, xs: Any) -> tuple[Any, None]:
                i, batch = xs
                return optax.tree.add(carry, sums(state.params, frozen, batch, jax.random.fold_in(rng, i))), None

            (grads, (value, weight, metrics)), _ = jax.lax.scan(body, zero, (jnp.arange(accumulate), micro))
        # The only division, by the weight of the whole batch: a mean of the micro-batches' means would weigh tokens of
        # short micro-batches more.
        grads = optax.tree.scale(1.0 / nonzero(weight), grads)
        norm = optax.global_norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, optax.tree.scale(-lr, updates))
        means = {k: s / nonzero(w) for k, (s, w) in metrics.items()}
        means.update(grad_norm=norm, skipped=1.0 - good.astype(jnp.float32))
        # Selected on the device: a decision of the host would wait for every update.
        new, old = (params, opt_state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), means

    return mesh_jit(step, donate_argnums=0)


def split_micro(x: jax.Array, count: int) -> jax.Array:
    """Splits [B, ...] into micro-batches [count, B / count, ...].

    Raises:
      ValueError: the rows do not divide.
    """
    if x.shape[0] % count:
        raise ValueError(f"a batch of {x.shape[0]} rows does not divide into {count} micro-batches")
    # Every count-th row: a batch axis that is sharded over devices stays sharded within each micro-batch.
    return rearrange(x, "(b micro) ... -> micro b ...", micro=count)
