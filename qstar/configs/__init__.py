"""Configs that ship with qstar. In a clone they are the folder `configs` at its top; an installed wheel holds them here."""

from pathlib import Path

# setup.py puts the top-level folder in the place of this one, so that this line runs in a clone alone.
__path__ = [str(Path(__file__).resolve().parents[2] / "configs")]
