"""Sharded, asynchronous checkpoints through orbax, and nothing of orbax elsewhere.

A checkpoint holds the TrainState (parameters, moments, step, random key) and a small JSON record. The data position is
the step itself: batches are a pure function of (data, seed, step). A folder half written by a killed process is never
seen: orbax writes under a temporary name and renames.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from qstar import tree
from qstar.errors import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every file it touches


class Checkpoints:
    """The checkpoints of one training run: `folder/<step>/`."""

    def __init__(self, folder: Any, *, keep: int = 1):
        """Opens (and creates) the folder; of several checkpoints the newest `keep` stay.

        Raises:
          UserError: the folder cannot be written.
        """
        self.folder = epath.Path(folder).absolute() if "://" not in str(folder) else epath.Path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        except OSError as e:
            raise UserError(f"checkpoint folder {self.folder} cannot be written: {e.strerror}") from None

    def latest(self) -> int | None:
        """Returns the newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any] | None = None) -> None:
        """Starts saving; returns once the arrays are copied (a step that exists already is left as it is)."""
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record or {}))
        self._manager.save(step, args=args)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores the newest (or the given) step onto the shapes, dtypes and shardings of `like`.

        Raises:
          UserError: nothing to restore, or a checkpoint of another model (the line names the first difference).
        """
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.folder}; train first, or name another folder")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            self._check(target, step)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore())
            out = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError, OSError) as e:
            reason = str(e).strip().splitlines()[0][:200]
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read ({reason}); delete that folder to train again"
            ) from None
        return out["state"], out["record"]

    def _check(self, target: Any, step: int) -> None:
        """Compares the stored shapes with the wanted ones: orbax' own complaint does not fit on a line."""
        stored = self._manager.item_metadata(step)["state"]
        if stored is None:
            raise UserError(
                f"checkpoint {self.folder / str(step)} holds no training state; delete that folder to train again"
            )
        have = {n: tuple(x.shape) for n, x in tree.named_leaves(stored) if hasattr(x, "shape")}
        want = {n: tuple(x.shape) for n, x in tree.named_leaves(target)}
        where = self.folder / str(step)
        for name, shape in want.items():
            if name not in have:
                raise UserError(f"checkpoint {where} is of another model: it has no {name}; use another --workdir")
            if have[name] != shape and "rng" not in name:
                raise UserError(
                    f"checkpoint {where} is of another model: {name} is {have[name]}, expected {shape}; use another --workdir"
                )
        extra = sorted(set(have) - set(want))
        if extra:
            raise UserError(
                f"checkpoint {where} is of another model: it has {extra[0]}, which this one lacks; use another --workdir"
            )

    def wait(self) -> None:
        """Blocks until what was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()
