"""Radius, loss weight and learning rate over a training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

# Where a radius starts that rises on a logarithmic scale, in pixel space (Leino et al. 2021, their MNIST run).
LOG_START = 0.01


@dataclass(frozen=True)
class Schedule:
    """Radius, loss weight and learning rate over a training of so many epochs; the published recipe by default.

    Attributes:
        epochs, warmup, rampup: lengths in epochs.
        epsilon: radius at the end of the ramp-up, pixel space.
        lr, end_lr: largest learning rate, and that of the end.
        constant_epochs: epochs before the exponential decay begins.
        lr_scheduler: a key of `RATES`.
        lr_warmup: epochs, with fractions, in which the learning rate rises from 0; linear and cosine fall from there.
        epsilon_schedule: a key of `RADII`.
    """

    epochs: int
    warmup: int
    rampup: int
    epsilon: float
    lr: float
    end_lr: float
    constant_epochs: float
    lr_scheduler: str = "exp"
    lr_warmup: float = 0.0
    epsilon_schedule: str = "linear"

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Schedule:
        return cls(
            epochs=args.epochs,
            warmup=args.warmup,
            rampup=args.rampup,
            epsilon=args.epsilon_train,
            lr=args.lr,
            end_lr=args.end_lr,
            constant_epochs=args.epochs / 2 + args.more,
            lr_scheduler=args.lr_scheduler,
            lr_warmup=args.lr_warmup,
            epsilon_schedule=args.epsilon_schedule,
        )

    def ramp(self, time: float) -> float:
        """Share of the ramp-up that is done, 0 to 1. time: in epochs, with fractions."""
        if self.rampup == 0:
            return float(time >= self.warmup)
        return min(max((time - self.warmup) / self.rampup, 0.0), 1.0)

    def epsilon_at(self, time: float) -> float:
        """Radius of training, pixel space. time: in epochs, with fractions."""
        return RADII[self.epsilon_schedule](self, time)

    def kappa_at(self, time: float) -> float:
        """Weight of the clean loss in the BCP loss."""
        return 1.0 - self.ramp(time)

    def lr_at(self, time: float) -> float:
        """Learning rate of the step that begins at this time, in epochs, with fractions."""
        risen = 1.0 if time >= self.lr_warmup else time / self.lr_warmup
        return risen * RATES[self.lr_scheduler](self, time)

    def fallen(self, time: float) -> float:
        """Share of the way from the end of the learning rate's warm-up to the end of the training, 0 to 1."""
        return max(0.0, (time - self.lr_warmup) / (self.epochs - self.lr_warmup))


def _exponential(schedule: Schedule, time: float) -> float:
    """Constant, then exponential from lr to end_lr, epoch by epoch: the last one has end_lr."""
    epoch, constant = int(time), schedule.constant_epochs
    if epoch < constant or constant >= schedule.epochs:
        return schedule.lr
    decay = (epoch - (constant - 1)) / (schedule.epochs - constant)
    return schedule.lr * (schedule.end_lr / schedule.lr) ** decay


def _constant(schedule: Schedule, time: float) -> float:
    return schedule.lr


def _linear(schedule: Schedule, time: float) -> float:
    return schedule.lr + (schedule.end_lr - schedule.lr) * schedule.fallen(time)


def _cosine(schedule: Schedule, time: float) -> float:
    """Half a cosine from lr to end_lr."""
    left = (1 + math.cos(math.pi * schedule.fallen(time))) / 2
    return schedule.end_lr + (schedule.lr - schedule.end_lr) * left


def _linear_radius(schedule: Schedule, time: float) -> float:
    return schedule.epsilon * schedule.ramp(time)


def _log_radius(schedule: Schedule, time: float) -> float:
    """0 in the warm-up, then from LOG_START to epsilon by equal factors in equal times."""
    if time < schedule.warmup or schedule.epsilon == 0:
        return 0.0
    start = min(LOG_START, schedule.epsilon)
    return start * (schedule.epsilon / start) ** schedule.ramp(time)


# Learning rates at a time, by the name that --lr_scheduler has for their shape.
RATES: dict[str, Callable[[Schedule, float], float]] = {
    "exp": _exponential,
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
# Radii of training at a time, by the name that --epsilon_schedule has for their shape.
RADII: dict[str, Callable[[Schedule, float], float]] = {"linear": _linear_radius, "log": _log_radius}
