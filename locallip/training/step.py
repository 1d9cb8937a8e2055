"""A step of the training: clean pass, bound and loss, power iterations that start warm, and what is counted."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from locallip import distributed
from locallip.bound.graph import Graph
from locallip.bound.layers import ReLU_x
from locallip.bound.norms import Norms
from locallip.bound.operators import Position
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.walk import propagate, walk_through
from locallip.bound.worst_case import unchecked_worst_logits, worst_margin
from locallip.training.losses import LOSSES, Situation
from locallip.training.vectors import StoredVectors

Number: TypeAlias = float | Tensor  # a tensor is a scalar on the device


class RobustLoss(nn.Module):
    """Clean pass, bound and loss as one forward pass, so that gradients can be averaged over processes.

    Args:
        model: as for `propagate`.
        norms: where the bound's norms come from.
        rounds: of pinning for the worst-case logits.
        loss: a key of `LOSSES`.
        weight: see `Loss`; None: its default.
        radius: see `Situation`.
        sparse: weight of the sparsity term, added to any loss.
        sparse_threshold: see `propagate`; without effect where `sparse` is 0.
    """

    def __init__(
        self,
        model: nn.Sequential,
        norms: Norms,
        rounds: int = 1,
        loss: str = "bcp",
        weight: float | None = None,
        radius: float = 1.0,
        sparse: float = 0.0,
        sparse_threshold: float = 0.1,
    ):
        super().__init__()
        self.model, self.norms, self.rounds, self.radius, self.sparse = model, norms, rounds, radius, sparse
        self.loss, self.weight = LOSSES[loss], LOSSES[loss].weight if weight is None else weight
        self.sparse_threshold = sparse_threshold if sparse else None

    @classmethod
    def from_arguments(cls, model: nn.Sequential, norms: Norms, args: argparse.Namespace) -> RobustLoss:
        """The loss that the flags of a training script name."""
        chosen = args.loss, args.loss_weight, args.epsilon_train
        return cls(model, norms, args.opt_iter, *chosen, sparse=args.sparse, sparse_threshold=args.sp_thres)

    def forward(
        self, x: Tensor, y: Tensor, epsilon: Number, kappa: Number, box: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss over the batch, logits (N, K) and worst-case logits (N, K). x: (N, C, H, W), y: (N,).

        epsilon: not negative, which is not looked at: a GPU would have to be waited for. kappa: weight of the clean
        loss in the BCP loss. box: see `propagate`.
        """
        sparse_threshold = self.sparse_threshold if box else None
        radii = epsilon.expand(len(x)) if isinstance(epsilon, Tensor) else x.new_full((len(x),), epsilon)
        graph = Graph.of(self.model, x)
        bound = walk_through(graph, x, radii, self.norms, sparse_threshold=sparse_threshold, box=box)
        worst = unchecked_worst_logits(bound, y, self.rounds)
        loss = self.loss.compute(Situation(bound, worst, y, epsilon, self.radius, kappa, self.weight))
        if bound.sparsity is not None:
            loss = loss + self.sparse * bound.sparsity
        return loss, bound.logits, worst


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
        self._clipped = [layer for layer in loss.modules() if isinstance(layer, ReLU_x)]

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        indices: Tensor,
        epsilon: Number,
        kappa: Number,
        weight: Number = 1.0,
        box: bool = True,
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
