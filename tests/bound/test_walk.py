import functools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from local_bound import Bound, bcp_loss, gloro_logits, gloro_loss, propagate, worst_logits, worst_margin
from locallip.bound.layers import ClampGroupSort, Normalize, ReLU_x
from locallip.bound.power_iteration import PowerIteration

KINDS = ("relux", "relu", "maxmin", "mixture", "normalized")
EPSILONS = (0.05, 0.4, 2.0)
IMAGES = 4
SAMPLES = 64
CLASSES = 5
ACTIVATION_TYPES = (nn.ReLU, ReLU_x, ClampGroupSort)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def clipped_relu(*shape):
    layer = ReLU_x(shape)
    nn.init.uniform_(layer.threshold, 0, 0.5)
    return layer


def clipped_maxmin(*shape):
    layer = ClampGroupSort(shape, maxthres=0, minthres=0)
    nn.init.uniform_(layer.max, 0, 0.4)
    nn.init.uniform_(layer.min, -0.4, 0)
    return layer


def relu(*shape):
    return nn.ReLU()


ACTIVATIONS = {
    "relux": [clipped_relu] * 3,
    "relu": [relu] * 3,
    "maxmin": [clipped_maxmin] * 3,
    "mixture": [clipped_relu, clipped_maxmin, relu],
}


def network(kind):
    if kind == "normalized":
        return normalized_network()
    first, second, third = ACTIVATIONS[kind]
    layers = [
        *(nn.Conv2d(1, 4, 3, 1, 1), first(4, 6, 6)),
        *(nn.Conv2d(4, 6, 4, 2, 1), second(6, 3, 3)),
        nn.Flatten(),
        *(nn.Linear(54, 12), third(12)),
        nn.Linear(12, CLASSES),
    ]
    return nn.Sequential(*layers).double()


def normalized_network():
    """With every linear layer that is not a plain convolution or matrix."""
    layers = [
        Normalize([0.3], [0.5]),
        *(nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()),
        nn.AvgPool2d(3, 2, 1),
        nn.Identity(),
        nn.Flatten(),
        *(nn.Linear(36, 12), nn.BatchNorm1d(12), clipped_relu(12)),
        nn.Linear(12, CLASSES),
    ]
    for layer in layers:
        if isinstance(layer, BATCH_NORMS):
            for tensor in (layer.running_mean, layer.bias.data):
                nn.init.uniform_(tensor, -0.2, 0.2)
            for tensor in (layer.running_var, layer.weight.data):
                nn.init.uniform_(tensor, 0.5, 2)
    return nn.Sequential(*layers).double().eval()


def dense_network(*middle):
    """Something between 6 inputs and 8 hidden units."""
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3)).double()


def images(*shape):
    return torch.rand(IMAGES, *shape, dtype=torch.float64)


def walk(model, x, epsilon):
    """The bound with norms that have converged."""
    return propagate(model, x, epsilon, PowerIteration(500))


class Case(NamedTuple):
    """A network, images, their labels, the bound around them, and points (S, N, ...) in the ball."""

    model: nn.Sequential
    x: torch.Tensor
    y: torch.Tensor
    epsilon: float
    bound: Bound
    points: torch.Tensor


@functools.cache
def make_case(kind, epsilon):
    torch.manual_seed(0)
    model, x = network(kind), images(1, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    return Case(model, x, y, epsilon, walk(model, x, epsilon), points_in_the_ball(model, x, epsilon))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=EPSILONS)
def case(kind, request):
    return make_case(kind, request.param)


@pytest.fixture
def model(kind, _seed):
    return network(kind)


def points_in_the_ball(model, x, epsilon):
    """(S, N, ...): random points inside and on the sphere, and the ends of gradient ascent towards every class."""
    directions = nn.functional.normalize(torch.randn(SAMPLES, *x.shape, dtype=x.dtype).flatten(2), dim=2)
    lengths = torch.rand(SAMPLES, 1, 1, dtype=x.dtype)
    lengths[::2] = 1
    inside = (epsilon * lengths * directions).view(SAMPLES, *x.shape)
    return x + torch.cat([inside, *(attack(model, x, epsilon, c, s) for c in range(CLASSES) for s in (1, -1))])


