"""Your own network: its Lipschitz constants, whether its answer can change in a ball, and the largest such ball."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallip.bound.checks import refuse_classes, refuse_epsilon, refuse_labels, refuse_search
from locallip.bound.inquiry import Inquiry, checked, prepare
from locallip.bound.norms import Norms
from locallip.bound.operators import Position
from locallip.bound.precision import own_precision
from locallip.bound.proof import decide, prove, refuse_effort
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.stages import ProductStage
from locallip.bound.tensors import underflow_to_nan
from locallip.bound.walk import propagate


@dataclass
class Lipschitz:
    """Lipschitz bounds of the logits of a network around N images, with respect to the L2 norm in the space of x.

    Attributes:
        lipschitz: (N,) valid in the ball around each image.
        global_lipschitz: scalar, valid for every pair of images.
        local_norms: by position of a linear layer, (N,). Their product is `lipschitz` where the layers stand one behind
            the other and no activation is steeper than 1; overlapping maxima count as steeper.
        global_norms: the same of `global_lipschitz`, scalars.
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
    progress: bool = False,
) -> Lipschitz:
    """Lipschitz bounds of the whole network, logits included, in the epsilon-balls around x and everywhere.

    Arguments and errors are those of `certify`, which also says what `certificate` means; here one logit is enough.
    """
    graph = checked(model, x, certificate, failure_probability)
    refuse_epsilon(epsilon, x)
    inquiry = prepare(model, graph, x, certificate, failure_probability)
    radii = inquiry.radii(epsilon, x)
    found = inquiry.in_pieces(x, lambda images, part: _lipschitz(inquiry, images, radii[part]), progress)
    return _joined(found)


def _lipschitz(inquiry: Inquiry, x: Tensor, epsilon: Tensor) -> Lipschitz:
    norms = inquiry.norms
    with own_precision(x.device):
        bound = propagate(inquiry.graph, x, epsilon, norms)
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
    progress: bool = False,
) -> Tensor:
    """Whether the label y is the network's answer on the whole epsilon-ball around x: (N,) bool.

    A tie, a NaN and an image that is not finite count as no. `locallip.verify` says more, and attacks what is not
    certified.

    Args:
        model: any network whose layers and calls have rules (see `Graph.of`); it is not changed. The certificate is for
            the function that its weights define in exact arithmetic.
        x: (N, ...) images.
        y: (N,) labels.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        certificate: `proven` computes in float64 with upper bounds on all norms and allows for rounding. `estimate` is
            the published protocol: 1,000 power iterations per norm, which approach the norms from below, in the
            precision of the model. A norms object of your own (see `norms.Norms`) is asked as it is.
        failure_probability: of a proven certificate: that any norm of the call is too small (see `proven_norms`).
        effort: of a proven certificate: `product` stops at the product of norms, `dual` goes on to the centred dual,
            which certifies more and takes longer.
        progress: show a bar, which needs tqdm.

    Any number of images and classes is taken, as many at a time as fit into half a gigabyte; a norms object of your
    own, unless it is a `ProvenNorms`, is asked about all of them at once. How they are split changes nothing but which
    random numbers a norm meets. Neither the network nor x is changed.

    Whole norms are kept for later calls on the same weights (see `kept_norms`). Milliseconds an image by the product
    (by the dual) of two convolutions of 8 and 16 channels on 28x28 and two dense layers, untrained, one thread of
    an EPYC (Zen 3) beside other work, from the second call on: alone 20 (21) where the global norms decide, 72 (101)
    at epsilon 0.01 and 54 (161) at 0.05; in a call with a hundred 1.5 (2.3), 8 (10) and 7 (39).

    Raises:
        TypeError: names all layers and calls without a rule, and whatever else is in the way of a certificate, each
            with its place and a way out; or the network gives other logits than these do one after the other; or an
            argument is of another kind.
        ValueError: as `propagate`, for fewer than two logits, for labels that are not one class per image, or for a
            certificate or effort of another name. All before anything is computed.
        ImportError: for a bar without tqdm.
    """
    refuse_effort(effort)
    graph = checked(model, x, certificate, failure_probability)
    refuse_labels(y, x, graph.classes)
    refuse_epsilon(epsilon, x)
    inquiry = prepare(model, graph, x, certificate, failure_probability)
    radii = inquiry.radii(epsilon, x)
    found = inquiry.in_pieces(
        x, lambda images, part: _certified(inquiry, images, y[part], radii[part], effort), progress
    )
    return torch.cat(found)


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
    progress: bool = False,
) -> Tensor:
    """The largest certified epsilon per image, found by bisection: (N,), in the space of x.

    The radius returned was itself certified (0 where the network's answer is not y), and one that is larger by
    `tolerance` at most was not. `certify` at this radius draws other start vectors and may leave an image open there.
    Images that are certified up to `limit`, which is more than any two images of 0.3 million pixels in [0, 1] lie
    apart, get `limit`. Without y, (N,), the network's own answer is the label. Arguments otherwise and errors are those
    of `certify`, which is asked 20 times or so: that is what it costs.

    Raises:
        TypeError, ValueError: also for a tolerance or limit that is no number, or not finite and above 0.
    """
    refuse_effort(effort)
    refuse_search(tolerance, limit)
    graph = checked(model, x, certificate, failure_probability)
    refuse_classes(graph.classes)
    if y is not None:
        refuse_labels(y, x, graph.classes)
    # Doubling and halving between the tolerance and the limit, and the inquiry at 0.
    questions = 3 + 2 * math.ceil(max(0.0, math.log2(limit / tolerance)))
    inquiry = prepare(model, graph, x, certificate, failure_probability, questions)

    def radius(images: Tensor, part: Tensor) -> Tensor:
        labels = _answers(inquiry, images) if y is None else y[part]
        return _radius(inquiry, images, labels, tolerance, limit, effort)

    return torch.cat(inquiry.in_pieces(x, radius, progress))


