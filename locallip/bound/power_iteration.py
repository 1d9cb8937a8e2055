"""Spectral norms by power iteration, the published method's estimates, or by an ascent that takes the same products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from locallip.bound.checks import refuse_whole_number
from locallip.bound.norms import Arithmetic, Bracket
from locallip.bound.operators import LinearOperator, Position
from locallip.bound.tensors import (
    eliminating,
    entries,
    infinite_to_nan,
    lengths,
    per_image,
    reciprocal,
    underflow_to_nan,
    unit,
)

Product = Callable[[Tensor], Tensor]


class PowerIteration:
    """Spectral norms by power iteration: estimates that approach the true norm from below.

    Iterations run without a graph; the gradient is that of v . (W u) with the last vectors held fixed, which at
    convergence is the gradient of the norm itself. Singular vectors are kept between calls and warm-start the next one.
    A vector lives on the input or on the output side of its operator, whichever it was given on; fresh ones on the
    smaller side.

    Where weights move from call to call, estimates of few iterations lag behind. With `ascend` every iteration but the
    first takes the best vector in the plane of u and W^T W u, not the latter alone: steepest ascent of the Rayleigh
    quotient, with an exact line search that costs no product (Knyazev, SIAM J. Sci. Comput. 23, 2001, without his third
    vector).

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
        factors: what convolutions round their factors to, see `norms.Arithmetic`.
        ascend: see above; needs two iterations at least to make a difference.
        looks_for_underflow: see `norms.Arithmetic`.

    Raises:
        TypeError, ValueError: for iterations that are no whole number of at least 1.
    """

    local_ball = False

    def __init__(
        self,
        iterations: int,
        local_vectors: Mapping[Position, Tensor] | None = None,
        global_vectors: Mapping[Position, Tensor] | None = None,
        seed: int = 0,
        local_positions: Collection[Position] | None = None,
        skip_idle_masks: bool = False,
        factors: torch.dtype | None = None,
        ascend: bool = False,
        looks_for_underflow: bool = True,
    ):
        refuse_whole_number("the number of power iterations", iterations, 1)
        self.iterations = iterations
        self.local_positions = local_positions
        self.skip_idle_masks = skip_idle_masks
        self._improve = _ascent if ascend else _power
        self.arithmetic = Arithmetic(factors=factors, looks_for_underflow=looks_for_underflow)
        self.local_vectors = dict(local_vectors or {})
        self.global_vectors = dict(global_vectors or {})
        self._generator = torch.Generator().manual_seed(seed)

    def whole(self, operator: LinearOperator) -> Bracket:
        """||W||, a scalar that carries the gradient with respect to the weight."""
        start = self.global_vectors.get(operator.position)
        if start is None:
            start = self._random(1, operator)
        norm, self.global_vectors[operator.position] = self._iterate(operator, start, None, None)
        return Bracket(norm[0], norm[0])

    def absolute(self, operator: LinearOperator) -> Tensor:
        """|| |W| ||, which nobody asks an estimate for: it takes arithmetic as exact."""
        raise TypeError("power iteration gives estimates, which allow for no rounding")

    def masked(self, operator: LinearOperator, rows: Tensor | None, columns: Tensor | None, whole: Bracket) -> Bracket:
        """||D_rows W D_columns|| for every image: (N,). Where no use is made of masks, `whole`.

        rows: (N, *output_shape), columns: (N, *input_shape) booleans; None switches nothing off.
        """
        norm = self._masked(operator, rows, columns, whole.upper)
        return Bracket(norm, norm)

    def _masked(self, operator: LinearOperator, rows: Tensor | None, columns: Tensor | None, whole: Tensor) -> Tensor:
        position = operator.position
        if self.local_positions is not None and position not in self.local_positions:
            return whole
        start = self.local_vectors.get(position)
        mask = rows if columns is None else columns
        if mask is None and (start is None or self.skip_idle_masks):
            return whole
        count = len(start if mask is None else mask)
        if start is None or len(start) != count:
            start = self._fresh(count, operator)
        images = eliminating(rows, columns).nonzero().squeeze(1) if self.skip_idle_masks else range(count)
        if len(images) == count:
            norm, self.local_vectors[position] = self._iterate(operator, start, rows, columns)
            return norm
        whole, self.local_vectors[position] = whole.expand(count), start
        if not len(images):
            return whole
        rows, columns = (None if mask is None else mask[images] for mask in (rows, columns))
        norm, vectors = self._iterate(operator, start[images], rows, columns)
        self.local_vectors[position] = start.index_copy(0, images, vectors)
        return whole.index_copy(0, images, norm)

    def _random(self, count: int, operator: LinearOperator) -> Tensor:
        shape = min(operator.input_shape, operator.output_shape, key=torch.Size.numel)
        weight = operator.weight
        start = torch.randn(count, *shape, generator=self._generator, dtype=weight.dtype, device="cpu")
        return unit(start.to(weight.device))[0]

    def _fresh(self, count: int, operator: LinearOperator) -> Tensor:
        # A mask that eliminates little moves the leading vector little; the random part reaches what is left
        # when the mask eliminates the whole of it.
        start = self._random(count, operator)
        known = self.global_vectors.get(operator.position)
        if known is None or known.shape[1:] != start.shape[1:]:
            return start
        return unit(known + 0.1 * start)[0]

    def _iterate(
        self, operator: LinearOperator, start: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One norm per start vector and the vectors after the run, on the side of the start vectors."""
        # What a product rounds to anyway is kept in that, which saves passes over memory; an ascent's sums need more.
        ascends, given = self._improve is _ascent, start.dtype
        dtype = given if operator.factors is None or ascends else operator.factors
        products, dtype = dtype, torch.promote_types(dtype, torch.float32) if ascends else dtype
        start = start.to(dtype)
        rows, columns = (None if mask is None else mask.to(dtype) for mask in (rows, columns))
        scaled = operator.scaled

        def forward(u: Tensor) -> Tensor:
            return _switch_off(scaled.apply(u.to(products)).to(dtype), rows)

        def backward(v: Tensor) -> Tensor:  # still to be switched off by the columns
            return scaled.adjoint(v.to(products)).to(dtype)

        with torch.no_grad():
            on_input = start.shape[1:] == operator.input_shape
            u = _begin(start, columns) if on_input else unit(backward(_begin(start, rows)), columns)[0]
            v = forward(u)
            for _ in range(self.iterations - 1):
                u, v = self._improve(u, v, forward, backward, columns)
            if on_input:
                u, length = unit(backward(v), columns)
                shrink = reciprocal(length_before := lengths(v))
                norm = torch.where(length_before == 0, 0, length / length_before)
                kept = _kept(u, start)
            else:
                v, norm = unit(v)
                shrink = torch.ones_like(norm)
                kept = _kept(v, start)
            scale = operator.scale
            product = infinite_to_nan((norm * scale).to(scale.dtype))
            norm = underflow_to_nan(product, norm) if self.arithmetic.looks_for_underflow else product
        vectors = (vector.to(products) for vector in (u, v, shrink))
        return _SingularValue.apply(operator.weight, operator, *vectors, norm), kept.to(given)