def attack(model, x, epsilon, target, sign, steps=8):
    """(steps, N, ...): the displacements on the way up (sign 1) or down (-1) the logit of a class."""
    path = [torch.zeros_like(x)]
    for _ in range(steps):
        step = path[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x + step)[:, target].sum(), step)
        moved = step.detach() + epsilon * sign * nn.functional.normalize(gradient.flatten(1), dim=1).view_as(x)
        length = moved.flatten(1).norm(dim=1).clamp(min=epsilon).view(-1, *[1] * (x.dim() - 1))
        path.append(moved * epsilon / length)
    return torch.stack(path[1:])


def outputs_of(model, points, layers):
    """What the first layers make of all points: (S, N, ...)."""
    with torch.no_grad():
        result = model[:layers](points.flatten(0, 1))
    return result.view(*points.shape[:2], *result.shape[1:])


# --- ball, box and masks ---------------------------------------------------------------------------------------------


def test_no_point_leaves_the_box(case):
    hidden = outputs_of(case.model, case.points, -1)
    assert (hidden <= case.bound.upper + 1e-9).all()
    assert (hidden >= case.bound.lower - 1e-9).all()


def test_no_point_leaves_the_ball(case):
    hidden = outputs_of(case.model, case.points, -1)
    distance = (hidden - case.bound.center).norm(dim=2)
    assert (distance <= case.bound.radius * (1 + 1e-6) + 1e-9).all()


def test_center_and_logits_are_those_of_the_network(case):
    torch.testing.assert_close(case.bound.center, case.model[:-1](case.x))
    torch.testing.assert_close(case.bound.logits, case.model(case.x))


def test_what_cannot_vary_is_constant(case):
    for position, varying in case.bound.varying.items():
        # Rows of a linear layer are dropped because of the activation behind it.
        activation = next(p for p in range(position, 99) if isinstance(case.model[p], ACTIVATION_TYPES))
        outputs = outputs_of(case.model, case.points, activation + 1)
        assert (outputs == outputs[0])[:, ~varying].all()


def test_small_balls_leave_less_to_vary_than_large_ones(kind):
    counts = [sum(v.sum() for v in make_case(kind, epsilon).bound.varying.values()) for epsilon in EPSILONS]
    assert 0 < counts[0] < counts[1] < counts[2]


def test_slopes_stay_below_the_local_bound_and_that_below_the_global_one(case):
    hidden = outputs_of(case.model, case.points, -1)
    run = (case.points - case.x).flatten(2).norm(dim=2)
    slopes = (hidden - case.bound.center).norm(dim=2) / run
    assert (slopes <= case.bound.hidden_lipschitz * (1 + 1e-6) + 1e-9).all()
    assert (case.bound.hidden_lipschitz <= case.bound.global_hidden_lipschitz * (1 + 1e-6)).all()
    torch.testing.assert_close(case.bound.radius, case.epsilon * case.bound.hidden_lipschitz)


def dense_matrix(layer, shape):
    size = shape.numel()
    basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
    return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T  # (outputs, inputs)


def test_local_norms_are_those_of_the_masked_matrices(case):
    bound, model = case.bound, case.model
    columns = torch.ones(IMAGES, 36)
    for position, layer in enumerate(model):
        if position in bound.local_norms:
            with_norm = isinstance(model[position + 1], BATCH_NORMS)  # part of the layer before
            matrix = dense_matrix(model[position : position + 1 + with_norm], model[:position](case.x).shape[1:])
            rows = bound.varying.get(position, torch.ones(IMAGES, len(matrix))).flatten(1)
            true = torch.linalg.matrix_norm(rows[:, :, None] * matrix * columns[:, None, :], ord=2)
            torch.testing.assert_close(bound.local_norms[position], true, rtol=1e-4, atol=0)
            columns = torch.ones(IMAGES, len(matrix))
        elif isinstance(layer, ACTIVATION_TYPES):
            columns = bound.varying[position].flatten(1)


