"""Networks that are read off a run: calls mean what layers mean, and what cannot be read is named, all at once."""

import pytest
import torch
import torch.nn.functional as F
from oracles import CLASSES, IMAGES, MAPS, images, settled, walk
from torch import nn

from local_bound import (
    Arithmetic,
    Clip,
    Graph,
    PowerIteration,
    certified_radius,
    certify,
    local_lipschitz,
    propagate,
    prove,
    proven_norms,
    rule,
)
from locallip.bound import rules
from locallip.bound.layers import MaxMin
from locallip.bound.nodes import Refusal


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Called(nn.Module):
    """A network whose forward is a function of its layers, in float64 and eval mode."""

    def __init__(self, forward, *layers):
        super().__init__()
        self.layers, self._forward = nn.ModuleList(layers), forward
        settled(self)

    def forward(self, x):
        return self._forward(x, *self.layers)


def assert_same_bound(model, other, x, epsilon=0.2):
    ours, theirs = walk(model, x, epsilon), walk(other, x, epsilon)
    for name in ("logits", "center", "lower", "upper", "radius", "hidden_lipschitz", "global_hidden_lipschitz"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


# --- calls are layers ------------------------------------------------------------------------------------------------


def dense():
    return nn.Linear(2 * 36, 8), nn.Linear(8, CLASSES)


MIDDLE = {
    "F.relu": (F.relu, nn.ReLU()),
    "torch.relu": (torch.relu, nn.ReLU()),
    "the method relu": (lambda x: x.relu(), nn.ReLU()),
    "relu in place": (lambda x: F.relu(x, inplace=True), nn.ReLU()),
    "relu_": (lambda x: x.relu_(), nn.ReLU()),
    "relu6": (F.relu6, nn.ReLU6()),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), nn.LeakyReLU(0.2)),
    "hardtanh": (lambda x: F.hardtanh(x, -0.3, 0.4), nn.Hardtanh(-0.3, 0.4)),
    "clamp": (lambda x: x.clamp(-0.3, 0.4), nn.Hardtanh(-0.3, 0.4)),
    "clamp of one side": (lambda x: torch.clamp(x, min=0), nn.ReLU()),
    "sigmoid": (torch.sigmoid, nn.Sigmoid()),
    "tanh": (lambda x: x.tanh(), nn.Tanh()),
    "softplus": (lambda x: F.softplus(x, beta=2), nn.Softplus(2)),
    "elu": (lambda x: F.elu(x, 0.5), nn.ELU(0.5)),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    "silu": (F.silu, nn.SiLU()),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), nn.Dropout()),
    "contiguous": (lambda x: x.contiguous().clone(), nn.Identity()),
    "the same dtype": (lambda x: x.to(torch.float64).double(), nn.Identity()),
}


@pytest.mark.parametrize("name", MIDDLE)
def test_a_call_is_bounded_as_the_layer_that_it_means(name):
    call, layer = MIDDLE[name]
    conv, first, last = nn.Conv2d(2, 2, 3, padding=1), *dense()
    model = Called(lambda x, conv, first, last: last(F.relu(first(call(conv(x)).flatten(1)))), conv, first, last)
    assert_same_bound(model, settled(conv, layer, nn.Flatten(), first, nn.ReLU(), last), images(*MAPS))


POOLS = {
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), nn.MaxPool2d(3, 2, 1)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), nn.AvgPool2d(2)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 3)), nn.AdaptiveAvgPool2d(3)),
    "mean over the pixels": (lambda x: x.mean((2, 3), keepdim=True), nn.AvgPool2d(6)),
    "mean without the pixels": (lambda x: x.mean(dim=[-1, -2]), nn.AvgPool2d(6)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pooling_call_is_bounded_as_the_layer_that_it_means(name):
    call, layer = POOLS[name]
    conv, last = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2 if "mean" in name else 18, CLASSES)
    model = Called(lambda x, conv, last: last(call(F.relu(conv(x))).flatten(1)), conv, last)
    assert_same_bound(model, settled(conv, nn.ReLU(), layer, nn.Flatten(), last), images(*MAPS))


