"""An exponential moving average of the weights over the steps of a training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from locallip.checkpoints import load_weights


class AveragedModel:
    """A copy of a model whose parameters follow the model's: a' = d a + (1 - d) w after each step.

    Early on, d is (1 + steps) / (10 + steps) where that is smaller than `decay`, so that the start is soon forgotten.
    Of the same weights several processes make the same average.

    Args:
        model: has parameters alone, no buffers.
        decay: d, in (0, 1).

    Attributes:
        model: the copy, in eval mode, without gradients.
        steps: so far.
    """

    def __init__(self, model: nn.Sequential, decay: float):
        self.decay, self.steps = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages, self._weights = list(self.model.parameters()), list(model.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights, after a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What `load_state` goes on from."""
        return {"state_dict": self.model.state_dict(), "steps": self.steps}

    def load_state(self, state: Mapping[str, Any], source: str) -> None:
        """Go on from what `state` gave.

        Raises:
            InputError: if the weights are not of this model. source: names the file.
        """
        load_weights(self.model, state["state_dict"], source)
        self.steps = int(state["steps"])
