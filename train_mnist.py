"""Train a certifiably robust network on MNIST. The defaults are the paper's run; `--help` lists the flags."""

import training
import utils

DATA_SETS = ["mnist", "digits"]
DEFAULTS = {
    "epochs": 300,
    "warmup": 0,
    "rampup": 150,
    "epsilon": 1.58,
    "epsilon_train": 1.58,
    "sniter": 5,
    "init": 1.0,
    "lr": 1e-3,
    "end_lr": 5e-6,
}


def main() -> None:
    training.run(utils.training_arguments(__doc__, DATA_SETS, DEFAULTS))


if __name__ == "__main__":
    utils.run_script(main)