def test_lipschitz_bounds_are_the_products_of_the_norms(case):
    bound = case.bound
    torch.testing.assert_close(bound.hidden_lipschitz, torch.stack(list(bound.local_norms.values())).prod(dim=0))
    torch.testing.assert_close(bound.global_hidden_lipschitz, torch.stack(list(bound.global_norms.values())).prod())


@pytest.mark.parametrize(
    ("middle", "rows_follow"),
    [
        ([relu], 1),
        ([clipped_relu], 1),
        ([clipped_maxmin], None),
        ([relu, clipped_relu], 2),
        ([relu, clipped_maxmin], 1),
        ([clipped_maxmin, relu], None),
        ([clipped_relu, clipped_maxmin, relu], 1),
    ],
)
def test_rows_go_only_with_the_elementwise_activations_right_behind(middle, rows_follow):
    model = dense_network(*(activation(8) for activation in middle))
    bound = walk(model, images(6), 0.1)
    assert set(bound.varying) == {*range(1, len(middle) + 1), *([] if rows_follow is None else [0])}
    assert not bound.varying[1].all()
    if rows_follow is not None:
        assert torch.equal(bound.varying[0], bound.varying[rows_follow])


def test_a_mask_survives_the_elementwise_activation_behind_it():
    model = dense_network(clipped_maxmin(8), nn.ReLU())
    varying = walk(model, images(6), 0.1).varying
    assert not (varying[2] & ~varying[1]).any()


def test_linear_layers_in_a_row_keep_their_global_norms():
    bound = walk(dense_network(nn.Linear(8, 8)), images(6), 0.1)
    assert bound.varying == {}
    for position in (0, 1):
        torch.testing.assert_close(bound.local_norms[position], bound.global_norms[position].expand(IMAGES))


def test_only_the_second_of_two_linear_layers_loses_rows():
    model = dense_network(nn.Linear(8, 8), nn.ReLU())
    x = images(6)
    bound = walk(model, x, 0.1)
    assert set(bound.varying) == {1, 2}
    torch.testing.assert_close(bound.local_norms[0], bound.global_norms[0].expand(IMAGES))
    rows = bound.varying[1]
    assert not rows.all()
    torch.testing.assert_close(
        bound.local_norms[1], torch.linalg.matrix_norm(rows[:, :, None] * model[1].weight, ord=2), rtol=1e-4, atol=0
    )


def test_an_in_place_relu_is_like_any_other():
    plain = network("relu")
    in_place = nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(layer, nn.ReLU) else layer for layer in plain))
    x = images(1, 6, 6)
    bounds = [walk(model, x.clone(), 0.4) for model in (plain, in_place)]
    for name in ("logits", "lower", "upper", "radius"):
        torch.testing.assert_close(getattr(bounds[0], name), getattr(bounds[1], name))


def test_a_radius_per_image_is_like_separate_calls(kind):
    model, x, radii = network(kind), images(1, 6, 6), torch.tensor([0.0, 0.05, 0.4, 2.0], dtype=torch.float64)
    y = torch.arange(IMAGES)
    together = walk(model, x, radii)
    for image, radius in enumerate(radii):
        own = slice(image, image + 1)
        alone = walk(model, x[own], radius.item())
        for name in ("lower", "upper", "radius", "hidden_lipschitz"):
            torch.testing.assert_close(getattr(together, name)[own], getattr(alone, name), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(
            worst_logits(together, y, 1000)[own], worst_logits(alone, y[own], 1000), rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), torch.tensor([0.1, 0.1, -0.1, 0.1])])
def test_a_radius_that_is_none_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        walk(dense_network(nn.ReLU()), images(6), epsilon)


