"""The walk with ball and box against sampled points and dense matrices."""

import pytest
import torch
from oracles import (
    ACTIVATION_TYPES,
    BATCH_NORMS,
    EPSILONS,
    IMAGES,
    KINDS,
    clipped_maxmin,
    clipped_relu,
    dense_matrix,
    dense_network,
    images,
    make_case,
    network,
    outputs_of,
    relu,
    settled,
    walk,
)
from torch import nn

from local_bound import (
    PowerIteration,
    gloro_loss,
    propagate,
    worst_logits,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=EPSILONS)
def case(kind, request):
    return make_case(kind, request.param)


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


# --- what each layer was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_kept_say_what_stands_there_and_what_the_walk_found(kind):
    model, x = network(kind), images(1, 6, 6)
    bound = walk(model, x, 0.2, keep_layers=True)
    assert [layer.operator.position for layer in bound.layers] == list(bound.local_norms)
    for layer in bound.layers:
        position = layer.operator.position
        assert torch.equal(layer.norm, bound.local_norms[position])
        rows, _ = bound.masks[position]
        assert (layer.rows is None) == (rows is None)
        assert rows is None or torch.equal(layer.rows, rows)
        # Average pooling and normalisation have a linear layer right behind them.
        assert len(layer.activations) == (0 if type(model[position]).__name__ in ("Normalize", "AvgPool2d") else 1)
        assert (layer.columns is None) == (not layer.activations)


@pytest.mark.parametrize("kind", KINDS)
def test_the_region_of_a_layer_that_is_kept_holds_its_outputs_for_all_points_of_the_ball(kind):
    case = make_case(kind, 0.4)
    for layer in walk(case.model, case.x, case.epsilon, keep_layers=True).layers:
        end = layer.operator.position + 1
        end += isinstance(case.model[end], BATCH_NORMS)
        outputs, region = outputs_of(case.model, case.points, end), layer.region
        assert (outputs >= region.lower - 1e-9).all()
        assert (outputs <= region.upper + 1e-9).all()
        torch.testing.assert_close(region.center, case.model[:end](case.x))


def test_linear_layers_in_a_row_are_kept_as_layers_without_an_activation():
    bound = walk(dense_network(nn.Linear(8, 8), nn.ReLU(), nn.ReLU()), images(6), 0.1, keep_layers=True)
    first, second = bound.layers
    assert first.activations == ()
    assert first.rows is None
    assert first.columns is None
    assert len(second.activations) == 2
    assert torch.equal(second.rows, bound.varying[1])
    assert torch.equal(second.columns, bound.varying[3])


def test_a_layer_that_is_kept_has_the_shape_in_which_its_activation_takes_it():
    model = settled(nn.Conv2d(1, 3, 3), nn.Flatten(), clipped_relu(48), nn.Linear(48, 3))
    (layer,) = walk(model, images(1, 6, 6), 0.1, keep_layers=True).layers
    assert layer.operator.output_shape == (3, 4, 4)
    assert {layer.region.center.shape, layer.rows.shape, layer.columns.shape} == {(IMAGES, 48)}
    assert torch.equal(layer.columns, layer.rows)


def test_no_layers_are_kept_where_an_activation_stands_before_the_first_of_them():
    # What the ball around x becomes there is no ball around the first linear layer's input.
    model = nn.Sequential(nn.ReLU(), *dense_network(nn.ReLU())).double()
    assert walk(model, images(6), 0.1, keep_layers=True).layers is None
    assert walk(model[1:], images(6), 0.1, keep_layers=True).layers is not None


def test_no_layers_are_kept_unless_they_are_asked_for():
    assert walk(dense_network(nn.ReLU()), images(6), 0.1).layers is None
