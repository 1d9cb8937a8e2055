"""Every rule: its layer against what it says that the layer is, and what has none."""

import functools
import inspect
import re

import pytest
import torch
from conftest import ROOT
from contracts_of_layers import ActivationRuleContract, LinearRuleContract, RuleContract
from oracles import (
    CLASSES,
    ENTRIES,
    IMAGES,
    MAPS,
    assert_ball_and_box_hold,
    clipped_maxmin,
    clipped_relu,
    dense_network,
    images,
    outputs_of,
    points_in_the_ball,
    settled,
    walk,
)
from torch import nn

from local_bound import (
    Elementwise,
    Normalize,
    PowerIteration,
    certified_radius,
    certify,
    local_lipschitz,
    propagate,
    rule,
)
from locallip.bound import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestConvolution(LinearRuleContract):
    def create(self):
        return [nn.Conv2d(2, 3, 3, stride=2, padding=1)]


class TestConvolutionInGroups(LinearRuleContract):
    def create(self):
        return [nn.Conv2d(2, 4, 3, groups=2)]


class TestConvolutionWithDilation(LinearRuleContract):
    def create(self):
        return [nn.Conv2d(2, 3, 2, stride=2, dilation=(2, 3))]


class TestConvolutionToTheSameSize(LinearRuleContract):
    def create(self):
        return [nn.Conv2d(2, 2, (3, 5), padding="same", dilation=(2, 1))]


class TestDense(LinearRuleContract):
    shape = ENTRIES

    def create(self):
        return [nn.Linear(12, 9)]


class TestPooling(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(2)]


class TestPoolingWithStride(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(3, stride=2)]


class TestPoolingWithPadding(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(3, stride=2, padding=1)]


class TestRectangularPooling(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d((2, 4), stride=(1, 3), padding=(0, 2))]


class TestPoolingThatCountsNoPaddingWhereThereIsNone(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(2, count_include_pad=False)]


class TestBatchNorm1d(LinearRuleContract):
    shape = ENTRIES
    training_matters = True

    def create(self):
        return [nn.BatchNorm1d(12)]


class TestBatchNorm1dWithoutWeights(LinearRuleContract):
    shape = ENTRIES
    training_matters = True

    def create(self):
        return [nn.BatchNorm1d(12, affine=False)]


class TestBatchNorm2d(LinearRuleContract):
    training_matters = True

    def create(self):
        return [nn.BatchNorm2d(2)]


class TestBatchNorm2dWithoutWeights(LinearRuleContract):
    training_matters = True

    def create(self):
        return [nn.BatchNorm2d(2, affine=False)]


class TestDenseWithBatchNorm(LinearRuleContract):
    shape = ENTRIES
    training_matters = True

    def create(self):
        return [nn.Linear(12, 9), nn.BatchNorm1d(9)]


class TestDenseWithBatchNormAndNoBias(LinearRuleContract):
    shape = ENTRIES
    training_matters = True

    def create(self):
        return [nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9)]


class TestConvolutionWithBatchNorm(LinearRuleContract):
    training_matters = True

    def create(self):
        return [nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)]


class TestConvolutionWithBatchNormWithoutWeights(LinearRuleContract):
    training_matters = True

    def create(self):
        return [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)]


class TestNormalize(LinearRuleContract):
    def create(self):
        return [Normalize([0.3, 0.6], [0.5, 0.2])]


class TestNormalizeWithOneNumberForAll(LinearRuleContract):
    def create(self):
        return [Normalize([0.3], [0.5])]


class TestReLU(ActivationRuleContract):
    def create(self):
        return [nn.ReLU()]


class TestClippedReLU(ActivationRuleContract):
    def create(self):
        return [clipped_relu(*MAPS)]


class TestClippedMaxMin(ActivationRuleContract):
    def create(self):
        return [clipped_maxmin(*MAPS)]


class TestIdentity(RuleContract):
    def create(self):
        return [nn.Identity()]


