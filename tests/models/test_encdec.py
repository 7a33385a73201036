"""The encoder-decoder against transformers' T5: graph, cached decoding, gradients, weights and configs both ways."""

from __future__ import annotations

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import qstar
from qstar import tree
from qstar.errors import UserError
from qstar.models import encdec, scoring
from qstar.models.encdec import EncDecConfig
from qstar.models.hf_config import from_hf, to_hf
from qstar.models.presets import published
from qstar.models.weight_files import SINGLE
from qstar.sample import seq2seq

V = 50
SIZES = dict(
    vocab_size=V,
    d_model=32,
    d_kv=6,
    d_ff=40,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    decoder_start_token_id=0,
)
CASES = {
    "v1.1 untied": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "v1.1 tied, as transformers 5 makes it": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "first T5, tied and scaled": dict(feed_forward_proj="relu"),
    "mT5, untied": dict(feed_forward_proj="gated-gelu"),
    "umT5, untied": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umT5, tied and scaled": dict(feed_forward_proj="gated-gelu"),
}
RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.integers(0, V, (2, 30)), RNG.integers(0, V, (2, 25))
TARGET[:, 0] = 0
REAL = np.ones((2, 30), int)
REAL[1, 17:] = 0


def torch_model(case: str) -> torch.nn.Module:
    """A random model in which no norm is 1 and relative positions matter."""
    name = {"mT5": "MT5", "umT5": "UMT5"}.get(case.partition(",")[0], "T5")
    config = getattr(transformers, name + "Config")(**SIZES, **CASES[case])
    model = getattr(transformers, name + "ForConditionalGeneration")(config).eval()
    if "untied" in case:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32))
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_((1.0 if "layer_norm" in key else 0.0) + 0.25 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    model, folder = torch_model(request.param), tmp_path_factory.mktemp("t5") / "model"
    model.save_pretrained(folder)
    return types.SimpleNamespace(case=request.param, torch=model, folder=folder, model=qstar.load(folder))


def torch_logits(model, source=SOURCE, real=REAL, target=TARGET):
    with torch.no_grad():
        ids, mask, out = map(torch.tensor, (source, real, target))
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=out).logits.numpy()


def test_encoder_decoder_and_head_equal_those_of_transformers(pair):
    model, c = pair.model, pair.model.config
    ids, mask, out = map(torch.tensor, (SOURCE, REAL, TARGET))
    with torch.no_grad():
        states = pair.torch.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = pair.torch.decoder(input_ids=out, encoder_hidden_states=states, encoder_attention_mask=mask)
    ours = np.asarray(jax.jit(jax.vmap(functools.partial(encdec.encode, model.params, c)))(SOURCE, REAL))
    np.testing.assert_allclose(ours[REAL > 0], states.numpy()[REAL > 0], atol=1e-4)
    decode = jax.jit(jax.vmap(functools.partial(encdec.decode, model.params, c)))
    theirs = hidden.last_hidden_state.numpy() * (c.hidden_size**-0.5 if c.scale_outputs else 1.0)
    np.testing.assert_allclose(np.asarray(decode(TARGET, ours, REAL)), theirs, atol=1e-4)
    logits = np.asarray(qstar.logits(model, TARGET, encoder_tokens=SOURCE, encoder_mask=REAL))
    assert np.abs(logits).max() > 0.5 and logits.dtype == np.float32
    np.testing.assert_allclose(logits, torch_logits(pair.torch), atol=1e-4)


def test_cached_decoding_equals_transformers_step_by_step(pair):
    model, c, steps = pair.model, pair.model.config, 12
    params = encdec.unstack(model.params)

    def read(tokens, real):
        return encdec.cross_sources(params, c, encdec.encode(params, c, tokens, real), real)

    sources = jax.jit(jax.vmap(read))(SOURCE, REAL)
    step = jax.jit(jax.vmap(functools.partial(encdec.decode_step, params, c), in_axes=(0, None, 0, 0)))
    empty = jnp.zeros((2, c.num_heads, steps, c.head_dim))
    rings, past = [(empty, empty)] * c.num_decoder_layers, None
    with torch.no_grad():
        memory = pair.torch.encoder(torch.tensor(SOURCE), attention_mask=torch.tensor(REAL))
        for t in range(steps):
            hidden, rings = step(jnp.asarray(TARGET[:, t]), jnp.int32(t), sources, rings)
            theirs = pair.torch(encoder_outputs=memory, attention_mask=torch.tensor(REAL), past_key_values=past,
                                decoder_input_ids=torch.tensor(TARGET[:, t : t + 1]), use_cache=True)  # fmt: skip
            past = theirs.past_key_values
            ours = np.asarray(scoring.decoder.unembed(params, c, hidden))
            np.testing.assert_allclose(ours, theirs.logits[:, 0].numpy(), atol=1e-4)


