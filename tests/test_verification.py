"""`verify`: every image gets the status that it deserves, whichever stage decides."""

import inspect
import math
import re
import sys

import pytest
import torch
from conftest import spawn
from oracles import clipped_relu, train_a_little
from torch import nn

import locallip
from locallip import verification
from locallip.bound.proof import EFFORTS
from locallip.evaluation.attacks import descend, inside, is_inside, margins, random_steps
from locallip.verification import STATUSES, Verification, verify

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plane():
    """Two classes for images of two pixels, which meet where the first pixel is 0.7; class 1 is on the left."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    net[1].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    net[1].bias.data = torch.tensor([-0.7, 0.7])
    return net


def pixels(*first):
    """An image (N, 1, 1, 2) for each value of the first pixel."""
    return torch.tensor([[value, 0.5] for value in first])[:, None, None]


@pytest.fixture(scope="module")
def net(digits):
    """A net trained on digits a little, 48 test images and their labels, one of which is wrong."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 5, stride=3), clipped_relu(4, 8, 8), nn.Flatten(), nn.Linear(256, 32), nn.ReLU()]
    model = train_a_little(nn.Sequential(*layers, nn.Linear(32, 10)), digits[True])
    x, y, _ = next(iter(digits[False].batches(48)))
    return model, x, y.clone()


RADIUS = 0.4


@pytest.fixture(scope="module")
def found(net):
    return verify(*net, RADIUS, seed=0)


# --- each status -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_image_is_certified_attacked_or_misclassified_as_the_plane_says(dtype):
    x, y = pixels(0.5, 0.65, 0.75).to(dtype), torch.tensor([1, 1, 1])
    result = verify(plane(), x, y, 0.1)
    assert result.status == ("certified", "attacked", "misclassified")
    assert result.decided_by == ("global", "attack", "misclassified")
    assert result.clean_margin.tolist() == pytest.approx([0.4, 0.1, -0.1], abs=1e-6)
    assert result.worst_margin.tolist() == pytest.approx([0.2, -0.1, -0.3], abs=1e-5)
    assert result.point.dtype == dtype
    assert result.point.isnan().flatten(1).all(dim=1).tolist() == [True, False, True]
    assert 0.7 < result.point[1, 0, 0, 0] <= 0.75


@pytest.mark.parametrize("attack", [0, 1])
def test_what_neither_is_proven_nor_falls_is_open(attack, monkeypatch):
    monkeypatch.setattr(verification, "descend", lambda model, x, *others, **settings: torch.zeros_like(x))
    result = verify(plane(), pixels(0.65), torch.tensor([1]), 0.1, attack=attack)
    assert (result.status, result.decided_by) == (("open",), ("open",))
    assert result.point.isnan().all()


def test_all_statuses_and_several_stages_occur_among_digits(found):
    assert all(count > 0 for status, count in found.counts.items() if status != "open"), found.counts
    assert {list(found.seconds)[1], "attack", list(found.seconds)[3]} <= set(found.decided_by)
    assert sum(found.counts.values()) == 48
    assert sum(map(found.has, STATUSES)).tolist() == [1] * 48
    assert found.certified.tolist() == [status == "certified" for status in found.status]


def test_the_stages_are_asked_in_the_order_that_costs_least(net, found):
    product = verify(*net, RADIUS, effort="product")
    steps = [int(number) for name in product.seconds for number in re.findall(r"\d+", name)]
    assert 1 < steps[0] < steps[1] < steps[2]
    local = [f"local, {number} Lanczos steps" for number in steps]
    dual = [f"dual, {number} Lanczos steps" for number in steps[:2]]
    assert list(product.seconds) == ["global", local[0], "attack", *local[1:]]
    assert list(found.seconds) == ["global", local[0], "attack", dual[0], local[1], dual[1]]
    assert product.counts["attacked"] == found.counts["attacked"]
    assert "attack" not in verify(*net, RADIUS, attack=0).seconds


def test_an_attack_spares_the_dual_and_certifies_nothing_less(net, found):
    calm = verify(*net, RADIUS, attack=0, seed=0)
    assert torch.equal(calm.certified, found.certified)
    assert not calm.has("attacked").any()
    broken = found.has("attacked")
    assert broken.any()
    assert (found.worst_margin[broken] <= 0).all()


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("epsilon", [0.0, 0.05, RADIUS])
def test_certify_is_the_short_form(net, effort, epsilon):
    assert torch.equal(verify(*net, epsilon, effort=effort).certified, locallip.certify(*net, epsilon, effort=effort))


