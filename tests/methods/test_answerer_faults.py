"""Endpoints that refuse, drip, flood or talk nonsense: the rest is answered, or one line says what to do."""

import http.server
import json
import threading
import time

import pytest

from qstar.errors import QstarWarning, UserError
from qstar.methods import answerer as A

CONTEXT = "This model's maximum context length is 512 tokens, you requested 600."


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, content = self.server.answer(body["prompt"])
        self.send_response(status)
        self.end_headers()
        if callable(content):
            content(self.wfile)
        else:
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    made = []

    def start(answer, **options):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.answer, server.daemon_threads = answer, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.append(server)
        return A.HttpAnswerer(f"http://127.0.0.1:{server.server_port}/v1", "m", **{"retries": 1, **options})

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def replies(prompts):
    return {"choices": [{"index": i, "text": f"to {p}"} for i, p in enumerate(prompts)]}


@pytest.mark.parametrize("at", [0, 31, 63])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_refused_prompt_does_not_end_the_run(serve, at, status, tmp_path):
    prompts = [f"p{i}" for i in range(64)]
    prompts[at] = "p" * 3000
    ask = serve(lambda ps: (status, CONTEXT.encode()) if any(len(p) > 600 for p in ps) else (200, replies(ps)))
    cached = A.Cached(ask, tmp_path / "a.jsonl")
    with pytest.warns(QstarWarning, match="refused 1 of 64 prompts.*longer context"):
        found = cached.answer(prompts)
    assert [a.text for a in found] == ["" if i == at else f"to p{i}" for i in range(64)]
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 63  # asked again by the next run


@pytest.mark.parametrize("status, words", [
    (400, "refused 1 of 1 prompts.*longer context"), (401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "model's name and the url"),
    (413, "shorten the prompts"), (422, "longer context"),
])  # fmt: skip
def test_a_refusal_says_what_to_do(serve, status, words):
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        serve(lambda ps: (status, CONTEXT.encode() if status != 404 else b"no such model")).answer(["p"])
    assert "\n" not in str(caught.value)


def test_many_refused_prompts_end_the_run(serve):
    ask = serve(lambda ps: (400, CONTEXT.encode()) if any(len(p) > 9 for p in ps) else (200, replies(ps)))
    with pytest.warns(QstarWarning), pytest.raises(UserError, match="refused 2 of 64 prompts"):
        ask.answer(["p"] * 62 + ["p" * 10, "p" * 11])


def drip(out):
    for _ in range(100):
        out.write(b" ")
        time.sleep(0.1)


def flood(out):
    for _ in range(100):
        out.write(b" " * (1 << 20))


def test_a_dripping_body_has_a_deadline(serve):
    began = time.monotonic()
    with pytest.raises(UserError, match="no complete reply within 0.5 s"):
        serve(lambda ps: (200, drip), timeout=0.5).answer(["p"])
    assert time.monotonic() - began < 8


def test_a_huge_body_is_not_read_whole(serve):
    with pytest.raises(UserError, match="larger than 64 MiB"):
        serve(lambda ps: (200, flood)).answer(["p"])


@pytest.mark.parametrize("choice", [
    {"index": None, "text": "x"}, {"index": "0", "text": "x"}, {"index": [0], "text": "x"}, {"index": True, "text": "x"},
    {"text": None}, {"text": ["x"]}, {"text": "x", "logprobs": [1]}, {"text": "x", "logprobs": "none"},
    {"text": "x", "logprobs": {"token_logprobs": "x"}}, {"text": "x", "logprobs": {"token_logprobs": [float("nan")]}},
    {"text": "x", "logprobs": {"token_logprobs": ["x"]}}, {"text": "x", "logprobs": {"token_logprobs": [10**400]}}, 7, None, "x",
])  # fmt: skip
def test_replies_of_wrong_types_are_one_line(serve, choice):
    with pytest.raises(UserError, match="OpenAI completions format"):
        serve(lambda ps: (200, {"choices": [choice]})).answer(["p"])


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000, b"null", b"5", b"[]", b'{"choices": {}}']
)
def test_replies_that_are_no_completions_are_one_line(serve, body):
    with pytest.raises(UserError):
        serve(lambda ps: (200, body)).answer(["p"])


def test_damaged_lines_of_a_cache_are_named_and_asked_again(tmp_path):
    file, asked = tmp_path / "a.jsonl", []
    ask = A.FunctionAnswerer(lambda ps: asked.extend(ps) or [f"to {p}" for p in ps])
    first = A.Cached(ask, file).answer(["1", "2", "3"])
    lines = file.read_text().splitlines()
    lines[1] = lines[1].replace("to 2", "to 9")  # one character, still JSON
    file.write_text("\n".join([*lines, "5", "[" * 100_000, "\x00"]) + "\n")
    with pytest.warns(QstarWarning, match="a.jsonl:2: damaged"):
        again = A.Cached(ask, file)
    assert again.answer(["1", "2", "3"]) == first and asked == ["1", "2", "3", "2"]


def test_a_cache_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    ask = A.FunctionAnswerer(lambda ps: [f"to {p}" for p in ps])
    first = A.Cached(ask, file).answer(["1"])
    row = json.loads(file.read_text())
    del row["crc"]
    file.write_text(json.dumps(row) + "\n")
    assert A.Cached(A.FunctionAnswerer(lambda ps: ["new"]), file).answer(["1"]) == first
