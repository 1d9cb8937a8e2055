"""Spectral norms of convolutions and dense layers, whole or with rows and columns switched off.

This is the exchangeable part of the walk through the layers in `local_bound`. The walk hands an operator to a *norms*
object and asks two questions:

    whole(operator)                       the spectral norm ||W||, a scalar
    masked(operator, in_mask, out_mask)   ||D_out W D_in|| for every image, (N,); asked after `whole`

where the masks are (N, *shape) booleans, or None for "nothing is switched off"; with two None it may answer with the
scalar ||W||. Three attributes say how the walk goes:

    local_ball    whether the ball that bounds the box shrinks with the local norms so far, or with the global ones
    roundoffs     unit roundoffs to allow for: of the bound's own arithmetic, and of the deployed network's; 0: exact
    factors       what convolutions round their factors to before they multiply, such as torch.bfloat16; None: nothing

Where a roundoff is not 0, the walk takes no rounded factors, and it also asks for absolute(operator), a bound on
|| |W| ||. `PowerIteration` answers with differentiable estimates from below (the published method),
`proven_norm.ProvenNorms` with upper bounds.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearOperator(ABC):
    """The affine map W x + b of a layer, at a known position of the network and for a known input shape.

    Attributes:
        weight, bias: what W and b are made of; gradients flow to them.
        bias_size: (C_out,) sum of the absolute values of the terms that b was added up from, where it was; or None.
        factors: what a convolution rounds its factors to before it multiplies, the sums being kept as they were given;
            None: nothing. Dense layers take no notice.
        position: where the layer stands in the network.
        input_shape, output_shape: shapes of one image's activations before and after, without the batch.
    """

    weight: Tensor
    bias: Tensor | None
    bias_size: Tensor | None = None
    factors: torch.dtype | None = None
    position: int | str
    input_shape: torch.Size
    output_shape: torch.Size

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """W x. x: (N, *input_shape); returns (N, *output_shape)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """W^T y. y: (N, *output_shape); returns (N, *input_shape)."""

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

    def absolute_operator(self) -> LinearOperator:
        """|W| as an operator of its own, entry by entry absolute, without b."""
        result = copy.copy(self)
        result.weight, result.bias, result.bias_size = self.weight.abs(), None, None
        return result

    def rescaled(self, scale: Tensor, shift: Tensor, shift_size: Tensor | None = None) -> LinearOperator:
        """The operator followed by scale * x + shift for every output channel; all (C_out,), see `bias_size`."""
        result = copy.copy(self)
        result.weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        bias = 0 if self.bias is None else self.bias * scale
        result.bias = bias + shift
        result.bias_size = abs(bias) + (shift.abs() if shift_size is None else shift_size)
        return result


