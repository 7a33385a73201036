"""What a terminal gets: other encodings than UTF-8, the version, tables that fit."""

import io
import os
import subprocess
import sys

import pytest

import qstar
from qstar.__main__ import main

TEXTS = ["Café", "漢字 👍", "half \udce9 a byte"]


def check(text, encoding, code, out, err):
    """The terminal shows the prompt, as far as its encoding can; half a byte is refused in one line."""
    said = err.decode(encoding)
    assert "Traceback" not in said and code == (2 if "half" in text else 0), said
    if code:
        assert len(said.splitlines()) == 1 and "\\udce9" in said
    else:
        assert out.startswith(text.encode(encoding, "backslashreplace")) and said == ""


def sample(text, shared):
    return ["sample", f"--model={shared('weights/stories260k')}", f"--prompt={text}", "--max-new-tokens=2"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_terminal_of_another_encoding(encoding, text, shared, monkeypatch):
    out, err = io.BytesIO(), io.BytesIO()
    for name, raw in (("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    check(text, encoding, main(sample(text, shared)), out.getvalue(), err.getvalue())


@pytest.mark.parametrize("text", TEXTS[1:])
def test_a_process_whose_terminal_has_another_encoding(text, shared):
    command = [sys.executable, "-m", "qstar", *sample(text, shared)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment)
    check(text, "ascii", done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version(flag, capfd):
    assert main([flag]) == 0
    assert capfd.readouterr().out == f"qstar {qstar.__version__}\n"
