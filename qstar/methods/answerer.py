"""Frozen answerers of LM-Guided CoT: a qstar model, a function or an OpenAI-compatible endpoint; greedy and cached.

    answerer = Cached(HttpAnswerer("http://localhost:8000/v1", model="flan-t5-xxl"), folder / "answers.jsonl")
    texts = [answer.text for answer in answerer.answer(prompts)]

In a run of several processes a model answers in all of them together. Process 0 alone calls functions and endpoints and
broadcasts the answers, so that all processes hold the same ones and the cache has one writer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qstar import distributed
from qstar.errors import Settings, UserError, bounded, pip_install, require
from qstar.files import append, warn
from qstar.models.model import Model
from qstar.sample.batching import generate

# Bytes of a reply; 64 answers take some hundred kilobytes.
MAX_REPLY = 64 << 20
MAX_REFUSED = 0.01  # share of the prompts that the endpoint may refuse (one always may) before the run stops
MAX_FIRST = 4  # prompts that it may refuse before it has answered any


class Answer(NamedTuple):
    """An answer with its log-probability."""

    text: str
    logprob: float  # sum over its tokens; 0 where the answerer reports none
    tokens: int  # generated; 0 where the answerer reports none


UNANSWERED = Answer("", 0.0, 0)  # to a prompt that the endpoint refused


class Answerer(Protocol):
    """Answers prompts greedily. `name`, of the model and its decoding options, is part of the cache's keys."""

    name: str

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """Returns an answer per prompt, in order."""


@dataclasses.dataclass
class ModelAnswerer:
    """A qstar model, sharded over its mesh or not."""

    model: Model
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    name: str = "model"
    slots: int | None = None  # prompts decoded in parallel, bounded by memory; answers do not depend on it

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop": self.stop, "slots": self.slots}
        # Greedy, so that an answer is a function of its prompt and can be cached.
        found = generate(self.model, prompts, temperature=0.0, **options)
        return [Answer((c.text or "").strip(), float(sum(c.logprobs)), len(c.tokens)) for (c,) in found]


@dataclasses.dataclass
class HttpAnswerer(Settings):
    """An endpoint of the OpenAI completions format (vLLM, SGLang, TGI): POST {url}/completions.

    The `openai` client makes the requests. It retries, with exponential back-off, connection errors, time-outs, HTTP
    408, 409, 429 and 5xx, incomplete replies, and errors in replies of HTTP 200. The key is OPENAI_API_KEY, unless
    `headers` has an Authorization.
    """

    url: str
    model: str
    max_new_tokens: int = bounded(32, ge=1)
    stop: tuple[str, ...] = ("\n",)
    batch: int = bounded(64, ge=1)  # prompts per request; at 1 a request holds a text, and no list
    retries: int = bounded(4, ge=0)
    timeout: float = bounded(120.0, gt=0)  # seconds per request, until the reply is complete
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        is_http = isinstance(self.url, str) and re.match(r"https?://[^/]", self.url)
        require((bool(is_http), f"url={self.url!r} is no http address, e.g. http://localhost:8000/v1"))
        self._asked = self._answered = self._refused = 0
        # The decoding options are part of the name, because the name is part of the cache's keys.
        self.name = f"{self.model}@{self.url} max_tokens={self.max_new_tokens} stop={list(self.stop)}"
        self._where = f"{self.url.rstrip('/')}/completions"
        self._client = _openai_client(self.url, self.headers, self.retries, self.timeout)

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """Raises UserError if the endpoint is away, refuses more than MAX_REFUSED, or replies in another format."""
        self._asked += len(prompts)
        parts = [list(prompts[i : i + self.batch]) for i in range(0, len(prompts), self.batch)]
        found = distributed.broadcast_from_host0(lambda: [a for part in parts for a in self._ask(part)])
        return [Answer(*a) for a in found]

    def _ask(self, prompts: list[str]) -> list[Answer]:
        # One prompt that is too long fails its whole request, so a refused batch is bisected down to such prompts.
        try:
            found = self._request(prompts)
        except _Refused as e:
            if len(prompts) > 1:
                half = len(prompts) // 2
                return self._ask(prompts[:half]) + self._ask(prompts[half:])
            found = [e]
        self._answered += sum(isinstance(a, Answer) for a in found)
        return [self._refuse(a) if isinstance(a, _Refused) else a for a in found]

    def _refuse(self, fault: _Refused) -> Answer:
        """Counts a refused prompt; raises UserError above the limits, else warns."""
        self._refused += 1
        line = f"answerer {self._where} refused {self._refused} of {self._asked} prompts {fault}"
        # If every prompt is refused, the request itself is at fault (the model's name, say).
        limit = max(1, min(MAX_REFUSED * self._asked, math.inf if self._answered else MAX_FIRST))
        if self._refused == self._asked or self._refused > limit:
            raise UserError(line)
        warn(f"{line}. Their answers are empty; above {MAX_REFUSED:.0%} the run stops")
        return UNANSWERED

    def _request(self, prompts: list[str]) -> list[Answer | _Refused]:
        import openai

        # The raw reply, because the client's classes do not validate fields; log-probabilities break ties in votes.
        options = dict(max_tokens=self.max_new_tokens, temperature=0, logprobs=1, stop=list(self.stop) or None)
        asked: Any = prompts if self.batch > 1 else prompts[0]
        try:
            reply = self._client.completions.with_raw_response.create(model=self.model, prompt=asked, **options)
            return _parse(json.loads(reply.http_response.content), len(prompts))
        except openai.APIStatusError as e:
            code, words = e.status_code, " ".join(e.response.text[:300].split())
            end = f"({e.response.headers['x-status']}{words}); {_advice(f'{code} {words}')}"
            if code in (400, 413, 422):
                raise _Refused(end) from None
            if code < 500 and code not in (408, 409, 429):
                raise UserError(f"answerer {self._where} refuses {end}") from None
            state = "away" if 502 <= code <= 504 else "failing"
        except openai.APIConnectionError as e:  # time-outs among them
            state, end = "away", f"({str(e.__cause__ or e) or type(e.__cause__).__name__}); start it, or check the url"
        except UnicodeEncodeError:
            raise _Refused("(half a surrogate pair, which has no UTF-8); remove it from the prompt") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"answerer {self._where}: {e}; it must speak the OpenAI completions format") from None
        raise UserError(f"answerer {self._where} is {state} after {self.retries + 1} attempts {end}")


