"""Every rule: its layer against what it says that the layer is, and what has none."""

import functools
import re

import pytest
import torch
from conftest import ROOT
from contracts_of_layers import ActivationRuleContract, LinearRuleContract, RuleContract
from oracles import (
    CLASSES,
    ENTRIES,
    MAPS,
    SIGNALS,
    VOLUMES,
    assert_ball_and_box_hold,
    clipped_maxmin,
    clipped_relu,
    images,
    network_with,
    outputs_of,
    points_in_the_ball,
    settled,
    walk,
)
from torch import nn

from local_bound import (
    Arithmetic,
    Clip,
    Elementwise,
    Graph,
    GroupSort,
    MaxMin,
    Normalize,
    PowerIteration,
    check_rule,
    propagate,
    rule,
)
from locallip.bound import calls, rules
from locallip.bound.seen import name_of


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


class TestConvolutionOfSignals(LinearRuleContract):
    shape = SIGNALS

    def create(self):
        return [nn.Conv1d(2, 3, 3, stride=2, padding=1)]


class TestConvolutionOfSignalsToTheSameSize(LinearRuleContract):
    shape = SIGNALS

    def create(self):
        return [nn.Conv1d(2, 4, 5, padding="same", groups=2)]


class TestConvolutionOfVolumes(LinearRuleContract):
    shape = VOLUMES

    def create(self):
        return [nn.Conv3d(2, 3, 2, stride=(1, 2, 2))]


class TestTransposedConvolution(LinearRuleContract):
    def create(self):
        return [nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2)]


class TestTransposedConvolutionWithDilation(LinearRuleContract):
    def create(self):
        return [nn.ConvTranspose2d(2, 3, (2, 3), dilation=2, bias=False)]


class TestTransposedConvolutionOfSignals(LinearRuleContract):
    shape = SIGNALS

    def create(self):
        return [nn.ConvTranspose1d(2, 3, 4, stride=3, padding=1)]


class TestTransposedConvolutionOfVolumes(LinearRuleContract):
    shape = VOLUMES

    def create(self):
        return [nn.ConvTranspose3d(2, 1, 2)]


class TestPoolingOfSignals(LinearRuleContract):
    shape = SIGNALS

    def create(self):
        return [nn.AvgPool1d(3, stride=2)]


class TestPoolingOfVolumes(LinearRuleContract):
    shape = VOLUMES

    def create(self):
        return [nn.AvgPool3d(2)]


class TestPoolingWithWindowsThatStandOut(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(4, stride=3, padding=1, ceil_mode=True)]


class TestPoolingThatCountsNoPadding(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)]


class TestPoolingThatCountsNoPaddingWithWindowsThatStandOut(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(4, stride=3, padding=1, ceil_mode=True, count_include_pad=False)]


class TestPoolingWithADivisor(LinearRuleContract):
    def create(self):
        return [nn.AvgPool2d(3, stride=2, divisor_override=2)]


class TestAdaptivePooling(LinearRuleContract):
    def create(self):
        return [nn.AdaptiveAvgPool2d(3)]


class TestAdaptivePoolingThatDoesNotDivide(LinearRuleContract):
    def create(self):
        return [nn.AdaptiveAvgPool2d((4, None))]


class TestAdaptivePoolingToMoreThanThereIs(LinearRuleContract):
    def create(self):
        return [nn.AdaptiveAvgPool2d(7)]


class TestAdaptivePoolingOfSignals(LinearRuleContract):
    shape = SIGNALS

    def create(self):
        return [nn.AdaptiveAvgPool1d(5)]


class TestAdaptivePoolingOfVolumes(LinearRuleContract):
    shape = VOLUMES

    def create(self):
        return [nn.AdaptiveAvgPool3d(2)]


class TestBatchNormOfSignals(LinearRuleContract):
    shape = SIGNALS
    training_matters = True

    def create(self):
        return [nn.BatchNorm1d(2)]


class TestBatchNormOfVolumes(LinearRuleContract):
    shape = VOLUMES
    training_matters = True

    def create(self):
        return [nn.BatchNorm3d(2)]


class TestConvolutionOfSignalsWithBatchNorm(LinearRuleContract):
    shape = SIGNALS
    training_matters = True

    def create(self):
        return [nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)]


class TestTransposedConvolutionWithBatchNorm(LinearRuleContract):
    training_matters = True

    def create(self):
        return [nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4)]


class TestReLU(ActivationRuleContract):
    def create(self):
        return [nn.ReLU()]


class TestClippedReLU(ActivationRuleContract):
    def create(self):
        return [clipped_relu(*MAPS)]


class TestClippedMaxMin(ActivationRuleContract):
    def create(self):
        return [clipped_maxmin(*MAPS)]


