"""Start a script in several processes, as torchrun does with the same flags, and end as the script does.

    python -m locallip.start --standalone --nproc_per_node=4 train_cifar10.py ...

A script says in one line what is wrong. Torchrun puts a report of its own with a traceback behind it, and ends with 1.
"""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> NoReturn:
    """Run the script that the command line names; exits with the code of the process that failed first.

    A signal that stops it, such as Ctrl-C, stops the processes too; it then exits with 128 and the signal's number.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        print(f"error: rank {rank}: ended by {failure.signal_name()}", file=sys.stderr)
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


if __name__ == "__main__":
    main()
