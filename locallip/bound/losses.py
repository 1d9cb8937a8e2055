"""Losses that train through the bound."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from locallip.bound.worst_case import with_worst_class


def bcp_loss(logits: Tensor, worst: Tensor, y: Tensor, kappa: float | Tensor) -> Tensor:
    """kappa CE(logits, y) + (1 - kappa) CE(worst, y), the mean over the batch (BCP: Lee et al. 2020).

    logits: (N, K) at x. worst: (N, K) from `worst_logits`. y: (N,) labels.
    """
    return kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(worst, y)


def gloro_loss(logits: Tensor, worst: Tensor, y: Tensor) -> Tensor:
    """CE over K + 1 logits, those at x and the largest wrong one of `worst`; mean over the batch (Leino et al. 2021).

    logits: (N, K) at x. worst: (N, K) from `worst_logits`. y: (N,) labels.
    """
    return F.cross_entropy(with_worst_class(logits, worst, y), y)