class Dense(LinearOperator):
    """A matrix. weight: (H_out, H_in), bias: (H_out,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, position: int | str):
        self.weight, self.bias, self.position = weight, bias, position
        self.output_shape, self.input_shape = weight.shape[:1], weight.shape[1:]

    @classmethod
    def of(cls, layer: nn.Linear, position: int | str) -> Dense:
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
        return self.weight.norm(dim=1)  # (H_out,)


class Conv(LinearOperator):
    """A zero-padded 2d convolution of any kernel, stride, padding, dilation and groups.

    weight: (C_out, C_in / groups, kh, kw), bias: (C_out,) or None, input_shape: (C_in, H, W).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        position: int | str,
        input_shape: torch.Size,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ):
        self.weight, self.bias, self.position, self.input_shape = weight, bias, position, input_shape
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        # From the first to the last input that a kernel sees along each axis.
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        spare = [n + 2 * p - r - 1 for n, p, r in zip(input_shape[1:], padding, reach)]
        self.output_shape = torch.Size([len(weight), *(n // s + 1 for n, s in zip(spare, stride))])
        # With a stride several input sizes give the same output size; this names the one meant.
        self._output_padding = [n % s for n, s in zip(spare, stride)]

    @classmethod
    def of(cls, layer: nn.Conv2d, position: int | str, input_shape: torch.Size) -> Conv:
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
        return cls(layer.weight, layer.bias, position, input_shape, layer.stride, padding, layer.dilation, layer.groups)

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
        geometry = (self.stride, self.padding, self._output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(*rounded, None, *geometry).to(y.dtype)

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
        return self.weight.flatten(1).norm(dim=1)[:, None, None]  # (C_out, 1, 1)


class PowerIteration:
    """Spectral norms by power iteration: estimates that approach the true norm from below.

    Iterations run without a graph; the gradient is that of v . (W u) with the last vectors held fixed, which at
    convergence is the gradient of the norm itself. Singular vectors are kept between calls and warm-start the next one.
    A vector lives on the input or on the output side of its operator, whichever it was given on; fresh ones on the
    smaller side.

    Args:
        iterations: products with W and with its transpose, each this many times per call.
        local_vectors: start vectors of the masked norms by position, one per image: (N, *shape). Replace them
            whenever the images change, or set to {} for fresh ones.
        global_vectors: start vectors of the whole norms by position: (1, *shape).
        seed: of the random start vectors where none are given.
        local_positions: layers that masks are made use of at; elsewhere the whole norm stands for the masked one, which
            costs nothing and needs no vectors. None: all.
        skip_idle_masks: images whose masks eliminate nothing get the whole norm, which is theirs, without iterations.
            How much work there is then depends on the data, so that a CUDA device has to be waited for.
        factors: see the head of this module.
    """

    local_ball = False
    roundoffs = (0.0, 0.0)

    def __init__(
        self,
        iterations: int,
        local_vectors: Mapping[int | str, Tensor] | None = None,
        global_vectors: Mapping[int | str, Tensor] | None = None,
        seed: int = 0,
        local_positions: Collection[int | str] | None = None,
        skip_idle_masks: bool = False,
        factors: torch.dtype | None = None,
    ):
        if iterations < 1:
            raise ValueError(f"power iteration needs at least one iteration, got {iterations}")
        self.iterations = iterations
        self.local_positions = local_positions
        self.skip_idle_masks = skip_idle_masks
        self.factors = factors
        self.local_vectors = dict(local_vectors or {})
        self.global_vectors = dict(global_vectors or {})
        self._whole: dict[int | str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def whole(self, operator: LinearOperator) -> Tensor:
        """||W||, a scalar that carries the gradient with respect to the weight."""
        start = self.global_vectors.get(operator.position)
        if start is None:
            start = self._random(1, operator)
        norm, self.global_vectors[operator.position] = self._iterate(operator, start, None, None)
        self._whole[operator.position] = norm[0]
        return norm[0]

    def masked(self, operator: LinearOperator, in_mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
        """||D_out W D_in|| for every image: (N,). Without use of masks the norm just computed by `whole`, a scalar.

        in_mask: (N, *input_shape), out_mask: (N, *output_shape) booleans; None switches nothing off.
        """
        position = operator.position
        if self.local_positions is not None and position not in self.local_positions:
            return self._whole[position]
        start = self.local_vectors.get(position)
        mask = out_mask if in_mask is None else in_mask
        if mask is None and (start is None or self.skip_idle_masks):
            return self._whole[position]
        count = len(start if mask is None else mask)
        if start is None or len(start) != count:
            start = self._fresh(count, operator)
        images = eliminating(in_mask, out_mask).nonzero().squeeze(1) if self.skip_idle_masks else range(count)
        if len(images) == count:
            norm, self.local_vectors[position] = self._iterate(operator, start, in_mask, out_mask)
            return norm
        whole, self.local_vectors[position] = self._whole[position].expand(count), start
        if not len(images):
            return whole
        in_mask, out_mask = (None if mask is None else mask[images] for mask in (in_mask, out_mask))
        norm, vectors = self._iterate(operator, start[images], in_mask, out_mask)
        self.local_vectors[position] = start.index_copy(0, images, vectors)
        return whole.index_copy(0, images, norm)

    def _random(self, count: int, operator: LinearOperator) -> Tensor:
        shape = min(operator.input_shape, operator.output_shape, key=torch.Size.numel)
        weight = operator.weight
        start = torch.randn(count, *shape, generator=self._generator, dtype=weight.dtype).to(weight.device)
        return _unit(start)[0]

    def _fresh(self, count: int, operator: LinearOperator) -> Tensor:
        # A mask that eliminates little moves the leading vector little; the random part reaches what is left
        # when the mask eliminates the whole of it.
        start = self._random(count, operator)
        known = self.global_vectors.get(operator.position)
        if known is None or known.shape[1:] != start.shape[1:]:
            return start
        return _unit(known + 0.1 * start)[0]

    def _iterate(
        self, operator: LinearOperator, start: Tensor, in_mask: Tensor | None, out_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One norm per start vector and the vectors after the run, on the side of the start vectors."""
        columns = None if in_mask is None else in_mask.to(start.dtype)
        rows = None if out_mask is None else out_mask.to(start.dtype)

        def forward(u: Tensor) -> Tensor:
            return _switch_off(operator.apply(u), rows)

        def backward(v: Tensor) -> Tensor:
            return _switch_off(operator.adjoint(v), columns)

        with torch.no_grad():
            if start.shape[1:] == operator.input_shape:
                u = _begin(start, columns)
                for _ in range(self.iterations):
                    v = forward(u)
                    u, length = _unit(backward(v))
                v, length_before = _unit(v)
                norm = torch.where(length_before == 0, 0, length / length_before)
                kept = _kept(u, start)
            else:
                v = _begin(start, rows)
                for _ in range(self.iterations):
                    u, _ = _unit(backward(v))
                    v = forward(u)
                v, norm = _unit(v)
                kept = _kept(v, start)
        return _SingularValue.apply(operator.weight, operator, u, v, norm), kept


class _SingularValue(torch.autograd.Function):
    """sigma = v . (W u) for every image, known already, as a function of W; u and v are held fixed."""

    @staticmethod
    def forward(ctx, weight, operator, u, v, sigma):  # noqa: ANN001, ANN205
        ctx.operator = operator
        ctx.save_for_backward(u, v)
        return sigma

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        u, v = ctx.saved_tensors
        return ctx.operator.weight_gradient(u, v * per_image(grad, v)), None, None, None, None


def eliminating(in_mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
    """For which images (N,) a mask switches anything off."""
    masks = [mask for mask in (in_mask, out_mask) if mask is not None]
    return torch.stack([~mask.all(dim=_entries(mask)) for mask in masks]).any(dim=0)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ...), with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _entries(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the images'; to flatten them would copy what is in channels-last order."""
    return tuple(range(1, x.dim()))


def _switch_off(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.mul_(mask)


def _begin(start: Tensor, mask: Tensor | None) -> Tensor:
    """The start vector where the mask is on; the mask itself where that leaves nothing of it."""
    return start if mask is None else _kept(start * mask, mask)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / ||x|| for every image, zero where ||x|| is zero, and the lengths (N,). x: (N, ...).

    A length that is not finite is NaN: as a norm it certifies nothing.
    """
    length = torch.linalg.vector_norm(x, dim=_entries(x))
    length = torch.where(length.isinf(), torch.nan, length)
    return x * per_image(torch.where(length == 0, 0, 1 / length), x), length


def _kept(vector: Tensor, start: Tensor) -> Tensor:
    """`vector`, or `start` where it is zero: a norm would stay zero after the layer has come back to life."""
    dead = torch.linalg.vector_norm(vector, dim=_entries(vector)) == 0
    return torch.addcmul(vector, start, per_image(dead.to(start.dtype), start))


class StoredVectors:
    """One singular vector per training image and layer, which warm-start the power iteration of the image's next visit.

    Kept in half precision: a start vector needs no more. They lie on `device` if they take at most half of its free
    memory, else in host memory.

    Args:
        images: number of images.
        shapes: shape of one image's vector, by position.
        device: where the vectors are used.
        seed: of the start vectors.
        host_memory: bytes that they may take in host memory; None: any number.

    Raises:
        MemoryError: if that is too little.
    """

    def __init__(
        self,
        images: int,
        shapes: Mapping[int | str, torch.Size],
        device: torch.device,
        seed: int = 0,
        host_memory: int | None = None,
    ):
        self.bytes = 2 * images * sum(shape.numel() for shape in shapes.values())
        self._used_on = device
        self.device = device if self._fits(device) else torch.device("cpu")
        if self.device.type == "cpu" and host_memory is not None and self.bytes > host_memory:
            raise MemoryError(f"they take {self.bytes / 1e9:,.1f} GB, and {host_memory / 1e9:,.1f} GB are free")
        generator = torch.Generator().manual_seed(seed)
        self._vectors = {}
        for position, shape in shapes.items():
            vector = torch.randn(1, *shape, generator=generator) / shape.numel() ** 0.5
            # In the order in which training convolves; what is read and written is each image's as a whole anyway.
            order = torch.channels_last if len(shape) == 3 else torch.contiguous_format
            room = torch.empty(images, *shape, dtype=torch.half, device=self.device, memory_format=order)
            self._vectors[position] = room.copy_(vector)

    def _fits(self, device: torch.device) -> bool:
        return device.type != "cuda" or self.bytes <= torch.cuda.mem_get_info(device)[0] / 2

    def read(self, indices: Tensor) -> dict[int | str, Tensor]:
        """Start vectors (B, *shape) in float32 of the images at `indices`, by position."""
        rows = indices.to(self.device)
        read = {p: vectors[rows].to(self._used_on).float() for p, vectors in self._vectors.items()}
        # A little of everything: a part of the layer that was masked out at the last visit may have come back since.
        return {p: vectors + 1e-3 / vectors[0].numel() ** 0.5 for p, vectors in read.items()}

    def write(self, indices: Tensor, vectors: Mapping[int | str, Tensor]) -> None:
        """Keep what the iteration has come to for the images at `indices`."""
        rows = indices.to(self.device)
        for position, kept in self._vectors.items():
            kept[rows] = vectors[position].to(self.device, torch.half)
