"""Linear layers as operators: what the walk, the norms and the dual need to know of an affine map W x + b.

`pooling` and `transposed` have more of them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from locallip.bound.settings import Setting, per_axis
from locallip.bound.torus import torus_norm

Position = int | str

# By the number of dimensions.
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
# The layers that pad as convolutions can.
_PADDING = {"reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}
_BY_WEIGHT = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}
# Bytes. In float64 a CPU lays out the patches of all images before it multiplies. Beyond 32 MB it gets other memory for
# them at every call, which takes two times as long as the convolution (one core of an EPYC, Zen 3).
_PATCHES = 2**24


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
        norm_bound_is_exact: whether `norm_bound` is the norm itself, but for rounding.
        size_of_parts: how large the parts of W are that may cancel in it, a scalar; 0 where a norm of W tells.
        spread: by how much an error of every sum inside of W can grow on the way out of it.
    """

    told_by_weight: ClassVar[bool] = False
    norm_bound_is_exact: bool = False
    size_of_parts: Tensor | float = 0.0
    spread: Tensor | float = 1.0
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

    @property
    def tells_all(self) -> bool:
        """Whether exactly this class says what `geometry` it has, if any: not so a subclass that inherits it."""
        return bool({"geometry", "told_by_weight"} & vars(type(self)).keys())

    @property
    def terms(self) -> tuple[int, int]:
        """Of how many terms at most an output of `apply`, and one of `adjoint`, is the sum.

        Raises:
            TypeError: for a weight that does not tell, (H_out, H_in) or (C_out, C_in, ...); a subclass says it then.
        """
        if self.weight.dim() < 2:
            raise TypeError(
                f"{type(self).__name__} has a weight {tuple(self.weight.shape)}: give it `terms` of its own"
            )
        return self.weight[0].numel(), len(self.weight) * self.weight[0, 0].numel()

    def norm_bound(self) -> Tensor:
        """At least ||W||, a scalar, but for rounding and without chance.

        By the largest sums of absolute values along rows and columns: ||W||^2 <= ||W||_1 ||W||_inf.
        """
        entries = self.absolute_operator()
        rows, columns = (self.weight.new_ones(1, *shape) for shape in (self.input_shape, self.output_shape))
        return (entries.apply(rows).amax() * entries.adjoint(columns).amax()).sqrt()

    def bias_magnitude(self) -> Tensor:
        """Sums of the absolute values that b was added up from; broadcasts over one image's outputs."""
        ones = [1] * (len(self.output_shape) - 1)
        if self.bias_size is not None:
            return self.bias_size.view(-1, *ones)
        none = self.weight.new_zeros(self.output_shape[0])
        return (none if self.bias is None else self.bias.abs()).view(-1, *ones)

    def divided(self, by: float, dtype: torch.dtype) -> LinearOperator:
        """W / by in another precision, without b."""
        return self.with_weight((self.weight / by).to(dtype))

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
        for known in ("scale", "scaled", "_factor"):
            result.__dict__.pop(known, None)
        result.weight, result.bias, result.bias_size = weight, bias, bias_size
        return result

    def rescaled(self, scale: Tensor, shift: Tensor, shift_size: Tensor | None = None) -> LinearOperator:
        """The operator followed by scale * x + shift for every output channel; all (C_out,), see `bias_size`."""
        bias = 0 if self.bias is None else self.bias * scale
        bias_size = abs(bias) + (shift.abs() if shift_size is None else shift_size)
        return self.with_weight(self._with_scaled_outputs(scale), bias + shift, bias_size)

    def _with_scaled_outputs(self, scale: Tensor) -> Tensor:
        """The weight of the operator with every output channel times a factor; scale: (C_out,)."""
        return self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))


class Dense(LinearOperator):
    """A matrix. weight: (H_out, H_in), bias: (H_out,), or (1,) for all, or None."""

    norm_bound_is_exact = True
    told_by_weight = True

    def __init__(self, weight: Tensor, bias: Tensor | None, position: Position):
        self.output_shape, self.input_shape = weight.shape[:1], weight.shape[1:]
        is_one = bias is not None and bias.shape != self.output_shape
        self.weight, self.bias, self.position = weight, bias.expand(self.output_shape) if is_one else bias, position

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

    def norm_bound(self) -> Tensor:
        return torch.linalg.matrix_norm(self.weight, ord=2)


