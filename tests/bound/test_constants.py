"""What a run uses beside its images: weights of other modules, constants, and what is done with them."""

import threading
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_bound import Clip, certified_radius, certify, rule, verify
from locallip.bound import rules
from locallip.bound.capture import capture
from locallip.bound.graph import Graph
from locallip.bound.norms import Arithmetic


class Around(nn.Module):
    """Two layers, and what a function does between them; `held` is a buffer."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.jump, self.last = nn.Linear(4, 4), nn.Threshold(0.05, -50.0), nn.Linear(4, 3)
        self.register_buffer("held", torch.linspace(0.5, 1.5, 4))
        self.between = between

    def forward(self, x):
        return self.last(self.between(self, self.first(x)))


@pytest.fixture
def clips(monkeypatch):
    """Says of layers of a kind that they clip."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    return lambda kind: rule(kind)(lambda layer, place: Clip(0.0, 1.0))


X, Y = torch.linspace(0.1, 0.9, 8).view(2, 4), torch.tensor([0, 1])


def refused(between, message):
    with pytest.raises(TypeError, match=message):
        certify(Around(between).eval(), X, Y, 0.1)


# --- modules that are called otherwise than with one tensor


def test_a_module_without_a_rule_is_refused_when_it_is_called_by_name():
    refused(lambda net, h: net.jump(input=h), "no rule for Threshold at position jump")


@pytest.mark.parametrize(
    "between",
    [
        lambda net, h: net.first(input=h),
        lambda net, h: net.second(h, scale=1.0),
        lambda net, h: net.second([h]),
        lambda net, h: net.second(h, None),
    ],
    ids=["by name", "with a setting", "in a list", "with another argument"],
)
def test_a_layer_is_called_with_one_tensor_alone(between, clips):
    clips(Doubtful)
    net = Around(between)
    net.second = Doubtful()
    with pytest.raises(TypeError, match="takes one by name, or is told something else besides"):
        certify(net.eval(), X, Y, 0.1)


class Doubtful(nn.Module):
    """Clips, unless it is told otherwise."""

    def forward(self, x, other=0, scale=2.0):
        return (x[0] if isinstance(x, list) else x).clamp(0, 1)


# --- weights


def swapped(net, h):
    return torch.func.functional_call(net.first, {"weight": net.first.weight * 2}, (h,))


def lent(net, h):
    before = net.first.weight.data
    net.first.weight.data = 2 * before
    result = net.first(h)
    net.first.weight.data = before
    return result


def scaled_for_a_while(net, h):
    net.first.weight.data.mul_(2)
    result = net.first(h)
    net.first.weight.data.div_(2)
    return result


def scaled_in_between(net, h):
    result = net.first(h)
    net.first.weight.data.mul_(2)
    return result


@pytest.mark.parametrize("between", [swapped, lent, scaled_for_a_while, scaled_in_between])
def test_a_module_with_other_weights_than_it_holds_is_refused(between):
    with pytest.raises(TypeError, match=r"other weights than it holds|changes weights or constants"):
        capture(Around(between).eval(), X)


def test_a_module_may_be_called_with_its_own_weights():
    def between(net, h):
        return torch.func.functional_call(net.first, dict(net.first.named_parameters()), (h,))

    net = Around(between).eval()
    assert certify(net, X, net(X).argmax(dim=1), 1e-4).all()


def doubled_for_a_while(net, h):
    net.held.mul_(2)
    result = h * net.held
    net.held.div_(2)
    return result


def filled_anew(net, h):
    buffer = torch.ones(4)
    result = h * buffer
    buffer.fill_(3.0)
    return result * buffer


@pytest.mark.parametrize("between", [doubled_for_a_while, filled_anew])
def test_a_constant_that_changes_behind_a_call_is_refused(between):
    refused(between, "changes while it runs|changes weights or constants")


def test_a_constant_may_be_made_in_place_before_it_is_used():
    net = Around(lambda net, h: h * torch.ones(4).mul_(0.5)).eval()
    assert certify(net, X, net(X).argmax(dim=1), 1e-4).all()


@pytest.mark.parametrize(
    "between",
    [
        lambda net, h: h / net.held,
        lambda net, h: h - net.held,
        lambda net, h: torch.add(h, net.held, alpha=2),
        lambda net, h: h * (net.held + 1),
    ],
)
def test_a_graph_that_is_kept_notices_another_constant(between):
    net = Around(between).eval()
    graph = Graph.of(net, X)
    graph.meanings(X, Arithmetic())
    with torch.no_grad():
        net.held.add_(1)
    with pytest.raises(ValueError, match="has changed: make its graph anew"):
        graph.meanings(X, Arithmetic())


# --- tensors of other classes


class Bent(nn.Parameter):
    """A weight whose class says what is done with it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return function(F.threshold(args[0], -0.01, -50.0), *args[1:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


class Sent(nn.Parameter):
    """The same, one level below."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("not reached")


class Plain(nn.Parameter):
    """Changes nothing."""


def test_weights_whose_class_says_what_is_done_with_them_are_refused():
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    net[0].weight = Bent(net[0].weight.detach())
    with pytest.raises(TypeError, match=r"0\.weight is a Bent, whose class may say what it does"):
        certify(net, X, Y, 0.1)
    net[0].weight = Tensor._make_subclass(Sent, torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"0\.weight is a Sent, whose class may say what it does"):
        certify(net, X, Y, 0.1)


def test_constants_of_such_a_class_are_refused_too():
    strange = Bent(torch.ones(4))
    refused(lambda net, h: h * strange, "takes a Bent, whose class may say what it does")


def test_weights_of_a_class_that_changes_nothing_are_taken():
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    net[0].weight = Plain(net[0].weight.detach())
    assert certify(net, X, net(X).argmax(dim=1), 1e-4).all()


