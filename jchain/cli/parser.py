"""Options of the command line, and the tables of what their values name."""

import argparse
from collections.abc import Callable
from pathlib import Path

import jchain as jc
from jchain.cli import config as config_lib
from jchain.cli.checkpoints import SIZES
from jchain.cli.config import SearchConfig, resolved
from jchain.data import LOADERS, SPLITS
from jchain.tasks import TASKS

BANKS = ("independent", "routed", "snapshots", "random")
# Channels of convolutions if none are given.
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
    "never": jc.updates.Frozen,
    "found": jc.updates.TuneFound,
    "clones": jc.updates.CloneThenTune,
    "shared": jc.updates.SharedUpdates,
}
_DEFAULT = SearchConfig()
_CLUSTER = """\
on a cluster:
  Start the same command once on every host. Each host must be able to read the bank file.
  If JAX knows the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU):
    srun --ntasks-per-node=1 jchain evaluate RESULT --all 4 --distributed
  Otherwise give the address of one host, the number of hosts, and the number of each:
    jchain evaluate RESULT --all 4 --distributed \\
      --coordinator host0:1234 --num-processes 2 --process-id 0
    jchain evaluate RESULT --all 4 --distributed \\
      --coordinator host0:1234 --num-processes 2 --process-id 1
  Chains are spread over all devices of all hosts. Process 0 prints.
"""


def make_search(config: SearchConfig) -> jc.Search:
    """The search that the configuration names.

    Args:
      config: resolved.
    """
    if config.search == "actor-critic":
        return jc.ActorCritic(encoding=ENCODINGS[config.encoding or "tokens"]())
    return SEARCHES[resolved(config.search)]()


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="jchain", description="Search over chains of frozen layers."
    )
    parser.add_argument("--version", action="version", version=jc.__version__)
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    search = commands.add_parser(
        "search", help="make a bank, or read one from checkpoints, and search it"
    )
    search.add_argument(
        "--task",
        help=f"task, which brings its data and bank: {', '.join(TASKS)} (default: "
        f"{config_lib.DEFAULT_TASK}, unless a data set, a bank or checkpoints are given)",
    )
    _add_data(search, "default with a bank: digits; with checkpoints none")
    _add_pretrained(search)
    _add_bank(search)
    _add_chains(search)
    _add_run(search)
    _add_evaluate(commands)
    _add_export(commands)
    prepare = commands.add_parser(
        "prepare", help="download an image set of tensorflow-datasets and write it for jchain"
    )
    prepare.add_argument("name", help="as in tensorflow-datasets: mnist, cifar10, ...")
    _add_data_dir(prepare)
    return parser


def _add_data(command: argparse.ArgumentParser, note: str) -> None:
    known, sizes = ", ".join(sorted(LOADERS)), ", ".join(map(str, SIZES))
    command.add_argument("--data", help=f"data set: {known}, or a prepared image set ({note})")
    _add_data_dir(command)
    command.add_argument(
        "--sizes",
        type=_parse_sizes,
        metavar="N,N,N,N",
        help=f"examples of {', '.join(SPLITS)} (default: all; with checkpoints at most {sizes})",
    )


def _add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir",
        type=Path,
        help="folder of prepared sets (default: that of tensorflow-datasets)",
    )


