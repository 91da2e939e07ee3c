"""The process of one seed, which `jchain.cli.workers` starts."""

import json
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import redirect_stdout
from typing import cast

from jchain.cli.config import SearchConfig
from jchain.cli.interruption import EXIT_CODES, SignalHandlers, exit_process, get_name
from jchain.cli.records import ResultRecord
from jchain.cli.result_folder import UnwrittenError
from jchain.cli.seed_runs import run_one_of_several
from jchain.cli.tables import print_table
from jchain.cli.work_folder import WorkFolder


def main(text: str) -> int:
    """Search with one seed.

    Args:
      text: JSON with the options of the seed and the seconds that are left.

    Returns:
      The exit status: 0 on success, 2 for an error, and otherwise the code of `EXIT_CODES`.
    """
    threading.Thread(target=_watch_parent, daemon=True).start()
    # Workers share a cache of programs. One that another worker is still writing is compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    options = json.loads(text)
    config = SearchConfig.load(options["config"])
    seconds = options["seconds"]
    deadline = None if seconds is None else time.monotonic() + seconds
    try:
        with SignalHandlers():
            run_one_of_several(config, WorkFolder(config), deadline)
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, UnwrittenError):
            with redirect_stdout(sys.stderr):
                print_table(cast(ResultRecord, error.record))
        print(f"jchain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return EXIT_CODES[get_name(error)]
    return 0


def _watch_parent() -> None:
    """Stop this process if its parent is gone, which closes standard input."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    exit_process(main(sys.argv[1]))
