"""The search for multipliers, and the dual as a stage of a proof."""

import torch
from dual_cases import CLASSES, IMAGES, Case, case

from locallip.bound.dual import search as searching
from locallip.bound.dual.classes import prove_classes
from locallip.bound.dual.proof import proven_margin
from locallip.bound.dual.search import search


def test_questions_that_leave_early_are_proven_as_the_search_says():
    it = case("maxmin", 0.05)
    found = search(it.chain, it.slope, it.margin, iterations=60)
    done = found.done.nonzero().squeeze(1)
    assert len(done) > 3
    assert len(set(found.iterations[done].tolist())) > 1
    proven = proven_margin(it.chain.take(done), it.label[done], it.other[done], found.multipliers)
    assert (proven > 0).all()


def test_hopeless_questions_are_given_up_early_and_no_others(monkeypatch):
    it = case("maxmin", 0.4)
    found = search(it.chain, it.slope, it.margin)
    monkeypatch.setattr(searching, "_HOPE", torch.inf)
    patient = search(it.chain, it.slope, it.margin)
    given_up = ~found.done & (found.iterations > 0)
    assert given_up.any()
    assert (found.iterations[given_up] < 60).any()
    assert torch.equal(found.done, patient.done)
    assert torch.equal(found.iterations[found.done], patient.iterations[found.done])
    assert (patient.iterations[given_up] == 60).all()


def test_the_stage_proves_more_than_the_product_and_only_what_is_asked():
    it = case("maxmin", 0.05)
    asked = torch.ones(IMAGES, CLASSES, dtype=torch.bool)
    asked[0] = False
    answer = prove_classes(it.images_chain, it.y, asked)
    assert (answer.margin[0] == -torch.inf).all()
    assert (answer.margin.gather(1, it.y[:, None]) == -torch.inf).all()
    for number in range(1, IMAGES):
        proven = answer.margin[number] > 0
        least = (it.margin[it.images == number]).min()
        assert proven.sum() == CLASSES - 1 or answer.fallen[number] or least < 1
    besides = torch.full((IMAGES, CLASSES), 1e3, dtype=torch.float64)
    assert not (prove_classes(it.images_chain, it.y, asked, besides).margin > 0).any()


def test_an_image_that_the_attack_breaks_is_reported_with_the_point():
    it = Case("relu", 6.0)
    answer = prove_classes(it.images_chain, it.y, torch.ones(IMAGES, CLASSES, dtype=torch.bool))
    fallen = answer.fallen.nonzero().squeeze(1)
    assert len(fallen)
    assert (answer.step[fallen].flatten(1).norm(dim=1) <= 6.0 * (1 + 1e-5)).all()
    assert (it.model((it.x + answer.step)[fallen]).argmax(dim=1) != it.y[fallen]).all()
