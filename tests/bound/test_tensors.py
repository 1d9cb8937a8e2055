"""The arithmetic that the bound's parts share, against the same as PyTorch has it."""

import pytest
import torch

from locallip.bound.tensors import (
    ForEveryImage,
    eliminating,
    infinite_to_nan,
    lengths,
    underflow_to_nan,
    underflows,
    unit,
)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_a_row_for_every_image_has_the_values_and_gradients_of_a_product(order):
    row = torch.randn(1, 4, 3, 5, dtype=torch.double).contiguous(memory_format=order).requires_grad_()
    scale = torch.rand(6, 1, 1, 1, dtype=torch.double, requires_grad=True)
    ours, theirs = ForEveryImage.apply(row, scale), row * scale
    assert torch.equal(ours, theirs)
    weights = torch.randn(6, 4, 3, 5, dtype=torch.double).contiguous(memory_format=order)
    for our, their in zip(*(torch.autograd.grad((weights * y).sum(), [row, scale]) for y in (ours, theirs))):
        torch.testing.assert_close(our, their)
    dense = torch.randn(1, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(ForEveryImage.apply, (dense, scale.detach()[:, :, 0, 0].requires_grad_()))


def test_an_image_is_eliminating_if_any_entry_of_either_mask_is_off():
    rows, columns = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 2, 5, 5, dtype=torch.bool)
    rows[1, 2] = columns[3, 1, 4, 0] = False
    for order in (torch.contiguous_format, torch.channels_last):
        found = eliminating(rows, columns.contiguous(memory_format=order))
        assert found.tolist() == [False, True, False, True]
    assert eliminating(None, columns).tolist() == [False, False, False, True]


def test_the_unit_of_nothing_is_nothing_and_of_what_overflows_not_a_number():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e38, 3e38]])
    unit_vectors, lengths = unit(x.clone())
    assert torch.equal(unit_vectors[:2], torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert torch.equal(lengths[:2], torch.tensor([5.0, 0.0]))
    assert unit(torch.tensor([[torch.inf, 0.0]]))[1].isnan().all()


SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


@pytest.mark.parametrize("dtype", SMALLEST)
def test_a_product_underflows_where_less_than_a_percent_of_precision_is_left(dtype):
    product = torch.tensor([0.0, 1.0, 32.0, 128.0, 1024.0], dtype=dtype) * SMALLEST[dtype]
    assert underflows(product, torch.ones_like(product)).tolist() == [True, True, True, False, False]
    assert underflows(-product, torch.ones_like(product)).tolist() == [True, True, True, False, False]
    assert not underflows(product, torch.ones_like(product), torch.zeros_like(product)).any()


@pytest.mark.parametrize("dtype", SMALLEST)
def test_what_is_flushed_to_zero_underflows(dtype):
    factor = torch.tensor([1e-3 if dtype == torch.float16 else torch.finfo(dtype).tiny ** 0.6], dtype=dtype)
    assert torch.set_flush_denormal(True)
    try:
        assert underflow_to_nan(factor * factor * factor, factor).isnan().all()
        assert underflow_to_nan(0 * factor, factor, 0 * factor) == 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 16, 1000])
def test_what_is_infinite_becomes_nan_and_nothing_else_changes(count, dtype):
    endless, some = torch.full((count,), torch.inf, dtype=dtype), torch.linspace(-1e4, 1e4, count).to(dtype)
    assert infinite_to_nan(endless).isnan().all()
    assert infinite_to_nan(-endless).isnan().all()
    assert infinite_to_nan(endless * torch.nan).isnan().all()
    assert torch.equal(infinite_to_nan(some), some)


def test_a_length_that_overflows_is_nan():
    assert lengths(torch.full((1, 4), 3e38)).isnan().all()
    assert lengths(torch.full((1, 4), 6e4, dtype=torch.float16)).isfinite().all()  # told in float32
