"""Bounds on the logits in the ball, from ball and box at the last hidden layer (paper, section 3.4)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from locallip.bound.bound import Bound
from locallip.bound.checks import refuse_labels, refuse_whole_number
from locallip.bound.compiled import Compilable
from locallip.bound.operators import Dense


def worst_logits(bound: Bound, y: Tensor, rounds: int = 1) -> Tensor:
    """Upper bounds on the logits of the wrong classes, relative to the label's: (N, K).

    Entry j is f_j + max (w_j - w_y) . delta over the ball and the box at the last hidden layer, entry y is f_y. Every
    number of rounds gives an upper bound; more rounds use more of the box (paper, section 3.4). Where a square
    underflows, a bound that allows for no rounding is NaN. In float32 for a bound in half precision.

    y: (N,) labels. rounds: how often entries that leave the box are pinned to its face.

    Raises:
        TypeError, ValueError: for labels that are not (N,) int64 or name no class, or rounds below 0 (see `checks`).
    """
    refuse_labels(y, bound.logits, len(bound.last.weight))
    refuse_whole_number("the number of rounds", rounds, 0)
    return unchecked_worst_logits(bound, y, rounds)


def unchecked_worst_logits(bound: Bound, y: Tensor, rounds: int = 1) -> Tensor:
    """Do what `worst_logits` does where nothing has to be refused any more, so that no value is looked at."""
    images, classes = len(y), len(bound.last.weight)
    images_at_once, classes_at_once = _at_once(bound)
    if (images <= images_at_once and classes <= classes_at_once) or torch.is_grad_enabled():
        return _worst_of_classes(bound, y, slice(None), rounds)
    found = []
    for part in torch.arange(images, device=y.device).split(images_at_once):
        some, labels = _take(bound, part), y[part]
        pieces = [slice(first, first + classes_at_once) for first in range(0, classes, classes_at_once)]
        found.append(torch.cat([_worst_of_classes(some, labels, piece, rounds) for piece in pieces], dim=1))
    return torch.cat(found)


# Bytes of tensors (N, K, H) at a time, and how many of these there are.
_MEMORY, _TENSORS = 2**28, 10


def _at_once(bound: Bound) -> tuple[int, int]:
    """How many images, and how many classes of each, fit into memory."""
    classes, width = bound.last.weight.shape
    entries = max(1, _MEMORY // (_TENSORS * max(4, bound.center.element_size()) * max(1, width)))
    return max(1, entries // classes), min(classes, entries)


def _take(bound: Bound, images: Tensor) -> Bound:
    """The part of a bound that worst cases are made of, for some of its images."""
    names = "logits", "center", "lower", "upper", "radius", "logit_rounding"
    values = {name: getattr(bound, name) for name in names}
    return replace(bound, **{name: None if value is None else value[images] for name, value in values.items()})


def _worst_of_classes(bound: Bound, y: Tensor, classes: slice, rounds: int) -> Tensor:
    """The columns of `worst_logits` of some classes: (N, k)."""
    wide = torch.promote_types(bound.center.dtype, torch.float32)  # squares of half precision are numbers in float32
    weight, radius = bound.last.weight.to(wide), bound.radius.to(wide)[:, None, None]
    direction = weight[classes] - weight[y].unsqueeze(1)  # (N, k, H)
    to_upper = (bound.upper - bound.center).to(wide).unsqueeze(1)  # (N, 1, H)
    to_lower = (bound.lower - bound.center).to(wide).unsqueeze(1)
    face = torch.where(direction > 0, to_upper, to_lower)  # (N, K, H) where the box ends in that direction
    pinned = _pinned(direction, face, radius, rounds)

    # At the optimum over the pinned entries, the free part is parallel to the direction with what radius is left.
    on_faces = torch.where(pinned, direction * face, 0).sum(dim=2)  # (N, K)
    radius_left = radius.squeeze(2) ** 2 - torch.where(pinned, face, 0).square().sum(dim=2)
    unpinned = torch.where(pinned, 0, direction)
    free = unpinned.square().sum(dim=2)
    worst = bound.logits[:, classes] + on_faces + _sqrt(radius_left) * _sqrt(free)
    if bound.logit_rounding is None:
        smallest = torch.finfo(worst.dtype).tiny
        lost = (radius.squeeze(2) > 0) & (radius.squeeze(2) ** 2 < smallest)
        lost = lost | ((free < smallest) & (unpinned != 0).any(dim=2))
        return torch.where(lost, torch.nan, worst)
    # A margin is off by what its two logits are off by.
    rounding = bound.logit_rounding + bound.logit_rounding.gather(1, y[:, None])
    return worst + rounding.scatter(1, y[:, None], 0)[:, classes]


# Rounds of pinning between two looks at whether anything still leaves the box: a GPU is waited for at every look.
_ROUNDS_PER_LOOK = {"cpu": 1, "cuda": 16}


@torch.no_grad()
def _pinned(direction: Tensor, face: Tensor, radius: Tensor, rounds: int) -> Tensor:
    """Which entries (N, K, H) end up on a face when the longest step along `direction` is pushed back into the box."""
    pinned = torch.zeros_like(direction, dtype=torch.bool)
    length, depth = direction.abs(), face.abs()
    length_squared, depth_squared = direction.square(), face.square()
    # What is recorded as a CUDA graph has no values yet.
    recorded = direction.is_cuda and torch.cuda.is_current_stream_capturing()
    rounds_per_look = rounds + 1 if recorded else _ROUNDS_PER_LOOK.get(direction.device.type, 1)
    for number in range(1, rounds + 1):
        leaves = _leaves(pinned, length, depth, length_squared, depth_squared, radius, pays=direction.is_cuda)
        if number % rounds_per_look == 0 and not (leaves & ~pinned).any():
            break
        pinned |= leaves
    return pinned


@Compilable
def _leaves(
    pinned: Tensor, length: Tensor, depth: Tensor, length_squared: Tensor, depth_squared: Tensor, radius: Tensor
) -> Tensor:
    """Which entries (N, K, H) the longest step leaves the box at, those that are pinned staying on their faces."""
    radius_left = radius**2 - torch.where(pinned, depth_squared, 0).sum(dim=2, keepdim=True)
    free = torch.where(pinned, 0, length_squared).sum(dim=2, keepdim=True)
    scale = radius_left.clamp(min=0).sqrt() / free.sqrt()  # (N, K, 1); infinite or NaN once nothing is free
    return length * scale > depth


def _sqrt(x: Tensor) -> Tensor:
    """Square root with slope 0 at 0; below 0, where only rounding can lead, 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), torch.where(x.isnan(), x, 0))


