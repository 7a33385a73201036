"""The harness's model class against lm_eval's own `hf` class on one random model: numbers, texts, tables."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from qstar.__main__ import main
from qstar.errors import UserError
from qstar.models import scoring
from tests.methods.test_quiet_eval import everywhere, thinker

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (pip install lm_eval)")

from qstar.methods import harness  # noqa: E402  needs lm_eval

CONTEXT = 48
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
PAIRS = [
    ("two and two are", " four"),
    ("a space ends this one: ", "yes"),
    ("", "no context at all"),
    ("an earlier word " * 6, "and a continuation"),  # more than the context: its first tokens are cut
    ("one letter", "s"),
]
PROMPTS = ["count: one two", "b", "an earlier word " * 6, "<s>a document begins", "so it goes"]


@pytest.fixture(scope="module", params=["bos", "plain"])
def pair(request, tmp_path_factory):
    """(qstar's class, lm_eval's hf class) on one folder, whose tokenizer puts BOS in front of a text or not."""
    return make_pair(tmp_path_factory.mktemp("model") / "tiny", request.param)


def make_pair(folder, kind):
    characters = ["<s>", "</s>", "<|end|>", *map(chr, range(32, 127)), "\n"]
    backend = Backend(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if kind == "bos":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>"], "pad_token": "</s>"})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    special = {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(characters), initializer_range=0.4, **sizes, **special)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    hf = pytest.importorskip("lm_eval.models.huggingface").HFLM(
        str(folder), device="cpu", dtype="float32", batch_size=1
    )
    return types.SimpleNamespace(ours=harness.HarnessModel(str(folder)), hf=hf, folder=folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The pair whose tokenizer puts no BOS in front: for what does not depend on it."""
    return make_pair(tmp_path_factory.mktemp("model") / "tiny", "plain")


def asked(*rows):
    return [types.SimpleNamespace(args=row) for row in rows]


def test_loglikelihoods_are_those_of_the_hf_class(pair):
    ours, theirs = (lm.loglikelihood(asked(*PAIRS), disable_tqdm=True) for lm in (pair.ours, pair.hf))
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=1e-5, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_greedy_continuation_is_recognised(pair):
    text = pair.ours.generate_until(asked(("so", {"max_gen_toks": 4, "until": []})))[0]
    found = pair.ours.loglikelihood(asked(("so", text), ("so", text[:-1] + "~")), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_windows_are_those_of_the_hf_class(pair):
    texts = [("a text that is longer than the context of this model, by far: it needs three windows, not one. " * 2,)]
    texts += [("short",), ("",)]
    ours, theirs = (lm.loglikelihood_rolling(asked(*texts), disable_tqdm=True) for lm in (pair.ours, pair.hf))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_generations_are_those_of_the_hf_class(pair):
    free = pair.hf.generate_until(asked(*[(p, {"max_gen_toks": 12, "until": []}) for p in PROMPTS]), disable_tqdm=True)
    # Stop strings that do occur: a letter, and one of two letters.
    longest = max(free, key=len)
    for until in ([], [longest[5]], [longest[3:5], "<|end|>", "</s>"]):
        requests = asked(*[(p, {"max_gen_toks": 12, "until": until, "do_sample": False}) for p in PROMPTS])
        assert pair.ours.generate_until(requests) == pair.hf.generate_until(requests, disable_tqdm=True), until


def test_chat_templates_are_applied_as_by_the_hf_class(pair):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
    for more in (True, False):
        assert pair.ours.apply_chat_template(chat, more) == pair.hf.apply_chat_template(chat, more)
    with pytest.raises(UserError, match="message 0 must be"):
        pair.ours.apply_chat_template([{"role": "user"}])
    assert pair.ours.chat_template(True) == TEMPLATE
    assert pair.ours.tokenizer_name == pair.hf.tokenizer_name


def test_texts_of_like_length_share_a_compilation(one):
    one.ours.loglikelihood(asked(*[("x" * n, "yes") for n in (4, 5, 6, 7)]), disable_tqdm=True)
    before = scoring.next_scores._cache_size()
    one.ours.loglikelihood(asked(*[("y" * n, "no") for n in (5, 8, 9, 10)]), disable_tqdm=True)
    assert scoring.next_scores._cache_size() == before


# --------------------------------------------------------------------------------------------------------- thoughts


def test_loglikelihoods_with_thoughts_are_the_products_of_mixed_probabilities():
    model = thinker()
    model = model.replace(config=model.config.replace(thoughts=model.config.thoughts.replace(temperature=0.0)))
    lm, pairs = harness.HarnessModel(model), [("What is 1 + 1 then?", " 2"), ("So", " it goes")]
    found = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    config = model.config.replace(thoughts=model.config.thoughts.replace(talk_tokens=1))
    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        ids, n = model.tokenizer.encode(context + continuation), len(continuation)
        mixed = everywhere(model.params, config, jnp.asarray([ids]), jnp.ones((1, len(ids)), jnp.int32))[1]
        logp = np.asarray(jax.nn.log_softmax(mixed))[-n - 1 : -1]
        assert abs(logprob - logp[np.arange(n), ids[-n:]].sum()) < 1e-4
        assert greedy == (logp.argmax(-1) == ids[-n:]).all()
    without = harness.HarnessModel(model, thoughts=False).loglikelihood(asked(*pairs), disable_tqdm=True)
    assert abs(without[0][0] - found[0][0]) > 1e-2  # the thoughts do change it


def test_generations_with_thoughts_are_those_of_generate():
    model = thinker()
    lm = harness.HarnessModel(model, thought_temperature=0.0)
    expected = harness.generate(
        model, ["So 999"], max_new_tokens=6, temperature=0.0, thoughts=model.config.thoughts.replace(temperature=0.0)
    )
    assert lm.generate_until(asked(("So 999", {"max_gen_toks": 6, "until": []}))) == [expected[0][0].text]


def test_a_model_that_cannot_think_is_refused(one):
    with pytest.raises(UserError, match="cannot think"):
        harness.HarnessModel(str(one.folder), thoughts=True)


# -------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of two task files over local rows: multiple choice, and generation with examples in front."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": f"what follows {n}?", "choices": [str(n + 1), "none", "all of it"], "answer": 0} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
        'doc_to_text: "Q: {{q}}\\nA:"\n'
    )
    choice = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
    write = 'output_type: generate_until\ndoc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 8}\n'
    for name, text in (("tiny_choice", choice), ("tiny_write", write)):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return folder


