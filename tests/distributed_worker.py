"""What one of several processes works out for test_distributed.py."""

import argparse
import sys
from pathlib import Path

import torch

import evaluate
import locallip.evaluation.evaluation as evaluation_module
import utils
from data_load import load_data
from local_bound import propagate
from locallip import distributed
from locallip.bound.power_iteration import PowerIteration
from locallip.images import ImageSet
from locallip.training.gradients import wrap
from locallip.training.run import train
from locallip.training.shares import count_batches, loss_weights
from locallip.training.step import RobustLoss, Step, Tally

IMAGES = 11  # shared by 2 or 4 processes, it leaves parts of different sizes
LOSSES = {
    "bcp": {},
    "gloro": {"loss": "gloro", "rounds": 3},
    "gloro-kl": {"loss": "gloro-kl"},
    "cll": {"loss": "cll", "radius": 0.3},
    "emma": {"loss": "emma"},
    "sparse": {"sparse": 0.5, "sparse_threshold": 0.1},
    "two local layers": {},
    "maxmin": {"sparse": 0.5},
}


def first_digits(count):
    return load_data("digits", "unused", train=True)[:count]


def network(name):
    torch.manual_seed(0)
    if name != "maxmin":
        return utils.select_model("digits", "relux", width=0.05).double()
    layer = utils.ClampGroupSort((4, 14, 14), 0.3, -0.3)
    flat = [torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 10)]
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, 2, 1), layer, *flat).double()


def start_vectors(model, images, positions):
    """One start vector per image and layer, the same for an image in whichever process it is."""
    probe = PowerIteration(1, local_positions=positions)
    with torch.no_grad():
        propagate(model, next(images[:1].batches(1))[0].double(), 0.0, probe)
    generator = torch.Generator().manual_seed(1)
    return {
        p: torch.randn(len(images), *v.shape[1:], generator=generator).double() for p, v in probe.local_vectors.items()
    }


def one_step(name):
    """Loss, gradients, counts, and the parameters after a step, on the union of the processes' batches."""
    images, model = first_digits(IMAGES), network(name)
    positions = [0, 9] if name == "two local layers" else None
    vectors = start_vectors(model, images, positions)
    own = slice(distributed.rank(), None, distributed.processes())
    norms = PowerIteration(3, {p: v[own] for p, v in vectors.items()}, seed=0, local_positions=positions)
    (x, y, _), *_ = distributed.shard(images).batches(IMAGES)
    module = wrap(RobustLoss(model, norms, **LOSSES[name]), "auto")
    optimizer = torch.optim.Adam(model.parameters())
    loss, logits, worst = module(x.double(), y, 0.3, 0.4)
    sizes = distributed.gather(len(y))
    weight = loss_weights(sizes, IMAGES, count_batches(sizes, IMAGES))[distributed.rank()][0]
    (weight * loss).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    tally = Tally(x.device)
    tally.add(loss, logits, worst, y)
    assert sorted(norms.local_vectors) == sorted(vectors)
    return {
        "loss": distributed.total(weight * loss.detach()) / len(sizes),
        "gradients": gradients,
        "means": tally.of_all_processes().means(),
        "parameters": same_everywhere([parameter.detach() for parameter in model.parameters()]),
    }


def same_everywhere(tensors):
    for others in distributed.gather(tensors):
        assert all(map(torch.equal, tensors, others))
    return tensors


def evaluation(certificate):
    """Outcome of an evaluation of all images, without the attack."""
    evaluation_module.pgd = lambda model, x, *others: x
    images, model = first_digits(60), network("bcp").float().eval().requires_grad_(False)
    args = argparse.Namespace(epsilon=0.0016, clip=False, out=None, test_batch_size=7, seed=0, deployed="exact")
    args.test_sniter, args.test_opt_iter, args.failure_probability, args.certificate_seed = 60, 10, 1e-6, 5
    args.effort = "product"
    first = images[:1].images / 255
    method = evaluate.Proven(model, args, first, 60, 5) if certificate == "proven" else evaluate.Estimate(model, args)
    (found,) = evaluate.evaluate(model, images, args, [method])
    return {"outcome": found.outcome, "description": method.describe(found.counts)}


def short_training(folder, batch_size):
    """Which images every process visited in two epochs on 37 images; the parameters must come out the same."""
    visits, step = [], Step.__call__

    def record(self, x, y, indices, *others):
        visits.append((indices * distributed.processes() + distributed.rank()).tolist())
        return step(self, x, y, indices, *others)

    Step.__call__ = record
    sys.argv = ["worker", "--data", "digits", "--width", "0.05", "--epochs", "2", "--rampup", "1", "--sniter", "1"]
    sys.argv += ["--batch_size", str(batch_size), "--test_sniter", "2", "--output_dir", str(folder), "--overwrite"]
    args = utils.training_arguments("", ["digits"], {"epochs": 2, "lr": 1e-3, "end_lr": 1e-3} | SCHEDULE)
    model = network("bcp").float()
    sets = (distributed.shard(images) for images in (first_digits(37), first_digits(5)))
    train(model, *sets, args)
    Step.__call__ = step
    same_everywhere([parameter.detach() for parameter in model.parameters()])
    return distributed.gather(visits)


SCHEDULE = {"warmup": 0, "epsilon": 0.1, "epsilon_train": 0.1, "init": 1.0}


def everything(folder):
    six = ImageSet(torch.zeros(6), torch.arange(6))
    found = {name: one_step(name) for name in LOSSES}
    found |= {certificate: evaluation(certificate) for certificate in ("proven", "estimate")}
    found["exchange"] = {
        "gathered": distributed.gather(distributed.rank()),
        "shared": distributed.share(f"from {distributed.rank()}"),
        "smallest": distributed.smallest(torch.tensor(5 - distributed.rank())),
        "shards": [len(part) for part in distributed.gather(distributed.shard(six))],
    }
    found["visits"] = {size: short_training(folder, size) for size in (1, 3, 9)}
    return found


def main():
    """Leave in the folder of the command line what the processes find."""
    folder = Path(sys.argv[1])
    with distributed.process_group("cpu"):
        found = everything(folder)
        if distributed.is_main():
            torch.save(found, folder / "found.pt")
