"""The files of a run. Those that it ends with agree whenever it is killed: the checkpoint makes the others again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from locallip import distributed
from locallip.checkpoints import load_checkpoint, save_checkpoint
from locallip.files import InputError, exists, write_csv


class RunFiles:
    """The files of a run below one prefix.

    Attributes:
        checkpoint: the last epoch, with all that resuming needs.
        best: the epoch with the smallest certified error on the validation set, the first of several; of its weights
            and their average, the better ones.
        log: one row per epoch.
        vectors: the singular vectors of this process's images, where they are kept.

    Raises:
        InputError: if the prefix ends in no name.
    """

    def __init__(self, folder: Path, prefix: str):
        stem = folder / prefix
        if Path(prefix).name in ("", ".."):
            raise InputError(f"--prefix '{prefix}' ends in no name for files")
        self.best, self.checkpoint, self.log = (
            stem.with_name(stem.name + ending) for ending in ("_best.pth", "_checkpoint.pth", "_epochs.csv")
        )
        of_process = f"_{distributed.rank()}" if distributed.processes() > 1 else ""
        self.vectors = stem.with_name(f"{stem.name}_vectors{of_process}.pth")

    def refuse_existing(self) -> None:
        """Refuse a prefix that has a run already.

        Raises:
            InputError: if one of the files exists.
        """
        for path in (self.best, self.checkpoint, self.log, self.vectors):
            if exists(path):
                raise InputError(f"{path} exists; choose another --prefix, or --resume, or --overwrite")

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Write what an epoch leaves. checkpoint: `state_dict`, `err`, `epoch`, `arguments`, `rows`, and more, such as
        `averaged` with a `state_dict` of its own.

        The checkpoint goes first. What a kill then leaves undone, `make_good` does when the run is resumed.

        Raises:
            InputError: if one of the files cannot be written.
        """
        save_checkpoint(self.checkpoint, checkpoint)
        self.make_good(checkpoint)

    def make_good(self, checkpoint: Mapping[str, Any]) -> None:
        """Bring the best epoch and the log up to the last checkpoint, where they are not.

        Raises:
            InputError: if one of them cannot be written.
        """
        # A best epoch before the last one was written before the last checkpoint was.
        best = _better_weights(checkpoint)
        if best_row(checkpoint["rows"])["epoch"] == checkpoint["epoch"] and not _holds(self.best, best):
            save_checkpoint(self.best, best)
        write_csv(self.log, checkpoint["rows"])


def best_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the epoch with the smallest certified error on the validation set.

    Of several that with the smallest clean error, and of these the first.

    Raises:
        ValueError, TypeError, KeyError: if these are no rows of a log.
    """
    if len({tuple(row) for row in rows}) != 1:
        raise ValueError("its rows have different columns, or there are none")
    return min(rows, key=lambda row: errors(row, better(row)))


def better(row: Mapping[str, Any]) -> str:
    """Who has the smaller errors on the validation set: `validation`, the weights, or `averaged`, their average."""
    names = [name for name in ("validation", "averaged") if f"{name}_certified_error" in row]
    return min(names, key=lambda name: errors(row, name))  # of equals the weights


def errors(row: Mapping[str, Any], name: str) -> tuple[float, float]:
    """The certified and the clean error of the weights or of their average: what is best is smallest in this order."""
    return row[f"{name}_certified_error"], row[f"{name}_clean_error"]


def _better_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The last epoch in the published layout, with the weights or their average, whichever have the smaller error."""
    names = "state_dict", "err", "epoch", "arguments", "hardware"
    published = {name: checkpoint[name] for name in names if name in checkpoint}  # older ones have no hardware
    row = checkpoint["rows"][-1]
    if better(row) == "validation":
        return published
    return published | {"state_dict": checkpoint["averaged"]["state_dict"], "err": row["averaged_certified_error"]}


def _holds(path: Path, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a file has the weights of a checkpoint."""
    try:
        found = load_checkpoint(path)
    except InputError:
        return False
    ours, theirs = checkpoint["state_dict"], found["state_dict"]
    if (found.get("epoch"), found.get("err"), theirs.keys()) != (checkpoint["epoch"], checkpoint["err"], ours.keys()):
        return False
    return all(torch.equal(ours[name].cpu(), theirs[name].to(ours[name].dtype)) for name in ours)