def _openai_client(url: str, headers: dict[str, str], retries: int, timeout: float) -> Any:
    try:
        import openai
    except ImportError:
        raise UserError(f"url={url}: needs the openai client: `{pip_install('endpoint')}`") from None

    class BoundedClient(openai.DefaultHttpxClient):
        # httpx bounds the wait for each chunk, not for the whole reply, and the openai client does not retry replies
        # that break off. An incomplete reply becomes an HTTP 500, which it does retry; an error inside an HTTP 200 gets
        # its own status; a fault of the prompt, which some servers take for their own, becomes an HTTP 400.
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            deadline, body, fault = time.monotonic() + timeout, bytearray(), ""
            response = super().send(request, stream=True, **options)
            # Headers of the encoded body (length, compression) do not fit the decoded one below.
            kept = {k: v for k, v in response.headers.items() if k.lower() in ("content-type", "retry-after")}
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    fault = f"no complete reply within {timeout:g} s"
                # Not retried: another reply would be as large.
                if len(body) > MAX_REPLY:
                    fault, kept["x-should-retry"] = f"the reply is larger than {MAX_REPLY >> 20} MiB", "false"
                if fault:
                    break
            response.close()
            status, content = response.status_code, bytes(body)
            kept["x-status"] = f"HTTP {status} {response.reason_phrase}: "  # of the endpoint, for messages
            try:
                found = json.loads(content) if status == 200 and not fault else None
                error = found.get("error") if isinstance(found, dict) and not found.get("choices") else None
                if error:
                    code = error.get("code") if isinstance(error, dict) else None
                    status = code if type(code) is int and 400 <= code < 600 else 500
            except json.JSONDecodeError as e:
                fault = f"the reply is no JSON: {e}"
            except (ValueError, RecursionError):
                pass  # JSON that Python refuses; another request would not mend it, so `_parse` reports it
            if fault:
                status, content, kept["x-status"] = 500, fault.encode(), ""
            words = content[:300].decode("utf-8", "replace")
            if status >= 400 and re.search(_FILTERED if status < 500 else f"{_LONG}|{_FILTERED}", words, re.I):
                status = 400
            return type(response)(status, headers=kept, content=content, request=request)

    return openai.OpenAI(
        base_url=url,
        api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY",  # the client wants one; local servers take any
        default_headers=headers,
        max_retries=retries,
        timeout=timeout,
        http_client=BoundedClient(timeout=timeout),
    )


class _Refused(Exception):
    """The endpoint refuses a prompt: too long, filtered, or with characters that it does not take. Holds the advice."""


_LONG = r"context.?(length|window|size)|(prompt|input|tokens|sequence).{0,40}(long|large|exceed|less than|<=|length)"
_FILTERED = r"content.?(filter|management|policy)|moderati|flagged"
_ADVICE = (  # for the first pattern found in the status and the text of a reply
    (_FILTERED, "its content filter does not let such prompts pass"),
    (r"^40[13]", "set OPENAI_API_KEY, or headers, to a key that it accepts"),
    (r"^429", "its rate limit or quota is used up; wait, or raise it"),
    (rf"^413|{_LONG}", "shorten the prompts or max_new_tokens, or start the endpoint with a longer context"),
    (r"^50[234]", "a server is there, but not the model behind it; wait until it is loaded, or see the log"),
    (r"^5|^40[89]", "the server is there, but fails; see its log"),
    (r"logprob|string|array", "it must take logprobs=1 and, unless batch=1, lists of prompts"),
    (r"", "check the model's name and the url"),
)


