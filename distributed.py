"""The module `locallip.distributed` under its old name."""

import sys

import locallip.distributed

sys.modules[__name__] = locallip.distributed
