"""Commands of `qstar`, one module each: `main(argv)` reads the flags, starts JAX if it needs it, calls one function.

Imports of heavy modules are local: `qstar COMMAND --help` and mistakes in flags cost no start of JAX.
"""
