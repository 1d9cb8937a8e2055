"""Bad input: one line that names what came and the way out, before any work; and nothing of the user's is changed."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from oracles import CLASSES, IMAGES, ExactNorms, images, settled
from torch import nn

from local_bound import Normalize, PowerIteration, certified_radius, certify, local_lipschitz, propagate, verify
from locallip.bound.activations import Activation, Elementwise
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.bound.proof import decide, prove, proven_norms
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.rules import _RULES, rule
from locallip.bound.stages import ProductStage


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dense():
    return settled(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()


def convolutional(channels=2, *before):
    layers = [*before, nn.Conv2d(channels, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)]
    return nn.Sequential(*layers).double().eval()


def labels(x):
    return torch.zeros(len(x), dtype=torch.long) if isinstance(x, torch.Tensor) and x.dim() else None


def asked_for_a_proof(model, x, y, epsilon):
    return prove(model, x, y, epsilon, ProvenNorms(1e-6, 100))


def decided(model, x, y, epsilon):
    return decide([ProductStage("exact", ExactNorms())], model, x, y, epsilon)


# Every public function as a question about a network, images, labels and a radius.
ASK = {
    "certify": certify,
    "certify, estimated": functools.partial(certify, certificate="estimate"),
    "certify, own norms": functools.partial(certify, certificate=ExactNorms()),
    "certified_radius": lambda model, x, y, epsilon: certified_radius(model, x, y),
    "certified_radius, estimated": lambda model, x, y, epsilon: certified_radius(model, x, y, certificate="estimate"),
    "local_lipschitz": lambda model, x, y, epsilon: local_lipschitz(model, x, epsilon),
    "local_lipschitz, estimated": lambda model, x, y, epsilon: local_lipschitz(model, x, epsilon, "estimate"),
    "propagate": lambda model, x, y, epsilon: propagate(model, x, epsilon, PowerIteration(3)),
    "verify": verify,
    "prove": asked_for_a_proof,
    "decide": decided,
}
WITH_LABELS = [name for name in ASK if "lipschitz" not in name and name != "propagate"]
WITH_EPSILON = [name for name in ASK if "radius" not in name]
CONVERTING = ["certify", "certified_radius", "local_lipschitz"]


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    """Few iterations where a question is answered."""
    monkeypatch.setattr("locallip.bound.inquiry.ESTIMATE_ITERATIONS", 200)


def refused(kind, match, ask, *question):
    """Ask, and expect one line."""
    with pytest.raises(kind, match=match) as caught:
        ASK[ask](*question)
    assert caught.type is kind
    assert "\n" not in str(caught.value)


every = pytest.mark.parametrize("ask", ASK)
with_labels = pytest.mark.parametrize("ask", WITH_LABELS)
with_epsilon = pytest.mark.parametrize("ask", WITH_EPSILON)


# --- the network -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (None, "nn.Module, got NoneType"),
        ({"0.weight": torch.ones(2, 2)}, "nn.Module, got dict"),
        (nn.ReLU, r"class ReLU; make one with \(\)"),
        (torch.relu, "nn.Module, got builtin"),
    ],
    ids=["None", "state_dict", "class", "function"],
)
def test_what_is_no_network_is_refused(ask, model, match):
    x = images(12)
    with pytest.raises(TypeError, match=f"{match}|must be an nn.Sequential"):
        ASK[ask](model, x, labels(x), 0.1)


def single_layer_in_float32():
    model = dense()
    model[0].float()
    return model


def complex_weights():
    model = dense()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.complex128))
    return model


CHECKED_MODELS = [name for name in ASK if name not in ("prove", "decide")]


@pytest.mark.parametrize("ask", CHECKED_MODELS)
@pytest.mark.parametrize(
    ("model", "kind", "match"),
    [
        (single_layer_in_float32, TypeError, r"several dtypes.*float32 \(0.*float64 \(2.*model.float\(\)"),
        (complex_weights, TypeError, "0.weight is torch.complex128"),
        (lambda: dense().to("meta"), ValueError, "on the device meta"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, "0.weight has no shape yet.*once"),
    ],
    ids=["mixed dtypes", "complex", "meta", "lazy"],
)
def test_weights_that_cannot_be_used_are_refused(ask, model, kind, match):
    x = images(12)
    refused(kind, match, ask, model(), x, labels(x), 0.1)


@pytest.mark.parametrize("ask", CHECKED_MODELS)
def test_weights_on_several_devices_are_refused(ask):
    model, x = dense(), images(12)
    model[0].to("meta")
    refused(ValueError, r"several devices, cpu \(2.*meta \(0", ask, model, x, labels(x), 0.1)


@with_labels
def test_a_network_with_one_logit_has_no_wrong_label_and_is_refused(ask):
    x = images(12)
    refused(ValueError, "two logits or more, got 1", ask, nn.Sequential(nn.Linear(12, 1)).double(), x, labels(x), 0.1)


def test_without_labels_one_logit_is_refused_too():
    with pytest.raises(ValueError, match="two logits or more, got 1"):
        certified_radius(nn.Sequential(nn.Linear(12, 1)).double(), images(12))


def test_one_logit_has_a_lipschitz_constant():
    model = nn.Sequential(nn.Linear(12, 1)).double()
    torch.testing.assert_close(
        local_lipschitz(model, images(12), 0.1).global_lipschitz, model[0].weight.norm().detach()
    )


# --- images ----------------------------------------------------------------------------------------------------------

X = {
    "None": (lambda x: None, TypeError, "tensor.*got NoneType"),
    "list": (lambda x: x.tolist(), TypeError, r"got list: hand in torch.tensor\(x\)"),
    "numpy": (lambda x: x.numpy(), TypeError, r"got ndarray: hand in torch.tensor\(x\)"),
    "bytes": (lambda x: (255 * x).byte(), TypeError, r"floating point, got torch.uint8"),
    "int64": (lambda x: x.long(), TypeError, r"floating point, got torch.int64"),
    "bool": (lambda x: x > 0.5, TypeError, "floating point, got torch.bool"),
    "complex": (lambda x: x.cfloat(), TypeError, "floating point, got torch.complex64"),
    "sparse": (lambda x: x.to_sparse(), TypeError, r"to_dense\(\)"),
    "a number": (lambda x: x[0, 0], ValueError, r"\(N, ...\), got the shape \(\): one image is x\[None\]"),
    "one image": (lambda x: x[0], ValueError, r"got the shape \(12,\): one image is x\[None\]"),
    "no values": (lambda x: x.to("meta"), ValueError, "on the device meta, where they have no values"),
    "no entries": (lambda x: x[:, :0], ValueError, r"images with entries, got the shape \(4, 0\)"),
}


@every
@pytest.mark.parametrize("name", X)
def test_what_are_no_images_is_refused(ask, name):
    change, kind, match = X[name]
    x = images(12)
    refused(kind, match, ask, dense(), change(x), labels(x), 0.1)


@pytest.mark.parametrize("ask", [name for name in CHECKED_MODELS if name not in (*CONVERTING, "verify")])
def test_images_of_another_precision_than_the_weights_are_refused_where_they_are_not_converted(ask):
    x = images(12).float()
    refused(TypeError, r"images are torch.float32, the weights torch.float64.*x.to", ask, dense(), x, labels(x), 0.1)


@pytest.mark.parametrize("ask", CONVERTING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_proof_takes_images_and_weights_of_any_precision_as_the_numbers_they_are(ask, dtype):
    x = images(12).to(dtype)
    model = dense()
    answers = [ASK[ask](model, some, labels(x), 0.01) for some in (x, x.double())]
    if ask == "local_lipschitz":
        answers = [answer.lipschitz for answer in answers]
    torch.testing.assert_close(*(answer.double() for answer in answers), rtol=1e-6, atol=2e-3)


@every
@pytest.mark.parametrize(
    ("model", "shape", "match"),
    [
        (dense, (11,), r"Linear at position 0 takes \(N, 12\), but gets \(N, 11\)"),
        (convolutional, (3, 6, 6), r"Conv2d at position 0 takes \(N, 2, H, W\), but gets \(N, 3, 6, 6\)$"),
        (
            convolutional,
            (6, 6),
            r"Conv2d at position 0 takes \(N, 2, H, W\), but gets \(N, 6, 6\); one image is x\[None",
        ),
        (convolutional, (2, 7, 7), r"Linear at position 3 takes \(N, 48\), but gets \(N, 75\)"),
        (convolutional, (2, 2, 2), r"Conv2d at position 0 leaves nothing of \(N, 2, 2, 2\)"),
        (
            lambda: convolutional(2, Normalize([0.1] * 2, [1.0] * 2)),
            (3, 6, 6),
            r"Normalize at position 0 takes \(N, 2, H, W\), but gets \(N, 3, 6, 6\)",
        ),
        (
            lambda: convolutional(2, nn.BatchNorm2d(2)),
            (3, 6, 6),
            r"BatchNorm2d at position 0 takes \(N, 2, H, W\), but gets \(N, 3, 6, 6\)",
        ),
        (
            lambda: convolutional(2, ReLU_x((2, 6, 6))),
            (2, 6, 5),
            r"ReLU_x at position 0 takes \(N, 2, 6, 6\), but gets \(N, 2, 6, 5\)",
        ),
        (
            lambda: convolutional(4, ClampGroupSort((4, 6, 6), 0.1, -0.1)),
            (2, 6, 6),
            r"ClampGroupSort at position 0 takes \(N, 4, 6, 6\), but gets \(N, 2, 6, 6\)",
        ),
    ],
    ids=["features", "channels", "no batch", "size", "too small", "Normalize", "BatchNorm2d", "ReLU_x", "MaxMin"],
)
def test_images_of_another_shape_are_refused_with_the_one_expected(ask, model, shape, match):
    x = images(*shape)
    refused(ValueError, match, ask, model(), x, labels(x), 0.1)


def test_thresholds_that_all_entries_share_take_every_size():
    model = nn.Sequential(nn.Linear(12, 8), ReLU_x(1), nn.Linear(8, CLASSES)).double()
    assert certify(model, images(12), labels(images(12)), 0.1).shape == (IMAGES,)


# --- labels ----------------------------------------------------------------------------------------------------------

Y = {
    "None": (lambda y: None, TypeError, "got NoneType"),
    "list": (lambda y: y.tolist(), TypeError, r"got list: hand in torch.tensor\(labels\)"),
    "numpy": (lambda y: y.numpy(), TypeError, r"got ndarray: hand in torch.tensor\(labels\)"),
    "a number": (lambda y: 3, TypeError, "got int"),
    "float": (lambda y: y.float(), TypeError, r"got torch.float32: hand in y.long\(\)"),
    "int32": (lambda y: y.int(), TypeError, r"got torch.int32: hand in y.long\(\)"),
    "bool": (lambda y: y > 0, TypeError, "got torch.bool"),
    "too many": (lambda y: torch.cat([y, y]), ValueError, rf"got \({2 * IMAGES},\) for {IMAGES} images"),
    "a column": (lambda y: y[:, None], ValueError, rf"got \({IMAGES}, 1\)"),
    "a scalar": (lambda y: y[0], ValueError, r"got \(\)"),
    "another device": (lambda y: y.to("meta"), ValueError, "labels are on meta, the images on cpu"),
    "below 0": (lambda y: y - 1, ValueError, rf"between 0 and {CLASSES - 1}, got -1"),
    "above all": (lambda y: y + CLASSES, ValueError, rf"between 0 and {CLASSES - 1}, got {CLASSES}"),
    "-100": (lambda y: y - 100, ValueError, "got -100"),
}


@with_labels
@pytest.mark.parametrize("name", Y)
def test_what_are_no_labels_is_refused(ask, name):
    if "radius" in ask and name == "None":
        pytest.skip("the network's own answers count then")
    change, kind, match = Y[name]
    x = images(12)
    refused(kind, match, ask, dense(), x, change(labels(x)), 0.1)


# --- numbers ---------------------------------------------------------------------------------------------------------

EPSILON = {
    "None": (None, TypeError, "must be a number, got NoneType"),
    "text": ("0.1", TypeError, "must be a number, got str"),
    "bool": (True, TypeError, "must be a number, got bool"),
    "complex": (0.1j, TypeError, "must be a number, got complex"),
    "list": ([0.1] * IMAGES, TypeError, r"got list: hand in torch.tensor\(epsilon, dtype=x.dtype\)"),
    "numpy": (np.full(IMAGES, 0.1), TypeError, r"got ndarray: hand in torch.tensor\(epsilon, dtype=x.dtype\)"),
    "integers": (torch.ones(IMAGES, dtype=torch.long), TypeError, "floating point, got torch.int64"),
    "bools": (torch.ones(IMAGES) > 0, TypeError, "floating point, got torch.bool"),
    "complex tensor": (torch.full((IMAGES,), 0.1j), TypeError, "floating point, got torch.complex64"),
    "negative": (-0.1, ValueError, "negative, NaN or infinite, got -0.1"),
    "NaN": (math.nan, ValueError, "got nan"),
    "infinite": (math.inf, ValueError, "got inf"),
    "a huge integer": (10**400, ValueError, "negative, NaN or infinite, got 1000"),
    "one negative": (torch.tensor([0.1] * (IMAGES - 1) + [-1.0]), ValueError, "got -1"),
    "one NaN": (torch.tensor([0.1] * (IMAGES - 1) + [math.nan]), ValueError, "got nan"),
    "one infinite": (torch.tensor([0.1] * (IMAGES - 1) + [math.inf]), ValueError, "got inf"),
    "too few": (torch.full((IMAGES - 1,), 0.1), ValueError, rf"got \({IMAGES - 1},\) for {IMAGES} images"),
    "one in a vector": (torch.full((1,), 0.1), ValueError, r"got \(1,\)"),
    "a column": (torch.full((IMAGES, 1), 0.1), ValueError, rf"got \({IMAGES}, 1\)"),
}


@with_epsilon
@pytest.mark.parametrize("name", EPSILON)
def test_what_is_no_radius_is_refused(ask, name):
    epsilon, kind, match = EPSILON[name]
    x = images(12)
    refused(kind, match, ask, dense(), x, labels(x), epsilon)


@pytest.mark.parametrize(
    "epsilon", [0, 1, np.float32(0.125), np.float64(0.1), torch.tensor(0.1), torch.tensor([0.1] * 4)]
)
def test_every_kind_of_number_is_a_radius(epsilon):
    assert certify(dense(), images(12), labels(images(12)), epsilon).shape == (IMAGES,)


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"certificate": None}, TypeError, "or an object such as `Norms`, got NoneType"),
        ({"certificate": "guessed"}, ValueError, "got 'guessed'"),
        ({"failure_probability": "small"}, TypeError, "failure probability must be a number, got str"),
        ({"failure_probability": True}, TypeError, "failure probability must be a number, got bool"),
        ({"failure_probability": 0.0}, ValueError, "between 0 and 1, got 0.0"),
        ({"failure_probability": math.nan}, ValueError, "between 0 and 1, got nan"),
        ({"effort": "double"}, ValueError, "got 'double'"),
        ({"effort": None}, ValueError, "got 'None'"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(settings, kind, match):
    x = images(12)
    with pytest.raises(kind, match=match):
        certify(dense(), x, labels(x), 0.1, **settings)
    with pytest.raises(kind, match=match):
        certified_radius(dense(), x, labels(x), **settings)


@pytest.mark.parametrize("name", ["tolerance", "limit"])
@pytest.mark.parametrize("value", [None, "1", True, torch.tensor(1.0)], ids=str)
def test_the_ends_of_a_search_are_numbers(name, value):
    with pytest.raises(TypeError, match=f"the {name} must be a number"):
        certified_radius(dense(), images(12), **{name: value})


# --- no images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("certificate", ["proven", "estimate", ExactNorms()], ids=["proven", "estimate", "own"])
@pytest.mark.parametrize("model", [dense, convolutional], ids=["dense", "convolutional"])
def test_no_images_have_no_answers_and_the_network_has_its_constant_still(model, certificate):
    shape = (12,) if model is dense else (2, 6, 6)
    model, x, y = model(), images(*shape)[:0], torch.zeros(0, dtype=torch.long)
    assert certify(model, x, y, 0.1, certificate).shape == (0,)
    assert certify(model, x, y, 0.1, certificate).dtype == torch.bool
    assert certified_radius(model, x, y, certificate=certificate).shape == (0,)
    assert certified_radius(model, x, certificate=certificate).shape == (0,)
    none, some = (local_lipschitz(model, images, 0.1, certificate) for images in (x, x.new_zeros(1, *shape)))
    assert none.lipschitz.shape == (0,)
    assert all(norm.shape == (0,) for norm in none.local_norms.values())
    torch.testing.assert_close(none.global_lipschitz, some.global_lipschitz, rtol=1e-6, atol=0)


def test_no_images_have_no_answers_where_the_network_has_to_run():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = dense()

        def forward(self, x):
            return self.layers(x.view(len(x), -1))

    model, x, y = Viewing().eval(), images(3, 4)[:0], torch.zeros(0, dtype=torch.long)
    assert certify(model, x, y, 0.1).shape == certified_radius(model, x).shape == (0,)
    assert local_lipschitz(model, x, 0.1).lipschitz.shape == (0,)
    assert verify(model, x, y, 0.1).status == ()


def test_images_on_a_device_without_values_are_refused_where_there_are_no_weights():
    with pytest.raises(ValueError, match="on the device meta"):
        certify(nn.Flatten(), torch.rand(2, 4, device="meta"), torch.tensor([0, 1]), 0.1)


def test_the_walk_and_the_proof_take_no_images():
    model, x, y = dense(), images(12)[:0], torch.zeros(0, dtype=torch.long)
    assert propagate(model, x, 0.1, PowerIteration(3)).logits.shape == (0, CLASSES)
    proof = prove(model, x, y, 0.1, proven_norms(model, x, 0))
    assert proof.worst_margin.shape == (0,)
    assert sum(proof.decided) == 0


# --- what is the user's ----------------------------------------------------------------------------------------------


class Spoiling(nn.Module):
    """ReLU, in place."""

    def forward(self, x):
        return x.clamp_(min=0)


class InPlace(Activation):
    rounding = 0.0

    def __call__(self, x):
        return x.clamp_(min=0)

    def varying(self, lower, upper):
        return upper > 0


@pytest.fixture(params=["Elementwise", "Activation"])
def spoiling(request):
    """A layer under a rule of the user's own that works in place."""
    if request.param == "Activation":
        rule(Spoiling)(lambda layer, place: InPlace())
    else:
        rule(Spoiling)(lambda layer, place: Elementwise(layer.forward, lambda lower, upper: upper > 0, rounding=0.0))
    yield Spoiling()
    del _RULES[Spoiling]