FLAT = {
    "flatten": lambda x: torch.flatten(x, 1),
    "view with len": lambda x: x.view(len(x), -1),
    "view with size": lambda x: x.view(x.size(0), -1),
    "reshape with shape": lambda x: x.reshape(x.shape[0], 72),
    "view of the batch left open": lambda x: x.view(-1, 72),
    "unflatten and back": lambda x: x.flatten(1).unflatten(1, (4, 18)).flatten(1),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_renaming_of_entries_changes_nothing(name):
    conv, first, last = nn.Conv2d(2, 2, 3, padding=1), *dense()
    model = Called(lambda x, conv, first, last: last(F.relu(first(FLAT[name](F.relu(conv(x)))))), conv, first, last)
    assert_same_bound(model, settled(conv, nn.ReLU(), nn.Flatten(), first, nn.ReLU(), last), images(*MAPS))


def test_functional_layers_share_the_rules_of_the_modules():
    conv, norm, turned, first, last = (
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        *dense(),
    )

    def forward(x, conv, norm, turned, first, last):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1, groups=2)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)
        x = F.conv_transpose2d(torch.relu(x), turned.weight, turned.bias, stride=2)
        x = F.relu(F.linear(x.flatten(1), first.weight, first.bias))
        return F.linear(x, last.weight, last.bias)

    layers = (conv, norm, turned, first, last)
    chain = (conv, norm, nn.ReLU(), turned, nn.Flatten(), first, nn.ReLU(), last)
    model = Called(forward, *layers)
    assert_same_bound(model, nn.Sequential(*chain), images(*MAPS))
    # Batch normalisation is part of the convolution before it, called or not.
    assert len(walk(model, images(*MAPS), 0.1).global_norms) == 3


ARITHMETIC = {
    "normalised by numbers": (lambda x: (x - 0.3) / 0.5, 2, -0.6),
    "from a number": (lambda x: 1 - x, -1, 1),
    "negative": (lambda x: -x, -1, 0),
    "times a number": (lambda x: 3 * x, 3, 0),
    "in place": (lambda x: x.mul(1).mul_(3).add_(1), 3, 1),
    "with alpha": (lambda x: torch.add(x, 1, alpha=2), 1, 2),
    "by a tensor": (lambda x: (x - torch.full((2, 1, 1), 0.3)) / torch.full((1, 2, 1, 1), 0.5), 2, -0.6),
    "by a scalar tensor": (lambda x: torch.tensor(3.0) * x, 3, 0),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_with_constants_scales_and_shifts(name):
    call, scale, shift = ARITHMETIC[name]
    conv, last = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(72, CLASSES)
    model = Called(lambda x, conv, last: last(F.relu(conv(call(x))).flatten(1)), conv, last)
    x = images(*MAPS)
    bound = walk(model, x, 0.2)
    expected = F.relu(conv(scale * x + shift)).flatten(1)
    torch.testing.assert_close(bound.center, expected)
    plain = walk(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), last), scale * x + shift, 0.2 * abs(scale))
    torch.testing.assert_close(bound.radius, plain.radius)
    torch.testing.assert_close(bound.lower, plain.lower, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bound.global_hidden_lipschitz, abs(scale) * plain.global_hidden_lipschitz)


def test_a_home_made_flatten_and_normalize_are_seen_through():
    class Flatten(nn.Module):
        def forward(self, x):
            return x.view(x.size(0), -1)

    class Normalize(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.3, 0.6]).view(1, 2, 1, 1))
            self.register_buffer("std", torch.tensor([0.5, 0.25]).view(1, 2, 1, 1))

        def forward(self, x):
            return (x - self.mean) / self.std

    model = settled(Normalize(), nn.Conv2d(2, 2, 3), nn.ReLU(), Flatten(), nn.Linear(32, CLASSES))
    x = images(*MAPS)
    lipschitz = local_lipschitz(model, x, 0.1)
    assert lipschitz.lipschitz.isfinite().all()
    torch.testing.assert_close(lipschitz.global_norms["0.div()"], torch.tensor(4.0).double())


