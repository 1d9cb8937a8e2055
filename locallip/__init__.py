"""Local Lipschitz bounds of neural networks, and certificates of robustness that rest on them.

    import locallip

    locallip.certify(model, x, y, epsilon=0.5)      # (N,) bool: is y the answer in the whole ball around each image?
    print(locallip.verify(model, x, y, epsilon=0.5))      # how many are certified, attacked, misclassified, open

The bound is in `locallip.bound`; `locallip.training` trains through it, `locallip.evaluation` attacks and certifies.
"""

from locallip.bound.activations import Activation, Clip, ClippedMaxMin, Elementwise
from locallip.bound.bound import Bound
from locallip.bound.certificates import Lipschitz, certified_radius, certify, local_lipschitz
from locallip.bound.graph import Graph
from locallip.bound.layers import ClampGroupSort, GroupSort, MaxMin, Normalize, ReLU_x
from locallip.bound.losses import bcp_loss, gloro_loss
from locallip.bound.norms import Arithmetic, Bracket, Norms
from locallip.bound.operators import Conv, Dense, LinearOperator
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.promises import check_operator, check_rule
from locallip.bound.proof import Proof, decide, prove, proven_norms
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.rules import Place, Reshape, rule
from locallip.bound.stages import DualStage, ProductStage, Stage
from locallip.bound.walk import propagate
from locallip.bound.worst_case import gloro_logits, worst_logits, worst_margin
from locallip.verification import Verification, verify

__all__ = [
    "Activation",
    "Arithmetic",
    "Bound",
    "Bracket",
    "ClampGroupSort",
    "Clip",
    "ClippedMaxMin",
    "Conv",
    "Dense",
    "DualStage",
    "Elementwise",
    "Graph",
    "GroupSort",
    "LinearOperator",
    "Lipschitz",
    "MaxMin",
    "Normalize",
    "Norms",
    "Place",
    "PowerIteration",
    "ProductStage",
    "Proof",
    "ProvenNorms",
    "ReLU_x",
    "Reshape",
    "Stage",
    "Verification",
    "bcp_loss",
    "certified_radius",
    "certify",
    "check_operator",
    "check_rule",
    "decide",
    "gloro_logits",
    "gloro_loss",
    "local_lipschitz",
    "propagate",
    "prove",
    "proven_norms",
    "rule",
    "verify",
    "worst_logits",
    "worst_margin",
]
