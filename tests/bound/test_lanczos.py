"""Lanczos iteration, and the chance that it falls short."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import more_examples

from locallip.bound.lanczos import inflation, largest_ritz_value, steps_for


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("steps", "percent"), [(100, 8.8), (200, 2.1), (300, 0.9), (500, 0.3)])
def test_the_inflation_is_the_one_calculated_for_the_papers_net(steps, percent):
    factor = inflation(torch.tensor([32_768.0], dtype=torch.float64), steps, 1e-6 / 70_000)
    assert 100 * (factor.item() ** 7 - 1) == pytest.approx(percent, abs=0.05)


@more_examples
@given(st.integers(1, 10**6), st.integers(2, 1000), st.floats(1e-12, 0.5))
def test_the_inflation_solves_the_bound_of_kuczynski_and_wozniakowski(dimension, steps, probability):
    factor = inflation(torch.tensor([float(dimension)], dtype=torch.float64), steps, probability).item()
    t = 1 - factor**-2
    bound = 1.648 * math.sqrt(dimension) * math.exp(-math.sqrt(t) * (2 * steps - 1))
    if math.isfinite(factor):
        assert bound == pytest.approx(probability, rel=1e-6)
    else:
        assert bound > probability * (1 - 1e-9)


@more_examples
@given(st.integers(1, 10**6), st.floats(1e-300, 0.5), st.floats(1.0001, 3))
def test_the_steps_for_an_inflation_are_the_fewest(dimension, probability, factor):
    steps, n = steps_for(dimension, probability, factor), torch.tensor([float(dimension)], dtype=torch.float64)
    assert inflation(n, steps, probability) <= factor * (1 + 1e-12)
    assert steps == 1 or inflation(n, steps - 1, probability) >= factor * (1 - 1e-12)


@pytest.mark.parametrize("smallest", [1e-3, 1e-8, 1e-16])
def test_lanczos_keeps_its_orthogonality_on_an_ill_conditioned_operator(smallest):
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))[0]
    values = torch.logspace(0, math.log10(smallest), 60, dtype=torch.float64)
    matrix = basis * values @ basis.T
    found = largest_ritz_value(lambda v, _: v @ matrix, lambda: torch.randn(3, 60, dtype=torch.float64), steps=200)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-9, atol=0)


def test_lanczos_finds_a_leader_that_its_start_vector_has_hardly_any_part_in():
    values = torch.full((200,), 0.5, dtype=torch.float64)
    values[0] = 1
    starts = iter([torch.ones(1, 200, dtype=torch.float64) * torch.tensor([1e-13] + [1.0] * 199)])

    def draw():
        return next(starts, torch.randn(1, 200, dtype=torch.float64))

    found = largest_ritz_value(lambda v, _: v * values, draw, steps=25)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-9, atol=0)


@more_examples
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**20))
def test_the_estimate_never_exceeds_the_largest_eigenvalue_and_reaches_it_in_as_many_steps_as_dimensions(n, k, seed):
    torch.manual_seed(seed)
    root = torch.randn(n, n, dtype=torch.float64)
    gram = root @ root.T
    found = largest_ritz_value(lambda v, _: v @ gram, lambda: torch.randn(2, n, dtype=torch.float64), steps=k)
    true = torch.linalg.eigvalsh(gram)[-1].expand(2)
    assert (found <= true * (1 + 1e-12)).all()
    if k >= n:
        torch.testing.assert_close(found, true, rtol=1e-9, atol=0)


@more_examples
@given(st.integers(2, 60), st.integers(1, 70), st.integers(0, 2**20))
def test_who_has_enough_is_left_off_and_the_others_come_to_the_same(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(6, n, n, generator=generator, dtype=torch.float64)
    grams, start = roots @ roots.mT, torch.randn(6, n, generator=generator, dtype=torch.float64)
    asked = []

    def gram(v, places):
        asked.append(len(places))
        return torch.einsum("mij,mj->mi", grams[places], v)

    whole = largest_ritz_value(gram, start.clone, k)
    assert asked == [6] * min(k, n)
    enough = whole * torch.tensor([0.0, 0.5, 0.9, 1.0, 1.1, torch.inf])
    asked.clear()
    early = largest_ritz_value(gram, start.clone, k, enough)
    assert asked == sorted(asked, reverse=True)
    torch.testing.assert_close(early.clamp(max=enough), whole.clamp(max=enough), rtol=1e-9, atol=0)
    assert (early <= whole * (1 + 1e-9)).all()
    if k > 4 and n > 4:
        assert asked[4] < 6


def test_a_share_that_has_underflowed_takes_finitely_many_steps():
    assert steps_for(1000, 0.0, 1.06) == steps_for(1000, 5e-324, 1.06) < 2000
