"""Checks of an operator and of a rule, for those who write their own: what a bound relies on, tried at random.

They can show that something is wrong, not that all is right. All numbers are drawn from a generator of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation
from locallip.bound.checks import refuse_mask
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import LinearOperator
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.region import Region
from locallip.bound.rules import Place, Reshape, describe, meaning_of
from locallip.bound.walk import propagate

_IMAGES, _SAMPLES = 4, 64
# Entries of a matrix up to which an operator is written out as one.
_DENSE = 2**22


def check_operator(operator: LinearOperator) -> None:
    """Try whether an operator keeps what `LinearOperator` promises.

    Shapes, `adjoint` against `apply`, `affine`, `absolute`, `row_norms`, `terms`, `norm_bound` and `weight_gradient`,
    and that no product changes its input. A small operator is compared with its matrix.

    operator: with a weight in float64.

    Raises:
        ValueError: for a weight in another precision.
        AssertionError: names the first promise that is broken.
    """
    if operator.weight.dtype != torch.float64:
        raise ValueError("make the operator of a layer in float64: what rounding hides cannot be checked")
    with torch.no_grad():
        _OperatorCheck(operator).run()


def check_rule(layer: nn.Module, shape: Sequence[int]) -> None:
    """Try whether the rule of a layer says what the layer computes.

    What an operator is promised to be (see `check_operator`), or an activation: its range over a box, which outputs can
    vary in it, and how steep it is there. Then points of a ball around random images against ball and box behind the
    layer, and training mode: either the rule refuses it, or the layer computes the same there. The layer itself is left
    as it is.

    shape: of one image's activations before the layer, without the batch, such as (C, H, W).

    Raises:
        TypeError: if there is no rule for exactly this type.
        AssertionError: names the layer and the first thing that is wrong.
    """
    layer = copy.deepcopy(layer).double().eval().requires_grad_(False)
    check = _RuleCheck(layer, torch.Size(shape))
    with torch.no_grad():
        check.meaning_computes_what_the_layer_computes()
        check.training_mode()
    check.ball_and_box()


def _require(holds: Tensor | bool, what: str) -> None:
    if not bool(torch.as_tensor(holds).all()):
        raise AssertionError(what)


def _close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-9, atol=1e-9 * float(1 + y.abs().max()))


class _Random:
    """Numbers that are the same every time."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64)


