"""Brackets that hold spectral norms: what a certificate needs where power iteration gives estimates from below.

Everything here is float64, whatever the defaults of the process are.

* Whole norms: a dense layer's, and a small operator's, by singular values; another's by the smaller of a bound without
  chance (its `norm_bound`, for a convolution `torus.torus_norm`) and a long Lanczos run.
* Masked norms: by Lanczos (`lanczos`) from a start vector drawn after the mask is known, in so many steps, or fewer
  where these already show that the whole norm is as good; those of a dense layer by singular values where these cost
  little more.

Lanczos approaches a norm from below; the factor by which it can have fallen short is solved for at the probability that
one norm of the run is allowed, and multiplied in.
"""

from __future__ import annotations

import copy
import secrets

import numpy as np
import torch
from torch import Tensor

from locallip.bound.budget import Budget
from locallip.bound.kept_norms import KeptNorms, Measured, key_of, scalar
from locallip.bound.lanczos import inflation, largest_ritz_value
from locallip.bound.norms import Arithmetic, Bracket
from locallip.bound.operators import Dense, LinearOperator, Position
from locallip.bound.rounding import FLOAT32, FLOAT64
from locallip.bound.tensors import eliminating
from locallip.bound.whole_norm import Whole

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
# An operator of a smaller side up to this is taken as a matrix: 0.07 instead of 0.3 seconds (one thread of an EPYC,
# Zen 4). Its Gram matrix, of sums of n terms, can take side n u / 2 from the norm, and 100 steps allow for 1000 n u.
_SMALL_SIDE = 512
# Bytes of Lanczos vectors at a time.
_MEMORY = 2**29


