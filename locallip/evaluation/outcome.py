"""What an evaluation finds, image by image."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

# The curves over the radius: multiples of epsilon. All have the same, so that no certificate is drawn above an attack.
MULTIPLES = np.linspace(0, 2, 9)
# What nothing decided.
OPEN = "open"


@dataclass
class Outcome:
    """What an evaluation found for N images: every field is an array with one row per image."""

    label: np.ndarray  # (N,) int
    prediction: np.ndarray  # (N,) int
    clean: np.ndarray  # (N,) bool: classified right
    pgd: np.ndarray  # (N,) bool: still right at the point that PGD found
    certified: np.ndarray  # (N,) bool: right in the whole ball, by the bound
    decided_by: np.ndarray  # (N,) str: the stage that certified, `misclassified`, `attack` or `open`
    margin: np.ndarray  # (N,) label's logit minus the largest other one, at x
    worst_margin: np.ndarray  # (N,) the same, bounded over the ball
    local_bound: np.ndarray  # (N,) Lipschitz bound up to the last hidden layer, in the ball
    global_bound: np.ndarray  # (N,) the same, everywhere
    global_radius: np.ndarray  # (N,) radius that the global bound certifies, 0 where x is misclassified
    eliminated_rows: np.ndarray  # (N, L) share of the rows of every linear layer but the last that is switched off
    eliminated_columns: np.ndarray  # (N, L) the same of its columns
    pgd_over_radius: np.ndarray  # (N, R) 0 or 1 at MULTIPLES, NaN where it was not asked
    certified_over_radius: np.ndarray  # (N, R) the same of the certificate
    product_over_radius: np.ndarray  # (N, R) the same by the product of norms alone

    def is_open(self) -> int:
        """Number of images that nothing decided."""
        return int((self.decided_by == OPEN).sum())

    @staticmethod
    def concatenate(parts: list[Outcome]) -> Outcome:
        """The outcome of a whole set from those of its batches."""
        return Outcome(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Outcome)})

    def take(self, order: np.ndarray) -> Outcome:
        """The images at these places."""
        return Outcome(**{f.name: getattr(self, f.name)[order] for f in fields(Outcome)})


@dataclass
class Findings:
    """What an evaluation found by one certificate: image by image, and counts of all images together."""

    outcome: Outcome
    counts: dict[str, np.ndarray]  # (K,) each

    @staticmethod
    def concatenate(parts: list[Findings]) -> Findings:
        """The findings on a whole set from those on its batches."""
        return Findings(Outcome.concatenate([part.outcome for part in parts]), Findings.total(parts))

    @staticmethod
    def total(parts: list[Findings]) -> dict[str, np.ndarray]:
        """The counts of all parts together."""
        return {name: sum(part.counts[name] for part in parts) for name in parts[0].counts}

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, for a file."""
        return vars(self.outcome) | {f"counts.{name}": values for name, values in self.counts.items()}

    @staticmethod
    def of_arrays(arrays: dict[str, np.ndarray]) -> Findings:
        """The inverse of `arrays`."""
        counts = {name.removeprefix("counts."): v for name, v in arrays.items() if name.startswith("counts.")}
        return Findings(Outcome(**{f.name: arrays[f.name] for f in fields(Outcome)}), counts)
