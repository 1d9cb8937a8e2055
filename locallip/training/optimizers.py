"""The optimizers by the names that --optimizer has for them; a further one is a function and a line in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the iteration a X + b X X^T X + c (X X^T)^2 X that brings singular values near 1 (Jordan et al. 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The rate of Adam beside Muon, in parts of Muon's.
_ADAMS_SHARE = 0.1


class Muon(torch.optim.Optimizer):
    """Step along the gradient's momentum with all its singular values brought to about 1.

    Of a layer with weight W, a matrix of m outputs, the step has the spectral norm lr s, s being the root mean square
    of the singular values that W has at the start. So it is as long in every direction, and moves the layer's norm by
    a known part at most, where Adam's may have the norm lr sqrt(m n).

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. `torch.optim.Muon` takes no kernels of convolutions, and
    multiplies in bfloat16 alone, which CPUs without an instruction for it do a hundred times as slowly.

    Args:
        weights: of two dimensions or more; the first counts outputs.
        lr: of the step, see above.
        momentum: decay of the gradient's moving average; the step looks one ahead of it (Nesterov's).
        dtype: of the products.
    """

    def __init__(self, weights: list[Tensor], lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32):
        groups = [{"params": [weight], "share": _scale(weight)} for weight in weights]
        super().__init__(groups, {"lr": lr})
        set_rate(self, lr)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(self._direction(weight) * group["lr"])

    def _direction(self, weight: Tensor) -> Tensor:
        average = self.state[weight].setdefault("average", torch.zeros_like(weight))
        average.lerp_(weight.grad, 1 - self.momentum)
        ahead = weight.grad.lerp(average, self.momentum)
        return orthogonalized(ahead.flatten(1), self.dtype).view_as(weight)


class Joined:
    """Several optimizers, each of its own parameters, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


def set_rate(optimizer: torch.optim.Optimizer | Joined, lr: float) -> None:
    """Give every group of parameters its share of a learning rate, which is all of it where the group has none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of a matrix to between 0.7 and 1.2, those far below the largest at least closer to it.

    Args:
        matrix: (m, n).
        dtype: of the products.

    Returns:
        (m, n) of the matrix's own dtype; 0 where it is 0.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)).to(dtype)
    for _ in range(_ITERATIONS):
        # Several steps on X X^T alone save products, but in bfloat16 what that has lost of X grows from step to step.
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrix.dtype)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def adam(model: nn.Module, lr: float, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Adam for all parameters."""
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True)


def muon(model: nn.Module, lr: float, dtype: torch.dtype) -> Joined:
    """Muon for the weights of hidden layers, Adam for the last layer, biases and thresholds; dtype: see `Muon`."""
    hidden = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)][:-1]
    others = [p for p in model.parameters() if not any(p is weight for weight in hidden)]
    rest = torch.optim.Adam([{"params": others, "share": _ADAMS_SHARE}], fused=True)
    joined = Joined(Muon(hidden, lr, dtype=dtype), rest)
    set_rate(joined, lr)
    return joined


OPTIMIZERS: dict[str, Callable[[nn.Module, float, torch.dtype], torch.optim.Optimizer | Joined]] = {
    "adam": adam,
    "muon": muon,
}


def _scale(weight: Tensor) -> float:
    """The root mean square of the singular values that are not 0 for want of rows or columns."""
    matrix = weight.detach().flatten(1)
    return float(matrix.norm()) / min(matrix.shape) ** 0.5
