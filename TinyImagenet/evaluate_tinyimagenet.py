"""Clean, PGD and certified accuracy on Tiny ImageNet: evaluate.py with this data set's defaults."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import utils

DATA_DIR = os.path.relpath(Path(__file__).resolve().parent / "data")
DEFAULTS = {"data": "tinyimagenet", "data_dir": DATA_DIR, "test_batch_size": 32}


def main() -> None:
    evaluate.main(DEFAULTS)


if __name__ == "__main__":
    utils.run_script(main)
