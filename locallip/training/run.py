"""A run of training, as the training scripts start it: epochs, log, checkpoints, resuming."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from locallip import devices, distributed
from locallip.bound.compiled import compile_all
from locallip.bound.power_iteration import PowerIteration
from locallip.checkpoints import find_checkpoint, load_checkpoint, load_weights
from locallip.files import InputError, ScriptError, check_writable, exists
from locallip.images import Augmentation, ImageSet
from locallip.training.averaging import AveragedModel
from locallip.training.files import RunFiles, best_row, better, errors
from locallip.training.gradients import wrap
from locallip.training.optimizers import OPTIMIZERS, set_rate
from locallip.training.recording import RecordedStep, ahead, in_cuda_graph
from locallip.training.resuming import own_shuffle, refuse_other_arguments
from locallip.training.schedule import Schedule
from locallip.training.shares import count_batches, loss_weights
from locallip.training.step import Layout, RobustLoss, Step, Tally
from locallip.training.validation import in_words, validate
from locallip.training.vectors import StoredVectors, make_room

# Power iterations per step of the first resumed epoch, in place of singular vectors that were not kept.
RESUME_ITERATIONS = 30
# Activations that a training has to compute, over all images and epochs, for compilation to pay.
COMPILE_FROM = 1e10
# Batches between two looks at the loss; on a GPU every look waits for the device.
BATCHES_PER_LOOK = 20


class TrainingDiverged(ScriptError):
    """The loss is not finite; names epoch, batch and epsilon."""


def train(
    model: nn.Sequential,
    training_set: ImageSet,
    validation_set: ImageSet,
    args: argparse.Namespace,
    augment: Augmentation | None = None,
) -> None:
    """Train as `args`, the flags of a training script, say, leaving below `args.output_dir`:

        PREFIX_checkpoint.pth  the last epoch, with all that resuming needs
        PREFIX_best.pth        the epoch with the smallest certified error on the validation set, its weights or, with
                               --ema, their average
        PREFIX_epochs.csv      one row per epoch
        PREFIX_vectors.pth     with --keep_vectors, every image's singular vectors, one file a process

    Model and both sets have to be on one device. Errors count an image as certified by the power-iteration estimate.
    Of several processes, each is given the same model and its own part of the sets, and the first writes the files.

    augment: what changes the training images of a batch at random, but for the last `args.unaugmented_epochs`.

    Raises:
        InputError: if the prefix has a run already, --resume finds none that fits, the weights of --start_from are of
            another architecture, a layer that --indices names does not exist, memory does not suffice for the singular
            vectors, or a file cannot be written.
        TrainingDiverged: at a loss that is not finite; the checkpoints stay as they are.
    """
    _Run(model, training_set, validation_set, args, augment).train()


class _Run:
    def __init__(
        self,
        model: nn.Sequential,
        training_set: ImageSet,
        validation_set: ImageSet,
        args: argparse.Namespace,
        augment: Augmentation | None,
    ):
        self.model, self.training_set, self.validation_set, self.args = model, training_set, validation_set, args
        self.augment = augment
        self.device = training_set.labels.device
        torch.backends.cudnn.benchmark = True  # the shapes of a training are few, and each is convolved often
        self.schedule = Schedule.from_arguments(args)
        self.files = RunFiles(Path(args.output_dir), args.prefix)
        _refuse_unknown_positions(args.indices, model)
        self._refuse_files()
        self.shuffle = torch.Generator().manual_seed(args.seed + distributed.rank())
        self.norms = self._norms()
        if args.start_from and not args.resume:
            load_weights(model, self._load(find_checkpoint(args.start_from))["state_dict"], args.start_from)
        products = torch.bfloat16 if args.bfloat16 else torch.float32
        self.optimizer = OPTIMIZERS[args.optimizer](model, args.lr, products)
        self.averaged = AveragedModel(model, args.ema) if args.ema else None
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []
        self.images = distributed.gather(len(training_set))
        self.batches = count_batches(self.images, args.batch_size)
        self.weights = loss_weights(self.images, args.batch_size, self.batches)[distributed.rank()]
        if args.resume:
            self._resume()
        self.step = self._step()

    def _refuse_files(self) -> None:
        """Refuse a place that cannot be written to, or that has a run already that nobody asked for."""
        with distributed.all_or_none():
            if distributed.is_main():
                check_writable(self.files.best.parent)
                if self.args.resume and not exists(self.files.checkpoint):
                    raise InputError(f"there is nothing to resume: {self.files.checkpoint} is absent; drop --resume")
                if not self.args.resume and not self.args.overwrite:
                    self.files.refuse_existing()

    def _norms(self) -> PowerIteration:
        args = self.args
        return PowerIteration(
            args.sniter,
            seed=args.seed,
            local_positions=args.indices if args.global_epochs < args.epochs else [],
            # On a GPU the iterations that skipping saves are cheaper than finding out which.
            skip_idle_masks=self.device.type == "cpu",
            factors=torch.bfloat16 if args.bfloat16 else None,
            ascend=args.ascend,
            looks_for_underflow=False,
        )

    def _step(self) -> Step | RecordedStep:
        """The step of the training, with room for the vectors of its images, compiled where that pays."""
        args = self.args
        loss = wrap(RobustLoss.from_arguments(self.model, self.norms, args), args.ddp)
        image, _, _ = next(self.training_set[:1].batches(1))
        layout = Layout.of(self.model, image, self.norms.local_positions)
        with distributed.all_or_none():
            stored = make_room(len(self.training_set), layout.vectors, self.device, args.seed)
            self.finds_vectors_anew = args.resume and not self._has_kept(stored)
        pays = layout.activations * len(self.training_set) * (args.epochs - self.epoch) >= COMPILE_FROM
        if args.compile == "yes" or (args.compile == "auto" and pays):
            compile_all()
        step = Step(loss, self.norms, stored, self.optimizer)
        can_be_recorded = self.device.type == "cuda" and stored.device == self.device and distributed.processes() == 1
        if args.cuda_graph == "yes" and not can_be_recorded:
            raise InputError(
                "--cuda_graph yes needs one process, on a GPU that has room for the singular vectors; leave it out here"
            )
        return RecordedStep(step, in_cuda_graph) if can_be_recorded and args.cuda_graph != "no" else step

    def train(self) -> None:
        first, args = self.epoch, self.args
        held_out = f"held out for validation (--val_split {args.val_split})"
        published = "test images that pick the best epoch (--val_split 0, the paper's protocol)"
        validated = sum(distributed.gather(len(self.validation_set)))
        processes, stored = distributed.processes(), self.step.stored
        each = "" if processes == 1 else f", in each of {processes} processes"
        distributed.say(f"{sum(self.images)} training images, {validated} {held_out if args.val_split else published}")
        anew = "; not kept (--keep_vectors), the first epoch finds them anew" if self.finds_vectors_anew else ""
        size = f"{stored.bytes / 1e6:,.1f} MB in half precision on {stored.device}"
        distributed.say(f"singular vectors: {size}{each}{anew}")
        total, quiet = args.epochs * self.batches, None if distributed.is_main() else True
        with tqdm(total=total, initial=first * self.batches, unit="batch", disable=quiet, dynamic_ncols=True) as bar:
            for epoch in range(first, args.epochs):
                started = time.perf_counter()
                is_new = epoch == first and self.finds_vectors_anew
                self.norms.iterations = max(args.sniter, RESUME_ITERATIONS) if is_new else args.sniter
                with devices.tf32(args.bfloat16 and self.device.type == "cuda"):
                    row = self._train_epoch(epoch, bar)
                row |= self._validate(self._has_box(epoch))
                row["seconds"] = round(time.perf_counter() - started, 2)
                self._finish_epoch(epoch, row)
        best = best_row(self.rows)
        error, _ = errors(best, better(best))
        distributed.say(f"best certified error {error:.2%}: {self.files.best}")
        if error == 1:
            distributed.say(f"nothing was certified at --epsilon {args.epsilon:.4g}; a smaller one tells epochs apart")

    def _has_box(self, epoch: int) -> bool:
        return epoch >= self.args.global_epochs

    def _augmentation(self, epoch: int) -> Augmentation | None:
        return self.augment if epoch < self.args.epochs - self.args.unaugmented_epochs else None

    def _train_epoch(self, epoch: int, bar: tqdm) -> dict[str, Any]:
        bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}")
        self.step.loss.train()
        tally = Tally(self.device)
        non_finite = torch.full((), self.batches, device=self.device)  # first batch whose loss is not finite
        augment = self._augmentation(epoch)
        batches = self.training_set.batches(self.args.batch_size, self.shuffle, augment, self.batches)
        if self.device.type == "cuda":
            batches = ahead(batches, self.device)
        for batch, (x, y, indices) in enumerate(batches):
            moment = epoch + batch / self.batches
            epsilon, kappa = self.schedule.epsilon_at(moment), self.schedule.kappa_at(moment)
            lr = self.schedule.lr_at(moment)
            set_rate(self.optimizer, lr)
            loss, logits, worst = self.step(x, y, indices, epsilon, kappa, self.weights[batch], self._has_box(epoch))
            if self.averaged:
                self.averaged.update()
            tally.add(loss, logits, worst, y)
            non_finite = torch.where(loss.isfinite(), non_finite, non_finite.clamp(max=batch))
            bar.update()
            if batch % BATCHES_PER_LOOK == 0 or batch == self.batches - 1:
                self._refuse_non_finite(epoch, int(distributed.smallest(non_finite)))
                mean, clean, certified = tally.means()
                bar.set_postfix(loss=f"{mean:.3f}", clean=f"{clean:.2%}", certified=f"{certified:.2%}")
        mean, clean, certified = tally.of_all_processes().means()
        return {
            "epoch": epoch + 1,
            "epsilon": round(self.schedule.epsilon_at(epoch + 1), 6),
            "kappa": round(self.schedule.kappa_at(epoch + 1), 6),
            "lr": lr,
            "loss": mean,
            "clean_error": clean,
            "certified_error": certified,
        }

    def _refuse_non_finite(self, epoch: int, batch: int) -> None:
        if batch < self.batches:
            epsilon = self.schedule.epsilon_at(epoch + batch / self.batches)
            raise TrainingDiverged(
                f"the loss is not finite in epoch {epoch + 1}, batch {batch + 1}, at epsilon {epsilon:.6g}; "
                f"{self._left()}"
            )

    def _left(self) -> str:
        """What a training that diverged leaves behind."""
        return f"the checkpoint of epoch {self.epoch} is untouched" if self.epoch else "no checkpoint was written yet"

    def _validate(self, box: bool) -> dict[str, float]:
        given = self.validation_set, self.args, self.norms.global_vectors, box
        found = validate(self.model.eval(), *given)
        return found | validate(self.averaged.model, *given, "averaged") if self.averaged else found

    def _finish_epoch(self, epoch: int, row: dict[str, Any]) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise TrainingDiverged(f"a weight is not finite after epoch {epoch + 1}; {self._left()}")
        self.epoch = epoch + 1
        self.rows.append(row)
        is_best = best_row(self.rows) is row
        shuffles = torch.stack(distributed.gather(self.shuffle.get_state()))
        with distributed.all_or_none():
            if distributed.is_main():
                self.files.save(self._checkpoint(row["validation_certified_error"], shuffles))
        with distributed.all_or_none():
            self._keep_vectors()
        distributed.say(
            f"epoch {self.epoch}/{self.args.epochs}  epsilon {row['epsilon']:.4f}  lr {row['lr']:.2e}  "
            f"loss {row['loss']:.4f}  error: train clean {row['clean_error']:.2%} certified "
            f"{row['certified_error']:.2%}, {in_words(row, is_best)}  {row['seconds']:.1f} s"
        )

    def _checkpoint(self, error: float, shuffles: Tensor) -> dict[str, Any]:
        published = {"state_dict": self.model.state_dict(), "err": error, "epoch": self.epoch}
        return published | {
            "arguments": vars(self.args),
            "hardware": devices.hardware(self.device),
            "optimizer": self.optimizer.state_dict(),
            "global_vectors": self.norms.global_vectors,
            "shuffle": shuffles,  # one row per process
            "rows": self.rows,
            **({"averaged": self.averaged.state()} if self.averaged else {}),
        }

    @staticmethod
    def _load(path: Path) -> dict[str, Any]:
        checkpoint = {}
        with distributed.all_or_none():
            if distributed.is_main():  # the other processes may be on machines that have no such file
                checkpoint = load_checkpoint(path)
        return distributed.share(checkpoint)

    def _resume(self) -> None:
        checkpoint = self._load(self.files.checkpoint)
        missing = self._checkpoint(0.0, self.shuffle.get_state()).keys() - checkpoint.keys() - {"hardware"}
        if missing:
            raise InputError(f"{self.files.checkpoint} cannot be resumed: it has no {', '.join(sorted(missing))}")
        try:
            refuse_other_arguments(self.args, checkpoint["arguments"], self.files.checkpoint)
            load_weights(self.model, checkpoint["state_dict"], str(self.files.checkpoint))
            if self.averaged:
                self.averaged.load_state(checkpoint["averaged"], f"the average in {self.files.checkpoint}")
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.norms.global_vectors = {p: v.to(self.device) for p, v in checkpoint["global_vectors"].items()}
            self.shuffle.set_state(own_shuffle(checkpoint["shuffle"]))
            self.epoch, self.rows = int(checkpoint["epoch"]), list(checkpoint["rows"])
            best_row(self.rows)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise InputError(f"{self.files.checkpoint} cannot be resumed: {error}") from None
        with distributed.all_or_none():
            if distributed.is_main():
                self.files.make_good(checkpoint)
        distributed.say(f"resuming after epoch {self.epoch} of {self.args.epochs}")

    def _keep_vectors(self) -> None:
        """Write the singular vectors after an epoch; those of another one are of no use any more."""
        if self.args.keep_vectors and self.step.stored.bytes:
            self.step.stored.save(self.files.vectors, self.epoch)
            return
        with contextlib.suppress(OSError):  # what stays says which epoch it is of
            self.files.vectors.unlink(missing_ok=True)

    def _has_kept(self, stored: StoredVectors) -> bool:
        """Whether the last epoch's singular vectors were kept, if there are any; takes what was kept."""
        if not stored.bytes:
            return True
        return exists(self.files.vectors) and stored.load(self.files.vectors) == self.epoch


def _refuse_unknown_positions(indices: list[int] | None, model: nn.Sequential) -> None:
    linear = [i for i, layer in enumerate(model[:-1]) if isinstance(layer, nn.Conv2d | nn.Linear)]
    for position in indices or []:
        if position not in linear:
            raise InputError(
                f"--indices names {position}, but the linear layers with a local norm are {', '.join(map(str, linear))}"
            )
