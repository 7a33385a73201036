"""Training on rows of one's own, by `qstar.fine_tune`, `prefer`, `distil` and by config: losses, resume, mistakes."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qstar
from qstar import tree
from qstar.__main__ import main
from qstar.data.sources import read_jsonl
from qstar.errors import UserError
from qstar.methods import api
from qstar.methods.pair_rows import encode
from qstar.models.config import ModelConfig
from qstar.models.scoring import init
from qstar.tasks.base import Problem, Task
from qstar.text.tokenizer import char_tokenizer
from qstar.train.metrics import Writer, read

TEMPLATE = (
    "{% for m in messages %}{{ '<' if m.role == 'user' else '>' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
PAIRS = [{"prompt": f"<{a}+{b}>", "completion": str(a + b)} for a in range(4) for b in range(4)]
CHATS = [
    {"messages": [{"role": "user", "content": x["prompt"][1:-1]}, {"role": "assistant", "content": x["completion"]}]}
    for x in PAIRS
]
PREFERENCES = [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": "9"} for x in PAIRS]
HOW = {"steps": 4, "lr": 1e-2, "batch_size": 4, "log_every": 2, "quiet": True}


def make_model(seed=0, **changes):
    tokenizer = char_tokenizer("0123456789+<>_\n", pad="_", eos="\n")
    tokenizer.hf.chat_template = TEMPLATE
    config = ModelConfig(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, hidden_size=32, gated_mlp=True)
    return qstar.Model(config, init(config, jax.random.key(seed)), tokenizer).replace(**changes)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    qstar.save(model, path)
    return path


@pytest.fixture(scope="module")
def teacher(model):
    """A model that knows most of the sums."""
    return qstar.fine_tune(model, PAIRS, steps=100, lr=5e-3, batch_size=16, quiet=True)[0]


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a.params, b.params))


def nll(model, rows):
    """By the logits, in numpy."""
    total = count = 0.0
    for row in rows:
        prompt = [model.tokenizer.encode(row["prompt"]), model.tokenizer.encode(row["completion"])]
        ids = [*prompt[0], *prompt[1], model.tokenizer.eos_id]
        logits = np.asarray(qstar.logits(model, [ids])[0], np.float64)
        each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(prompt[0]), len(ids))
        total, count = total - sum(each[i - 1, ids[i]] for i in places), count + len(places)
    return total / count


def test_fine_tuning_lowers_the_likelihood_of_held_out_completions_that_it_reports(model, tmp_path):
    before = jax.tree.map(np.asarray, model.params)
    tuned, done = qstar.fine_tune(model, PAIRS, held_out=0.25, workdir=tmp_path / "run", examples=2, **HOW)
    assert (done["rows"], done["steps"], done["held_out_rows"]) == (12, 4, 4)
    assert done["held_out_loss_after"] < done["held_out_loss_before"] - 0.3
    held = [x for x in PAIRS if x["prompt"] in {r["prompt"] for r in held_rows(PAIRS, 0.25)}]
    np.testing.assert_allclose(done["held_out_loss_before"], nll(model, held), rtol=1e-5)
    np.testing.assert_allclose(done["held_out_loss_after"], nll(tuned, held), rtol=1e-5)
    # The caller's model is unchanged.
    assert jax.tree.all(jax.tree.map(np.array_equal, before, model.params))
    curve = [(r["step"], r["loss"]) for r in read(tmp_path / "run") if r["stage"] == "heldout"]
    assert [step for step, _ in curve] == [0, 2, 4] and curve[-1][1] == done["held_out_loss_after"]
    shown = read_jsonl(tmp_path / "run/sft/examples.jsonl")
    greedy = qstar.generate(tuned, [x["prompt"] for x in shown], max_new_tokens=128, temperature=0)
    assert len(shown) == 2 and [x["after"] for x in shown] == [c.text for (c,) in greedy]


def held_rows(rows, share):
    from qstar.data.pairs import split_rows

    return split_rows(rows, share, 0)[1]


def test_messages_train_as_the_texts_that_the_template_makes_of_them(model):
    assert encode(model, CHATS[5]) == encode(model, PAIRS[5])
    chats, texts = (qstar.fine_tune(model, rows, **HOW)[0] for rows in (CHATS, PAIRS))
    assert same(chats, texts)
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (two,) = encode(model, {"messages": turns * 2})
    learnt = [i for i, m in zip([*two.prompt, *two.completion], two.loss) if m]
    assert learnt == model.tokenizer.encode("2\n2\n")


def test_preferences_follow_the_formula_of_dpo(model):
    tuned, done = qstar.prefer(model, PREFERENCES, held_out=0.25, beta=0.5, **HOW)
    np.testing.assert_allclose(done["held_out_loss_before"], np.log(2), rtol=1e-6)
    held = held_rows(PREFERENCES, 0.25)
    gains = []
    for m in (tuned, model):
        sums = [[-nll(m, [{**x, "completion": x[k]}]) * (len(x[k]) + 1) for k in ("chosen", "rejected")] for x in held]
        gains.append(np.array(sums))
    margin = 0.5 * ((gains[0] - gains[1]) @ [1, -1])
    np.testing.assert_allclose(done["held_out_loss_after"], np.log1p(np.exp(-margin)).mean(), rtol=1e-4)
    assert done["held_out_accuracy_after"] == np.mean(margin > 0) > 0.5


def test_a_student_comes_closer_to_its_teacher_on_the_text_that_the_teacher_writes(model, teacher, tmp_path):
    how = {**HOW, "steps": 60, "batch_size": 16, "max_new_tokens": 8}
    student, done = qstar.distil(model, teacher, [x["prompt"] for x in PAIRS], workdir=tmp_path / "run", **how)
    written = [row for f in sorted((tmp_path / "run/teacher").glob("*.jsonl")) for row in read_jsonl(f)]
    greedy = qstar.generate(teacher, [x["prompt"] for x in PAIRS], max_new_tokens=8, temperature=0)
    assert [row["completion"] for row in written] == [c.text for (c,) in greedy]
    tokens = [model.tokenizer.encode("<2+1>3")]
    p, before, after = (np.asarray(jax.nn.log_softmax(qstar.logits(m, tokens)[0])) for m in (teacher, model, student))
    divergence = lambda q: (np.exp(p) * (p - q)).sum(-1)[-2]  # noqa: E731
    assert divergence(after) < 0.5 * divergence(before) and done["rows"] == len(written)


def test_adapters_are_float32_beside_a_base_that_stays_in_half_precision(model, tmp_path):
    half = model.replace(params=tree.cast(model.params, jnp.bfloat16), config=model.config.replace(dtype="bfloat16"))
    tuned, _ = qstar.fine_tune(half, PAIRS, lora_rank=2, workdir=tmp_path / "run", **HOW)
    assert {x.dtype for x in jax.tree.leaves(tuned.params)} == {jnp.dtype(jnp.bfloat16)} and not same(tuned, half)
    assert np.array_equal(tuned.params["embed"]["table"], half.params["embed"]["table"])
    adapter = tmp_path / "run/sft/checkpoints/iter_001/adapter/adapter_model.safetensors"
    header = json.loads(adapter.read_bytes()[8 : 8 + int.from_bytes(adapter.read_bytes()[:8], "little")])
    assert {x["dtype"] for k, x in header.items() if k != "__metadata__"} == {"F32"}


def test_an_interrupted_call_continues_and_ends_with_the_same_bits(model, tmp_path, monkeypatch):
    how = {**HOW, "held_out": 0.25, "save_every": 2}
    whole, done = qstar.fine_tune(model, PAIRS, workdir=tmp_path / "whole", **how)
    write, seen = Writer.write, []

    def fail_once(self, *, stage, step, **values):
        write(self, stage=stage, step=step, **values)
        seen.append((stage, step))
        if seen.count(("heldout", 2)) == 1 and (stage, step) == ("heldout", 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", fail_once)
    with pytest.raises(KeyboardInterrupt):
        qstar.fine_tune(model, PAIRS, workdir=tmp_path / "run", **how)
    again, after = qstar.fine_tune(model, PAIRS, workdir=tmp_path / "run", **how)
    assert same(whole, again) and done == after and ("train", 4) in seen
    seen.clear()
    same_model, same_numbers = qstar.fine_tune(model, PAIRS, workdir=tmp_path / "run", **how)
    assert same(whole, same_model) and same_numbers == done and not seen


def test_a_workdir_of_another_call_is_refused(model, tmp_path):
    qstar.fine_tune(model, PAIRS, workdir=tmp_path / "run", **HOW)
    for changed, says in (
        (lambda: qstar.fine_tune(model, PAIRS[:-1], workdir=tmp_path / "run", **HOW), r"config\.data\.source='16 rows"),
        (
            lambda: qstar.fine_tune(model, PAIRS, workdir=tmp_path / "run", **{**HOW, "lr": 1.0}),
            r"config\.train\.lr=0\.01",
        ),
        (lambda: qstar.fine_tune(make_model(1), PAIRS, workdir=tmp_path / "run", **HOW), "start_norm_and_sum"),
        (lambda: qstar.prefer(model, PREFERENCES, workdir=tmp_path / "run", **HOW), r"config\."),
    ):
        with pytest.raises(UserError, match=says):
            changed()


class Sums(Task):
    name = "sums"

    def problems(self, split):
        return [Problem(str(i), x["prompt"], x["completion"]) for i, x in enumerate(PAIRS)]

    def prompt(self, problem, hint=False):
        return problem.question

    def parse(self, completion):
        return completion


MISTAKES = {
    "option": (lambda m: qstar.fine_tune(m, PAIRS, learning_rate=1), "fine_tune: option 'learning_rate' is unknown"),
    "value": (lambda m: qstar.fine_tune(m, PAIRS, lr=-1.0), r"config\.train\.lr=-1\.0 must be 0 or more"),
    "type": (lambda m: qstar.fine_tune(m, PAIRS, steps="10"), r"config\.train\.steps='10' must be of type int"),
    "row": (
        lambda m: qstar.prefer(m, [*PREFERENCES, {"prompt": "x"}]),
        r"preferences\[16\]: field 'chosen' is missing",
    ),
    "text for a row": (lambda m: qstar.fine_tune(m, ["2+3=5"]), r"^pairs\[0\]: is a str, not a dict of prompt and"),
    "pair for a row": (
        lambda m: qstar.fine_tune(m, [("ab", "cd")]),
        r"^pairs\[0\]: is a tuple, not a dict of prompt and",
    ),
    "None for rows": (lambda m: qstar.fine_tune(m, None), r"^pairs\[0\]: is a NoneType, not a dict of prompt and"),
    "None for prompts": (lambda m: qstar.distil(m, m, None), r"^prompts\[0\]: is a NoneType, not a dict of prompt"),
    "no rows": (lambda m: qstar.fine_tune(m, []), "the list is empty"),
    "no file": (lambda m: qstar.fine_tune(m, "none.jsonl"), "none.jsonl: no such file"),
    "too long": (lambda m: qstar.fine_tune(m, [{"prompt": "1" * 3000, "completion": "2"}]), "all 1 rows are longer"),
    "lora": (lambda m: qstar.distil(m, m, PAIRS, lora_rank=2), "lora_rank"),
    "evaluation": (
        lambda m: qstar.evaluate(m, Sums(), max_tokens=4),
        "option 'max_tokens' is unknown .*max_new_tokens",
    ),
    "two formats": (
        lambda m: qstar.evaluate(m, "math", task_options={"format": "gsm8k"}, format="plain"),
        "evaluate: task_options has format or shots; leave one out",
    ),
    "task": (lambda m: qstar.evaluate(m, "gsm9k"), "task 'gsm9k' is unknown .*gsm8k"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line(model, kind):
    call, says = MISTAKES[kind]
    with pytest.raises(UserError, match=says) as e:
        call(model)
    assert "\n" not in str(e.value)


def test_rows_beyond_the_context_are_left_out(model, capsys):
    short = model.replace(config=model.config.replace(max_positions=16))
    _, done = qstar.fine_tune(short, [*PAIRS, {"prompt": "1" * 40, "completion": "2"}], **{**HOW, "quiet": False})
    assert (
        done["rows"] == 16
        and "1 of 17 rows are longer than the model's context of 16 tokens" in capsys.readouterr().out
    )


def test_evaluation_takes_a_task_object_or_a_name(model, teacher, tmp_path):
    result = qstar.evaluate(teacher, Sums(), format="plain", max_new_tokens=4, workdir=tmp_path / "answers")
    right = [
        c.text == x["completion"]
        for x, (c,) in zip(
            PAIRS, qstar.generate(teacher, [x["prompt"] for x in PAIRS], max_new_tokens=4, temperature=0)
        )
    ]
    assert (
        result["accuracy"]
        == np.mean(right)
        > 0.5
        > qstar.evaluate(model, Sums(), format="plain", max_new_tokens=4)["accuracy"]
    )
    with pytest.raises(UserError, match="was made with config.model="):
        qstar.evaluate(model, Sums(), format="plain", max_new_tokens=4, workdir=tmp_path / "answers")


SCRIPT = """
import qstar