class TestDropout(RuleContract):
    training_matters = True

    def create(self):
        return [nn.Dropout(0.9)]


class TestDropout1d(RuleContract):
    shape = ENTRIES
    training_matters = True

    def create(self):
        return [nn.Dropout1d(0.9)]


class TestDropout2d(RuleContract):
    training_matters = True

    def create(self):
        return [nn.Dropout2d(0.9)]


class TestFlatten(RuleContract):
    def create(self):
        return [nn.Flatten()]


def test_every_rule_has_its_tests():
    tested = {type(layer) for contract in _contracts(RuleContract) for layer in contract().create()}
    folded = {rules.BatchNormed}
    assert tested | folded == set(rules._RULES)


def _contracts(kind):
    """All classes below that make layers."""
    for below in kind.__subclasses__():
        if "create" in vars(below):
            yield below
        yield from _contracts(below)


# --- layers that do nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind_an_activation", [False, True], ids=["first", "behind a ReLU"])
@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.9), nn.Dropout1d(0.9), nn.Dropout2d(0.9)])
def test_layers_that_do_nothing_change_nothing(layer, behind_an_activation):
    before = [nn.Linear(12, 8), nn.ReLU()] if behind_an_activation else []
    behind, x = nn.Linear(8 if before else 12, CLASSES), images(12)
    with_it, without = (walk(settled(*before, *middle, behind), x, 0.2) for middle in ([layer], []))
    for name in ("logits", "lower", "upper", "radius"):
        torch.testing.assert_close(getattr(with_it, name), getattr(without, name))
    assert list(with_it.local_norms) == list(without.local_norms)


# --- what is refused -------------------------------------------------------------------------------------------------


class MyReLU(nn.ReLU):
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


def test_a_linear_layer_on_maps_is_refused():
    with pytest.raises(TypeError, match=r"Linear.*position 0.*Flatten"):
        walk(nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(36, 3)).double(), images(1, 6, 6), 0.1)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout()], ids=lambda layer: type(layer).__name__)
def test_training_mode_is_refused_where_it_matters(layer):
    model = dense_network(layer, nn.ReLU())
    with pytest.raises(ValueError, match=r"position \d.*training mode"):
        walk(model, images(6), 0.1)
    walk(model.eval(), images(6), 0.1)


PUBLIC = {
    "local_lipschitz": lambda model, x: local_lipschitz(model, x, 0.1),
    "certify": lambda model, x: certify(model, x, torch.zeros(IMAGES, dtype=torch.long), 0.1),
    "certified_radius": certified_radius,
    "certified_radius, estimated": functools.partial(certified_radius, certificate="estimate"),
}


@pytest.fixture(params=PUBLIC)
def ask(request):
    """Each of the public functions, as a question about a network and images."""
    return PUBLIC[request.param]


def network_with(layer):
    """A layer between 12 entries and 12 entries."""
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), layer, nn.Linear(12, CLASSES)).double()


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(12), nn.Dropout(), nn.Dropout1d(), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(12))],
    ids=["BatchNorm1d", "Dropout", "Dropout1d", "in a nest"],
)
def test_training_mode_is_refused_and_nothing_is_learnt_from_the_images(ask, layer):
    model = network_with(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"position 2.*training mode"):
        ask(model, images(12))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_norm_in_training_mode_behind_a_linear_layer_is_refused(ask):
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)).double()
    with pytest.raises(ValueError, match="training mode"):
        ask(model, images(12))


SUPPORTED = {nn.Conv2d, nn.Linear, nn.ReLU, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Flatten, nn.Identity}
SUPPORTED |= {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Sequential}
OTHERS = [
    kind
    for _, kind in sorted(inspect.getmembers(nn, inspect.isclass))
    if issubclass(kind, nn.Module) and kind not in SUPPORTED
]


