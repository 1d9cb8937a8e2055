"""Networks with branches: what adds up and what stands side by side, against sampled and gradient-ascended points."""

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    CLASSES,
    IMAGES,
    ExactLocalNorms,
    ExactNorms,
    ExactProvenNorms,
    assert_ball_and_box_hold,
    attack,
    dense_matrix,
    images,
    norm_of,
    settled,
    walk,
)
from torch import nn

from local_bound import (
    Graph,
    PowerIteration,
    ProvenNorms,
    certified_radius,
    certify,
    local_lipschitz,
    propagate,
    prove,
    proven_norms,
    worst_logits,
    worst_margin,
)
from locallip.bound.composites import Branch, Scaling, Sum
from locallip.bound.stages import is_by_dual

SHAPE = (1, 5, 5)
EPSILON = 0.3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """A stem, a block of some kind on maps (3, 5, 5), and a head; `hidden` gives what the last layer sees."""

    channels = 3

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(3)
        self.fc, self.out = nn.Linear(25 * self.channels, 8), nn.Linear(8, CLASSES)
        settled(self)

    def hidden(self, x):
        return F.relu(self.fc(self.block(F.relu(self.stem(x))).flatten(1)))

    def forward(self, x):
        return self.out(self.hidden(x))


class Residual(Net):
    def block(self, x):
        return F.relu(x + self.b(F.relu(self.a(x))))


class PreActivation(Net):
    def block(self, x):
        x = x + self.b(F.relu(self.norm(self.a(F.relu(x)))))
        return x - 0.5 * self.c(F.relu(x))


class Inception(Net):
    channels = 9

    def block(self, x):
        return torch.cat([self.a(x), F.relu(self.b(x)), F.max_pool2d(x, 3, 1, 1)], dim=1)


class DenselyConnected(Net):
    channels = 9

    def block(self, x):
        more = torch.tanh(self.a(x))
        return torch.cat([torch.cat([x, more], dim=1), self.b(x + more)], dim=1)


class Affine(Net):
    def block(self, x):
        x = F.relu(x + self.a(x))
        return F.relu(self.b(x) + self.norm(self.c(self.a(x))))


class Twice(Net):
    def block(self, x):
        return F.relu(x + x) + self.a(self.a(x))


class Split(Net):
    def block(self, x):
        y = self.a(x)
        return F.relu(y) - F.relu(-y)


KINDS = [Residual, PreActivation, Inception, DenselyConnected, Affine, Twice, Split]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def model(request):
    return request.param()


@torch.no_grad()
def points(model, x, epsilon):
    """(S, N, ...) in the ball: random ones, and ends of gradient ascent."""
    directions = torch.randn(40, *x.shape).double()
    directions *= epsilon / directions.flatten(2).norm(dim=2)[..., None, None, None]
    directions[::2] *= torch.rand(20, 1, 1, 1, 1).double()
    with torch.enable_grad():
        ascents = [attack(model, x, epsilon, target, sign) for target in range(CLASSES) for sign in (1, -1)]
    return x + torch.cat([directions, *ascents])


def assert_the_bound_holds(model, x, bound, epsilon, moved):
    with torch.no_grad():
        hidden = model.hidden(moved.flatten(0, 1)).view(*moved.shape[:2], -1)
        torch.testing.assert_close(bound.center, model.hidden(x))
        torch.testing.assert_close(bound.logits, model(x))
    assert_ball_and_box_hold(bound, hidden)
    slopes = (hidden - bound.center).norm(dim=2) / (moved - x).flatten(2).norm(dim=2)
    assert (slopes <= bound.hidden_lipschitz * (1 + 1e-6)).all()
    assert (bound.hidden_lipschitz <= bound.global_hidden_lipschitz * (1 + 1e-6)).all()
    for position, varying in bound.varying.items():
        assert varying.shape[0] == len(x), position