model = qstar.load("MODEL")
pairs = [{"prompt": f"<{a}+{b}>", "completion": str(a + b)} for a in range(4) for b in range(4)]
tuned, summary = qstar.fine_tune(model, pairs, steps=2, batch_size=4, lora_rank=4)
print(summary["loss"], qstar.generate(tuned, ["<2+1>"], max_new_tokens=4)[0][0].text)
print(qstar.score(tuned, ["<2+1>", "<2+1>"], ["3", "4"]))
qstar.save(tuned, "tuned")
"""


def test_load_tune_sample_score_and_save_in_under_20_lines(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(SCRIPT.replace("MODEL", str(folder)), {})  # noqa: S102
    assert len(SCRIPT.splitlines()) < 20 and "import qstar." not in SCRIPT and "from qstar" not in SCRIPT
    import transformers

    assert transformers.AutoModelForCausalLM.from_pretrained("tuned").num_parameters() > 0


CONFIGS = {"sft": PAIRS, "dpo": PREFERENCES, "distil": [{"prompt": x["prompt"]} for x in PAIRS]}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_config_names_rows_and_model_and_its_run_is_exported_and_reported(method, folder, tmp_path, capfd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(x) + "\n" for x in CONFIGS[method]))
    argument = f"data={rows},model={folder},steps=2" + (f",teacher={folder}" if method == "distil" else "")
    short = ["--config.train.batch_size=4", "--config.evaluate.max_new_tokens=4", "--config.evaluate.examples=1"]
    # The random teacher rarely stops.
    short += ["--config.sample.temperature=1.0", "--config.data.held_out=0.2"] if method == "distil" else []
    command = ["train", f"--config={method}:{argument}", f"--workdir={tmp_path}/run", *short]
    assert main(command) == 0, capfd.readouterr().err
    assert main(["export", f"--run={tmp_path}/run", f"--out={tmp_path}/out"]) == 0, capfd.readouterr().err
    exported, start = qstar.load(tmp_path / "out"), qstar.load(folder)
    assert not same(exported, start)
    page = (tmp_path / "run/report.html").read_text()
    assert "Training loss" in page and "Held-out" in page
    rows.write_text(rows.read_text() + '{"prompt": "x", "completion": 3}\n')
    assert main([*command[:2], f"--workdir={tmp_path}/other", *short]) == 2
    assert f"{rows}:17: " in capfd.readouterr().err.splitlines()[-1] and not (tmp_path / "other").exists()


def test_the_documented_defaults_are_those_of_the_settings():
    for function in (api.fine_tune, api.prefer):
        assert "epochs (1)" in api.fine_tune.__doc__ and "batch_size (8)" in api.fine_tune.__doc__ and function.__doc__
    root = pathlib.Path(__file__).resolve().parents[2]
    assert all((root / "configs" / f"{name}.py").is_file() for name in CONFIGS)
