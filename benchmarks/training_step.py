"""Times one training step of every recipe beside a plain step of the same network; `--help` lists the flags.

A plain step is forward pass, cross-entropy, backward pass and Adam, as PyTorch has them by default. Both kinds take
turns in one process. How much a robust step costs on a CPU depends on the masks: images whose masks eliminate nothing
at a layer need no power iterations there. So it is timed twice, with iterations for all images at all layers, and as it
is for a fresh network at the recipe's largest radius; training lies between the two.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import utils
from benchmarks.certification import processor, refuse_existing, timed
from data_load import DATA_SETS
from local_bound import propagate, prove
from locallip import devices, distributed, flags
from locallip.bound.compiled import compile_all
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import proven_norms
from locallip.bound.worst_case import global_radius
from locallip.files import run_script, write_atomically
from locallip.images import channels_last
from locallip.training.step import Layout, RobustLoss, Step
from locallip.training.vectors import StoredVectors

# Images per step on a CPU, where the recipe's own number would take too long.
CPU_BATCH = {"tinyimagenet": 8}


def one_run_per_network() -> dict[str, utils.Run]:
    """The first of the paper's runs on every network, by job: what the loss is makes no difference."""
    runs: dict[tuple[str, str], utils.Run] = {}
    for run in utils.RUNS:
        if run.paper:
            runs.setdefault((run.data, run.model), run)
    return {run.job: run for run in runs.values()}


RECIPES = one_run_per_network()


