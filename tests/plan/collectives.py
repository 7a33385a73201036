"""The collectives of a compiled program."""


def collectives(program, name=None, times=1.0, outer=True):
    """Yields (instruction, how often it runs, kind) of an `hlo.Program`."""
    for i in program.computations.get(name or program.entry, ()):
        if kind := program._kind(i):
            yield i, times, kind
        elif i.op == "while":
            runs, inner = program._runs(i, name or program.entry, outer)
            yield from collectives(program, i.called("body")[0], times * runs, inner)
        else:
            for other in i.called("calls", "to_apply", "branch_computations", "true_computation", "false_computation"):
                yield from collectives(program, other, times, outer)