def test_gradients_equal_those_of_transformers(pair):
    labels, weight = np.roll(TARGET, -1, axis=1), RNG.random(TARGET.shape).astype(np.float32)

    def loss(params):
        logits = qstar.logits(pair.model.replace(params=params), TARGET, encoder_tokens=SOURCE, encoder_mask=REAL)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        return jnp.sum(nll * weight) / 50

    ours = dict(tree.named_leaves(jax.jit(jax.grad(loss))(pair.model.params)))
    pair.torch.zero_grad()
    ids, mask, out = map(torch.tensor, (SOURCE, REAL, TARGET))
    logits = pair.torch(input_ids=ids, attention_mask=mask, decoder_input_ids=out).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten(), reduction="none")
    ((nll * torch.tensor(weight).flatten()).sum() / 50).backward()
    from qstar.models.hf_names import file_names, name_map

    named = dict(pair.torch.named_parameters())
    for row, shape in name_map(pair.model.config):
        theirs = [named[n].grad.numpy() for n in file_names(row, shape)]
        theirs = [g.T if row.transpose else g for g in theirs]
        theirs = np.stack(theirs) if "{i}" in row.name else theirs[0]
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours[row.path] / scale, theirs / scale, atol=1e-4, err_msg=row.path)
        assert np.abs(theirs).max() > 1e-4, row.path


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("buckets, far", [(32, 128), (8, 20)])
def test_relative_buckets_equal_the_reference(both_ways, buckets, far):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-200, 201, dtype=np.int32)
    theirs = T5Attention._relative_position_bucket(torch.tensor(relative), both_ways, buckets, far)
    ours = encdec.bucket(jnp.asarray(relative), both_ways=both_ways, buckets=buckets, max_distance=far)
    np.testing.assert_array_equal(ours, theirs.numpy())


# ---------------------------------------------------------------------------------------------------- files


def test_export_loads_in_transformers_bit_for_bit_and_in_qstar(pair, tmp_path):
    qstar.save(pair.model, tmp_path / "out")
    again = type(pair.torch).from_pretrained(tmp_path / "out").eval()
    np.testing.assert_array_equal(torch_logits(again), torch_logits(pair.torch))
    ids = torch.tensor(SOURCE)
    assert again.generate(ids, max_new_tokens=4).tolist() == pair.torch.generate(ids, max_new_tokens=4).tolist()
    back = qstar.load(tmp_path / "out")
    assert back.config == pair.model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, back.params, pair.model.params))


def test_the_head_is_tied_where_the_tensors_say_so(pair):
    has_head = "lm_head.weight" in load_file(pair.folder / SINGLE)
    assert pair.model.config.tie_embeddings == (not has_head) == ("untied" not in pair.case)
    assert pair.model.config.scale_outputs == ("scaled" in pair.case)  # the flag of the file is true for all of them
    assert json.loads((pair.folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_files_of_older_versions_with_copies_of_the_embedding_are_read(pair, tmp_path):
    """transformers 4: no scale_decoder_outputs, a truthful tie flag, embed_tokens twice, a table that nothing reads."""
    config = json.loads((pair.folder / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    config["tie_word_embeddings"] = "scaled" in pair.case
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(pair.folder / SINGLE)
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].copy()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = np.zeros((8, 4), np.float32)
    if "scaled" in pair.case:
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()  # a copy is no head of its own
    save_file(tensors, tmp_path / SINGLE)
    old = qstar.load(tmp_path)
    assert old.config == pair.model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, old.params, pair.model.params))


@pytest.mark.parametrize("kept", ["encoder", "decoder"])
def test_the_embedding_may_be_kept_under_the_name_of_one_of_the_stacks(pair, kept, tmp_path):
    shutil.copytree(pair.folder, tmp_path / "m")
    tensors = load_file(pair.folder / SINGLE)
    tensors[f"{kept}.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "m" / SINGLE, metadata={"format": "pt"})
    model = qstar.load(tmp_path / "m")
    assert model.config == pair.model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, pair.model.params))


