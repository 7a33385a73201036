"""The frozen answerer: a qstar model, any function, or an HTTP endpoint; never trained, asked in batches, cached.

In a run of several processes a model answers in all of them together; a function or an endpoint is asked by the first one,
which tells the others: two processes never hear two different answers, and the cache has one writer.

answerer = Cached(HttpAnswerer("http://localhost:8000/v1", model="flan-t5-xxl"), folder / "answers.jsonl")
[answer.text for answer in answerer.answer(prompts)]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.client
import json
import os
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qstar import distributed
from qstar.errors import UserError, require
from qstar.files import warn
from qstar.models.model import Model
from qstar.sample.batching import generate


class Answer(NamedTuple):
    """What the answerer said, and how sure it was."""

    text: str
    logprob: float  # sum over its tokens; 0 where the answerer does not tell
    tokens: int  # that it wrote; 0 where it does not tell


class Answerer(Protocol):
    """Answers prompts greedily; `name` says who it is and how it was asked (it goes into the cache's keys)."""

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
    slots: int | None = None  # prompts read and answered side by side: what its caches take; no answer depends on it

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """See `Answerer`."""
        how = dict(max_new_tokens=self.max_new_tokens, temperature=0.0, stop=self.stop, slots=self.slots)
        found = generate(self.model, prompts, **how)
        return [Answer(c.text.strip(), float(sum(c.logprobs)), len(c.tokens)) for (c,) in found]


@dataclasses.dataclass
class FunctionAnswerer:
    """Any function from prompts to texts."""

    function: Callable[[Sequence[str]], Sequence[str]]
    name: str = "function"

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """See `Answerer`."""

        def ask() -> list[str]:
            texts = [str(t).strip() for t in self.function(prompts)]
            fault = f"answerer {self.name}: {len(texts)} answers to {len(prompts)} prompts; return one for each"
            require((len(texts) == len(prompts), fault))
            return texts

        return [Answer(t, 0.0, 0) for t in distributed.broadcast_from_host0(ask)]


@dataclasses.dataclass
class HttpAnswerer:
    """An endpoint that speaks the OpenAI completions format (vLLM, SGLang, TGI): POST {url}/completions."""

    url: str
    model: str
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    batch: int = 64  # prompts per request
    retries: int = 4  # after a failure that may pass: connection refused, 429, 5xx, a broken reply
    wait: float = 0.5  # seconds before the first retry; doubles
    timeout: float = 120.0  # seconds per request
    headers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        self._asked = self._refused = 0
        require(
            (isinstance(self.url, str), f"answerer url={self.url!r} must be a text, e.g. http://localhost:8000/v1"),
            *(
                (getattr(self, n) >= 1, f"answerer {n}={getattr(self, n)} must be at least 1")
                for n in ("batch", "max_new_tokens")
            ),
            *(
                (getattr(self, n) >= 0, f"answerer {n}={getattr(self, n)} must be 0 or more")
                for n in ("retries", "wait")
            ),
            (self.timeout > 0, f"answerer timeout={self.timeout} must be above 0 seconds"),
        )

    @property
    def name(self) -> str:
        """Who answers, and how it is asked."""
        return f"{self.model}@{self.url} max_tokens={self.max_new_tokens} stop={list(self.stop)}"

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """See `Answerer`.

        Raises:
          UserError: the endpoint is away, refuses (single prompts up to MAX_REFUSED are left out), or answers in
            another format; the line says which and what to do.
        """
        self._asked += len(prompts)
        parts = [list(prompts[at : at + self.batch]) for at in range(0, len(prompts), self.batch)]
        return [
            Answer(*a) for a in distributed.broadcast_from_host0(lambda: [a for part in parts for a in self._ask(part)])
        ]

    def _ask(self, prompts: list[str]) -> list[Answer]:
        """Asks; where the endpoint refuses prompts, halves the batch until it is known which, and leaves those out."""
        try:
            return self._request(prompts)
        except _Refused as e:
            if len(prompts) > 1:
                half = len(prompts) // 2
                return self._ask(prompts[:half]) + self._ask(prompts[half:])
            self._refused += 1
            line = f"answerer {self._where} refused {self._refused} of {self._asked} prompts ({e}); {_advice(str(e))}"
            if self._refused == self._asked or self._refused > max(1, MAX_REFUSED * self._asked):
                raise UserError(line) from None
            warn(f"{line}. Their answers are empty; above {MAX_REFUSED:.0%} the run stops")
            return [UNANSWERED]

    @property
    def _where(self) -> str:
        return f"{self.url.rstrip('/')}/completions"

    def _request(self, prompts: list[str]) -> list[Answer]:
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
            "logprobs": 1,
            "stop": list(self.stop) or None,
        }
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                status, why, content = _within(self.timeout, lambda: self._post(json.dumps(body).encode()))
                if status == 200:
                    return _read(json.loads(content), len(prompts))
                words = " ".join(content[:300].decode("utf-8", "replace").split())
                reason = f"HTTP {status} {why}: {words}"
                if status in (400, 413, 422):
                    raise _Refused(reason)
                if status != 429 and status < 500:
                    raise UserError(f"answerer {self._where} refuses ({reason}); {_advice(reason)}")
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as e:
                reason = str(getattr(e, "reason", e)) or type(e).__name__
            except (ValueError, RecursionError) as e:
                raise UserError(f"answerer {self._where}: {e}; it must speak the OpenAI completions format") from None
        raise UserError(
            f"answerer {self._where} is away after {self.retries + 1} attempts ({reason}); start it, or check the url"
        )

    def _post(self, body: bytes) -> tuple[int, str, bytes]:
        """Returns status, reason and content of the reply."""
        headers = {"Content-Type": "application/json", **dict(self.headers)}
        if "Authorization" not in headers and (key := os.environ.get("OPENAI_API_KEY")):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(self._where, body, headers, method="POST")
        except ValueError:
            raise UserError(f"answerer url {self.url!r} is no http address, e.g. http://localhost:8000/v1") from None
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                content = reply.read(MAX_REPLY + 1)
        except urllib.error.HTTPError as e:
            return e.code, str(e.reason), e.read(300)
        if len(content) > MAX_REPLY:
            raise ValueError(f"the reply is larger than {MAX_REPLY >> 20} MiB")
        return 200, "", content


