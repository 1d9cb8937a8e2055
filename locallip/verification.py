"""Your own network, image by image: what is certified, what an attack breaks, and what stays open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from locallip.bound.checks import first_weight, refuse_clip, refuse_epsilon, refuse_labels, refuse_whole_number
from locallip.bound.inquiry import checked, in_float64
from locallip.bound.kept_norms import KEPT
from locallip.bound.pieces import new_bar
from locallip.bound.proof import Proof, decide, proof_stages, proven_norms, refuse_effort
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.stages import Answer, Carried, DualStage, Question, Stage
from locallip.bound.walk import propagate
from locallip.bound.worst_case import worst_logits, worst_margin
from locallip.evaluation.attacks import descend, is_inside, margins, random_steps

CERTIFIED, ATTACKED, MISCLASSIFIED, OPEN = STATUSES = ("certified", "attacked", "misclassified", "open")
# Of the attack, in `Verification.decided_by`.
ATTACK = "attack"


@dataclass(frozen=True, eq=False)
class Verification:
    """What `verify` found for N images; `print` it for a summary.

    Attributes:
        status: N words. `certified`: the label is the answer in the whole ball. `attacked`: `point` is in the ball, and
            another answer is there. `misclassified`: the label is not the one answer at x, or x is not finite. `open`:
            none of these was shown.
        decided_by: N words, the stage that certified, or `attack`, `misclassified`, `open`.
        epsilon: (N,) L2 radius in the space of x.
        clean_margin: (N,) by how much the label's logit exceeds every other at x.
        worst_margin: (N,) at least so much in the whole ball, as far as the proof went; certified is > 0.
        hidden_lipschitz: (N,) Lipschitz constant up to the last hidden layer, valid in the ball around each image.
        global_hidden_lipschitz: scalar, the same, valid for every pair of images.
        point: (N, ...) in the precision of x, where the attack found another answer; NaN for all other images.
        seconds: wall time by the name of the stage, in the order in which they are asked.
    """

    status: tuple[str, ...]
    decided_by: tuple[str, ...]
    epsilon: Tensor
    clean_margin: Tensor
    worst_margin: Tensor
    hidden_lipschitz: Tensor
    global_hidden_lipschitz: Tensor
    point: Tensor
    seconds: dict[str, float]

    def has(self, status: str) -> Tensor:
        """(N,) bool, which images have a status.

        Raises:
            ValueError: for a status of another name.
        """
        if status not in STATUSES:
            raise ValueError(f"the status must be one of {', '.join(STATUSES)}, got '{status}'")
        found = [own == status for own in self.status]
        return torch.tensor(found, dtype=torch.bool, device=self.clean_margin.device)

    @property
    def certified(self) -> Tensor:
        """(N,) bool, what `certify` answers."""
        return self.has(CERTIFIED)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each status."""
        return {status: self.status.count(status) for status in STATUSES}

    def __str__(self) -> str:
        if not self.status:
            return "0 images"
        low, high = float(self.epsilon.min()), float(self.epsilon.max())
        radius = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        by = Counter(name for name, status in zip(self.decided_by, self.status) if status == CERTIFIED)
        stages = "; ".join(f"{name}: {by[name]}" for name in self.seconds if name != ATTACK)
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        seconds = "; ".join(f"{name}: {seconds:.2f}" for name, seconds in self.seconds.items())
        return f"{len(self.status)} images at epsilon {radius}: {counts}\ncertified by {stages}\nseconds {seconds}"


@dataclass
class AttackStage(Stage):
    """Descent on the margin; settles the images whose label it changes.

    Attributes:
        model: in the precision in which it is used.
        norms: which say whether another answer is one in exact arithmetic.
        dtype: precision of the points that it answers with.
        starts: how often it starts, first at the images themselves.
        seed: of the others.
    """

    model: nn.Module
    norms: ProvenNorms
    dtype: torch.dtype
    starts: int
    seed: int = 0
    name: str = ATTACK
    costly: bool = True

    def ask(self, question: Question, carried: Carried | None) -> Answer:
        x, y = question.x, question.y
        weight = first_weight(self.model)
        own = x if weight is None else x.to(weight.dtype)
        epsilon, generator = question.epsilon.to(own.dtype), torch.Generator().manual_seed(self.seed % 2**63)
        points = torch.full_like(x, torch.nan)
        still_open = torch.arange(len(x), device=x.device)
        for number in range(self.starts):
            images = own[still_open], y[still_open], epsilon[still_open]
            start = random_steps(images[0], images[2], generator) if number else None
            step = descend(self.model, *images, start, clip=question.clip)
            asked = question.take(still_open)
            point = (asked.x + step.double()).to(self.dtype).double()
            won = is_inside(asked.x, point, asked.epsilon, question.clip) & self._is_wrong(asked, point)
            points[still_open[won]] = point[won]
            still_open = still_open[~won]
            if not len(still_open):
                break
        won = torch.ones_like(y, dtype=torch.bool).index_fill(0, still_open, False)
        return Answer({"point": points}, won, carried=carried)

    def _is_wrong(self, question: Question, point: Tensor) -> Tensor:
        """(N,) bool: another logit is larger than the label's there, whatever rounding does."""
        bound = propagate(question.graph, point, 0.0, self.norms.with_steps(0))
        y = question.y[:, None]
        other = margins(bound.logits, question.y).argmin(dim=1)
        worst = worst_logits(bound, other)  # of the other logits, where that of `other` is as small as it can be
        return (worst.gather(1, other[:, None]) > worst.gather(1, y)).squeeze(1)


