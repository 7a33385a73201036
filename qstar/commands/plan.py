"""`qstar plan`: compiles a config for hardware that is not here."""

from __future__ import annotations

from qstar.distributed import start_plan
from qstar.errors import require
from qstar.flags import COUNT, POSITIVE, Parser, local_folder, number
from qstar.plan.slices import read_slices


def main(argv: list[str]) -> int:
    """qstar plan --config=FILE[:ARG] --topology=v5e:4x4[,v5e:8x8] [--config.key=value ...]"""
    p = Parser(
        "plan",
        "Compiles what a config would run, for a slice that is not here: memory, collectives, time at best. Exit code 1: no.",
        epilog="qstar plan --config=star_gsm8k --topology=v6e:2x4 --config.train.batch_size=16",
        device=False,
    )
    p.config()
    p.flag(
        "--topology NAME", "v5e:4x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, h100:8, h200:8, cpu:8; or several", required=True
    )
    p.switch("--search", "finds the cheapest layout that fits (mesh, remat, accumulate)")
    p.flag("--only TEXT", "programs whose names hold this text", default="")
    p.flag("--rows-per-chip N", "instead of the config's batch size (0: that)", COUNT, 0)
    p.flag("--hlo DIR", "keeps the compiled texts there", default="")
    p.flag("--hbm GIB", "per chip (default: the chip's)", number(lambda x: x > 0, "above 0"), 0.0)
    p.flag("--prompt-tokens N", "of a prompt", POSITIVE, 256)
    p.flag("--prefix-tokens N", "of a few-shot prefix (0: none)", COUNT, 0)
    p.flag("--problems N", "of the training split, for the cost of the whole config", POSITIVE, 7473)
    p.switch("--full-effort", "optimise as for a run: slower, temporaries a little smaller")
    p.switch("--json", "one JSON object (a list, of several slices)")
    a, config = p.parse_config(argv)
    slices = read_slices(a.topology)
    other = "--rows-per-chip" if a.rows_per_chip else "--hlo" if a.hlo else ""
    require((not (a.search and other), f"plan: --search does not go with {other}; leave one of them out"))
    keep = local_folder("--hlo", a.hlo) if a.hlo else None
    start_plan(max(s.simulated for s in slices), gpu=any(s.name == "gpu" for s in slices))
    from qstar.plan import run, search
    from qstar.plan.steps import Assumed

    assumed, names = Assumed(a.prompt_tokens, a.prefix_tokens, a.problems), [s.name for s in slices]
    options = run.Options(a.only, a.hbm, a.json, not a.full_effort, a.rows_per_chip, keep)
    return (search if a.search else run).main(config, names, assumed, options)