class _OperatorCheck:
    def __init__(self, operator: LinearOperator):
        self.operator, self.name = operator, f"{type(operator).__name__} at position {operator.position}"
        random = _Random()
        self.random = random
        self.x, self.other = random.normal(2, _IMAGES, *operator.input_shape)
        self.y = random.normal(_IMAGES, *operator.output_shape)

    def run(self) -> None:
        self.shapes()
        self.inputs_stay_as_they_are()
        self.linear()
        self.sizes()
        self.weight_gradient()
        inputs, outputs = self.operator.input_shape.numel(), self.operator.output_shape.numel()
        if inputs * outputs <= _DENSE:
            self.matrix()

    def require(self, holds: Tensor | bool, what: str) -> None:
        _require(holds, f"{self.name}: {what}")

    def shapes(self) -> None:
        operator = self.operator
        for name in ("apply", "affine", "absolute"):
            shape = getattr(operator, name)(self.x).shape
            self.require(shape == self.y.shape, f"`{name}` gives {tuple(shape)}, not {tuple(self.y.shape)}")
        shape = operator.adjoint(self.y).shape
        self.require(shape == self.x.shape, f"`adjoint` gives {tuple(shape)}, not {tuple(self.x.shape)}")

    def inputs_stay_as_they_are(self) -> None:
        for name, given in (("apply", self.x), ("affine", self.x), ("absolute", self.x), ("adjoint", self.y)):
            before = given.clone()
            getattr(self.operator, name)(given)
            self.require(torch.equal(before, given), f"`{name}` changes its input")

    def linear(self) -> None:
        operator, x, other, y = self.operator, self.x, self.other, self.y
        image = operator.apply(x)
        self.require(_close(operator.apply(2 * x - other), 2 * image - operator.apply(other)), "`apply` is not linear")
        products = [(a * b).flatten(1).sum(dim=1) for a, b in ((image, y), (x, operator.adjoint(y)))]
        self.require(_close(*products), "`adjoint` is not the transpose of `apply`")
        constant = operator.affine(x) - image
        self.require(_close(constant, constant[:1].expand_as(constant)), "`affine` less `apply` depends on x")
        self.require(_close(constant, operator.affine(torch.zeros_like(x))), "`affine` is not `apply` plus a bias")
        self.require(_close(operator.scaled.apply(x) * operator.scale, image), "`with_weight` does not scale `apply`")

    def sizes(self) -> None:
        operator, x = self.operator, self.x
        self.require(operator.absolute(x.abs()) >= operator.apply(x).abs() * (1 - 1e-9), "`absolute` is below |W x|")
        entries = operator.absolute_operator()
        self.require(_close(entries.apply(x), operator.absolute(x)), "`absolute_operator` does not apply `absolute`")
        bound, gain = float(operator.norm_bound()), self.gain()
        self.require(gain <= bound * (1 + 1e-9), f"`norm_bound` is {bound:.6g}, but a vector grows by {gain:.6g}")

    def gain(self) -> float:
        """By how much vectors grow that power iteration finds."""
        u = self.x
        for _ in range(50):
            u = u / u.flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, *[1] * (u.dim() - 1))
            image = self.operator.apply(u)
            u = self.operator.adjoint(image)
        return float(image.flatten(1).norm(dim=1).max())

    def weight_gradient(self) -> None:
        operator = self.operator
        found = operator.weight_gradient(self.x, self.y)
        shape = operator.weight.shape
        self.require(found.shape == shape, f"`weight_gradient` gives {tuple(found.shape)}, not {tuple(shape)}")
        step = self.random.normal(*shape)
        # The product is linear in the weight, so that a step of any length will do.
        ends = [operator.with_weight(operator.weight + sign * step).apply(self.x) for sign in (1, -1)]
        seen = ((ends[0] - ends[1]) * self.y).sum() / 2
        self.require(_close((found * step).sum(), seen), "`weight_gradient` is not the gradient of y . (W x)")

    def matrix(self) -> None:
        operator = self.operator
        size = operator.input_shape.numel()
        basis = torch.eye(size, dtype=torch.float64).view(size, *operator.input_shape)
        matrix = operator.apply(basis).flatten(1).T  # (outputs, inputs)
        self.require(
            _close(operator.absolute(basis).flatten(1).T, matrix.abs()), "`absolute` is not |W| entry by entry"
        )
        norms = matrix.norm(dim=1).view(1, *operator.output_shape)
        self.require(operator.row_norms() >= norms * (1 - 1e-9), "`row_norms` are below those of the rows")
        for dim, terms, name in ((1, operator.terms[0], "row"), (0, operator.terms[1], "column")):
            most = int((matrix != 0).sum(dim=dim).max())
            self.require(most <= terms, f"`terms` says {terms} for a {name}, but there are {most}")
        self.masked(matrix)

    def masked(self, matrix: Tensor) -> None:
        """Norms of what masks leave, as a proof takes them, against those of the matrix."""
        operator = self.operator
        rows, columns = (self.random.uniform(1, *s) < 0.7 for s in (operator.output_shape, operator.input_shape))
        norms = ProvenNorms(1e-6, planned=1, seed=0)
        found = norms.masked(operator, rows, columns, norms.whole(operator)).upper.item()
        left = torch.linalg.matrix_norm(matrix * rows.view(-1, 1) * columns.view(1, -1), ord=2).item()
        self.require(found >= left * (1 - 1e-9), f"a masked norm is {left:.6g}, and a proof takes it for {found:.6g}")