def _advice(reason: str) -> str:
    return next(text for pattern, text in _ADVICE if re.search(pattern, reason, re.I))


def _parse(reply: Any, count: int) -> list[Answer | _Refused]:
    """Returns the answers of a reply, in the prompts' order; ValueError if it is not in the completions format."""
    # Servers differ in the fields that they leave out, so every field that is used is checked.
    raw = reply.get("choices") if isinstance(reply, dict) else None
    choices = raw if isinstance(raw, list) else []
    got = f"the reply holds {len(choices)} choices for {count} prompts"
    filtered = "its content filter took the answer, or it does not speak the OpenAI completions format"
    if raw == []:
        raise _Refused(f"({got}); {filtered}")
    if len(choices) != count:
        raise ValueError(got + "; if it takes no lists of prompts, set batch=1" * (count > 1))
    out: dict[int, Answer | _Refused] = {}
    # Servers may answer out of order: `index` is the prompt's number.
    for at, choice in enumerate(choices):
        text = choice.get("text", 0) if isinstance(choice, dict) else 0
        if text is not None and not isinstance(text, str):
            raise ValueError("a choice has no text")
        index, scores = choice.get("index", at), choice.get("logprobs") or {}
        # `type`, because JSON's true is an instance of int.
        if type(index) is not int:
            raise ValueError(f"a choice has the index {index!r:.40}")
        scores = (scores.get("token_logprobs") or []) if isinstance(scores, dict) else None
        if not isinstance(scores, list) or not all(x is None or _is_finite(x) for x in scores):
            raise ValueError("a choice's logprobs hold no list token_logprobs of finite numbers")
        if text is None or (not text and choice.get("finish_reason") == "content_filter"):
            out[index] = _Refused(f"(a choice has no text); {filtered}")
            continue
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8
        scores = [x for x in scores if x is not None]  # the first token of a prompt has none
        out[index] = Answer(text.strip(), float(sum(scores)), len(scores))
    if sorted(out) != list(range(count)):
        raise ValueError(f"the choices' indices are not 0 to {count - 1}")
    return [out[i] for i in range(count)]


def _is_finite(x: Any) -> bool:
    # Python's JSON reads NaN, Infinity and integers beyond float's range; `math.isfinite` overflows on the latter.
    return type(x) in (int, float) and -sys.float_info.max <= x <= sys.float_info.max


class Cached:
    """An answerer with a cache, since RL repeats prompts; with a file, the cache outlives the process.

    The file has a line of JSON per answer, keyed by a hash of the answerer's name and the prompt.
    """

    def __init__(self, inner: Answerer, file: Path | None = None):
        """Reads the answers of earlier runs."""
        self.inner, self.file, self.name = inner, file, inner.name
        self.asked = self.answered = 0
        self._known: dict[str, Answer] = {}
        if file is not None:
            found = distributed.broadcast_from_host0(functools.partial(_read_cache, file))
            self._known = {k: Answer(*a) for k, a in found.items()}

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        keys = [hashlib.sha256(f"{self.name}\0{p}".encode("utf-8", "surrogatepass")).hexdigest() for p in prompts]
        new = {k: p for k, p in zip(keys, prompts) if k not in self._known}
        self.asked, self.answered = self.asked + len(prompts), self.answered + len(new)
        if isinstance(self.inner, HttpAnswerer) and not self.inner._asked:
            # An earlier run's answers count: this one may have only refused prompts left to ask.
            self.inner._asked = self.inner._answered = len(set(keys)) - len(new)
        if new:
            found = dict(zip(new, self.inner.answer(list(new.values()))))
            self._known |= found
            if self.file is not None and distributed.is_first():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                # A killed process may have left half a line.
                is_torn = self.file.exists() and self.file.read_bytes()[-1:] not in (b"", b"\n")
                # Refused prompts are not stored, so that a later run asks them again, perhaps with a longer context.
                rows = [{"key": k, **a._asdict(), "crc": _crc(k, a)} for k, a in found.items() if a != UNANSWERED]
                append(self.file, ("\n" * is_torn + "".join(json.dumps(row) + "\n" for row in rows)).encode())
        return [self._known[k] for k in keys]


def _read_cache(file: Path) -> dict[str, Answer]:
    out: dict[str, Answer] = {}
    # Bytes, because a damaged line may not be UTF-8.
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            answer = Answer(row["text"], row["logprob"], row["tokens"])
            if not isinstance(answer.text, str) or not _is_finite(answer.logprob) or type(answer.tokens) is not int:
                raise ValueError
            if row.get("crc", _crc(row["key"], answer)) != _crc(row["key"], answer):
                raise ValueError
            out[row["key"]] = answer
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # A killed process may have left half a last line, which is no damage.
            if number < len(lines):
                warn(f"{file}:{number}: damaged; that prompt is asked again")
    return out


def _crc(key: str, answer: Answer) -> int:
    return zlib.crc32(json.dumps([key, *answer]).encode())
