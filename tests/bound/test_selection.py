"""Moves of entries: slices, other orders, zeros at the border, copies."""

import math

import pytest
import torch
import torch.nn.functional as F
from contracts_of_operators import OperatorContract
from hypothesis import strategies as st
from oracles import CLASSES, MAPS, attack, batch, images, matrix_of, settled, walk
from torch import nn

from local_bound import Graph, ProvenNorms, certified_radius
from locallip.bound.selection import Selection, places_of, select

ONE = torch.ones(1, 1, 1, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def places(move, *shape, **arguments):
    (found,) = places_of(move, torch.Size(shape), ONE, **arguments)
    return found


def selection(move, *shape):
    found = places(move, *shape)
    return Selection.of(found, 0, torch.Size(shape), torch.zeros((), dtype=torch.float64))


def steps(model, x):
    """Steps of length 1 from images x: at random, and towards every class."""
    found = [*torch.randn(16, *x.shape, dtype=x.dtype), *(s for c in range(CLASSES) for s in attack(model, x, 1, c, 1))]
    found = [step for step in found if step.flatten(1).any(dim=1).all()]
    return [step / step.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) for step in found]


class TestSelection(OperatorContract):
    def create(self, draw):
        shape = torch.Size(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        to = torch.Size(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        found = torch.randint(-1, shape.numel(), to)
        weight = torch.randn(to[0], *[1] * (len(to) - 1), dtype=torch.float64)
        return Selection(found, weight, 0, shape)


# --- what functions do to places -------------------------------------------------------------------------------------

MOVES = {
    "a slice": lambda x: x[:, :, ::2, 1:],
    "one channel": lambda x: x[:, 1],
    "channels by number": lambda x: x[:, [1, 0, 1]],
    "narrow": lambda x: x.narrow(2, 1, 3),
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 1])),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 3),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: torch.roll(x, 1, 2),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "zeros around": lambda x: F.pad(x, (1, 2, 0, 1)),
    "a crop by padding": lambda x: F.pad(x, (-1, -1, 0, 0)),
    "the padded slice of a shortcut": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)),
    "a border that is reflected": lambda x: F.pad(x, (2, 1, 1, 1), mode="reflect"),
    "a border that is repeated": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "a border that goes round": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "expand": lambda x: x[:, :1].expand(len(x), 3, 6, 6),
    "every entry twice": lambda x: x.repeat_interleave(2, 2),
    "to nearest": lambda x: F.interpolate(x, scale_factor=2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "overlapping windows": lambda x: x.unfold(2, 3, 1),
    "windows as columns": lambda x: F.unfold(x, 3, padding=1),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_selects_what_the_function_gives_and_has_the_norm_of_its_matrix(name):
    move = MOVES[name]
    operator, x = selection(move, *MAPS), batch(MAPS)
    assert torch.equal(operator.apply(x), move(x))
    matrix = matrix_of(operator)
    assert set(matrix.unique().tolist()) <= {0.0, 1.0}
    norm = torch.linalg.matrix_norm(matrix, ord=2)
    torch.testing.assert_close(operator.norm_bound(), norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MOVES)
def test_a_network_with_a_move_has_balls_and_boxes_that_hold(name):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.last = nn.Linear(math.prod(MOVES[name](torch.zeros(1, *MAPS)).shape), CLASSES)
            settled(self)

        def forward(self, x):
            return self.last(F.relu(MOVES[name](self.conv(x))).flatten(1))

    model, x = Moved(), images(*MAPS)
    bound = walk(model, x, 0.3)
    for step in steps(model, x):
        hidden = F.relu(MOVES[name](model.conv(x + 0.3 * step))).flatten(1)
        assert ((bound.lower - 1e-9 <= hidden) & (hidden <= bound.upper + 1e-9)).all()
        assert ((hidden - bound.center).norm(dim=1) <= bound.radius * (1 + 1e-6)).all()


NO_MOVES = {
    "an average": lambda x: F.avg_pool2d(x, 2),
    "an average of three, a whole number": lambda x: F.avg_pool2d(x, (1, 3)),
    "interpolation": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    "interpolation by area": lambda x: F.interpolate(x, size=(2, 2), mode="area"),
    "a border of ones": lambda x: F.pad(x, (1, 1), value=1.0),
    "a border of the number of a place": lambda x: F.pad(x, (1, 1), value=5.0),
    "a border that is negative": lambda x: F.pad(x, (1, 1), value=-1.0),
    "the other sign": lambda x: -x,
    "a sum": lambda x: x + x.flip(2),
    "a maximum": lambda x: F.max_pool2d(x, 2),
    "half of it": lambda x: x / 2,
    "a border without end": lambda x: F.pad(x, (1, 1), value=math.inf),
    "no numbers": lambda x: x * math.nan,
}


@pytest.mark.parametrize("name", NO_MOVES)
def test_what_computes_is_no_move(name):
    with pytest.raises(ValueError, match="something else than entries of its input or 0"):
        places(NO_MOVES[name], *MAPS)


MIXING = {
    "the other image": lambda x: x.flip(0),
    "one image for all": lambda x: x[:1].expand(len(x), *x.shape[1:]),
    "images one behind the other": lambda x: x.transpose(0, 1),
    "fewer images": lambda x: x[1:],
    "no image": lambda x: x.flatten(),
    "a number of all": lambda x: x[0, 0, 0, 0],
    "images as channels": lambda x: x.reshape(1, -1, 6, 6),
    "the batch rolled": lambda x: x.roll(1),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_move_from_image_to_image_is_refused(name):
    with pytest.raises(ValueError, match="mixes images"):
        places(MIXING[name], *MAPS)


def test_one_number_of_every_image_is_no_image_any_more():
    with pytest.raises(ValueError, match="keep its dimension"):
        places(lambda x: x[:, 0, 0, 0], *MAPS)


def test_parts_have_places_each():
    first, second = places_of(lambda x: x.chunk(2, dim=1), torch.Size([3]), ONE)
    assert (first.tolist(), second.tolist()) == ([0, 1], [2])


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_places_that_are_others_in_another_precision_are_refused(mode):
    def to(size):
        return lambda x: F.interpolate(x, size=size, mode=mode)

    x = torch.tensor([[[0.0, 1.0]]])
    apart = next(n for n in range(3, 1000) if not torch.equal(to(n)(x), to(n)(x.double()).float()))
    places(to(apart), 1, 2)
    with pytest.raises(ValueError, match="something else"):
        places(to(apart), 1, 2, rounds=True)
    assert places(to(6), 1, 2, rounds=True).tolist() == [[0] * 3 + [1] * 3]
    layers = (nn.Upsample(size=apart, mode=mode), nn.ReLU(), nn.Flatten(), nn.Linear(apart, 2))
    with pytest.raises(TypeError, match="something else"):
        walk(settled(*layers), images(1, 2), 0.1)
    with pytest.raises(TypeError, match=r"interpolate\(\).*something else"):
        walk(Called(to(apart), *layers[1:]), images(1, 2), 0.1)


class Called(nn.Module):
    """A function, and layers behind it."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.Sequential(*layers)
        settled(self)

    def forward(self, x):
        return self.layers(self.function(x))


def flat(inputs):
    return nn.ReLU(), nn.Flatten(), nn.Linear(inputs, CLASSES)


def test_a_function_of_so_many_images_is_asked_about_so_many():
    assert places(lambda x: x.expand(3, 2, 4), 1, 4, images=3).tolist() == [[0, 1, 2, 3]] * 2


def test_moves_of_more_entries_than_single_precision_can_number():
    found = places(lambda x: x.flip(1), 2**24 + 3)
    assert found[:2].tolist() == [2**24 + 2, 2**24 + 1]


def test_selected_entries_pass_gradients_on():
    x = batch(MAPS).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: select(x, places(MOVES["repeat"], *MAPS)), x)


# --- as layers -------------------------------------------------------------------------------------------------------


FAILING = {
    "channels that are no square": nn.PixelShuffle(2),
    "a border wider than the image": nn.ReflectionPad2d(9),
    "nothing left": nn.ZeroPad2d(-4),
    "groups that do not divide": nn.ChannelShuffle(3),
    "other sizes": nn.Unflatten(1, (3, 5)),
    "the batch taken apart": nn.Unflatten(0, (-1, 1)),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_layer_that_does_not_run_there_is_refused_by_name(name):
    layer = FAILING[name]
    with pytest.raises(TypeError, match=rf"{type(layer).__name__} at position 0: .+"):
        walk(settled(layer, *flat(3)), images(*MAPS), 0.1)


READ_OTHERWISE = {
    "a batch that is turned by all sizes of the reading": (lambda x: x.roll(24, 0), "other logits"),
    "places by chance": (lambda x: x[:, torch.randperm(2)], "random numbers"),
    "numbers by chance": (lambda x: x * torch.randint(1, 3, ()), "random numbers"),
    "places that the images choose": (lambda x: x[:, x[0, :, 0, 0].argsort()], "."),
    "data that is changed unseen": (lambda x: x.data.mul_(2), "data"),
    "a part that is written into": (lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0), "index_fill_"),
}


@pytest.mark.parametrize("name", READ_OTHERWISE)
def test_what_one_run_does_not_show_is_refused(name):
    function, words = READ_OTHERWISE[name]
    for _ in range(4):
        with pytest.raises(TypeError, match=words):
            walk(Called(function, *flat(72)), images(*MAPS), 0.1)


def test_writing_into_a_part_says_so():
    def zeroed(x):
        x = x.clone()
        x[:, 0] = 0
        return x

    with pytest.raises(TypeError, match=r"writes into a part of activations.*torch\.cat"):
        walk(Called(zeroed, *flat(72)), images(*MAPS), 0.1)


def test_an_activation_in_place_on_a_part_is_what_it_is_outside_of_a_certificate():
    def halves(x):
        first, _ = x.chunk(2, dim=1)
        return F.relu_(first)

    model, x = Called(lambda x: halves(x * 1.0), *flat(36)), images(*MAPS)
    torch.testing.assert_close(walk(model, x, 0.1).logits, model(x))


@pytest.mark.parametrize("layer", [nn.Upsample(scale_factor=2, mode="bilinear"), nn.ConstantPad2d(1, 0.5)], ids=str)
def test_a_layer_of_such_a_kind_that_computes_is_refused(layer):
    with pytest.raises(TypeError, match=f"{type(layer).__name__} at position 0: gives something else than entries"):
        walk(settled(layer, nn.Flatten(), nn.Linear(2, 3)), images(*MAPS), 0.1)


# --- in networks -----------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """One half of the channels goes its own way, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.fc = nn.Linear(4 * 36, CLASSES)
        settled(self)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, F.relu(self.branch(right))], dim=1)
        return self.fc(F.relu(F.channel_shuffle(x, 2)).flatten(1))


