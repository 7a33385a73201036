"""The graph: segments of the past, masks, remat, listed layers, and the tiny preset against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar import tree
from qstar.models import decoder
from qstar.models.attention import attend, text_mask, write_column
from qstar.models.config import ModelConfig, preset
from qstar.models.layers import project
from qstar.models.presets import published
from qstar.types import Segment

GQA = ModelConfig(
    vocab_size=30,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=32,
    init_std=0.3,
)
LEARNED = GQA.replace(
    position="learned",
    norm="layer",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    num_kv_heads=4,
    max_positions=32,
    activation="gelu",
)
T = 12
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 30, T), jnp.int32)
POSITIONS = jnp.arange(T)
init = jax.jit(decoder.init, static_argnums=(0, 2))


def noisy(config: ModelConfig, seed: int = 0):
    """Random parameters whose biases are not 0 and norms not 1."""
    params = init(config, jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda p, k: p + 0.1 * jax.random.normal(k, p.shape), params, keys)


@pytest.fixture(scope="module")
def params():
    return noisy(GQA)


def run(params, config, tokens, positions=None, mask=None):
    positions = jnp.arange(len(tokens)) if positions is None else positions
    mask = text_mask(None, len(tokens), config) if mask is None else mask
    return decoder.forward(params, config, tokens, positions, mask)[0]


hidden = jax.jit(run, static_argnums=1)
forward = jax.jit(decoder.forward, static_argnums=1)


# ----------------------------------------------------------------------------------------------- against plain numpy


def numpy_tiny(params, config, tokens) -> np.ndarray:
    """Logits [T, V] of the tiny preset, token by token and head by head, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    d, k = config.hidden_size, config.head_dim

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def turn(x, t):  # pairs (j, j + k/2) by t * 1000^(-2j/k)
        out = np.empty(k)
        for j in range(k // 2):
            c, s = np.cos(t * 1000.0 ** (-2 * j / k)), np.sin(t * 1000.0 ** (-2 * j / k))
            out[j], out[j + k // 2] = x[j] * c - x[j + k // 2] * s, x[j + k // 2] * c + x[j] * s
        return out

    x = p["embed"]["table"][np.asarray(tokens)] * np.sqrt(d)
    for i in range(config.num_layers):
        w = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        h = rms(x, w["attn_norm"]["scale"])
        q, key, v = (h @ w[n]["kernel"] for n in "qkv")
        out = np.zeros_like(q)
        for head in range(config.num_heads):
            s = slice(head * k, (head + 1) * k)
            keys = np.stack([turn(key[u, s], u) for u in range(len(tokens))])
            for t in range(len(tokens)):
                e = np.exp(keys[: t + 1] @ turn(q[t, s], t) / np.sqrt(k))
                out[t, s] = (e / e.sum()) @ v[: t + 1, s]
        x = x + out @ w["o"]["kernel"]
        u = rms(x, w["mlp_norm"]["scale"]) @ w["up"]["kernel"]
        x = x + 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))) @ w["down"]["kernel"]
    return rms(x, p["final_norm"]["scale"]) @ p["embed"]["table"].T


def test_the_tiny_preset_is_what_its_docstring_says():
    config = preset("tiny", hidden_size=32, num_layers=2)
    params = noisy(config)
    ours = decoder.unembed(params, config, hidden(params, config, TOKENS % 20))
    np.testing.assert_allclose(ours, numpy_tiny(params, config, TOKENS % 20), rtol=1e-4, atol=1e-4)
    assert tree.size(jax.eval_shape(lambda: decoder.init(preset("tiny"), jax.random.key(0)))) == 334_368