def _answers(inquiry: Inquiry, x: Tensor) -> Tensor:
    """The network's own answers (N,): without a call, from which a layer in training mode would learn."""
    with own_precision(x.device):
        return propagate(inquiry.graph, x, 0.0, inquiry.norms, box=False).logits.argmax(dim=1)


def _radius(inquiry: Inquiry, x: Tensor, y: Tensor, tolerance: float, limit: float, effort: str) -> Tensor:
    """Largest certified epsilon (N,), by doubling and then halving."""
    good = x.new_zeros(len(x))
    possible = _certified(inquiry, x, y, good, effort)
    bad = torch.full_like(good, min(tolerance, limit))
    growing = possible
    while growing.any():
        growing = growing & _certified(inquiry, x, y, bad, effort)
        good = torch.where(growing, bad, good)
        growing = growing & (bad < limit)
        bad = torch.where(growing, (2 * bad).clamp(max=limit), bad)
    while True:
        middle = (good + bad) / 2
        # In low precision the interval may not shrink to the tolerance.
        splits = possible & (bad - good > tolerance) & (good < middle) & (middle < bad)
        if not splits.any():
            return good
        certified = splits & _certified(inquiry, x, y, middle, effort)
        good, bad = torch.where(certified, middle, good), torch.where(splits & ~certified, middle, bad)


def _certified(inquiry: Inquiry, x: Tensor, y: Tensor, epsilon: Tensor, effort: str) -> Tensor:
    graph, norms = inquiry.graph, inquiry.norms
    if isinstance(norms, ProvenNorms):
        margin = prove(graph, x, y, epsilon, norms, effort=effort).worst_margin
    else:
        margin = decide([ProductStage("as asked", norms)], graph, x, y, epsilon).worst_margin
    return (margin > 0) & x.flatten(1).isfinite().all(dim=1)


def _joined(parts: list[Lipschitz]) -> Lipschitz:
    """The bounds around all images from those around some at a time."""
    first = parts[0]
    return Lipschitz(
        lipschitz=torch.cat([part.lipschitz for part in parts]),
        global_lipschitz=first.global_lipschitz,
        local_norms={at: torch.cat([part.local_norms[at] for part in parts]) for at in first.local_norms},
        global_norms=first.global_norms,
    )