class ProvenNorms:
    """Brackets of norms that all hold together, but for a chosen probability.

    Args:
        failure_probability, planned: see `Budget`.
        steps: Lanczos steps per masked norm; 0 answers every masked norm with the whole one, at no cost.
        whole_steps: the same for whole norms, one per layer.
        seed: of the pseudo-random generator (PCG64) of the start vectors; None takes 128 bits from the operating
            system. Whoever knows it could make a network that the bound fails for, so a seed given is for repeating
            a run.
        deployed: what the certificates are to hold for: `exact`, the function that the weights define in exact
            arithmetic, or `float32`, what the network computes in single precision.
        kept: whole norms of earlier calls, and of this one for later ones. They have start vectors of their own, which
            the seed does not repeat. None: nothing is kept.

    Attributes:
        seed: the seed in use.
        steps: see above.
    """

    local_ball = True

    def __init__(
        self,
        failure_probability: float,
        planned: int,
        steps: int = 100,
        whole_steps: int = 400,
        seed: int | None = None,
        deployed: str = "exact",
        kept: KeptNorms | None = None,
    ):
        if deployed not in DEPLOYED:
            raise ValueError(f"deployed must be one of {', '.join(DEPLOYED)}, got '{deployed}'")
        self.arithmetic = Arithmetic(own=FLOAT64, deployed=DEPLOYED[deployed])
        self.budget = Budget(failure_probability, planned)
        self.steps = steps
        self.seed = secrets.randbits(128) if seed is None else seed
        self._whole_steps, self._kept = whole_steps, kept
        self._known: dict[Position, Whole] = {}
        self._generator = np.random.default_rng(self.seed)

    def restart(self, place: int) -> None:
        """Draw from here on the start vectors of one part of a run, whatever was asked for before.

        place: of the part in the run; the start vectors depend on it and on the seed alone. A part that is done again,
        by the same questions, meets the same chance again, and takes no more of the failure probability.
        """
        self._generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(place,)))

    def with_steps(self, steps: int) -> ProvenNorms:
        """The same norms by so many Lanczos steps: budget, generator and whole norms are shared."""
        result = copy.copy(self)
        result.steps = steps
        return result

    @torch.no_grad()
    def whole(self, operator: LinearOperator) -> Bracket:
        """||W||, scalars; computed again only when the layer has changed."""
        return self._whole(operator).norm

    @torch.no_grad()
    def absolute(self, operator: LinearOperator) -> Tensor:
        """At least || |W| ||, a scalar."""
        return self._whole(operator).absolute

    @torch.no_grad()
    def masked(self, operator: LinearOperator, rows: Tensor | None, columns: Tensor | None, whole: Bracket) -> Bracket:
        """||D_rows W D_columns|| for every image: (N,), never above `whole`; without masks `whole` itself."""
        if (rows is None and columns is None) or whole.upper.isnan():
            return whole
        count = len(columns if rows is None else rows)
        lower, upper = whole.lower.repeat(count), whole.upper.repeat(count)
        # A mask that eliminates nothing leaves the layer as it is.
        rest = eliminating(rows, columns).nonzero().squeeze(1)
        if not len(rest):
            return Bracket(lower, upper)
        if self.steps == 0:
            return Bracket(lower.index_fill(0, rest, 0), upper)
        rows, columns = (None if mask is None else mask[rest] for mask in (rows, columns))
        # A subclass may apply its weight otherwise.
        directly = type(operator) is Dense and _STEPS_PER_SIDE * self.steps >= min(operator.weight.shape)
        found = (
            _masked_dense(operator.scaled, rows, columns)
            if directly
            else self._masked_by_lanczos(operator.scaled, rows, columns, whole.upper / operator.scale)
        )
        nothing_left = _is_empty(rows, len(rest), upper) | _is_empty(columns, len(rest), upper)
        lower[rest] = found.lower * operator.scale
        found_upper = torch.minimum(found.upper * operator.scale, whole.upper)
        upper[rest] = torch.where(nothing_left, 0, found_upper)
        return Bracket(lower, upper)

    def _whole(self, operator: LinearOperator) -> Whole:
        known = self._known.get(operator.position)
        if known is None or not known.is_of(operator):
            if operator.weight.dtype != torch.float64:
                raise ValueError(f"proven norms need a model in float64, but position {operator.position} is not")
            known = self._known[operator.position] = self._measure(operator)
        return known

    def _measure(self, operator: LinearOperator) -> Whole:
        """Bracket a whole norm; NaN where a weight is not finite."""
        share, scale = self.budget.for_whole(), operator.scale
        if not operator.weight.isfinite().all():
            nan = scale * torch.nan
            return Whole(operator, Bracket(nan, nan), nan)
        if not operator.weight.any():
            zero = scale * 0
            return Whole(operator, Bracket(zero, zero), zero)
        found = self._remembered(operator)
        lower, upper = found.bracket(share, scale)
        return Whole(operator, Bracket(lower * scale, upper * scale), scalar(found.absolute, scale) * scale)

    def _remembered(self, operator: LinearOperator) -> Measured:
        """What is known of an operator of finite weights, divided by its scale."""
        key = None if self._kept is None else key_of(operator, self._whole_steps)
        if key is None:
            return self._measured(operator.scaled, self._generator)
        known = self._kept.find(key)
        if known is None:
            known = self._measured(operator.scaled, self._kept.generator)
            self._kept.keep(key, known)
        return known

    def _measured(self, operator: LinearOperator, generator: np.random.Generator) -> Measured:
        """Bracket the norm of a scaled operator that is not 0: without chance where it is small, or by Lanczos."""
        entries = operator.absolute_operator()
        lower, sure = _bracket(operator.norm_bound(), operator, _DIRECT_STEPS)
        absolute = sure_bound(entries)
        if operator.norm_bound_is_exact:
            return Measured(lower.item(), sure.item(), sure.item(), absolute.item())
        if min(operator.input_shape.numel(), operator.output_shape.numel()) <= _SMALL_SIDE:
            lower, upper = _bracket(_as_matrix_norm(operator), operator, _DIRECT_STEPS)
            sure = torch.minimum(upper, sure)
            return Measured(lower.item(), sure.item(), sure.item(), absolute.item())
        steps = self._whole_steps
        lower, upper = self._krylov(operator, None, None, 1, steps, generator)
        (dimension,) = _dimensions(operator, None, None, 1)
        return Measured(lower.item(), upper.item(), sure.item(), absolute.item(), int(dimension), steps)

    def _masked_by_lanczos(
        self, operator: LinearOperator, rows: Tensor | None, columns: Tensor | None, whole: Tensor
    ) -> Bracket:
        """Brackets (N,), none of them above `whole`, a scalar that is at least the whole norm."""
        count = len(columns if rows is None else rows)
        share = self.budget.for_masked(count)
        dimension = min(operator.input_shape.numel(), operator.output_shape.numel())
        at_a_time = max(1, _MEMORY // (8 * dimension * (self.steps + 1)))
        brackets = []
        for images in torch.arange(count, device="cpu").split(at_a_time):
            masks = [None if mask is None else mask[images.to(mask.device)] for mask in (rows, columns)]
            brackets.append(self._lanczos(operator, *masks, len(images), share, whole))
        return Bracket(*(torch.cat(ends) for ends in zip(*brackets)))

    def _lanczos(
        self,
        operator: LinearOperator,
        rows: Tensor | None,
        columns: Tensor | None,
        count: int,
        probability: float,
        whole: Tensor,
    ) -> Bracket:
        """Brackets (count,) of ||D_rows W D_columns||; each upper end fails with at most this probability.

        whole: at least ||W||, a scalar.
        """
        factor = inflation(_dimensions(operator, rows, columns, count), self.steps, probability).to(whole.device)
        found = self._krylov(operator, rows, columns, count, self.steps, self._generator, whole / factor)
        # What was left off early is above the whole norm here already, as it would be after all its steps.
        upper = torch.where(factor.isinf(), factor, found.upper * factor)
        return Bracket(found.lower, torch.minimum(upper, whole))

    def _krylov(
        self,
        operator: LinearOperator,
        rows: Tensor | None,
        columns: Tensor | None,
        count: int,
        steps: int,
        generator: np.random.Generator,
        enough: Tensor | None = None,
    ) -> Bracket:
        """What Lanczos reaches of ||D_rows W D_columns||, rounded down and up, (count,) each.

        enough: (count,) norms from which on it may be left off; None: it never is.
        """
        on_input_side = _is_on_input_side(operator)
        shape, mask = (operator.input_shape, columns) if on_input_side else (operator.output_shape, rows)
        rows, columns = (None if m is None else m.double() for m in (rows, columns))

        def gram(v: Tensor, places: Tensor) -> Tensor:
            """M^T M v on the input side or M M^T v on the output side, flattened."""
            v = v.view(len(places), *shape)
            own_rows, own_columns = (m if m is None or len(places) == count else m[places] for m in (rows, columns))
            if on_input_side:
                image = _times(operator.adjoint(_times(operator.apply(v), own_rows)), own_columns)
            else:
                image = _times(operator.apply(_times(operator.adjoint(v), own_columns)), own_rows)
            return image.flatten(1)

        def draw() -> Tensor:
            return _times(_normal(generator, (count, *shape), operator.weight.device), mask).flatten(1)

        largest = largest_ritz_value(gram, draw, steps, None if enough is None else enough.square())
        return _bracket(largest.clamp(min=0).sqrt(), operator, steps)


def _is_on_input_side(operator: LinearOperator) -> bool:
    """Whether the Gram matrix of the inputs is the smaller one."""
    return operator.input_shape.numel() <= operator.output_shape.numel()


def _dimensions(operator: LinearOperator, rows: Tensor | None, columns: Tensor | None, count: int) -> Tensor:
    """Of the spaces that Lanczos works in: (count,) on the CPU."""
    shape, mask = (operator.input_shape, columns) if _is_on_input_side(operator) else (operator.output_shape, rows)
    if mask is None:
        return torch.full((count,), float(shape.numel()), dtype=torch.float64, device="cpu")
    return mask.flatten(1).sum(dim=1).double().cpu()


def _normal(generator: np.random.Generator, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape)).to(device)


