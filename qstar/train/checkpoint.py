"""Sharded, asynchronous, checksummed checkpoints through orbax (which no other module imports).

A checkpoint holds the TrainState (parameters, moments, step, random key) and a small JSON record. The data position is
the step itself: batches are a pure function of (data, seed, step). A process killed while it saves leaves no partial
checkpoint: orbax writes under a temporary name and renames.

The record also holds a checksum of every array and of itself, compared on restore. The checksums are of arrays, not of
files: they are computed on the devices, and do not depend on the mesh or on the layout of the files.
"""

from __future__ import annotations

import json
import logging
import math
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from qstar import distributed, tree
from qstar.errors import Unreachable, UserError, machine_fault
from qstar.files import Damaged, warn

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every file it touches, and what it raises as well

CHECKSUMS = "checksums"  # key of the record
# Codes of cloud storage.
_UNANSWERED = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|PERMISSION_DENIED")


class Restored(NamedTuple):
    """The content of a checkpoint."""

    state: Any
    record: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints of one training run: `folder/<step>/`."""

    def __init__(self, folder: Any, *, before: Callable[[], None] = lambda: None):
        """Opens (and creates) the folder, where the newest two checkpoints stay (one may be damaged).

        `before` is called before each is saved: what it writes is there when a run resumes from that checkpoint.

        Raises:
          UserError: the folder cannot be written.
        """
        self._before = before
        self.folder = epath.Path(folder).absolute() if "://" not in str(folder) else epath.Path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        except OSError as e:
            raise UserError(f"checkpoint folder {self.folder} cannot be written: {e.strerror}") from None

    def save(self, step: int, state: Any, record: dict[str, Any] | None = None) -> None:
        """Starts saving; returns once the arrays are copied (a step that exists already is left as it is)."""
        # `Progress.save` may follow the loop's own save of a step, and orbax raises on a step that exists.
        if step in self._manager.all_steps():
            return
        self._before()
        # The record as it is read back (tuples become lists): its checksum must be of that value.
        record = json.loads(json.dumps(record or {}))
        arrays = checksums(state)
        record[CHECKSUMS] = {"arrays": arrays, "record": _crc(record, arrays)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=args)

    def resume(self, like: Any) -> Restored | None:
        """Restores the newest intact checkpoint, None if there is none. Damaged ones are named and moved aside.

        Raises:
          UserError: a checkpoint of another model, or one without read permission.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return Restored(*self._read(like, step), step)
            except Damaged as e:
                aside = self.folder / f"damaged-{step}"
                warn(f"{e}; moved to {aside.name}, and the checkpoint before it, or the start, is used")
                if distributed.is_first():
                    if aside.exists():
                        aside.rmtree()
                    (self.folder / str(step)).rename(aside)
                distributed.broadcast_bool(True)  # a barrier: moved before any process lists the folder
                self._manager.reload()
        return None

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores the newest (or the given) step onto the shapes, dtypes and shardings of `like`; changes no file.

        Raises:
          UserError: nothing to restore, a damaged checkpoint, or another model's (the line names the first difference).
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.folder}; train first, or name another folder")
        try:
            return self._read(like, step)
        except Damaged as e:
            raise UserError(f"{e}; `qstar train` in the same --workdir makes it again") from None

    def _read(self, like: Any, step: int) -> tuple[Any, dict[str, Any]]:
        name = f"checkpoint {self.folder / str(step)}"
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # The record first: it has the stored dtypes, and another model is reported before any array is read.
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            found = record.pop(CHECKSUMS)
            arrays = found["arrays"]
            if found["record"] != _crc(record, arrays):
                raise Damaged(f"{name} is damaged (the checksum of its record differs)")
            _compare(arrays, target, name)
            # Read in the stored dtype, so that the checksums apply, and cast below.
            as_stored = tree.map_named(lambda n, x: _with_dtype(x, arrays[n][1]), target)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(as_stored))
            state = self._manager.restore(step, args=args)["state"]
        # JaxRuntimeError: the device is out of memory, which is no damage.
        except (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:  # what a damaged file raises depends on the place of the damage
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
            # A fault of the machine, or storage that did not answer, says nothing of the file: it stays where it is.
            if machine_fault(e) is not None:
                raise
            if isinstance(e, (ConnectionError, TimeoutError)) or _UNANSWERED.search(reason):
                raise Unreachable(f"{name} cannot be read now ({reason}); start the command again") from None
            raise Damaged(f"{name} is damaged ({reason})") from None
        now = checksums(state)
        if wrong := [array for array in arrays if now[array] != arrays[array]]:
            raise Damaged(f"{name} is damaged (the checksum of {wrong[0]} differs)")

        def cast(x: Any, like: Any) -> Any:
            return x.astype(like.dtype) if jnp.issubdtype(like.dtype, jnp.floating) else x

        return jax.tree.map(cast, state, target), record

    def wait(self) -> None:
        """Blocks until all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _compare(arrays: dict[str, Any], target: Any, checkpoint: str) -> None:
    # Orbax' own message is many lines long.
    other = f"{checkpoint} is of another model:"
    want = {n: tuple(x.shape) for n, x in tree.named_leaves(target)}
    for name, shape in want.items():
        if name not in arrays:
            raise UserError(f"{other} it has no {name}; use another --workdir")
        have = tuple(arrays[name][0])
        if have != shape and "rng" not in name:
            raise UserError(f"{other} {name} is {have}, expected {shape}; use another --workdir")
    if extra := sorted(set(arrays) - set(want)):
        raise UserError(f"{other} it has {extra[0]}, which this one lacks; use another --workdir")


def _with_dtype(x: Any, dtype: str) -> Any:
    # Only floats are ever cast: random keys and counters keep their dtype.
    if not jnp.issubdtype(x.dtype, jnp.floating) or str(x.dtype) == dtype:
        return x
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=getattr(x, "sharding", None))


def _crc(*values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def checksums(state: Any) -> dict[str, list[Any]]:
    """Returns {name: [shape, dtype, checksum]} of the arrays of a pytree."""
    leaves = tree.named_leaves(state)
    sums = jax.device_get([_checksum(x) for _, x in leaves])
    return {name: [list(np.shape(x)), str(x.dtype), int(n)] for (name, x), n in zip(leaves, sums)}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    # Each element is mixed with its position by a bijection (murmur3's finaliser), so a change of one element always
    # changes the sum; and a sum of integers does not depend on its order.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = max(8, min(32, x.dtype.itemsize * 8))  # 64-bit elements become pairs
    h = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    for axis in range(h.ndim):  # no reshape, which could move a sharded array between devices
        stride = math.prod(h.shape[axis + 1 :]) & 0xFFFFFFFF
        h = h + jax.lax.broadcasted_iota(jnp.uint32, h.shape, axis) * jnp.uint32(stride * 0x9E3779B1 & 0xFFFFFFFF)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