def test_pieces_change_nothing_and_the_budget_covers_all_of_them(net, found):
    pieces = verify(*net, RADIUS, batch_size=7, seed=0)
    assert pieces.status == found.status
    assert pieces.point.shape == found.point.shape
    assert list(pieces.seconds) == list(found.seconds)
    torch.testing.assert_close(pieces.clean_margin, found.clean_margin, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces.hidden_lipschitz, found.hidden_lipschitz, rtol=1e-3, atol=0)
    assert pieces.global_hidden_lipschitz == found.global_hidden_lipschitz


def test_every_image_has_its_own_epsilon(net, found):
    model, x, y = net
    both = verify(model, torch.cat([x, x]), torch.cat([y, y]), torch.tensor([RADIUS] * 48 + [0.0] * 48), seed=0)
    assert both.status[:48] == found.status
    assert set(both.status[48:]) == {"certified", "misclassified"}


def test_the_model_the_images_and_the_callers_random_numbers_stay_as_they_are(net):
    model, x, y = net
    before = {name: value.clone() for name, value in model.state_dict().items()}, x.clone(), torch.get_rng_state()
    before += ({name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()},)
    for name, parameter in model.named_parameters():
        parameter.grad = before[3][name].clone()
    verify(model, x, y, RADIUS, attack=2)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(x, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(parameter.grad, before[3][name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_attack_finds_its_gradients_in_every_mode(net, found, mode):
    model, x, y = net
    with mode():
        assert verify(model, x + 0, y, RADIUS, seed=0).status == found.status


# --- the attack's point ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_an_attacked_image_comes_with_a_point_of_the_ball_that_is_wrong_in_float64(net, dtype, clip):
    model, x, y = net
    x = x.to(dtype)
    result = verify(model, x, y, RADIUS, clip=clip)
    attacked = result.has("attacked")
    assert attacked.any()
    point = result.point[attacked]
    assert ((point.double() - x[attacked].double()).flatten(1).norm(dim=1) <= RADIUS).all()
    if clip:
        assert 0 <= point.min() <= point.max() <= 1
    exact = nn.Sequential(*model).double()
    try:
        assert (margins(exact(point.double()), y[attacked]).amin(dim=1) < 0).all()
    finally:
        model.float()
    assert result.point[~attacked].isnan().all()


def test_valid_images_only_fall_to_valid_images():
    x, y = pixels(0.0), torch.tensor([1])
    net = plane()
    net[1].bias.data = torch.tensor([-1.0, 1.0]) * 0.05  # the classes meet at -0.05, where no valid image is
    net[1].weight.data *= -1
    assert verify(net, x, y, 0.1).status == ("attacked",)
    assert verify(net, x, y, 0.1, clip=(0.0, 1.0)).status != ("attacked",)


FALSE_WINS = {"a step out of the ball": 0.1 + 1e-6, "a step that changes nothing": 0.0, "no number": math.nan}


@pytest.mark.parametrize("length", FALSE_WINS.values(), ids=FALSE_WINS)
def test_what_an_attack_says_counts_only_where_it_is_true(length, monkeypatch):
    step = torch.zeros(1, 1, 1, 2)
    step[..., 0] = length
    monkeypatch.setattr(verification, "descend", lambda *arguments, **settings: step)
    assert verify(plane(), pixels(0.65), torch.tensor([1]), 0.1).status == ("open",)
    step[..., 0] = 0.099
    assert verify(plane(), pixels(0.65), torch.tensor([1]), 0.1).status == ("attacked",)


def test_a_point_that_rounding_may_have_made_wrong_is_no_win(monkeypatch):
    # The two logits differ by a thousandth, which float64 cannot tell beside sums of 1e16.
    net = nn.Sequential(nn.Linear(3, 2)).double()
    net[0].weight.data = torch.tensor([[1e16, -1e16, 1e-3], [0.0, 0.0, 0.0]]).double()
    net[0].bias.data = torch.zeros(2).double()
    x, y = torch.tensor([[1.0, 1.0, 0.5]]).double(), torch.tensor([0])
    monkeypatch.setattr(verification, "descend", lambda model, x, *others, **settings: torch.tensor([[0, 0, -1.0]]))
    result = verify(net, x, y, 1.0)
    assert result.clean_margin > 0
    assert net(x + torch.tensor([[0, 0, -1.0]])).diff() > 0
    assert result.status == ("open",)


def test_a_tie_at_the_end_of_the_ball_is_neither_certified_nor_attacked():
    result = verify(plane().double(), pixels(0.7 - 0.125).double(), torch.tensor([1]), 0.125)
    assert result.status == ("open",)


def test_more_starts_break_what_one_start_does_not():
    # A plateau around x, where there is no slope to go down.
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0]]), torch.tensor([-0.2])
    net[2].weight.data, net[2].bias.data = torch.tensor([[0.0], [1.0]]), torch.tensor([0.1, 0.0])
    x, y = torch.zeros(1, 1), torch.tensor([0])
    assert verify(net, x, y, 1.0, attack=1).status == ("open",)
    assert verify(net, x, y, 1.0, attack=30).status == ("attacked",)