def _as_matrix_norm(operator: LinearOperator) -> Tensor:
    """Norm of an operator from its matrix, a scalar: the smaller side of it decides what that costs."""
    on_input_side = _is_on_input_side(operator)
    shape = operator.input_shape if on_input_side else operator.output_shape
    weight = operator.weight
    basis = torch.eye(shape.numel(), dtype=weight.dtype, device=weight.device).view(-1, *shape)
    matrix = (operator.apply if on_input_side else operator.adjoint)(basis).flatten(1)  # or its transpose
    return torch.linalg.eigvalsh(matrix @ matrix.T)[-1].clamp(min=0).sqrt()


def sure_bound(operator: LinearOperator) -> Tensor:
    """Upper bound on the norm of a scaled operator, a scalar, without chance; rounding is allowed for."""
    return _bracket(operator.norm_bound(), operator, _DIRECT_STEPS).upper


def _bracket(norm: Tensor, operator: LinearOperator, steps: int) -> Bracket:
    """Around a computed norm of a scaled operator, what rounding and underflow can have changed."""
    terms = max(*operator.terms, operator.input_shape.numel(), operator.output_shape.numel())
    margin = _ROUNDING_PER_STEP_AND_TERM * steps * terms
    besides = _UNDERFLOW + margin * operator.size_of_parts
    return Bracket((norm * (1 - margin) - margin * operator.size_of_parts).clamp(min=0), norm * (1 + margin) + besides)


def _times(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _is_empty(mask: Tensor | None, count: int, like: Tensor) -> Tensor:
    """(N,) bool: the mask switches everything off."""
    return like.new_zeros(count, dtype=torch.bool) if mask is None else ~mask.flatten(1).any(dim=1)


def _masked_dense(operator: Dense, rows: Tensor | None, columns: Tensor | None) -> Bracket:
    """Brackets of the norms of what is left of a matrix, image by image, since every image leaves another size."""
    norms = []
    for image in range(len(columns if rows is None else rows)):
        left = operator.weight
        left = left if rows is None else left[rows[image]]
        left = left if columns is None else left[:, columns[image]]
        small = left @ left.T if len(left) <= left.shape[1] else left.T @ left
        norms.append(torch.linalg.eigvalsh(small)[-1].clamp(min=0).sqrt() if small.numel() else small.new_zeros(()))
    return _bracket(torch.stack(norms), operator, _DIRECT_STEPS)
