"""The training loop that all training scripts share: schedules, epochs, logs, checkpoints, resuming."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import distributed
import utils
from data_load import DATA_SETS, ImageSet, batch_sizes, count_classes, hold_out, load_data
from local_bound import Norms, bcp_loss, gloro_loss, propagate, worst_logits, worst_margin
from locallip.bound.fused import compile_activations
from locallip.bound.operators import Position
from locallip.bound.power_iteration import PowerIteration
from locallip.training.vectors import StoredVectors
from utils import InputError, ScriptError, first_line

# Power iterations per step of the first resumed epoch, in place of the singular vectors that checkpoints do not hold.
RESUME_ITERATIONS = 30
# Activations that a training has to compute, over all images and epochs, for compilation to pay.
COMPILE_FROM = 1e10
# Batches between two looks at the loss; on a GPU every look waits for the device.
BATCHES_PER_LOOK = 20


class TrainingDiverged(ScriptError):
    """The loss is not finite; names epoch, batch and epsilon."""


@dataclass(frozen=True)
class Schedule:
    """Radius, loss weight and learning rate over a training of so many epochs (the published recipe).

    Attributes:
        epochs, warmup, rampup: lengths in epochs.
        epsilon: radius at the end of the ramp-up, pixel space.
        lr, end_lr: learning rate of the first and the last epoch.
        constant_epochs: epochs before the decay begins; None: no decay.
    """

    epochs: int
    warmup: int
    rampup: int
    epsilon: float
    lr: float
    end_lr: float
    constant_epochs: float | None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Schedule:
        constant = args.epochs / 2 + args.more if args.lr_scheduler == "exp" else None
        return cls(args.epochs, args.warmup, args.rampup, args.epsilon_train, args.lr, args.end_lr, constant)

    def ramp(self, time: float) -> float:
        """Share of the ramp-up that is done, 0 to 1. time: in epochs, with fractions."""
        if self.rampup == 0:
            return float(time >= self.warmup)
        return min(max((time - self.warmup) / self.rampup, 0.0), 1.0)

    def epsilon_at(self, time: float) -> float:
        return self.epsilon * self.ramp(time)

    def kappa_at(self, time: float) -> float:
        """Weight of the clean loss in the BCP loss."""
        return 1.0 - self.ramp(time)

    def lr_at(self, epoch: int) -> float:
        """Constant, then exponential from lr to end_lr, which the last epoch has."""
        if self.constant_epochs is None or epoch < self.constant_epochs or self.constant_epochs >= self.epochs:
            return self.lr
        decay = (epoch - (self.constant_epochs - 1)) / (self.epochs - self.constant_epochs)
        return self.lr * (self.end_lr / self.lr) ** decay


class Tally:
    """Sums over the images of an epoch, kept on the device so that counting does not wait for it."""

    def __init__(self, device: torch.device):
        self.images = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, clean errors, certified errors

    def add(self, loss: Tensor, logits: Tensor, worst: Tensor, y: Tensor) -> None:
        clean_errors = (logits.argmax(dim=1) != y).sum()
        certified_errors = (~(worst_margin(worst, y) > 0)).sum()
        self.images += len(y)
        self._sums += torch.stack([loss.detach() * len(y), clean_errors, certified_errors])

    def of_all_processes(self) -> Tally:
        """The sums over the images of all processes."""
        result = Tally(self._sums.device)
        result.images = sum(distributed.gather(self.images))
        result._sums = distributed.total(self._sums)
        return result

    def means(self) -> tuple[float, float, float]:
        """Mean loss, clean error and certified error, the errors as fractions."""
        loss, clean, certified = (self._sums / max(self.images, 1)).tolist()
        return loss, clean, certified


class RobustLoss(nn.Module):
    """Clean pass, bound and loss as one forward pass, so that gradients can be averaged over processes.

    Args:
        model: as for `propagate`.
        norms: where the bound's norms come from.
        rounds: of pinning for the worst-case logits.
        gloro: GloRo loss instead of BCP loss.
        sparse: weight of the sparsity term, added to either.
        sparse_threshold: see `propagate`; without effect where `sparse` is 0.
    """

    def __init__(
        self,
        model: nn.Sequential,
        norms: Norms,
        rounds: int = 1,
        gloro: bool = False,
        sparse: float = 0.0,
        sparse_threshold: float = 0.1,
    ):
        super().__init__()
        self.model, self.norms, self.rounds, self.gloro, self.sparse = model, norms, rounds, gloro, sparse
        self.sparse_threshold = sparse_threshold if sparse else None

    def forward(
        self, x: Tensor, y: Tensor, epsilon: float, kappa: float, box: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss over the batch, logits (N, K) and worst-case logits (N, K). x: (N, C, H, W), y: (N,).

        kappa: weight of the clean loss in the BCP loss. box: see `propagate`.
        """
        sparse_threshold = self.sparse_threshold if box else None
        bound = propagate(self.model, x, epsilon, self.norms, sparse_threshold=sparse_threshold, box=box)
        worst = worst_logits(bound, y, self.rounds)
        clean = bound.logits
        loss = gloro_loss(clean, worst, y) if self.gloro else bcp_loss(clean, worst, y, kappa)
        if bound.sparsity is not None:
            loss = loss + self.sparse * bound.sparsity
        return loss, clean, worst


