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
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qstar import processes
from qstar.errors import UserError, require
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

        return [Answer(t, 0.0, 0) for t in processes.from_first(ask)]


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

    @property
    def name(self) -> str:
        """Who answers, and how it is asked."""
        return f"{self.model}@{self.url} max_tokens={self.max_new_tokens} stop={list(self.stop)}"

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """See `Answerer`.

        Raises:
          UserError: the endpoint is away, refuses, or answers in another format; the line says which and what to do.
        """
        parts = [list(prompts[at : at + self.batch]) for at in range(0, len(prompts), self.batch)]
        return [Answer(*a) for a in processes.from_first(lambda: [a for part in parts for a in self._ask(part)])]

    def _ask(self, prompts: list[str]) -> list[Answer]:
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
            "logprobs": 1,
            "stop": list(self.stop) or None,
        }
        where, reason = f"{self.url.rstrip('/')}/completions", ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                return self._read(self._post(where, body), len(prompts), where)
            except urllib.error.HTTPError as e:
                reason = f"HTTP {e.code} {e.reason}: {_first_words(e)}"
                if e.code != 429 and e.code < 500:
                    raise UserError(
                        f"answerer {where} refuses ({reason}); check the model's name and the url"
                    ) from None
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as e:
                reason = str(getattr(e, "reason", e)) or type(e).__name__
            except ValueError as e:
                raise UserError(f"answerer {where}: {e}; it must speak the OpenAI completions format") from None
        raise UserError(
            f"answerer {where} is away after {self.retries + 1} attempts ({reason}); start it, or check the url"
        )

    def _post(self, where: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", **dict(self.headers)}
        try:
            request = urllib.request.Request(where, json.dumps(body).encode(), headers, method="POST")
        except ValueError:
            raise UserError(f"answerer url {self.url!r} is no http address, e.g. http://localhost:8000/v1") from None
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return json.loads(reply.read())

    def _read(self, reply: Any, count: int, where: str) -> list[Answer]:
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or len(choices) != count:
            raise ValueError(f"the reply holds {len(choices or ())} choices for {count} prompts")
        out: dict[int, Answer] = {}
        for at, choice in enumerate(choices):  # servers may answer out of order: `index` says whose it is
            if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
                raise ValueError("a choice has no text")
            scores = [x for x in (choice.get("logprobs") or {}).get("token_logprobs") or () if x is not None]
            out[choice.get("index", at)] = Answer(choice["text"].strip(), float(sum(scores)), len(scores))
        if sorted(out) != list(range(count)):
            raise ValueError(f"the choices' indices are not 0 to {count - 1}")
        return [out[i] for i in range(count)]


class Cached:
    """An answerer that is asked every prompt once: RL asks the same ones again and again.

    With a file, answers outlive the process (a line of JSON each, keyed by a hash of the answerer's name and the prompt).
    """

    def __init__(self, inner: Answerer, file: Path | None = None):
        """Reads what an earlier run was told; a last line that was cut off by a kill is passed over."""
        self.inner, self.file = inner, file
        self.name = inner.name
        self.asked = self.told = 0
        self._known: dict[str, Answer] = {}
        if file is not None:
            self._known = {k: Answer(*a) for k, a in processes.from_first(functools.partial(_read_cache, file)).items()}

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """See `Answerer`."""
        keys = [hashlib.sha256(f"{self.name}\0{p}".encode()).hexdigest() for p in prompts]
        new = {k: p for k, p in zip(keys, prompts) if k not in self._known}
        self.asked, self.told = self.asked + len(prompts), self.told + len(new)
        if new:
            found = dict(zip(new, self.inner.answer(list(new.values()))))
            self._known |= found
            if self.file is not None and processes.is_first():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as out:
                    out.writelines(json.dumps({"key": k, **a._asdict()}) + "\n" for k, a in found.items())
        return [self._known[k] for k in keys]


def _read_cache(file: Path) -> dict[str, Answer]:
    out: dict[str, Answer] = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
        try:
            row = json.loads(line)
            out[row["key"]] = Answer(row["text"], row["logprob"], row["tokens"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return out


def _first_words(error: urllib.error.HTTPError) -> str:
    return " ".join(error.read(300).decode("utf-8", "replace").split())