# --- worst-case logits -----------------------------------------------------------------------------------------------


def largest_step(direction, lower, upper, radius):
    """max direction . delta with lower <= delta <= upper and ||delta|| <= radius, over the last dimension.

    The maximiser is clip(t direction, lower, upper) with the largest t that the ball allows; bisection finds it.
    """
    low = torch.zeros_like(direction[..., :1])
    high = torch.full_like(low, 1e9)
    for _ in range(200):
        middle = (low + high) / 2
        delta = (middle * direction).clamp(lower, upper)
        inside = delta.norm(dim=-1, keepdim=True) <= radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (direction * (low * direction).clamp(lower, upper)).sum(dim=-1)


@pytest.fixture(params=[0.01, 0.3, 1.0, 10.0], ids=lambda scale: f"ball*{scale}")
def rescaled(case, request):
    """The bound with another radius, so that anything from no entry to all of them gets pinned."""
    return replace(case.bound, radius=case.bound.radius.detach() * request.param)


def steps_of(bound, y):
    """Directions (N, K, H) of the wrong logits, and box and radius around the center, ready to broadcast."""
    direction = bound.last.weight - bound.last.weight[y][:, None]
    lower, upper = (bound.lower - bound.center)[:, None], (bound.upper - bound.center)[:, None]
    return tuple(t.detach() for t in (direction, lower, upper, bound.radius[:, None, None]))


def test_worst_logits_solve_the_problem_of_ball_and_box(case, rescaled):
    expected = case.bound.logits + largest_step(*steps_of(rescaled, case.y))
    torch.testing.assert_close(worst_logits(rescaled, case.y, 1000), expected, rtol=1e-6, atol=1e-6)


def test_no_sampled_step_beats_the_worst_logits(case, rescaled):
    direction, lower, upper, radius = steps_of(rescaled, case.y)
    delta = direction * 10 ** (4 * torch.rand(SAMPLES, *direction.shape) - 2) + torch.randn(SAMPLES, *direction.shape)
    delta = delta.clamp(lower, upper)
    delta = delta * (radius / delta.norm(dim=3, keepdim=True).clamp(min=1e-300)).clamp(max=1)
    sampled = case.bound.logits + (direction * delta).sum(dim=3)
    assert (sampled <= worst_logits(rescaled, case.y, 1000) + 1e-9).all()


def test_more_rounds_never_loosen_and_never_go_below_the_optimum(case, rescaled):
    rounds = torch.stack([worst_logits(rescaled, case.y, n) for n in (0, 1, 2, 3, 4, 1000)])
    assert (rounds.diff(dim=0) <= 1e-9).all()


def test_the_label_keeps_its_logit(case):
    own = worst_logits(case.bound, case.y).gather(1, case.y[:, None])
    torch.testing.assert_close(own, case.bound.logits.gather(1, case.y[:, None]))


def test_logits_in_the_ball_stay_below_the_worst_ones_relative_to_the_label(case):
    logits = outputs_of(case.model, case.points, len(case.model))
    label = case.y.expand(len(logits), -1)[:, :, None]
    gaps = logits - logits.gather(2, label)
    worst = worst_logits(case.bound, case.y, 1000)
    assert (gaps <= worst - worst.gather(1, case.y[:, None]) + 1e-9).all()


def test_certified_labels_never_change(kind):
    certified_share = []
    for epsilon in (0.01, 0.05, 0.2):
        case = make_case(kind, epsilon)
        certified = worst_margin(worst_logits(case.bound, case.y, 1000), case.y) > 0
        labels = outputs_of(case.model, case.points, len(case.model)).argmax(dim=2)
        assert (labels == case.y)[:, certified].all()
        certified_share.append(certified.double().mean())
    assert max(certified_share) > 0


