"""Frozen answerers: endpoints (real local HTTP servers) that answer, refuse, drip, flood or reply nonsense; the cache."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time

import pytest
from conftest import shared

import qstar
from qstar.errors import QstarWarning, UserError
from qstar.methods import answerer as A
from tests.methods.stub import FunctionAnswerer


def echo(prompts):
    """Answers with the last word before the slot."""
    return [p.removesuffix(" Answer:").split()[-1].strip(".") for p in prompts]


class Server(http.server.ThreadingHTTPServer):
    """Speaks the completions format; answers out of order; fails as often as it is told to."""

    def __init__(self, failures=(), answer=echo):
        self.failures, self.answer, self.bodies = list(failures), answer, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions"
        self.server.bodies.append(body)
        if self.server.failures:
            failure = self.server.failures.pop(0)
            if failure == "broken":
                return self.reply(200, b'{"choices": [')
            if isinstance(failure, dict):
                return self.reply(200, json.dumps(failure).encode())
            return self.reply(failure, b"model not loaded")
        texts = self.server.answer(body["prompt"])
        scores = {"token_logprobs": [None, -0.5, -0.25]}
        choices = [{"index": i, "text": f" {t}\n", "logprobs": scores} for i, t in enumerate(texts)]
        self.reply(200, json.dumps({"choices": choices[::-1]}).encode())

    def reply(self, code, content):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    made = []

    def start(*args, **kwargs):
        made.append(Server(*args, **kwargs))
        return made[-1]

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def client(server, **options):
    return A.HttpAnswerer(server.url, "big", **options)


def test_an_endpoint_is_asked_in_batches_and_its_order_does_not_matter(serve):
    server = serve()
    found = client(server, batch=2, max_new_tokens=5).answer([f"x {i} Answer:" for i in range(5)])
    assert found == [A.Answer(str(i), -0.75, 2) for i in range(5)]
    assert [len(b["prompt"]) for b in server.bodies] == [2, 2, 1]
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stop"]) == ("big", 5, 0, ["\n"])


def test_failures_that_may_pass_are_tried_again(serve):
    server = serve([500, 429, "broken"])
    assert client(server).answer(["x 1 Answer:"])[0].text == "1" and len(server.bodies) == 4


def test_failures_that_stay_are_one_clear_line(serve):
    with pytest.raises(UserError, match="HTTP 404.*model not loaded"):
        client(serve([404])).answer(["x"])
    with pytest.raises(UserError, match="away after 3 attempts.*HTTP 503"):
        client(serve([503] * 3), retries=2).answer(["x"])
    with pytest.raises(UserError, match="0 choices for 1 prompts.*OpenAI"):
        client(serve([{"choices": []}])).answer(["x"])
    gone = serve()
    gone.shutdown()
    gone.server_close()
    with pytest.raises(UserError, match="is away after 2 attempts.*refused"):
        client(gone, retries=1).answer(["x"])
    with pytest.raises(UserError, match="no http address"):
        A.HttpAnswerer("localhost", "big").answer(["x"])


def test_without_the_openai_client_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'qstar-jax\[endpoint\]'"):
        A.HttpAnswerer("http://localhost:8000/v1", "big")


def test_the_cache_asks_every_prompt_once_in_this_process_and_the_next(serve, tmp_path):
    server, file = serve(), tmp_path / "a" / "answers.jsonl"
    cached = A.Cached(client(server), file)
    first = cached.answer(["x 1 Answer:", "x 2 Answer:", "x 1 Answer:"])
    assert [a.text for a in first] == ["1", "2", "1"] and [len(b["prompt"]) for b in server.bodies] == [2]
    with file.open("a") as out:
        out.write('{"key": "cut o')  # a kill
    again = A.Cached(client(server), file)
    assert again.answer(["x 2 Answer:", "x 1 Answer:"]) == [first[1], first[0]] and len(server.bodies) == 1
    other = A.Cached(client(server, max_new_tokens=3), file)  # asked otherwise: another key
    other.answer(["x 1 Answer:"])
    assert len(server.bodies) == 2 and (other.asked, other.answered) == (1, 1)


def test_a_qstar_model_is_an_answerer_too():
    model = qstar.load(shared("weights/stories260k"))
    found = A.ModelAnswerer(model, max_new_tokens=6, stop=(".",)).answer(
        ["Once upon a time, there was a", "One day, a"]
    )
    again = A.ModelAnswerer(model, max_new_tokens=6, stop=(".",)).answer(["One day, a"])
    assert all(a.text and a.logprob < 0 for a in found) and again[0].text == found[1].text


# ------------------------------------------------------------------------------------------------- faults

CONTEXT = "This model's maximum context length is 512 tokens, you requested 600."


class RawHandler(http.server.BaseHTTPRequestHandler):
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
def reply():
    made = []

    def start(answer, **options):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RawHandler)
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
def test_one_refused_prompt_does_not_end_the_run(reply, at, status, tmp_path):
    prompts = [f"p{i}" for i in range(64)]
    prompts[at] = "p" * 3000
    ask = reply(lambda ps: (status, CONTEXT.encode()) if any(len(p) > 600 for p in ps) else (200, replies(ps)))
    cached = A.Cached(ask, tmp_path / "a.jsonl")
    with pytest.warns(QstarWarning, match="refused 1 of 64 prompts.*longer context"):
        found = cached.answer(prompts)
    assert [a.text for a in found] == ["" if i == at else f"to p{i}" for i in range(64)]
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 63  # asked again by the next run


FILTERED = {"text": "", "finish_reason": "content_filter"}


@pytest.mark.parametrize("bad, says", [
    ((500, CONTEXT.encode()), "HTTP 500 .*longer context"), ((200, {"error": {"code": 400, "message": CONTEXT}}), "HTTP 200 .*longer context"),
    ((500, b"input is too large to process. increase the physical batch size"), "shorten the prompts"),
    ((400, {"error": {"code": "content_filter"}}), "its content filter"), ((403, b"your input was flagged"), "its content filter"),
    ((200, {"choices": []}), "0 choices for 1 prompts.*content filter"),
    ({"text": None}, "has no text.*content filter"), (FILTERED, "has no text.*content filter"), (None, "half a surrogate pair"),
])  # fmt: skip
def test_one_prompt_that_gets_no_answer_does_not_end_the_run(reply, bad, says, tmp_path):
    prompts, requests = [f"p{i}" for i in range(200)], []
    prompts[70] = "bad" if bad else "\ud83d"

    def answer(ps):
        requests.append(ps)
        if "bad" in ps and isinstance(bad, tuple):
            return bad
        return 200, {"choices": [c | bad if p == "bad" else c for p, c in zip(ps, replies(ps)["choices"])]}

    ask, began = A.Cached(reply(answer, retries=4), tmp_path / "a.jsonl"), time.monotonic()
    with pytest.warns(QstarWarning, match=f"refused 1 of 200 prompts.*{says}"):
        found = ask.answer(prompts)
    assert [a.text for a in found] == ["" if i == 70 else f"to p{i}" for i in range(200)]
    assert len(requests) <= 16 and time.monotonic() - began < 8  # 13 of them bisect a batch; none is tried again
    again = A.Cached(ask.inner.replace(), tmp_path / "a.jsonl")  # asks that prompt alone
    with pytest.warns(QstarWarning, match="refused 1 of 200 prompts"):
        assert again.answer(prompts) == found and again.answered == 1


@pytest.mark.parametrize("bad", [(400, b"logprobs?"), (500, CONTEXT.encode()), (200, {"choices": []}), {"text": None}])
def test_an_endpoint_that_refuses_all_prompts_is_noticed_at_once(reply, bad):
    requests = []

    def answer(ps):
        requests.append(ps)
        return bad if isinstance(bad, tuple) else (200, {"choices": [bad] * len(ps)})

    with pytest.warns(QstarWarning) as told, pytest.raises(UserError, match=r"refused 5 of 10000 prompts \(.*\); "):
        reply(answer).answer(["p"] * 10_000)
    assert len(requests) < 20 and len(told) == 4


@pytest.mark.parametrize("status, content, says", [
    (429, {"error": {"code": "insufficient_quota"}}, "is failing after 1 attempts .HTTP 429 .*insufficient_quota.*; its rate limit or quota"),
    (429, b"too many tokens per minute: prompts are too long", "; its rate limit or quota"),
    (500, b"CUDA error", "is failing after 1 attempts .HTTP 500 .*CUDA error.; the server is there, but fails; see its log"),
    (503, b"loading", "HTTP 503 .*loading.; a server is there, but not the model"), (504, b"context deadline exceeded", "HTTP 504 .*; a server is there"),
    (200, {"error": {"message": "model overloaded"}}, "is failing after 1 attempts .HTTP 200 .*model overloaded.*see its log"),
    (200, {"error": "no such key"}, "no such key"),
    (200, {"error": {"message": "busy", "code": 5}}, "is failing after .*busy"), (200, {"error": {"code": 401}}, "OPENAI_API_KEY"),
    (400, b"logprobs is not supported", "it must take logprobs=1"), (400, b"prompt must be a string", "unless batch=1, lists of prompts"),
    (200, {"choices": [{"text": "x"}]}, "holds 1 choices for 2 prompts; if it takes no lists of prompts, set batch=1"),
])  # fmt: skip
def test_a_fault_of_the_endpoint_says_which(reply, status, content, says):
    with pytest.raises(UserError, match=says) as e:
        reply(lambda ps: (status, content), retries=0).answer(["p"] * (2 if "2 prompts" in says else 1))
    assert "\n" not in str(e.value) and "the url" not in str(e.value)


def test_an_error_in_a_good_reply_is_tried_again(serve):
    server = serve([{"error": {"message": "overloaded"}}])
    assert client(server).answer(["x 1 Answer:"])[0].text == "1" and len(server.bodies) == 2


def test_a_server_without_lists_of_prompts_is_asked_one_by_one(reply):
    ask = reply(lambda p: (200, {"choices": [{"text": f"to {p}"}]}) if isinstance(p, str) else (400, b""), batch=1)
    assert [a.text for a in ask.answer(["p", "q"])] == ["to p", "to q"]


@pytest.mark.parametrize("status, words", [
    (400, "refused 1 of 1 prompts.*longer context"), (401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "model's name and the url"),
    (413, "shorten the prompts"), (422, "longer context"),
])  # fmt: skip
def test_a_refusal_says_what_to_do(reply, status, words):
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        reply(lambda ps: (status, CONTEXT.encode() if status != 404 else b"no such model")).answer(["p"])
    assert "\n" not in str(caught.value)


def test_many_refused_prompts_end_the_run(reply):
    ask = reply(lambda ps: (400, CONTEXT.encode()) if any(len(p) > 9 for p in ps) else (200, replies(ps)))
    with pytest.warns(QstarWarning), pytest.raises(UserError, match="refused 2 of 64 prompts"):
        ask.answer(["p"] * 62 + ["p" * 10, "p" * 11])


def test_refused_prompts_within_the_share_do_not_end_the_run(reply):
    ask = reply(lambda ps: (400, CONTEXT.encode()) if any(len(p) > 9 for p in ps) else (200, replies(ps)))
    with pytest.warns(QstarWarning, match="refused 6 of 1000 prompts"):
        assert ask.answer(["p"] * 994 + ["p" * 10] * 6)[993:] == [A.Answer("to p", 0.0, 0)] + [A.UNANSWERED] * 6


def drip(out):
    for _ in range(100):
        out.write(b" ")
        time.sleep(0.1)


def flood(out):
    for _ in range(100):
        out.write(b" " * (1 << 20))


def test_a_dripping_body_has_a_deadline(reply):
    began = time.monotonic()
    with pytest.raises(UserError, match="no complete reply within 0.5 s"):
        reply(lambda ps: (200, drip), timeout=0.5).answer(["p"])
    assert time.monotonic() - began < 8


def test_a_huge_body_is_not_read_whole(reply):
    with pytest.raises(UserError, match="larger than 64 MiB"):
        reply(lambda ps: (200, flood)).answer(["p"])


@pytest.mark.parametrize("choice", [
    {"index": None, "text": "x"}, {"index": "0", "text": "x"}, {"index": [0], "text": "x"}, {"index": True, "text": "x"},
    {"text": None}, {"text": ["x"]}, {"text": "x", "logprobs": [1]}, {"text": "x", "logprobs": "none"},
    {"text": "x", "logprobs": {"token_logprobs": "x"}}, {"text": "x", "logprobs": {"token_logprobs": [float("nan")]}},
    {"text": "x", "logprobs": {"token_logprobs": ["x"]}}, {"text": "x", "logprobs": {"token_logprobs": [10**400]}}, 7, None, "x",
])  # fmt: skip
def test_replies_of_wrong_types_are_one_line(reply, choice):
    with pytest.raises(UserError, match="OpenAI completions format"):
        reply(lambda ps: (200, {"choices": [choice]})).answer(["p"])


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000, b"null", b"5", b"[]", b'{"choices": {}}']
)
def test_replies_that_are_no_completions_are_one_line(reply, body):
    with pytest.raises(UserError):
        reply(lambda ps: (200, body)).answer(["p"])


def test_damaged_lines_of_a_cache_are_named_and_asked_again(tmp_path):
    file, asked = tmp_path / "a.jsonl", []
    ask = FunctionAnswerer(lambda ps: asked.extend(ps) or [f"to {p}" for p in ps])
    first = A.Cached(ask, file).answer(["1", "2", "3"])
    lines = file.read_text().splitlines()
    lines[1] = lines[1].replace("to 2", "to 9")  # one character, still JSON
    file.write_text("\n".join([*lines, "5", "[" * 100_000, "\x00"]) + "\n")
    with pytest.warns(QstarWarning, match="a.jsonl:2: damaged"):
        again = A.Cached(ask, file)
    assert again.answer(["1", "2", "3"]) == first and asked == ["1", "2", "3", "2"]


def test_a_cache_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    ask = FunctionAnswerer(lambda ps: [f"to {p}" for p in ps])
    first = A.Cached(ask, file).answer(["1"])
    row = json.loads(file.read_text())
    del row["crc"]
    file.write_text(json.dumps(row) + "\n")
    assert A.Cached(FunctionAnswerer(lambda ps: ["new"]), file).answer(["1"]) == first
