"""What a certificate asks of a network: its graph in the right precision, norms for all images, a few at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locallip.bound.checks import refuse_certificate, refuse_images, refuse_model, refuse_probability
from locallip.bound.graph import Graph
from locallip.bound.kept_norms import KEPT
from locallip.bound.norms import Arithmetic, Norms
from locallip.bound.pieces import images_at_a_time, in_pieces
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import lanczos_steps, proven_norms
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.seen import first_line

# Power iterations of an estimate.
ESTIMATE_ITERATIONS = 1000


@dataclass(frozen=True)
class Inquiry:
    """What is asked of every piece of the images.

    Attributes:
        graph: the network, in `dtype`.
        norms: for all images together.
        dtype: of the images that are walked through.
        at_a_time: how many.
        fresh: whether the norms are this call's own, so that start vectors of other images are to be forgotten.
    """

    graph: Graph
    norms: Norms
    dtype: torch.dtype
    at_a_time: int
    fresh: bool

    def radii(self, epsilon: float | Tensor, x: Tensor) -> Tensor:
        """(N,)"""
        return torch.as_tensor(epsilon, dtype=self.dtype, device=x.device).expand(len(x))

    def in_pieces(self, x: Tensor, ask: Callable[[Tensor, Tensor], Any], progress: bool) -> list[Any]:
        """Answers to `ask`, which is given images of its own, and their indices among x."""

        def about(part: Tensor) -> Any:
            if self.fresh and isinstance(self.norms, PowerIteration):
                self.norms.local_vectors = {}
            return ask(x[part].to(self.dtype), part)

        return in_pieces(about, len(x), self.at_a_time, x.device, progress)


def checked(model: nn.Module, x: Tensor, certificate: str | Norms, failure_probability: float) -> Graph:
    """The graph of a network that these arguments fit; no norm is computed."""
    refuse_model(model)
    refuse_certificate(certificate)
    refuse_probability(failure_probability)
    refuse_images(x, model, converted=certificate == "proven")
    graph = Graph.of(model, x)
    if graph.classes < 1:
        raise ValueError("the network gives no logits")
    graph.meanings(x, Arithmetic())
    return graph


def prepare(
    model: nn.Module, graph: Graph, x: Tensor, certificate: str | Norms, failure_probability: float, radii: int = 1
) -> Inquiry:
    """What a certificate of that name asks about checked images, good for so many radii."""
    at_a_time = images_at_a_time(graph, x)
    if certificate == "proven":
        graph = in_float64(model, x, at_a_time)
        # One more radius for the last layer's norms.
        norms = proven_norms(graph, x[:1].double(), len(x), failure_probability, radii + 1, kept=KEPT)
        steps = lanczos_steps(graph, x[:1].double(), norms)[-1]
        return Inquiry(graph, norms.with_steps(steps), torch.float64, at_a_time, fresh=True)
    graph.refuse_if_unlike(model, x[:at_a_time])
    if certificate == "estimate":
        return Inquiry(graph, PowerIteration(ESTIMATE_ITERATIONS), x.dtype, at_a_time, fresh=True)
    at_a_time = at_a_time if isinstance(certificate, ProvenNorms) else max(1, len(x))
    return Inquiry(graph, certificate, x.dtype, at_a_time, fresh=False)


def in_float64(model: nn.Module, x: Tensor, at_a_time: int) -> Graph:
    """The graph of a copy of a network in float64, for images x (N, ...) in any precision.

    at_a_time: how many images both are compared on.

    Raises:
        TypeError: as `Graph.of`, and where the network gives other logits than its graph.
    """
    with torch.inference_mode(False):
        graph = Graph.of(_copied(model).double(), x.double())
    graph.refuse_if_unlike(model, x[:at_a_time].double())
    return graph


def _copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the network, which stays as it is.

    Raises:
        TypeError: if it has none.
    """
    try:
        with torch.inference_mode(False):
            copied = copy.deepcopy(model)
    except Exception as error:  # whatever a user's attributes raise
        why = first_line(error)
        if "deepcopy protocol" in why:
            why = "it keeps a tensor that was computed from weights as an attribute; compute it in forward, or keep "
            why += "tensor.detach()"
        raise TypeError(f"the network cannot be copied: {why}") from error
    if not isinstance(copied, nn.Module) or _parts(copied) & _parts(model):
        raise TypeError("the network cannot be copied: a __deepcopy__ in it gives the original, or no module")
    return copied


def _parts(model: nn.Module) -> set[int]:
    return {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
