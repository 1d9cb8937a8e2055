"""Train a certifiably robust network on Tiny ImageNet; `--help` lists the flags.

The paper's runs are four processes: `torchrun --standalone --nproc_per_node=4 train_tinyimagenet.py ...`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training
import utils

DATA_DIR = os.path.relpath(Path(__file__).resolve().parent / "data")
DATA_SETS = ["tinyimagenet"]
DEFAULTS = {
    "model": "tinyimagenet_relux",
    "data_dir": DATA_DIR,
    "epochs": 250,
    "warmup": 0,
    "rampup": 125,
    "epsilon": 36 / 255,
    "epsilon_train": 0.16,
    "sniter": 1,
    "init": 1.0,
    "batch_size": 32,
    "test_batch_size": 32,
    "lr": 2.5e-4,
    "end_lr": 5e-7,
    "sparse": 0.01,
    "indices": [0, 6, 12, 14, 17],
}


def main() -> None:
    training.run(utils.training_arguments(__doc__, DATA_SETS, DEFAULTS))


if __name__ == "__main__":
    utils.run_script(main)