class Bench:
    """The steps of one recipe, on one batch of noise.

    Attributes:
        plain: runs a plain step.
        steps: runs a robust step, by how its masks are treated.
        stored_bytes: of the singular vectors of the whole training set, or one process's share of it.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, width: float, bfloat16: bool = False):
        torch.manual_seed(args.seed)
        model = utils.select_model(args.data, args.model, args.init, width).to(device)
        self.batch_size = CPU_BATCH.get(args.data, args.batch_size) if device.type == "cpu" else args.batch_size
        x = torch.rand(self.batch_size, *DATA_SETS[args.data].shape, device=device)
        y = torch.randint(DATA_SETS[args.data].classes, (len(x),), device=device)
        self.plain = _plain_step(copy.deepcopy(model), x, y)
        self.model, self.images = model.to(memory_format=torch.channels_last), channels_last(x)
        layout = Layout.of(self.model, self.images[:1], args.indices)
        images = DATA_SETS[args.data].training_images // utils.RECIPES[args.data].processes
        self.stored_bytes = 2 * images * sum(shape.numel() for shape in layout.vectors.values())
        self.steps = {"all": self._robust_step(args, layout, y, skip=False)}
        if device.type == "cpu":
            self.steps["idle skipped"] = self._robust_step(args, layout, y, skip=True)
        if bfloat16:
            self.steps["bfloat16"] = self._robust_step(args, layout, y, device.type == "cpu", torch.bfloat16)

    def _robust_step(
        self, args: argparse.Namespace, layout: Layout, y: Tensor, skip: bool, factors: torch.dtype | None = None
    ) -> Callable[[], Tensor]:
        model, x = copy.deepcopy(self.model), self.images
        how = {"skip_idle_masks": skip, "factors": factors, "looks_for_underflow": False}  # as a training has it
        norms = PowerIteration(args.sniter, local_positions=args.indices, **how)
        loss = RobustLoss.from_arguments(model, norms, args)
        stored = StoredVectors(len(x), layout.vectors, x.device)
        step = Step(loss, norms, stored, torch.optim.Adam(model.parameters(), lr=args.lr, fused=True))
        indices = torch.arange(len(x), device=x.device)
        return lambda: step(x, y, indices, args.epsilon_train, 0.5)[0]


def _plain_step(model: nn.Sequential, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def interleaved(steps: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every run of the steps, which take turns; the first two turns warm up and do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            _, seconds = timed(step, device)
            if turn >= 2:
                times[name].append(1000 * seconds)
    return times


def peak_bytes(step: Callable[[], Tensor], device: torch.device) -> int | None:
    """Memory that the step needs at its peak, beside what was there before; None where nothing tells."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _process_bytes("VmRSS")
        step()
        return _process_bytes("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None


def _process_bytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


@torch.no_grad()
def certified_seconds(bench: Bench, count: int) -> float:
    """Seconds per 1,000 images to certify a fresh network, at the radius at which the global bound just fails."""
    model, x = copy.deepcopy(bench.model).double().eval(), bench.images[:count].double()
    norms = proven_norms(model, x, count).with_steps(0)
    bound = propagate(model, x, 0.0, norms)
    y = bound.logits.argmax(dim=1)
    radius = 1.02 * global_radius(bound.logits, y, bound.last, bound.global_hidden_lipschitz)
    _, seconds = timed(lambda: prove(model, x, y, radius, norms).worst_margin, x.device)
    return 1000 * seconds / len(x)


def measure(job: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one recipe."""
    bench = Bench(utils.run_arguments(RECIPES[job]), device, options.width, options.bfloat16)
    times = interleaved({"plain": bench.plain, **bench.steps}, options.repeats, device)
    plain = statistics.median(times["plain"])
    result: dict[str, Any] = {"recipe": job, "batch_size": bench.batch_size, "stored_bytes": bench.stored_bytes}
    for name, runs in times.items():
        result[name] = {
            "milliseconds": statistics.median(runs),
            "fastest": min(runs),
            "slowest": max(runs),
            "over_plain": statistics.median(runs) / plain,
            "peak_bytes": peak_bytes(bench.plain if name == "plain" else bench.steps[name], device),
        }
    result["certified_seconds_per_1000_images"] = certified_seconds(bench, options.certified_images)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    titles = {
        "plain": "plain step",
        "all": "robust step, all iterated",
        "idle skipped": "idle masks skipped",
        "bfloat16": "the same in bfloat16",
    }
    columns = [name for name in titles if name in results[0]]
    header = ["recipe", "images", *(titles[c] for c in columns), "peak memory, plain / robust"]
    rows = [[*header, "stored vectors", "proof of 1,000 images"]]
    for result in results:
        cells = [_time(result[column], column != "plain") for column in columns]
        peaks = " / ".join(_megabytes(result[column]["peak_bytes"]) for column in ("plain", "all"))
        stored, proof = _megabytes(result["stored_bytes"]), result["certified_seconds_per_1000_images"]
        name, images = f"`{result['recipe']}`", str(result["batch_size"])
        rows.append([name, images, *cells, f"{peaks} MB", f"{stored} MB", f"{proof:.0f} s"])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _time(figures: dict[str, float], with_ratio: bool) -> str:
    text = f"{figures['milliseconds']:.0f} ms ({figures['fastest']:.0f} to {figures['slowest']:.0f})"
    return f"{text}, **{figures['over_plain']:.2f}**" if with_ratio else text


def _megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:,.0f}"


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="training jobs of run_job.sh")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--repeats", type=flags.positive_int, default=7, help="timed steps of each kind")
    flag("--width", type=flags.positive_float, default=1.0, help="fraction of the published channel numbers")
    flag("--compile", choices=["yes", "no"], default="yes", help="compile element-wise work")
    flag("--bfloat16", action="store_true", help="time steps with convolutions in bfloat16 too")
    flag("--certified_images", type=flags.positive_int, default=8, help="images that are certified")
    flag("--json", type=flags.path, default="results/bench/training_step.json", help="file for the figures")
    flag("--overwrite", action="store_true", help="replace the file that --json names")
    options = parser.parse_args()
    distributed.refuse_several()
    path = Path(options.json)
    refuse_existing(path, options.overwrite)
    device = devices.select_device(options.device)
    if options.compile == "yes":
        compile_all()
    results = []
    for number, job in enumerate(options.recipes, start=1):
        print(f"{number} of {len(options.recipes)}: {job}", file=sys.stderr, flush=True)
        results.append(measure(job, device, options))
    name = processor(device)
    figures = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiled": options.compile == "yes",
        "width": options.width,
        "recipes": results,
    }
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.repeats} steps")
    print("(fastest to slowest), in bold the ratio to the plain step of the same run\n")
    print(table(results))
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(figures, indent=2) + "\n"))
    print(f"\n{path}")


if __name__ == "__main__":
    run_script(main)
