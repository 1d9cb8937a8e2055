"""Train a certifiably robust network on MNIST. The defaults are the paper's run; `--help` lists the flags."""

import utils
from locallip.files import run_script

DATA_SETS = utils.data_sets("mnist")
DEFAULTS = utils.RECIPES["mnist"].defaults


def main() -> None:
    utils.train(utils.training_arguments(__doc__, DATA_SETS, DEFAULTS))


if __name__ == "__main__":
    run_script(main)
