"""What a proven certificate costs: the product, the dual, and the published protocol beside them; `--help` lists flags.

Without --saved_model, of every committed network. The product and the dual take turns on the same batches; the global
norms, which a whole test set needs once, are timed by themselves. As in an evaluation, which attacks all images anyhow,
the dual is not asked about those that PGD breaks. The published protocol, 2,000 power iterations per image and layer in
float32, is timed on a sample of the batches in the same run; it takes as long for any image. Seconds are of the
processor on a CPU, which other programs disturb less than the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import utils
from local_bound import propagate, prove
from locallip import distributed, flags
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import EFFORTS, proven_norms
from locallip.bound.worst_case import worst_logits, worst_margin
from locallip.evaluation.attacks import right
from locallip.evaluation.pgd import pgd
from locallip.files import InputError, check_writable, exists, run_script, write_atomically
from locallip.images import ImageSet

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = [str(path) for run in utils.RUNS if exists(path := ROOT / "pretrained" / f"{run.prefix}_best.pth")]


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Make sure, before any work, that the figures can be written to `path` and replace none unasked.

    Raises:
        InputError: if they cannot, or if there is something of that name and `overwrite` is False.
    """
    if exists(path) and path.is_dir():
        raise InputError(f"{path} is a folder; name a file with --json")
    if not overwrite and exists(path):
        raise InputError(f"{path} exists; choose another --json, or --overwrite")
    check_writable(path.parent)


def processor(device: torch.device) -> str:
    """Name what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def timed(
    work: Callable[[], Tensor], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[Tensor, float]:
    """What `work` returns, and its seconds by that clock."""
    _wait(device)
    started = clock()
    result = work()
    _wait(device)
    return result, clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(model: nn.Sequential, images: ImageSet, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Certify some images in all ways; args: of the command line, with the network's radius."""
    device = images.labels.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    exact = copy.deepcopy(model).double()
    batches = list(images.batches(args.test_batch_size))
    first = batches[0][0][:1].double()
    norms = proven_norms(exact, first, len(images), args.failure_probability, radii=len(EFFORTS))
    _, seconds_of_norms = timed(lambda: propagate(exact, first, 0.0, norms.with_steps(0)).radius, device, clock)
    every = max(1, len(batches) // args.sample_batches)
    certified: dict[str, list[Tensor]] = {way: [] for way in (*EFFORTS, "published")}
    seconds: dict[str, list[float]] = {way: [] for way in certified}
    sampled = []
    torch.manual_seed(args.seed)
    for number, (x, y, _) in enumerate(tqdm(batches, desc=name, unit="batch", disable=None)):
        with torch.enable_grad():
            attacked = pgd(model, x, y, args.epsilon)
        fallen = ~right(model(attacked), y)

        def by(way: str, x: Tensor = x, y: Tensor = y, fallen: Tensor = fallen) -> Tensor:
            if way in EFFORTS:
                return prove(exact, x.double(), y, args.epsilon, norms, effort=way, fallen=fallen).worst_margin
            bound = propagate(model, x, args.epsilon, PowerIteration(args.test_sniter, seed=args.seed))
            return worst_margin(worst_logits(bound, y, 1000), y)

        is_sampled = number % every == 0 and len(sampled) < args.sample_batches
        if is_sampled:
            sampled.append(number)
        for way in certified if is_sampled else EFFORTS:
            margin, taken = timed(lambda way=way: by(way), device, clock)
            certified[way].append(margin > 0)
            seconds[way].append(taken / len(x))
    return {
        "saved_model": name,
        "epsilon": args.epsilon,
        "images": len(images),
        "seconds_of_global_norms": seconds_of_norms,
        "sample": sum(len(batches[number][1]) for number in sampled),
        **_summary(certified, seconds, sampled),
    }


def _summary(certified: dict[str, list[Tensor]], seconds: dict[str, list[float]], sampled: list[int]) -> dict[str, Any]:
    """Counts, seconds per image, and ratios; of the published protocol, which has its sample only, the median."""
    sizes = [len(batch) for batch in certified["dual"]]
    each = {way: sum(s * n for s, n in zip(seconds[way], sizes)) / sum(sizes) for way in EFFORTS}
    each["published"] = statistics.median(seconds["published"])

    def count(batches: list[Tensor]) -> int:
        return int(sum(batch.sum() for batch in batches))

    return {
        "certified": {way: count(certified[way]) for way in EFFORTS},
        "certified_of_sample": {way: count([certified[way][number] for number in sampled]) for way in EFFORTS}
        | {"published": count(certified["published"])},
        "seconds_per_image": each,
        "dual_over_product": each["dual"] / each["product"],
        "dual_over_published": each["dual"] / each["published"],
    }


def as_table(nets: list[dict[str, Any]]) -> str:
    """A Markdown table, a row per network."""
    lines = [
        "| network, L2 radius | images | certified: product, dual | global norms, once |"
        " seconds an image: product, dual, published | dual over product | dual over published |"
        " certified of the sample: product, dual, published |",
        "|" + "---|" * 8,
    ]
    for net in nets:
        each = ", ".join(f"{seconds:.3g}" for seconds in net["seconds_per_image"].values())
        both = ", ".join(str(count) for count in net["certified"].values())
        sample = ", ".join(str(count) for count in net["certified_of_sample"].values())
        ratios = f"{net['dual_over_product']:.2f} | {net['dual_over_published']:.4f}"
        name = f"`{Path(net['saved_model']).name.removesuffix('_best.pth')}`, {net['epsilon']:.4g}"
        once = f"{net['seconds_of_global_norms']:.1f} s"
        lines.append(
            f"| {name} | {net['images']} | {both} | {once} | {each} | {ratios} | {sample} of {net['sample']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    evaluate.add_model_flags(parser, several=True)
    flag = parser.add_argument
    flag("--test_sniter", type=flags.positive_int, default=2000, help="power iterations of the published protocol")
    flag("--sample_batches", type=flags.positive_int, default=1, help="batches that the published protocol is timed on")
    flag("--json", type=flags.path, help="file for the figures")
    flag("--overwrite", action="store_true", help="replace the file that --json names")
    args = parser.parse_args()
    distributed.refuse_several()
    if args.json:
        refuse_existing(Path(args.json), args.overwrite)
    named = [argparse.Namespace(**vars(args) | {"saved_model": name}) for name in args.saved_model or COMMITTED]
    loaded = [(*evaluate.load(own)[:2], own) for own in named]
    nets = [measure(model, images, own.saved_model, own) for model, images, own in loaded]
    device = loaded[0][1].labels.device
    kind = "clock" if device.type == "cuda" else "processor"
    print(f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; seconds of the {kind},")
    print(f"published: {args.test_sniter} power iterations, on a sample of the same images\n")
    print(as_table(nets))
    if args.json:
        figures = {
            "nets": nets,
            "power_iterations": args.test_sniter,
            "threads": torch.get_num_threads(),
            "device": processor(device),
            "torch": torch.__version__,
        }
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(Path(args.json), lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run_script(main)
