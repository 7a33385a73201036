"""Rewards of RL: built-in ones, functions of the user's own, and weighted sums of them.

    "correct"                                     1 where the task's judge accepts the answer, else 0 (the default)
    "format"                                      1 where the task finds an answer in the completion, right or wrong
    "rewards.py:brevity"                          a function of a file, relative to the current folder
    "correct + 0.1 * my_package.rewards:steps"    a sum of such terms; the weight stands in front

A function is called once per update with keyword arguments, those of the following that it names (or takes as **others).
Each is a list with an entry per completion:

    prompts      what the model read: texts, or lists of messages
    completions  the texts that it wrote
    records      the task's problems as dicts: id, question, gold, meta
    answers      the answer that the task reads from the completion, None if there is none
    correct      whether the task's judge accepts it
    tokens       the completion's token ids
    truncated    whether it was cut off at `max_new_tokens`

It returns a number per completion (list or array), or a dict of such lists, whose sum is the reward and whose names are
logged as reward/NAME. Of several processes the first calls it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qstar import distributed
from qstar.data.user_code import is_spec, load_object, user_errors
from qstar.errors import UserError, require, unknown

Column = list[float]
BUILT_IN: dict[str, Callable[..., Any]] = {
    "correct": lambda correct: correct,
    "format": lambda answers: [answer is not None for answer in answers],
}
_TERM = re.compile(r"(?:(?P<weight>[-+]?[\d.]+(?:e[-+]?\d+)?)\s*\*\s*)?(?P<name>\S.*)")


@dataclasses.dataclass(frozen=True)
class Reward:
    """One term of a sum: a function and its weight."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    spec: str = ""  # as the user wrote it; begins the messages

    @property
    def path(self) -> str | None:
        """The file of the function, None where it has none (a notebook)."""
        return getattr(sys.modules.get(getattr(self.function, "__module__", "")), "__file__", None)

    @property
    def named_by_file(self) -> bool:
        """Whether it was given as "file.py:name" or "package.module:name"."""
        return is_spec(self.spec.partition("=")[2])

    @property
    def fingerprint(self) -> str:
        """A hash of the file that names the function, or of its source if it was given itself; "" if unreadable."""
        try:
            file = self.path if self.named_by_file else None
            source = Path(file).read_bytes() if file else inspect.getsource(self.function).encode()
        except (OSError, TypeError):
            return ""
        return hashlib.sha256(source).hexdigest()[:16]

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns those of the given arguments that the function takes; raises UserError if it needs others."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # a function without one, of C
            return given
        kinds = {p.kind for p in signature.parameters.values()}
        rest = inspect.Parameter.VAR_KEYWORD in kinds
        taken = {k: v for k, v in given.items() if rest or k in signature.parameters}
        try:
            signature.bind(**taken)
        except TypeError as e:
            raise UserError(f"{self.spec}: {e}; it is called with {', '.join(given)}, by name") from None
        return taken


def read_rewards(reward: str | Callable[..., Any], what: str, given: Sequence[str]) -> tuple[Reward, ...]:
    """Returns the terms of a reward: a text (see the module's docstring) or a function.

    Args: what: the key that gave it, for messages. given: names of the arguments that there will be.
    Raises UserError for a term that cannot be read, loaded or called, or two of one name.
    """
    if callable(reward):
        name = getattr(reward, "__name__", type(reward).__name__)
        found = [Reward(name, reward, spec=f"{what}={name}")]
    else:
        # A sign between spaces joins terms; one within a name or a number does not.
        first, *rest = re.split(r"\s+([+-])\s+", reward.strip())
        signs = [1.0, *(1.0 if sign == "+" else -1.0 for sign in rest[::2])]
        found = [_term(text, sign, what) for text, sign in zip([first, *rest[1::2]], signs, strict=True)]
    names = [term.name for term in found]
    twice = next((name for name in names if names.count(name) > 1), "")
    require((not twice, f"{what}={reward}: two terms are named {twice!r}; give one function another name"))
    for term in found:
        term.arguments(dict.fromkeys(given))
    return tuple(found)


def _term(text: str, sign: float, what: str) -> Reward:
    match = _TERM.fullmatch(text.strip())
    try:
        weight = sign * float(match["weight"] or 1.0)  # type: ignore[index]
    except (ValueError, TypeError):
        form = "write e.g. 'correct + 0.1 * rewards.py:brevity'"
        raise UserError(f"{what}: {text!r} is not a reward or WEIGHT * REWARD; {form}") from None
    name = match["name"]  # type: ignore[index]
    if name in BUILT_IN:
        return Reward(name, BUILT_IN[name], weight, f"{what}={name}")
    if not is_spec(name):
        raise unknown(f"{what}={name}", name, [*BUILT_IN, "file.py:function"])
    return Reward(name.rpartition(":")[2], load_object(name, what, form="a function"), weight, f"{what}={name}")


def made_with(rewards: Sequence[Reward]) -> dict[str, Any]:
    """Returns what a run's folder keeps of its rewards: weights, and hashes of the user's files; {} for the default."""
    own = {f"hash of {r.spec.partition('=')[2]}": r.fingerprint for r in rewards if r.function not in BUILT_IN.values()}
    if not own and [(r.name, r.weight) for r in rewards] == [("correct", 1.0)]:
        return {}
    return {"reward": {**{f"weight of {r.name}": r.weight for r in rewards}, **own}}


def score(rewards: Sequence[Reward], update: int, **given: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the rewards of all completions, float32 [B], and their named parts, without weights.

    `given`: lists of length B, see the module's docstring. Raises UserError if a function raises (with its line) or
    returns anything but finite numbers, one per completion; the message names the function and the update.
    """
    count, total, parts = len(given["completions"]), np.zeros(len(given["completions"])), {}
    for reward in rewards:
        call = functools.partial(_columns, reward, update, given, count)
        # A user's function may be random, or ask a server: all processes have to train on one result.
        columns = call() if reward.function in BUILT_IN.values() else distributed.broadcast_from_host0(call)
        total += reward.weight * np.sum(list(columns.values()), axis=0)
        parts.update({name: np.asarray(column, np.float32) for name, column in columns.items()})
    return total.astype(np.float32), parts


def _columns(reward: Reward, update: int, given: dict[str, Any], count: int) -> dict[str, Column]:
    where = f"update {update + 1}: {reward.spec}"
    # The line number follows the file, whose name a spec holds already.
    file = where.rpartition(":")[0] if reward.named_by_file else f"{where}: {reward.path}"
    with user_errors(file if reward.path else where, reward.path):
        returned = reward.function(**reward.arguments(given))
    named = returned if isinstance(returned, dict) else {reward.name: returned}
    require((bool(named), f"{where} returned an empty dict; it must name at least one part"))
    return {
        str(name): _column(values, count, where, f"{name}: " * (named is returned)) for name, values in named.items()
    }


def _column(values: Any, count: int, where: str, part: str) -> Column:
    listed = values.tolist() if hasattr(values, "tolist") else values
    text = f"{where} returned {part}"
    wanted = f"it must return a list of {count} numbers, one per completion"
    if not isinstance(listed, (list, tuple)):
        raise UserError(f"{text}{_short(listed)}; {wanted}")
    require((len(listed) == count, f"{text}{len(listed)} values; {wanted}"))
    plain = [v.item() if hasattr(v, "item") else v for v in listed]
    for i, value in enumerate(plain):
        number = isinstance(value, (int, float)) and math.isfinite(value)
        require((number, f"{text}{_short(value)} for completion {i + 1} of {count}, which is not a finite number"))
    return [float(v) for v in plain]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
