"""The command line's options, and the tables that map their values to classes."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import jchain as jc
from jchain.cli import config as config_lib
from jchain.cli.checkpoints import SIZES
from jchain.cli.config import SearchConfig, require
from jchain.cli.values import parse_pinned, parse_sizes
from jchain.data import LOADERS, SPLITS
from jchain.tasks import TASKS

BANKS = ("independent", "routed", "snapshots", "random")
# The default number of channels of convolutions.
CHANNELS = 16
LAYERS = {
    "residual": jc.layers.ResidualMLP,
    "dense": jc.layers.Dense,
    "invertible-dense": jc.layers.InvertibleDense,
    "invertible-coupling": jc.layers.AdditiveCoupling,
    "invertible-residual": jc.layers.InvertibleResidual,
}
ENCODINGS = {"tokens": jc.TokenEncoding, "weights": jc.WeightEncoding}
SEARCHES: dict[str, Callable[[], jc.Search]] = {
    "actor-critic": jc.ActorCritic,
    "beam": jc.BeamSearch,
    "critic": jc.CriticSearch,
    "evolution": jc.Evolution,
    "linearized": jc.LinearizedSearch,
    "local": jc.LocalSearch,
    "mcts": jc.MCTS,
    "suffix-beam": jc.SuffixBeamSearch,
    "q-learning": jc.QLearning,
    "random": jc.RandomSearch,
    "target-propagation": jc.TargetPropagation,
}
UPDATES: dict[str, Callable[[], jc.updates.UpdatePolicy]] = {
    "frozen": jc.updates.Frozen,
    "tune-found": jc.updates.TuneFound,
    "clone-then-tune": jc.updates.CloneThenTune,
    "shared-updates": jc.updates.SharedUpdates,
}
_DEFAULT = SearchConfig()
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
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


def make_search(config: SearchConfig) -> jc.Search:
    """Make the search that the configuration names.

    Args:
      config: the resolved configuration.
    """
    if config.search == "actor-critic":
        return jc.ActorCritic(encoding=ENCODINGS[config.encoding or "tokens"]())
    return SEARCHES[require(config.search)]()


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="jchain", description="Search over chains of frozen layers."
    )
    parser.add_argument("--version", action="version", version=jc.__version__)
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    _add_search(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_export(commands)
    prepare = commands.add_parser(
        "prepare",
        help="download an image data set from tensorflow-datasets and prepare it for jchain",
    )
    prepare.add_argument(
        "name", help="name of the data set in tensorflow-datasets: mnist, cifar10, ..."
    )
    _add_data_dir(prepare)
    return parser


def _add_compare(commands: _Commands) -> None:
    command = commands.add_parser(
        "compare",
        help="print one table of several results, with intervals over seeds",
        description="Results that differ only in their seeds share a row.",
    )
    command.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="result folders of jchain search"
    )
    _add_json(command)


def find_given(argv: Sequence[str]) -> set[str]:
    """Return the names of the options of `jchain search` that a command line sets.

    Args:
      argv: the arguments after the program's name.
    """
    parser = argparse.ArgumentParser()
    for action in _add_search(parser.add_subparsers())._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv))) - {"config"} | {"command"}


def _add_search(commands: _Commands) -> argparse.ArgumentParser:
    search = commands.add_parser(
        "search", help="make a bank, or load one from checkpoints, and search for its best chain"
    )
    search.add_argument(
        "--task",
        help=f"task to run, with its own data and bank: {', '.join(TASKS)} (default: "
        f"{config_lib.DEFAULT_TASK}, unless --data, --bank, --bank-file, or --checkpoint is given)",
    )
    _add_data(search, "default: digits if a bank is trained")
    _add_pretrained(search)
    _add_bank(search)
    _add_chains(search)
    _add_run(search)
    return search


def _add_data(command: argparse.ArgumentParser, note: str) -> None:
    known, sizes = ", ".join(sorted(LOADERS)), ", ".join(map(str, SIZES))
    command.add_argument(
        "--data",
        help=f"data set: {known}, a prepared image data set, or a file .npz with x and y, or .csv "
        f"with a header ({note})",
    )
    command.add_argument(
        "--target",
        metavar="COLUMN",
        help="column of a .csv file with the labels (default: the last)",
    )
    _add_data_dir(command)
    command.add_argument(
        "--sizes",
        type=parse_sizes,
        metavar="N,N,N,N",
        help=f"number of examples in {', '.join(SPLITS)} (default: all; at most {sizes} with "
        "checkpoints)",
    )


def _add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir",
        type=Path,
        help="folder of prepared data sets (default: the folder of tensorflow-datasets)",
    )


def _add_bank(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("bank from a file")
    group.add_argument(
        "--bank-file", type=Path, metavar="FILE", help="bank that jc.Bank.save wrote, to search"
    )
    _add_modules(group)
    group = search.add_argument_group("bank to train")
    group.add_argument(
        "--bank",
        choices=BANKS,
        help="how the bank is made. independent: nets trained separately; routed: a supernet "
        "trained along random routes; snapshots: copies of one net during its training; random: "
        f"untrained layers (default: {config_lib.DEFAULT_BANK})",
    )
    group.add_argument(
        "--layer",
        choices=sorted([*LAYERS, "conv"]),
        help="type of the layers; conv alternates blocks of 1, 2, and 3 convolutions "
        "(default: conv for images, otherwise residual)",
    )
    group.add_argument(
        "--channels", type=int, help=f"number of channels of convolutions (default: {CHANNELS})"
    )
    group.add_argument(
        "--num-layers",
        type=int,
        help=f"number of layers in the bank (default: {config_lib.DEFAULT_NUM_LAYERS})",
    )
    group.add_argument(
        "--num-heads",
        type=int,
        help="number of heads in a routed or random bank (default: 1; with --layer conv 2, one "
        "pooled and one dense)",
    )
    group.add_argument(
        "--depth",
        type=int,
        help="number of layers in each net or route that is trained (default: "
        f"{config_lib.DEFAULT_DEPTH})",
    )
    group.add_argument(
        "--num-steps",
        type=int,
        help="number of gradient steps to train the bank (default: "
        f"{config_lib.DEFAULT_NUM_STEPS})",
    )


def _add_modules(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--modules",
        type=Path,
        metavar="FILE.py",
        help="Python file that defines the modules of the bank file; it is run",
    )


def _add_chains(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("chains")
    group.add_argument(
        "--max-layers",
        type=int,
        help="maximum number of layers in a chain, not counting pinned ones; the embeddings of a "
        "second checkpoint count as one layer (default: set by the task, or --depth, or the number "
        "of layers of the model)",
    )
    group.add_argument(
        "--min-layers",
        type=int,
        default=_DEFAULT.min_layers,
        help="minimum number of layers in a chain (default: %(default)s)",
    )
    group.add_argument(
        "--layer-cost",
        type=float,
        default=_DEFAULT.layer_cost,
        help="penalty added to the loss for each layer of a chain (default: %(default)s)",
    )


def _add_run(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("the search")
    group.add_argument(
        "--search",
        choices=sorted(SEARCHES),
        help="search algorithm (default: local for checkpoints, actor-critic with --encoding or "
        "--update shared-updates, critic otherwise)",
    )
    group.add_argument(
        "--encoding",
        choices=sorted(ENCODINGS),
        help="how the actor-critic encodes a prefix of a chain (default: tokens)",
    )
    group.add_argument(
        "--update",
        choices=UPDATES,
        default=_DEFAULT.update,
        help="when weights are trained. frozen: never; tune-found: fine-tune the best chain after "
        "the search; clone-then-tune: fine-tune copies of layers and add them to the bank; "
        "shared-updates: train the chains that the actor-critic samples (default: %(default)s)",
    )
    group.add_argument(
        "--budget",
        type=int,
        help="budget of layer calls; gradient steps count too "
        f"(default: {config_lib.TASK_BUDGET} for a task, 20000 for a bank to train, 1000 for "
        "checkpoints)",
    )
    group.add_argument(
        "--max-seconds",
        type=float,
        metavar="SECONDS",
        help="stop after this time, with the best chain so far; the same command continues",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=_DEFAULT.seed,
        help="seed of the splits, the bank, and the search; with --seeds, the first seed (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--seeds",
        type=int,
        dest="num_seeds",
        metavar="N",
        help="number of seeds to run and summarize "
        f"(default: {config_lib.TASK_SEEDS} for a task, otherwise 1)",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help="run one seed, unless --seeds is given, and only the fast controls",
    )
    _add_output(group)


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=Path,
        help="result folder (default: results/TASK-SEARCH-SEEDS, results/DATA-BANK-SEARCH-SEED, or "
        "results/A+B-SEARCH-SEED for checkpoints A and B)",
    )
    group.add_argument(
        "--replace",
        action="store_true",
        help="begin anew, and replace the result in the folder. Without it, the same command "
        "continues a search that was stopped, or shows the result of one that is finished, and a "
        "larger --budget extends it",
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="RESULT",
        help="begin with the options of an earlier result (its folder, result.json, or "
        "summary.json); other options override them",
    )
    _add_json(group)


def _add_json(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, and everything else to standard error",
    )


def _add_pretrained(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("pretrained transformers")
    group.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="DIR",
        help="Hugging Face checkpoint folder whose blocks become the bank; several folders must "
        "have the same architecture",
    )
    group.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text files: chains are scored by the loss of predicting the next token",
    )
    group.add_argument(
        "--choices",
        metavar="FILE",
        help="instead of text, multiple-choice questions as JSON lines: "
        '{"question": ..., "choices": [...], "answer": 0}',
    )
    group.add_argument(
        "--length",
        type=int,
        help="number of tokens in a sequence or question (default: 128, or fewer if the model "
        "takes fewer; for questions, the length of the longest)",
    )
    group.add_argument(
        "--pinned",
        type=parse_pinned,
        metavar="FIRST,LAST",
        help="number of first and last blocks that every chain keeps (default: 1,1)",
    )
    group.add_argument(
        "--sweep",
        type=int,
        metavar="K",
        help="also search chains of at most K, K + 1, ... layers (not counting pinned ones), up to "
        "--max-layers, with the full budget each, and compare them with recipes",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: the dtype in the file)",
    )


def _add_evaluate(commands: _Commands) -> None:
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
    _add_data(evaluate, "default: the data of the search, or digits")
    _add_modules(evaluate)
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
    _add_json(evaluate)
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


def _add_export(commands: _Commands) -> None:
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
    export.add_argument(
        "--max-shard-size",
        type=int,
        default=5 * 10**9,
        help="maximum size of a file of weights, in bytes (default: %(default)s)",
    )
