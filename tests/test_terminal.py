"""What a terminal gets: other encodings than UTF-8, the version, tables that fit."""

import os
import subprocess
import sys

import pytest

import qstar
from qstar.__main__ import main


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("text", ["Café", "漢字 👍", "half \udce9 a byte"])
def test_a_terminal_of_another_encoding(encoding, text, shared):
    command = [sys.executable, "-m", "qstar", "sample", f"--model={shared('weights/stories260k')}", f"--prompt={text}"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "--max-new-tokens=2"], capture_output=True, env=environment)
    said = done.stderr.decode(encoding)
    assert "Traceback" not in said and done.returncode == (2 if "half" in text else 0), said
    if done.returncode:
        assert len(said.splitlines()) == 1 and "\\udce9" in said
    else:
        assert done.stdout.startswith(text.encode(encoding, "backslashreplace")) and said == ""


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version(flag, capfd):
    assert main([flag]) == 0
    assert capfd.readouterr().out == f"qstar {qstar.__version__}\n"