MAX_REPLY = 64 << 20  # bytes of a reply: 64 answers take some hundred kilobytes
MAX_REFUSED = 0.01  # share of prompts that the endpoint may refuse (one always may) before the run stops
UNANSWERED = Answer("", 0.0, 0)  # to a prompt that the endpoint refused


class _Refused(Exception):
    """The endpoint refuses a request for what is in it: a prompt is too long, or holds something it does not take."""


def _advice(reason: str) -> str:
    """What to do about a refusal."""
    if reason.startswith(("HTTP 401", "HTTP 403")):
        return "set OPENAI_API_KEY, or headers, to a key that it accepts"
    if reason.startswith("HTTP 413") or re.search(r"context|length|too (long|large|many)|maximum|token", reason, re.I):
        return "shorten the prompts or max_new_tokens, or start the endpoint with a longer context"
    return "check the model's name and the url"


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """Returns what a function returns, or raises what it raises, within so many seconds.

    A socket's timeout bounds the wait for each byte, not for the whole reply. The thread of a function that takes too
    long is left behind; it ends with its connection.
    """
    done: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((function(), None))
        except BaseException as e:  # noqa: BLE001  raised again by who waits
            done.put((None, e))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no complete reply within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _read(reply: Any, count: int) -> list[Answer]:
    """Returns the answers in a reply, in the prompts' order.

    Raises:
      ValueError: it is not in the completions format.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        found = len(choices) if isinstance(choices, list) else 0
        raise ValueError(f"the reply holds {found} choices for {count} prompts")
    out: dict[int, Answer] = {}
    for at, choice in enumerate(choices):  # servers may answer out of order: `index` says whose it is
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise ValueError("a choice has no text")
        index, scores = choice.get("index", at), choice.get("logprobs") or {}
        if type(index) is not int:
            raise ValueError(f"a choice has the index {index!r:.40}")
        scores = (scores.get("token_logprobs") or []) if isinstance(scores, dict) else None
        if not isinstance(scores, list) or not all(x is None or _is_finite(x) for x in scores):
            raise ValueError("a choice's logprobs hold no list token_logprobs of finite numbers")
        text = choice["text"].encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8
        scores = [x for x in scores if x is not None]
        out[index] = Answer(text.strip(), float(sum(scores)), len(scores))
    if sorted(out) != list(range(count)):
        raise ValueError(f"the choices' indices are not 0 to {count - 1}")
    return [out[i] for i in range(count)]


def _is_finite(x: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return type(x) in (int, float) and -sys.float_info.max <= x <= sys.float_info.max


class Cached:
    """An answerer that is asked every prompt once: RL asks the same ones again and again.

    With a file, answers outlive the process (a line of JSON each, keyed by a hash of the answerer's name and the prompt).
    """

    def __init__(self, inner: Answerer, file: Path | None = None):
        """Reads what an earlier run was told; a last line that was cut off by a kill is passed over."""
        self.inner, self.file = inner, file
        self.name = inner.name
        self.asked = self.answered = 0
        self._known: dict[str, Answer] = {}
        if file is not None:
            self._known = {
                k: Answer(*a) for k, a in distributed.broadcast_from_host0(functools.partial(_read_cache, file)).items()
            }

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """See `Answerer`."""
        keys = [hashlib.sha256(f"{self.name}\0{p}".encode()).hexdigest() for p in prompts]
        new = {k: p for k, p in zip(keys, prompts) if k not in self._known}
        self.asked, self.answered = self.asked + len(prompts), self.answered + len(new)
        if new:
            found = dict(zip(new, self.inner.answer(list(new.values()))))
            self._known |= found
            if self.file is not None and distributed.is_first():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                torn = self.file.exists() and self.file.read_bytes()[-1:] not in (b"", b"\n")
                rows = [{"key": k, **a._asdict(), "crc": _crc(k, a)} for k, a in found.items() if a != UNANSWERED]
                with self.file.open("a", encoding="utf-8") as out:
                    out.write("\n" * torn + "".join(json.dumps(row) + "\n" for row in rows))
        return [self._known[k] for k in keys]


def _read_cache(file: Path) -> dict[str, Answer]:
    """Returns the answers in a cache; lines that are damaged are named and left out, so that they are asked for again."""
    out: dict[str, Answer] = {}
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
            if row is None:
                continue
            answer = Answer(row["text"], row["logprob"], row["tokens"])
            if not isinstance(answer.text, str) or not _is_finite(answer.logprob) or type(answer.tokens) is not int:
                raise ValueError
            if row.get("crc", _crc(row["key"], answer)) != _crc(row["key"], answer):
                raise ValueError
            out[row["key"]] = answer
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(lines):  # the last line may be one that a killed process was writing
                warn(f"{file}:{number}: damaged; that prompt is asked again")
    return out


def _crc(key: str, answer: Answer) -> int:
    """The checksum of a line of the cache."""
    return zlib.crc32(json.dumps([key, *answer]).encode())
