"""The bound on convolutions that leaves nothing to chance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import convolutions, gram_iteration, matrix_of, more_examples, norm_of

from locallip.bound.operators import Conv
from locallip.bound.proven_norms import sure_bound
from locallip.bound.torus import torus_norm


@more_examples
@given(convolutions())
def test_the_sure_bound_is_above_the_norm_of_every_convolution(conv):
    true = norm_of(matrix_of(conv))
    assert sure_bound(conv) >= true * (1 - 1e-12)
    rank = min(matrix_of(conv).shape)
    assert true <= gram_iteration(matrix_of(conv)) * (1 + 1e-12)
    # The Frobenius norm of a matrix of that rank is sqrt(rank) times its norm at most.
    assert gram_iteration(matrix_of(conv)) <= sure_bound(conv) * rank ** (0.5 / 2**6) * (1 + 1e-12)


@more_examples
@given(convolutions(kernel=st.just((1, 1))))
def test_the_sure_bound_of_a_1x1_convolution_is_its_norm(conv):
    # The image fills the torus: all its places carry the same little matrix.
    conv = Conv(conv.weight, None, 0, conv.input_shape, groups=conv.groups)
    torch.testing.assert_close(sure_bound(conv), norm_of(matrix_of(conv)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_sure_bound_of_an_ordinary_convolution_is_close(seed):
    torch.manual_seed(seed)
    conv = Conv(torch.randn(4, 3, 3, 3).double(), None, 0, torch.Size([3, 12, 12]), padding=(1, 1))
    assert sure_bound(conv) <= 1.15 * norm_of(matrix_of(conv))


@more_examples
@given(convolutions())
def test_the_bound_allows_for_the_rounding_of_the_norm(conv):
    norm, bound = torus_norm(conv), sure_bound(conv)
    assert norm < bound <= norm * (1 + 1e-7) + 1e-50
