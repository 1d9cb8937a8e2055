"""The dual, class by class: which classes of an image are still open, and what it proves of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locallip.bound.dual.chain import Chain
from locallip.bound.dual.proof import proven_margin
from locallip.bound.dual.search import search

# Questions that are searched together: at most, in how many tensors as large as all activations, in how many bytes.
_TOGETHER, _TENSORS, _MEMORY = 32, 40, 2**28


@dataclass
class ProvenClasses:
    """What the dual proved around N images.

    Attributes:
        margin: (N, K) lower bounds on f_y - f_k in the whole ball; -inf where nothing was proven.
        fallen: (N,) bool, where the attack that starts the search took a margin to 0, in float32.
        step: (N, ...) the step of the input at which it did; 0 elsewhere.
        questions, iterations: how many pairs of image and class were searched, and evaluations of the bound in all.
    """

    margin: Tensor
    fallen: Tensor
    step: Tensor
    questions: int
    iterations: int


@torch.no_grad()
def prove_classes(
    chain: Chain, y: Tensor, asked: Tensor, besides: Tensor | None = None, iterations: int = 60
) -> ProvenClasses:
    """Prove that the margins over some classes stay positive.

    The class nearest to the label's goes first; the others of an image are asked only where that one is proven.

    Args:
        chain: in float64 around N images.
        y: (N,) labels.
        asked: (N, K) bool, the wrong classes that are still open.
        besides: (N, K) what else a margin may lose, such as the rounding of the deployed network; None: nothing.
        iterations: of the search, at most.
    """
    logits = _logits(chain)
    margins = logits.gather(1, y[:, None]) - logits  # (N, K)
    besides = torch.zeros_like(margins) if besides is None else besides
    asked = asked.scatter(1, y[:, None], False)
    result = ProvenClasses(
        torch.full_like(margins, -torch.inf), torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(chain.x), 0, 0
    )
    nearest = torch.where(asked, margins, torch.inf).argmin(dim=1)
    first = torch.zeros_like(asked).scatter(1, nearest[:, None], True) & asked
    _ask(chain, y, first, margins, besides, iterations, result)
    proven = ((result.margin > 0) & first).any(dim=1)
    _ask(chain, y, asked & ~first & proven[:, None], margins, besides, iterations, result)
    return result


def _ask(
    chain: Chain, y: Tensor, asked: Tensor, margins: Tensor, besides: Tensor, iterations: int, result: ProvenClasses
) -> None:
    for images, others in zip(*(part.split(_together(chain)) for part in asked.nonzero(as_tuple=True))):
        around, label = chain.take(images), y[images]
        slope = chain.weight[others] - chain.weight[label]
        margin = margins[images, others] - besides[images, others]
        found = search(around, slope, margin, iterations)
        result.questions += len(images)
        result.iterations += int(found.iterations.sum())
        broken = ~(found.drop < margin)
        result.fallen[images[broken]] = True
        result.step[images[broken]] = found.step[broken]
        done = found.done.nonzero().squeeze(1)
        if len(done):
            at = images[done], others[done]
            result.margin[at] = proven_margin(
                around.take(done), label[done], others[done], found.multipliers, besides[at]
            )


def _together(chain: Chain) -> int:
    entries = sum(x[0].numel() for x in (chain.x, *(layer.center for layer in chain.hidden)))
    return max(1, min(_TOGETHER, _MEMORY // (8 * _TENSORS * entries)))


def _logits(chain: Chain) -> Tensor:
    """(N, K) at x, from the centre of the last hidden layer."""
    last = chain.hidden[-1]
    return last.activation(last.center).flatten(1) @ chain.weight.T + chain.bias
