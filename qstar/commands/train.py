"""`qstar train`: runs the method of a config file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qstar.distributed import is_first, start_jax
from qstar.errors import require
from qstar.flags import Parser, folder, value_sources


def main(argv: list[str]) -> int:
    """qstar train --config=FILE[:ARG] --workdir=DIR [--config.key=value ...]"""
    p = Parser(
        "train",
        "Runs the method of a config file; called again after an interruption, goes on where it stopped.",
        epilog="qstar train --config=star_arithmetic:smoke --config.train.lr=1e-3 --workdir=runs/x",
    )
    p.config()
    p.flag("--workdir DIR", "run folder, on a disk or gs:// (default: runs/<config.name>)")
    p.flag("--profile FIRST:LAST", "traces these updates to WORKDIR/profile, e.g. 10:13")
    p.switch("--print-config", "prints every value with its source, and ends")
    p.switch("--dry-run", "checks model, data and settings, counts steps and tokens, estimates memory; writes nothing")
    p.flag("--memory", "a run that by estimate exceeds this machine's memory: refuse it, or ignore that",
           default="refuse", choices=("refuse", "ignore"))  # fmt: skip
    p.switch("--json", "of --print-config and --dry-run: one JSON object")
    a, config = p.parse_config(argv)
    require((not a.json or a.print_config or a.dry_run, "train: --json belongs to --print-config or --dry-run"))
    if a.print_config:
        print(_values(config, value_sources(a.config, a.overrides), a.json))
        return 0
    workdir = folder("--workdir", a.workdir) if a.workdir else _default_workdir(config.get("name", "run"))
    # After the flags and the config: a mistake in them ends before JAX starts and waits for other processes.
    start_jax(a.device, several=True)
    from rich.console import Console

    from qstar import methods
    from qstar.plan.host import check_memory
    from qstar.report.pages import write_report
    from qstar.train import profile

    if a.memory == "refuse":
        check_memory(config)
    console = Console(quiet=not is_first())
    with profile.tracing(a.profile, workdir / "profile"):
        if a.dry_run:
            return _dry_run(config, workdir, Console(quiet=True), a.json)
        methods.run(config, workdir, console)
    if is_first():
        console.print(f"report: {write_report(workdir)}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _dry_run(config: Any, workdir: Path, console: Any, as_json: bool) -> int:
    from qstar.plan.dry_run import dry_run, lines

    found = dry_run(config, workdir, console)
    if is_first():
        print(json.dumps(found) if as_json else "\n".join(lines(found)))
    require(("refused" not in found, found.get("refused", "")))
    return 0


def _values(config: Any, sources: dict[str, str], as_json: bool) -> str:
    from qstar.methods.resolved import resolved

    found = resolved(config, sources)
    if as_json:
        return json.dumps({key: v._asdict() for key, v in found.items()}, default=str)
    rows = [(f"config.{key} = {v.value!r}", v.source) for key, v in found.items()]
    # A long value does not push the sources of the others aside.
    width = max(len(text) for text, _ in rows if len(text) <= 60)
    return "\n".join(f"{text:<{width}}  # {source}" for text, source in rows)


def _default_workdir(name: Any) -> Path:
    # The name comes from a config that may be somebody else's: it must not lead out of runs/.
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    inside = bool(parts) and not Path(name).is_absolute() and ".." not in parts
    require((inside, f"config.name={name!r} must name a folder inside runs/; or give --workdir=DIR"))
    return Path("runs", name)