def test_attention_over_segments_is_softmax_over_their_union():
    rng = np.random.default_rng(1)
    H, G, K, lengths = 6, 2, 4, (5, 1, 3)
    q = rng.normal(size=(3, H, K))
    parts = [(rng.normal(size=(G, S, K)), rng.normal(size=(G, S, K)), rng.random((3, S)) < 0.7) for S in lengths]
    parts[1] = (*parts[1][:2], None)  # no mask: all of it is seen
    out = attend(jnp.float32(q), [Segment(jnp.float32(k), jnp.float32(v), m) for k, v, m in parts], scale=0.3)
    for t in range(3):
        for h in range(H):
            g = h // (H // G)
            seen = [(k[g, s], v[g, s]) for k, v, m in parts for s in range(k.shape[1]) if m is None or m[t, s]]
            e = np.exp([0.3 * q[t, h] @ k for k, _ in seen])
            expected = sum(w * v for w, (_, v) in zip(e / e.sum(), seen))
            np.testing.assert_allclose(out[t, h], expected, atol=1e-5)


def test_a_row_that_sees_nothing_gives_numbers_and_finite_gradients():
    segment = Segment(jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4)), jnp.zeros((3, 2), bool))
    f = lambda q: attend(q, [segment], scale=1.0).sum()  # noqa: E731
    value, grad = jax.value_and_grad(f)(jnp.ones((3, 1, 4)))
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


# ----------------------------------------------------------------------------------------------- the past as segments


@pytest.mark.parametrize("config", [GQA, LEARNED], ids=["rope", "learned"])
def test_a_prefix_and_then_the_rest_equals_the_whole(config):
    params, cut = noisy(config), 7
    whole = hidden(params, config, TOKENS)
    causal = lambda n: text_mask(None, n, config)  # noqa: E731
    _, (k, v) = forward(params, config, TOKENS[:cut], POSITIONS[:cut], causal(cut))
    assert k.shape == (3, config.num_kv_heads, cut, 8)
    rest, (k2, _) = forward(params, config, TOKENS[cut:], POSITIONS[cut:], causal(T - cut), [Segment(k, v, None)])
    np.testing.assert_allclose(rest, whole[cut:], atol=2e-5)
    assert k2.shape == (3, config.num_kv_heads, T - cut, 8)


def test_two_past_segments_with_unwritten_slots_equal_the_whole(params):
    """As in decoding: a shared prefix, a cache with room to spare (masked), and one new token."""
    whole = hidden(params, GQA, TOKENS)
    _, (k, v) = forward(params, GQA, TOKENS[:-1], POSITIONS[:-1], text_mask(None, T - 1, GQA))
    room = jnp.full((3, 2, 4, 8), 1e3)  # garbage that must not be seen
    cache = [jnp.concatenate([x[:, :, 5:], room], axis=2) for x in (k, v)]
    written = jnp.arange(T - 1 - 5 + 4) < T - 1 - 5
    past = [Segment(k[:, :, :5], v[:, :, :5], None), Segment(*cache, written[None])]
    last, _ = forward(params, GQA, TOKENS[-1:], POSITIONS[-1:], None, past)
    np.testing.assert_allclose(last[0], whole[-1], atol=2e-5)


def test_listed_layers_equal_scanned_ones(params):
    listed = {**params, "layers": decoder.unstack(params["layers"])}
    x, (k, v) = forward(params, GQA, TOKENS[:8], POSITIONS[:8], text_mask(None, 8, GQA))
    y, pairs = forward(listed, GQA, TOKENS[:8], POSITIONS[:8], text_mask(None, 8, GQA))
    np.testing.assert_allclose(x, y, atol=1e-5)
    for i, (key, value) in enumerate(pairs):
        np.testing.assert_allclose(key, k[i], atol=1e-5)
        np.testing.assert_allclose(value, v[i], atol=1e-5)
    rest = (TOKENS[8:], POSITIONS[8:], text_mask(None, T - 8, GQA))
    x, _ = forward(params, GQA, *rest, [Segment(k, v, None)])
    y, _ = forward(listed, GQA, *rest, [[Segment(*pair, None)] for pair in pairs])
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_segment_may_stay_unmapped_under_vmap(params):
    """A prefix shared by all rows gives the same as a copy in every row."""
    _, (k, v) = forward(params, GQA, TOKENS[:8], POSITIONS[:8], text_mask(None, 8, GQA))
    rows = jnp.stack([TOKENS[8:], TOKENS[8:][::-1]])

    def one(tokens, k, v):
        return forward(params, GQA, tokens, POSITIONS[8:], text_mask(None, 4, GQA), [Segment(k, v, None)])[0]

    shared = jax.vmap(one, in_axes=(0, None, None))(rows, k, v)
    for row, tokens in zip(shared, rows):
        np.testing.assert_allclose(row, hidden(params, GQA, jnp.concatenate([TOKENS[:8], tokens]))[8:], atol=2e-5)


