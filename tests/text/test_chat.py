"""Chat templates: ids against transformers' `apply_chat_template`, loss masks, end of turn, errors."""

import copy
import json

import numpy as np
import pytest

from qstar.errors import QstarWarning, UserError
from qstar.text import chat_example, load_tokenizer, pack
from tests.text.kinds import tokenizer

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = ZEPHYR.replace(
    "{{ m.content }}{{ eos_token }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}",
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
CASES = [(kind, None) for kind in REAL] + [(k, t) for k in ("stories260k", "mistral") for t in (INST, ZEPHYR, PLAIN)]
TALK = [
    {"role": "user", "content": "What is 13 + 29?\n\nThink."},
    {"role": "assistant", "content": "13 + 29 = 42."},
    {"role": "user", "content": "And 7 more?"},
    {"role": "assistant", "content": "  49, é"},
]


def with_template(kind, template):
    made = copy.copy(tokenizer(kind))
    if template is not None:
        made.hf = copy.deepcopy(made.hf)
        made.hf.chat_template = template
        made.__dict__.pop("chat", None)
    return made


@pytest.mark.parametrize(("kind", "template"), CASES)
def test_a_conversation_has_the_ids_of_transformers(kind, template):
    tok = with_template(kind, template)
    for messages in (TALK[:1], TALK[:3]):
        theirs = tok.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = tok.chat.render(messages)
        assert tok.encode(text) == theirs
        # A prompt gets a BOS elsewhere; a rendered one has that of its template alone.
        assert tok.encode_prompt(text) == theirs
        assert tok.encode_pair(text, "So")[0] == theirs


@pytest.mark.parametrize(("kind", "template"), [*CASES, ("mistral", MARKED)])
def test_loss_is_on_the_replies_and_their_end_tokens_alone(kind, template):
    tok = with_template(kind, template)
    ids, mask = tok.chat.encode(TALK)
    assert ids == tok.hf.apply_chat_template(TALK, return_dict=False)
    end = tok.chat.turn.end_id
    learnt = [i for i, m in zip(ids, mask) if m]
    assert tok._backend.decode(learnt, skip_special_tokens=True).split() == "13 + 29 = 42. 49, é".split()
    assert sum(i == end for i in learnt) == (0 if template is PLAIN else 2)


def test_marks_of_a_template_give_the_same_mask_as_prefix_differences():
    marked, plain = (with_template("mistral", template).chat.encode(TALK) for template in (MARKED, ZEPHYR))
    assert marked == plain


@pytest.mark.parametrize(
    "template", [INST, ZEPHYR, PLAIN, ZEPHYR.replace("<|assistant|>\n{% end", "<|assistant|>\n<think>\n{% end")]
)
def test_all_of_a_reply_is_learnt_and_nothing_in_front_of_it(template):
    tok = with_template("stories260k", template)
    # The conversation begins with the assistant; the second reply with the letter of <think>, which prompts alone have.
    talk = [{"role": "assistant", "content": "Hi."}, *TALK[2:3], {"role": "assistant", "content": "<answer>49"}]
    ids, mask = tok.chat.encode(talk)
    close = "" if template is PLAIN else tok.hf.eos_token
    learnt = tok._backend.decode([i for i, m in zip(ids, mask) if m], skip_special_tokens=False)
    assert "".join(learnt.split()) == f"Hi.{close}<answer>49{close}"


def test_what_a_template_leaves_out_is_named():
    tok = with_template("stories260k", INST.replace("{% else %}", "{% elif m.role == 'assistant' %}"))
    with pytest.raises(
        UserError, match="message 0: .* leaves out messages of the role 'User'; the roles are system, user"
    ):
        tok.chat.render([{"role": "User", "content": "And 7 more?"}])
    with pytest.warns(QstarWarning, match="leaves out messages of the role 'system', so that the prompt lacks them"):
        tok.chat.render([{"role": "system", "content": "Be brief."}, *TALK])
    shouting = with_template("stories260k", INST.replace("m.content", "m.content | upper"))
    assert "MORE" in shouting.chat.render(TALK[:3])


def test_a_template_that_demands_a_system_message_has_turns():
    tok = with_template("mistral", ZEPHYR)
    demanding = with_template(
        "mistral", "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + ZEPHYR
    )
    assert demanding.chat.turn[1:] == tok.chat.turn[1:]
    assert demanding.encode_prompt(demanding.chat.render([{"role": "system", "content": "a"}, *TALK]))[0] != tok.bos_id


def test_end_of_turn_is_read_from_the_template():
    tok = tokenizer("qwen2.5-coder-0.5b-instruct")
    turn = tok.chat.turn
    assert (turn.after, turn.close) == ("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
    gemma = with_template("gemma-3-270m", "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n"
                          "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}"
                          "<start_of_turn>model\n{% endif %}")  # fmt: skip
    end = gemma.hf.convert_tokens_to_ids("<end_of_turn>")
    # EOS of this family is another token, and ends texts.
    assert gemma.end_of(gemma.chat.render(TALK[:1])) == end != gemma.end_of("Once upon") == gemma.eos_id


def test_a_reply_that_is_written_with_its_end_gets_no_second_one():
    tok = with_template("stories260k", ZEPHYR.replace("eos_token", "unk_token"))
    prompt, plain = tok.chat.render(TALK[:1]), tok.encode("So 42.")
    assert tok.ended(plain, prompt) == tok.ended(tok.encode("So 42.<unk>"), prompt) == [*plain, tok.chat.turn.end_id]
    # EOS ends it, too. The end of a turn does not end any other text.
    assert tok.ended(tok.encode("So 42.</s>"), prompt) == [*plain, tok.eos_id]
    assert tok.ended(tok.encode("So 42.<unk>"), "Q:") == [*plain, tok.chat.turn.end_id, tok.eos_id]


def test_documents_of_conversations_are_packed_with_their_masks():
    tok = with_template("mistral", ZEPHYR)
    one, two = chat_example(tok, TALK[:2]), chat_example(tok, TALK)
    assert one.loss is None and two.loss is not None
    rows = pack([two], 256)
    ids, mask = tok.chat.encode(TALK)
    n = len(two)
    assert rows["tokens"][0, :n].tolist() == ids[:n] and rows["mask"][0, :n].tolist() == mask[:n]
    assert sum(mask[n:]) == 0 and two.completion[-1] == tok.chat.turn.end_id
    assert pack([two], 256, loss_on_prompt=True)["mask"].sum() == n - 1
    assert np.array_equal(pack([one], 256)["mask"][0, : len(one)], [0] * len(one.prompt) + [1] * len(one.completion))


def test_a_template_that_moves_earlier_turns_is_refused_for_training():
    # As Mistral's of 2024: the system message stands before the last question.
    moved = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index > messages|length - 2 %}SYS {% endif %}"
        "{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tok = with_template("mistral", moved)
    tok.chat.encode(TALK[:2])
    with pytest.raises(UserError, match="message 1: .*writes earlier turns otherwise"):
        tok.chat.encode(TALK)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "at least one"),
        ([{"role": "user"}], "message 0 must be"),
        ([{"role": "user", "content": "a"}, "b"], "message 1 must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 must be"),
    ],
)
def test_what_is_no_message_is_named(messages, fault):
    with pytest.raises(UserError, match=fault):
        with_template("mistral", ZEPHYR).chat.render(messages)


