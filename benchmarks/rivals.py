"""The dual beside other verifiers on a plainly trained network; `--help` lists the flags.

A network 784-100-100-10 with ReLU is trained on MNIST with cross-entropy and nothing else, in seconds; then the first
test digits are certified in the whole L2 ball by the product of norms and by the dual, both proven in float64, and by
CROWN and alpha-CROWN of auto_LiRPA in float32, where that is installed (`bash run_job.sh bench-rivals` sees to it).
Every method takes all digits as one batch; times are of the processor, on one thread.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.certification import processor, refuse_existing
from data_load import load_data
from local_bound import prove
from locallip import distributed, flags
from locallip.bound.dual.around import chain_around
from locallip.bound.dual.start import attack
from locallip.bound.proof import proven_norms
from locallip.evaluation.attacks import right
from locallip.files import run_script, write_atomically
from locallip.images import ImageSet

_ATTACK_STEPS = 40
_FAILURE_PROBABILITY = 1e-6


def train(images: ImageSet, epochs: int, seed: int) -> nn.Sequential:
    """Train the network plainly: cross-entropy and Adam, batches of 128."""
    torch.manual_seed(seed)
    hidden = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=None):
        for x, y, _ in images.batches(128, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def survives(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Whether a targeted attack on every wrong class, in the whole ball, leaves the label: (N,) bool. float64."""
    norms = proven_norms(model, x[:1], 1, _FAILURE_PROBABILITY, seed=0)
    chain = chain_around(model, x, epsilon, norms.with_steps(0))
    left = right(model(x), y)
    for other in range(10):
        step, _ = attack(chain, chain.weight[other] - chain.weight[y], _ATTACK_STEPS)
        left &= right(model(x + step), y)
    return left


def by_proof(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, effort: str) -> Tensor:
    """Certified (N,) by the project's own proof; float64."""
    norms = proven_norms(model, x[:1], len(x), _FAILURE_PROBABILITY)
    return prove(model, x, y, epsilon, norms, effort=effort).worst_margin > 0


def by_crown(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, method: str) -> Tensor:
    """Certified (N,) by auto_LiRPA: `CROWN`, or `CROWN-Optimized`, which is alpha-CROWN with its 20 iterations.

    Slopes of all layers are optimised, not only those behind the logits: the stronger variant.
    """
    import auto_LiRPA

    each = torch.eye(10)
    margins = (each[y][:, None] - each)[~each[y].bool()].view(len(x), 9, 10)
    options = {
        "sparse_features_alpha": False,
        "sparse_spec_alpha": False,
        "optimize_bound_args": {"fix_intermediate_layer_bounds": False, "lr_alpha": 0.1},
    }
    bounded = auto_LiRPA.BoundedModule(copy.deepcopy(model), x, bound_opts=options)
    ball = auto_LiRPA.BoundedTensor(x, auto_LiRPA.PerturbationLpNorm(norm=2, eps=epsilon))
    lower, _ = bounded.compute_bounds(x=(ball,), C=margins, method=method, bound_upper=False)
    return (lower > 0).all(dim=1)


def prepare_auto_lirpa() -> bool:
    """Whether auto_LiRPA is installed; makes its version 0.3 run with a torch and a numpy of today.

    That version takes names that have moved or gone since.
    """
    if importlib.util.find_spec("auto_LiRPA") is None:
        return False
    import torch.onnx.symbolic_helper
    import torch.onnx.utils
    from torch.onnx._internal.torchscript_exporter import _globals, utils

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sets = types.ModuleType("numpy.lib.arraysetops")
    sets.isin = np.isin
    sys.modules.setdefault(sets.__name__, sets)
    torch.onnx.utils._optimize_graph = utils._optimize_graph
    torch.onnx.symbolic_helper._set_opset_version = lambda version: setattr(
        _globals.GLOBALS, "export_onnx_opset_version", version
    )
    torch._C.Node.__getitem__ = lambda node, name: getattr(node, node.kindOf(name))(name)
    return True


def measure(methods: dict[str, Callable[[float], Tensor]], epsilon: float, images: int) -> dict[str, dict[str, Any]]:
    """Certified images and processor milliseconds an image of every method, the attack first.

    `broken` counts the images that a method certifies and the attack breaks.
    """
    figures, left = {}, torch.ones(images, dtype=torch.bool)
    for number, (name, method) in enumerate(methods.items()):
        started = time.process_time()
        certified = method(epsilon)
        seconds = time.process_time() - started
        left = certified if number == 0 else left
        broken = int((certified & ~left).sum())
        figures[name] = {"certified": int(certified.sum()), "broken": broken, "milliseconds": 1000 * seconds / images}
        if broken:
            print(f"BROKEN CERTIFICATE: {name} certifies {broken} images at {epsilon:g} that the attack breaks")
    return figures


def as_table(clean: int, radii: dict[float, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table, a row per radius; milliseconds in brackets."""
    names = list(next(iter(radii.values())))
    lines = [f"| L2 radius | clean | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
    for epsilon, figures in radii.items():
        cells = [f"{row['certified']} ({row['milliseconds']:.1f})" for row in figures.values()]
        lines.append(f"| {epsilon:g} | {clean} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--data", choices=["mnist", "digits"], default="mnist", help="data set")
    flag("--data_dir", type=flags.path, default="data", help="folder of the data sets")
    flag("--epsilons", type=flags.positive_float, nargs="+", default=[0.25, 0.5], help="L2 radii in pixel space")
    flag("--images", type=flags.positive_int, default=100, help="the first so many test digits")
    flag("--epochs", type=flags.positive_int, default=2, help="of the training")
    flag("--seed", type=flags.seed, default=0, help="of the training")
    flag("--json", type=flags.path, help="file for the figures")
    flag("--overwrite", action="store_true", help="replace the file that --json names")
    args = parser.parse_args()
    distributed.refuse_several()
    if args.json:
        refuse_existing(Path(args.json), args.overwrite)
    torch.set_num_threads(1)
    cpu = processor(torch.device("cpu"))
    images = load_data(args.data, args.data_dir, train=False)[: args.images]
    model = train(load_data(args.data, args.data_dir, train=True), args.epochs, args.seed)
    exact, (x, y, _) = copy.deepcopy(model).double(), next(images.batches(len(images)))
    clean = right(model(x), y)
    methods = {
        "attack leaves": lambda epsilon: survives(exact, x.double(), y, epsilon),
        "product": lambda epsilon: by_proof(exact, x.double(), y, epsilon, "product"),
        "dual": lambda epsilon: by_proof(exact, x.double(), y, epsilon, "dual"),
    }
    if prepare_auto_lirpa():
        methods["CROWN"] = lambda epsilon: by_crown(model, x, y, epsilon, "CROWN")
        methods["alpha-CROWN"] = lambda epsilon: by_crown(model, x, y, epsilon, "CROWN-Optimized")
    else:
        print("auto_LiRPA is not installed: no columns of CROWN (`bash run_job.sh bench-rivals` installs it)")
    radii = {epsilon: measure(methods, epsilon, len(images)) for epsilon in args.epsilons}
    print(f"certified of {len(images)} digits (processor milliseconds an image), {cpu}, torch {torch.__version__}\n")
    print(as_table(int(clean.sum()), radii))
    if args.json:
        figures = {
            "images": len(images),
            "clean": int(clean.sum()),
            "radii": {f"{epsilon:g}": row for epsilon, row in radii.items()},
            "data": args.data,
            "epochs": args.epochs,
            "seed": args.seed,
            "processor": cpu,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(Path(args.json), lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run_script(main)
