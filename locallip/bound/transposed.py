"""The transpose of an operator as an operator: a transposed convolution is that of a convolution."""

from __future__ import annotations

from torch import Tensor

from locallip.bound.operators import Conv, LinearOperator


class TransposedConv(LinearOperator):
    """The transpose of a convolution.

    weight: that of the convolution, (C_in, C_out / groups, ...) seen from here, bias: (C_out,) or None.
    """

    def __init__(self, conv: Conv, bias: Tensor | None, bias_size: Tensor | None = None):
        self.conv, self.bias, self.bias_size = conv, bias, bias_size
        self.weight, self.position, self.factors = conv.weight, conv.position, conv.factors
        self.input_shape, self.output_shape = conv.output_shape, conv.input_shape

    def apply(self, x: Tensor) -> Tensor:
        return self.conv.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.conv.apply(y)

    def affine(self, x: Tensor) -> Tensor:
        x = self.apply(x)
        return x if self.bias is None else x + self._for_channels(self.bias).to(x.dtype)

    def absolute(self, x: Tensor) -> Tensor:
        return self.absolute_operator().apply(x)

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv.weight_gradient(y, x)

    def row_norms(self) -> Tensor:
        # At most every weight that leads to a channel, though with a stride no output sees them all.
        by_group = (self.weight / self.scale).unflatten(0, (self.conv.groups, -1)).flatten(3)
        return self._for_channels(by_group.norm(dim=(1, 3)).flatten() * self.scale)

    def _for_channels(self, x: Tensor) -> Tensor:
        return x.view(-1, *[1] * (len(self.output_shape) - 1))  # (C_out, 1, ...)

    @property
    def terms(self) -> tuple[int, int]:
        return self.conv.terms[::-1]

    def norm_bound(self) -> Tensor:
        return self.conv.norm_bound()

    def geometry(self) -> tuple:
        return self.conv.geometry()

    def with_weight(
        self, weight: Tensor, bias: Tensor | None = None, bias_size: Tensor | None = None
    ) -> TransposedConv:
        return TransposedConv(self.conv.with_weight(weight), bias, bias_size)

    def _with_scaled_outputs(self, scale: Tensor) -> Tensor:
        by_group = scale.view(self.conv.groups, 1, -1, *[1] * (self.weight.dim() - 2))
        return (self.weight.unflatten(0, (self.conv.groups, -1)) * by_group).flatten(0, 1)
