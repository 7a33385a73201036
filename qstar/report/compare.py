"""Blind human comparison of two models' rationales: the page that collects votes, and their statistics.

As in STaR (2203.14465, section 4.5), raters do not know whose rationale they read. The page shows two at a time. Sides and
order are drawn by a seed; whose rationale is on which side is in a key beside the page, not in it.

    DIR/compare.html   the page: one file, no network, votes by mouse or keys, "Download" writes votes.jsonl
    DIR/key.json       item -> problem, and whose rationale is on the left
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qstar.data.sources import read_records
from qstar.errors import UserError, require
from qstar.report import render
from qstar.report.read import read_dict
from qstar.tasks.base import stable_rng
from qstar.train.stats import bootstrap_ci

FIELDS = ("problem_id", "prompt", "completion")  # of a row: what rationales, evaluations and buffers of a run hold
CHOICES = {"left": 1.0, "equal": 0.5, "right": 0.0}  # worth for the left one


class Side(NamedTuple):
    """One of the two that are compared."""

    name: str
    file: str  # JSONL with FIELDS; of several rows of a problem the first counts


def write_comparison(a: Side, b: Side, folder: Path, *, count: int = 50, seed: int = 0, right: bool = False) -> Path:
    """Writes page and key into a folder, and returns the page's path. The same arguments make the same bytes.

    Args:
      count: questions on the page, drawn by the seed from the problems that both have a rationale for.
      right: only problems that both got right (rows with `correct`), so that rationales are compared, not answers.
    """
    require((a.name != b.name, f"compare: both sides are called {a.name!r}; give them two names"))
    rows = [_first(side.file, right) for side in (a, b)]
    common = [p for p in rows[0] if p in rows[1]]
    # Equal but for white space: there is nothing to choose between. Those problems are counted in the key.
    differ = [p for p in common if rows[0][p]["completion"].split() != rows[1][p]["completion"].split()]
    which = " that both got right" if right else ""
    require((bool(common), f"compare: {a.file} and {b.file} have no problem in common{which}"))
    same = f"compare: {a.file} and {b.file} hold the same rationales, for all {len(common)} problems{which}"
    require((bool(differ), same))
    # Seeded by text, not by `hash`: the same arguments give the same page on every machine.
    rng = stable_rng("compare", seed, a.name, b.name)
    items, key = [], {}
    for number, problem in enumerate(rng.sample(differ, min(count, len(differ)))):
        pair = [{"who": "ab"[i], **rows[i][problem]} for i in (0, 1)]
        rng.shuffle(pair)
        name = f"{number:03d}"
        # A rationalised attempt has the answer in its prompt: the shorter one is without the hint.
        prompt = min((r["prompt"] for r in pair), key=len)
        items.append({"item": name, "prompt": prompt, "left": pair[0]["completion"], "right": pair[1]["completion"]})
        key[name] = {"problem_id": problem, "left": pair[0]["who"]}
    # An identity of the questions: votes are counted only with the key of the page that they were given on.
    page = f"{zlib.crc32(json.dumps(items).encode()):08x}"
    equal = len(common) - len(differ)
    key_file = {"page": page, "a": a.name, "b": b.name, "seed": seed, "same_text": equal, "items": key}
    try:
        _refuse_foreign(folder, key_file)
        folder.mkdir(parents=True, exist_ok=True)
        render.write(folder / "key.json", json.dumps(key_file, indent=1) + "\n")
        text = render.page("compare.html.j2", title="Which rationale is better?", data={"page": page, "items": items})
        render.write(folder / "compare.html", text)
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be written ({error.strerror or error})") from error
    return folder / "compare.html"


def _refuse_foreign(folder: Path, key: Mapping[str, Any]) -> None:
    # A new key over an old one would make the votes of the old page impossible to count.
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []
    if "key.json" in names:
        line = f"--out={folder}: holds another comparison, whose votes cannot be counted without its key; name another folder"
        require((read_dict(folder / "key.json") == key, line))
    else:
        line = f"--out={folder}: holds {next(iter(names), '')!r} but no comparison; name a new or empty folder"
        require((not names, line))


def _first(file: str, right: bool) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for row in read_records(file, FIELDS):
        if not right or row.get("correct"):
            out.setdefault(str(row["problem_id"]), {"prompt": str(row["prompt"]), "completion": str(row["completion"])})
    return out


def count_votes(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """Returns how often `a` won against `b`.

    `win_rate` is the mean over items of the mean over their votes (an equal is half a win), with the 95% bootstrap
    interval over items; `p` that of the two-sided sign test over items, those without a winner left out.

    Raises:
      UserError: no key, a broken file, or votes of another page or about no item of it.
    """
    key = read_dict(folder / "key.json")
    items = key.get("items")
    require(
        (items is not None, f"{folder}: holds no key.json of a `qstar compare --out`; name that folder with --out"),
        (
            isinstance(items, dict)
            and all(isinstance(item, dict) and item.get("left") in ("a", "b") for item in items.values())
            and {"page", "a", "b"} <= key.keys(),
            f"{folder / 'key.json'}: is not as `qstar compare` wrote it; votes cannot be counted without the key",
        ),
    )
    # A rater who returns to an item changes the vote: the last one counts. Without a name, a file is a rater.
    last: dict[tuple[str, str], float] = {}
    for file in files:
        for row in read_records(file, ("page", "item", "choice"), parse=lambda row: _checked(row, key)):
            worth = CHOICES[row["choice"]]
            wins = worth if key["items"][row["item"]]["left"] == "a" else 1 - worth
            last[str(row.get("rater") or file), row["item"]] = wins
    by_item: dict[str, list[float]] = {}
    for (_, item), wins in last.items():
        by_item.setdefault(item, []).append(wins)
    # Items are the unit of the statistics: several votes on one item are not independent.
    rates = [float(np.mean(by_item[item])) for item in sorted(by_item)]
    low, high = bootstrap_ci(rates)
    every = list(last.values())
    counts = {"votes": len(every), "items": len(rates), "raters": len({rater for rater, _ in last})}
    counts |= {"wins": every.count(1.0), "equal": every.count(0.5), "losses": every.count(0.0)}
    found = {"win_rate": float(np.mean(rates)), "win_rate_low": low, "win_rate_high": high, "p": sign_test(rates)}
    return {"a": key["a"], "b": key["b"], **counts, **found}


def _checked(row: Mapping[str, Any], key: Mapping[str, Any]) -> Mapping[str, Any]:
    if row["page"] != key["page"]:
        raise ValueError(f"a vote of page {row['page']!r}, but the key is that of {key['page']!r}")
    if not isinstance(row["choice"], str) or row["choice"] not in CHOICES:
        raise ValueError(f"choice {row['choice']!r:.80} is not one of {', '.join(CHOICES)}")
    if not isinstance(row["item"], str) or row["item"] not in key["items"]:
        raise ValueError(f"item {row['item']!r:.80} is not on the page")
    return row


def sign_test(rates: Sequence[float]) -> float:
    """Returns the two-sided p-value of the split into wins and losses (rates above and below 1/2); 1 without any."""
    from scipy.stats import binomtest  # slow to import, and only votes need it

    wins, losses = sum(r > 0.5 for r in rates), sum(r < 0.5 for r in rates)
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
