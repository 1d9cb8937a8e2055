"""Command lines: a parser that refuses in one line, and the kinds of values that flags take."""

from __future__ import annotations

import argparse
import math
import re
from typing import IO, NoReturn

from locallip import launch
from locallip.files import InputError, expand_home, fail

# Below it single precision has no full numbers, and 0 in the end.
_SMALLEST = 2.0**-126
# Beyond it squares of single precision are infinite far too soon.
_LARGEST = 1e30


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers a wrong flag with one line and refuses abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def print_help(self, file: IO[str] | None = None) -> None:
        """Print it in the first of several processes alone."""
        if not launch.rank_of_several():
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)", 2)


def path(text: str) -> str:
    """A file or folder, `~` and `~user` expanded."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder")
    try:
        return expand_home(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_int(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural_int(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got '{text}'") from None


def seed(text: str) -> int:
    value = natural_int(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {value}")
    return value


def natural_float(text: str) -> float:
    """A finite number of at least 0, such as 0.5, 1e-3 or 36/255."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number such as 0.5 or 36/255, got '{text}'") from None
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text}")
    if value > _LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {_LARGEST:g}, got {text}")
    if 0 < value < _SMALLEST:
        raise argparse.ArgumentTypeError(f"must be 0 or at least {_SMALLEST:.2g}, got {text}")
    return value


def probability(text: str) -> float:
    value = natural_float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def positive_float(text: str) -> float:
    value = natural_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return value


def scale(text: str) -> float:
    value = positive_float(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"must be at most 100, got {text}")
    return value


def positions(text: str) -> list[int]:
    """Positions in a network, separated by commas."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got '{text}'")
    return sorted({int(part) for part in text.split(",")})
