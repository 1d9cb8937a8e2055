"""How a failure probability is shared out among the norms of a run."""

from __future__ import annotations

from locallip.bound.checks import refuse_probability

MOST_WHOLES = 1_000


class Budget:
    """A failure probability, shared out beforehand among all norms of a run; overspending is refused.

    Half of it is for masked norms, half for whole ones, of which there are at most 1,000.

    Args:
        failure_probability: that *any* norm of the run is too small.
        planned: how many masked norms the run will ask for at most, one per image, layer and stage.

    Attributes:
        per_masked: the share of every masked norm.

    Raises:
        ValueError: for a probability that does not lie between 0 and 1.
    """

    def __init__(self, failure_probability: float, planned: int):
        refuse_probability(failure_probability)
        self.failure_probability = failure_probability
        self._masked_left, self._wholes_left = planned, MOST_WHOLES
        self.per_masked = failure_probability / 2 / max(planned, 1)
        self._per_whole = failure_probability / 2 / MOST_WHOLES

    def for_masked(self, count: int) -> float:
        """The share of each of `count` masked norms, which are spent by this.

        Raises:
            RuntimeError: if more are asked for than planned.
        """
        self._masked_left -= count
        if self._masked_left < 0:
            raise RuntimeError("more norms were asked for than planned, so the failure probability would not hold")
        return self.per_masked

    def for_whole(self) -> float:
        """The share of a whole norm, which is spent by this; errors as `for_masked`."""
        self._wholes_left -= 1
        if self._wholes_left < 0:
            raise RuntimeError("more layers than planned, so the failure probability would not hold")
        return self._per_whole
