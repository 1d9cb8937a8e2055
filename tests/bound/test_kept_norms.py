"""Whole norms are kept by what makes the operator: found again where it is the same, measured anew where it is not."""

import copy
import gc
import time
import weakref

import pytest
import torch
from hypothesis import given
from oracles import (
    SURELY,
    convolutions,
    dense_layers,
    images,
    matrix_of,
    more_examples,
    norm_of,
    settled,
    with_spectrum,
)
from torch import nn

from local_bound import certified_radius, certify, local_lipschitz
from locallip.bound import kept_norms, proven_norms
from locallip.bound.kept_norms import KEPT, KeptNorms, key_of
from locallip.bound.operators import Conv, Dense
from locallip.bound.proven_norms import ProvenNorms


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    KEPT.clear()


@pytest.fixture
def drawn(monkeypatch):
    """Every convolution by Lanczos, however small."""
    monkeypatch.setattr(proven_norms, "_SMALL_SIDE", 0)


@pytest.fixture
def measured(monkeypatch):
    """The operators that were measured."""
    seen, measure = [], ProvenNorms._measured
    monkeypatch.setattr(ProvenNorms, "_measured", lambda self, *args: seen.append(args[0]) or measure(self, *args))
    return seen


def convolution(weight=None, padding=(1, 1), shape=(2, 6, 6)):
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64) if weight is None else weight
    return Conv(weight, None, 0, torch.Size(shape), padding=padding)


def network():
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)]
    return settled(*layers)


# --- found again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, x: certify(model, x, model(x).argmax(dim=1), 0.1),
        certified_radius,
        lambda m, x: local_lipschitz(m, x, 1),
    ],
    ids=["certify", "certified_radius", "local_lipschitz"],
)
def test_a_second_call_measures_nothing(ask, measured):
    model, x = network(), images(2, 6, 6)
    ask(model, x)
    assert measured
    del measured[:]
    ask(model, x[:1])
    ask(copy.deepcopy(model), x[1:])
    assert not measured


def test_norms_by_an_object_of_ones_own_are_kept_only_on_request(measured):
    conv, kept = convolution(), KeptNorms()
    for norms in (ProvenNorms(SURELY, 0), ProvenNorms(SURELY, 0), ProvenNorms(SURELY, 0, kept=kept)):
        norms.whole(conv)
    assert len(measured) == 3
    ProvenNorms(SURELY, 0, kept=kept).whole(conv)
    assert len(measured) == 3
    assert len(KEPT) == 0


def test_one_image_at_a_time_costs_no_whole_norms(drawn):
    model = settled(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 144, 5))
    x = images(1, 12, 12)[:1]
    y = model(x).argmax(dim=1)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        certify(model, x, y, 1e-6)
        seconds.append(time.perf_counter() - started)
    assert min(seconds[1:]) < seconds[0] / 3


# --- a changed operator is noticed -----------------------------------------------------------------------------------