# --- no numbers, ties ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("attack", [0, 2])
def test_an_image_that_is_not_finite_is_misclassified_and_leaves_the_others_alone(net, found, value, attack):
    model, x, y = net
    x = x.clone()
    x[1, 0, 2, 3] = value
    result = verify(model, x, y, RADIUS, attack=attack, seed=0)
    assert result.status[1] == "misclassified"
    assert result.point[1].isnan().all()
    others = [image for image in range(48) if image != 1]
    assert torch.equal(result.certified[others], found.certified[others])


def test_a_pixel_that_the_network_does_not_see_must_be_finite_too():
    model = nn.Sequential(nn.Linear(6, 4), clipped_relu(4), nn.Linear(4, 3))
    nn.init.uniform_(model[0].weight, 0.1, 1)
    x = torch.rand(1, 6)
    x[0, 0] = torch.inf
    assert model(x).isfinite().all()
    assert verify(model, x, model(x).argmax(dim=1), 0.0).status == ("misclassified",)


def test_a_network_that_is_not_finite_certifies_nothing(net):
    _, x, y = net
    broken = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    broken[1].weight.data[3, 5] = torch.nan
    assert set(verify(broken, x, y, RADIUS).status) == {"misclassified"}


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_a_tie_is_misclassified(epsilon):
    net = nn.Sequential(nn.Linear(2, 3))
    nn.init.zeros_(net[0].weight), nn.init.zeros_(net[0].bias)
    assert verify(net, torch.rand(3, 2), torch.arange(3), epsilon).status == ("misclassified",) * 3


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"y": [1, 1, 1]}, "one label per image"),
        ({"y": torch.ones(2, dtype=torch.long)}, "one label per image"),
        ({"y": torch.ones(3, 1, dtype=torch.long)}, "one label per image"),
        ({"y": torch.ones(3)}, "one label per image"),
        ({"y": torch.ones(3, dtype=torch.int32)}, "one label per image"),
        ({"y": torch.tensor([0, 1, 2])}, "between 0 and 1"),
        ({"y": torch.tensor([0, 1, -1])}, "between 0 and 1"),
        ({"x": pixels()}, "takes .N, 2., but gets .N, 1."),
        ({"epsilon": -0.1}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": torch.full((2,), 0.1)}, "one epsilon"),
        ({"effort": "guessed"}, "guessed"),
        ({"attack": -1}, "attack"),
        ({"batch_size": 0}, "batch size"),
        ({"clip": (1.0, 0.0)}, "clip"),
        ({"clip": (0.0, 0.5)}, "outside"),
        ({"clip": (0, 10**400)}, "clip"),
        ({"clip": (0.0, math.inf)}, "clip"),
        ({"failure_probability": 2.0}, "probability"),
    ],
    ids=str,
)
def test_what_has_no_sense_is_refused_in_one_line(changes, complaint):
    arguments = {"model": plane(), "x": pixels(0.5, 0.6, 0.8), "y": torch.tensor([1, 1, 0]), "epsilon": 0.1} | changes
    with pytest.raises((TypeError, ValueError), match=complaint) as refusal:
        verify(**arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("attack", [0, 1])
def test_no_images_have_no_answers(attack):
    found = verify(plane(), pixels(0.5)[:0], torch.zeros(0, dtype=torch.long), 0.1, attack=attack)
    assert (found.status, found.worst_margin.shape, str(found)) == ((), (0,), "0 images")
    assert (found.certified.dtype, found.certified.shape) == (torch.bool, (0,))


@pytest.mark.parametrize("x", [[[0.5, 0.5]], torch.ones(3, 2, dtype=torch.uint8), torch.ones(3).half(), torch.ones(3)])
def test_what_are_no_images_is_refused(x):
    with pytest.raises((TypeError, ValueError), match="need images"):
        verify(nn.Sequential(nn.Linear(2, 2)), x, torch.ones(3, dtype=torch.long), 0.1)


def test_an_unknown_layer_and_training_mode_are_refused_before_anything_runs():
    x, y = torch.rand(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match="Softshrink"):
        verify(nn.Sequential(nn.Linear(2, 2), nn.Softshrink(), nn.Linear(2, 2)), x, y, 0.1)
    with pytest.raises(ValueError, match="training mode"):
        verify(nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)), x, y, 0.1)


