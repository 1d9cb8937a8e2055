"""Train a certifiably robust network on CIFAR-10. `bash run_job.sh` lists the published runs."""

import utils
from locallip.files import run_script

DATA_SETS = utils.data_sets("cifar10")
DEFAULTS = utils.RECIPES["cifar10"].defaults


def main() -> None:
    utils.train(utils.training_arguments(__doc__, DATA_SETS, DEFAULTS))


if __name__ == "__main__":
    run_script(main)
