"""How far a proof goes: to the product of norms, or on to the dual."""

import pytest
import torch
from oracles import (
    CLASSES,
    MAPS,
    ExactNorms,
    clipped_maxmin,
    clipped_relu,
    images,
    outputs_of,
    own_network,
    points_in_the_ball,
    settled,
)
from torch import nn

from local_bound import Graph, ProvenNorms, certified_radius, certify
from locallip.bound.proof import proof_stages
from locallip.bound.stages import is_by_dual


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return images(*MAPS)


def test_the_dual_certifies_larger_radii_that_hold_as_well(x):
    model = own_network()
    y = model(x).argmax(dim=1)
    product, dual = (certified_radius(model, x, y, 1e-2, effort=effort) for effort in ("product", "dual"))
    # Each is off by the tolerance at most.
    assert (dual >= product - 1e-2).all()
    assert (dual > 1.1 * product).any()
    for image in range(len(x)):
        points = points_in_the_ball(model, x[image : image + 1], dual[image].item())
        assert (outputs_of(model, points, len(model)).argmax(dim=2) == y[image]).all()


ORDERS = {
    "maps up to the end": lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)],
    "linear layers in a row": lambda: [
        *(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 12)),
        nn.Linear(12, CLASSES),
    ],
    "flattened before the activation": lambda: [
        *(nn.Conv2d(2, 3, 3), nn.Flatten(), clipped_relu(48), nn.Linear(48, 8), nn.ReLU()),
        nn.Linear(8, CLASSES),
    ],
    "pairs of what was flattened": lambda: [
        *(nn.Conv2d(2, 3, 3), nn.Flatten(), clipped_maxmin(48)),
        nn.Linear(48, CLASSES),
    ],
    "pooling": lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)],
    "two activations": lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), clipped_relu(3, 4, 4), nn.Flatten(), nn.Linear(48, 5)],
    "an activation first": lambda: [nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)],
    "linear": lambda: [nn.Flatten(), nn.Linear(72, CLASSES)],
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_proof_goes_on_to_the_dual_whatever_the_order_of_the_layers(order, x):
    model = settled(*ORDERS[order]())
    y = model(x).argmax(dim=1)
    product, dual = (certified_radius(model, x, y, 1e-2, effort=effort) for effort in ("product", "dual"))
    assert (dual >= product - 1e-2).all()
    assert (dual > 0).any()
    for image in (dual > 0).nonzero().squeeze(1).tolist():
        points = points_in_the_ball(model, x[image : image + 1], dual[image].item())
        assert (outputs_of(model, points, len(model)).argmax(dim=2) == y[image]).all()


@pytest.mark.parametrize(
    "certificate", ["proven", "estimate", ExactNorms()], ids=["proven", "estimate", "norms of one's own"]
)
@pytest.mark.parametrize("ask", [certify, certified_radius])
def test_an_effort_of_another_name_is_refused(ask, certificate):
    arguments = {"epsilon": 0.1} if ask is certify else {}
    with pytest.raises(ValueError, match="guessed"):
        ask(
            nn.Sequential(nn.Linear(6, 3)),
            torch.rand(2, 6),
            torch.zeros(2, dtype=torch.long),
            certificate=certificate,
            effort="guessed",
            **arguments,
        )


@pytest.mark.parametrize(
    ("layers", "asked"),
    [
        ([nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)], True),
        ([nn.Linear(6, 8), nn.ReLU(), nn.ReLU()], False),
        ([nn.ReLU(), nn.Linear(6, 8), nn.ReLU()], False),
    ],
    ids=["linear last", "two activations in a row", "an activation first"],
)
def test_where_the_dual_cannot_be_asked_the_stages_are_those_of_the_product(layers, asked):
    graph = Graph.of(nn.Sequential(*layers, nn.Linear(8, 3)).double())
    x, norms = torch.rand(1, 6, dtype=torch.float64), ProvenNorms(1e-6, 100)
    names = [[stage.name for stage in proof_stages(graph, x, norms, effort)] for effort in ("dual", "product")]
    assert is_by_dual(names[0][-1]) == asked
    assert (names[0] == names[1]) != asked