class _RuleCheck:
    def __init__(self, layer: nn.Module, shape: torch.Size):
        self.layer, self.shape, self.random = layer, shape, _Random()
        self.place = Place(0, shape, torch.zeros((), dtype=torch.float64), Arithmetic())
        self.meaning = meaning_of(layer, self.place)
        self.x = self.random.normal(_IMAGES, *shape)

    def require(self, holds: Tensor | bool, what: str) -> None:
        _require(holds, f"{describe(0, self.layer)}: {what}")

    def meaning_computes_what_the_layer_computes(self) -> None:
        before, expected = self.x.clone(), self.layer(self.x.clone())
        if isinstance(self.meaning, LinearOperator):
            check_operator(self.meaning)
            found, shape = self.meaning.affine(self.x), self.meaning.output_shape
        elif isinstance(self.meaning, Activation):
            self.activation(self.meaning)
            found, shape = self.meaning(self.x), self.meaning.shape_behind(self.shape)
        else:
            found, shape = self.reshaped(self.meaning), expected.shape[1:]
        self.require(torch.equal(before, self.x), "the rule's function changes its input")
        self.require(shape == expected.shape[1:], f"the rule says that it makes {tuple(shape)} of an image")
        self.require(_close(found, expected), "the rule's function computes something else than the layer")

    def reshaped(self, meaning: Reshape) -> Tensor:
        found = meaning.function(self.x.clone())
        self.require(torch.equal(found.flatten(1), self.x.flatten(1)), "a `Reshape` keeps entries and their order")
        return found

    # --- activations

    def activation(self, activation: Activation) -> None:
        for width in (1e-3, 0.3, 3.0):
            half = width * self.random.uniform(*self.x.shape)
            middle = self.x + half * (2 * self.random.uniform(*self.x.shape) - 1)
            self.over_a_box(activation, Region(self.x, middle - half, middle + half))
        nan = torch.full_like(self.x, torch.nan)
        self.require(activation.varying(nan, nan), "where the box is NaN, every output must count as varying")

    def over_a_box(self, activation: Activation, region: Region) -> None:
        share = self.random.uniform(_SAMPLES, *region.lower.shape)
        share[::2] = share[::2].round()
        points = region.lower + share * (region.upper - region.lower)  # (S, N, ...) inside, and corners
        outputs = _each(activation, points)
        behind, varying = activation.behind(region, fuse=False)
        refuse_mask(varying, behind.center, describe(0, self.layer))
        inside = (behind.lower - 1e-12 <= outputs) & (outputs <= behind.upper + 1e-12)
        self.require(inside, "an output leaves the box that the rule puts behind the layer")
        constant = (outputs == outputs[0]).all(dim=0)
        self.require(constant | varying, "an output changes that the rule says cannot vary")
        steepness, most = activation.steepness(region), activation.lipschitz * (1 + 1e-9)
        self.require(torch.as_tensor(steepness) <= most, "the rule's constant in a box is above that everywhere")
        # Two points of the box: at random, and apart in one entry alone.
        entry = torch.randint(points[0, 0].numel(), (_SAMPLES,), generator=self.random._generator)
        alone = points.flatten(2).clone()
        others = points.roll(1, 0).flatten(2)
        alone[range(_SAMPLES), :, entry] = others[range(_SAMPLES), :, entry]
        for there in (points.roll(1, 0), alone.view_as(points)):
            rise = (_each(activation, there) - outputs).flatten(2).norm(dim=2)
            run = (there - points).flatten(2).norm(dim=2)
            within = rise <= run * steepness * (1 + 1e-9) + 1e-12
            self.require(within, "two points of a box move apart by more than the rule's Lipschitz constant")

    # --- as a part of a network

    def ball_and_box(self, epsilon: float = 0.3) -> None:
        features = self.layer(self.x).flatten(1).shape[1]
        model = nn.Sequential(self.layer, nn.Flatten(), nn.Linear(features, 2)).double().eval()
        with torch.no_grad():
            bound = propagate(model, self.x, epsilon, PowerIteration(500))
            step = self.random.normal(_SAMPLES, *self.x.shape)
            step = epsilon * step / step.flatten(2).norm(dim=2).view(_SAMPLES, -1, *[1] * len(self.shape))
            hidden = _each(model[:-1], self.x + step)
        self.require(
            (bound.lower - 1e-9 <= hidden) & (hidden <= bound.upper + 1e-9),
            "a point of a ball leaves the box behind it",
        )
        distance = (hidden - bound.center).norm(dim=2)
        self.require(distance <= bound.radius * (1 + 1e-3) + 1e-9, "a point of a ball leaves the ball behind it")

    def training_mode(self) -> None:
        expected = self.layer(self.x.clone())
        training = copy.deepcopy(self.layer).train()
        try:
            meaning_of(training, self.place)
        except ValueError:
            return
        same = _close(training(self.x.clone()), expected)
        self.require(same, "it computes otherwise in training mode, which the rule has to refuse with a ValueError")


def _each(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """What a function of (N, ...) makes of points (S, N, ...)."""
    return function(points.flatten(0, 1)).unflatten(0, points.shape[:2])