class Step:
    """One optimizer step on a batch, its power iterations warm-started by the images' stored vectors.

    Args:
        loss: a `RobustLoss`, wrapped for several processes or not.
        norms: those of the loss.
        stored: vectors of the images that the step will see.
        optimizer: of the parameters of the loss.
    """

    def __init__(self, loss: nn.Module, norms: PowerIteration, stored: StoredVectors, optimizer: torch.optim.Optimizer):
        self.loss, self.norms, self.stored, self.optimizer = loss, norms, stored, optimizer
        self._clipped = [layer for layer in loss.modules() if isinstance(layer, utils.ReLU_x)]

    def __call__(
        self, x: Tensor, y: Tensor, indices: Tensor, epsilon: float, kappa: float, weight: float = 1.0, box: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the loss returned on the batch before the step. indices: (N,) rows of the stored vectors.

        box: see `propagate`; without a box the stored vectors are left alone.
        """
        self.norms.local_vectors = self.stored.read(indices) if box else {}
        loss, logits, worst = self.loss(x, y, epsilon, kappa, box)
        self.optimizer.zero_grad()
        (weight * loss).backward()
        self.optimizer.step()
        for layer in self._clipped:
            layer.project()
        if box:
            self.stored.write(indices, self.norms.local_vectors)
        return loss.detach(), logits.detach(), worst.detach()


@dataclass(frozen=True)
class Layout:
    """What one image shows about a network.

    Attributes:
        vectors: by position of a layer with local norms, the shape of its singular vector.
        activations: number of them.
    """

    vectors: dict[Position, torch.Size]
    activations: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Sequential, image: Tensor, local_positions: Collection[int] | None = None) -> Layout:
        """Layout of a model, local norms at these positions only. image: (1, C, H, W)."""
        probe = PowerIteration(1, local_positions=local_positions)
        bound = propagate(model, image, 0.0, probe)
        vectors = {position: vector.shape[1:] for position, vector in probe.local_vectors.items()}
        activations = sum(layer.numel() for position, layer in bound.varying.items() if position not in bound.masks)
        return cls(vectors, activations)


def run(args: argparse.Namespace) -> None:
    """What a training script does with its arguments: data, network, then `train`, in one process or several."""
    with distributed.process_group(args.device):
        device = distributed.select_device(args.device)
        torch.manual_seed(args.seed)
        classes = count_classes(args.data, args.data_dir)
        model = utils.select_model(args.data, args.model, args.init, args.width, classes, args.orthogonal)
        # On a CPU a 3x3 convolution of 32 channels takes half the time in this order.
        model = model.to(device, memory_format=torch.channels_last)
        with distributed.one_per_machine_first():
            training_set = load_data(args.data, args.data_dir, train=True)
            if args.val_split:
                training_set, validation_set = hold_out(training_set, args.val_split, args.seed)
            else:
                validation_set = load_data(args.data, args.data_dir, train=False)
        parts = (distributed.shard(images).to(device) for images in (training_set, validation_set))
        train(model, *parts, args)


def train(
    model: nn.Sequential,
    training_set: ImageSet,
    validation_set: ImageSet,
    args: argparse.Namespace,
) -> None:
    """Train as `args` (see `utils.training_arguments`) say, leaving below `args.output_dir`:

        PREFIX_checkpoint.pth  the last epoch, with all that resuming needs
        PREFIX_best.pth        the epoch with the smallest certified error on the validation set
        PREFIX_epochs.csv      one row per epoch

    model and both sets have to be on one device. Errors count an image as certified by the power-iteration estimate.
    Of several processes, each is given the same model and its own part of the sets, and the first writes the files.

    Raises:
        InputError: if the prefix has a run already, --resume finds none that fits, a layer that --indices names does
            not exist, or memory does not suffice for the singular vectors.
        TrainingDiverged: at a loss that is not finite; the checkpoints stay as they are.
    """
    _Run(model, training_set, validation_set, args).train()


class _Run:
    def __init__(
        self, model: nn.Sequential, training_set: ImageSet, validation_set: ImageSet, args: argparse.Namespace
    ):
        self.model, self.training_set, self.validation_set, self.args = model, training_set, validation_set, args
        self.device = training_set.labels.device
        self.schedule = Schedule.from_arguments(args)
        self.files = RunFiles(Path(args.output_dir), args.prefix)
        if distributed.is_main():
            utils.check_writable(self.files.best.parent)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        self.shuffle = torch.Generator().manual_seed(args.seed + distributed.rank())
        _refuse_unknown_positions(args.indices, model)
        # On a GPU the iterations that skipping saves are cheaper than finding out which.
        skip = self.device.type == "cpu"
        local_positions = args.indices if args.global_epochs < args.epochs else []
        self.norms = PowerIteration(
            args.sniter,
            seed=args.seed,
            local_positions=local_positions,
            skip_idle_masks=skip,
            factors=torch.bfloat16 if args.bfloat16 else None,
        )
        self.epoch = 0
        self.best_error = math.inf
        self.rows: list[dict[str, Any]] = []
        self.images = distributed.gather(len(training_set))
        self.batches = count_batches(self.images, args.batch_size)
        self.weights = loss_weights(self.images, args.batch_size, self.batches)[distributed.rank()]
        if args.resume:
            self._resume()
        elif distributed.is_main():
            self.files.refuse_existing(args.overwrite)
        loss = distributed.wrap(
            RobustLoss(model, self.norms, args.opt_iter, args.gloro, args.sparse, args.sp_thres), args.ddp
        )
        image, _, _ = next(training_set[:1].batches(1))
        layout = Layout.of(model, image, local_positions)
        self.step = Step(loss, self.norms, self._make_room(layout), self.optimizer)
        pays = layout.activations * len(training_set) * (args.epochs - self.epoch) >= COMPILE_FROM
        if args.compile == "yes" or (args.compile == "auto" and pays):
            compile_activations()

    def train(self) -> None:
        first, args = self.epoch, self.args
        held_out = f"held out for validation (--val_split {args.val_split})"
        published = "test images that pick the best epoch (--val_split 0, the paper's protocol)"
        validated = sum(distributed.gather(len(self.validation_set)))
        processes, stored = distributed.processes(), self.step.stored
        each = "" if processes == 1 else f", in each of {processes} processes"
        distributed.say(f"{sum(self.images)} training images, {validated} {held_out if args.val_split else published}")
        distributed.say(f"singular vectors: {stored.bytes / 1e6:,.1f} MB in half precision on {stored.device}{each}")
        total, quiet = args.epochs * self.batches, None if distributed.is_main() else True
        with tqdm(total=total, initial=first * self.batches, unit="batch", disable=quiet, dynamic_ncols=True) as bar:
            for epoch in range(first, args.epochs):
                started = time.perf_counter()
                self.norms.iterations = max(args.sniter, RESUME_ITERATIONS) if 0 < epoch == first else args.sniter
                row = self._train_epoch(epoch, bar) | self._validate(self._has_box(epoch))
                row["seconds"] = round(time.perf_counter() - started, 2)
                self._finish_epoch(epoch, row)
        distributed.say(f"best certified error {self.best_error:.2%}: {self.files.best}")

    def _has_box(self, epoch: int) -> bool:
        return epoch >= self.args.global_epochs

    def _train_epoch(self, epoch: int, bar: tqdm) -> dict[str, Any]:
        bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}")
        self.step.loss.train()
        lr = self.schedule.lr_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tally = Tally(self.device)
        non_finite = torch.full((), self.batches, device=self.device)  # first batch whose loss is not finite
        augment = DATA_SETS[self.args.data].augmented and not self.args.no_augmentation
        batches = self.training_set.batches(self.args.batch_size, self.shuffle, augment, self.batches)
        for batch, (x, y, indices) in enumerate(batches):
            moment = epoch + batch / self.batches
            epsilon, kappa = self.schedule.epsilon_at(moment), self.schedule.kappa_at(moment)
            loss, logits, worst = self.step(x, y, indices, epsilon, kappa, self.weights[batch], self._has_box(epoch))
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
                f"the last good checkpoint is untouched"
            )

    @torch.no_grad()
    def _validate(self, box: bool) -> dict[str, float]:
        self.model.eval()
        tally = Tally(self.device)
        norms = PowerIteration(
            self.args.test_sniter, {}, self.norms.global_vectors, self.args.seed, skip_idle_masks=True
        )
        for x, y, _ in self.validation_set.batches(self.args.test_batch_size):
            norms.local_vectors = {}
            bound = propagate(self.model, x, self.args.epsilon, norms, box=box)
            worst = worst_logits(bound, y, self.args.test_opt_iter)
            tally.add(torch.zeros_like(bound.radius[0]), bound.logits, worst, y)
        _, clean, certified = tally.of_all_processes().means()
        return {"validation_clean_error": clean, "validation_certified_error": certified}

    def _finish_epoch(self, epoch: int, row: dict[str, Any]) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise TrainingDiverged(
                f"a weight is not finite after epoch {epoch + 1}; the last good checkpoint is untouched"
            )
        self.epoch = epoch + 1
        self.rows.append(row)
        error = row["validation_certified_error"]
        shuffles = torch.stack(distributed.gather(self.shuffle.get_state()))
        if not distributed.is_main():
            return
        published = {"state_dict": self.model.state_dict(), "err": error, "epoch": self.epoch}
        is_best = error < self.best_error
        if is_best:
            self.best_error = error
            utils.save_checkpoint(self.files.best, published | {"arguments": vars(self.args)})
        utils.save_checkpoint(self.files.checkpoint, published | self._resume_state(shuffles))
        utils.write_csv(self.files.log, self.rows)
        distributed.say(
            f"epoch {self.epoch}/{self.args.epochs}  epsilon {row['epsilon']:.4f}  lr {row['lr']:.2e}  "
            f"loss {row['loss']:.4f}  error: train clean {row['clean_error']:.2%} certified "
            f"{row['certified_error']:.2%}, validation clean {row['validation_clean_error']:.2%} certified "
            f"{error:.2%}{' (best)' if is_best else ''}  {row['seconds']:.1f} s"
        )

    def _resume_state(self, shuffles: Tensor) -> dict[str, Any]:
        return {
            "arguments": vars(self.args),
            "optimizer": self.optimizer.state_dict(),
            "best_error": self.best_error,
            "global_vectors": self.norms.global_vectors,
            "shuffle": shuffles,  # one row per process
            "rows": self.rows,
        }

    def _resume(self) -> None:
        # The other processes may be on machines that have no such file.
        checkpoint = distributed.share(utils.load_checkpoint(self.files.checkpoint) if distributed.is_main() else {})
        missing = {"epoch", *self._resume_state(self.shuffle.get_state())} - checkpoint.keys()
        if missing:
            raise InputError(f"{self.files.checkpoint} cannot be resumed: it has no {', '.join(sorted(missing))}")
        try:
            self._refuse_other_arguments(dict(checkpoint["arguments"]))
            utils.load_weights(self.model, checkpoint["state_dict"], str(self.files.checkpoint))
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.norms.global_vectors = {p: v.to(self.device) for p, v in checkpoint["global_vectors"].items()}
            self.shuffle.set_state(self._own_shuffle(checkpoint["shuffle"]))
            self.epoch, self.best_error = int(checkpoint["epoch"]), float(checkpoint["best_error"])
            self.rows = list(checkpoint["rows"])
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise InputError(f"{self.files.checkpoint} cannot be resumed: {error}") from None
        distributed.say(f"resuming after epoch {self.epoch} of {self.args.epochs}")

    def _own_shuffle(self, shuffles: Tensor) -> Tensor:
        shuffles = torch.atleast_2d(shuffles)
        if len(shuffles) != distributed.processes():
            raise ValueError(f"it ran in {len(shuffles)} processes, not {distributed.processes()}")
        return shuffles[distributed.rank()].clone()  # a generator takes no view of a part of a tensor

    def _refuse_other_arguments(self, saved: dict[str, Any]) -> None:
        may_differ = {
            *("device", "ddp", "compile", "data_dir", "output_dir", "prefix", "resume", "overwrite", "test_batch_size")
        }
        for name, value in vars(self.args).items():
            if name not in may_differ and name in saved and saved[name] != value:
                raise InputError(
                    f"cannot resume {self.files.checkpoint}: it ran with --{name} {saved.get(name)}, not {value}"
                )

    def _make_room(self, layout: Layout) -> StoredVectors:
        """Room for one singular vector per image and layer."""
        memory = utils.available_memory()
        share = None if memory is None else memory // distributed.processes_here()
        try:
            return StoredVectors(len(self.training_set), layout.vectors, self.device, self.args.seed, share)
        except (RuntimeError, MemoryError) as error:
            raise InputError(
                f"no room for the singular vectors of {len(self.training_set)} training images in each process: "
                f"{first_line(error)}; local norms at fewer layers (--indices) or more machines would help"
            ) from None


def count_batches(images: list[int], batch_size: int) -> int:
    """Steps of an epoch, the same for all processes, whose numbers of images these are: none goes without an image.

    Raises:
        InputError: if a process has no image.
    """
    if min(images) == 0:
        raise InputError(f"{len(images)} processes are more than there are training images, {sum(images)}")
    return min(math.ceil(max(images) / batch_size), min(images))


def loss_weights(images: list[int], batch_size: int, batches: int) -> list[list[float]]:
    """By process and batch: what makes the mean over the processes of their mean losses the mean over the images."""
    sizes = [batch_sizes(count, batch_size, batches) for count in images]
    together = [sum(column) for column in zip(*sizes)]
    return [[len(images) * size / whole for size, whole in zip(row, together)] for row in sizes]


def _refuse_unknown_positions(indices: list[int] | None, model: nn.Sequential) -> None:
    linear = [i for i, layer in enumerate(model[:-1]) if isinstance(layer, nn.Conv2d | nn.Linear)]
    for position in indices or []:
        if position not in linear:
            raise InputError(
                f"--indices names {position}, but the linear layers with a local norm are {', '.join(map(str, linear))}"
            )


class RunFiles:
    """The files of a run below one prefix."""

    def __init__(self, folder: Path, prefix: str):
        stem = folder / prefix
        if Path(prefix).name in ("", ".."):
            raise InputError(f"--prefix '{prefix}' ends in no name for files")
        self.best, self.checkpoint, self.log = (
            stem.with_name(stem.name + ending) for ending in ("_best.pth", "_checkpoint.pth", "_epochs.csv")
        )

    def refuse_existing(self, overwrite: bool) -> None:
        for path in (self.best, self.checkpoint, self.log):
            if not overwrite and utils.exists(path):
                raise InputError(f"{path} exists; choose another --prefix, or --resume, or --overwrite")