class TestReLU6(ActivationRuleContract):
    def create(self):
        return [nn.ReLU6()]


class TestHardtanh(ActivationRuleContract):
    def create(self):
        return [nn.Hardtanh(-0.2, 0.3)]


class TestLeakyReLU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.LeakyReLU(0.1)]


class TestLeakyReLUThatFallsOnTheLeft(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.LeakyReLU(-2.0)]


class TestRandomizedReLU(ActivationRuleContract):
    rests = False
    training_matters = True

    def create(self):
        return [nn.RReLU()]


class TestPReLU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.PReLU()]


class TestPReLUOfChannels(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.PReLU(2, init=1.5)]


class TestPReLUOfEntries(ActivationRuleContract):
    shape = ENTRIES
    rests = False

    def create(self):
        return [nn.PReLU(12)]


class TestSigmoid(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Sigmoid()]


class TestTanh(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Tanh()]


class TestSoftsign(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Softsign()]


class TestTanhshrink(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Tanhshrink()]


class TestLogSigmoid(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.LogSigmoid()]


class TestSoftplus(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Softplus(beta=2)]


class TestELU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.ELU(0.5)]


class TestSteepELU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.ELU(2.0)]


class TestCELU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.CELU(0.5)]


class TestSELU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.SELU()]


class TestGELU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.GELU()]


class TestGELUByTanh(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.GELU(approximate="tanh")]


class TestSiLU(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.SiLU()]


class TestMish(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Mish()]


class TestHardsigmoid(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Hardsigmoid()]


class TestHardswish(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.Hardswish()]


class TestMaxMin(ActivationRuleContract):
    rests = False

    def create(self):
        return [MaxMin()]


class TestGroupSort(ActivationRuleContract):
    shape = ENTRIES
    rests = False

    def create(self):
        return [GroupSort(3)]


class TestMaxPooling(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.MaxPool2d(2)]


class TestOverlappingMaxPooling(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.MaxPool2d(3, stride=1, padding=1)]


class TestMaxPoolingWithDilation(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.MaxPool2d((2, 3), stride=(1, 2), dilation=(3, 1))]


class TestMaxPoolingWithWindowsThatStandOut(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.MaxPool2d(4, stride=3, ceil_mode=True)]


class TestMaxPoolingOfSignals(ActivationRuleContract):
    shape = SIGNALS
    rests = False

    def create(self):
        return [nn.MaxPool1d(3, stride=2)]


class TestMaxPoolingOfVolumes(ActivationRuleContract):
    shape = VOLUMES
    rests = False

    def create(self):
        return [nn.MaxPool3d(2, stride=1)]


class TestAdaptiveMaxPooling(ActivationRuleContract):
    rests = False

    def create(self):
        return [nn.AdaptiveMaxPool2d((4, 2))]


class TestAdaptiveMaxPoolingOfSignals(ActivationRuleContract):
    shape = SIGNALS
    rests = False

    def create(self):
        return [nn.AdaptiveMaxPool1d(5)]


class TestAdaptiveMaxPoolingOfVolumes(ActivationRuleContract):
    shape = VOLUMES
    rests = False

    def create(self):
        return [nn.AdaptiveMaxPool3d(2)]


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


class TestUnflatten(RuleContract):
    def create(self):
        return [nn.Unflatten(1, (1, 2))]


# --- moves of entries ------------------------------------------------------------------------------------------------

MOVES = (
    (SIGNALS, (nn.ZeroPad1d((1, 0)), nn.ConstantPad1d(2, 0.0), nn.ReflectionPad1d(2), nn.ReplicationPad1d((0, 2)))),
    (SIGNALS, (nn.CircularPad1d(1),)),
    (MAPS, (nn.ZeroPad2d((1, 0, -1, 1)), nn.ConstantPad2d(1, 0.0), nn.ReflectionPad2d(1), nn.ReplicationPad2d(2))),
    (MAPS, (nn.CircularPad2d(1), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Unfold(3, padding=1))),
    (MAPS, (nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(size=(7, 9)))),
    ((4, 3, 3), (nn.PixelShuffle(2),)),
)


def _contract_of(layer, shape):
    members = {"shape": shape, "create": lambda self: [layer]}
    return type(f"Test{type(layer).__name__}", (LinearRuleContract,), members)


globals().update({f"Test{type(layer).__name__}": _contract_of(layer, shape) for shape, ls in MOVES for layer in ls})


def test_every_rule_has_its_tests():
    tested = {type(layer) for contract in _contracts(RuleContract) for layer in contract().create()}
    inside = {kind for kind in rules._RULES if kind.__module__ in rules._INTERNAL}  # tested with what they stand for
    assert tested | inside == set(rules._RULES)


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


