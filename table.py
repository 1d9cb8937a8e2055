"""Put all summaries into the table of the README and the remarks of results/README.md, and draw the trainings."""

from __future__ import annotations

from pathlib import Path

import utils
from data_load import DATA_SETS
from locallip import distributed, flags
from locallip.evaluation.table import Row, refresh
from locallip.files import run_script

ROOT = Path(__file__).resolve().parent


def row(run: utils.Run) -> Row:
    """The row of a run."""
    data = DATA_SETS[run.data]
    title = f"{run.recipe.title}, ε = {utils.radius_text(data.epsilon)}, {run.title}"
    of_recipe = run.epochs, run.paper, run.batch_size, run.recipe.title
    validated_at = utils.run_arguments(run).epsilon
    return Row(run.job, title, data.epsilon, *of_recipe, data.classes, run.start_from, run.after, validated_at)


def main() -> None:
    flags.ArgumentParser(__doc__).parse_args()
    distributed.refuse_several()
    print(refresh(ROOT, [row(run) for run in utils.RUNS]))


if __name__ == "__main__":
    run_script(main)