# ------------------------------------------------------------------------------------------------------------ masks


def test_no_token_sees_a_later_one_and_every_one_is_seen(params):
    before = hidden(params, GQA, TOKENS)
    for t in range(T):
        after = hidden(params, GQA, TOKENS.at[t].set((TOKENS[t] + 1) % 30))
        changed = jnp.abs(after - before).max(axis=-1)
        assert (changed[:t] == 0).all() and (changed[t:] > 1e-6).all(), t


def test_the_window_counts_the_token_itself():
    config = GQA.replace(num_layers=1, sliding_window=4)
    params = noisy(config)
    before = hidden(params, config, TOKENS)
    changed = jnp.abs(hidden(params, config, TOKENS.at[3].set((TOKENS[3] + 1) % 30)) - before).max(axis=-1)
    assert ((changed > 1e-6) == ((POSITIONS >= 3) & (POSITIONS < 3 + 4))).all()


@pytest.mark.parametrize("config", [GQA, LEARNED, GQA.replace(sliding_window=3)], ids=["rope", "learned", "window"])
def test_documents_of_a_row_are_as_good_as_alone(config):
    params = noisy(config)
    ids = jnp.array([1] * 5 + [2] * 4 + [0] * 3)
    positions = jnp.array([*range(5), *range(4), 0, 0, 0])
    mask = text_mask(ids, T, config)
    row = hidden(params, config, TOKENS, positions, mask)
    np.testing.assert_allclose(row[:5], hidden(params, config, TOKENS[:5]), atol=1e-5)
    np.testing.assert_allclose(row[5:9], hidden(params, config, TOKENS[5:9]), atol=1e-5)
    other = hidden(params, config, TOKENS.at[:5].add(1) % 30, positions, mask)
    np.testing.assert_array_equal(row[5:9], other[5:9])  # not a bit of the other document


def test_rotary_scores_depend_on_distances_alone(params):
    np.testing.assert_allclose(hidden(params, GQA, TOKENS), hidden(params, GQA, TOKENS, POSITIONS + 100), atol=5e-4)


# --------------------------------------------------------------------------------------------- how it is run, inits


def loss(params, config):
    return jnp.sum(jnp.sin(decoder.unembed(params, config, run(params, config, TOKENS))))


def test_remat_changes_memory_and_not_gradients(params):
    grads = {}
    for remat in ("none", "block", "dots"):
        f = jax.grad(loss)
        config = GQA.replace(remat=remat)
        assert ("remat" in str(jax.make_jaxpr(f, static_argnums=1)(params, config))) == (remat != "none")
        grads[remat] = jax.jit(f, static_argnums=1)(params, config)
    grads["unrolled"] = jax.jit(jax.grad(loss), static_argnums=1)(params, GQA.replace(scan_unroll=8))
    for how in ("block", "dots", "unrolled"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max()), grads["none"], grads[how]
        )
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads["none"]))