class Conv(LinearOperator):
    """A zero-padded convolution in 1 to 3 dimensions, of any kernel, stride, padding, dilation and groups.

    In two: weight: (C_out, C_in / groups, kh, kw), bias: (C_out,) or None, input_shape: (C_in, H, W).
    """

    told_by_weight = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        position: Position,
        input_shape: torch.Size,
        stride: Setting = 1,
        padding: Setting = 0,
        dilation: Setting = 1,
        groups: int = 1,
        factors: torch.dtype | None = None,
    ):
        self._dims = weight.dim() - 2
        stride, padding, dilation = (per_axis(setting, self._dims) for setting in (stride, padding, dilation))
        self.weight, self.bias, self.position, self.input_shape = weight, bias, position, input_shape
        self.factors = factors
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        # From the first to the last input that a kernel sees along each axis.
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        spare = [n + 2 * p - r - 1 for n, p, r in zip(input_shape[1:], padding, reach, strict=True)]
        self.output_shape = torch.Size([len(weight), *(n // s + 1 for n, s in zip(spare, stride, strict=True))])
        # With a stride several input sizes give the same output size; this names the one meant.
        self._output_padding = [n % s for n, s in zip(spare, stride)]

    @classmethod
    def of(
        cls,
        layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        position: Position,
        input_shape: torch.Size,
        factors: torch.dtype | None = None,
    ) -> Conv:
        """The operator of a layer.

        Raises:
            TypeError: if it pads with anything but zeros, or unevenly (`padding="same"` with an even kernel).
        """
        where = f"{type(layer).__name__} at position {position}"
        if layer.padding_mode != "zeros":
            other = f"nn.{_PADDING[layer.padding_mode]}{len(layer.kernel_size)}d"
            raise TypeError(
                f"{where}: padding_mode '{layer.padding_mode}' is not supported; put {other} before it instead"
            )
        padding = layer.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":
            dilation = per_axis(layer.dilation, len(layer.kernel_size))
            reach = [d * (k - 1) for d, k in zip(dilation, layer.kernel_size, strict=True)]
            if any(r % 2 for r in reach):
                raise TypeError(f"{where}: padding 'same' pads unevenly for this kernel; pad by nn.ZeroPad before it")
            padding = tuple(r // 2 for r in reach)
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        return cls(layer.weight, layer.bias, position, input_shape, *geometry, factors)

    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @cached_property
    def _factor(self) -> Tensor:
        """The weight as a factor of products."""
        return self._rounded(self.weight)[0]

    def _rounded(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [x if x is None or self.factors is None else x.to(self.factors) for x in tensors]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        images, *parameters = self._rounded(x, weight, bias)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return self._by_parts(_CONVOLVE[self._dims], images, *parameters, *geometry).to(x.dtype)

    def apply(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._factor, None)

    def adjoint(self, y: Tensor) -> Tensor:
        rounded = self._rounded(y, self._factor)
        if self._dims == 2 and self.input_shape[0] == 1 and self.factors is None and y.device.type == "cpu":
            return self._folded(y)
        geometry = (self.stride, self.padding, self._output_padding, self.groups, self.dilation)
        return self._by_parts(_TRANSPOSE[self._dims], *rounded, None, *geometry).to(y.dtype)

    def _by_parts(self, function: Callable[..., Tensor], images: Tensor, *rest: Any) -> Tensor:
        """function(images, *rest), of so many images at a time that their patches do not fill `_PATCHES`."""
        at_a_time = len(images)
        if images.dtype == torch.float64 and images.device.type == "cpu":
            patches = self.groups * self.weight[0].numel() * self.output_shape[1:].numel()
            at_a_time = max(1, _PATCHES // (8 * patches))
        if len(images) <= at_a_time:
            return function(images, *rest)
        return torch.cat([function(part, *rest) for part in images.split(at_a_time)])

    def _folded(self, y: Tensor) -> Tensor:
        """The adjoint by a product of matrices, which to one channel takes a CPU half as long as a convolution."""
        windows = self.weight.flatten(1).T @ y.flatten(2)  # (N, kh kw, positions)
        size, kernel = self.input_shape[1:], self.weight.shape[2:]
        return F.fold(windows, size, kernel, self.dilation, self.padding, self.stride)

    def affine(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._factor, self.bias)

    def absolute(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight.abs(), None)

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        inputs, outputs = self._rounded(x, y)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _BY_WEIGHT[self._dims](inputs, self.weight.shape, outputs, *geometry).to(self.weight.dtype)

    def row_norms(self) -> Tensor:
        # At the border the padding cuts the row, so one kernel's norm is an upper bound there.
        norms = (self.weight / self.scale).flatten(1).norm(dim=1) * self.scale
        return norms.view(-1, *[1] * self._dims)  # (C_out, 1, ...)

    def norm_bound(self) -> Tensor:
        return torus_norm(self)
