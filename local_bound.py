"""The door to the bound, `locallip.bound`; the paper's method is in `locallip/bound/walk.py`.

    import torch
    from torch import nn
    from local_bound import certified_radius, certify, local_lipschitz

    model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 13 * 13, 10))
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([3, 1, 4, 1])

    local_lipschitz(model, x, epsilon=0.5).lipschitz      # (4,) valid in the ball around each image
    certify(model, x, y, epsilon=0.5)                     # (4,) bool: is y the answer in the whole ball?
    certified_radius(model, x)                            # (4,) largest certified epsilon, to 0.001

Radii are L2 distances in the space of x.
"""

from locallip.bound.activations import Activation, Clip, ClippedMaxMin, Elementwise
from locallip.bound.certificates import Lipschitz, certified_radius, certify, local_lipschitz
from locallip.bound.fused import compile_activations
from locallip.bound.graph import Graph
from locallip.bound.layers import ClampGroupSort, Normalize, ReLU_x
from locallip.bound.losses import bcp_loss, gloro_loss
from locallip.bound.norms import Arithmetic, Bracket, Norms
from locallip.bound.operators import Conv, Dense, LinearOperator, Position
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import LANCZOS_STEPS, Proof, Stage, decide, eliminated, prove, proven_norms
from locallip.bound.proven_norms import DEPLOYED, ProvenNorms
from locallip.bound.rules import Place, Reshape, rule
from locallip.bound.walk import Bound, propagate
from locallip.bound.worst_case import gloro_logits, worst_logits, worst_margin

__all__ = [
    "DEPLOYED",
    "LANCZOS_STEPS",
    "Activation",
    "Arithmetic",
    "Bound",
    "Bracket",
    "ClampGroupSort",
    "Clip",
    "ClippedMaxMin",
    "Conv",
    "Dense",
    "Elementwise",
    "Graph",
    "LinearOperator",
    "Lipschitz",
    "Normalize",
    "Norms",
    "Place",
    "Position",
    "PowerIteration",
    "Proof",
    "ProvenNorms",
    "ReLU_x",
    "Reshape",
    "Stage",
    "bcp_loss",
    "certified_radius",
    "certify",
    "compile_activations",
    "decide",
    "eliminated",
    "gloro_logits",
    "gloro_loss",
    "local_lipschitz",
    "propagate",
    "prove",
    "proven_norms",
    "rule",
    "worst_logits",
    "worst_margin",
]
