"""The README: its length, its quick start in Python, and the flags of its commands."""

import contextlib
import pathlib
import re

import jax
import pytest

import qstar
from qstar.__main__ import COMMANDS, main
from qstar.models.config import ModelConfig
from qstar.models.scoring import init
from qstar.text.tokenizer import char_tokenizer

README = (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for m in messages %}{{ '<' if m.role == 'user' else '>' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_quick_start_runs_as_it_stands_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "qstar.load(" in b)
    assert len(code.splitlines()) < 20
    tokenizer = char_tokenizer("0123456789+=<>_\n", pad="_", eos="\n")
    tokenizer.hf.chat_template = TEMPLATE
    config = ModelConfig(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, hidden_size=32, num_layers=1)
    monkeypatch.chdir(tmp_path)
    qstar.save(qstar.Model(config, init(config, jax.random.key(0)), tokenizer), "tiny")
    data = [(f"{a}+{b}", str(a + b)) for a in range(4) for b in range(4)]
    rows = [{"prompt": q, "completion": a} for q, a in data]
    qstar.fine_tune(qstar.load("tiny"), rows, steps=1, workdir="runs/star_arithmetic", quiet=True)
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny")
    exec(compile(code, "README.md", "exec"), names := {"data": data})  # noqa: S102  our own text
    assert (tmp_path / "tuned" / "config.json").is_file() and len(names["run"].metrics) > 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`qstar (\w+)", README))))
def test_its_commands_and_their_flags_exist(command, capsys):
    assert command in COMMANDS
    with contextlib.suppress(SystemExit):  # argparse ends the process after its help
        main([command, "--help"])
    text = capsys.readouterr().out
    used = {f for line in re.findall(rf"`qstar {command}([^`]*)`", README) for f in re.findall(r"--[a-z][\w-]*", line)}
    assert not [flag for flag in used if flag not in text]
