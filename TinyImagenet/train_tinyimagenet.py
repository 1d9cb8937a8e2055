"""Train a certifiably robust network on Tiny ImageNet; `--help` lists the flags.

The paper's runs are four processes: `torchrun --standalone --nproc_per_node=4 train_tinyimagenet.py ...`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from locallip.files import run_script

DATA_DIR = os.path.relpath(Path(__file__).resolve().parent / "data")
DATA_SETS = utils.data_sets("tinyimagenet")
DEFAULTS = utils.RECIPES["tinyimagenet"].defaults | {"data_dir": DATA_DIR}


def main() -> None:
    utils.train(utils.training_arguments(__doc__, DATA_SETS, DEFAULTS))


if __name__ == "__main__":
    run_script(main)