class PaddedShortcut(nn.Module):
    """A residual block whose shortcut is a padded slice, as the ResNets for CIFAR-10 have it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.fc = nn.Linear(4 * 9, CLASSES)
        settled(self)

    def forward(self, x):
        x = F.relu(self.stem(x))
        beside = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x))) + beside).flatten(1))


@pytest.mark.parametrize("kind", [Halves, PaddedShortcut], ids=lambda kind: kind.__name__)
def test_a_network_that_takes_channels_apart_gets_radii_that_no_point_breaks(kind):
    model, x = kind(), images(1, 6, 6)
    y = model(x).argmax(dim=1)
    radius = certified_radius(model, x, y)
    assert (radius > 0).all()
    for step in steps(model, x):
        assert torch.equal(model(x + 0.999 * radius.view(-1, 1, 1, 1) * step).argmax(dim=1), y)


def test_parts_that_are_split_off_are_told_apart():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, CLASSES)
            settled(self)

        def forward(self, x):
            first, second, _ = x.split([2, 2, 2], dim=1)
            return self.fc(F.relu(first - 2 * second))

    model, x = Split(), images(6)
    bound = walk(model, x, 0.1)
    torch.testing.assert_close(bound.center, F.relu(x[:, :2] - 2 * x[:, 2:4]))
    assert bound.global_hidden_lipschitz == pytest.approx(math.sqrt(5))  # one operator, of one norm


@pytest.mark.parametrize(
    "choose", [lambda x, at: x[:, at], lambda x, at: x[:, at[0] : at[1]], lambda x, at: x.index_select(1, at)]
)
def test_a_graph_is_out_of_date_when_the_places_change_that_it_was_read_with(choose):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("channels", torch.tensor([0, 2]))
            self.fc = nn.Linear(2, CLASSES)
            settled(self)

        def forward(self, x):
            return self.fc(F.relu(choose(x, self.channels)))

    model, x = Chosen(), images(4)
    graph = Graph.of(model, x)
    torch.testing.assert_close(walk(graph, x, 0.1).logits, model(x))
    model.channels += 1
    with pytest.raises(ValueError, match="graph anew"):
        walk(graph, x, 0.1)
    torch.testing.assert_close(walk(model, x, 0.1).logits, model(x))


def test_norms_of_selections_of_other_places_are_not_mistaken_for_one_another():
    norms, like = ProvenNorms(1e-6, 100), torch.zeros((), dtype=torch.float64)
    once, copies = torch.tensor([0, 1, 2, -1]), torch.tensor([0, 0, 0, 0])
    for found, norm in ((once, 1), (copies, 2), (once, 1)):
        whole = norms.whole(Selection.of(found, "place", torch.Size([4]), like))
        assert whole.upper == pytest.approx(norm, rel=1e-9)
