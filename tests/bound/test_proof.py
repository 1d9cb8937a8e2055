"""Proven certificates: no margin too large, not one certified image that falls."""

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracles import (
    SURELY,
    ExactLocalNorms,
    ExactNorms,
    clipped_relu,
    linear_net,
    points_in_the_ball,
    stack_of,
    train_a_little,
)
from torch import nn

from locallip.bound.certificates import certify
from locallip.bound.graph import Graph
from locallip.bound.layers import ClampGroupSort, MaxMin, Normalize
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import EFFORTS, decide, lanczos_steps, proof_stages, prove, proven_norms
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.stages import DualStage, ProductStage, best_of, comes_before_better_norms, is_by_dual
from locallip.bound.walk import propagate
from locallip.bound.worst_case import worst_logits, worst_margin

EXACT = ExactLocalNorms()
IMAGES = 16
RADII = [0.02, 0.1, 0.3]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=EFFORTS)
def effort(request):
    return request.param


@pytest.fixture(scope="module")
def net(digits):
    """A net trained on digits, 16 test images in float64 and their labels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 5, stride=3), clipped_relu(4, 8, 8), nn.Flatten(), nn.Linear(256, 32), nn.ReLU()]
    model = train_a_little(nn.Sequential(*layers, nn.Linear(32, 10)), digits[True])
    x, y, _ = next(iter(digits[False].batches(IMAGES)))
    return model.double(), x.double(), y


@pytest.fixture(scope="module")
def proof_of(net):
    """Proofs about the images of `net` by radius, effort and what is deployed, each made once."""
    model, x, y = net

    @functools.cache
    def proof(epsilon, effort, deployed="exact"):
        return prove(model, x, y, epsilon, ProvenNorms(SURELY, 10_000, seed=0, deployed=deployed), effort=effort)

    return proof


def exact_margin(net, epsilon):
    model, x, y = net
    return worst_margin(worst_logits(propagate(model, x, epsilon, EXACT), y, 1000), y)


# --- margins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", RADII)
def test_no_margin_of_the_product_exceeds_that_of_brute_force(net, proof_of, epsilon):
    proof, best = proof_of(epsilon, "product"), exact_margin(net, epsilon)
    assert (proof.worst_margin <= best).all()
    assert (proof.worst_margin > 0).sum() >= (best > 0).sum() - 1
    assert (proof.hidden_lipschitz >= propagate(net[0], net[1], epsilon, EXACT).hidden_lipschitz).all()


@pytest.mark.parametrize("epsilon", RADII)
def test_the_dual_certifies_all_that_the_product_certifies_and_more(proof_of, epsilon):
    product, dual = (proof_of(epsilon, effort).worst_margin > 0 for effort in EFFORTS)
    assert (dual >= product).all()
    if epsilon == 0.3:
        assert dual.sum() > product.sum()


def test_the_radii_of_these_tests_certify_some_images_and_others_not(proof_of, effort):
    certified = [int((proof_of(epsilon, effort).worst_margin > 0).sum()) for epsilon in RADII]
    assert certified == sorted(certified, reverse=True)
    assert IMAGES > certified[1] > 0


@pytest.mark.parametrize("epsilon", RADII)
def test_no_margin_exceeds_that_of_any_point_of_the_ball(net, proof_of, effort, epsilon):
    model, x, y = net
    points = points_in_the_ball(model, x, epsilon)
    logits = model(points.flatten(0, 1)).view(*points.shape[:2], 10)
    label = y.expand(len(points), -1)[..., None]
    wrong = logits.scatter(2, label, -torch.inf).amax(dim=2)
    margins = (logits.gather(2, label).squeeze(2) - wrong).amin(dim=0)
    # What is given up early keeps the margin of the stage that gave it up, which is a lower bound too.
    assert (proof_of(epsilon, effort).worst_margin <= margins).all()


@pytest.mark.parametrize("epsilon", RADII)
def test_no_point_of_the_ball_changes_a_certified_answer(net, proof_of, effort, epsilon):
    model, x, y = net
    certified = proof_of(epsilon, effort).worst_margin > 0
    points = points_in_the_ball(model, x, epsilon)[:, certified]
    assert (model(points.flatten(0, 1)).argmax(dim=1).view(points.shape[:2]) == y[certified]).all()


def test_the_box_that_travels_with_the_local_ball_is_inside_the_published_one(net):
    model, x, _ = net
    ours, published = (propagate(model, x, 0.1, norms) for norms in (EXACT, ExactNorms()))
    assert (ours.lower >= published.lower - 1e-12).all()
    assert (ours.upper <= published.upper + 1e-12).all()
    assert (ours.upper - ours.lower < 0.99 * (published.upper - published.lower)).any()
    assert (ours.hidden_lipschitz <= published.hidden_lipschitz + 1e-12).all()


# --- valid images ----------------------------------------------------------------------------------------------------


def test_valid_images_have_a_smaller_box_and_larger_margins(net):
    model, x, _ = net
    # The first box, read off behind a layer that changes nothing.
    eye = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(784, 10)).double()
    box = propagate(eye, x, 0.3, EXACT, clip=(0.0, 1.0))
    assert (box.lower >= 0).all()
    assert (box.upper <= 1).all()
    free, clipped = exact_bounds = [propagate(model, x, 0.3, EXACT, clip) for clip in (None, (0.0, 1.0))]
    assert all((b.lower <= b.center).all() and (b.center <= b.upper).all() for b in exact_bounds)
    assert (clipped.hidden_lipschitz <= free.hidden_lipschitz * (1 + 1e-12)).all()
    margins = [worst_margin(worst_logits(bound, net[2], 1000), net[2]) for bound in (free, clipped)]
    assert (margins[1] >= margins[0] - 1e-9).all()


def test_an_image_is_certified_where_only_images_that_are_not_valid_would_break_it(effort):
    # The answer changes at -0.2, which no pixel has.
    model = linear_net((torch.ones(1, 1), torch.zeros(1)), (torch.tensor([[1.0], [0.0]]), torch.tensor([0.2, 0.0])))
    x, y = torch.full((1, 1), 0.1).double(), torch.tensor([0])
    margins = [
        prove(model, x, y, 0.5, ProvenNorms(SURELY, 100), clip, effort).worst_margin for clip in (None, (0.0, 1.0))
    ]
    assert margins[0] < 0 < margins[1]


def test_clipping_is_no_way_around_an_image_that_is_not_valid_itself(effort):
    # At 1.4 the unit is on, at every valid image of the ball it is off: the answer changes from 0 to 1.
    model = stack_of(([[1.0]], [-1.1]), ([[1.0], [0.0]], [0.0, 0.2])).requires_grad_(False)
    x, y = torch.tensor([[1.4]], dtype=torch.float64), torch.tensor([0])
    assert model(x).argmax() == 0
    assert model(torch.tensor([[0.95]], dtype=torch.float64)).argmax() == 1
    with pytest.raises(ValueError, match="outside"):
        prove(model, x, y, 0.5, ProvenNorms(SURELY, 100), (0.0, 1.0), effort)


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", RADII)
def test_every_image_is_decided_in_one_stage_or_stays_open(proof_of, effort, epsilon):
    proof = proof_of(epsilon, effort)
    assert sum(proof.decided) == IMAGES
    assert len(proof.decided) == len(proof.stages) + 1 == len(proof.seconds) + 1
    assert torch.bincount(proof.stage, minlength=len(proof.stages) + 1).tolist() == proof.decided
    still_open = proof.stage == len(proof.stages)
    assert not (proof.worst_margin[still_open] > 0).any()


def test_the_stages_of_a_product_are_those_of_the_lanczos_steps_and_a_dual_comes_behind_local_norms(net):
    model, x, _ = net
    norms = ProvenNorms(SURELY, 10)
    product, dual = (proof_stages(Graph.of(model), x, norms, effort) for effort in EFFORTS)
    steps = lanczos_steps(Graph.of(model), x, norms)
    assert 1 < steps[0] < steps[1] < steps[2]
    assert [stage.norms.steps for stage in product] == [0, *steps]
    assert not any(isinstance(stage, DualStage) or stage.costly for stage in product)
    assert [type(stage) for stage in dual] == [ProductStage, *[ProductStage, DualStage] * 2]
    assert [stage.norms.steps for stage in dual if isinstance(stage, ProductStage)] == [0, *steps[:2]]
    assert [stage.costly for stage in dual] == [False, False, True, True, True]
    assert all(before.before_dual for before, stage in pairwise(dual) if isinstance(stage, DualStage))
    assert len({stage.name for stage in dual}) == len(dual)
    assert all(stage.norms.budget is norms.budget for stage in (*product, dual[0], dual[1], dual[3]))


@pytest.mark.parametrize("clips", [True, False])
def test_where_masks_switch_off_columns_alone_the_dual_comes_behind_the_global_norms(clips):
    sort = ClampGroupSort((4,), 0.3, -0.3) if clips else MaxMin()
    model = nn.Sequential(nn.Linear(4, 4), sort, nn.Linear(4, 2)).double()
    stages = proof_stages(Graph.of(model), torch.zeros(1, 4).double(), ProvenNorms(SURELY, 10))
    assert [type(stage) for stage in stages] == [ProductStage, DualStage] * (2 if clips else 1)
    assert stages[0].norms.steps == 0
    assert comes_before_better_norms(stages[1].name) is clips
    if clips:
        assert stages[2].norms.steps > 1
        assert stages[2].costly


def test_local_norms_of_clipped_maxmin_are_used_where_they_are_smaller_and_nothing_is_asked_where_they_are_not():
    first, second, last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)
    model = nn.Sequential(first, ClampGroupSort((32,), 1.0, -1.0), second, ClampGroupSort((32,), 1.0, -1.0), last)
    model = model.double()
    for layer in (first, second):
        layer.weight.data *= 4
    graph, x = Graph.of(model), 2 * torch.randn(64, 8, dtype=torch.float64)
    y, norms = model(x).argmax(dim=1), ProvenNorms(SURELY, 10_000, seed=0)
    stages = proof_stages(graph, x, norms)
    better, before = decide(stages, graph, x, y, 0.08), decide(stages[:2], graph, x, y, 0.08)
    assert (better.worst_margin > 0).sum() > (before.worst_margin > 0).sum() > 0
    assert not ((before.worst_margin > 0) & ~(better.worst_margin > 0)).any()
    asks_for_all = [*stages[:2], replace(stages[2], least_gain=1.0), stages[3]]
    idle = decide(asks_for_all, graph, x, y, 0.08)
    assert idle.seconds[3] == 0, "where nothing is gained the last stage is not asked"
    assert (idle.stage[~(idle.worst_margin > 0)] == 2).all()


class Asked(ProductStage):
    """Notes the images that it is asked about."""

    def ask(self, question, carried):
        self.asked = question.x.clone()
        self.carried = carried
        return super().ask(question, carried)


def stages_by_steps(*steps, **arguments):
    return [Asked(f"{k} steps", ProvenNorms(SURELY, 10_000, steps=k, seed=0), **arguments) for k in steps]


def test_a_stage_is_asked_about_what_those_before_it_left_open(net):
    model, x, y = net
    stages = stages_by_steps(0, 250)
    proof = decide(stages, model, x, y, 0.3)
    assert 0 < len(stages[1].asked) < len(stages[0].asked) == IMAGES
    assert torch.equal(stages[1].asked, x[proof.stage != 0])


def test_images_are_decided_alone_as_they_are_together(net):
    model, x, y = net
    together = decide(stages_by_steps(0), model, x, y, 0.1)
    for image in range(4):
        one = slice(image, image + 1)
        alone = decide(stages_by_steps(0), model, x[one], y[one], 0.1)
        torch.testing.assert_close(alone.worst_margin, together.worst_margin[one])


def test_every_image_has_a_radius_of_its_own_in_every_stage(net):
    model, x, y = net
    epsilon = torch.linspace(0.02, 0.3, IMAGES, dtype=torch.float64)
    proof = prove(model, x, y, epsilon, ProvenNorms(SURELY, 10_000, seed=0), effort="product")
    best = torch.cat([exact_margin((model, x[[i]], y[[i]]), epsilon[i]) for i in range(IMAGES)])
    assert (proof.worst_margin <= best).all()
    assert (proof.worst_margin > 0).sum() >= (best > 0).sum() - 1


def test_costly_stages_are_not_asked_about_images_that_an_attack_broke(net):
    model, x, y = net
    first, second = stages_by_steps(0, 8)[0], stages_by_steps(8, costly=True, from_below=False)[0]
    fallen = torch.arange(IMAGES) % 2 == 0
    known = decide([first, second], model, x, y, 0.3, fallen=fallen)
    wanted = x[~fallen & (known.stage != 0)]
    assert len(wanted)
    assert torch.equal(second.asked, wanted)
    assert (known.stage[fallen & ~(known.worst_margin > 0) & (known.stage != 0)] == 2).all()
    decide([second], model, x, y, 0.3, fallen=fallen)
    assert len(second.asked) == IMAGES  # the first stage is asked about all


def test_the_dual_never_lowers_a_margin_and_needs_what_a_product_hands_on(net):
    model, x, y = net
    product, with_dual = (
        decide([*stages_by_steps(8, before_dual=True), *dual], model, x[:6], y[:6], 0.3).worst_margin
        for dual in ([], [DualStage(iterations=10)])
    )
    assert (with_dual >= product).all()
    assert (with_dual > product).any()
    nothing = decide([*stages_by_steps(8), DualStage()], model, x[:6], y[:6], 0.3).worst_margin
    assert torch.equal(nothing, product)


def test_what_a_dual_proved_of_a_class_is_known_to_the_stages_behind_it(net):
    model, x, y = net
    first = [*stages_by_steps(250, before_dual=True), DualStage(iterations=20)]
    worse = [*stages_by_steps(0, before_dual=True), DualStage("dual again", iterations=1)]
    once, twice, worse = (decide(stages, model, x, y, 0.3) for stages in (first, first + worse, worse))
    assert (twice.worst_margin > once.worst_margin - 1e-9).all()
    assert (twice.worst_margin > worse.worst_margin)[twice.stage == 4].any()


def test_a_bound_that_is_no_number_says_nothing_about_another():
    nan, inf = torch.nan, torch.inf
    best = best_of(torch.tensor([1.0, nan, 2.0, nan, -inf]), torch.tensor([nan, 1.0, 3.0, nan, 0.0]))
    torch.testing.assert_close(best, torch.tensor([1.0, 1.0, 3.0, nan, 0.0]), equal_nan=True)


def test_an_effort_of_another_name_is_refused(net):
    model, x, y = net
    with pytest.raises(ValueError, match="product, dual, got 'most'"):
        prove(model, x, y, 0.1, ProvenNorms(SURELY, 10), effort="most")


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(2).long(), torch.zeros(3, 1).long()], ids=str)
def test_labels_of_another_shape_or_kind_are_refused(labels, effort):
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double(), torch.rand(3, 2).double()
    with pytest.raises((TypeError, ValueError), match=r"one label per image, \(N,\) int64"):
        prove(model, x, labels, 0.1, ProvenNorms(SURELY, 10), effort=effort)


def test_the_planned_norms_are_enough_for_so_many_radii(net, effort):
    model, x, y = net
    norms = proven_norms(model, x, IMAGES, radii=2)
    for epsilon in (0.1, 0.3):
        prove(model, x, y, epsilon, norms, effort=effort)


# --- hand-made worst cases -------------------------------------------------------------------------------------------


def test_a_nan_weight_certifies_nothing(effort):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].weight.data[0, 0] = torch.nan
    assert not certify(net, torch.rand(3, 4), torch.tensor([0, 1, 0]), 0.0, effort=effort).any()


def test_what_underflows_on_the_way_certifies_nothing(effort):
    scales = [1e-200, 1e-200, 1e200, 1e200]
    net = stack_of(*[([[s]], [0.0]) for s in scales], ([[0.0], [1.0]], [0.5, 0.0]))
    # At 0.7 the answer is 1.
    assert not certify(net, torch.tensor([[0.4]]), torch.tensor([0]), 0.3, effort=effort).any()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_no_float32_network_that_overflows_or_underflows_is_certified(scale, effort):
    net = stack_of(([[scale]], [0.0]), ([[scale]], [0.0]), ([[1.0], [0.0]], [0.0, 0.0]))
    x, y = torch.tensor([[0.5]]).double(), torch.tensor([0])
    norms = ProvenNorms(SURELY, 100, deployed="float32")
    assert not (prove(net, x, y, 0.1, norms, effort=effort).worst_margin > 0).any()


@pytest.mark.parametrize("second", [1e6, 1.0, 1e-6])
@pytest.mark.parametrize("first", [1e6, 1.0, 1e-6])
def test_a_linear_net_is_certified_up_to_the_nearest_plane_and_no_further(first, second, effort):
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    model = linear_net((first * rotation, torch.zeros(8)), (second * torch.randn(4, 8), torch.zeros(4)))
    x = torch.rand(6, 8, dtype=torch.float64)
    logits, weight = model(x), model[1].weight
    y = logits.argmax(dim=1)
    slopes = first * (weight[y][:, None] - weight).norm(dim=2)
    distances = (logits.gather(1, y[:, None]) - logits) / slopes
    distance = distances.scatter(1, y[:, None], torch.inf).amin(dim=1)
    assert certify(model, x, y, distance * (1 - 1e-4), effort=effort).all()
    assert not certify(model, x, y, distance * (1 + 1e-4), effort=effort).any()


@pytest.mark.parametrize("ulps", [1, 4, 16])
def test_a_margin_of_a_few_ulps_is_not_certified(ulps, effort):
    model = linear_net((torch.eye(2), torch.tensor([ulps * 2.0**-52, 0])))
    assert not certify(model, torch.ones(1, 2).double(), torch.tensor([0]), 0, effort=effort).any()


@pytest.mark.parametrize("y", [0, 1])
def test_duplicated_logits_are_a_tie_that_is_never_certified(y, effort):
    weight = torch.randn(3, 6)
    weight[1] = weight[0]
    model = linear_net((torch.randn(6, 6), torch.rand(6)), (weight, torch.tensor([5.0, 5.0, 0.0])))
    assert not certify(model, torch.rand(4, 6).double(), torch.full((4,), y), 0, effort=effort).any()


def constant_net(kind):
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).requires_grad_(False)
    model[2].bias.fill_(-1e3)
    model[5].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    if kind == "zero weights":
        for position in (0, 2, 5):
            model[position].weight.zero_()
    return model


@pytest.mark.parametrize("kind", ["dead layer", "zero weights"])
def test_a_net_that_always_answers_the_same_is_certified_for_that_answer_only(kind, effort):
    model, x = constant_net(kind), torch.rand(3, 1, 6, 6)
    assert certify(model, x, torch.tensor([0, 1, 2]), 1.0, effort=effort).tolist() == [False, True, False]


def test_at_epsilon_zero_the_certified_images_are_the_right_ones(net, effort):
    model, x, y = net
    assert torch.equal(certify(model, x, y, 0, effort=effort), model(x).argmax(dim=1) == y)


@pytest.mark.parametrize("epsilon", [0, *RADII])
def test_a_wrong_label_is_never_certified(net, epsilon, effort):
    model, x, _ = net
    assert not certify(model, x, (model(x).argmax(dim=1) + 1) % 10, epsilon, effort=effort).any()


def breakable(matrix, epsilon):
    """A net whose answer at 0 is 0, the point in the ball where it is not, for a matrix of norm 1."""
    left, _, right = torch.linalg.svd(matrix.double())
    last = torch.stack([left[:, 0], torch.zeros(len(matrix))])
    model = linear_net((matrix, torch.zeros(len(matrix))), (last, torch.tensor([0.99 * epsilon, 0.0])))
    return model, -epsilon * right[:1]


def nearly_equal_values():
    left, right = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0] for _ in range(2))
    return left * torch.linspace(1, 0.9, 40, dtype=torch.float64) @ right


MISLEADING = {
    "start vector orthogonal to the leading one": (
        lambda: torch.diag(torch.tensor([1.0, 0.5])),
        lambda: PowerIteration(100, global_vectors={0: torch.tensor([[0.0, 1.0]], dtype=torch.float64)}),
    ),
    "nearly equal singular values and few iterations": (nearly_equal_values, lambda: PowerIteration(3)),
}


@pytest.mark.parametrize("case", MISLEADING)
def test_where_the_estimate_certifies_an_image_that_falls_the_proof_does_not(case, effort):
    matrix, estimate = MISLEADING[case]
    model, broken = breakable(matrix(), epsilon=0.5)
    x, y = torch.zeros_like(broken), torch.tensor([0])
    assert broken.norm() <= 0.5 * (1 + 1e-12)
    assert (model(x).argmax(), model(broken).argmax()) == (0, 1)
    assert certify(model, x, y, 0.5, estimate()).all()
    assert not certify(model, x, y, 0.5, effort=effort).any()


# --- what is deployed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", RADII)
def test_what_holds_in_float32_costs_margin(proof_of, effort, epsilon):
    exact, deployed = (proof_of(epsilon, effort, kind) for kind in ("exact", "float32"))
    assert (deployed.worst_margin > 0).sum() <= (exact.worst_margin > 0).sum()
    # The dual's multipliers are found by search, which ends elsewhere.
    same = (deployed.hidden_lipschitz == exact.hidden_lipschitz) & (deployed.stage == exact.stage)
    same &= torch.tensor([not is_by_dual(name) for name in (*exact.stages, "open")])[exact.stage]
    assert same.any()
    if effort == "product":
        assert (deployed.worst_margin < exact.worst_margin)[same].all()
        assert (deployed.worst_margin > exact.worst_margin - 0.1)[same].all()


@pytest.mark.parametrize("epsilon", RADII)
def test_no_float32_image_of_the_ball_changes_a_certified_float32_answer(net, proof_of, effort, epsilon):
    model, x, y = net
    certified = proof_of(epsilon, effort, "float32").worst_margin > 0
    # Room for the rounding of the points themselves.
    points = points_in_the_ball(model, x, epsilon * (1 - 1e-5))[:, certified].float()
    assert ((points - x[certified]).flatten(2).norm(dim=2) <= epsilon).all()
    model.float()
    answers = model(points.flatten(0, 1)).argmax(dim=1).view(points.shape[:2])
    model.double()
    assert (answers == y[certified]).all()


@pytest.mark.parametrize("layer", [Normalize([0.5], [0.2]), nn.BatchNorm2d(1)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("place", [0, 1])
def test_layers_without_a_rounding_bound_are_refused_for_float32(layer, place, effort):
    layers = [nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(36, 3)]
    layers.insert(place, layer)
    model = nn.Sequential(*layers).double().eval()
    x, y = torch.rand(2, 1, 6, 6).double(), torch.zeros(2, dtype=torch.long)
    prove(model, x, y, 0.1, ProvenNorms(SURELY, 1000), effort=effort)
    with pytest.raises(TypeError, match=type(layer).__name__):
        prove(model, x, y, 0.1, ProvenNorms(SURELY, 1000, deployed="float32"), effort=effort)
