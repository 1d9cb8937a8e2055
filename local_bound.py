"""The door to the bound, `locallip.bound`; the paper's method is in `locallip/bound/walk.py`.

    import torch
    from torch import nn
    from local_bound import certified_radius, certify, local_lipschitz, verify

    model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 13 * 13, 10))
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([3, 1, 4, 1])

    local_lipschitz(model, x, epsilon=0.5).lipschitz      # (4,) valid in the ball around each image
    certify(model, x, y, epsilon=0.5)                     # (4,) bool: is y the answer in the whole ball?
    verify(model, x, y, epsilon=0.5).status               # certified, attacked, misclassified or open, one word each
    certified_radius(model, x)                            # (4,) largest certified epsilon, to 0.001

Radii are L2 distances in the space of x.
"""

from locallip import *  # noqa: F403
from locallip import __all__ as __all__
