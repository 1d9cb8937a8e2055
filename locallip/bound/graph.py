"""A network as a graph of layers: what there is, what goes into what, and what each layer is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallip.bound import (  # noqa: F401 - what they register
    activation_rules,
    call_rules,
    calls_of_layers,
    calls_of_tensors,
    linear_rules,
)
from locallip.bound.activations import Activation
from locallip.bound.affine import is_affine, with_sums
from locallip.bound.capture import capture
from locallip.bound.checks import first_weight, refuse_width
from locallip.bound.joins import Join
from locallip.bound.nodes import IMAGES, Node, Obstacle, Refusal
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import Dense, LinearOperator, Position
from locallip.bound.ordering import flat, folded, free_name, needed
from locallip.bound.precision import own_precision
from locallip.bound.refusals import refuse_what_computes_otherwise
from locallip.bound.replaced import trains
from locallip.bound.rules import (
    Meaning,
    Place,
    Reshape,
    describe,
    has_rule,
    meaning_of,
    no_rule,
    refuse_other_shapes,
)
from locallip.bound.seen import first_line
from locallip.bound.tensors import same

# How many images a graph and its network are compared on before anything is asked.
_COMPARED = 8
# The same of random ones: another number, so that what moves images about is seen, and no two entries are equal.
_RANDOM = 5


@dataclass(frozen=True)
class Graph:
    """A network as hidden layers in order, then a Linear that makes the logits.

    Attributes:
        hidden: all layers but the last, each behind those that it takes its inputs from.
        last: the last one; where the network ends otherwise, the logits themselves are the last hidden layer, and this
            is the identity.
        shape: of the images that it was read off a run on; None: there was no need to run the network.
        weights: pairs of a tensor of the network and what it was, where a run has computed weights or places from it.
        computes: whether its `forward` computes weights or constants, by more than views.
    """

    hidden: tuple[Node, ...]
    last: Node
    shape: torch.Size | None = None
    weights: tuple[tuple[Tensor, Tensor], ...] = ()
    computes: bool = False

    @classmethod
    def of(cls, model: nn.Module | Graph, x: Tensor | None = None) -> Graph:
        """The graph of a network; of a graph, itself.

        A Sequential whose layers all have rules and which ends in a Linear is read as it stands, and nothing is
        computed. Any other network runs a few times, on random images; keep its graph where it is asked often. The
        graph holds the network's own weights, whatever becomes of them; numbers that the network takes out of tensors
        (`.item()`), and tensors that it replaces, stay in it as they were.

        x: (N, ...) images, of which only shape, dtype and device count; needed where the network has to run.

        Raises:
            TypeError: names all that is in the way, each with its place, the user's line and a way out: hooks, replaced
                forwards, parametrizations, wrappers, layers and calls without a rule; or says that a network that was
                run gives other logits for x than its graph.
            ValueError: for a network in training mode that has to run.
        """
        if isinstance(model, Graph):
            return model
        refuse_what_computes_otherwise(model)
        if type(model) is nn.Sequential:
            nodes = folded(list(flat(model)))
            if not nodes:
                raise TypeError("the network is empty")
            if all(has_rule(node.layer) for node in nodes) and type(nodes[-1].layer) is nn.Linear:
                return cls(tuple(nodes[:-1]), nodes[-1])
            if x is None:
                missing = [no_rule(node.layer, node.position) for node in nodes if not has_rule(node.layer)]
                raise Refusal(missing or [Obstacle("the network ends in no Linear", "give images to read it with")])
        if x is None:
            raise TypeError("the network is no nn.Sequential of layers with rules, and without images it cannot be run")
        return cls._of_run(model, x)

    @classmethod
    def _of_run(cls, model: nn.Module, x: Tensor) -> Graph:
        _refuse_training_mode(model)
        run = capture(model, x)
        if len(run.shape) != 1:
            shape = ", ".join(map(str, ("N", *run.shape)))
            raise TypeError(f"the network must give logits (N, K), and gives ({shape}); add a Flatten at its end")
        nodes = folded(needed(run.nodes, run.output))
        _refuse_settings(nodes, x)
        if run.draws:
            raise Refusal([Obstacle("the network draws random numbers", "take them out, or keep some in a buffer")])
        nodes = with_sums(nodes, lambda node: is_affine(node, x))
        if not (nodes and type(nodes[-1].layer) is nn.Linear):
            before = nodes[-1].position if nodes else IMAGES
            nodes.append(Node(free_name("logits", nodes), _identity(run.shape[0], x), (before,), run.shape))
        kept = tuple((tensor, tensor.detach().clone()) for tensor in run.roots)
        graph = cls(tuple(nodes[:-1]), nodes[-1], x.shape[1:], kept, run.computes)
        graph.refuse_if_unlike(model, x[:_COMPARED])
        return graph

    def consumers(self) -> Counter[Position | None]:
        """How many layers take what a node gives, by its position."""
        return Counter(position for node in (*self.hidden, self.last) for position in node.inputs)

    def meanings(self, x: Tensor, arithmetic: Arithmetic) -> list[tuple[Position, Meaning]]:
        """What every hidden layer is, for images x (N, ...), by position; nothing is computed.

        Raises:
            TypeError: names a layer without a rule and its position; no layer is ever skipped. Or, for what is deployed
                in float32, says that the network computes weights or constants.
            ValueError: names a layer in training mode, or one that takes activations of another width; or for images of
                another shape than the network was run on, or for `weights` that have changed.
        """
        self._refuse_others(x)
        if arithmetic.deployed and self.computes:
            raise TypeError(
                "the network computes weights or constants in its forward, whose rounding in float32 is not bounded; "
                "compute them once, and keep them in parameters or buffers"
            )
        shape, result, behind = x.shape[1:], [], {}
        for node in self.hidden:
            _refuse_other_shapes(node, behind)
            shape = node.shape or shape
            meaning = meaning_of(node.layer, Place(node.position, shape, x, arithmetic))
            shape = _shape_behind(meaning, shape, x)
            if not isinstance(meaning, Join):
                behind[node.position] = shape
            result.append((node.position, meaning))
        _refuse_other_shapes(self.last, behind)
        shape = self.last.shape or shape
        refuse_other_shapes(Place(self.last.position, shape, x, arithmetic), self.last.layer, 1)
        refuse_width(self.last.layer, self.last.position, shape)
        return result

    def _refuse_others(self, x: Tensor) -> None:
        if self.shape is not None and x.shape[1:] != self.shape:
            raise ValueError(f"the network was run on images {tuple(self.shape)}, these are {tuple(x.shape[1:])}")
        if not all(same(now, before) for now, before in self.weights):
            raise ValueError("what the network computes weights or places from has changed: make its graph anew")

    def operators(self, x: Tensor) -> list[LinearOperator]:
        """The hidden linear layers in order, for images x (N, ...); errors as `meanings`."""
        return [m for _, m in self.meanings(x, Arithmetic()) if isinstance(m, LinearOperator)]

    def activations(self, x: Tensor) -> list[Activation]:
        """The activations in order, for images x (N, ...); errors as `meanings`."""
        return [m for _, m in self.meanings(x, Arithmetic()) if isinstance(m, Activation)]

    @property
    def classes(self) -> int:
        """How many logits it has."""
        return len(self.last.layer.weight)

    def last_operator(self) -> Dense:
        """The linear layer that makes the logits."""
        return Dense.of(self.last.layer, self.last.position)

    @torch.no_grad()
    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the graph computes of images x (N, ...): logits (N, K), and what their rounding is measured by (N, K).

        That is the size of what adds up to a logit, and of what this was made of in turn, by which terms may have
        cancelled each other before, as far as it is below 1.
        """
        values, sizes = {IMAGES: x}, {IMAGES: x.abs()}
        for node, (_, meaning) in zip(self.hidden, self.meanings(x, Arithmetic())):
            inputs = [values[position] for position in node.inputs]
            values[node.position] = _value(meaning, inputs)
            before = [sizes[position] for position in node.inputs]
            sizes[node.position] = torch.maximum(_size(meaning, before), values[node.position].abs())
        ((before, size),) = ((values[position], sizes[position]) for position in self.last.inputs)
        last = self.last_operator()
        own, reach = (last.absolute(terms) + last.bias_magnitude() for terms in (before.abs(), size))
        return last.affine(before), own + reach.clamp(max=1)

    def refuse_if_unlike(self, model: nn.Module, x: Tensor) -> None:
        """Compare with the network itself on images x (N, ...), and with gradients on some random ones.

        Raises:
            TypeError: where their logits differ by more than rounding does, or the network fails.
        """
        shape, generator = (_RANDOM, *x.shape[1:]), torch.Generator().manual_seed(1)
        others = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
        # What was made in inference mode has no gradients at all.
        gradients = not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        with torch.inference_mode(False):
            if len(x):
                self._refuse_if_unlike(model, x, gradients=False)
            self._refuse_if_unlike(model, others, gradients)

    def _refuse_if_unlike(self, model: nn.Module, x: Tensor, gradients: bool) -> None:
        own = first_weight(model)
        own = x if own is None else own
        with own_precision(x.device):
            ours, size = self.logits(x)
            try:
                with torch.set_grad_enabled(gradients):
                    theirs = model(x.to(own.dtype, copy=True))
            except Exception as error:
                raise TypeError(
                    f"the network was read, and does not run on {len(x)} images: {first_line(error)}"
                ) from error
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            given = tuple(theirs.shape) if isinstance(theirs, Tensor) else first_line(type(theirs).__name__)
            raise TypeError(
                f"the network gives {given} for {len(x)} images, and its layers as they were read {tuple(ours.shape)}: "
                "something in it depends on how many images there are, such as squeeze(); use flatten(1)"
            )
        unlike = (ours - theirs.detach().to(ours.dtype)).abs() > torch.finfo(own.dtype).eps ** 0.5 * size
        if unlike.any():
            raise TypeError(
                "the network gives other logits than its layers and calls as they were read: something in it depends "
                "on chance, on earlier calls, on how many images there are or on values, or is replaced; a certificate "
                "would be for another function"
            )


