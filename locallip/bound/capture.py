"""Reading a network off one run of it: which layers and functions its images go through.

The network runs as it is, in plain PyTorch, on random images. A `TorchFunctionMode` sees every call of a function or
a tensor's method (`reading_calls`), global hooks see every module (`reading_modules`). A module with a rule is one
node, and so is a call that means such a layer; every other module is looked into. What would make the reading wrong for
other images ends it: a value that leaves the tensors (`if x.sum() > 0`, `.item()`, `.numpy()`), or a function that
cannot be seen (see `origins`).

`torch.export` reads the same graph, but takes modules with a rule of the user's apart and ten to a hundred times as
long; `torch.fx` dies of `len(x)` and `if x.shape[1] != 3`.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from locallip.bound.nodes import Refusal
from locallip.bound.origins import Origins
from locallip.bound.precision import own_precision
from locallip.bound.reading import Captured, Reading, Stop
from locallip.bound.reading_calls import Calls
from locallip.bound.reading_modules import Modules
from locallip.bound.seen import first_line

# Images of the run: another number than there are channels, classes or dimensions, so that they are told apart.
_IMAGES = 3


def capture(model: nn.Module, x: Tensor) -> Captured:
    """Run a network in eval mode on random images like x (N, ...), of which only shape, dtype and device count.

    It runs twice: only then can be told which tensors were there before.

    Raises:
        Refusal: names all that has no rule, each with its place, the user's line and a way out.
        ValueError: if the network does not run on such images.
    """
    before = Origins()
    _read(model, x, before)
    chance = _chance()
    captured = _read(model, x, Origins(before))
    captured.draws |= chance != _chance()
    return captured


def _chance() -> tuple[Any, ...]:
    """What all that draw numbers by themselves draw from."""
    _, keys, *places = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), keys.tobytes(), places


def _read(model: nn.Module, x: Tensor, origins: Origins) -> Captured:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), own_precision(x.device):
        images = torch.rand(_IMAGES, *x.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        reading = Reading(model, images.to(x.device, x.dtype), origins)
        try:
            with Modules(reading).watching(), Calls(reading).watching():
                output = model(reading.images)
        except Stop:
            reading.join_parts()
            raise Refusal(reading.obstacles) from None
        except Exception as error:
            reading.join_parts()
            if reading.obstacles:
                raise Refusal(reading.obstacles) from error
            sizes = ", ".join(map(str, x.shape[1:]))
            said = first_line(error)
            buffers = "; weights and constants in parameters and buffers follow the network's precision"
            hint = buffers if "dtype" in said else ""
            raise ValueError(f"the network does not run on images (N, {sizes}) of {x.dtype}: {said}{hint}") from error
    return reading.finish(output)