def test_the_command_prints_what_lm_eval_finds_with_its_hf_class(one, tasks, capsys, tmp_path):
    names = ["tiny_choice", "tiny_write"]
    flags = ["--harness=" + ",".join(names), f"--include-path={tasks}", "--limit=4", "--num-fewshot=0"]
    assert main(["evaluate", f"--model={one.folder}", *flags, "--json", f"--out={tmp_path / 'out'}"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    theirs = simple_evaluate(
        one.hf,
        tasks=names,
        limit=4,
        num_fewshot=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    assert found.keys() == theirs["results"].keys()
    for name in names:
        assert found[name] == pytest.approx({k: v for k, v in theirs["results"][name].items()}, nan_ok=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples_tiny_write.jsonl").read_text().splitlines()]
    assert [r["resps"] for r in rows] == [s["resps"] for s in theirs["samples"]["tiny_write"]]
    assert "tiny_choice" in (tmp_path / "out" / "results.json").read_text()


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--harness=tiny_chioce"], "harness task 'tiny_chioce' is unknown; did you mean tiny_choice"),
        (["--harness=tiny_choice", "--samples=4"], "--samples does not go with --harness"),
        (["--task=gsm8k", "--chat"], "--chat does not go with --metric=answers, only with --harness"),
        (["--task=gsm8k", "--harness=tiny_choice"], "give --task=NAME or --harness=NAMES"),
        (["--harness=gsm8k"], "harness task gsm8k: cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(one, tasks, capsys, flags, line):
    path = [f"--include-path={tasks}"] if not any("--task" in f for f in flags) else []
    assert main(["evaluate", f"--model={one.folder}", *flags, *path]) == 2
    error = capsys.readouterr().err
    assert line in error and "Traceback" not in error


def test_without_the_package_there_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "qstar.methods.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main(["evaluate", "--model=anything", "--harness=arc_easy"]) == 2
    assert "lm-evaluation-harness is not installed" in capsys.readouterr().err