def test_gloro_logits_append_the_largest_wrong_one(case):
    worst = worst_logits(case.bound, case.y)
    wrong = [[w for k, w in enumerate(row) if k != label] for row, label in zip(worst.tolist(), case.y.tolist())]
    appended = torch.tensor([[max(row)] for row in wrong], dtype=torch.float64)
    torch.testing.assert_close(gloro_logits(case.bound, case.y), torch.cat([case.bound.logits, appended], dim=1))


def test_margin_is_to_the_best_wrong_class():
    worst = torch.tensor([[1.0, 3.0, 2.5], [1.0, 3.0, 2.5]])
    torch.testing.assert_close(worst_margin(worst, torch.tensor([1, 0])), torch.tensor([0.5, -2.0]))


def test_a_tie_is_not_certified():
    assert not worst_margin(torch.ones(3, 4), torch.arange(3)).gt(0).any()


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize("label", range(3))
def test_a_nan_logit_is_not_certified(broken, label):
    worst = torch.nn.functional.one_hot(torch.tensor([label]), 3) * 9.0
    worst[0, broken] = torch.nan
    assert not worst_margin(worst, torch.tensor([label])).gt(0).any()


def test_a_nan_pixel_is_not_certified_and_leaves_the_other_images_alone(model):
    x = images(1, 6, 6)
    y = model(x).argmax(dim=1)
    whole = worst_margin(worst_logits(walk(model, x, 0.01), y, 1000), y)
    x[1, 0, 2, 3] = torch.nan
    margin = worst_margin(worst_logits(walk(model, x, 0.01), y, 1000), y)
    assert not margin[1] > 0
    torch.testing.assert_close(margin[[0, 2, 3]], whole[[0, 2, 3]])


# --- losses and gradients --------------------------------------------------------------------------------------------


def bcp(bound, y, rounds):
    return bcp_loss(bound.logits, worst_logits(bound, y, rounds), y, kappa=0.3)


def gloro(bound, y, rounds):
    return gloro_loss(bound.logits, worst_logits(bound, y, rounds), y)


def assert_finite_gradients(loss, model):
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_kappa_blends_the_clean_and_the_robust_loss():
    logits, worst, y = torch.randn(IMAGES, 3), torch.randn(IMAGES, 3), torch.tensor([0, 1, 2, 0])
    clean, robust = (nn.functional.cross_entropy(values, y) for values in (logits, worst))
    torch.testing.assert_close(bcp_loss(logits, worst, y, kappa=1), clean)
    torch.testing.assert_close(bcp_loss(logits, worst, y, kappa=0), robust)
    torch.testing.assert_close(bcp_loss(logits, worst, y, kappa=0.25), 0.25 * clean + 0.75 * robust)


@pytest.mark.parametrize("rounds", [1, 1000])
@pytest.mark.parametrize("loss", [bcp, gloro])
def test_gradients_are_those_of_finite_differences(model, loss, rounds):
    x, y = images(1, 6, 6), torch.arange(IMAGES)
    norms = PowerIteration(1000)
    parameters = list(model.parameters())

    def value():
        return loss(propagate(model, x, 0.3, norms), y, rounds)

    def move(direction, length):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction):
                parameter.add_(length * d)

    gradients = torch.autograd.grad(value(), parameters)
    norms.iterations = 200  # from here on the vectors are warm
    for _ in range(3):
        direction = [torch.randn_like(parameter) for parameter in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction))
        step = 1e-6
        move(direction, step)
        above = value().detach()
        move(direction, -2 * step)
        below = value().detach()
        move(direction, step)
        torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [bcp, gloro])
def test_a_dead_layer_has_norm_zero_and_finite_gradients(loss):
    model, x, y = network("relu"), images(1, 6, 6), torch.arange(IMAGES)
    nn.init.constant_(model[2].bias, -100)
    bound = walk(model, x, 0.3)
    assert (bound.local_norms[2] == 0).all()
    assert (bound.hidden_lipschitz == 0).all()
    torch.testing.assert_close(worst_logits(bound, y), bound.logits)
    assert_finite_gradients(loss(bound, y, 1), model)


