import pytest
import torch
from conftest import WIDTH
from torch import nn

import utils
from data_load import DATA_SETS
from local_bound import propagate
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.bound.power_iteration import PowerIteration
from locallip.files import InputError

# --- activations


@pytest.mark.parametrize("size", [(3, 4, 5), (1, 3, 4, 5), [3, 4, 5], torch.Size([1, 3, 4, 5])])
def test_relu_x_has_one_threshold_per_entry_of_a_feature_map(size):
    assert ReLU_x(size, 0.5).threshold.shape == (1, 3, 4, 5)


@pytest.mark.parametrize("size", [7, (7,), (1, 7)])
def test_relu_x_has_one_threshold_per_dense_entry(size):
    assert ReLU_x(size, 0.5).threshold.shape == (1, 7)


@pytest.mark.parametrize("size", [(6, 4, 5), (1, 6, 4, 5)])
def test_clamp_group_sort_has_one_min_and_max_per_entry_of_a_half(size):
    layer = ClampGroupSort(size, maxthres=0.3, minthres=-0.2)
    assert layer.max.shape == layer.min.shape == (1, 3, 4, 5)
    assert (layer.max == 0.3).all()
    assert (layer.min == -0.2).all()


@pytest.mark.parametrize("make", [lambda size: ReLU_x(size, 1.0), lambda size: ClampGroupSort(size, 1.0, -1.0)])
@pytest.mark.parametrize("size", [(4, 5), (2, 4, 5, 5), (1, 1, 4, 5, 5)])
def test_activations_refuse_what_is_no_shape_of_one_image(make, size):
    with pytest.raises(ValueError, match="shape"):
        make(size)


def test_clamp_group_sort_refuses_an_odd_number_of_channels():
    with pytest.raises(ValueError, match="even"):
        ClampGroupSort((3, 4, 4), 1.0, -1.0)


def test_relu_x_clips_at_both_ends():
    x = torch.tensor([[-1.0, 0.0, 0.4, 0.6]])
    assert torch.equal(ReLU_x(4, 0.5)(x), torch.tensor([[0.0, 0.0, 0.4, 0.5]]))


def test_clamp_group_sort_sorts_the_halves_and_clips_them():
    x = torch.tensor([[0.1, 5.0, -5.0, 0.2]])  # a = (0.1, 5), b = (-5, 0.2)
    assert torch.equal(ClampGroupSort(4, 1.0, -1.0)(x), torch.tensor([[0.1, 1.0, -1.0, 0.2]]))


# --- architectures


def parameters(model, *names):
    return sum(value.numel() for key, value in model.state_dict().items() if key.endswith(names))


def test_4c3f_has_the_published_number_of_parameters():
    model = utils.select_model("mnist", "relux")
    assert parameters(model, "weight", "bias") == 1_974_762
    assert parameters(model, "threshold") == 48_064


def test_4c3f_has_the_published_state_dict_layout():
    linear, clipped = (0, 2, 4, 6, 9, 11, 13), (1, 3, 5, 7, 10, 12)
    expected = {f"{i}.{name}" for i in linear for name in ("weight", "bias")} | {f"{i}.threshold" for i in clipped}
    state = utils.select_model("mnist", "relux").state_dict()
    assert state.keys() == expected
    assert state["1.threshold"].shape == (1, 32, 28, 28)
    assert state["12.threshold"].shape == (1, 512)


def test_standrelu_is_the_same_net_without_thresholds():
    clipped, plain = (utils.select_model("mnist", name).state_dict() for name in ("relux", "standrelu"))
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in clipped.items() if "threshold" not in k}


@pytest.mark.parametrize("data", ["mnist", "digits"])
@pytest.mark.parametrize("name", ["relux", "standrelu"])
def test_models_map_images_to_ten_logits(data, name):
    model = utils.select_model(data, name, width=WIDTH)
    assert isinstance(model, nn.Sequential)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_init_is_the_start_value_of_every_threshold():
    layers = [layer for layer in utils.select_model("mnist", "relux", init=2.5) if isinstance(layer, ReLU_x)]
    assert len(layers) == 6
    assert all((layer.threshold == 2.5).all() for layer in layers)


def test_convolutions_start_with_the_published_spread_and_no_bias():
    torch.manual_seed(0)
    for layer in utils.select_model("mnist", "relux"):
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels)) ** 0.5
            # The sample deviation of n normal numbers is off by about 1 / sqrt(2 n).
            assert layer.weight.std().item() == pytest.approx(expected, rel=4 / (2 * layer.weight.numel()) ** 0.5)
            assert not layer.bias.any()


def test_width_scales_channels_and_hidden_units_but_not_the_classes():
    model = utils.select_model("mnist", "relux", width=0.5)
    assert [layer.out_channels for layer in model if isinstance(layer, nn.Conv2d)] == [16, 16, 32, 32]
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [256, 256, 10]


def test_a_tiny_width_leaves_one_channel_at_least():
    assert utils.select_model("mnist", "relux", width=1e-6)(torch.rand(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    ("data", "model", "width"),
    [("letters", "relux", 1), ("mnist", "alexnet", 1), ("mnist", "relux", 0), ("mnist", "relux", float("nan"))],
)
def test_select_model_refuses_what_does_not_exist(data, model, width):
    with pytest.raises(InputError):
        utils.select_model(data, model, width=width)


# --- orthogonal start


@pytest.mark.parametrize(("data", "model"), [("mnist", "relux"), ("mnist", "c4f3_clmaxmin"), ("cifar10", "c6f2_relux")])
def test_orthogonal_layers_start_with_spectral_norms_of_at_most_1(data, model):
    torch.manual_seed(0)
    net = utils.select_model(data, model, width=0.25, orthogonal=True)
    bound = propagate(net, torch.rand(1, *DATA_SETS[data].shape), 0.0, PowerIteration(200))
    norms = list(bound.global_norms.values())
    assert all(0.5 < norm <= 1.001 for norm in norms)
    weight = next(layer for layer in net if isinstance(layer, nn.Linear)).weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["c4f3_clmaxmin", "c4f3_maxmin"])
def test_4c3f_with_maxmin_has_the_shape_of_the_published_net(model):
    ours, published = (utils.select_model("mnist", name) for name in (model, "relux"))
    assert parameters(ours, "weight", "bias") == parameters(published, "weight", "bias")


def test_the_thresholds_of_4c3f_with_clipped_maxmin_start_at_1():
    ours = utils.select_model("mnist", "c4f3_clmaxmin")
    thresholds = [layer for layer in ours if isinstance(layer, ClampGroupSort)]
    assert len(thresholds) == 6
    assert all((layer.max == 1).all() and (layer.min == -1).all() for layer in thresholds)
