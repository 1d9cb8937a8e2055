"""The old place of `locallip.dependencies`."""

from locallip.dependencies import L2PGDAttack, datasets  # noqa: F401
