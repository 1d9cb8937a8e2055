"""The two certificates that an evaluation can ask about its images: the published estimate, and the proof."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from locallip.bound.graph import Graph
from locallip.bound.operators import Position
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import Proof, proof_stages, prove, proven_norms
from locallip.bound.stages import eliminated
from locallip.bound.walk import propagate
from locallip.bound.worst_case import global_radius, worst_logits, worst_margin
from locallip.evaluation.plan import seed_of


@dataclass
class Known:
    """What a certificate knows about a batch of N images.

    Attributes:
        columns: by their names in `Outcome`, (N, ...).
        certified_by: (N,) names of the stages that certified; empty where none did.
        counts: of all images together, (K,) each.
    """

    columns: dict[str, Tensor]
    certified_by: np.ndarray
    counts: dict[str, np.ndarray]


class Estimate:
    """The published protocol: norms by power iteration, which approaches them from below, in float32.

    Answers what `--test_sniter` iterations for every norm would, in stages. An image that the global bound certifies,
    or that is misclassified, needs no local norms. One that a few iterations fail to certify stays so, since estimates
    only grow with further ones. Norms and margins reported are those of the stage that decided.
    """

    effort = "product"

    def __init__(self, model: nn.Sequential, args: argparse.Namespace):
        self.model, self.args, self.clip = model, args, clip_range(args)
        self.graph: Graph | None = None
        self.global_vectors: dict[Position, Tensor] = {}

    def __call__(self, x: Tensor, y: Tensor, fallen: Tensor, place: int = 0) -> Known:
        """What is known about a batch at epsilon. fallen: see `Proven`. place: of the batch in the set."""
        self._restart(x, place)
        many, few = self.args.test_sniter, max(1, self.args.test_sniter // 100)
        known: dict[str, Tensor] = {}
        still_open = torch.arange(len(x), device=x.device)
        for local_positions, iterations in (([], few), (None, few), (None, many)):
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
        return Known(known, np.where((known["worst_margin"] > 0).cpu(), "estimate", ""), {})

    def _restart(self, x: Tensor, place: int) -> None:
        """Start from the singular vectors of the whole layers, and from nothing of other batches."""
        if self.graph is None:
            self.graph = Graph.of(self.model, x)
            self.graph.refuse_if_unlike(self.model, x)
            whole = PowerIteration(self.args.test_sniter, seed=self.args.seed, local_positions=[])
            propagate(self.graph, x[:1], self.args.epsilon, whole)
            self.global_vectors = whole.global_vectors
        seed = seed_of(self.args.seed, place)
        self.norms = PowerIteration(1, global_vectors=self.global_vectors, seed=seed, skip_idle_masks=True)

    def _ask(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        bound = propagate(self.graph, x, self.args.epsilon, self.norms, self.clip)
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

    def at(self, x: Tensor, y: Tensor, epsilon: float, effort: str) -> Tensor:
        """Certified (N,) at another radius, by fewer iterations; there is one effort only."""
        self.norms.iterations, self.norms.local_vectors = max(10, self.args.test_sniter // 20), {}
        self.norms.local_positions = None
        bound = propagate(self.graph, x, epsilon, self.norms, self.clip)
        return worst_margin(worst_logits(bound, y, self.args.test_opt_iter), y) > 0

    def describe(self, counts: dict[str, np.ndarray]) -> dict[str, Any]:
        """For the summary, from the counts of all batches."""
        return {"kind": "estimate", "power_iterations": self.args.test_sniter, "clip": self.args.clip}


class Proven:
    """Upper bounds on all norms, in float64, with rounding allowed for (see `locallip.bound.proof`).

    The failure probability is that of the whole run, by however many processes and starts: all of them plan for the
    same questions, each of which is asked by one of them.

    x: an image of the set. questions: how many times it is asked about an image at a radius, by all processes. seed: of
    the start vectors.
    """

    def __init__(self, model: nn.Sequential, args: argparse.Namespace, x: Tensor, questions: int, seed: int):
        self.model, self.args, self.clip, self.seed = copy.deepcopy(model).double(), args, clip_range(args), seed
        self.graph = Graph.of(self.model, x.double())
        self.graph.refuse_if_unlike(model, x.double())
        self.last = self.graph.last_operator()
        compares = args.clip or args.deployed != "exact"
        probability = args.failure_probability / (2 if compares else 1)
        plan = (self.graph, x.double(), questions, probability)
        self.norms = proven_norms(*plan, seed=seed, deployed=args.deployed)
        # What --clip gains and --deployed costs is measured beside the certificate without them.
        self.plain_norms = proven_norms(*plan, seed=seed + 1) if compares else None
        self.knows_whole_norms = False
        self.effort = args.effort
        self.stages = [stage.name for stage in proof_stages(self.graph, x, self.norms, args.effort)]

    def __call__(self, x: Tensor, y: Tensor, fallen: Tensor, place: int = 0) -> Known:
        """What is known about a batch at epsilon.

        fallen: (N,) bool, which labels an attack has changed; the dual is not asked about those. place: of the batch in
        the set.
        """
        x = x.double()
        self._restart(x, place)
        proof = self._prove(x, y, self.args.epsilon, self.effort, fallen)
        counts = {"seconds": np.array(proof.seconds)}
        if self.plain_norms is not None:
            plain = prove(self.graph, x, y, self.args.epsilon, self.plain_norms, None, self.args.effort, fallen)
            counts["certified_plain"] = (plain.worst_margin > 0).sum(dim=0, keepdim=True).cpu().numpy()
        columns = {
            "margin": worst_margin(proof.logits, y),
            "worst_margin": proof.worst_margin,
            "local_bound": proof.hidden_lipschitz,
            "global_bound": proof.global_hidden_lipschitz.expand(len(x)),
            "global_radius": global_radius(proof.logits, y, self.last, proof.global_hidden_lipschitz),
            "eliminated_rows": proof.eliminated_rows,
            "eliminated_columns": proof.eliminated_columns,
        }
        by = np.array([*self.stages, ""])[proof.stage.cpu().numpy()]
        return Known(columns, np.where((proof.worst_margin > 0).cpu(), by, ""), counts)

    def _prove(self, x: Tensor, y: Tensor, epsilon: float, effort: str, fallen: Tensor | None = None) -> Proof:
        return prove(self.graph, x, y, epsilon, self.norms, self.clip, effort, fallen)

    def _restart(self, x: Tensor, place: int) -> None:
        """Draw the batch's random numbers; those of the whole norms, which all batches share, come before all."""
        for norms in filter(None, (self.norms, self.plain_norms)):
            if not self.knows_whole_norms:
                norms.restart(0)
                propagate(self.graph, x[:1], 0.0, norms.with_steps(0))
            norms.restart(1 + place)
        self.knows_whole_norms = True

    def at(self, x: Tensor, y: Tensor, epsilon: float, effort: str) -> Tensor:
        """Certified (N,) at another radius, with that effort."""
        return self._prove(x.double(), y, epsilon, effort).worst_margin > 0

    def describe(self, counts: dict[str, np.ndarray]) -> dict[str, Any]:
        """For the summary, from the counts of all batches."""
        return {
            "kind": "proven",
            "effort": self.args.effort,
            "failure_probability": self.args.failure_probability,
            "seed": self.seed,
            "deployed": self.args.deployed,
            "clip": self.args.clip,
            "stages": self.stages,
            "certified_plain": None if self.plain_norms is None else int(counts["certified_plain"].item()),
        }


def clip_range(args: argparse.Namespace) -> tuple[float, float] | None:
    """Pixel values of a valid image, if the attacker is bound to them."""
    return (0.0, 1.0) if args.clip else None
