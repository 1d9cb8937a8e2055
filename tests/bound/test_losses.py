"""The losses, and gradients through the whole bound."""

import pytest
import torch
from oracles import IMAGES, KINDS, images, network, walk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from local_bound import PowerIteration, bcp_loss, gloro_loss, propagate, worst_logits
from locallip.bound.losses import cll_loss, emma_loss, gloro_kl_loss, margin_loss
from locallip.bound.operators import Dense
from locallip.bound.worst_case import class_radii


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def model(request, _seed):
    return network(request.param)


def bcp(bound, y, rounds):
    return bcp_loss(bound.logits, worst_logits(bound, y, rounds), y, kappa=0.3)


def gloro(bound, y, rounds):
    return gloro_loss(bound.logits, worst_logits(bound, y, rounds), y)


def gloro_kl(bound, y, rounds):
    return gloro_kl_loss(bound.logits, worst_logits(bound, y, rounds), y, weight=0.7)


def margin(bound, y, rounds):
    right = bound.logits.argmax(dim=1)
    y = torch.where(torch.arange(IMAGES) < 2, right, y)  # some images have to be classified right
    radii = class_radii(bound.logits, y, bound.last, bound.hidden_lipschitz)
    return margin_loss(bound.logits, radii, y, reach=1e6, weight=0.7, sharpness=3.0)


def cll(bound, y, rounds):
    return cll_loss(bound.logits, y, bound.last, bound.hidden_lipschitz, epsilon=0.2, radius=0.3, slack=0.1)


def emma(bound, y, rounds):
    return emma_loss(bound.logits, worst_logits(bound, y, rounds), y)


LOSSES = [bcp, gloro, gloro_kl, margin, cll, emma]


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


@pytest.fixture
def batch():
    """Logits (6, 4) at x and in the worst case, labels, and the last layer: four images are right, two of them open."""
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = logits.argmax(dim=1)
    y[4:] = (y[4:] + 1) % 4
    gains = torch.tensor([0.01, 0.01, 5.0, 5.0, 0.01, 5.0], dtype=torch.float64)[:, None] * (0.5 + torch.rand(6, 4))
    worst = (logits.detach() + gains.scatter(1, y[:, None], 0)).requires_grad_()
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    last = Dense(weight, None, 0)
    lipschitz = (0.1 + torch.rand(6, dtype=torch.float64)).requires_grad_()
    return logits, worst, y, last, lipschitz


def crossentropy(logits, y):
    """Of one image, from its definition."""
    return -(logits[y].exp() / logits.exp().sum()).log()


def test_gloro_kl_adds_the_divergence_from_the_prediction_that_leaves_no_room_for_an_attack(batch):
    logits, worst, y, _, _ = batch
    expected = 0
    for row, attacked, label in zip(logits, worst, y):
        largest = max(attacked[j] for j in range(4) if j != label)
        p = torch.cat([row.softmax(0), row.new_zeros(1)])
        q = torch.cat([row, largest[None]]).softmax(0)
        divergence = sum(p[j] * (p[j] / q[j]).log() for j in range(4))  # 0 log 0 is 0
        expected = expected + (crossentropy(row, label) + 0.7 * divergence) / 6
    torch.testing.assert_close(gloro_kl_loss(logits, worst, y, 0.7), expected)


def test_class_radii_are_margins_over_the_lipschitz_constants_of_the_pairs(batch):
    logits, _, y, last, lipschitz = batch
    radii = class_radii(logits, y, last, lipschitz)
    for i, label in enumerate(y):
        for j in range(4):
            slope = lipschitz[i] * (last.weight[label] - last.weight[j]).norm()
            expected = logits.new_tensor(torch.inf) if j == label else (logits[i, label] - logits[i, j]) / slope
            torch.testing.assert_close(radii[i, j], expected)


def test_the_margin_loss_rewards_the_radii_of_images_that_are_right_and_not_far_enough(batch):
    logits, _, y, last, lipschitz = batch
    radii = class_radii(logits, y, last, lipschitz)
    smallest = radii[:4].amin(dim=1).sort().values
    reach = smallest[2:].mean().item()  # three of the four that are right are below
    soft = []
    for i in range(4):
        if radii[i].amin() < reach:
            soft.append(sum((-3 * radii[i, j]).exp() for j in range(4) if j != y[i]).log() / 3)
    assert len(soft) == 3
    expected = sum(crossentropy(logits[i], y[i]) for i in range(6)) / 6 + 0.7 * sum(soft) / 3
    torch.testing.assert_close(margin_loss(logits, radii, y, reach, 0.7, 3.0), expected)


