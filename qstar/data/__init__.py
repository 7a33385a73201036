"""Data: records from files and the hub, text corpora, and batches of arrays. No jax here."""

from qstar.data.loader import batches
from qstar.data.sources import read_jsonl, read_records, write_jsonl

__all__ = ["batches", "read_jsonl", "read_records", "write_jsonl"]
