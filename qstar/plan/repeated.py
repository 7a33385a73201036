"""Products that chips compute more than once: a compiled program beside the program that was given to the compiler."""

from __future__ import annotations

from collections import defaultdict

from qstar.plan import hlo

MORE = 1.25  # times the FLOPs of the source from which a product counts as computed again: padding stays below it
SHARE = 0.02  # of a program's FLOPs that must be superfluous for a product to be named
# Parts of an operation's name that tell how it was traced.
_TRACING = {"while", "body", "closed_call", "cond", "checkpoint", "rematted_computation", "shard_map", "pjit"}


def repeated(source: str, compiled: hlo.Costs, chips: int, assumed: int = 1) -> tuple[str, ...]:
    """Returns a note for each product that all chips together compute more often than the source does.

    Args:
      source: HLO text before compilation, of global shapes: `lowered.as_text(dialect="hlo", debug_info=True)`.
      compiled: costs of the compiled text, per chip. assumed: see `hlo.Program`.
    """
    before = _by_name(hlo.Program(source, assumed).costs(), 1)
    superfluous = {}
    for name, flops in _by_name(compiled, chips).items():
        # The compiler renames some products: those without a source cannot be compared.
        if before[name] and flops > MORE * before[name]:
            superfluous[name] = flops - before[name]
    total = chips * compiled.flops
    return tuple(
        f"{name} is computed {1 + extra / before[name]:.1f} times ({extra / total:.0%} of all FLOPs are superfluous)"
        for name, extra in sorted(superfluous.items(), key=lambda x: -x[1])
        if extra > SHARE * total
    )


def _by_name(costs: hlo.Costs, chips: int) -> defaultdict[str, float]:
    # Of `jit(f)/while/body/transpose(jvp(vmap()))/Block/up/dot_general` the source's text has `Block/up/dot_general`.
    found: defaultdict[str, float] = defaultdict(float)
    for name, flops in costs.products.items():
        parts = [p for p in name.split("/") if "(" not in p and p not in _TRACING]
        found["/".join(parts[-3:-1]) or name] += chips * flops
    return found