# --- what a graph is -------------------------------------------------------------------------------------------------


def test_a_layer_that_is_used_twice_has_two_places():
    first, last = nn.Linear(6, 6), nn.Linear(6, CLASSES)
    model = Called(lambda x, first, last: last(F.relu(first(F.relu(first(x))))), first, last)
    x = images(6)
    assert [node.position for node in Graph.of(model, x).hidden] == ["layers.0", "relu()", "layers.0#2", "relu()#2"]
    assert_same_bound(model, nn.Sequential(first, nn.ReLU(), first, nn.ReLU(), last), x)


def test_a_layer_with_a_rule_of_the_users_stays_one_layer(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    class Sparse(nn.Module):
        def forward(self, x):
            return torch.where(x > 0.1, x, torch.zeros_like(x) + 0.1)  # no call of these has a rule

    model = settled(nn.Linear(6, 6), Sparse(), nn.Linear(6, CLASSES))
    outer = Called(lambda x, inner: inner(x), model)
    with pytest.raises(TypeError, match=r"where\(\).*Sparse.*@rule"):
        walk(outer, images(6), 0.1)
    rule(Sparse)(lambda layer, place: Clip(0.1, float("inf")))
    assert [node.position for node in Graph.of(outer, images(6)).hidden] == ["layers.0.0", "layers.0.1"]
    torch.testing.assert_close(walk(outer, images(6), 0.1).logits.shape, (IMAGES, CLASSES))


def test_an_odd_ending_is_bounded_by_the_logits_themselves():
    x = images(*MAPS)
    ends = {
        "pooled maps": settled(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AvgPool2d(2), nn.Flatten()),
        "scaled": Called(lambda x, last: 0.1 * last(x.flatten(1)), nn.Linear(72, CLASSES)),
        "activation": settled(nn.Flatten(), nn.Linear(72, CLASSES), nn.ReLU()),
        "nothing but": nn.Flatten(),
    }
    for model in ends.values():
        bound = walk(model, x, 0.1)
        torch.testing.assert_close(bound.logits, model(x))
        assert torch.equal(bound.center, bound.logits)
        step = torch.randn_like(x)
        moved = model(x + 0.1 * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        assert ((moved - bound.center).norm(dim=1) <= bound.radius * (1 + 1e-6)).all()


def test_a_module_called_logits_that_is_not_the_last_keeps_its_norm():
    class Tripled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.logits = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.logits(self.first(x).relu()) * 3

    bounds = local_lipschitz(Tripled().double().eval(), images(6), 0.1)
    assert {"first", "logits"} < set(bounds.local_norms)
    torch.testing.assert_close(torch.stack([*bounds.local_norms.values()]).prod(dim=0), bounds.lipschitz)


def test_a_network_for_one_number_of_images_is_refused():
    model = Called(lambda x, last: last(x.reshape(3, -1)), nn.Linear(6, CLASSES))
    with pytest.raises(TypeError, match="does not run on 4 images"):
        walk(model, images(6), 0.1)


def test_what_does_not_reach_the_logits_does_not_count():
    model = Called(lambda x, a, last: (torch.fft.fft(x) if False else a(x), last(x))[1], *[nn.Linear(6, 6)] * 2)
    assert [node.position for node in Graph.of(model, images(6)).hidden] == []


def test_a_graph_stands_for_its_network_in_every_function():
    first, last = nn.Linear(6, 8), nn.Linear(8, CLASSES)
    model = Called(lambda x, first, last: last(F.relu(first(x))), first, last)
    x = images(6)
    y = model(x).argmax(dim=1)
    chain = nn.Sequential(first, nn.ReLU(), last)
    for certificate in ("proven", PowerIteration(50)):
        for ask in (lambda net: certify(net, x, y, 0.05, certificate), lambda net: certified_radius(net, x)):  # noqa: B023
            torch.testing.assert_close(ask(model), ask(chain))
    graph = Graph.of(model, x)
    assert Graph.of(graph) is graph
    margins = [prove(net, x, y, 0.05, proven_norms(net, x, IMAGES, seed=1)).worst_margin for net in (graph, chain)]
    torch.testing.assert_close(*margins)


def test_a_graph_follows_the_weights_and_gradients_go_to_them():
    first, last = nn.Linear(6, 8), nn.Linear(8, CLASSES)
    model, x = Called(lambda x, first, last: last(F.relu(first(x))), first, last), images(6)
    graph = Graph.of(model, x)
    before = propagate(graph, x, 0.1, PowerIteration(50))
    before.radius.sum().backward()
    assert first.weight.grad.abs().sum() > 0
    with torch.no_grad():
        first.weight *= 2
    after = propagate(graph, x, 0.1, PowerIteration(50))
    torch.testing.assert_close(after.global_norms["layers.0"], 2 * before.global_norms["layers.0"])
    torch.testing.assert_close(after.logits, model(x))


def test_weights_that_are_computed_from_others_are_read_anew_or_refused():
    first, last = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(x, first, last):
        return last(F.relu(F.linear(x, first.weight / first.weight.norm())))

    model, x = Called(forward, first, last), images(6)
    graph = Graph.of(model, x)
    torch.testing.assert_close(walk(graph, x, 0.1).logits, model(x))
    with torch.no_grad():
        first.weight[0] *= 2
    with pytest.raises(ValueError, match="changed"):
        walk(graph, x, 0.1)
    torch.testing.assert_close(walk(model, x, 0.1).logits, model(x))


def test_a_graph_is_for_images_of_its_shape():
    conv, last = nn.Conv2d(2, 2, 3), nn.Linear(2, CLASSES)
    model = Called(lambda x, conv, last: last(F.relu(conv(x)).mean((2, 3))), conv, last)
    graph = Graph.of(model, images(2, 6, 6))
    with pytest.raises(ValueError, match=r"\(2, 6, 6\).*\(2, 7, 7\)"):
        walk(graph, images(2, 7, 7), 0.1)


def test_shapes_may_decide_and_nothing_of_the_users_is_changed():
    def forward(x, first, last):
        if x.shape[1] != 6 or x.dim() != 2:
            raise ValueError("six features, please")
        return last(F.relu(first(x)))

    model = Called(forward, nn.Linear(6, 8), nn.Linear(8, CLASSES))
    x, before = images(6), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = x.clone()
    walk(model, x, 0.1)
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="six features"):
        walk(model, images(7), 0.1)


# --- what cannot be read ---------------------------------------------------------------------------------------------

BY_VALUE = {
    "a branch": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x * x.max().item(),
    "numpy": lambda x: x + float(x.detach().numpy().sum()),
    "tolist": lambda x: x * x.tolist()[0][0],
    "float": lambda x: x / float(x.norm()),
    "equal": lambda x: x if torch.equal(x, x + 1) else -x,
    "its text": lambda x: x if "-" in str(x) else -x,
    "its text in a text": lambda x: x if "-" in f"{x}" else -x,
    "a length of what is picked": lambda x: x * len(x[x > 0].tolist()),
}


@pytest.mark.parametrize("name", BY_VALUE)
def test_a_value_that_decides_ends_the_reading(name):
    last = nn.Linear(6, CLASSES)
    model = Called(lambda x, last: last(F.relu(BY_VALUE[name](x))), last)
    with pytest.raises(TypeError, match=r"test_capture.py:\d+"):
        walk(model, images(6), 0.1)


UNREADABLE = {
    "softmax": (lambda x: x.softmax(1), "Softmax"),
    "product of activations": (lambda x: x * x.sigmoid(), "multiplies activations"),
    "division by activations": (lambda x: 1 / (x + 2), r"truediv__\(\)"),
    "square": (lambda x: x**2, r"pow__\(\)"),
    "matrix product": (lambda x: x @ x.T, r"mixes images|T\(\)"),
    "a product with activations": (lambda x: torch.ones(3, 3).double() @ x, r"matmul\(\)"),
    "a mean over the batch": (lambda x: x - x.mean(0), r"mean\(\)"),
    "a batch that is joined": (lambda x: torch.cat([x, x])[: len(x)], "batches"),
    "a batch that is mixed": (lambda x: x.reshape(len(x) // 1 * 2, 3).reshape(len(x), 6), "batch"),
    "a batch that is turned": (lambda x: x.flip(0), "mixes images"),
    "a border of ones": (lambda x: F.pad(x, (1, 1), value=1.0)[:, :6], "something else than entries"),
    "another precision": (lambda x: x.float().double(), "dtype"),
    "dropout that stays on": (lambda x: F.dropout(x, 0.5), r"call it with training=self\.training"),
    "broadcasting of activations": (lambda x: x + x[:, :1], "shapes"),
    "a batch that is split": (lambda x: x - x.chunk(3)[0], "mixes images"),
    "a constant for every image": (lambda x: x + torch.ones(3, 6), "for every image"),
    "statistics of the batch": (lambda x: F.batch_norm(x, None, None, training=True), "batch"),
    "layer_norm": (lambda x: F.layer_norm(x, (6,)), r"layer_norm\(\)"),
    "weights that come from the images": (lambda x: F.linear(x, x.sum() * torch.eye(6)), "sum|images"),
    "ends that come from the images": (
        lambda x: F.linear(torch.ones(3, 6).double(), torch.eye(6) * F.relu(x)[:1].sum()),
        ".",
    ),
    "a convolution with the images": (lambda x: F.linear(x, F.relu(x)[:, :6].repeat(2, 1)), "images"),
    "an activation with the images as its slope": (lambda x: F.prelu(x, F.relu(x)[0]), "images"),
    "a constant that the images are written into": (lambda x: torch.zeros(3, 6).double().add_(x), "another tensor"),
    "an output that was given": (lambda x: torch.add(x, 1, out=torch.zeros(3, 6).double()), r"add\(\)"),
    "einsum": (lambda x: torch.einsum("nh,nh->nh", x, x), r"einsum\(\)"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_call_without_a_rule_is_refused_by_name_and_line(name):
    call, words = UNREADABLE[name]
    last = nn.Linear(6, CLASSES)
    with pytest.raises(TypeError, match=rf"(?s)({words}).*test_capture.py:\d+|test_capture.py:\d+.*({words})"):
        walk(Called(lambda x, last: last(call(x)), last), images(6), 0.1)


class ByMatrices(nn.Module):
    """A network of matrices, as one writes it by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.shift = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8))
        self.second = nn.Parameter(torch.randn(8, CLASSES))

    def forward(self, x):
        return F.relu(x @ self.first.T + self.shift).matmul(self.second)


def test_a_product_with_a_matrix_is_a_linear_layer():
    model, x = ByMatrices().double().eval(), images(6)
    graph = Graph.of(model, x)
    torch.testing.assert_close(graph.logits(x)[0], model(x))
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES, bias=False)).double().eval()
    layers[0].weight.data, layers[0].bias.data = model.first.data, model.shift.data
    layers[2].weight.data = model.second.data.t()
    y = model(x).argmax(dim=1)
    radii = (certified_radius(network, x, y, tolerance=1e-4, effort="product") for network in (model, layers))
    torch.testing.assert_close(*radii, rtol=0.1, atol=1e-3)


def test_a_product_with_another_matrix_since_is_noticed():
    model, x = ByMatrices().double().eval(), images(6)
    graph = Graph.of(model, x)
    with torch.no_grad():
        model.second.mul_(2)
    with pytest.raises(ValueError, match="make its graph anew"):
        graph.meanings(x, Arithmetic())


def test_one_refusal_names_all_obstacles_each_with_its_place_and_a_way_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(x) * torch.exp(x)

    model = settled(nn.Linear(6, 6), Block(), nn.Softshrink(), nn.Flatten(2), nn.Linear(6, CLASSES))
    with pytest.raises(TypeError) as refused:
        walk(model, images(6), 0.1)
    text = str(refused.value)
    assert isinstance(refused.value, Refusal)
    for words in ("LayerNorm at position 1.norm", "exp() in Block at position 1", "Softshrink at position 2"):
        assert words in text
    assert text.count("@rule") >= 2
    assert "test_capture.py:" in text


def test_a_class_that_shares_a_name_with_a_supported_one_is_named_with_its_module():
    class Tanh(nn.Module):
        def forward(self, x):
            return torch.special.erf(x)

    with pytest.raises(TypeError, match=r"erf\(\) in \S*test_capture.Tanh at position 1.*nn.Tanh"):
        walk(settled(nn.Linear(6, 6), Tanh(), nn.Linear(6, CLASSES)), images(6), 0.1)


# --- MaxMin by hand ---------------------------------------------------------------------------------------------------


def _halves(x):
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def _sorted_by(halves, larger=torch.max, smaller=torch.min):
    def sort(x):
        a, b = halves(x)
        return torch.cat([larger(a, b), smaller(b, a)], dim=1)

    return sort


MAXMIN = {
    "split": _sorted_by(lambda x: x.split(x.shape[1] // 2, 1)),
    "chunk": _sorted_by(lambda x: x.chunk(2, dim=1), torch.maximum, torch.minimum),
    "slices": _sorted_by(_halves, torch.Tensor.max, torch.Tensor.min),
    "halves the other way round": _sorted_by(lambda x: _halves(x)[::-1]),
}


def _around(sort):
    """The same network of maps and of features with a function or a layer in it."""
    torch.manual_seed(3)
    layers = nn.Conv2d(2, 6, 3), nn.Linear(6 * 16, 8), nn.Linear(8, CLASSES)
    listed = [sort] if isinstance(sort, nn.Module) else []
    return Called(lambda x, maps, dense, last, *_: last(sort(dense(sort(maps(x)).flatten(1)))), *layers, *listed)


@pytest.mark.parametrize("name", MAXMIN)
def test_maxmin_by_hand_is_maxmin(name):
    x = images(2, 6, 6)
    by_hand, by_layer = _around(MAXMIN[name]), _around(MaxMin())
    kinds = [[type(node.layer) for node in Graph.of(model, x).hidden] for model in (by_hand, by_layer)]
    assert kinds[0] == kinds[1]
    assert_same_bound(by_hand, by_layer, x)
    assert kinds[0].count(MaxMin) == 2


NOT_MAXMIN = {
    "the other order": lambda x: _sorted_by(_halves, torch.min, torch.max)(x),
    "the larger twice": lambda x: _sorted_by(_halves, torch.max, torch.max)(x),
    "other halves": lambda x: _sorted_by(lambda x: (x[:, ::2], x[:, 1::2]))(x),
    "halves that overlap": lambda x: _sorted_by(lambda x: (x[:, :3], x[:, 2:5]))(x),
    "one half twice": lambda x: _sorted_by(lambda x: (_halves(x)[0], _halves(x)[0]))(x),
    "halves of two tensors": lambda x: _sorted_by(lambda x: (_halves(x)[0], _halves(2 * x)[1]))(x),
    "a part of the channels": lambda x: F.pad(_sorted_by(lambda x: (x[:, :2], x[:, 2:4]))(x), (0, 2)),
    "one side alone": lambda x: torch.cat([torch.max(*_halves(x)), _halves(x)[1]], 1),
    "the larger used again": lambda x: (
        lambda c, d: torch.cat([c, d], 1) + torch.cat([c, c], 1)
    )(torch.max(*_halves(x)), torch.min(*_halves(x))),
    "the larger as the output": lambda x: (lambda c, d: (torch.cat([c, d], 1), c)[1])(
        torch.max(*_halves(x)), torch.min(*_halves(x))
    ),
    "the larger of a tensor and a number's": lambda x: torch.maximum(x, torch.zeros(6).double()),
    "the largest": lambda x: x - x.max(dim=1, keepdim=True)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_MAXMIN)
def test_the_larger_of_two_has_no_rule_elsewhere(name):
    first, last = nn.Linear(6, 6), nn.Linear(6, CLASSES)
    ends = name == "the larger as the output"
    model = Called(lambda x, first, last: (nn.Identity() if ends else last)(NOT_MAXMIN[name](first(x))), first, last)
    with pytest.raises(TypeError, match=r"(?s)(max|min)(imum)?\(\).*has no rule but in cat.*@rule"):
        walk(model, images(6), 0.1)


def _changed_through_a_view(x):
    x[:, :].mul_(2)
    return x


EARLY_ENDS = {
    "a value": lambda x, y: y.sum().item() and x,
    "a change in place": lambda x, y: _changed_through_a_view(2 * x),
    "an error": lambda x, y: x[:, :5],
}


@pytest.mark.parametrize("name", EARLY_ENDS)
def test_the_larger_of_two_is_named_wherever_the_run_ends(name):
    first, last = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(x, first, last):
        x = first(x)
        return last(EARLY_ENDS[name](x, torch.maximum(x, 2 * x)))

    with pytest.raises(Refusal, match=r"maximum\(\).*has no rule but in cat"):
        walk(Called(forward, first, last), images(6), 0.1)


HEADS = {
    "a tuple": lambda x, a, b: (a(x), b(x)),
    "a dictionary": lambda x, a, b: {"out": a(x), "aux": b(x)},
    "maps": lambda x, a, b: torch.stack([a(x), b(x)], dim=1),
}


@pytest.mark.parametrize("name", HEADS)
def test_several_heads_are_refused(name):
    model = Called(HEADS[name], nn.Linear(6, 3), nn.Linear(6, 3))
    with pytest.raises(TypeError, match=r"one tensor of logits|stack\(\)|logits \(N, K\)"):
        walk(model, images(6), 0.1)


def test_logits_that_do_not_come_from_the_images_are_refused():
    model = Called(lambda x, a: a(torch.ones(len(x), 6).double()), nn.Linear(6, 3))
    with pytest.raises(TypeError, match="do not come from the images"):
        walk(model, images(6), 0.1)


def test_activations_that_change_in_place_behind_anothers_back_are_refused():
    def forward(x, first, last):
        h = first(x)
        seen = h.view(len(h), 2, 3)
        h.relu_()
        return last(seen.flatten(1))

    with pytest.raises(TypeError, match="in place"):
        walk(Called(forward, nn.Linear(6, 6), nn.Linear(6, CLASSES)), images(6), 0.1)


def test_what_changes_in_place_is_what_it_has_become():
    def forward(x, first, last):
        h = first(x)
        out = F.relu(h, inplace=True)
        return last(h + out)  # both are the same by now

    model, x = Called(forward, nn.Linear(6, 6), nn.Linear(6, CLASSES)), images(6)
    torch.testing.assert_close(walk(model, x, 0.1).logits, model(x))
    in_place = settled(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, CLASSES))
    wrapped = Called(lambda x, inner: inner(x), in_place)
    torch.testing.assert_close(walk(wrapped, x, 0.1).logits, wrapped(x))


def test_without_images_only_a_sequential_of_known_layers_can_be_read():
    with pytest.raises(TypeError, match="without images"):
        Graph.of(Called(lambda x, a: a(x), nn.Linear(6, 3)))
    with pytest.raises(TypeError, match="Softshrink at position 0"):
        Graph.of(settled(nn.Softshrink(), nn.Linear(6, 3)))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        Graph.of(lambda x: x, images(6))
