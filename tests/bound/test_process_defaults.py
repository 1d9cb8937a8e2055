"""Nothing in a proof depends on the defaults of the process that makes it."""

import contextlib

import pytest
import torch
from oracles import clipped_relu
from torch import nn

from locallip.bound import proven_norms
from locallip.bound.certificates import certified_radius, certify, local_lipschitz
from locallip.bound.layers import ClampGroupSort, Normalize
from locallip.bound.proof import EFFORTS, prove
from locallip.bound.proven_norms import ProvenNorms


@contextlib.contextmanager
def setting(change, value, back):
    change(value)
    try:
        yield
    finally:
        change(back)


def default_dtype(dtype):
    return lambda: setting(torch.set_default_dtype, dtype, torch.float32)


@contextlib.contextmanager
def deterministic():
    """With new memory full of NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    with setting(torch.use_deterministic_algorithms, True, False):
        assert torch.empty(1).isnan()
        yield


@contextlib.contextmanager
def bfloat16_in(kind):
    """Float32 products of this kind rounded to bfloat16 before, where the CPU can."""
    kind.fp32_precision = "bf16"
    try:
        yield
    finally:
        kind.fp32_precision = "none"


@contextlib.contextmanager
def medium_products():
    """The older way to say the same, which leaves its mark on the newer settings."""
    with setting(torch.set_float32_matmul_precision, "medium", "highest"):
        yield
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


STATES = {
    "bfloat16 by default": default_dtype(torch.bfloat16),
    "float16 by default": default_dtype(torch.float16),
    "float64 by default": default_dtype(torch.float64),
    "another device by default": lambda: setting(torch.set_default_device, "meta", None),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "deterministic algorithms": deterministic,
    "products in low precision": medium_products,
    "matrices in bfloat16": lambda: bfloat16_in(torch.backends.mkldnn.matmul),
    "convolutions in bfloat16": lambda: bfloat16_in(torch.backends.mkldnn.conv),
    "denormals flushed": lambda: setting(torch.set_flush_denormal, True, False),
}


def network(kind):
    torch.manual_seed(0)
    if kind == "wide":  # so wide that settings of products make a difference
        layers = [nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)]
        return spread(nn.Sequential(*layers))
    if kind == "maxmin":
        layers = [nn.Conv2d(1, 4, 3, padding=1), ClampGroupSort((4, 6, 6), 0.3, -0.3)]
    else:
        layers = [Normalize([0.3], [0.5]), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), clipped_relu(4, 6, 6)]
    layers += [nn.AvgPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(24, 3)]
    return spread(nn.Sequential(*layers))


def spread(model):
    """The model with a last layer so large that the ball can change every answer."""
    nn.init.normal_(model[-1].weight)
    return model.eval()


class Case:
    """A network in float32, images and the answers at them."""

    def __init__(self, kind):
        self.model = network(kind)
        self.x = torch.rand(6, 1, 28, 28) if kind == "wide" else torch.rand(6, 1, 6, 6)
        with torch.no_grad():
            self.y = self.model(self.x).argmax(dim=1)
        self.double = network(kind).double(), self.x.double()


@pytest.fixture(scope="module", params=["clipped", "maxmin"])
def case(request):
    return Case(request.param)


@pytest.fixture(params=STATES)
def state(request):
    return STATES[request.param]


# Answers under the defaults of PyTorch, by what was asked.
_plain = {}


@pytest.fixture(autouse=True)
def _the_same_chance_and_few_iterations(monkeypatch):
    monkeypatch.setattr(proven_norms.secrets, "randbits", lambda bits: 7)
    monkeypatch.setattr("locallip.bound.inquiry.ESTIMATE_ITERATIONS", 20)


def same(name, question, state):
    """Ask a question of that name under the defaults of PyTorch and in another state: the answers must be the same."""
    if name not in _plain:
        _plain[name] = question()
    plain = _plain[name]
    with state():
        other = question()
    assert plain.keys() == other.keys()
    for column, value in plain.items():
        assert (value.dtype, value.device) == (other[column].dtype, other[column].device), column
        assert torch.equal(value, other[column]), column
    return plain


EPSILON = 0.03


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_proof_is_the_same(case, state, effort):
    def question():
        model, x = case.double
        proof = prove(model, x, case.y, EPSILON, ProvenNorms(1e-6, 1000, seed=3), effort=effort)
        return {name: value for name, value in vars(proof).items() if isinstance(value, torch.Tensor)}

    margins = same(("proof", case, effort), question, state)["worst_margin"]
    assert (margins > 0).any()


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_proof_for_a_float32_network_and_valid_images_is_the_same(state, effort):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    y = model(x).argmax(dim=1)

    def question():
        norms = ProvenNorms(1e-6, 1000, seed=3, deployed="float32")
        return {"margin": prove(model, x, y, EPSILON, norms, (0.0, 1.0), effort).worst_margin}

    same(("float32", effort), question, state)


@pytest.mark.parametrize("certificate", ["proven", "estimate"])
def test_what_is_certified_is_the_same(case, state, certificate):
    def question():
        radii = torch.linspace(0.001, 1.0, 6, device="cpu", dtype=torch.float32)
        return {"certified": certify(case.model, case.x, case.y, radii, certificate)}

    certified = same(("certified", case, certificate), question, state)["certified"]
    assert certified.any()
    assert not certified.all()


@pytest.mark.parametrize("certificate", ["proven", "estimate"])
def test_the_certified_radius_is_the_same(case, state, certificate):
    def question():
        arguments = {"tolerance": 0.05, "limit": 0.2, "certificate": certificate, "effort": "product"}
        return {"radius": certified_radius(case.model, case.x[:3], **arguments)}

    assert (same(("radius", case, certificate), question, state)["radius"] > 0).any()


@pytest.mark.parametrize("certificate", ["proven", "estimate"])
def test_the_lipschitz_constants_are_the_same(case, state, certificate):
    def question():
        found = local_lipschitz(case.model, case.x, EPSILON, certificate)
        return {"lipschitz": found.lipschitz, "global": found.global_lipschitz}

    assert same(("lipschitz", case, certificate), question, state)["lipschitz"].isfinite().all()


@pytest.fixture(scope="module")
def wide():
    return Case("wide")


def test_products_of_a_wide_network_are_the_same(wide, state):
    def question():
        proof = prove(*wide.double, wide.y, 0.15, ProvenNorms(1e-6, 1000, seed=3))
        found = local_lipschitz(wide.model, wide.x, EPSILON, "estimate")
        return {"margin": proof.worst_margin, "local": found.lipschitz, "global": found.global_lipschitz}

    margins = same("wide", question, state)["margin"]
    assert margins.min() < 0 < margins.max()


def test_the_number_of_threads_changes_nothing_but_rounding(wide):
    model, x = wide.double
    proofs = []
    for threads in (1, 2):  # two on cores in use take ten times as long: few images
        with setting(torch.set_num_threads, threads, torch.get_num_threads()):
            proofs.append(prove(model, x[:2], wide.y[:2], 0.15, ProvenNorms(1e-6, 1000, seed=3)))
    one, two = proofs
    for name in ("worst_margin", "hidden_lipschitz", "global_hidden_lipschitz"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-6, atol=1e-6)
    assert torch.equal(one.stage, two.stage)


@pytest.mark.parametrize("inside", [False, True], ids=["afterwards", "after an error too"])
def test_a_question_leaves_every_setting_as_it_was(case, state, inside):
    def of_the_process():
        kinds = torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
        return (
            torch.get_default_dtype(),
            torch.empty(0).device,
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            [kind.fp32_precision for kind in kinds],
        )

    before = of_the_process()
    with state():
        changed = of_the_process()
        if inside:
            with pytest.raises(ValueError, match="epsilon"):
                local_lipschitz(case.model, case.x, -1.0, "estimate")
        else:
            certify(case.model, case.x, case.y, EPSILON, effort="product")
        assert of_the_process() == changed
    assert of_the_process() == before


def test_what_inherits_a_setting_inherits_it_afterwards(case):
    backends = torch.backends
    try:
        for precision in ("bf16", "ieee"):
            backends.fp32_precision = precision
            certify(case.model, case.x, case.y, EPSILON, effort="product")
            assert [backends.mkldnn.matmul.fp32_precision, backends.mkldnn.conv.fp32_precision] == [precision] * 2
    finally:
        backends.fp32_precision = "none"