def blank(kind):
    """An instance without its constructor's arguments; only its type is looked at."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_every_other_layer_of_pytorch_is_refused_by_its_name(kind):
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), blank(kind), nn.Linear(12, CLASSES))
    with pytest.raises(TypeError, match=rf"\b{kind.__name__} at position 2"):
        walk(model, torch.rand(IMAGES, 12), 0.1)


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.LayerNorm(12), nn.Sequential(nn.Tanh())])
def test_an_unknown_layer_is_refused_by_every_function(ask, layer):
    with pytest.raises(TypeError, match="position 2"):
        ask(network_with(layer).eval(), images(12))


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def test_a_residual_block_is_refused_by_its_name(ask):
    with pytest.raises(TypeError, match="Residual at position 2"):
        ask(network_with(Residual(nn.Linear(12, 12), nn.ReLU())), images(12))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.AvgPool2d(3, ceil_mode=True),
        nn.AvgPool2d(2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.Conv2d(2, 2, 2, padding="same"),
        nn.Flatten(2),
    ],
    ids=[
        "batch statistics",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
        "same for an even kernel",
        "Flatten",
    ],
)
def test_settings_without_a_rule_are_refused_by_the_name_of_the_layer(ask, layer):
    model = nn.Sequential(nn.ReLU(), layer, nn.Flatten(), nn.LazyLinear(CLASSES)).double().eval()
    model(images(*MAPS))
    with pytest.raises(TypeError, match=f"{type(layer).__name__} at position 1"):
        ask(model, images(*MAPS))


def test_batch_statistics_behind_a_linear_layer_are_refused(ask):
    model = network_with(nn.Identity())
    model.insert(1, nn.BatchNorm1d(12, track_running_stats=False))
    with pytest.raises(TypeError, match="running statistics"):
        ask(model.double().eval(), images(12))


# --- rules of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def scratch_rules(monkeypatch):
    """Rules registered in a test are gone behind it."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def code_of_the_readme():
    section = re.search(r"^## A network of your own$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S)


def test_the_code_of_the_readme_runs_as_it_stands(scratch_rules):
    namespace = {}
    blocks = code_of_the_readme()
    assert len(blocks) == 2
    for block in blocks:
        exec(block, namespace)
    assert namespace["bounds"].lipschitz.shape == (4,)
    assert nn.Hardtanh in rules._RULES


def test_the_rule_of_the_readme_is_sound(scratch_rules):
    exec(code_of_the_readme()[1], {"nn": nn})
    model = settled(nn.Linear(12, 8), nn.Hardtanh(-0.2, 0.3), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, CLASSES))
    x = images(12)
    bound, points = walk(model, x, 0.2), points_in_the_ball(model, x, 0.2)
    clipped = outputs_of(model, points, 2)
    assert_ball_and_box_hold(bound, outputs_of(model, points, -1))
    assert not bound.varying[1].all()
    assert (clipped == clipped[0])[:, ~bound.varying[1]].all()


def test_a_rule_counts_for_its_very_type_only(scratch_rules):
    class Mine(nn.ReLU):
        """May do anything."""

    rule(Mine)(rules._RULES[nn.Identity])
    walk(network_with(Mine()), images(12), 0.1)
    with pytest.raises(TypeError, match="Yours at position 2"):
        walk(network_with(type("Yours", (Mine,), {})()), images(12), 0.1)


def test_a_rule_for_a_layer_that_works_in_place_leaves_the_box_whole(scratch_rules):
    @rule(nn.LeakyReLU)
    def leaky(layer, place):
        return Elementwise(layer, lambda lower, upper: torch.ones_like(lower, dtype=torch.bool))

    torch.manual_seed(0)
    x = torch.rand(3, 6)
    boxes = []
    for inplace in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1, inplace), nn.Linear(5, 4), nn.LeakyReLU(0.1, inplace))
        bound = propagate(nn.Sequential(*net, nn.Linear(4, 3)), x, 0.3, PowerIteration(50))
        boxes.append(torch.stack([bound.lower, bound.center, bound.upper]))
    assert torch.equal(*boxes)
