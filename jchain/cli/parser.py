"""The parser of all commands."""

import argparse
from pathlib import Path

import jchain as jc
from jchain.cli.search_options import (
    Commands,
    add_data,
    add_data_dir,
    add_json,
    add_modules,
    add_search,
    add_trust,
)

_CLUSTER = """\
on a cluster:
  Start the same command once on every host. Each host must be able to read the bank file.
  If JAX knows the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU):
    srun --ntasks-per-node=1 jchain evaluate RESULT --all 4 --distributed
  Otherwise give the address of one host, the number of hosts, and the index of each host:
    jchain evaluate RESULT --all 4 --distributed \\
      --coordinator host0:1234 --num-processes 2 --process-id 0
    jchain evaluate RESULT --all 4 --distributed \\
      --coordinator host0:1234 --num-processes 2 --process-id 1
  Chains are spread over all devices of all hosts. Process 0 prints.
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="jchain", description="Search over chains of frozen layers."
    )
    parser.add_argument("--version", action="version", version=jc.__version__)
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    add_search(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_report(commands)
    _add_export(commands)
    prepare = commands.add_parser(
        "prepare",
        help="download an image data set from tensorflow-datasets and prepare it for jchain",
    )
    prepare.add_argument(
        "name", help="name of the data set in tensorflow-datasets: mnist, cifar10, ..."
    )
    add_data_dir(prepare)
    return parser


def _add_compare(commands: Commands) -> None:
    command = commands.add_parser(
        "compare",
        help="print one table of several results, with intervals over seeds",
        description="Results that differ only in their seeds share a row.",
    )
    command.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="result folders of jchain search"
    )
    add_json(command)


def _add_report(commands: Commands) -> None:
    command = commands.add_parser(
        "report",
        help="write one HTML page with the tables, curves, and chains of results",
        description="The page opens without a network. Results that differ only in their seeds are "
        "shown as one search.",
    )
    command.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="result folders of jchain search"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="page to write (default: %(default)s)",
    )
    command.add_argument(
        "--no-maps",
        action="store_true",
        help="leave out the heat maps, for which the banks and the data are loaded; for "
        "checkpoints, each chain that repeats or drops a run of blocks is scored",
    )
    add_trust(command)


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score chains of a saved bank",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_CLUSTER,
    )
    evaluate.add_argument("bank", type=Path, help="bank file, or result folder of a search")
    evaluate.add_argument(
        "--chain",
        action="append",
        metavar="TOKENS",
        help="tokens of the layers and the head, as in 3,0,7,12; can be repeated (default: the "
        "chain that the search found)",
    )
    add_data(evaluate, "default: the data of the search, or digits")
    add_modules(evaluate)
    evaluate.add_argument(
        "--seed", type=int, help="seed of the splits (default: the seed of the search, or 0)"
    )
    evaluate.add_argument(
        "--split",
        choices=("search", "select", "test"),
        default="search",
        help="split to score chains on (default: %(default)s)",
    )
    evaluate.add_argument(
        "--all",
        type=int,
        metavar="LAYERS",
        help="score every chain of up to LAYERS layers and print the 10 best",
    )
    add_trust(evaluate)
    add_json(evaluate)
    evaluate.add_argument(
        "--distributed", action="store_true", help="share the work with other processes (see below)"
    )
    evaluate.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    evaluate.add_argument("--num-processes", type=int, help="number of processes")
    evaluate.add_argument("--process-id", type=int, help="index of this process, counted from 0")
    evaluate.add_argument(
        "--timeout",
        type=float,
        default=300,
        help="seconds to wait for the other processes (default: %(default)s)",
    )


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export", help="write a chain of pretrained blocks as a new checkpoint"
    )
    export.add_argument("result", type=Path, help="result folder of jchain search --checkpoint")
    export.add_argument(
        "--out", type=Path, required=True, help="folder to create for the new checkpoint"
    )
    export.add_argument(
        "--chain",
        metavar="TOKENS",
        help="tokens, as in 3,0,7,12 (default: the chain that the search found)",
    )
    add_trust(export)
    export.add_argument(
        "--max-shard-size",
        type=int,
        default=5 * 10**9,
        help="maximum size of a file of weights, in bytes (default: %(default)s)",
    )
