"""The proof of the dual: no point of the ball breaks it, and what would prove nothing is refused or paid for."""

import math
from dataclasses import replace

import pytest
import torch
from dual_cases import CLASSES, EPSILONS, IMAGES, KINDS, case, network, output, whole_norms, without_biases

from locallip.bound.dual.around import chain_around
from locallip.bound.dual.chain import Hidden
from locallip.bound.dual.classes import prove_classes
from locallip.bound.dual.proof import proven_margin
from locallip.bound.proven_norms import ProvenNorms

every_case = pytest.mark.parametrize(
    ("kind", "epsilon", "pixels"),
    [(kind, epsilon, pixels) for kind in KINDS for epsilon in EPSILONS for pixels in (None, (0.0, 1.0))],
)


@every_case
def test_no_point_of_the_ball_takes_more_than_the_proof_allows(kind, epsilon, pixels):
    it = case(kind, epsilon, pixels)
    proven = proven_margin(it.chain, it.label, it.other, it.multipliers)
    steps = it.points()
    for number in range(len(proven)):
        logits = output(it.images_chain, it.chain.x[number] + steps[number])
        attained = logits[:, it.label[number]] - logits[:, it.other[number]]
        assert attained.min() >= proven[number]
    assert proven.isfinite().all()
    assert (proven <= it.margin).all()


@pytest.mark.parametrize("kind", ["relux", "maxmin"])
def test_references_outside_the_remaining_columns_are_refused(kind):
    it = case(kind, 0.05)
    number = next(n for n, mask in enumerate(it.chain.reference_masks()) if mask is not None and not mask.all())
    c = [part.clone() for part in it.multipliers.c]
    c[number] = torch.where(it.chain.reference_masks()[number], c[number], 0.1)
    with pytest.raises(ValueError, match="a reference of layer"):
        proven_margin(it.chain, it.label, it.other, replace(it.multipliers, c=c))


def test_multipliers_on_eliminated_rows_are_refused():
    it = case("relux", 0.05)
    number = next(n for n, layer in enumerate(it.chain.hidden) if not layer.rows.all())
    g = [part.clone() for part in it.multipliers.g]
    g[number] = torch.where(it.chain.hidden[number].rows, g[number], 0.1)
    with pytest.raises(ValueError, match="g of layer"):
        proven_margin(it.chain, it.label, it.other, replace(it.multipliers, g=g))


def test_masks_that_the_box_does_not_show_are_refused():
    layer = next(layer for layer in case("relux", 0.4).images_chain.hidden if layer.columns.any())
    box = layer.center - 1, layer.center + 1
    less = torch.zeros_like(layer.columns)
    arguments = layer.operator, layer.activation, layer.center, layer.norm, layer.absolute
    with pytest.raises(ValueError, match="not among the remaining columns"):
        Hidden.around(*arguments, less, less, box)
    with pytest.raises(ValueError, match="need the box"):
        Hidden.around(*arguments, less, less)
    with pytest.raises(ValueError, match="rows are the columns"):
        Hidden.around(*arguments, less, None, box)


@pytest.mark.parametrize("where", ["g", "c", "delta", "center", "norm", "epsilon", "x", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_proves_nothing(where, value):
    it = case("relux", 0.4)
    chain, multipliers = it.chain.take(torch.arange(2)), it.multipliers.take(torch.arange(2))
    hidden = [replace(layer) for layer in chain.hidden]
    if where in ("g", "c"):
        getattr(multipliers, where)[0].view(2, -1)[:, 0] = value
        if where == "g" and chain.hidden[0].rows is not None:
            multipliers.g[0][...] = torch.where(chain.hidden[0].rows, value, 0)
    elif where == "delta":
        multipliers.delta[:, 1] = value
    elif where in ("center", "norm"):
        hidden[1] = replace(hidden[1], **{where: torch.full_like(getattr(hidden[1], where), value)})
    chain = replace(chain, hidden=hidden)
    if where in ("epsilon", "x", "weight"):
        chain = replace(chain, **{where: torch.full_like(getattr(chain, where), value)})
    proven = proven_margin(chain, it.label[:2], it.other[:2], multipliers)
    assert (proven == -torch.inf).all()


def test_centers_that_are_off_are_paid_for():
    """Those of float32, or worse: the proof measures what they miss and stays true."""
    it = case("relu", 0.4)
    hidden = [
        replace(layer, center=layer.center + 1e-3 * torch.randn_like(layer.center), lo=None, hi=None)
        for layer in it.chain.hidden
    ]
    hidden = [
        replace(layer, rows=None, columns=None, norm=whole.norm) for layer, whole in zip(hidden, whole_norms(it).hidden)
    ]
    chain = replace(it.chain, hidden=hidden)
    off = proven_margin(chain, it.label, it.other, it.multipliers)
    right = proven_margin(whole_norms(it), it.label, it.other, it.multipliers)
    assert (off < right + 0.1).all()
    for number, steps in enumerate(it.points()):
        logits = output(it.images_chain, it.chain.x[number] + steps)
        assert (logits[:, it.label[number]] - logits[:, it.other[number]]).min() >= off[number]


@pytest.mark.parametrize("scales", [(1e-12, 1e4, 1e4, 1e4), (1e6, 1e6, 1e6, 1e6), (1e-8, 1e-8, 1e-8, 1e-8)])
def test_huge_and_tiny_weights_change_nothing_but_the_scale(scales):
    """Without biases and with plain ReLU, a scaled network is the same one up to a factor."""
    torch.manual_seed(0)
    plain = without_biases(network("relu"))
    scaled = without_biases(network("relu"))
    scaled.load_state_dict(plain.state_dict())
    for layer, scale in zip([layer for layer in scaled if hasattr(layer, "weight")], scales):
        layer.weight *= scale
    x = torch.rand(IMAGES, 1, 6, 6, dtype=torch.float64)
    y = plain(x).argmax(dim=1)
    asked = torch.ones(IMAGES, CLASSES, dtype=torch.bool)
    margins = [
        prove_classes(chain_around(model, x, 0.01, ProvenNorms(1e-6, 1000, steps=0, seed=0)), y, asked).margin
        for model in (plain, scaled)
    ]
    assert torch.equal(margins[0] > 0, margins[1] > 0)
    assert (margins[0] > 0).any()
