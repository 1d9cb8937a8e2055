"""A step of the training recorded once on a GPU and replayed.

The kernels of a step are small and many, and to launch them one by one takes a CPU longer than a GPU takes to run them.
A CUDA graph launches them all at once (pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from locallip.files import ScriptError, first_line
from locallip.training.step import Step

Batch = tuple[Tensor, Tensor, Tensor]
Record = Callable[[Callable[[], Batch]], Callable[[], Batch]]
# Steps of each kind before it is recorded: what is made at first use has to be there by then.
_WARM_UP = 3


class RecordedStep:
    """A step that is recorded for every kind of batch that comes often enough, and is replayed from then on.

    Args:
        step: in one process, on a CUDA device, which has its stored vectors too.
        record: `in_cuda_graph`, or what does the like elsewhere.

    Raises:
        ScriptError: at a step that cannot be recorded.
    """

    def __init__(self, step: Step, record: Record):
        self.step, self.loss, self.stored = step, step.loss, step.stored
        self._record = record
        self._seen: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, _Recorded] = {}

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        indices: Tensor,
        epsilon: float,
        kappa: float,
        weight: float = 1.0,
        box: bool = True,
    ) -> Batch:
        """What `Step` does and returns. The results are overwritten by the next step of the same kind."""
        kind = len(x), box, self.step.norms.iterations
        if kind not in self._recorded:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= _WARM_UP:
                return self.step(x, y, indices, epsilon, kappa, weight, box)
            self._recorded[kind] = _Recorded(self.step, (x, y, indices), box, self._record)
        return self._recorded[kind]((x, y, indices), (epsilon, kappa, weight))


class _Recorded:
    """A step on one kind of batch: its inputs lie where the recording reads them."""

    def __init__(self, step: Step, batch: Batch, box: bool, record: Record):
        self._step = step
        self._batch = tuple(torch.empty_like(tensor) for tensor in batch)
        for own, given in zip(self._batch, batch):
            own.copy_(given)
        device = batch[0].device
        self._numbers = [torch.ones((), device=device) for _ in range(3)]
        self._rates = [torch.zeros((), device=device) for _ in step.optimizer.param_groups]
        before = step.norms.global_vectors
        self._vectors = {position: vector.clone() for position, vector in before.items()}
        try:
            with _rates_in_memory(step.optimizer, self._rates):
                self._replay = record(lambda: self._run(box))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = first_line(error.__context__ or error)  # ending a recording that failed fails in turn
            message = f"the step cannot be recorded as a CUDA graph ({cause}); train with --cuda_graph no"
            raise ScriptError(message) from None
        step.norms.global_vectors = before  # what a recording leaves there was never computed

    def _run(self, box: bool) -> Batch:
        norms = self._step.norms
        norms.global_vectors = dict(self._vectors)
        results = self._step(*self._batch, *self._numbers, box)
        for position, vector in norms.global_vectors.items():
            self._vectors[position].copy_(vector)
        return results

    def __call__(self, batch: Batch, numbers: Iterable[float]) -> Batch:
        norms = self._step.norms
        for own, given in zip(self._batch, batch):
            own.copy_(given)
        for position, own in self._vectors.items():  # what a step of another kind has left, or the last one of this
            own.copy_(norms.global_vectors[position])
        for own, number in zip(self._numbers, numbers):
            own.fill_(number)
        for own, group in zip(self._rates, self._step.optimizer.param_groups):
            own.fill_(group["lr"])
        results = self._replay()
        norms.global_vectors = dict(self._vectors)  # a copy, in which another step puts vectors of its own
        return results


@contextmanager
def _rates_in_memory(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """Let an optimizer read its learning rates from tensors, one a group."""
    kept = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group.update({"lr": rate} | ({"capturable": True} if "capturable" in group else {}))
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, kept):
            group.update({name: before[name] for name in ("lr", "capturable") if name in before})


def in_cuda_graph(function: Callable[[], Batch]) -> Callable[[], Batch]:
    """Record what a function launches on the current device, without running it; what is returned runs that."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> Batch:
        graph.replay()
        return results

    return replay


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, each made in a stream of its own while the device works on the one before."""
    stream, ordinary = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    source = iter(batches)
    while True:
        with torch.cuda.stream(stream):
            batch = next(source, None)
        if batch is None:
            return
        ordinary.wait_stream(stream)
        for tensor in batch:
            tensor.record_stream(ordinary)
        yield batch
