"""Linear layers as operators: what the walk, the norms and the dual need to know of an affine map W x + b."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Position = int | str


class LinearOperator(ABC):
    """The affine map W x + b of a layer, at a known position of the network and for a known input shape.

    Attributes:
        weight, bias: what W and b are made of; gradients flow to them.
        bias_size: (C_out,) sum of the absolute values of the terms that b was added up from, where it was; or None.
        factors: what a convolution rounds its factors to before it multiplies, the sums being kept as they were given;
            None: nothing. Dense layers take no notice.
        position: where the layer stands in the network.
        input_shape, output_shape: shapes of one image's activations before and after, without the batch.
        told_by_weight: whether operators of exactly this class that agree in shapes, weight and `geometry` are the
            same W, so that its norm may be kept for the next call; a subclass says so for itself.
    """

    told_by_weight: ClassVar[bool] = False
    weight: Tensor
    bias: Tensor | None
    bias_size: Tensor | None = None
    factors: torch.dtype | None = None
    position: Position
    input_shape: torch.Size
    output_shape: torch.Size

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """W x, a new tensor. x: (N, *input_shape); returns (N, *output_shape)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """W^T y, a new tensor. y: (N, *output_shape); returns (N, *input_shape)."""

    @abstractmethod
    def affine(self, x: Tensor) -> Tensor:
        """W x + b. x: (N, *input_shape); returns (N, *output_shape)."""

    @abstractmethod
    def absolute(self, x: Tensor) -> Tensor:
        """|W| x, entry by entry absolute. x: (N, *input_shape); returns (N, *output_shape)."""

    @abstractmethod
    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of sum_n y_n . (W x_n) with respect to `weight`. x: (N, *input_shape), y: (N, *output_shape)."""

    @abstractmethod
    def row_norms(self) -> Tensor:
        """L2 norm of the row of W that makes an output, or more; broadcasts over (N, *output_shape)."""

    def geometry(self) -> tuple:
        """What, besides shapes and weight, makes W: stride, padding and the like."""
        return ()

    @cached_property
    def scale(self) -> Tensor:
        """A power of two, a scalar, about as large as the largest weight."""
        exponent = torch.frexp(self.weight.detach().abs().max()).exponent
        return torch.ldexp(self.weight.new_ones(()), exponent)

    @cached_property
    def scaled(self) -> LinearOperator:
        """W / scale without b, and without a gradient; exact, and no product under- or overflows that need not."""
        return self.with_weight(self.weight.detach() / self.scale)

    def absolute_operator(self) -> LinearOperator:
        """|W| as an operator of its own, entry by entry absolute, without b."""
        return self.with_weight(self.weight.abs())

    def with_weight(
        self, weight: Tensor, bias: Tensor | None = None, bias_size: Tensor | None = None
    ) -> LinearOperator:
        """The operator of the same geometry with other weights."""
        result = copy.copy(self)
        for known in ("scale", "scaled"):
            result.__dict__.pop(known, None)
        result.weight, result.bias, result.bias_size = weight, bias, bias_size
        return result

    def rescaled(self, scale: Tensor, shift: Tensor, shift_size: Tensor | None = None) -> LinearOperator:
        """The operator followed by scale * x + shift for every output channel; all (C_out,), see `bias_size`."""
        bias = 0 if self.bias is None else self.bias * scale
        bias_size = abs(bias) + (shift.abs() if shift_size is None else shift_size)
        return self.with_weight(self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1)), bias + shift, bias_size)


class Dense(LinearOperator):
    """A matrix. weight: (H_out, H_in), bias: (H_out,) or None."""

    told_by_weight = True

    def __init__(self, weight: Tensor, bias: Tensor | None, position: Position):
        self.weight, self.bias, self.position = weight, bias, position
        self.output_shape, self.input_shape = weight.shape[:1], weight.shape[1:]

    @classmethod
    def of(cls, layer: nn.Linear, position: Position) -> Dense:
        """The operator of a layer."""
        return cls(layer.weight, layer.bias, position)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.weight

    def affine(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def absolute(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs())

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return y.T @ x

    def row_norms(self) -> Tensor:
        return (self.weight / self.scale).norm(dim=1) * self.scale  # (H_out,)


class Conv(LinearOperator):
    """A zero-padded 2d convolution of any kernel, stride, padding, dilation and groups.

    weight: (C_out, C_in / groups, kh, kw), bias: (C_out,) or None, input_shape: (C_in, H, W).
    """

    told_by_weight = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        position: Position,
        input_shape: torch.Size,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        factors: torch.dtype | None = None,
    ):
        self.weight, self.bias, self.position, self.input_shape = weight, bias, position, input_shape
        self.factors = factors
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        # From the first to the last input that a kernel sees along each axis.
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        spare = [n + 2 * p - r - 1 for n, p, r in zip(input_shape[1:], padding, reach)]
        self.output_shape = torch.Size([len(weight), *(n // s + 1 for n, s in zip(spare, stride))])
        # With a stride several input sizes give the same output size; this names the one meant.
        self._output_padding = [n % s for n, s in zip(spare, stride)]

    @classmethod
    def of(
        cls, layer: nn.Conv2d, position: Position, input_shape: torch.Size, factors: torch.dtype | None = None
    ) -> Conv:
        """The operator of a layer.

        Raises:
            TypeError: if it pads with anything but zeros, or unevenly (`padding="same"` with an even kernel).
        """
        if layer.padding_mode != "zeros":
            raise TypeError(f"Conv2d at position {position}: padding_mode '{layer.padding_mode}' is not supported")
        padding = layer.padding
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
            if any(r % 2 for r in reach):
                raise TypeError(f"Conv2d at position {position}: padding 'same' pads unevenly for this kernel")
            padding = (reach[0] // 2, reach[1] // 2)
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        return cls(layer.weight, layer.bias, position, input_shape, *geometry, factors)

    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def _rounded(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [x if x is None or self.factors is None else x.to(self.factors) for x in tensors]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rounded = self._rounded(x, weight, bias)
        return F.conv2d(*rounded, self.stride, self.padding, self.dilation, self.groups).to(x.dtype)

    def apply(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, None)

    def adjoint(self, y: Tensor) -> Tensor:
        rounded = self._rounded(y, self.weight)
        if self.input_shape[0] == 1 and self.factors is None and y.device.type == "cpu":
            return self._folded(y)
        geometry = (self.stride, self.padding, self._output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(*rounded, None, *geometry).to(y.dtype)

    def _folded(self, y: Tensor) -> Tensor:
        """The adjoint by a product of matrices, which to one channel takes a CPU half as long as a convolution."""
        windows = self.weight.flatten(1).T @ y.flatten(2)  # (N, kh kw, positions)
        size, kernel = self.input_shape[1:], self.weight.shape[2:]
        return F.fold(windows, size, kernel, self.dilation, self.padding, self.stride)

    def affine(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, self.bias)

    def absolute(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight.abs(), None)

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        inputs, outputs = self._rounded(x, y)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return torch.nn.grad.conv2d_weight(inputs, self.weight.shape, outputs, *geometry).to(self.weight.dtype)

    def row_norms(self) -> Tensor:
        # At the border the padding cuts the row, so one kernel's norm is an upper bound there.
        return ((self.weight / self.scale).flatten(1).norm(dim=1) * self.scale)[:, None, None]  # (C_out, 1, 1)
