"""Configs that ship with qstar: a file each, with `get_config(arg)`; `qstar configs` lists them."""