def _add_bank(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("the bank that is trained")
    group.add_argument(
        "--bank",
        choices=BANKS,
        help=f"how the bank is made (default: {config_lib.DEFAULT_BANK})",
    )
    group.add_argument(
        "--layer",
        choices=sorted([*LAYERS, "conv"]),
        help="module of the layers; conv: blocks of 1, 2 and 3 convolutions in turn "
        "(default: conv for images, else residual)",
    )
    group.add_argument(
        "--channels", type=int, help=f"channels of convolutions (default: {CHANNELS})"
    )
    group.add_argument(
        "--num-layers",
        type=int,
        help=f"layers in the bank (default: {config_lib.DEFAULT_NUM_LAYERS})",
    )
    group.add_argument(
        "--num-heads",
        type=int,
        help="heads of a routed or random bank (default: 1; with conv 2, a pooled and a dense one)",
    )
    group.add_argument(
        "--depth",
        type=int,
        help=f"layers of each net, or route, that is trained (default: {config_lib.DEFAULT_DEPTH})",
    )
    group.add_argument(
        "--num-steps",
        type=int,
        help=f"gradient steps that make the bank (default: {config_lib.DEFAULT_NUM_STEPS})",
    )


def _add_chains(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("chains")
    group.add_argument(
        "--max-layers",
        type=int,
        help="most layers in a chain, beside pinned ones; the embeddings of a second checkpoint "
        "count as one (default: that of the task, or --depth; with checkpoints as many as a model "
        "has)",
    )
    group.add_argument(
        "--min-layers",
        type=int,
        default=_DEFAULT.min_layers,
        help="fewest layers in a chain (default: %(default)s)",
    )
    group.add_argument(
        "--layer-cost",
        type=float,
        default=_DEFAULT.layer_cost,
        help="penalty of a layer, in units of the loss (default: %(default)s)",
    )


def _add_run(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("the search")
    group.add_argument(
        "--search",
        choices=sorted(SEARCHES),
        help="search (default: critic for a task; actor-critic with a bank that is trained; local "
        "with checkpoints)",
    )
    group.add_argument(
        "--encoding",
        choices=sorted(ENCODINGS),
        help="how the actor-critic encodes a prefix (default: tokens)",
    )
    group.add_argument(
        "--update",
        choices=UPDATES,
        default=_DEFAULT.update,
        help="when weights are trained. never; found: tune the chain found; clones: tune copies "
        "that join the bank; shared: train the chains that the actor-critic samples "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--budget",
        type=int,
        help="layer calls, those of gradient steps included "
        f"(default: {config_lib.TASK_BUDGET} for a task; 20000 with a bank; 1000 with checkpoints)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=_DEFAULT.seed,
        help="seed of splits, bank, and search; the first of several (default: %(default)s)",
    )
    group.add_argument(
        "--seeds",
        type=int,
        dest="num_seeds",
        metavar="N",
        help="run N seeds and compare over them "
        f"(default: {config_lib.TASK_SEEDS} for a task, else 1)",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help="one seed, unless --seeds is given, and only the controls that are fast",
    )
    group.add_argument(
        "--out",
        type=Path,
        help="result folder (default: results/TASK-SEARCH-SEEDS, results/DATA-BANK-SEARCH-SEED; "
        "with checkpoints results/A+B-SEARCH-SEED)",
    )
    group.add_argument(
        "--replace", action="store_true", help="replace the result in the folder, if there is one"
    )
    _add_json(group)


def _add_json(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--json", action="store_true", help="print the result as one JSON object in the last line"
    )


def _add_pretrained(search: argparse.ArgumentParser) -> None:
    group = search.add_argument_group("pretrained transformers")
    group.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="DIR",
        help="Hugging Face checkpoint folder, or several of one architecture, whose blocks are the "
        "bank",
    )
    group.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text that chains are judged on, by the next token",
    )
    group.add_argument(
        "--choices",
        metavar="FILE",
        help='or JSON lines of {"question": ..., "choices": [...], "answer": 0}',
    )
    group.add_argument(
        "--length",
        type=int,
        help="tokens of a sequence or question (default: 128 or as many as the model takes, and "
        "the longest question)",
    )
    group.add_argument(
        "--pinned",
        type=_parse_pinned,
        metavar="FIRST,LAST",
        help="blocks that every chain begins and ends with (default: 1,1)",
    )
    group.add_argument(
        "--sweep",
        type=int,
        metavar="K",
        help="also search chains of at most K, K + 1, ... layers beside pinned ones, up to "
        "--max-layers, with the budget for each, and compare recipes",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: that of the file)",
    )


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score chains of a saved bank",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_CLUSTER,
    )
    evaluate.add_argument("bank", type=Path, help="a bank file, or the result folder of a search")
    evaluate.add_argument(
        "--chain",
        action="append",
        metavar="TOKENS",
        help="layer tokens and a head, as in 3,0,7,12; repeat for more (default: the chain that "
        "the search found)",
    )
    _add_data(evaluate, "default: that of the search, or digits")
    evaluate.add_argument(
        "--seed", type=int, help="seed of the splits (default: that of the search, or 0)"
    )
    evaluate.add_argument(
        "--split",
        choices=("search", "select", "test"),
        default="search",
        help="what to score on (default: %(default)s)",
    )
    evaluate.add_argument(
        "--all",
        type=int,
        metavar="LAYERS",
        help="score every chain of up to that many layers and print the 10 best",
    )
    _add_json(evaluate)
    evaluate.add_argument(
        "--distributed", action="store_true", help="share the work with other processes, see below"
    )
    evaluate.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    evaluate.add_argument("--num-processes", type=int, help="number of processes")
    evaluate.add_argument("--process-id", type=int, help="number of this process, from 0")
    evaluate.add_argument(
        "--timeout",
        type=float,
        default=300,
        help="seconds to wait for the others (default: %(default)s)",
    )


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = commands.add_parser("export", help="write a chain of checkpoints as a checkpoint")
    export.add_argument("result", type=Path, help="the result folder of jchain search --checkpoint")
    export.add_argument(
        "--out", type=Path, required=True, help="folder to write, which does not exist yet"
    )
    export.add_argument(
        "--chain",
        metavar="TOKENS",
        help="as in 3,0,7,12 (default: the chain that the search found)",
    )
    export.add_argument(
        "--max-shard-size",
        type=int,
        default=5 * 10**9,
        help="bytes of a file of weights (default: %(default)s)",
    )


def _parse_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected sizes as in 5000,1000,1000,1000, got {text!r}"
        ) from None


def _parse_pinned(text: str) -> tuple[int, int]:
    try:
        first, last = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers as in 1,1, got {text!r}") from None
    return first, last


def parse_chain(text: str) -> list[int]:
    """The tokens of a chain.

    Args:
      text: tokens, separated by commas.

    Raises:
      ValueError: the text has another form.
    """
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(
            f"expected a chain as tokens with commas between, 3,0,7,12, got {text!r}"
        ) from None
