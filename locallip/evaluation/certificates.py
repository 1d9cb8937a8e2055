"""The two certificates that an evaluation can ask about its images: the published estimate, and the proof."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

import distributed
from locallip.bound.operators import Dense
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import LANCZOS_STEPS, eliminated, prove
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.walk import propagate
from locallip.bound.worst_case import global_radius, worst_logits, worst_margin
from locallip.evaluation.outcome import CERTIFIED_MULTIPLES


class Estimate:
    """The published protocol: norms by power iteration, which approaches them from below, in float32.

    Answers what `--test_sniter` iterations for every norm would, in stages. An image that the global bound certifies,
    or that is misclassified, needs no local norms. One that a few iterations fail to certify stays so, since estimates
    only grow with further ones. Norms and margins reported are those of the stage that decided.
    """

    def __init__(self, model: nn.Sequential, args: argparse.Namespace):
        self.model, self.args, self.clip = model, args, clip_range(args)
        self.norms = PowerIteration(args.test_sniter, seed=args.seed, skip_idle_masks=True)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What is known about a batch at epsilon."""
        many, few = self.args.test_sniter, max(1, self.args.test_sniter // 100)
        known: dict[str, Tensor] = {}
        still_open = torch.arange(len(x), device=x.device)
        # The global norms of the first batch's many iterations start those of all others.
        for local_positions, iterations in (
            ([], few if self.norms.global_vectors else many),
            (None, few),
            (None, many),
        ):
            self.norms.local_positions, self.norms.iterations = local_positions, iterations
            self.norms.local_vectors = {}
            found = self._ask(x[still_open], y[still_open])
            known = known or {name: column.clone() for name, column in found.items()}
            for name, column in found.items():
                known[name][still_open] = column
            certified, failed = found["worst_margin"] > 0, found["worst_margin"] <= 0  # neither, if it is NaN
            still_open = still_open[certified if local_positions is None else failed & (found["margin"] > 0)]
            if not len(still_open):
                break
        return known

    def _ask(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        bound = propagate(self.model, x, self.args.epsilon, self.norms, self.clip)
        rows, columns = eliminated(bound)
        return {
            "margin": worst_margin(bound.logits, y),
            "worst_margin": worst_margin(worst_logits(bound, y, self.args.test_opt_iter), y),
            "local_bound": bound.hidden_lipschitz,
            "global_bound": bound.global_hidden_lipschitz.expand(len(x)),
            "global_radius": global_radius(bound.logits, y, bound.last, bound.global_hidden_lipschitz),
            "eliminated_rows": rows,
            "eliminated_columns": columns,
        }

    def at(self, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        """Certified (N,) at another radius, by fewer iterations."""
        self.norms.iterations, self.norms.local_vectors = max(10, self.args.test_sniter // 20), {}
        self.norms.local_positions = None
        bound = propagate(self.model, x, epsilon, self.norms, self.clip)
        return worst_margin(worst_logits(bound, y, self.args.test_opt_iter), y) > 0

    def describe(self) -> dict[str, Any]:
        """For the summary."""
        return {"kind": "estimate", "power_iterations": self.args.test_sniter, "clip": self.args.clip}

    def progress(self) -> dict[str, int]:
        """For the progress bar."""
        return {}


class Proven:
    """Upper bounds on all norms, in float64, with rounding allowed for (see `proven_norm`).

    images: how many this process will ask about. Every process has an equal share of the failure probability, and
    random vectors of its own.
    """

    def __init__(self, model: nn.Sequential, args: argparse.Namespace, images: int):
        self.model, self.args, self.clip = copy.deepcopy(model).double(), args, clip_range(args)
        asked = images + len(CERTIFIED_MULTIPLES) * (
            min(images, args.curve_images + args.test_batch_size) if args.out else 0
        )
        planned = asked * len(self.model) * len(LANCZOS_STEPS)
        compares = args.clip or args.deployed != "exact"
        probability = args.failure_probability / (2 if compares else 1) / distributed.processes()
        seed = None if args.certificate_seed is None else args.certificate_seed + 2 * distributed.rank()
        self.norms = ProvenNorms(probability, planned, seed=seed, deployed=args.deployed)
        self.last = Dense.of(self.model[-1], len(self.model) - 1)
        self.decided = [0] * (len(LANCZOS_STEPS) + 1)
        # What --clip gains and --deployed costs is measured beside the certificate without them.
        self.plain_norms: ProvenNorms | None = None
        self.plain_certified = 0
        if compares:
            self.plain_norms = ProvenNorms(probability, planned, seed=None if seed is None else seed + 1)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What is known about a batch at epsilon."""
        proof = prove(self.model, x.double(), y, self.args.epsilon, self.norms, self.clip)
        if self.plain_norms is not None:
            plain = prove(self.model, x.double(), y, self.args.epsilon, self.plain_norms)
            self.plain_certified += int((plain.worst_margin > 0).sum())
        open_to_the_end = proof.decided.pop()
        for stage, count in enumerate(proof.decided):
            self.decided[stage] += count
        self.decided[-1] += open_to_the_end
        return {
            "margin": worst_margin(proof.logits, y),
            "worst_margin": proof.worst_margin,
            "local_bound": proof.hidden_lipschitz,
            "global_bound": proof.global_hidden_lipschitz.expand(len(x)),
            "global_radius": global_radius(proof.logits, y, self.last, proof.global_hidden_lipschitz),
            "eliminated_rows": proof.eliminated[0],
            "eliminated_columns": proof.eliminated[1],
        }

    def at(self, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        """Certified (N,) at another radius."""
        return prove(self.model, x.double(), y, epsilon, self.norms, self.clip).worst_margin > 0

    def describe(self) -> dict[str, Any]:
        """For the summary, of all processes together; `seed` lists theirs if there are several."""
        seeds = distributed.gather(self.norms.seed)
        plain_certified = sum(distributed.gather(self.plain_certified))
        return {
            "kind": "proven",
            "failure_probability": self.args.failure_probability,
            "seed": seeds[0] if len(seeds) == 1 else seeds,
            "deployed": self.args.deployed,
            "clip": self.args.clip,
            "lanczos_steps": list(LANCZOS_STEPS),
            "decided": [sum(counts) for counts in zip(*distributed.gather(self.decided))],
            "certified_plain": None if self.plain_norms is None else plain_certified,
        }

    def progress(self) -> dict[str, int]:
        """For the progress bar."""
        return {"decided": sum(self.decided[:-1]), "undecided": self.decided[-1]}


def clip_range(args: argparse.Namespace) -> tuple[float, float] | None:
    """Pixel values of a valid image, if the attacker is bound to them."""
    return (0.0, 1.0) if args.clip else None