@pytest.mark.parametrize("epsilon", [0.02, EPSILON])
@pytest.mark.parametrize("norms", [ExactNorms(), ExactLocalNorms(), ExactProvenNorms()], ids=lambda n: type(n).__name__)
def test_no_point_leaves_ball_or_box_behind_branches(model, epsilon, norms):
    x = images(*SHAPE)
    bound = propagate(model, x, epsilon, norms)
    assert_the_bound_holds(model, x, bound, epsilon, points(model, x, epsilon))


def test_the_ball_alone_holds_too_and_is_the_global_bound(model):
    x = images(*SHAPE)
    alone = propagate(model, x, EPSILON, PowerIteration(300), box=False)
    torch.testing.assert_close(alone.radius, (EPSILON * alone.global_hidden_lipschitz).expand(IMAGES))
    hidden = model.hidden(points(model, x, EPSILON).flatten(0, 1)).view(-1, IMAGES, 8)
    assert ((hidden - alone.center).norm(dim=2) <= alone.radius * (1 + 1e-6)).all()


def test_a_box_makes_the_bound_no_larger_than_the_ball_alone(model):
    x, y = images(*SHAPE), torch.arange(IMAGES)
    alone, both = (propagate(model, x, EPSILON, ExactNorms(), box=box) for box in (False, True))
    assert (worst_logits(both, y, 100) <= worst_logits(alone, y, 100) + 1e-6).all()


def test_a_certificate_holds_against_an_attack_on_its_label(model):
    x = images(*SHAPE)
    y = model(x).argmax(dim=1)
    radius = certified_radius(model, x, tolerance=1e-2)
    assert radius.max() > 0
    for target in range(CLASSES):
        for sign in (1, -1):
            for step in attack(model, x, 1.0, target, sign, steps=4):
                moved = x + step * (radius * 0.999 / step.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
                assert (model(moved).argmax(dim=1) == y).all()


def test_lipschitz_constants_of_the_logits_are_above_all_slopes(model):
    x = images(*SHAPE)
    found = local_lipschitz(model, x, EPSILON)
    moved = points(model, x, EPSILON)
    with torch.no_grad():
        logits = model(moved.flatten(0, 1)).view(-1, IMAGES, CLASSES)
        slopes = (logits - model(x)).norm(dim=2) / (moved - x).flatten(2).norm(dim=2)
    assert (slopes <= found.lipschitz).all()
    jacobians = torch.autograd.functional.jacobian(lambda x: model(x).sum(dim=0), x)  # (K, N, ...)
    norms = torch.linalg.matrix_norm(jacobians.transpose(0, 1).flatten(2), ord=2)
    assert (norms <= found.lipschitz).all()
    assert (found.lipschitz <= found.global_lipschitz * (1 + 1e-9)).all()


def test_rounding_is_allowed_for_where_branches_meet(model):
    x = images(*SHAPE)
    y = model(x).argmax(dim=1)
    exact = proven_norms(model, x, IMAGES, seed=1)
    plain = prove(model, x, y, 0.01, exact, effort="product").worst_margin
    assert (plain <= worst_margin(worst_logits(propagate(model, x, 0.01, ExactLocalNorms()), y, 1000), y)).all()


@pytest.mark.parametrize("kind", [Residual, Twice, Split], ids=lambda kind: kind.__name__)
def test_single_precision_costs_a_little_behind_branches(kind):
    model, x = kind(), images(*SHAPE)
    y = model(x).argmax(dim=1)
    norms = [proven_norms(model, x, IMAGES, seed=1, deployed=deployed) for deployed in ("exact", "float32")]
    exact, single = (prove(model, x, y, 0.01, n, effort="product").worst_margin for n in norms)
    assert (single < exact).all()
    assert (single > exact - 1e-2).all()
    bound = propagate(model, x, 0.01, norms[1])
    computed = model.float()(x.float()).double()
    assert ((computed - bound.logits).abs() <= bound.deployed_rounding).all()


def test_batch_norm_in_a_branch_has_no_bound_in_single_precision():
    model, x = PreActivation(), images(*SHAPE)
    with pytest.raises(TypeError, match="rounding in float32"):
        propagate(model, x, 0.01, proven_norms(model, x, IMAGES, deployed="float32"))


def test_weights_that_are_computed_have_no_bound_in_single_precision():
    class Computing(Residual):
        def block(self, x):
            return F.relu(x + self.b(F.conv2d(x, (self.a.weight + 1e4) - 1e4, padding=1)))

    model, x = Computing(), images(*SHAPE)
    y = model(x).argmax(dim=1)
    assert prove(model, x, y, 0.01, proven_norms(model, x, IMAGES)).stages
    with pytest.raises(TypeError, match="rounding in float32 is not bounded; compute them once"):
        prove(model, x, y, 0.01, proven_norms(model, x, IMAGES, deployed="float32"))


def test_constants_that_are_kept_have_a_bound_in_single_precision():
    class Centred(Residual):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((1,), 0.3, dtype=torch.float64))

        def forward(self, x):
            return super().forward((x - self.mean[:, None, None]) / 0.3)

    model, x = Centred(), images(*SHAPE)
    bound = propagate(model, x, 0.01, proven_norms(model, x, IMAGES, deployed="float32"))
    computed = model.float()(x.float()).double()
    assert ((computed - bound.logits).abs() <= bound.deployed_rounding).all()


