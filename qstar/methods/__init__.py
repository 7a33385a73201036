"""The methods, one module each; `run` starts the one that a config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run(config: Any, workdir: Any, console: Any, **given: Any) -> Any:
    """Runs the method that `config.method` names, and returns what it returns. `given`: see `methods.pairs.run`.

    Raises:
      UserError: unknown method, a seed of more than 64 bits, or several things that are missing.
    """
    from qstar.errors import check_seed, unknown
    from qstar.methods import guided_cot, pairs, quiet_star, rl, star, v_star
    from qstar.runs.folder import ending
    from qstar.runs.missing import check_present

    methods: dict[str, Callable[..., Any]] = {
        "star": star.run,
        "quiet_star": quiet_star.run,
        "v_star": v_star.run,
        "rl": rl.run,
        "guided_cot": guided_cot.run,
        **dict.fromkeys(pairs.CONTEXTS, pairs.run),
    }
    if config.get("method") not in methods:
        raise unknown(f"config.method={config.get('method')!r}", str(config.get("method")), methods)
    if isinstance(config.get("seed"), int):  # other types are refused with the section that holds it
        check_seed("config.seed", config.seed)
    check_present(config.to_dict())
    with ending(workdir):
        return methods[config.method](config, workdir, console, **given)


def check(config: Any, workdir: Any, console: Any) -> Any:
    """Makes all checks that `run` makes before it writes; returns the `runs.folder.ChecksPassed`.

    Model and data are read. Raises UserError: see the methods.
    """
    from qstar.runs.folder import ChecksPassed, checks_only

    token = checks_only.set(True)
    try:
        run(config, workdir, console)
    except ChecksPassed as passed:
        return passed
    finally:
        checks_only.reset(token)
    raise AssertionError("a method that does not open its run folder by `open_run`")
