"""Train a certifiably robust network on MNIST. `bash run_job.sh` lists the published runs."""

import utils
from locallip.files import run_script

DATA_SETS = utils.data_sets("mnist")
DEFAULTS = utils.RECIPES["mnist"].defaults


def main() -> None:
    utils.train(utils.training_arguments(__doc__, DATA_SETS, DEFAULTS))


if __name__ == "__main__":
    run_script(main)
