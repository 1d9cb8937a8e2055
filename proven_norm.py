"""Upper bounds on spectral norms: what a certificate needs where power iteration gives estimates from below.

Everything here is float64. `ProvenNorms` answers the two questions of the walk in `local_bound`:

* whole norms: a dense layer's by singular values; a convolution's by the smaller of a deterministic bound (the largest
  singular value over the frequencies of a torus that the zero-padded convolution is a part of) and a long Lanczos run;
* masked norms: by Lanczos with a fixed number of steps from a start vector drawn after the mask is known; those of a
  dense layer by singular values where these cost little more. Lanczos approaches the norm from below, too, but
  Kuczyński and Woźniakowski (SIAM J. Matrix Anal. Appl. 13, 1992) bound the probability that it is below by more than a
  given factor: P[estimate of ||M||^2 <= (1 - t) ||M||^2] <= 1.648 sqrt(n) exp(-sqrt(t) (2k - 1)) after k steps in n
  dimensions. The factor is solved for at the probability that one norm of the run is allowed, and multiplied in.
"""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rounding import FLOAT32, FLOAT64
from spectral_norm import Conv, Dense, LinearOperator, eliminating

# What a norm is rounded up by, relatively, per step and per term of the longest sum. Lanczos loses its theory when its
# basis loses orthogonality, so every vector is orthogonalised against all before it, twice, which keeps the basis
# orthonormal to a small multiple of u = 2^-53 (Giraud, Langou, Rozloznik, van den Eshof, Numer. Math. 101, 2005). What
# it computes is then exact for a matrix A + E with ||E|| of the order k n u ||A||, after k steps with sums of n terms;
# ten times that is allowed for. Dense norms and Fourier transforms are as backward stable, and count as 100 steps.
_ROUNDING_PER_STEP_AND_TERM = 10 * FLOAT64
_DIRECT_STEPS = 100
# Singular values of a matrix, which are exact, cost little more than Lanczos steps by an eighth of its smaller side.
_STEPS_PER_SIDE = 8
# Norms are taken of weights scaled to about 1; what underflows from there is below this.
_UNDERFLOW = 1e-60
# Unit roundoff of the network that the certificates are for.
DEPLOYED = {"exact": 0.0, "float32": FLOAT32}
# Whole norms that one object answers for.
_MOST_WHOLES = 1_000
# Bytes of Lanczos vectors at a time.
_MEMORY = 2**29


