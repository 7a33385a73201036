"""Published data sets as options of the tasks in `generic`: name -> (kind, options).

Sources are hub names with the fields of their columns; local copies with the same fields are read by `train` and `test`.
"""

from __future__ import annotations

from typing import Any


def _hub(name: str, train: str | None = "train", test: str | None = "test", **options: Any) -> dict[str, Any]:
    """Options of a hub data set; `train` and `test` are its splits, None for one that it does not have."""
    splits = {"train": train, "test": test}
    sources = {part: name for part, split in splits.items() if split}
    return sources | {f"{part}_split": split for part, split in splits.items() if split} | options


_ARC: dict[str, Any] = {
    "question": "question.stem|question",
    "choices": "question.choices|choices",
    "answer": "answerKey",
}
_COMMONSENSE = {"test": "validation", "rationale": "rationale|"}

READY_MADE: dict[str, tuple[str, dict[str, Any]]] = {
    # ------------------------------------------------------------------------------------------- word problems
    # Cobbe et al., 2110.14168; as STaR uses it (2203.14465, section 4.4).
    "gsm8k": ("numeric", _hub("openai/gsm8k:main", answer_pattern="####(.*)", rationale="answer", id="")),
    # Gao et al., 2211.10435: GSM8K's test questions with larger numbers; their script allows a difference of 1e-3.
    "gsm_hard": (
        "numeric",
        _hub("reasoning-machines/gsm-hard", None, "train", question="input", answer="target", tolerance=1e-3),
    ),
    # Patel et al., 2103.07191.
    "svamp": ("numeric", _hub("ChilleD/SVAMP", question="Body Question", answer="Answer", group="Type|", id="ID|")),
    # Roy and Roth, 1608.01413.
    "multiarith": ("numeric", _hub("ChilleD/MultiArith", answer="final_ans")),
    # Miao et al., 2106.15772. Answers that are no single number (ratios, times) are left out.
    "asdiv": (
        "numeric",
        _hub("EleutherAI/asdiv", None, "validation", question="body question", group="solution_type|", bad_rows=0.1),
    ),
    # ----------------------------------------------------------------------------------------- multiple choice
    # Talmor et al., 1811.00937. The test split has no labels; as in the papers, scores are on the development rows.
    "commonsense_qa": ("multiple_choice", _hub("tau/commonsense_qa", **_ARC, **_COMMONSENSE)),
    # Clark et al., 1803.05457.
    "arc_easy": ("multiple_choice", _hub("allenai/ai2_arc:ARC-Easy", **_ARC)),
    "arc_challenge": ("multiple_choice", _hub("allenai/ai2_arc:ARC-Challenge", **_ARC)),
    # Mihaylov et al., 1809.02789.
    "openbookqa": ("multiple_choice", _hub("allenai/openbookqa:main", **_ARC | {"question": "question.stem|question_stem"})),
    # Ling et al., 1705.04146.
    "aqua": (
        "multiple_choice",
        _hub("deepmind/aqua_rat:raw", choices="options", answer="correct", answer_as="label", rationale="rationale|"),
    ),
    # ---------------------------------------------------------------------------------------------- yes and no
    # Clark et al., 1905.10044: a question on a passage.
    "boolq": ("exact", _hub("google/boolq", test="validation", context="passage", yes_no=True)),
    # Geva et al., 2101.02235. `context="facts"` puts the facts before the question.
    "strategy_qa": ("exact", _hub("ChilleD/StrategyQA", rationale="facts|", yes_no=True, id="id|qid|")),
}  # fmt: skip
