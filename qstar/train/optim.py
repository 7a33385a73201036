"""AdamW with float32 state, and the schedules of the papers."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from qstar import tree

SCHEDULES = ("constant", "linear", "cosine")


def schedule(kind: str, lr: float, *, warmup: int, steps: int, end: float = 0.0) -> optax.Schedule:
    """Returns a rate schedule: linear warm-up, then constant, or linear or cosine decay to `end * lr` at `steps`.

    STaR's is ("constant", 1e-6, warmup=100): its first iteration of 40 steps ends within the warm-up.
    """
    rest = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, end * lr, rest),
        "cosine": optax.cosine_decay_schedule(lr, rest, alpha=end),
    }[kind]
    if not warmup:
        return after
    # The first update has a rate above 0: step s of the warm-up has lr * (s + 1) / warmup.
    return optax.join_schedules([optax.linear_schedule(lr / warmup, lr, max(1, warmup - 1)), after], [warmup])


def adamw(
    *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0, clip: float = 1.0
) -> optax.GradientTransformation:
    """Returns AdamW's direction (clipped by global norm unless clip=0), to be scaled by minus the learning rate.

    Moments are float32 whatever the gradients are; `weight_decay` applies to all that trains.
    """
    # The rate is an argument of the train step: STaR's iterations differ in their number of steps, hence in their
    # schedule, which must not recompile the step.
    # Clipped first: an outlier would otherwise enter both moments at its full size.
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype="float32"))
    # After Adam's scaling, hence decoupled. On embeddings, biases and norms as well, as in PyTorch's AdamW over all
    # parameters (transformers' Trainer leaves out biases and norms).
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    return _in_float32(optax.chain(*parts))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    # Optax gives moments the dtype of the parameters: in bfloat16 their small changes would round to nothing.

    def update(grads, state, params=None):
        return inner.update(tree.cast(grads, jnp.float32), state, params)

    return optax.GradientTransformation(lambda params: inner.init(tree.cast(params, jnp.float32)), update)