def test_errors_of_templates_are_one_line():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tok = with_template("mistral", refusing)
    with pytest.raises(UserError, match="refuses messages of the roles system: System role not supported"):
        tok.chat.render([{"role": "system", "content": "a"}])
    # The sandbox: no attribute of Python's internals.
    tok = with_template("mistral", "{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="unsafe|access"):
        tok.chat.render(TALK[:1])
    # A template that cannot even be read leaves plain texts alone.
    tok = with_template("stories260k", "{% for %}")
    assert tok.end_of("Once") == tok.eos_id and tok.encode("Once", bos=True)[0] == tok.bos_id
    with pytest.raises(UserError, match="no chat template"):
        chat_example(tokenizer("stories260k"), TALK)


def test_named_templates_are_read_and_saved(tmp_path, shared):
    source = shared("weights/stories260k")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(PLAIN)
    tok = load_tokenizer(tmp_path)
    text = tok.chat.render(TALK)
    assert text == with_template("stories260k", ZEPHYR).chat.render(TALK)
    tok.save(tmp_path / "copy")
    assert sorted(load_tokenizer(tmp_path / "copy").hf.chat_template) == ["default", "tool_use"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": ZEPHYR}, {"name": "rag", "template": PLAIN}]
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).chat.render(TALK) == text