def test_a_narrow_ball_eliminates_more_than_a_wide_one(model):
    x = images(*SHAPE)
    narrow, wide = (propagate(model, x, epsilon, ExactNorms()) for epsilon in (0.02, 2.0))
    count = [sum(mask.sum() for mask in bound.varying.values()) for bound in (narrow, wide)]
    assert 0 < count[0] < count[1]


# --- affine residuals ------------------------------------------------------------------------------------------------


def test_affine_branches_are_one_operator_with_one_norm():
    model, x = Affine(), images(*SHAPE)
    graph = Graph.of(model, x)
    operators = graph.operators(x)
    sums = [operator for operator in operators if isinstance(operator, Sum)]
    assert len(sums) == 2
    assert [operator.position for operator in operators] == ["stem", "add()", "add()#2", "fc"]
    blocks = (lambda x: x + model.a(x), lambda x: model.b(x) + model.norm(model.c(model.a(x))))
    for operator, block in zip(sums, blocks):
        expected = dense_matrix(block, torch.Size([3, 5, 5]))
        torch.testing.assert_close(dense_matrix(operator.apply, operator.input_shape), expected)
        norm = walk(model, x, 0.1).global_norms[operator.position]
        torch.testing.assert_close(norm, norm_of(expected), rtol=1e-3, atol=0)


