"""Facts on declared ranges of settings: what passes, what is refused, and in which words."""

from __future__ import annotations

import ast
import dataclasses
import math
import pathlib
import re

import numpy as np
import pytest

from qstar import errors
from qstar.errors import Settings, UserError, bounded


@dataclasses.dataclass(frozen=True)
class Some(Settings):
    count: int = bounded(3, ge=1)
    rate: float = bounded(0.5, ge=0, note="0: off")
    share: float = bounded(0.5, gt=0, le=1)
    limit: int | None = bounded(None, ge=1)
    epochs: float = bounded(1.0, gt=0, le=math.inf)
    kind: str = bounded("a", choices=("", "a", "b"))
    free: int = -1


@dataclasses.dataclass(frozen=True)
class Other(Some):
    WHERE = "other: "
    count: int = 5  # another default, the same range


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count=0 must be at least 1"),
        ({"count": 1.5}, "count=1.5 must be a whole number of at least 1"),
        ({"count": True}, "count=True must be a whole number of at least 1"),
        ({"rate": -1.0}, "rate=-1.0 must be 0 or more (0: off)"),
        ({"rate": math.nan}, "rate=nan must be 0 or more (0: off)"),
        ({"rate": math.inf}, "rate=inf must be 0 or more (0: off)"),
        ({"share": 0.0}, "share=0.0 must be in (0, 1]"),
        ({"limit": 0}, "limit=0 must be at least 1, or None"),
        ({"epochs": 0}, "epochs=0 must be above 0"),
        ({"epochs": math.nan}, "epochs=nan must be above 0"),
        ({"kind": "c"}, "kind='c' is not one of a, b"),
        ({"rate": None}, "rate=None must be 0 or more (0: off)"),
    ],
)
def test_values_outside_of_their_range_are_refused(values, message):
    with pytest.raises(UserError) as e:
        Some(**values)
    assert str(e.value) == message
    with pytest.raises(UserError) as e:
        Other(**values)
    assert str(e.value) == f"other: {message}"


def test_values_of_their_range_pass():
    Some(count=1, rate=0, share=1, limit=None, epochs=math.inf, kind="", free=-2)
    Some(count=np.int64(1), rate=np.float32(0.5), limit=np.int32(2))
    assert Other().count == 5


def test_every_float_of_all_settings_has_a_range():
    """Without one, NaN would pass: it is refused by the comparison with a bound."""
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in pathlib.Path(errors.__file__).parent.rglob("*.py")]
    classes = [n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)]
    # A subclass of these may give a field another default.
    first = [c for c in classes if "Settings" in map(ast.unparse, c.bases)]
    fields = [f for c in first for f in c.body if isinstance(f, ast.AnnAssign)]
    floats = [ast.unparse(f) for f in fields if ast.unparse(f.annotation).startswith("float")]
    assert len(floats) > 40 and not [f for f in floats if "= bounded(" not in f]


def test_messages_name_the_distribution_and_extras_of_setup():
    root = pathlib.Path(__file__).resolve().parents[1]
    setup = (root / "setup.py").read_text()
    assert f'name="{errors.DISTRIBUTION}"' in setup
    named = re.findall(r"pip_install\('(\w+)'\)", "".join(p.read_text() for p in (root / "qstar").rglob("*.py")))
    assert named and all(f'"{extra}": [' in setup for extra in named)
    texts = [
        p
        for folder in ("qstar", "launch", "configs")
        for p in (root / folder).rglob("*.*")
        if p.suffix in (".py", ".sh", ".md")
    ]
    assert not [p for p in (*texts, root / "README.md") if re.search(r"\bqstar\[\w", p.read_text())]
