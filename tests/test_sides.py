"""What the processes of a comparison say when something goes wrong in them."""

import fractions
import os

import pytest

from qstar.bench.sides import Sides
from qstar.errors import UserError


def test_what_goes_wrong_in_a_side_is_one_line_that_names_it():
    with Sides("cpu") as sides:
        sides.make("torch", fractions.Fraction, numerator=1, denominator=2)
        with pytest.raises(UserError, match=r"^bench, torch side: ZeroDivisionError: Fraction\(1, 0\)$"):
            sides.make("torch", fractions.Fraction, numerator=1, denominator=0)
        with pytest.raises(UserError, match=r"^bench: the process of the torch side died \(exit code 9\)"):
            sides.make("torch", os._exit, status=9)
        sides.make("qstar", fractions.Fraction, numerator=1, denominator=2)  # the other one lives
