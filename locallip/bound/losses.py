"""Losses that train through the bound, each the mean over a batch of N images with K classes.

logits: (N, K) at x. worst: (N, K) from `worst_logits`. y: (N,) labels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from locallip.bound.operators import Dense
from locallip.bound.worst_case import largest_wrong, with_worst_class

# The weight of the squared Lipschitz constant in CLL (Losch et al. 2023, their 6C2F on CIFAR-10).
_CLL_DECAY = 1e-6
# The smallest share of the way to the worst case in EMMA, of classes that win already (Hu et al. 2023).
_SMALLEST_SHARE = 0.01


def bcp_loss(logits: Tensor, worst: Tensor, y: Tensor, kappa: float | Tensor) -> Tensor:
    """Blend kappa CE(logits, y) + (1 - kappa) CE(worst, y) (BCP: Lee et al. 2020)."""
    return kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(worst, y)


def gloro_loss(logits: Tensor, worst: Tensor, y: Tensor) -> Tensor:
    """Take CE over K + 1 logits, those at x and the largest wrong one of `worst` (Leino et al. 2021)."""
    return F.cross_entropy(with_worst_class(logits, worst, y), y)


def gloro_kl_loss(logits: Tensor, worst: Tensor, y: Tensor, weight: float = 1.5) -> Tensor:
    """Add to CE(logits, y) `weight` times KL(P || Q) (the TRADES form of Leino et al. 2021).

    Q is the softmax over the K + 1 logits of `gloro_loss`, P that of the K logits at x, with a 0 for the last class.
    The K classes share one log ratio, log(1 + exp(worst wrong logit) / sum_j exp(logit_j)), which therefore is the KL.
    """
    divergence = F.softplus(largest_wrong(worst, y) - logits.logsumexp(dim=1))
    return F.cross_entropy(logits, y) + weight * divergence.mean()


def margin_loss(
    logits: Tensor, radii: Tensor, y: Tensor, reach: float | Tensor, weight: float = 66.0, sharpness: float = 11.0
) -> Tensor:
    """Take from CE(logits, y) `weight` times the mean soft minimum of the radii (CRM: Fazlyab et al. 2023).

    The soft minimum is -logsumexp_j(-sharpness radii_j) / sharpness, over the wrong classes j; the mean is over those
    images whose smallest radius lies above 0, which are classified right, and below `reach`.

    radii: (N, K) from `class_radii`, and `reach`, in one unit; the defaults belong to radii that are divided by the one
    that is trained for.
    """
    smallest = radii.amin(dim=1)
    chosen = (smallest > 0) & (smallest < reach)
    finite = torch.where(chosen[:, None], radii, 0)  # no gradient of what is not chosen, which need not be finite
    soft = torch.logsumexp(-sharpness * finite, dim=1) / sharpness
    return F.cross_entropy(logits, y) + weight * torch.where(chosen, soft, 0).sum() / chosen.sum().clamp(min=1)


def cll_loss(
    logits: Tensor,
    y: Tensor,
    last: Dense,
    hidden_lipschitz: Tensor,
    epsilon: float | Tensor,
    radius: float,
    slack: float = 0.3,
) -> Tensor:
    """Calibrate logits by their Lipschitz constants, and CE by the radius (CLL: Losch et al. 2023).

    CE of (logit_i / (L |w_i|) -+ epsilon) / sigma, minus at the label and plus elsewhere, plus 1e-6 L^2. L is the
    constant up to the last hidden layer, in the quotient without a gradient. sigma = 2 radius / (logit(1 - slack / 2) -
    logit(slack / 2)): of a logistic distribution with this scale, the share `slack` lies farther out than `radius`.

    last: the layer that makes the logits, w_i its rows. hidden_lipschitz: (N,) L. epsilon: radius of the bound; radius:
    the one that is trained for, which epsilon rises to, > 0; both in pixel space. slack: in (0, 1).
    """
    sigma = radius / math.log(2 / slack - 1)  # logit(1 - p) = -logit(p)
    slopes = hidden_lipschitz.detach()[:, None] * last.weight.norm(dim=1)
    scaled = logits / slopes.clamp(min=1e-12)
    offset = epsilon * torch.ones_like(scaled).scatter(1, y[:, None], -1.0)
    return F.cross_entropy((scaled + offset) / sigma, y) + _CLL_DECAY * hidden_lipschitz.square().mean()


def emma_loss(logits: Tensor, worst: Tensor, y: Tensor) -> Tensor:
    """Take CE at each class's own radius: where it would reach the label's logit, if `worst` is beyond (EMMA: Hu et
    al. 2023).

    Logit j is that at x plus a share s_j of what it gains by `worst`, s_j = (logit_y - logit_j) / gain_j kept in [0.01,
    1] and without a gradient. Where a box makes the gain a concave function of the radius, the share is one of the
    gain.
    """
    gain = worst - logits
    ahead = logits.gather(1, y[:, None]) - logits
    rises = gain > 0
    share = torch.where(rises, ahead / torch.where(rises, gain, 1), 1).clamp(_SMALLEST_SHARE, 1).detach()
    return F.cross_entropy(logits + share * gain, y)