CHANGES = {
    "in place": lambda w: w.mul_(2),
    "by data": lambda w: w.data.mul_(2),
    "through numpy": lambda w: w.numpy().__imul__(2),
    "through a view": lambda w: w.view(-1)[0:1].add_(3),
    "by one bit": lambda w: w.view(torch.int64).view(-1)[:1].bitwise_xor_(1 << 62),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_weight_that_changes_by_whatever_way_is_noticed(name):
    kept, conv = KeptNorms(), convolution()
    before = ProvenNorms(SURELY, 0, kept=kept).whole(conv)
    CHANGES[name](conv.weight)
    conv = convolution(conv.weight)
    lower, upper = ProvenNorms(SURELY, 0, kept=kept).whole(conv)
    true = norm_of(matrix_of(conv))
    assert lower <= true <= upper
    assert upper != before.upper


def test_a_step_of_training_is_noticed(measured):
    model, x = network(), images(2, 6, 6)
    before = local_lipschitz(model, x, 0.1).global_lipschitz
    for change in (lambda: model[0].weight.data.mul_(2), lambda: model[1].running_var.mul_(0.25)):
        del measured[:]
        with torch.no_grad():
            change()
        after = local_lipschitz(model, x, 0.1).global_lipschitz
        torch.testing.assert_close(after, 2 * before, rtol=1e-4, atol=0)
        assert len(measured) == 1
        before = after


def test_whatever_makes_another_operator_of_the_same_weight_makes_another_key():
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    shape = torch.Size([2, 6, 6])
    others = [
        Conv(weight, None, 0, shape),
        Conv(weight, None, 0, torch.Size([2, 7, 6])),
        Conv(weight, None, 0, shape, padding=(1, 1)),
        Conv(weight, None, 0, shape, stride=(2, 2)),
        Conv(weight, None, 0, shape, dilation=(2, 2)),
        Conv(weight, None, 0, torch.Size([4, 6, 6]), groups=2),
        Conv(weight.flip(3), None, 0, shape),
        Dense(weight.view(2, 18), None, 0),
        Dense(weight.view(18, 2), None, 0),
    ]
    keys = {key_of(operator, 400) for operator in others}
    assert len(keys) == len(others)
    assert None not in keys
    assert key_of(others[0], 400) != key_of(others[0], 300)


def test_bias_and_place_make_no_other_norm():
    weight = torch.randn(3, 4, dtype=torch.float64)
    assert key_of(Dense(weight, None, 0), 400) == key_of(Dense(weight.clone(), torch.ones(3), "2.1"), 400)


class Doubled(Dense):
    """An operator of a user's own, made of more than its weight."""

    factor = 2

    def apply(self, x):
        return self.factor * super().apply(x)

    def adjoint(self, y):
        return self.factor * super().adjoint(y)


def test_an_operator_that_may_be_more_than_its_weight_is_not_kept(measured):
    kept, operator = KeptNorms(), Doubled(torch.eye(3, dtype=torch.float64), None, 0)
    for _ in range(2):
        ProvenNorms(SURELY, 0, kept=kept).whole(operator)
    assert len(measured) == 2
    assert len(kept) == 0


# --- chance ----------------------------------------------------------------------------------------------------------


def test_one_draw_answers_for_every_failure_probability(drawn, measured):
    kept, conv = KeptNorms(), convolution()
    uppers = [
        ProvenNorms(probability, 0, whole_steps=20, kept=kept).whole(conv).upper for probability in (0.1, 1e-3, 1e-9)
    ]
    assert len(measured) == 1
    assert uppers[0] <= uppers[1] <= uppers[2]
    assert uppers[0] < uppers[2]


@pytest.mark.parametrize("probability", [0.1, 1e-6])
def test_a_kept_norm_is_what_a_fresh_one_would_be(drawn, probability):
    conv, kept = convolution(), KeptNorms()
    ProvenNorms(0.9, 0, seed=3, kept=kept).whole(conv)
    again, fresh = (ProvenNorms(probability, 0, seed=3, kept=k).whole(conv) for k in (kept, None))
    torch.testing.assert_close(again.upper, fresh.upper, rtol=1e-12, atol=0)


def test_no_more_kept_norms_fail_than_the_probability_says(drawn):
    conv = with_spectrum(torch.linspace(1, 0.9, 40))
    probability, seeds, failed = 0.5, 200, 0
    for _ in range(seeds):
        kept = KeptNorms()
        # Asked for twice, and for another probability first: still one draw.
        for own in (0.9, probability):
            # Of the whole norms' half every one has a share of a thousandth; this one gets all of it.
            norms = ProvenNorms(own, 0, whole_steps=3, kept=kept)
            norms.budget._per_whole = own
            upper = norms.whole(conv).upper
        failed += int(upper < 1 - 1e-9)
    assert failed <= probability * seeds


def test_every_use_of_a_kept_norm_spends_its_share():
    kept, conv = KeptNorms(), convolution()
    ProvenNorms(SURELY, 0, kept=kept).whole(conv)
    norms = ProvenNorms(SURELY, 0, kept=kept)
    norms.budget._wholes_left = 0
    with pytest.raises(RuntimeError, match="more layers than planned"):
        norms.whole(conv)


def test_the_start_vectors_of_kept_norms_are_their_own(drawn, monkeypatch):
    """A seed repeats the masked norms, whether or not whole ones were known."""
    conv, kept = with_spectrum(torch.linspace(1, 0, 40)), KeptNorms()
    columns = (torch.arange(41) < 40).view(1, 41, 1, 1)
    found = []
    for _ in range(2):
        norms = ProvenNorms(SURELY, 10, steps=4, seed=7, kept=kept)
        found.append(norms.masked(conv, None, columns, norms.whole(conv)).lower)
    assert torch.equal(*found)


# --- small operators -------------------------------------------------------------------------------------------------


@more_examples
@given(convolutions())
def test_the_norm_of_a_small_convolution_is_exact_and_costs_no_chance(conv):
    norms = ProvenNorms(SURELY, 0)
    before = norms._generator.bit_generator.state
    lower, upper = norms.whole(conv)
    true = norm_of(matrix_of(conv))
    assert lower <= true <= upper <= true * (1 + 1e-6) + 1e-50
    assert norms._generator.bit_generator.state == before


@more_examples
@given(convolutions())
def test_a_convolution_that_is_not_small_is_bracketed_by_lanczos(conv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proven_norms, "_SMALL_SIDE", 0)
        lower, upper = ProvenNorms(SURELY, 0, seed=0).whole(conv)
    true = norm_of(matrix_of(conv))
    assert lower <= true <= upper <= true * (1 + 1e-2) + 1e-50


@more_examples
@given(dense_layers())
def test_a_kept_matrix_has_its_norm_again(dense):
    kept = KeptNorms()
    for _ in range(2):
        norms = ProvenNorms(SURELY, 0, kept=kept)
        lower, upper = norms.whole(dense)
        assert lower <= norm_of(dense.weight) <= upper <= norm_of(dense.weight) * (1 + 1e-6) + 1e-50
        assert norms.absolute(dense) >= norm_of(dense.weight.abs())


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_a_kept_norm_is_not_lost_in_overflow_or_underflow(scale):
    weight, kept = torch.randn(2, 2, 3, 3, dtype=torch.float64), KeptNorms()
    true = norm_of(matrix_of(convolution(weight)))
    for _ in range(2):
        lower, upper = ProvenNorms(SURELY, 0, kept=kept).whole(convolution(scale * weight))
        assert lower / scale <= true <= upper / scale <= true * (1 + 1e-6)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_weight_without_a_norm_is_not_kept(value):
    kept, conv = KeptNorms(), convolution()
    conv.weight.fill_(value)
    ProvenNorms(SURELY, 0, kept=kept).whole(conv)
    assert len(kept) == 0


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_network_is_not_held():
    model, x = network(), images(2, 6, 6)
    local_lipschitz(model, x, 0.1)
    gone = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert gone() is None


def test_the_least_recently_used_norms_are_given_up(monkeypatch, measured):
    monkeypatch.setattr(kept_norms, "_MOST", 2)
    kept = KeptNorms()
    first, second, third = (
        Dense(torch.full((2, 2), float(value), dtype=torch.float64), None, 0) for value in (1, 2, 3)
    )
    for operator in (first, second, first, third, first):
        ProvenNorms(SURELY, 0, kept=kept).whole(operator)
    assert len(measured) == 3
    assert len(kept) == 2
    ProvenNorms(SURELY, 0, kept=kept).whole(second)
    assert len(measured) == 4


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_was_kept_in_one_mode_serves_in_another(mode, measured):
    model, x = network(), images(2, 6, 6)
    with mode():
        inside = local_lipschitz(model, x, 0.1).global_lipschitz
    del measured[:]
    assert torch.equal(local_lipschitz(model, x, 0.1).global_lipschitz, inside)
    assert not measured
