"""What a proven certificate costs beside the published protocol; `--help` lists the flags.

The published protocol, 2,000 power iterations per image and layer in float32, is timed on a sample of the same images
in the same run, in turn with pieces of the proof, and scaled to all of them.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
from local_bound import propagate, prove
from locallip import distributed, flags
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import proven_norms
from locallip.bound.worst_case import worst_logits, worst_margin
from locallip.files import InputError, check_writable, exists, run_script, write_atomically


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


def timed(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """What `work` returns, and its seconds."""
    _wait(device)
    started = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    evaluate.add_model_flags(parser)
    flag = parser.add_argument
    flag("--test_sniter", type=flags.positive_int, default=2000, help="power iterations of the published protocol")
    flag("--sample_batches", type=flags.positive_int, default=1, help="batches that the published protocol is timed on")
    flag("--json", type=flags.path, help="file for the figures")
    flag("--overwrite", action="store_true", help="replace the file that --json names")
    args = parser.parse_args()
    distributed.refuse_several()
    if args.json:
        refuse_existing(Path(args.json), args.overwrite)
    model, images, _, _ = evaluate.load(args)
    exact, device = copy.deepcopy(model).double(), images.labels.device
    norms = proven_norms(exact, images[:1].images / 255, len(images), args.failure_probability)
    batches = list(images.batches(args.test_batch_size))
    every = max(1, len(batches) // args.sample_batches)
    proven, estimated, proven_on_sample, seconds, published = 0, 0, 0, 0.0, []
    for number, (x, y, _) in enumerate(tqdm(batches, unit="batch", disable=None)):
        margin, taken = timed(lambda x=x, y=y: prove(exact, x.double(), y, args.epsilon, norms).worst_margin, device)
        proven, seconds = proven + int((margin > 0).sum()), seconds + taken
        if number % every == 0 and len(published) < args.sample_batches:

            def protocol(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                bound = propagate(model, x, args.epsilon, PowerIteration(args.test_sniter, seed=args.seed))
                return worst_margin(worst_logits(bound, y, 1000), y)

            margin32, taken = timed(protocol, device)
            published.append(taken / len(x))
            estimated += int((margin32 > 0).sum())
            proven_on_sample += int((margin > 0).sum())
    sample = sum(len(batches[n * every][1]) for n in range(len(published)))
    total = statistics.median(published) * len(images)
    figures = {
        "images": len(images),
        "epsilon": args.epsilon,
        "proven_seconds": seconds,
        "proven_percent": 100 * proven / len(images),
        "published_seconds_scaled": total,
        "published_over_proven": total / seconds,
        "sample": sample,
        "proven_percent_of_sample": 100 * proven_on_sample / sample,
        "estimated_percent_of_sample": 100 * estimated / sample,
        "power_iterations": args.test_sniter,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "torch": torch.__version__,
    }
    print(f"proven certificate, {len(images)} images: {seconds:.1f} s, {figures['proven_percent']:.2f} % certified")
    print(f"published protocol, scaled from {sample} images: {total:.0f} s, {total / seconds:.0f} times as long")
    print(
        f"on the sample: {figures['proven_percent_of_sample']:.2f} % proven, "
        f"{figures['estimated_percent_of_sample']:.2f} % by the estimate"
    )
    if args.json:
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(Path(args.json), lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run_script(main)