def same(own, other):
    return torch.equal(own, other) if isinstance(own, torch.Tensor) else own == other


def everything(model, x):
    """All that belongs to the user, copied."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    return state, grads, modes, x.detach().clone(), x.requires_grad, x.grad, torch.get_rng_state()


@every
def test_nothing_of_the_users_is_changed_even_where_a_layer_works_in_place(ask, spoiling):
    model = nn.Sequential(spoiling, nn.Linear(12, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8), copy.deepcopy(spoiling))
    model.append(nn.Linear(8, CLASSES))
    model.double().eval()
    model[1].train()
    x = (images(12) - 0.5).requires_grad_()
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    with torch.no_grad():
        y = model(x.clone()).argmax(dim=1)
    before = everything(model, x)
    ASK[ask](model, x, y, 0.01)
    after = everything(model, x)
    for own, other in zip(before, after):
        if isinstance(own, dict):
            assert own.keys() == other.keys()
            assert all(same(value, other[name]) for name, value in own.items())
        else:
            assert same(own, other)


def test_a_layer_that_works_in_place_gets_the_same_bounds(spoiling):
    x, epsilon = images(12) - 0.5, 0.3
    layers = nn.Linear(12, 8), nn.Linear(8, CLASSES)
    bounds = [
        propagate(nn.Sequential(activation, layers[0], activation, layers[1]).double(), x, epsilon, ExactNorms())
        for activation in (spoiling, nn.ReLU())
    ]
    for name in ("center", "lower", "upper", "radius", "logits"):
        torch.testing.assert_close(*(getattr(bound, name) for bound in bounds))


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_epsilon_and_labels_that_hold_no_dense_numbers_are_refused(kind):
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.rand(2, 4)

    def odd(tensor):
        return tensor.to_sparse() if kind == "sparse" else tensor.to("meta")

    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match="epsilon must be a number or a dense tensor"):
        certify(model, x, y, odd(torch.full((len(x),), 0.1, dtype=x.dtype)))
    with pytest.raises((TypeError, ValueError), match=r"as a dense tensor|are on meta"):
        certify(model, x, odd(y), 0.1)


@pytest.mark.parametrize("ask", [lambda *net: local_lipschitz(*net, 0.1), certified_radius])
def test_a_network_without_logits_is_refused(ask):
    with pytest.raises(ValueError, match="the network gives no logits"):
        ask(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0)).eval(), torch.rand(1, 4))


def test_more_layers_than_a_proof_has_norms_for_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("locallip.bound.proof.MOST_WHOLES", 3)
    monkeypatch.setattr("locallip.bound.certificates.prove", lambda *args, **more: pytest.fail("it was proven"))
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).eval()
    with pytest.raises(ValueError, match="networks of up to 3 linear layers, this one has 4"):
        certify(net, torch.rand(1, 3), torch.tensor([0]), 0.1)


@pytest.mark.parametrize("norms", [5, "proven", None, PowerIteration])
def test_what_gives_no_norms_is_refused(norms):
    with pytest.raises(TypeError, match=r"need norms such as PowerIteration\(5\), got "):
        propagate(nn.Sequential(nn.Linear(6, 3)), torch.rand(2, 6), 0.1, norms)
