"""Clean, PGD and certified accuracy on Tiny ImageNet: evaluate.py with this data set's defaults."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import utils
from locallip.files import run_script

DATA_DIR = os.path.relpath(Path(__file__).resolve().parent / "data")
BATCH_SIZE = utils.RECIPES["tinyimagenet"].defaults["test_batch_size"]
DEFAULTS = {"data": "tinyimagenet", "data_dir": DATA_DIR, "test_batch_size": BATCH_SIZE}


def main() -> None:
    evaluate.main(DEFAULTS)


if __name__ == "__main__":
    run_script(main)