@pytest.mark.parametrize("loss", [bcp, gloro])
def test_a_ball_of_radius_zero_is_the_image(model, loss):
    y = torch.arange(IMAGES)
    bound = walk(model, images(1, 6, 6), 0)
    torch.testing.assert_close(worst_logits(bound, y, 1000), bound.logits)
    torch.testing.assert_close(bound.lower, bound.upper)
    assert_finite_gradients(loss(bound, y, 1000), model)


@pytest.mark.parametrize("loss", [bcp, gloro])
def test_zero_weights_have_finite_gradients(model, loss):
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    y = torch.arange(IMAGES)
    bound = walk(model, images(1, 6, 6), 0.3)
    assert (bound.global_hidden_lipschitz == 0).all()
    assert (worst_logits(bound, y) == 0).all()
    assert_finite_gradients(loss(bound, y, 10), model)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of entries of any tensor that an operation made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = (leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tensors_in(result))
        self.entries = max(self.entries, *sizes, 0)
        return result


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_memory_grows_with_the_classes_not_with_their_pairs():
    n, classes, hidden = 8, 200, 64
    model = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    y = torch.arange(n)
    with LargestTensor() as largest:
        bound = propagate(model, torch.rand(n, 4), 0.1, PowerIteration(2))
        (bcp(bound, y, 10) + gloro(bound, y, 10)).backward()
    assert largest.entries == n * classes * hidden


# --- layers that are refused -----------------------------------------------------------------------------------------


class MyReLU(nn.ReLU):
    pass


class MySequential(nn.Sequential):
    pass


@pytest.mark.parametrize("layer", [nn.Sigmoid(), MyReLU(), nn.MaxPool2d(1)], ids=lambda layer: type(layer).__name__)
def test_an_unknown_layer_is_refused_with_its_type_and_position(layer):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Flatten(), nn.Linear(32, 3)).double()
    with pytest.raises(TypeError, match=rf"{type(layer).__name__}.*position 1"):
        walk(model, images(1, 6, 6), 0.1)


def test_padding_other_than_zeros_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(TypeError, match=r"Conv2d.*position 0.*reflect"):
        walk(model.double(), images(1, 6, 6), 0.1)


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Flatten(), nn.Conv2d(1, 1, 1)], ids=lambda layer: type(layer).__name__)
def test_a_network_that_does_not_end_in_a_linear_layer_is_refused(last):
    with pytest.raises(TypeError, match=rf"Linear.*{type(last).__name__}.*position 1"):
        walk(nn.Sequential(nn.Conv2d(1, 1, 1), last).double(), images(1, 6, 6), 0.1)


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Linear(6, 3), MySequential(nn.Linear(6, 3))])
def test_only_a_filled_plain_sequential_is_a_network(model):
    with pytest.raises(TypeError, match="network"):
        walk(model.double(), images(6), 0.1)


def test_a_linear_layer_on_maps_is_refused():
    with pytest.raises(TypeError, match=r"Linear.*position 0.*Flatten"):
        walk(nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(36, 3)).double(), images(1, 6, 6), 0.1)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout()], ids=lambda layer: type(layer).__name__)
def test_training_mode_is_refused_where_it_matters(layer):
    model = dense_network(layer, nn.ReLU())
    with pytest.raises(ValueError, match=r"position \d.*training mode"):
        walk(model, images(6), 0.1)
    walk(model.eval(), images(6), 0.1)


def test_a_layer_with_a_hook_is_refused():
    model = dense_network(nn.ReLU())
    model[1].register_forward_hook(lambda layer, args, output: 2 * output)
    with pytest.raises(TypeError, match=r"ReLU.*position 1.*hook"):
        walk(model, images(6), 0.1)


