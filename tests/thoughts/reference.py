"""Quiet-STaR as the official code runs it, spelled out: the whole transformer once per iteration, over rows that repeat every
text P times, with one dense mask of N x N(i+1) and a growing cache. Llama-like models. No code of qstar is used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def rms(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x, positions, theta):
    """x [R, N, heads, K], positions [N]: pairs (k, k + K/2)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def transformer(p, c, x, positions, allowed, cache):
    """x [R, N, H]; allowed bool [R, N, N(i+1)]; cache: per layer (k, v) [R, N i, kv, K], which grows."""
    R, N, _ = x.shape
    new = []
    for i in range(c.num_layers):
        w = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        h = rms(x, w["attn_norm"]["scale"], c.norm_eps)
        q = (h @ w["q"]["kernel"]).reshape(R, N, c.num_heads, c.head_dim)
        k, v = ((h @ w[n]["kernel"]).reshape(R, N, c.num_kv_heads, c.head_dim) for n in "kv")
        q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        if cache:
            k, v = jnp.concatenate([cache[i][0], k], axis=1), jnp.concatenate([cache[i][1], v], axis=1)
        new.append((k, v))
        k, v = (jnp.repeat(t, c.num_heads // c.num_kv_heads, axis=2) for t in (k, v))
        scores = jnp.einsum("rnhk,rmhk->rhnm", q, k) / np.sqrt(c.head_dim)
        weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, np.finfo(np.float32).min), axis=-1)
        out = jnp.einsum("rhnm,rmhk->rnhk", weights, v).reshape(R, N, -1)
        x = x + out @ w["o"]["kernel"]
        h = rms(x, w["mlp_norm"]["scale"], c.norm_eps)
        x = x + (jax.nn.silu(h @ w["gate"]["kernel"]) * (h @ w["up"]["kernel"])) @ w["down"]["kernel"]
    return rms(x, p["final_norm"]["scale"], c.norm_eps), new


def nll(logits, labels, real):
    """[R, m], 0 where the label is padding."""
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0] * real


def nonzero_mean(x):
    return jnp.sum(x) / jnp.sum(x != 0)


def official(p, c, tokens, mask, thoughts=None, *, passes=None, pad=2, start_end=(62, 63)):
    """Runs all iterations; without thoughts it thinks greedily. Returns a dict named as the fixture.

    Args:
      p: qstar's tree. tokens, mask: [B, N]. thoughts: [S, R, N] or None.
    """
    t = c.thoughts
    S, T = t.thought_tokens, t.talk_tokens
    P = passes or thoughts.shape[1] // tokens.shape[0]
    A = S + 3
    x_ids, real = jnp.repeat(jnp.asarray(tokens), P, axis=0), jnp.repeat(jnp.asarray(mask), P, axis=0) > 0
    R, N = x_ids.shape
    table, head = p["embed"]["table"], p["head"]["kernel"]
    start, end = (p["thoughts"][k] * t.embedding_scale for k in ("start", "end"))
    causal = jnp.tril(jnp.ones((N, N), bool)) & real[:, None, :]
    allowed, cache, x, h0 = causal, None, table[x_ids], None
    drawn, logps, states = [], [], []
    for i in range(A + T - 1):
        hidden, cache = transformer(p, c, x, jnp.arange(N) + i, allowed, cache)
        if i == 0:
            h0 = hidden
        if i >= A - 1:
            states.append(hidden)
        if 1 <= i <= S:  # the state of iteration i draws c_i
            logits = (hidden @ head).at[..., jnp.asarray(start_end)].set(-1e10)
            token = jnp.argmax(logits, axis=-1) if thoughts is None else jnp.asarray(thoughts)[i - 1]
            drawn.append(token)
            logp = jax.nn.log_softmax(logits / t.policy_temperature)
            logps.append(jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0])
        if i == 0:
            x = jnp.broadcast_to(start, hidden.shape)
        elif i <= S:
            x = table[drawn[-1]]
        elif i == A - 2:
            x = jnp.broadcast_to(end, hidden.shape)
        else:  # true tokens; past the end, padding
            ahead = i - (A - 1) + 1
            x = table[jnp.concatenate([x_ids[:, ahead:], jnp.full((R, ahead), pad)], axis=1)]
        allowed = jnp.concatenate([allowed, jnp.eye(N, dtype=bool) & causal], axis=-1)
    m = p["mixing"]
    base_nll = nll((h0 @ head)[:, :-1], x_ids[:, 1:], real[:, 1:])
    mixed, ws, talk_nll = [], [], []
    for s, state in enumerate(states):
        base = jnp.roll(h0, -s, axis=1)
        g = jax.nn.relu(jnp.concatenate([base, state], -1) @ m["in"]["kernel"] + m["in"]["bias"])
        g = jax.nn.relu(g @ m["hidden"]["kernel"] + m["hidden"]["bias"])
        w = g @ m["out"]["kernel"]
        mixed.append(((1 - w) * base + w * state) @ head)
        ws.append(w[..., 0])
        talk_nll.append(nll(mixed[-1][:, : N - 1 - s], x_ids[:, 1 + s :], real[:, 1 + s :]))
    L = N - 1 - T
    reward = sum(base_nll[:, s : s + L] - talk_nll[s][:, :L] for s in range(T))
    reward = jax.lax.stop_gradient(reward)
    advantage = reward
    if P > 1:
        advantage = (reward.reshape(-1, P, L) - reward.reshape(-1, P, L).mean(axis=1, keepdims=True)).reshape(R, L)
    clipped = jnp.maximum(advantage, 0)
    loss_nll = 0.5 * nonzero_mean(base_nll) + 0.5 / T * sum(map(nonzero_mean, talk_nll))
    loss_policy = sum(jnp.mean(-clipped * logp[:, :L]) for logp in logps) / S
    return dict(
        thoughts=jnp.stack(drawn),
        base_logits=h0 @ head,
        talk_mixed_logits=jnp.stack(mixed),
        talk_mix_weight=jnp.stack(ws),
        base_nll=base_nll,
        talk_nll_s=talk_nll,
        reward=reward,
        advantage=advantage,
        advantage_clipped=clipped,
        loss_nll=loss_nll,
        loss_policy=loss_policy,
    )