# --- rules of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def scratch_rules(monkeypatch):
    """Rules registered in a test are gone behind it."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def code_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return python_blocks(re.search(r"^## A network of your own$(.*?)^## ", text, re.M | re.S)[1])


def test_the_code_of_the_readme_runs_as_it_stands(scratch_rules):
    namespace = {}
    blocks = code_of_the_readme()
    assert len(blocks) == 3
    for block in blocks:
        exec(block, namespace)
    assert namespace["bounds"].lipschitz.shape == (4,)
    assert namespace["Capped"] in rules._RULES


def test_the_rule_of_the_readme_is_sound(scratch_rules):
    namespace = {"nn": nn, "torch": torch}
    exec(code_of_the_readme()[2], namespace)
    capped = namespace["Capped"]
    check_rule(capped(0.3), (8,))
    model = settled(nn.Linear(12, 8), capped(0.3), nn.Linear(8, 8), capped(1.0), nn.Linear(8, CLASSES))
    x = images(12)
    bound, points = walk(model, x, 0.2), points_in_the_ball(model, x, 0.2)
    clipped = outputs_of(model, points, 2)
    assert_ball_and_box_hold(bound, outputs_of(model, points, -1))
    assert not bound.varying[1].all()
    assert (clipped == clipped[0])[:, ~bound.varying[1]].all()


def test_the_page_on_adding_a_layer_runs_as_it_stands(scratch_rules):
    blocks = python_blocks((ROOT / "docs" / "adding_a_layer.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert {namespace["Scale"], namespace["Ramp"], namespace["SoftStep"]} <= set(rules._RULES)


def test_a_rule_counts_for_its_very_type_only(scratch_rules):
    class Mine(nn.ReLU):
        """May do anything."""

    rule(Mine)(rules._RULES[nn.Identity])
    model, x = network_with(Mine()), images(12)
    assert 2 in dict(Graph.of(model).meanings(x, Arithmetic()))
    yours = network_with(type("Yours", (Mine,), {})()).eval()
    assert "2.relu()" in dict(Graph.of(yours, x).meanings(x, Arithmetic()))  # by what it calls


def test_a_rule_for_a_layer_that_works_in_place_leaves_the_box_whole(scratch_rules):
    class Leaky(nn.LeakyReLU):
        """With another rule."""

    @rule(Leaky)
    def leaky(layer, place):
        return Elementwise(layer, lambda lower, upper: torch.ones_like(lower, dtype=torch.bool))

    torch.manual_seed(0)
    x = torch.rand(3, 6)
    boxes = []
    for inplace in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), Leaky(0.1, inplace), nn.Linear(5, 4), Leaky(0.1, inplace))
        bound = propagate(nn.Sequential(*net, nn.Linear(4, 3)), x, 0.3, PowerIteration(50))
        boxes.append(torch.stack([bound.lower, bound.center, bound.upper]))
    assert torch.equal(*boxes)


@pytest.mark.parametrize(
    "wrong", [nn.ReLU(), "ReLU", int, lambda layer, place: None], ids=["layer", "name", "other class", "function"]
)
def test_rules_are_for_classes_of_layers_and_nothing_else(scratch_rules, wrong):
    with pytest.raises(TypeError, match=r"as in @rule\(MyLayer\)"):
        rule(nn.Bilinear, wrong)
    assert nn.Bilinear not in rules._RULES


def test_a_rule_without_a_class_is_refused():
    with pytest.raises(TypeError, match="and got none"):
        rule()


def test_no_rule_is_replaced_by_accident(scratch_rules):
    class Mine(nn.Module):
        """One of the user's own."""

    def of_mine(layer, place):
        return Clip(0.0, 1.0)

    with pytest.raises(TypeError, match="ReLU has a rule already"):
        rule(Mine, nn.ReLU)(of_mine)
    assert Mine not in rules._RULES
    rule(Mine)(of_mine)
    rule(type("Other", (nn.Module,), {}))(functools.partial(of_mine))
    rule(Mine)(of_mine)  # as a notebook does that runs a cell again
    with pytest.raises(TypeError, match="Mine has a rule already"):
        rule(Mine)(rules._RULES[nn.Identity])


def test_the_list_of_layers_and_calls_names_all_that_have_rules():
    listed = set(re.findall(r"`([^`\s(]+)`", (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")))
    layers = {kind.__name__ for kind in rules._RULES if kind.__module__.startswith(("torch.", "locallip.bound.layers"))}
    named = {name_of(function).removesuffix("()").strip("_") for function in calls._TABLE}
    other = {"matmul": "@", "getitem": "x[...]", "spmm": "mm"}
    refused = {"maximum", "minimum", "max", "min"}
    assert layers <= listed
    assert {other.get(name, name) for name in named - refused} <= {name.strip("_") for name in listed}