def test_nesting_changes_nothing():
    flat, x, y = network("mixture"), images(1, 6, 6), torch.arange(IMAGES)
    nested = nn.Sequential(flat[:3], nn.Sequential(flat[3:5], flat[5:-1]), flat[-1])
    expected, actual = walk(flat, x, 0.4), walk(nested, x, 0.4)
    torch.testing.assert_close(worst_logits(actual, y), worst_logits(expected, y))
    assert list(actual.local_norms) == ["0.0", "0.2", "1.1.0"]


# --- activations -----------------------------------------------------------------------------------------------------


def test_clipped_relu_entry_by_entry():
    layer = clipped_relu(3, 2, 2)
    x = torch.randn(IMAGES, 3, 2, 2)
    expected = [
        min(max(value, 0), threshold)
        for image in x.flatten(1).tolist()
        for value, threshold in zip(image, layer.threshold.flatten().tolist())
    ]
    assert layer(x).flatten().tolist() == expected


def test_clipped_maxmin_entry_by_entry():
    layer = clipped_maxmin(4, 2, 2)
    x = torch.randn(IMAGES, 4, 2, 2)
    y = layer(x)
    for n in range(IMAGES):
        for c, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).tolist():
            a, b = x[n, c, i, j], x[n, c + 2, i, j]
            assert y[n, c, i, j] == min(max(a, b), layer.max[0, c, i, j])
            assert y[n, c + 2, i, j] == max(min(a, b), layer.min[0, c, i, j])


def test_projection_brings_negative_thresholds_to_zero_and_no_others():
    layer = ReLU_x((5,))
    layer.threshold.data = torch.tensor([[-1.0, 0.0, 0.5, 2.0, -1e-9]])
    layer.project()
    assert layer.threshold.tolist() == [[0.0, 0.0, 0.5, 2.0, 0.0]]


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 3, 2), (1, 4, 3, 2)])
def test_shapes_may_carry_the_batch_dimension(shape):
    entries = shape[1:] if shape[0] == 1 else shape
    assert ReLU_x(shape).threshold.shape == (1, *entries)
    assert ClampGroupSort(shape, 1, -1).max.shape == (1, 2, *entries[1:])


def test_an_odd_number_of_channels_has_no_pairs():
    with pytest.raises(ValueError, match="even"):
        ClampGroupSort((3, 4, 4), 1, -1)


# --- the ball alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_ball_alone_is_the_bound_by_global_norms(kind):
    net, x, y = network(kind), images(1, 6, 6), torch.arange(IMAGES)
    norms = PowerIteration(300)
    alone = propagate(net, x, 0.4, norms, box=False)
    torch.testing.assert_close(alone.logits, net(x))
    lipschitz = torch.stack(list(alone.global_norms.values())).prod()
    torch.testing.assert_close(alone.radius, (0.4 * lipschitz).expand(IMAGES))
    assert not alone.varying
    directions = net[-1].weight - net[-1].weight[y].unsqueeze(1)
    expected = alone.logits + alone.radius[:, None] * directions.norm(dim=2)
    for rounds in (1, 10):
        torch.testing.assert_close(worst_logits(alone, y, rounds), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_can_only_tighten_what_the_ball_alone_says(kind):
    net, x, y = network(kind), images(1, 6, 6), torch.arange(IMAGES)
    norms = PowerIteration(300)
    alone, both = (worst_logits(propagate(net, x, 0.4, norms, box=box), y, 100) for box in (False, True))
    assert (both <= alone + 1e-4).all()


def test_gradients_of_the_ball_alone_are_those_of_plain_operations():
    net, x, y = network("maxmin"), images(1, 6, 6), torch.arange(IMAGES)
    gradients = []
    for fused in (True, False):
        norms = PowerIteration(20)
        bound = propagate(net, x, 0.4, norms, fused=fused, box=False)
        loss = gloro_loss(bound.logits, worst_logits(bound, y), y)
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


def test_how_far_a_box_reaches_cannot_be_asked_without_one():
    with pytest.raises(ValueError, match="without a box"):
        propagate(network("relux"), images(1, 6, 6), 0.1, PowerIteration(1), sparse_threshold=0.1, box=False)
