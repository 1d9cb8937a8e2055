"""Your own network: its Lipschitz constants, whether its answer can change in a ball, and the largest such ball."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallip.bound.graph import Graph
from locallip.bound.norms import Arithmetic, Norms
from locallip.bound.operators import Position
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.precision import own_precision
from locallip.bound.proof import LANCZOS_STEPS, decide, prove, proven_norms, refuse_effort
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.stages import ProductStage
from locallip.bound.tensors import underflow_to_nan
from locallip.bound.walk import propagate

# Power iterations of an estimate.
_ITERATIONS = 1000


@dataclass
class Lipschitz:
    """Lipschitz bounds of the logits of a network around N images, with respect to the L2 norm in the space of x.

    Attributes:
        lipschitz: (N,) valid in the ball around each image.
        global_lipschitz: scalar, valid for every pair of images.
        local_norms: by position of a linear layer, (N,); their product is `lipschitz`.
        global_norms: by position of a linear layer, scalar; their product is `global_lipschitz`.
    """

    lipschitz: Tensor
    global_lipschitz: Tensor
    local_norms: dict[Position, Tensor]
    global_norms: dict[Position, Tensor]


@torch.no_grad()
def local_lipschitz(
    model: nn.Module,
    x: Tensor,
    epsilon: float | Tensor,
    certificate: str | Norms = "proven",
    failure_probability: float = 1e-6,
) -> Lipschitz:
    """Lipschitz bounds of the whole network, logits included, in the epsilon-balls around x and everywhere.

    Arguments and errors are those of `certify`, which also says what `certificate` means.
    """
    graph, x, norms = _prepare(model, x, certificate, failure_probability)
    with own_precision(x.device):
        bound = propagate(graph, x, epsilon, norms)
        whole = norms.whole(bound.last)
        last = norms.masked(bound.last, None, bound.last_columns, whole).upper.expand_as(bound.radius)
    return Lipschitz(
        lipschitz=underflow_to_nan(bound.hidden_lipschitz * last, bound.hidden_lipschitz, last),
        global_lipschitz=underflow_to_nan(
            bound.global_hidden_lipschitz * whole.upper, bound.global_hidden_lipschitz, whole.upper
        ),
        local_norms=bound.local_norms | {bound.last.position: last},
        global_norms=bound.global_norms | {bound.last.position: whole.upper},
    )


@torch.no_grad()
def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    certificate: str | Norms = "proven",
    failure_probability: float = 1e-6,
    effort: str = "dual",
) -> Tensor:
    """Whether the label y is the network's answer on the whole epsilon-ball around x: (N,) bool.

    A tie, a NaN and an image that is not finite count as no. `locallip.verify` says more, and attacks what is not
    certified.

    Args:
        model: as for `propagate`; it is not changed. The certificate is for the function that its weights define in
            exact arithmetic.
        x: (N, ...) images.
        y: (N,) labels.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        certificate: `proven` computes in float64 with upper bounds on all norms and allows for rounding. `estimate` is
            the published protocol: 1,000 power iterations per norm, which approach the norms from below, in the
            precision of the model. A norms object of your own (see `norms.Norms`) is asked as it is.
        failure_probability: of a proven certificate: that any norm of the call is too small (see `proven_norms`).
        effort: of a proven certificate: `product` stops at the product of norms, `dual` goes on to the centred dual,
            which certifies more and takes longer.

    Raises:
        TypeError: names the first layer without a rule and its position.
        ValueError: as `propagate`, for labels of another shape, or for a certificate or effort of another name.
    """
    refuse_effort(effort)
    graph, x, norms = _prepare(model, x, certificate, failure_probability)
    return _certified(graph, x, y, epsilon, norms, effort)


@torch.no_grad()
def certified_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    tolerance: float = 1e-3,
    certificate: str | Norms = "proven",
    failure_probability: float = 1e-6,
    limit: float = 1e3,
    effort: str = "dual",
) -> Tensor:
    """The largest certified epsilon per image, found by bisection: (N,), in the space of x.

    The radius returned was itself certified (0 where the network's answer is not y), and one that is larger by
    `tolerance` at most was not. Images that are certified up to `limit`, which is more than any two images of 0.3
    million pixels in [0, 1] lie apart, get `limit`. Without y, (N,), the network's own answer is the label. Arguments
    otherwise and errors are those of `certify`.
    """
    if not (0 < tolerance < math.inf and 0 < limit < math.inf):
        raise ValueError(f"tolerance and limit must be finite and above 0, got {tolerance} and {limit}")
    refuse_effort(effort)
    # Doubling and halving between the tolerance and the limit, and the question at 0.
    questions = 3 + 2 * math.ceil(max(0.0, math.log2(limit / tolerance)))
    graph, x, norms = _prepare(model, x, certificate, failure_probability, questions)
    if y is None:
        # Not by a call of the model, which a layer in training mode would learn from before it is refused.
        with own_precision(x.device):
            y = propagate(graph, x, 0.0, norms, box=False).logits.argmax(dim=1)
    good = x.new_zeros(len(x))
    possible = _certified(graph, x, y, good, norms, effort)
    bad = torch.full_like(good, min(tolerance, limit))
    growing = possible
    while growing.any():
        growing = growing & _certified(graph, x, y, bad, norms, effort)
        good = torch.where(growing, bad, good)
        growing = growing & (bad < limit)
        bad = torch.where(growing, (2 * bad).clamp(max=limit), bad)
    while True:
        middle = (good + bad) / 2
        # In low precision the interval may not shrink to the tolerance.
        splits = possible & (bad - good > tolerance) & (good < middle) & (middle < bad)
        if not splits.any():
            return good
        certified = splits & _certified(graph, x, y, middle, norms, effort)
        good, bad = torch.where(certified, middle, good), torch.where(splits & ~certified, middle, bad)


def _prepare(
    model: nn.Module, x: Tensor, certificate: str | Norms, failure_probability: float, radii: int = 1
) -> tuple[Graph, Tensor, Norms]:
    """Network, images and norms of a certificate of that name, good for so many radii."""
    if not isinstance(certificate, str):
        return Graph.of(model), x, certificate
    if certificate == "estimate":
        return Graph.of(model), x, PowerIteration(_ITERATIONS)
    if certificate != "proven":
        raise ValueError(f"the certificate must be 'proven' or 'estimate', got '{certificate}'")
    model, x = in_float64(model, x), x.double()
    norms = proven_norms(model, x, len(x), failure_probability, radii + 1)  # one more for the last layer's
    return Graph.of(model), x, norms.with_steps(LANCZOS_STEPS[-1])


def in_float64(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a network in float64, for images x (N, ...); errors are those of `Graph.meanings`."""
    Graph.of(model).meanings(x, Arithmetic())  # refuses what it does not know before anything is copied
    return copy.deepcopy(model).double()


def _certified(graph: Graph, x: Tensor, y: Tensor, epsilon: float | Tensor, norms: Norms, effort: str) -> Tensor:
    if isinstance(norms, ProvenNorms):
        margin = prove(graph, x, y, epsilon, norms, effort=effort).worst_margin
    else:
        margin = decide([ProductStage("as asked", norms)], graph, x, y, epsilon).worst_margin
    return (margin > 0) & x.flatten(1).isfinite().all(dim=1)
