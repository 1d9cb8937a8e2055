"""What an evaluation that is not finished keeps: a file per batch below the folder of its report, to go on from.

    OUT/unfinished/run.json      what is evaluated, how, and the certificate's seed; written first, removed first
    OUT/unfinished/00017.npz     what was found on a batch

A kill at any moment leaves a batch done or not done, never half: every file is written under another name and renamed.
The report is written when all batches are done, and only then is run.json removed: that is the moment at which the
evaluation is finished. Without run.json, what else is in the folder counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from locallip.evaluation.outcome import Findings
from locallip.evaluation.report import refuse_existing
from locallip.files import InputError, check_writable, write_atomically
from locallip.images import ImageSet

# Flags that change nothing of what is found. The checkpoint and the images count by their content, the seed of the
# certificate by what it came to.
_INDIFFERENT = {"out", "overwrite", "resume", "saved_model", "data_dir", "device", "certificate_seed"}


class Unfinished:
    """The batches of one evaluation that are done.

    Args:
        out: folder of the report.
        run: all that the findings depend on, see `begin`; a batch of another run counts for nothing.
        piece: number of this start of it.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], piece: int):
        self.folder = out / "unfinished"
        self._run = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        self._piece, self._started = piece, time.perf_counter()
        self._seconds: dict[int, float] = {}

    def keep(self, place: int, found: Sequence[Findings]) -> None:
        """Write what each certificate found on a batch.

        Raises:
            InputError: if it cannot be written.
        """
        arrays = {f"{number}.{name}": a for number, part in enumerate(found) for name, a in part.arrays().items()}
        elapsed = time.perf_counter() - self._started
        about = {"about.run": self._run, "about.piece": self._piece, "about.seconds": elapsed}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **arrays, **about)

        write_atomically(self.folder / f"{place:05d}.npz", write)

    def read(self, certificates: int) -> dict[int, list[Findings]]:
        """What each certificate found, by the place of the batch; what is damaged or of another run is left out."""
        found = {}
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                with np.load(path, allow_pickle=False) as file:
                    arrays = dict(file)
                if arrays["about.run"] != self._run:
                    continue
                found[int(path.stem)] = [
                    Findings.of_arrays({n.split(".", 1)[1]: a for n, a in arrays.items() if n.startswith(f"{number}.")})
                    for number in range(certificates)
                ]
                piece, seconds = int(arrays["about.piece"]), float(arrays["about.seconds"])
                self._seconds[piece] = max(seconds, self._seconds.get(piece, 0.0))
        return found

    def seconds(self) -> float:
        """Wall time of all starts, each up to the last batch that it finished, and of this one until now."""
        return sum(self._seconds.values()) + time.perf_counter() - self._started

    def discard(self) -> None:
        """Finish: remove everything, the record of the run before the batches."""
        (self.folder / "run.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def begin(
    out: Path,
    reports: Sequence[Path],
    run: Mapping[str, Any],
    batches: int,
    certificate_seed: int | None,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Make ready for an evaluation, or for going on with one; returns the run as it was begun.

    reports: the folders that its reports go to. run: what the findings depend on, with `arguments`, the flags by name,
    and `seed`, of the certificate. batches: of the whole set. certificate_seed: the one that was asked for, if any.

    Raises:
        InputError: if there is something already that may not be replaced, or nothing to go on with, or something else.
    """
    for folder in (out, *reports):
        check_writable(folder)
    record = out / "unfinished" / "run.json"
    if resume:
        begun = _read(record)
        _refuse_other(begun, run, certificate_seed, out)
        for leftover in (path for folder in reports for path in folder.glob(".*.tmp")):
            leftover.unlink(missing_ok=True)
        return begun
    if record.is_file() and not overwrite:
        done = len(list(record.parent.glob("[0-9]*.npz")))
        raise InputError(
            f"{out} has an unfinished evaluation, {done} of {batches} batches; go on with it (--resume), or start anew "
            f"(--overwrite)"
        )
    for folder in reports:
        refuse_existing(folder / "summary.json", overwrite)
    record.unlink(missing_ok=True)
    shutil.rmtree(record.parent, ignore_errors=True)
    text = json.dumps(run, indent=2) + "\n"
    write_atomically(record, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return json.loads(text)


def source_sha256() -> str:
    """Of the package's source, as what one version finds is not to be mixed with what another does."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def images_sha256(images: ImageSet) -> str:
    """Of pixels and labels."""
    digest = hashlib.sha256(images.labels.cpu().numpy().tobytes())
    for part in images.images.split(1024):
        digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()


def _read(record: Path) -> dict[str, Any]:
    if not record.is_file():
        raise InputError(f"{record.parent.parent} has no unfinished evaluation to resume; start one without --resume")
    try:
        run = json.loads(record.read_text(encoding="utf-8"))
        return run | {"arguments": dict(run["arguments"]), "seed": int(run["seed"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{record} is damaged; start the evaluation anew with --overwrite") from None


def _refuse_other(begun: Mapping[str, Any], run: Mapping[str, Any], certificate_seed: int | None, out: Path) -> None:
    """Refuse to go on with a run by anything that could find something else."""

    def refuse(what: str) -> None:
        raise InputError(f"cannot resume {out}: it was begun {what}; --overwrite starts anew")

    theirs, ours = begun["arguments"], json.loads(json.dumps(run["arguments"]))
    for name in [name for name in {**theirs, **ours} if name not in _INDIFFERENT]:
        if theirs.get(name) != ours.get(name):
            refuse(f"with --{name} {theirs.get(name)}, not {ours.get(name)}")
    if certificate_seed not in (None, begun["seed"]):
        refuse(f"with --certificate_seed {begun['seed']}, not {certificate_seed}")
    for name in [name for name in run if name not in ("arguments", "seed")]:
        if begun.get(name) != run[name]:
            refuse(f"with other {name}: {_short(begun.get(name))}, not {_short(run[name])}")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