def test_a_status_of_another_name_is_refused(found):
    with pytest.raises(ValueError, match="guessed"):
        found.has("guessed")


# --- what a person sees ----------------------------------------------------------------------------------------------


def test_the_summary_counts_every_image(found):
    first, by, seconds = str(found).splitlines()
    assert first.startswith(f"48 images at epsilon {RADIUS}: {found.counts['certified']} certified")
    assert all(f"{count} {status}" in first for status, count in found.counts.items())
    counts = [int(part.rpartition(": ")[2]) for part in by.split(";")]
    assert sum(counts) == found.counts["certified"]
    assert all(f"{name}: " in seconds for name in found.seconds)


def test_the_bar_shows_the_counts(net, found, capsys):
    verify(*net, RADIUS, batch_size=16, seed=0, progress=True)
    shown = capsys.readouterr().err
    assert all(f"{status}={count}" in shown for status, count in found.counts.items())
    verify(*net, RADIUS, seed=0)
    assert capsys.readouterr() == ("", "")


def test_a_bar_without_tqdm_is_refused_in_one_line(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        verify(*net, RADIUS, progress=True)


def test_the_package_verifies_without_what_an_evaluation_needs():
    code = "import sys\nfor name in ('advertorch', 'torchvision', 'matplotlib', 'tqdm'): sys.modules[name] = None\n"
    code += "import torch, locallip\nfrom torch import nn\n"
    code += "print(locallip.verify(nn.Sequential(nn.Linear(2, 2)), torch.rand(3, 2), torch.zeros(3).long(), 0.1))"
    answer = spawn("-c", code)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("3 images at epsilon 0.1:")


def test_it_is_exported_with_its_result():
    assert (locallip.verify, locallip.Verification) == (verify, Verification)
    assert {"verify", "Verification"} <= set(locallip.__all__)
    with pytest.raises(AttributeError):
        Verification(*[None] * len(inspect.signature(Verification).parameters)).status = ()


# --- the attack itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_steps_stay_inside_and_a_longer_one_is_noticed(clip):
    x, epsilon = torch.rand(20, 3, 4, 4), torch.linspace(1e-3, 3, 20)
    step = inside(x, 10 * torch.randn_like(x), epsilon, clip)
    assert is_inside(x, x.double() + step.double(), epsilon.double(), clip).all()
    assert not is_inside(x, x.double() + 1.001 * random_sphere(x, epsilon), epsilon.double(), clip).any()
    assert is_inside(x, x.double() + random_steps(x, epsilon).double(), epsilon.double()).all()


def random_sphere(x, epsilon):
    step = torch.randn_like(x).double()
    return step / step.flatten(1).norm(dim=1)[:, None, None, None] * epsilon.double()[:, None, None, None]


def test_descent_attains_the_worst_margin_of_a_linear_net_and_goes_for_the_class_that_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    x, y, epsilon = torch.rand(5, 3, 2, 2).double(), torch.zeros(5, dtype=torch.long), torch.full((5,), 0.3).double()
    slopes = (net[1].weight - net[1].weight[0]).norm(dim=1).detach()
    worst = (margins(net(x), y) - 0.3 * slopes).detach()
    step = descend(net, x, y, epsilon)
    torch.testing.assert_close(margins(net(x + step), y).amin(dim=1), worst.amin(dim=1), rtol=0, atol=0.05)
    step = descend(net, x, y, epsilon, other=torch.full((5,), 3))
    torch.testing.assert_close(margins(net(x + step), y)[:, 3], worst[:, 3], rtol=0, atol=2e-3)
    start = descend(net, x, y, epsilon, start=step, steps=0, other=torch.full((5,), 3))
    torch.testing.assert_close(start, step, rtol=1e-5, atol=0)


@pytest.mark.parametrize("hide", [torch.no_grad, torch.enable_grad], ids=["no_grad", "detach"])
def test_a_network_that_hides_its_gradients_is_attacked_without_them(hide):
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 3, bias=False)

        def forward(self, x):
            with hide():
                return self.last(x.detach())

    model, x = Hiding().eval(), torch.rand(16, 6)
    result = verify(model, x, model(x).argmax(dim=1), 20.0, attack=3)
    assert set(result.status) <= {"attacked", "open"}
    assert "attacked" in result.status


def test_a_seed_may_have_as_many_bits_as_those_that_are_drawn(net):
    assert verify(*net, RADIUS, seed=2**200).status == verify(*net, RADIUS, seed=2**200).status
