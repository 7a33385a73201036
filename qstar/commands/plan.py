"""`qstar plan`: compiles a config for hardware that is not here."""

from __future__ import annotations

from qstar.distributed import start_plan
from qstar.flags import COUNT, POSITIVE, Parser, number


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
    # The simulated devices of the CPU backend are counted once, when JAX starts: all topologies are named before.
    names = [name for name in a.topology.split(",") if name]
    start_plan(names)
    from qstar.plan import run, search
    from qstar.plan.steps import Assumed

    assumed = Assumed(a.prompt_tokens, a.prefix_tokens, a.problems)
    options = run.Options(
        only=a.only, hbm=a.hbm, as_json=a.json, quick=not a.full_effort, rows_per_chip=a.rows_per_chip, keep=a.hlo
    )
    return (search if a.search else run).main(config, names, assumed, options)