@torch.no_grad()
def verify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    failure_probability: float = 1e-6,
    effort: str = "dual",
    attack: int = 1,
    clip: tuple[float, float] | None = None,
    batch_size: int = 256,
    seed: int | None = None,
    progress: bool = False,
) -> Verification:
    """Decide image by image whether the label y is the network's answer on the whole epsilon-ball around x.

    Stages ask in this order, each about what those before it left open: whether x itself is classified right, the
    global norms, the local norms, an attack, the dual; where masks matter to it, better local norms and the dual again.
    Where there is no dual, the attack goes before the local norms of many Lanczos steps. What is certified is what
    `certify` answers.

    Args:
        model: as for `certify`; it is not changed. The certificate is for the function that its weights define in exact
            arithmetic. The attack looks in the precision of the model, and what it finds counts where it is wrong in
            exact arithmetic too.
        x: (N, ...) images, float32 or float64.
        y: (N,) int64 labels.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        failure_probability: that any norm of the call is too small, all images together.
        effort: `product` stops at the product of norms, `dual` goes on to the centred dual.
        attack: how often the attack starts, first at x and then at random points of the ball; 0: no attack.
        clip: smallest and largest value of a valid image, if only these count; x has to be valid itself.
        batch_size: images at a time; memory grows with it.
        seed: of the start vectors of norms and of the attack's; None: from the operating system, and 0.
        progress: show a bar with counts, which needs tqdm.

    Raises:
        TypeError: as `certify`, and for images of another precision.
        ValueError: as `certify`, and for an attack below 0, a batch size below 1 or a clip without sense.
        ImportError: for a bar without tqdm.
    """
    refuse_effort(effort)
    classes = checked(model, x, "proven", failure_probability).classes
    refuse_labels(y, x, classes)
    refuse_epsilon(epsilon, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"need images as a tensor (N, ...) of float32 or float64, got {x.dtype}")
    refuse_whole_number("the attack's number of starts", attack, 0)
    refuse_whole_number("the batch size", batch_size, 1)
    if seed is not None:
        refuse_whole_number("the seed", seed, 0)
    if clip is not None:
        refuse_clip(clip, x)
    graph, first = in_float64(model, x, batch_size), x[:1].double()
    kept = KEPT if seed is None else None  # a seed repeats all norms
    norms = proven_norms(graph, first, len(x), failure_probability, seed=seed, kept=kept)
    stages = proof_stages(graph, first, norms, effort)
    if attack:
        stages = _with_attack(stages, AttackStage(model, norms, x.dtype, attack, seed or 0))
    radii = torch.as_tensor(epsilon, dtype=torch.float64, device=x.device).expand(len(x))
    parts = []
    with _bar(len(x), progress) as show:
        for images in torch.arange(len(x), device=x.device).split(batch_size):
            proof = decide(stages, graph, x[images].double(), y[images], radii[images], clip)
            parts.append(_result(proof, x[images], y[images], radii[images]))
            show(parts[-1])
    return _joined(parts)


def _with_attack(stages: list[Stage], attack: AttackStage) -> list[Stage]:
    """Put the attack before the dual or, where there is none, before the local norms that cost most."""
    place = next((number for number, stage in enumerate(stages) if isinstance(stage, DualStage)), 2)
    # What fails by the product may fall, so only certificates settle anything before it.
    first = [replace(stage, from_below=False) for stage in stages[:place]]
    return [*first, attack, *stages[place:]]


def _result(proof: Proof, x: Tensor, y: Tensor, epsilon: Tensor) -> Verification:
    """What a proof found for a few images."""
    clean = worst_margin(proof.logits, y)
    right = ((clean > 0) & x.flatten(1).isfinite().all(dim=1)).tolist()
    certified = (proof.worst_margin > 0).tolist()
    status, decided_by = [], []
    for image, stage in enumerate(proof.stage.tolist()):
        name = (*proof.stages, OPEN)[stage]
        if not right[image]:
            name = MISCLASSIFIED
        elif not certified[image] and name != ATTACK:
            name = OPEN
        decided_by.append(name)
        status.append({MISCLASSIFIED: MISCLASSIFIED, OPEN: OPEN, ATTACK: ATTACKED}.get(name, CERTIFIED))
    return Verification(
        status=tuple(status),
        decided_by=tuple(decided_by),
        epsilon=epsilon,
        clean_margin=clean,
        worst_margin=proof.worst_margin,
        hidden_lipschitz=proof.hidden_lipschitz,
        global_hidden_lipschitz=proof.global_hidden_lipschitz,
        point=torch.full_like(x, torch.nan) if proof.point is None else proof.point.to(x.dtype),
        seconds=dict(zip(proof.stages, proof.seconds)),
    )


def _joined(parts: list[Verification]) -> Verification:
    """The findings on all images from those on some at a time."""

    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Verification(
        status=sum((part.status for part in parts), ()),
        decided_by=sum((part.decided_by for part in parts), ()),
        epsilon=column("epsilon"),
        clean_margin=column("clean_margin"),
        worst_margin=column("worst_margin"),
        hidden_lipschitz=column("hidden_lipschitz"),
        global_hidden_lipschitz=parts[0].global_hidden_lipschitz,
        point=column("point"),
        seconds={name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
    )


@contextmanager
def _bar(images: int, progress: bool) -> Iterator[Callable[[Verification], None]]:
    """A bar over so many images, by what tells it of more of them; where nothing is shown, that does nothing."""
    if not progress:
        yield lambda part: None
        return
    counts = dict.fromkeys(STATUSES, 0)
    # Without a rate, so that 80 columns hold the counts.
    with new_bar(images, bar_format="{n_fmt}/{total_fmt} images, {elapsed}{postfix}") as bar:

        def show(part: Verification) -> None:
            for status, count in part.counts.items():
                counts[status] += count
            bar.set_postfix(counts)
            bar.update(len(part.status))

        yield show