@pytest.mark.parametrize("batched", ["x", "kernel", "both"])
def test_the_projection_is_a_matrix_product_in_every_order_of_vmap_and_grad(batched):
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(3, 5, 4) if batched != "kernel" else (5, 4)))
    w = jnp.float32(rng.normal(size=(3, 4, 6) if batched != "x" else (4, 6)))
    axes = (0 if x.ndim == 3 else None, 0 if w.ndim == 3 else None)

    def value(f):
        return jax.grad(lambda x, w: jnp.sin(jax.vmap(f, axes)(x, w)).sum(), (0, 1))(x, w)

    def per_row(f):  # gradients of every row on its own, and of one row alone
        g = jax.grad(lambda x, w: jnp.sin(f(x, w)).sum(), (0, 1))
        return jax.vmap(g, axes)(x, w), g(x[0] if x.ndim == 3 else x, w[0] if w.ndim == 3 else w)

    for how in (value, per_row):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), how(project), how(jnp.matmul))


def test_half_precision_products_and_their_gradients_have_float32_results_on_a_cpu():
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((5, 40), (40, 6), (5, 6)))

    def run(x, w, g):
        y, pull = jax.vjp(project, x, w)
        return y, *pull(g)

    wide = [np.asarray(v, np.float32) for v in (x, w, g)]
    expected = wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]
    for found, value in zip(jax.jit(run)(x, w, g), expected):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found, value, rtol=2**-7, atol=1e-3)  # rounded once, to 8 bits
    products = [line for line in jax.jit(run).lower(x, w, g).as_text().splitlines() if "dot_general" in line]
    assert len(products) == 3 and all(line.rstrip().endswith("xf32>") for line in products)


def test_half_precision_computes_close_to_float32_and_returns_float32_logits(params):
    config = GQA.replace(dtype="bfloat16")
    h = hidden(params, config, TOKENS)
    wide = decoder.unembed(params, GQA, hidden(params, GQA, TOKENS))
    half = decoder.unembed(params, config, h)
    assert h.dtype == jnp.bfloat16 and half.dtype == jnp.float32
    error = jnp.abs(half - wide).max() / jnp.abs(wide).max()
    assert 1e-4 < error < 0.05


def test_initial_parameters():
    config = preset("llama_20m", num_layers=2, hidden_size=128, scan_unroll=1)
    params = init(config, jax.random.key(0))
    std = {name: float(jnp.std(x)) for name, x in tree.named_leaves(params)}
    assert {n for n, s in std.items() if s == 0} == {n for n in std if n.endswith("scale")}
    for name, s in std.items():
        if s:
            expected = 0.02 / 2 if "/o/" in name or "/down/" in name else 0.02  # sqrt(2 L) = 2
            assert abs(s / expected - 1) < 0.05, name
    q = params["layers"]["q"]["kernel"]
    assert q.shape == (2, 128, 512) and not jnp.allclose(q[0], q[1])  # layers differ
    assert {x.dtype for x in jax.tree.leaves(init(GQA, jax.random.key(0), "bfloat16"))} == {jnp.dtype("bfloat16")}


def test_matmul_params_counts_what_is_multiplied_per_token():
    for config in (GQA, LEARNED, preset("llama_20m"), published("gpt-j-6b")[0]):
        shapes = tree.named_leaves(jax.eval_shape(lambda c=config: decoder.init(c, jax.random.key(0))))
        kernels = sum(x.size for n, x in shapes if n.endswith("kernel"))
        tied = config.vocab_size * config.hidden_size if config.tie_embeddings else 0
        assert config.matmul_params == kernels + tied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_column_of_the_cache_is_written_without_widening_the_cache(dtype):
    cache, new = jnp.ones((4, 2, 16, 8), dtype), 2 * jnp.ones((4, 2, 1, 8), dtype)
    write = jax.jit(jax.vmap(write_column, (0, 0, None)))
    np.testing.assert_array_equal(write(cache, new, 5), cache.at[:, :, 5].set(2))
    if dtype == "bfloat16":
        assert "f32[4,2,16,8]" not in write.lower(cache, new, 5).compile().as_text()