def test_gradients_of_the_losses_are_those_of_finite_differences_where_nothing_is_held_fixed(batch):
    logits, worst, y, last, lipschitz = batch
    radii = class_radii(logits, y, last, lipschitz).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: gloro_kl_loss(*given, y), (logits, worst))
    assert torch.autograd.gradcheck(lambda *given: margin_loss(*given, y, reach=1.0), (logits, radii))
    assert torch.autograd.gradcheck(lambda given: cll_loss(given, y, last, lipschitz, 0.2, 0.3), (logits,))


@pytest.mark.parametrize("reach", [0.0, 1e-9])
def test_without_an_image_to_reward_the_margin_loss_is_the_clean_one(batch, reach):
    logits, _, y, last, lipschitz = batch
    loss = margin_loss(logits, class_radii(logits, y, last, lipschitz), y, reach)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, y))
    (gradient,) = torch.autograd.grad(loss, lipschitz)
    assert not gradient.any()


def test_cll_is_a_crossentropy_of_calibrated_distances(batch):
    logits, _, y, last, lipschitz = batch
    sigma = 2 * 0.3 / (torch.logit(torch.tensor(0.95)) - torch.logit(torch.tensor(0.05)))
    expected, fixed = 1e-6 * (lipschitz**2).mean(), lipschitz.detach()
    for i, label in enumerate(y):
        distances = torch.stack([logits[i, j] / fixed[i] / last.weight[j].norm() for j in range(4)])
        signs = torch.tensor([-1.0 if j == label else 1.0 for j in range(4)])
        expected = expected + crossentropy((distances + 0.2 * signs) / sigma, label) / 6
    found = cll_loss(logits, y, last, lipschitz, 0.2, 0.3, slack=0.1)
    torch.testing.assert_close(found, expected)
    moved = (logits, last.weight, lipschitz)
    for ours, theirs in zip(torch.autograd.grad(found, moved), torch.autograd.grad(expected, moved)):
        torch.testing.assert_close(ours, theirs)


def test_emma_goes_as_far_as_a_class_wins_and_no_farther(batch):
    logits, worst, y, _, _ = batch
    with torch.no_grad():
        ahead = logits.gather(1, y[:, None]) - logits
        share = (ahead / (worst - logits)).clamp(0.01, 1)
        share[torch.arange(6), y] = 1
        kinds = [(share == 1)[:2].all(), ((share > 0.01) & (share < 1)).any(), (share == 0.01).any()]
        assert all(kinds)
    expected = nn.functional.cross_entropy(logits + share * (worst - logits), y)  # shares have no gradient
    found = emma_loss(logits, worst, y)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (logits, worst)), torch.autograd.grad(expected, (logits, worst))
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_worst_case_that_is_not_a_number_makes_no_loss_that_is_one(batch):
    logits, worst, y, _, _ = batch
    worst = worst.detach().clone()
    worst[0, (y[0] + 1) % 4] = torch.nan
    assert all(loss(logits, worst, y).isnan() for loss in (gloro_loss, gloro_kl_loss, emma_loss))


# Those that are not here hold a part of themselves fixed; the margin loss asks for no worst case, whatever its rounds.
@pytest.mark.parametrize(
    ("loss", "rounds"), [(bcp, 1), (bcp, 1000), (gloro, 1), (gloro, 1000), (gloro_kl, 1000), (margin, 1)]
)
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
    norms.iterations = 50  # from here on the vectors are warm
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


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dead_layer_has_norm_zero_and_finite_gradients(loss):
    model, x, y = network("relu"), images(1, 6, 6), torch.arange(IMAGES)
    nn.init.constant_(model[2].bias, -100)
    bound = walk(model, x, 0.3)
    assert (bound.local_norms[2] == 0).all()
    assert (bound.hidden_lipschitz == 0).all()
    torch.testing.assert_close(worst_logits(bound, y), bound.logits)
    assert_finite_gradients(loss(bound, y, 1), model)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_ball_of_radius_zero_is_the_image(model, loss):
    y = torch.arange(IMAGES)
    bound = walk(model, images(1, 6, 6), 0)
    torch.testing.assert_close(worst_logits(bound, y, 1000), bound.logits)
    torch.testing.assert_close(bound.lower, bound.upper)
    assert_finite_gradients(loss(bound, y, 1000), model)


@pytest.mark.parametrize("loss", LOSSES)
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
        sum(loss(bound, y, 10) for loss in (bcp, gloro, gloro_kl, cll, emma)).backward()
    assert largest.entries == n * classes * hidden