def _power(u: Tensor, v: Tensor, forward: Product, backward: Product, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next vector of power iteration, and its image. v: the image of u."""
    u, _ = unit(backward(v), columns)
    return u, forward(u)


def _ascent(u: Tensor, v: Tensor, forward: Product, backward: Product, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The unit vector of the longest image in the plane of u and W^T v, and that image. v: the image of u."""
    gradient, size = _switch_off(backward(v), columns), lengths(u).to(u.dtype)
    along = torch.where(size == 0, 0, _dot(gradient, u) / size**2)
    uphill = gradient - per_image(along, u) * u
    length = lengths(uphill).to(u.dtype)
    # What is left of a shorter one is rounding, and not orthogonal to u.
    converged = length <= torch.finfo(u.dtype).eps ** 0.5 * along * size
    uphill = uphill * per_image(torch.where(converged, 0, size * reciprocal(length)), u)
    image = forward(uphill)
    angle = 0.5 * torch.atan2(2 * _dot(v, image), _dot(v, v) - _dot(image, image))
    stay, turn = angle.cos(), angle.sin()
    u, length = unit(per_image(stay, u) * u + per_image(turn, u) * uphill)
    v = per_image(stay, v) * v + per_image(turn, v) * image
    return u, v * per_image(reciprocal(length).to(v.dtype), v)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(entries(x))


class _SingularValue(torch.autograd.Function):
    """sigma = shrink * v . (W u) for every image, known already, as a function of W; the rest is held fixed."""

    @staticmethod
    def forward(ctx, weight, operator, u, v, shrink, sigma):  # noqa: ANN001, ANN205
        ctx.operator = operator
        ctx.save_for_backward(u, v, shrink)
        return sigma

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        u, v, shrink = ctx.saved_tensors
        if u[0].numel() < v[0].numel():
            u = u * per_image(grad * shrink, u)
        else:
            v = v * per_image(grad * shrink, v)
        return ctx.operator.weight_gradient(u, v), *[None] * 5


def _switch_off(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.mul_(mask)


def _begin(start: Tensor, mask: Tensor | None) -> Tensor:
    """The start vector where the mask is on; the mask itself where that leaves nothing of it."""
    return start if mask is None else _kept(start * mask, mask)


def _kept(vector: Tensor, start: Tensor) -> Tensor:
    """`vector`, or `start` where it is zero: a norm would stay zero after the layer has come back to life."""
    dead = torch.linalg.vector_norm(vector, dim=entries(vector)) == 0
    return torch.addcmul(vector, start, per_image(dead.to(start.dtype), start))