# --- what fails on the way


def failing_layer(net, h):
    try:
        net.first(h, "more")
    except TypeError:
        F.threshold_(h, 0.05, -50.0)
    return h


def failing_call(net, h):
    try:
        torch.linalg.cholesky(h[:, None, :1])
    except (RuntimeError, TypeError):
        return h
    return 2 * h


@pytest.mark.parametrize("between", [failing_layer, failing_call])
def test_a_network_that_goes_on_behind_a_failure_is_refused(between):
    refused(between, "fails, and the network goes on|no rule")


# --- what is computed with constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [None, 2.0])
@pytest.mark.parametrize("bias", [None, -3.0])
def test_batch_norm_has_scale_and_shift_each_or_not(weight, bias, dtype):
    scale, shift = (None if value is None else torch.full((4,), value, dtype=dtype) for value in (weight, bias))
    zero, one = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    net = Around(lambda net, h: F.batch_norm(h, zero, one, scale, shift, False)).to(dtype).eval()
    x = X.to(dtype)
    logits, _ = Graph.of(net, x).logits(x)
    assert torch.allclose(logits, net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_batch_norm_layer_may_lack_either(missing):
    norm = nn.BatchNorm1d(4)
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(-3.0)
    setattr(norm, missing, None)
    net = nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 3)).eval()
    assert certify(net, X, net(X).argmax(dim=1), 1e-4).all()


@pytest.mark.parametrize("std", [0.197, 0.238, 0.251, 0.268, 0.334])
def test_a_constant_in_single_precision_moves_no_radius(std):
    last = nn.Linear(1, 2).double()
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        last.bias.copy_(torch.tensor([-1.0, 1.0]))

    class Divided(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = last

        def forward(self, x):
            return self.last(x / torch.tensor(std))

    x = torch.full((1, 1), 2.5 * std, dtype=torch.float64)
    radius = certified_radius(Divided().eval(), x, torch.tensor([0]), tolerance=1e-12).item()
    boundary = Fraction(torch.tensor(std).item())  # where x / std is 1
    assert 0 < Fraction(radius) <= Fraction(x.item()) - boundary


class Lying(nn.Module):
    def forward(self, x):
        return x.clamp(0, 1) + 1


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-20])
def test_a_rule_that_is_wrong_is_noticed_however_small_the_logits_are(size, clips):
    clips(Lying)
    net = nn.Sequential(nn.Linear(4, 4), Lying(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        net[2].weight.mul_(size)
        net[2].bias.mul_(size)
    with pytest.raises(TypeError, match="gives other logits"):
        certify(net, X, Y, 0.1)


def test_logits_that_cancel_each_other_are_compared_by_what_they_are_made_of():
    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.first(x) + 1e4
            return self.last(h - 1e4)

    net = Cancelling().eval()
    certify(net, X, Y, 0.1)


# --- where it is asked


class Scaled(Around):
    """With a constant, whose changes are watched."""

    def __init__(self, between):
        super().__init__(between)
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x):
        return super().forward(x * self.scale)


@pytest.mark.parametrize("made_there", [False, True])
@pytest.mark.parametrize("kind", [Around, Scaled])
def test_it_may_be_asked_in_inference_mode(kind, made_there):
    with torch.inference_mode(made_there):
        net = kind(lambda net, h: h.relu()).eval()
    with torch.inference_mode():
        y = net(X).argmax(dim=1)
        assert certify(net, X, y, 1e-4).all()
        assert verify(net, X, y, 1e-4).certified.all()
    assert certify(net, X, y, 1e-4).all()
    assert (certified_radius(net, X.clone()) > 1e-4).all()


def test_inference_mode_inside_of_a_network_is_refused_with_the_way_out():
    def between(net, h):
        with torch.inference_mode():
            return h.relu()

    with pytest.raises(TypeError, match=r"computes in inference mode.*leave the mode to callers"):
        certify(Around(between).eval(), X, Y, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_may_hold_buffers_alone(dtype):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.eye(3, 4))

        def forward(self, x):
            return F.linear(x, self.weight)

    net = Fixed().to(dtype).eval()
    x = X.to(dtype)
    y = net(x).argmax(dim=1)
    assert certify(net, x, y, 0.01).all()
    assert verify(net, x, y, 0.01).certified.all()
    assert set(verify(net, x, y, 5.0).status) == {"attacked"}


def test_a_network_that_keeps_computed_tensors_is_refused_with_a_way_out():
    net = Around(lambda net, h: h * net.computed)
    net.computed = net.held * nn.Parameter(torch.ones(4))
    with pytest.raises(TypeError, match=r"cannot be copied.*compute it in forward"):
        certify(net.eval(), X, Y, 0.1)


def test_several_threads_may_ask_at_once():
    net = Around(lambda net, h: h.relu()).eval()
    y = net(X).argmax(dim=1)
    found, lock = [], threading.Barrier(3)

    def ask():
        lock.wait()
        for _ in range(4):
            try:
                found.append(certify(net, X, y, 1e-4).all().item())
            except TypeError as error:
                found.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12


def test_a_network_whose_weights_are_not_numbers_certifies_nothing_however_often_it_is_asked():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 3), torch.nan))

        def forward(self, x):
            return F.linear(x, self.weight / self.weight.norm())

    x, y = torch.rand(1100, 3), torch.zeros(1100, dtype=torch.long)
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        plain[0].weight[0, 0] = torch.nan
    assert not certify(Normed().eval(), x[:3], y[:3], 0.1).any()
    assert set(verify(plain, x, y, 0.1, batch_size=1, attack=0).status) == {"misclassified"}
