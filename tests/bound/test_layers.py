"""The layers that PyTorch does not have, entry by entry."""

import pytest
import torch
from oracles import IMAGES, clipped_maxmin, clipped_relu

from local_bound import ClampGroupSort, Normalize, ReLU_x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_clipped_relu_entry_by_entry():
    layer = clipped_relu(3, 2, 2)
    x = torch.randn(IMAGES, 3, 2, 2)
    expected = [
        min(max(value, 0), threshold)
        for image in x.flatten(1).tolist()
        for value, threshold in zip(image, layer.threshold.flatten().tolist())
    ]
    assert layer(x).flatten().tolist() == expected


def test_clipped_maxmin_entry_by_entry():
    layer = clipped_maxmin(4, 2, 2)
    x = torch.randn(IMAGES, 4, 2, 2)
    y = layer(x)
    for n in range(IMAGES):
        for c, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).tolist():
            a, b = x[n, c, i, j], x[n, c + 2, i, j]
            assert y[n, c, i, j] == min(max(a, b), layer.max[0, c, i, j])
            assert y[n, c + 2, i, j] == max(min(a, b), layer.min[0, c, i, j])


def test_projection_brings_negative_thresholds_to_zero_and_no_others():
    layer = ReLU_x((5,))
    layer.threshold.data = torch.tensor([[-1.0, 0.0, 0.5, 2.0, -1e-9]])
    layer.project()
    assert layer.threshold.tolist() == [[0.0, 0.0, 0.5, 2.0, 0.0]]


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 3, 2), (1, 4, 3, 2)])
def test_shapes_may_carry_the_batch_dimension(shape):
    entries = shape[1:] if shape[0] == 1 else shape
    assert ReLU_x(shape).threshold.shape == (1, *entries)
    assert ClampGroupSort(shape, 1, -1).max.shape == (1, 2, *entries[1:])


def test_an_odd_number_of_channels_has_no_pairs():
    with pytest.raises(ValueError, match="even"):
        ClampGroupSort((3, 4, 4), 1, -1)


def test_normalize_takes_every_channel_by_its_own_numbers():
    mean, std = [0.3, 0.6], [0.5, 0.25]
    x = torch.rand(IMAGES, 2, 3, 4)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(2)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected)
    torch.testing.assert_close(Normalize([0.3], [0.5])(x), (x - 0.3) / 0.5)


@pytest.mark.parametrize("std", [[0.0], [0.5, -1.0], [float("nan")]])
def test_a_deviation_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match="above 0"):
        Normalize([0.5] * len(std), std)
