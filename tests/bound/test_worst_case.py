"""Worst-case logits against bisection, sampled steps and sampled points."""

import re
from dataclasses import replace

import pytest
import torch
from oracles import CLASSES, EPSILONS, KINDS, SAMPLES, images, largest_step, make_case, network, outputs_of, walk

from local_bound import gloro_logits, worst_logits, worst_margin
from locallip.bound.operators import Dense
from locallip.bound.worst_case import global_radius


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=EPSILONS)
def case(kind, request):
    return make_case(kind, request.param)


@pytest.fixture
def model(kind, _seed):
    return network(kind)


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


def test_the_global_radius_is_where_the_worst_logit_of_a_ball_alone_reaches_the_label():
    logits, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    last, lipschitz = Dense(torch.randn(4, 3, dtype=torch.float64), None, 0), torch.tensor(1.7, dtype=torch.float64)
    radius = global_radius(logits, y, last, lipschitz)
    assert torch.equal(radius == 0, logits.argmax(dim=1) != y)
    for scale, certified in ((0.999, True), (1.001, False)):
        slopes = (last.weight - last.weight[y][:, None]).norm(dim=2)
        worst = logits + slopes * lipschitz * scale * radius[:, None]
        assert ((worst_margin(worst, y) > 0) == certified)[radius > 0].all()


@pytest.mark.parametrize(
    ("spoil", "error", "complaint"),
    [
        (lambda y: y[:1], ValueError, "got (1,) for"),
        (lambda y: y[:, None], ValueError, "got (4, 1) for"),
        (lambda y: y.float(), TypeError, "got torch.float32"),
        (lambda y: y.int(), TypeError, "got torch.int32"),
        (lambda y: y.numpy(), TypeError, "got ndarray"),
        (lambda y: y - CLASSES, ValueError, "labels must lie between 0 and"),
        (lambda y: y + CLASSES, ValueError, "labels must lie between 0 and"),
    ],
)
@pytest.mark.parametrize("ask", [worst_logits, gloro_logits])
def test_labels_that_would_be_read_as_others_are_refused(ask, spoil, error, complaint):
    case = make_case(KINDS[0], EPSILONS[0])
    with pytest.raises(error, match=re.escape(complaint)):
        ask(case.bound, spoil(case.y))
