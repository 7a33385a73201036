"""Rewards of rationales, and the frozen answerer through a real local HTTP server."""

from __future__ import annotations

import http.server
import json
import threading

import numpy as np
import pytest
from conftest import shared

import qstar
from qstar.errors import UserError
from qstar.methods import answerer as A
from qstar.methods import guided_rewards as G
from qstar.tasks.aspects import ASPECTS, View, bare_answer, chosen

CONTEXT = ("Ada Lovelace: Ada Lovelace was born in London. She wrote notes. Lord Byron: Lord Byron died in "
           "Missolonghi in 1824.")  # fmt: skip
QUESTION = "Where did the father of Ada Lovelace die?"
GOOD = ("Ada Lovelace was born in London and she was the daughter of Lord Byron. Lord Byron was the father of Ada "
        "Lovelace. Lord Byron died in Missolonghi in 1824.")  # fmt: skip


def measure(rationale, **more):
    return {n: a(View(QUESTION, CONTEXT, rationale, **more)) for n, a in ASPECTS.items()}


def test_there_are_eight_aspects_all_versioned_and_in_range():
    assert len(ASPECTS) == 8 and all(a.version and a.measure.__doc__ for a in ASPECTS.values())
    for text in (
        GOOD,
        "",
        " ",
        "x",
        "." * 50,
        "Missolonghi",
        QUESTION,
        "the the the " * 200,
        "Ünï – «x»\n\n",
        GOOD * 20,
    ):
        for name, x in measure(text).items():
            assert 0.0 <= x <= 1.0, (name, text)
            assert text.strip(" .\n") or x == 0.0, name


@pytest.mark.parametrize("aspect, worse", [
    ("factuality", "Ada Lovelace died in Missolonghi with London notes. Byron wrote 1824 London."),
    ("relevance", "Someone was somewhere at some time and then something happened to somebody else."),
    ("logicality", "Bananas are yellow. London calls. Paris sleeps."),
    ("consistency", "Lord Byron died in Missolonghi. Lord Byron not died in Missolonghi."),
    ("coherence", "Bananas are yellow. London calls. Paris sleeps."),
    ("fluency", "Ada Lovelace was born in London and"),
    ("naturalness", "Missolonghi"),
    ("readability", "Missolonghi 1824."),
])  # fmt: skip
def test_every_aspect_tells_a_worse_rationale_from_a_good_one(aspect, worse):
    assert measure(GOOD)[aspect] > measure(worse)[aspect] + 0.1


def test_naturalness_falls_with_repetition_and_an_echo_of_the_question_has_none():
    assert measure(QUESTION)["naturalness"] == 0 and measure(GOOD * 10)["naturalness"] < 0.2
    assert measure(GOOD, mean_logprob=-0.1)["fluency"] > 0.9 > 0.2 > measure(GOOD, mean_logprob=-6.0)["fluency"]


@pytest.mark.parametrize("rationale, answer, bare", [
    ("Missolonghi", "Missolonghi", True), ("The answer: Missolonghi.", "Missolonghi", True), (GOOD, "Missolonghi", False),
    ("", "", False), ("London", "Missolonghi", False), ("yes", "yes", True),
])  # fmt: skip
def test_bare_answers_are_told_from_rationales(rationale, answer, bare):
    assert bare_answer(rationale, answer) == bare


def echo(prompts):
    """Answers with the last word before the slot: an answerer that copies."""
    return [p.removesuffix(" Answer:").split()[-1].strip(".") for p in prompts]


def test_scores_are_the_weighted_sum_and_the_guard_takes_the_reward_of_smuggled_answers():
    texts = [GOOD, "Missolonghi", "He died in London after he had written many long letters home."]
    views = [View(QUESTION, CONTEXT, t) for t in texts]
    prompts = [f"{t.removesuffix(' in 1824.')} Answer:" for t in texts]
    weights = {"factuality": 1.0, "relevance": 3.0, "fluency": 0.0}
    golds, found = ["missolonghi"] * 3, {}
    for guard in (True, False):
        s = G.RewardSettings(accuracy=2.0, aspect=0.5, aspects=weights, guard=guard)
        scored, answers = G.rationale_scores(s, views, prompts, golds, A.FunctionAnswerer(echo))
        assert [a.text for a in answers] == ["Missolonghi", "Missolonghi", "home"]
        np.testing.assert_allclose(scored.parts["bare"], [0, 1, 0])
        expected = (scored.parts["aspect/factuality"] + 3 * scored.parts["aspect/relevance"]) / 4
        np.testing.assert_allclose(scored.parts["aspect"], expected, atol=1e-6)
        np.testing.assert_allclose(scored.scores, 2 * scored.parts["accuracy"] + 0.5 * expected, atol=1e-6)
        assert scored.scores.dtype == np.float32 and "aspect/fluency" not in scored.parts
        found[guard] = scored.parts["accuracy"].tolist()
    assert found == {True: [1, 0, 0], False: [1, 1, 0]}
    assert G.versions(s) == {"factuality": "1", "relevance": "1"}


def test_an_aspect_reward_alone_never_asks_the_answerer():
    def never(prompts):
        raise AssertionError

    s = G.RewardSettings(accuracy=0.0)
    scored, answers = G.rationale_scores(s, [View(QUESTION, CONTEXT, GOOD)], ["p"], ["x"], A.FunctionAnswerer(never))
    assert answers == [] and scored.scores[0] == scored.parts["aspect"][0] > 0.5
    assert [G.task_score("in Cork city", "Cork", m) for m in G.METRICS] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("wrong, word", [
    (dict(metric="bleu"), "metric"), (dict(accuracy=0, aspect=0), "nothing to reward"),
    (dict(aspects={"beauty": 1}), "beauty"), (dict(aspects={}), "none weighs"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_named(wrong, word):
    with pytest.raises(UserError, match=word):
        G.RewardSettings(**wrong)
    assert chosen({"fluency": 0.0}) == {}


# --------------------------------------------------------------------------------------------------- over HTTP


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
