"""The chain of an `nn.Sequential`, from the walk of `local_bound`. To be replaced by the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_bound import _layers, _rule_for, _Walk
from locallip.bound.dual.chain import Chain, Hidden
from locallip.bound.dual.elementwise import ClippedLine
from locallip.bound.dual.pairs import ClippedPairs
from proven_norm import ProvenNorms


class _Recorder(_Walk):
    """The walk, keeping what it passes."""

    def __init__(self, x: Tensor, epsilon: Tensor, norms: ProvenNorms, pixels: tuple[float, float] | None):
        super().__init__(x, epsilon, norms, pixels, None, False)
        self.passed: list[dict] = []

    def linear(self, operator) -> None:  # noqa: ANN001
        self._finish_layer()
        super().linear(operator)
        self._start_layer(operator)

    def _start_layer(self, operator) -> None:  # noqa: ANN001
        region = self.region
        self.passed.append({"operator": operator, "center": region.center, "box": (region.lower, region.upper)})

    def clipping(self, position, layer, clip) -> None:  # noqa: ANN001
        if not self.passed or "activation" in self.passed[-1]:
            raise TypeError(f"position {position}: an activation right behind another, or behind none, is no chain")
        super().clipping(position, layer, clip)
        kind = ClippedPairs if clip.pairs else ClippedLine
        self.passed[-1] |= {"activation": kind(clip.low, clip.high), "columns": self.columns}

    def _finish_layer(self) -> None:
        if self.passed:
            self.passed[-1].setdefault("activation", ClippedLine(-torch.inf, torch.inf))
            self.passed[-1].setdefault("columns", None)

    def hidden(self) -> list[Hidden]:
        self._finish_layer()
        self._close()
        return [self._hidden(**kept) for kept in self.passed]

    def _hidden(self, operator, center, box, activation, columns) -> Hidden:  # noqa: ANN001
        norm, absolute = self.local_norms[operator.position], self.norms.absolute(operator)
        center, box = (center, box) if columns is not None else (center, None)
        columns = None if columns is None else columns.reshape(center.shape)
        rows = None if activation.pairs else columns
        return Hidden.around(operator, activation, center, norm, absolute, rows, columns, box)


@torch.no_grad()
def chain_of(
    model: nn.Sequential,
    x: Tensor,
    epsilon: float | Tensor,
    norms: ProvenNorms,
    pixels: tuple[float, float] | None = None,
) -> Chain:
    """The chain of a network in float64 around images x: arguments are those of `propagate`.

    Where the norms answer masked norms with the whole ones (`steps` is 0), masks are left out.
    """
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    *layers, (_, last) = _layers(model)
    walk = _Recorder(x, epsilon, norms, pixels)
    for position, layer in layers:
        _rule_for(position, layer)(walk, position, layer)
    hidden = walk.hidden()
    if norms.steps == 0:
        for layer in hidden:
            layer.rows = layer.columns = layer.lo = layer.hi = None
    bias = x.new_zeros(len(last.weight)) if last.bias is None else last.bias
    return Chain(x, epsilon, hidden, last.weight, bias).within(pixels)
