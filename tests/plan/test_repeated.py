"""`qstar plan` names products that all chips compute alike, and no others."""

from __future__ import annotations

import re

from qstar.plan import hlo
from qstar.plan.repeated import repeated

SOURCE = """HloModule jit_f

ENTRY main.1 {
  a.1 = f32[64,64]{1,0} parameter(0)
  b.1 = f32[64,64]{1,0} parameter(1)
  c.1 = f32[64,64]{1,0} dot(a.1, b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="Block/q/dot_general"}
  ROOT d.1 = f32[64,64]{1,0} dot(c.1, b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="Block/o/dot_general"}
}
"""


def on_a_chip(rows_q, rows_o):
    """The program of one chip: `q` with so many of the 64 rows, `o` alike."""
    text = SOURCE.replace('op_name="', 'op_name="jit(f)/jvp(vmap())/while/body/closed_call/')
    text = re.sub(r"c\.1 = f32\[64", f"c.1 = f32[{rows_q}", text)
    return hlo.Program(re.sub(r"d\.1 = f32\[64", f"d.1 = f32[{rows_o}", text)).costs()


def test_a_product_that_all_chips_compute_whole_is_named_with_its_share():
    (note,) = repeated(SOURCE, on_a_chip(64, 8), 8)
    assert note == "Block/q is computed 8.0 times (78% of all FLOPs are superfluous)"


def test_products_that_are_split_are_not_named():
    assert repeated(SOURCE, on_a_chip(8, 8), 8) == ()
    # One of nine parts is padding.
    assert repeated(SOURCE, on_a_chip(9, 8), 8) == ()