class ProvenNorms:
    """Upper bounds on norms that all hold together, but for a chosen probability.

    Args:
        failure_probability: that *any* norm of all that this object is asked for is too small.
        planned: how many masked norms it will be asked for at most, one per image and layer and call; more are
            refused, since each gets an equal share of the probability.
        steps: Lanczos steps per masked norm; 0 answers every masked norm with the whole one, at no cost.
            May be changed between calls.
        whole_steps: the same for whole norms, one per layer.
        seed: of the pseudo-random generator (PCG64) of the start vectors; None takes 128 bits from the operating
            system. Whoever knows it could make a network that the bound fails for, so a seed given is for repeating
            a run.
        deployed: what the certificates are to hold for: `exact`, the function that the weights define in exact
            arithmetic, or `float32`, what the network computes in single precision.

    Attributes:
        seed: the seed in use.
        lower: after a call of `masked`, by position: (N,) what Lanczos found, below the norm.
    """

    local_ball = True
    factors = None

    def __init__(
        self,
        failure_probability: float,
        planned: int,
        steps: int = 100,
        whole_steps: int = 400,
        seed: int | None = None,
        deployed: str = "exact",
    ):
        if not 0 < failure_probability < 1:
            raise ValueError(f"the failure probability must lie between 0 and 1, got {failure_probability}")
        if deployed not in DEPLOYED:
            raise ValueError(f"deployed must be one of {', '.join(DEPLOYED)}, got '{deployed}'")
        self.roundoffs = (FLOAT64, DEPLOYED[deployed])
        self.failure_probability = failure_probability
        self.steps = steps
        self.seed = secrets.randbits(128) if seed is None else seed
        self.lower: dict[int | str, Tensor] = {}
        self._whole_steps = whole_steps
        self._left = planned
        # Half of the probability for the masked norms, half for the whole ones.
        self._per_masked = failure_probability / 2 / max(planned, 1)
        self._per_whole = failure_probability / 2 / _MOST_WHOLES
        self._wholes_left = _MOST_WHOLES
        self._whole: dict[int | str, _Whole] = {}
        self._generator = np.random.default_rng(self.seed)

    @torch.no_grad()
    def whole(self, operator: LinearOperator) -> Tensor:
        """At least ||W||, a scalar; computed again only when the layer has changed."""
        known = self._whole.get(operator.position)
        if known is None or not known.is_of(operator):
            if operator.weight.dtype != torch.float64:
                raise ValueError(f"proven norms need a model in float64, but position {operator.position} is not")
            known = self._measure(operator)
            self._whole[operator.position] = known
        return known.upper

    @torch.no_grad()
    def absolute(self, operator: LinearOperator) -> Tensor:
        """At least || |W| ||, a scalar; to be asked after `whole`."""
        return self._whole[operator.position].absolute

    @torch.no_grad()
    def masked(self, operator: LinearOperator, in_mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
        """At least ||D_out W D_in|| for every image: (N,), never above `whole`; without masks that scalar."""
        known = self._whole[operator.position]
        low, high = known.lower, known.upper
        self.lower[operator.position] = low
        if (in_mask is None and out_mask is None) or self.steps == 0 or high.isnan():
            return high
        count = len(out_mask if in_mask is None else in_mask)
        lower, upper = low.repeat(count), high.repeat(count)
        # A mask that eliminates nothing leaves the layer as it is.
        rest = eliminating(in_mask, out_mask).nonzero().squeeze(1)
        if len(rest):
            masks = [None if mask is None else mask[rest] for mask in (in_mask, out_mask)]
            directly = isinstance(operator, Dense) and _STEPS_PER_SIDE * self.steps >= min(operator.weight.shape)
            bracket = _masked_dense if directly else self._masked_by_lanczos
            found = bracket(known.scaled, *masks)
            nothing_left = _is_empty(masks[0], len(rest), high) | _is_empty(masks[1], len(rest), high)
            lower[rest] = found[0] * known.scale
            upper[rest] = torch.where(nothing_left, 0, torch.minimum(found[1] * known.scale, high))
        self.lower[operator.position] = lower
        return upper

    def _measure(self, operator: LinearOperator) -> _Whole:
        """Bracket a whole norm; NaN where a weight is not finite."""
        self._wholes_left -= 1
        if self._wholes_left < 0:
            raise RuntimeError("more layers than planned, so the failure probability would not hold")
        scaled, scale = _scaled(operator)
        if not operator.weight.isfinite().all():
            return _Whole(operator, scaled, scale, *[scale * torch.nan] * 3)
        if not operator.weight.any():
            return _Whole(operator, scaled, scale, *[scale * 0] * 3)
        entries = scaled.absolute_operator()
        if isinstance(scaled, Dense):
            lower, upper = _bracket(torch.linalg.matrix_norm(scaled.weight, ord=2), scaled, _DIRECT_STEPS)
            absolute = _bracket(torch.linalg.matrix_norm(entries.weight, ord=2), scaled, _DIRECT_STEPS)[1]
        else:
            (lower,), (upper,) = self._lanczos(scaled, None, None, 1, self._whole_steps, self._per_whole)
            upper = torch.minimum(upper, torus_bound(scaled))
            absolute = torus_bound(entries)
        return _Whole(operator, scaled, scale, lower * scale, upper * scale, absolute * scale)

    def _masked_by_lanczos(
        self, operator: LinearOperator, in_mask: Tensor | None, out_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        count = len(out_mask if in_mask is None else in_mask)
        self._left -= count
        if self._left < 0:
            raise RuntimeError("more norms were asked for than planned, so the failure probability would not hold")
        lower, upper = [], []
        dimension = min(operator.input_shape.numel(), operator.output_shape.numel())
        for images in torch.arange(count).split(max(1, _MEMORY // (8 * dimension * (self.steps + 1)))):
            masks = [None if mask is None else mask[images] for mask in (in_mask, out_mask)]
            bracket = self._lanczos(operator, *masks, len(images), self.steps, self._per_masked)
            lower.append(bracket[0])
            upper.append(bracket[1])
        return torch.cat(lower), torch.cat(upper)

    def _lanczos(
        self,
        operator: LinearOperator,
        in_mask: Tensor | None,
        out_mask: Tensor | None,
        count: int,
        steps: int,
        probability: float,
    ) -> tuple[Tensor, Tensor]:
        """Both ends (count,) of brackets of ||D_out W D_in||; each upper end fails with at most this probability."""
        on_input_side = operator.input_shape.numel() <= operator.output_shape.numel()
        shape, mask = (operator.input_shape, in_mask) if on_input_side else (operator.output_shape, out_mask)
        columns, rows = (None if m is None else m.double() for m in (in_mask, out_mask))

        def gram(v: Tensor) -> Tensor:
            """M^T M v on the input side or M M^T v on the output side, flattened."""
            v = v.view(count, *shape)
            if on_input_side:
                image = _times(operator.adjoint(_times(operator.apply(v), rows)), columns)
            else:
                image = _times(operator.apply(_times(operator.adjoint(v), columns)), rows)
            return image.flatten(1)

        def draw() -> Tensor:
            return _times(self._normal(count, shape, operator.weight.device), mask).flatten(1)

        dimension = torch.full((count,), float(shape.numel()))
        if mask is not None:
            dimension = mask.flatten(1).sum(dim=1).double().cpu()
        largest = _largest_ritz_value(gram, draw, steps)  # (count,)
        inflation = _inflation(dimension, steps, probability).to(largest.device)
        norm = largest.clamp(min=0).sqrt()
        lower, upper = _bracket(norm, operator, steps)
        return lower, torch.where(inflation.isinf(), inflation, upper * inflation)

    def _normal(self, count: int, shape: torch.Size, device: torch.device) -> Tensor:
        return torch.from_numpy(self._generator.standard_normal((count, *shape))).to(device)


@dataclass
class _Whole:
    """What is known of a whole operator: a bracket of ||W||, and a bound on || |W| ||.

    `scaled` is the operator divided by `scale`, a power of two, so that its largest weight is about 1.
    """

    operator: LinearOperator
    scaled: LinearOperator
    scale: Tensor
    lower: Tensor
    upper: Tensor
    absolute: Tensor

    def __post_init__(self) -> None:
        self._weight = self.operator.weight.detach().clone()

    def is_of(self, operator: LinearOperator) -> bool:
        """Whether this is the same operator still: another network's, or changed weights, must never be mistaken."""
        mine = self.operator
        same_place = (mine.input_shape, mine.output_shape) == (operator.input_shape, operator.output_shape)
        return same_place and mine.geometry() == operator.geometry() and torch.equal(self._weight, operator.weight)


def _scaled(operator: LinearOperator) -> tuple[LinearOperator, Tensor]:
    """The operator over a power of two that brings its largest weight to about 1, which is exact, and that power."""
    exponent = torch.frexp(operator.weight.abs().max()).exponent
    scale = torch.ldexp(operator.weight.new_ones(()), exponent)
    result = copy.copy(operator)
    result.weight = operator.weight / scale
    return result, scale


def _bracket(norm: Tensor, operator: LinearOperator, steps: int) -> tuple[Tensor, Tensor]:
    """Around a computed norm of a scaled operator, what rounding and underflow can have changed."""
    weight, vector = operator.weight, max(operator.input_shape.numel(), operator.output_shape.numel())
    terms = max(weight[0].numel(), len(weight) * weight[0, 0].numel(), vector)
    margin = _ROUNDING_PER_STEP_AND_TERM * steps * terms
    return norm * (1 - margin), norm * (1 + margin) + _UNDERFLOW


def _inflation(dimension: Tensor, steps: int, probability: float) -> Tensor:
    """Factor by which the estimate of a norm has to grow, (N,); infinite where so few steps prove nothing."""
    root = torch.log(1.648 * dimension.clamp(min=1).sqrt() / probability) / (2 * steps - 1)
    return torch.where(root < 1, (1 - root.clamp(max=1) ** 2).rsqrt(), torch.inf)


def _largest_ritz_value(gram: Callable[[Tensor], Tensor], draw: Callable[[], Tensor], steps: int) -> Tensor:
    """Lanczos with full re-orthogonalisation: the largest eigenvalue (N,) that `steps` products show.

    draw: gives random vectors (N, n). The first starts the iteration; further ones carry on where a space is exhausted,
    since what the start vector has no part in may have been lost to rounding.
    """
    vector, _ = _normalized(draw())
    count, size = vector.shape
    steps = min(steps, size)
    basis = vector.new_zeros(count, steps, size)
    diagonal, beside = vector.new_zeros(count, steps), vector.new_zeros(count, steps)
    for step in range(steps):
        basis[:, step] = vector
        image = gram(vector)
        diagonal[:, step] = (vector * image).sum(dim=1)
        vector, length = _normalized(_orthogonal(image, basis[:, : step + 1]))
        exhausted = length <= 1e-12 * diagonal.abs().amax(dim=1)
        beside[:, step] = torch.where(exhausted, 0, length)
        if exhausted.any():
            fresh, left = _normalized(_orthogonal(_normalized(draw())[0], basis[:, : step + 1]))
            # In a space with no direction left, what is left of a vector is rounding.
            fresh = torch.where((left > 1e-8)[:, None], fresh, 0)
            vector = torch.where(exhausted[:, None], fresh, vector)
    tridiagonal = diagonal.diag_embed() + beside[:, :-1].diag_embed(1) + beside[:, :-1].diag_embed(-1)
    return torch.linalg.eigvalsh(tridiagonal)[:, -1]


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """What is left of x beside an orthonormal basis, by Gram-Schmidt, twice. x: (N, n), basis: (N, k, n)."""
    for _ in range(2):
        x = x - torch.einsum("nk,nks->ns", torch.einsum("nks,ns->nk", basis, x), basis)
    return x


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.norm(dim=1)
    return x * torch.where(length > 0, 1 / length, 0)[:, None], length


def _times(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _is_empty(mask: Tensor | None, count: int, like: Tensor) -> Tensor:
    """(N,) bool: the mask switches everything off."""
    return like.new_zeros(count, dtype=torch.bool) if mask is None else ~mask.flatten(1).any(dim=1)


def _masked_dense(operator: Dense, in_mask: Tensor | None, out_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Brackets of the norms of what is left of a matrix, image by image, since every image leaves another size."""
    norms = []
    for image in range(len(out_mask if in_mask is None else in_mask)):
        left = operator.weight
        left = left if out_mask is None else left[out_mask[image]]
        left = left if in_mask is None else left[:, in_mask[image]]
        small = left @ left.T if len(left) <= left.shape[1] else left.T @ left
        norms.append(torch.linalg.eigvalsh(small)[-1].clamp(min=0).sqrt() if small.numel() else small.new_zeros(()))
    return _bracket(torch.stack(norms), operator, _DIRECT_STEPS)


def torus_bound(operator: Conv) -> Tensor:
    """Upper bound on the norm of a zero-padded convolution, a scalar, without chance.

    On a torus of side input + reach of the kernel or more, the convolution wraps around without touching itself, so the
    zero-padded one is a part of it: some of its rows and columns. Fourier transform makes the circular convolution
    block-diagonal, with one (C_out, C_in) block per frequency; a stride of s adds up the frequencies that it cannot
    tell apart, which makes the blocks (C_out, C_in s^2). The bound is the largest singular value of all blocks.
    """
    sides = [
        -(-(size + d * (k - 1)) // s) * s
        for size, k, d, s in zip(
            operator.input_shape[1:], operator.weight.shape[2:], operator.dilation, operator.stride
        )
    ]
    (height, width), (down, right) = sides, operator.stride
    kernel = operator.weight.new_zeros(*operator.weight.shape[:2], height, width)
    rows = torch.arange(operator.weight.shape[2], device=kernel.device) * operator.dilation[0]
    columns = torch.arange(operator.weight.shape[3], device=kernel.device) * operator.dilation[1]
    kernel[:, :, rows[:, None], columns] = operator.weight
    spectrum = torch.fft.fft2(kernel) / math.sqrt(down * right)
    outputs, inputs = len(kernel) // operator.groups, kernel.shape[1]
    blocks = spectrum.view(operator.groups, outputs, inputs, down, height // down, right, width // right)
    blocks = blocks.permute(4, 6, 0, 1, 2, 3, 5).flatten(4)  # (frequency, frequency, group, C_out, C_in s^2)
    gram = blocks @ blocks.mH if outputs <= blocks.shape[4] else blocks.mH @ blocks
    return _bracket(torch.linalg.eigvalsh(gram)[..., -1].amax().clamp(min=0).sqrt(), operator, _DIRECT_STEPS)[1]
