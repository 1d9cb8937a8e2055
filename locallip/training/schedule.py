"""Radius, loss weight and learning rate over a training."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


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
