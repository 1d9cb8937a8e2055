"""Errors on the validation set behind an epoch, and how they are said."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from locallip.bound.operators import Position
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.walk import propagate
from locallip.bound.worst_case import worst_logits
from locallip.images import ImageSet
from locallip.training.files import better, errors
from locallip.training.step import Tally


@torch.no_grad()
def validate(
    model: nn.Sequential,
    images: ImageSet,
    args: argparse.Namespace,
    global_vectors: dict[Position, Tensor],
    box: bool,
    name: str = "validation",
) -> dict[str, float]:
    """Clean and certified error on the images of all processes, as NAME_clean_error and NAME_certified_error.

    An image counts as certified by the power-iteration estimate at `args.epsilon`.

    args: the flags of the training. global_vectors: singular vectors of whole layers to start from. box: see
        `propagate`.
    """
    tally = Tally(images.labels.device)
    # On a GPU to find out costs more than it saves, and algorithms are sought anew for every number of images.
    skip = images.labels.device.type == "cpu"
    norms = PowerIteration(args.test_sniter, {}, global_vectors, args.seed, skip_idle_masks=skip)
    for x, y, _ in images.batches(args.test_batch_size):
        norms.local_vectors = {}
        bound = propagate(model, x, args.epsilon, norms, box=box)
        worst = worst_logits(bound, y, args.test_opt_iter)
        tally.add(torch.zeros_like(bound.radius[0]), bound.logits, worst, y)
    _, clean, certified = tally.of_all_processes().means()
    return {f"{name}_clean_error": clean, f"{name}_certified_error": certified}


def in_words(row: Mapping[str, Any], is_best: bool) -> str:
    """The errors of validation in words, of the weights and of their average if there is one.

    row: of the log. is_best: whether it is the best so far.
    """
    said = []
    for name in ("validation", "averaged"):
        if f"{name}_certified_error" in row:
            certified, clean = errors(row, name)
            best = " (best)" if is_best and name == better(row) else ""
            said.append(f"{name} clean {clean:.2%} certified {certified:.2%}{best}")
    return ", ".join(said)
