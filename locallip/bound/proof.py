"""Deciding images in stages: each stage is asked only about the images that those before it left open."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation
from locallip.bound.budget import MOST_WHOLES
from locallip.bound.checks import refuse_epsilon, refuse_images, refuse_labels
from locallip.bound.dual.around import is_chain
from locallip.bound.graph import Graph
from locallip.bound.kept_norms import KeptNorms
from locallip.bound.lanczos import steps_for
from locallip.bound.precision import own_precision
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.stages import DualStage, ProductStage, Question, Stage

# By what the local norms of a stage may have to be too large, of a proof that ends with the product; the dual comes
# behind the first two. In an evaluation of 10,000 images they take some 50, 100 and 250 Lanczos steps; with 25, which
# have to allow for a third, the dual was asked about what the product decides for less (docs/log.md).
_ALLOWANCES = (1.06, 1.013, 1.002)
# By what share a Lipschitz constant has to be smaller for the dual to be asked once more.
_LEAST_GAIN = 0.02
# How far a proof goes: as far as the product of norms does, or on to the dual.
EFFORTS = ("product", "dual")


def proof_stages(graph: Graph, x: Tensor, norms: ProvenNorms, effort: str = "dual") -> list[Stage]:
    """Global norms, then local ones by more and more Lanczos steps, with the dual behind each.

    Where no activation treats its entries one by one, masks switch off columns alone, and the dual comes right behind
    the global norms; with local ones it is asked again where these are smaller. Where the dual cannot be asked (see
    `dual.around`), the stages are those of the product. x: (N, ...) images, of which only shape and dtype count.

    Raises:
        ValueError: for an effort of another name.
    """
    refuse_effort(effort)
    meanings = graph.meanings(x, norms.arithmetic)
    steps = lanczos_steps(graph, x, norms)
    if effort == "product" or not is_chain(meanings):
        return [_product_stage(norms, number) for number in (0, *steps)]
    activations = [meaning for _, meaning in meanings if isinstance(meaning, Activation)]
    # What fails by the product may hold by the dual, so only certificates settle anything before it.
    whole = replace(_product_stage(norms, 0), from_below=False)
    first, second = (replace(_product_stage(norms, number), before_dual=True) for number in steps[:2])
    if any(activation.elementwise for activation in activations):
        return [whole, first, _dual_stage(first), replace(second, costly=True), _dual_stage(second)]
    whole = replace(whole, before_dual=True)
    if not any(activation.rests for activation in activations):
        return [whole, DualStage()]
    return [whole, _dual_stage(whole), replace(first, costly=True, least_gain=_LEAST_GAIN), _dual_stage(first)]


def lanczos_steps(graph: Graph, x: Tensor, norms: ProvenNorms) -> list[int]:
    """Of the stages with local norms, from what each of them may fail with; x as in `proof_stages`."""
    sides = (min(part.input_shape.numel(), part.output_shape.numel()) for part in graph.operators(x))
    largest = max(sides, default=1)
    return [steps_for(largest, norms.budget.per_masked, allowance) for allowance in _ALLOWANCES]


def refuse_effort(effort: str) -> None:
    """Refuse an effort of another name, with a ValueError."""
    if effort not in EFFORTS:
        raise ValueError(f"the effort must be one of {', '.join(EFFORTS)}, got '{effort}'")


def _dual_stage(before: ProductStage) -> DualStage:
    return DualStage(f"{DualStage.name}, {before.name.removeprefix('local, ')}")


def _product_stage(norms: ProvenNorms, steps: int) -> ProductStage:
    name = f"local, {steps} Lanczos steps" if steps else "global"
    return ProductStage(name, norms.with_steps(steps), masks=steps > 0)


def proven_norms(
    model: nn.Module | Graph,
    x: Tensor,
    images: int,
    failure_probability: float = 1e-6,
    radii: int = 1,
    seed: int | None = None,
    deployed: str = "exact",
    kept: KeptNorms | None = None,
) -> ProvenNorms:
    """Norms whose budget covers `prove` on so many images, at so many radii each.

    x: (N, ...) images of the network, of which only shape and dtype count. Otherwise see `ProvenNorms`.

    Raises:
        ValueError: for a network of more layers than a budget has whole norms.
    """
    layers = len(Graph.of(model, x).operators(x))
    if layers >= MOST_WHOLES:
        raise ValueError(f"a proof takes networks of up to {MOST_WHOLES} linear layers, this one has {layers + 1}")
    planned = images * radii * layers * len(_ALLOWANCES)
    return ProvenNorms(failure_probability, planned, seed=seed, deployed=deployed, kept=kept)


@dataclass
class Proof:
    """What `decide` found for N images.

    Attributes:
        logits: (N, K) at x.
        worst_margin: (N,) by how much the label's logit exceeds every other in the whole ball; certified where > 0.
        hidden_lipschitz: (N,) of the last stage that computed one, up to the last hidden layer.
        global_hidden_lipschitz: scalar.
        eliminated_rows, eliminated_columns: (N, L) shares that the ball switches off of each of the L local norms.
        stage: (N,) which stage decided; as many as there are stages where none did.
        stages: their names.
        seconds: wall time of each.
        point: (N, ...) where an attack changed the label, NaN elsewhere; None: no stage looked for one.
    """

    logits: Tensor
    worst_margin: Tensor
    hidden_lipschitz: Tensor
    global_hidden_lipschitz: Tensor
    eliminated_rows: Tensor
    eliminated_columns: Tensor
    stage: Tensor
    stages: tuple[str, ...]
    seconds: list[float]
    point: Tensor | None = None

    @property
    def decided(self) -> list[int]:
        """Number of images that each stage decided; last, how many stayed open to the end."""
        return torch.bincount(self.stage, minlength=len(self.stages) + 1).tolist()


@torch.no_grad()
def prove(
    model: nn.Module | Graph,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    norms: ProvenNorms,
    clip: tuple[float, float] | None = None,
    effort: str = "dual",
    fallen: Tensor | None = None,
) -> Proof:
    """Certify in the stages of `proof_stages`.

    model, x: float64. norms: see `proven_norms`. Arguments and errors otherwise are those of `decide`.
    """
    refuse_images(x, model)
    graph = Graph.of(model, x)
    if graph is not model:
        graph.refuse_if_unlike(model, x)
    return decide(proof_stages(graph, x, norms, effort), graph, x, y, epsilon, clip, fallen)


@torch.no_grad()
def decide(
    stages: Sequence[Stage],
    model: nn.Module | Graph,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    clip: tuple[float, float] | None = None,
    fallen: Tensor | None = None,
) -> Proof:
    """Ask stage by stage whether images are certified, each only about those that are still open.

    Nothing depends on the defaults of the process (but see `precision.own_precision` on a GPU).

    Args:
        stages: at least one, the first of which computes all that `Proof` has.
        y: (N,) int64.
        fallen: (N,) bool, images that an attack is known to break: costly stages are not asked about them, unless the
            first is one. None: unknown.

    Arguments otherwise and errors are those of `propagate`.

    Raises:
        TypeError, ValueError: for labels that are not (N,) int64 or name no class.
    """
    refuse_images(x, model)
    graph = Graph.of(model, x)
    refuse_labels(y, x, graph.classes)
    refuse_epsilon(epsilon, x)
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    question = Question(graph, x, y, epsilon, clip)
    places, carried = torch.arange(len(x), device=x.device), None
    decided_by = torch.full_like(places, len(stages))
    known: dict[str, Tensor] = {}
    seconds = [0.0] * len(stages)
    for number, stage in enumerate(stages):
        if number and stage.costly and fallen is not None:
            left = (~fallen[places]).nonzero().squeeze(1)
            places, question, carried = places[left], question.take(left), carried and carried.take(left)
        if number and not len(places):
            break
        started = time.perf_counter()
        with own_precision(x.device):
            answer = stage.ask(question, carried)
        seconds[number] = time.perf_counter() - started
        for name, column in answer.columns.items():
            known.setdefault(name, column.new_full((len(x), *column.shape[1:]), torch.nan))[places] = column
        if answer.global_hidden_lipschitz is not None:
            global_lipschitz = answer.global_hidden_lipschitz
        decided_by[places[answer.settled]] = number
        left = (~answer.settled).nonzero().squeeze(1)
        places, question = places[left], question.take(left)
        carried = answer.carried and answer.carried.take(left)
    return Proof(
        global_hidden_lipschitz=global_lipschitz, stage=decided_by, stages=_names(stages), seconds=seconds, **known
    )


def _names(stages: Sequence[Stage]) -> tuple[str, ...]:
    return tuple(stage.name for stage in stages)
