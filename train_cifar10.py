"""Train a certifiably robust network on CIFAR-10. The defaults are the paper's run; `--help` lists the flags."""

import training
import utils

DATA_SETS = ["cifar10"]
DEFAULTS = {
    "epochs": 800,
    "warmup": 20,
    "rampup": 400,
    "epsilon": 36 / 255,
    "epsilon_train": 0.1551,
    "sniter": 2,
    "init": 2.0,
    "lr": 1e-3,
    "end_lr": 1e-6,
}


def main() -> None:
    training.run(utils.training_arguments(__doc__, DATA_SETS, DEFAULTS))


if __name__ == "__main__":
    utils.run_script(main)