def _value(meaning: Meaning, inputs: list[Tensor]) -> Tensor:
    if isinstance(meaning, LinearOperator):
        return meaning.affine(*inputs)
    if isinstance(meaning, Reshape):
        return meaning.function(*inputs)
    return meaning(*(x.clone() for x in inputs))  # a user's may work in place


def _size(meaning: Meaning, sizes: list[Tensor]) -> Tensor:
    """Of what adds up to the entries behind a layer, given that of its inputs'."""
    if isinstance(meaning, LinearOperator):
        return meaning.absolute(*sizes) + meaning.bias_magnitude()
    return _value(meaning, sizes)


def _refuse_other_shapes(node: Node, behind: Mapping[Position, torch.Size]) -> None:
    """Refuse a layer that was given something of another shape, in the run, than the rule of the one before makes."""
    before = behind.get(node.inputs[0]) if len(node.inputs) == 1 else None
    if before is not None and node.shape is not None and before != node.shape:
        raise TypeError(
            f"the rule for what stands before {describe(node.position, node.layer)} makes {tuple(before)} of an image, "
            f"but the network makes {tuple(node.shape)} there"
        )


def _shape_behind(meaning: Meaning, shape: torch.Size, x: Tensor) -> torch.Size:
    if isinstance(meaning, LinearOperator):
        return meaning.output_shape
    if isinstance(meaning, Activation):
        return meaning.shape_behind(shape)
    return meaning.function(x.new_empty(1, *shape)).shape[1:] if isinstance(meaning, Reshape) else shape


# --- reading ---------------------------------------------------------------------------------------------------------


def _identity(size: int, x: Tensor) -> nn.Linear:
    layer = nn.Linear(size, size, bias=False, device="meta").eval()
    layer.weight = nn.Parameter(torch.eye(size, dtype=x.dtype, device=x.device), requires_grad=False)
    return layer


def _refuse_training_mode(model: nn.Module) -> None:
    """Refuse, before it runs, what computes otherwise in training mode or learns there: a user's module may."""
    for path, module in model.named_modules():
        if trains(module):
            where = describe(path, module) if path else "the network"
            raise ValueError(f"{where} is in training mode; call model.eval() first")


def _refuse_settings(nodes: list[Node], x: Tensor) -> None:
    """Refuse all layers that their rules do not know in such settings, at once."""
    obstacles = []
    for node in nodes:
        try:
            meaning_of(node.layer, Place(node.position, node.shape, x, Arithmetic()))
        except (TypeError, ValueError) as error:
            called = f" ({node.line})" if node.line else ""
            obstacles.append(Obstacle(f"{error}{called}"))
    if obstacles:
        raise Refusal(obstacles)
