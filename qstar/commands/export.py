"""`qstar export`: takes a model out of a run."""

from __future__ import annotations

from qstar.distributed import start_jax
from qstar.flags import COUNT, Parser, folder, local_folder


def main(argv: list[str]) -> int:
    """qstar export --run=DIR --arm=NAME [--iteration=N] --out=DIR"""
    p = Parser("export", "Writes a model of a run as a folder in the Hugging Face layout.")
    p.flag("--run DIR", "run folder: the --workdir of qstar train", required=True)
    p.flag("--arm NAME", "arm of the run (default: the only one)")
    p.flag("--iteration N", "outer iteration of the arm, 0: base (default: the last)", COUNT)
    p.flag("--verifier", "of a V-STaR run, instead of its generator", default="", choices=("dpo", "orm", "prm"))
    p.flag("--out DIR", "new folder, or an earlier export to replace", required=True)
    a = p.parse_args(argv)
    start_jax(a.device)
    from qstar.methods.export import export_model

    print(export_model(folder("--run", a.run), a.arm, a.iteration, local_folder("--out", a.out), a.verifier))
    return 0