@pytest.mark.parametrize("changed, gone", [("encoder", ""), ("decoder", ""), ("decoder", "shared.weight")])
def test_separate_embeddings_of_the_stacks_are_refused(changed, gone, pair, tmp_path):
    """transformers computes with the table of the stack: qstar, which has one table, would compute other numbers."""
    shutil.copytree(pair.folder, tmp_path / "m")
    tensors = load_file(pair.folder / SINGLE)
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"] + (stack == changed)
    save_file({k: x for k, x in tensors.items() if k != gone}, tmp_path / "m" / SINGLE, metadata={"format": "pt"})
    again = type(pair.torch).from_pretrained(tmp_path / "m").eval()
    assert np.abs(torch_logits(again) - torch_logits(pair.torch)).max() > 0.1
    with pytest.raises(UserError, match=f"'{changed}.embed_tokens.weight' differs from 'shared.weight'"):
        qstar.load(tmp_path / "m")


def test_flan_shapes_have_the_published_numbers_of_parameters():
    for size, millions in {"small": 76.96, "base": 247.58, "large": 783.15, "xl": 2849.8, "xxl": 11135.3}.items():
        config = published(f"flan-t5-{size}")[0]
        count = tree.size(jax.eval_shape(functools.partial(scoring.init, config), jax.random.key(0)))
        assert abs(count / 1e6 - millions) < 0.1, size
        assert from_hf(to_hf(config), "here") == config


def test_half_precision_is_bfloat16_and_close_where_it_computes(pair):
    with pytest.raises(UserError, match="float16 overflows"):
        qstar.load(pair.folder, dtype="float16")
    low = qstar.load(pair.folder, dtype="bfloat16")
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low.params))  # masters stay
    ours = np.asarray(qstar.logits(low, TARGET, encoder_tokens=SOURCE, encoder_mask=REAL))
    theirs = torch_logits(pair.torch)
    assert ours.dtype == np.float32 and 1e-3 < np.abs(ours - theirs).max() < 0.3 * np.abs(theirs).max()


# ------------------------------------------------------------------------------------------- sampling and scoring


def test_greedy_generation_equals_that_of_transformers(pair):
    rows = [SOURCE[0].tolist(), SOURCE[1, :17].tolist()]
    found = qstar.generate(pair.model, rows, max_new_tokens=10, temperature=0)
    with torch.no_grad():
        theirs = pair.torch.generate(
            torch.tensor(SOURCE), attention_mask=torch.tensor(REAL), max_new_tokens=10, do_sample=False
        )
    for (ours,), row in zip(found, theirs[:, 1:].tolist()):
        assert ours.tokens == row[: len(ours.tokens)] and (ours.stopped or len(ours.tokens) == 10)
    scores = qstar.logprobs(pair.model, rows, [c.tokens for (c,) in found])
    for (ours,), score in zip(found, scores):
        np.testing.assert_allclose(ours.logprobs, score, atol=1e-4)


def test_samples_do_not_depend_on_batching_and_never_hold_an_id_without_text(monkeypatch):
    config = EncDecConfig(
        vocab_size=32128,
        hidden_size=8,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        head_dim=4,
        intermediate_size=8,
        eos_id=1,
    )
    params = scoring.init(config, jax.random.key(0))
    params["head"]["kernel"] = params["head"]["kernel"].at[:, 32100:].add(3.0 * jnp.sign(jnp.ones((8, 1))))  # tempting
    model = qstar.Model(config, params)
    rows = [[5, 6, 7], [8] * 11, [9]]
    together = qstar.generate(model, rows, max_new_tokens=6, n=4, seed=3)
    slots, sample = [], seq2seq.sample_rows
    monkeypatch.setattr(seq2seq, "sample_rows", lambda p, s, *a: slots.append(s.slots) or sample(p, s, *a))
    apart = qstar.generate(model, rows, max_new_tokens=6, n=4, seed=3, slots=3)
    assert max(slots) <= 3
    assert [[c.tokens for c in row] for row in together] == [[c.tokens for c in row] for row in apart]
    drawn = [t for row in together for c in row for t in c.tokens]
    assert len(set(drawn)) > 20 and max(drawn) < 32100


def test_an_all_padding_source_gives_numbers(pair):
    out = qstar.logits(pair.model, TARGET, encoder_tokens=SOURCE, encoder_mask=np.zeros_like(REAL))
    assert np.isfinite(np.asarray(out)).all()


def test_mistakes_are_named(pair):
    with pytest.raises(UserError, match="encoder_tokens"):
        qstar.logits(pair.model, TARGET)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        qstar.generate(pair.model, [[3], []], max_new_tokens=2)
    with pytest.raises(UserError, match="token id 50"):
        qstar.generate(pair.model, [[50]], max_new_tokens=2)
    with pytest.raises(UserError, match="max_new_tokens=1000000000000 exceeds"):
        qstar.generate(pair.model, [[5]], max_new_tokens=10**12)
    with pytest.raises(UserError, match="tokenizer"):
        qstar.generate(pair.model, ["text"], max_new_tokens=2)