class Scaled(nn.Module):
    """b(x) s + a(x), or b(x) + a(x s): the same parts in the same order, in other branches."""

    def __init__(self, scaled_behind):
        super().__init__()
        self.scaled_behind = scaled_behind
        self.a, self.b, self.out = (nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(3))
        weights = torch.tensor([[[0.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        for layer, weight in zip((self.a, self.b, self.out), weights.double()):
            layer.weight.data = weight
        self.register_buffer("scale", torch.tensor([0.01, 10.0], dtype=torch.float64))

    def forward(self, x):
        hidden = self.b(x) * self.scale + self.a(x) if self.scaled_behind else self.b(x) + self.a(x * self.scale)
        return self.out(F.relu(hidden))


def test_norms_of_a_sum_are_not_taken_for_those_of_another_whose_branches_end_elsewhere():
    norms = ProvenNorms(1e-6, planned=1000, seed=0)
    x, y = torch.tensor([[0.5, 0.045]], dtype=torch.float64), torch.tensor([0])
    certify(Scaled(True).eval(), x, y, 0.01, certificate=norms)
    assert Scaled(False)(x + torch.tensor([0.0, 0.0099])).argmax() == 1
    assert not certify(Scaled(False).eval(), x, y, 0.01, certificate=norms)


def test_norms_of_a_sum_are_not_taken_for_those_of_another_with_other_coefficients():
    def branches(coefficient):
        one = Scaling(torch.ones(1), None, "a", torch.Size([2]))
        return Sum((Branch((one,)), Branch((one,), coefficient)), "a", torch.Size([2]), torch.Size([2]))

    assert branches(1.0).geometry() == branches(1.0).geometry()
    assert branches(1.0).geometry() != branches(10.0).geometry()


def test_local_norms_of_affine_residuals_are_those_of_masked_matrices():
    model, x = Affine(), images(*SHAPE)
    bound = propagate(model, x, 0.05, PowerIteration(2000))
    matrix = dense_matrix(lambda x: x + model.a(x), torch.Size([3, 5, 5]))
    rows, columns = (mask.flatten(1) for mask in bound.masks["add()"])
    assert not rows.all()
    assert not columns.all()
    true = torch.linalg.matrix_norm(rows[:, :, None] * matrix * columns[:, None, :], ord=2)
    torch.testing.assert_close(bound.local_norms["add()"], true, rtol=1e-4, atol=0)


def test_the_dual_is_asked_about_chains_of_affine_residuals():
    model, x = Affine(), images(*SHAPE)
    y = model(x).argmax(dim=1)
    radii = certified_radius(model, x, tolerance=1e-2), certified_radius(model, x, tolerance=1e-2, effort="product")
    assert (radii[0] > 1.05 * radii[1]).all()
    proof = prove(model, x, y, 1.5 * radii[1], proven_norms(model, x, IMAGES, seed=1))
    assert is_by_dual(proof.stages[-1])


@pytest.mark.parametrize("kind", [Residual, Inception], ids=lambda kind: kind.__name__)
def test_elsewhere_the_proof_says_that_the_product_alone_has_answered(kind):
    model, x = kind(), images(*SHAPE)
    proof = prove(model, x, model(x).argmax(dim=1), 0.01, proven_norms(model, x, IMAGES, seed=1))
    assert not any(map(is_by_dual, proof.stages))


def test_branches_that_join_only_activations_add_their_constants():
    model, x = Residual(), images(*SHAPE)
    found = propagate(model, x, EPSILON, ExactNorms())
    norms = found.global_norms
    expected = norms["stem"] * (1 + norms["a"] * norms["b"]) * norms["fc"]
    torch.testing.assert_close(found.global_hidden_lipschitz, expected)


def test_what_stands_side_by_side_has_the_root_of_the_sum_of_squares():
    class Beside(Net):
        channels = 6

        def block(self, x):
            return torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)

    model, x = Beside(), images(*SHAPE)
    found = propagate(model, x, EPSILON, ExactNorms())
    norms = found.global_norms
    expected = norms["stem"] * (norms["a"] ** 2 + norms["b"] ** 2).sqrt() * norms["fc"]
    torch.testing.assert_close(found.global_hidden_lipschitz, expected)


def test_a_linear_layer_that_two_layers_see_keeps_its_rows():
    model, x = Split(), images(*SHAPE)
    bound = propagate(model, x, 0.02, ExactNorms())
    assert bound.masks["a"][0] is None
    assert not bound.masks["stem"][0].all()


def test_certificates_of_one_image_and_of_many_agree(model):
    x = images(*SHAPE)
    y = model(x).argmax(dim=1)
    together = certify(model, x, y, 0.02, ExactLocalNorms())
    apart = torch.cat([certify(model, x[i : i + 1], y[i : i + 1], 0.02, ExactLocalNorms()) for i in range(IMAGES)])
    assert torch.equal(together, apart)


def test_gradients_flow_through_branches(model):
    x, y = images(*SHAPE), torch.arange(IMAGES)
    loss = F.cross_entropy(worst_logits(propagate(model, x, 0.1, PowerIteration(20)), y), y)
    loss.backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"stem.weight", "a.weight", "fc.weight", "out.weight"} <= used