def gloro_logits(bound: Bound, y: Tensor, rounds: int = 1) -> Tensor:
    """The logits at x with the largest worst-case wrong logit as one more class: (N, K + 1)."""
    return with_worst_class(bound.logits, worst_logits(bound, y, rounds), y)


def global_radius(logits: Tensor, y: Tensor, last: Dense, hidden_lipschitz: Tensor) -> Tensor:
    """Radius (N,) up to which a Lipschitz constant alone certifies; rounding is not allowed for.

    logits: (N, K) at x. y: (N,) labels. last: the layer that makes them. hidden_lipschitz: up to the layer before.
    """
    return class_radii(logits, y, last, hidden_lipschitz).amin(dim=1).clamp(min=0)


def class_radii(logits: Tensor, y: Tensor, last: Dense, hidden_lipschitz: Tensor) -> Tensor:
    """Radius up to which a Lipschitz constant alone keeps each class below the label's: (N, K).

    Below 0 where a class is above already; infinite at the label. Arguments: see `global_radius`.
    """
    margins = logits.gather(1, y[:, None]) - logits
    slopes = (last.weight[y].unsqueeze(1) - last.weight).norm(dim=2) * hidden_lipschitz.expand(len(y))[:, None]
    moves = slopes != 0
    # Without a slope the radius is infinite, and has no gradient.
    radii = torch.where(moves, margins / torch.where(moves, slopes, 1), margins.detach() * torch.inf)
    return radii.scatter(1, y[:, None], torch.inf)


def worst_margin(worst: Tensor, y: Tensor) -> Tensor:
    """By how much the label's logit exceeds every other in the whole ball: (N,). Certified is where it is > 0.

    A tie gives 0, and a NaN in any logit a NaN; neither is > 0.

    worst: (N, K) from `worst_logits`. y: (N,) labels.
    """
    return worst.gather(1, y[:, None]).squeeze(1) - largest_wrong(worst, y)


def with_worst_class(logits: Tensor, worst: Tensor, y: Tensor) -> Tensor:
    return torch.cat([logits, largest_wrong(worst, y).unsqueeze(1)], dim=1)  # (N, K + 1)


def largest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """The largest logit of a wrong class, of (N, K)."""
    return logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)  # (N,)
