"""Options of the command line, and what their values stand for."""

import argparse
from pathlib import Path
from typing import Any

import jchain as jc
from jchain.cli import checkpoints as jobs
from jchain.data import LOADERS, SPLITS

BANKS = ("independent", "routed", "snapshots", "random")
# Of convolutions, where none are asked for.
CHANNELS = 16
LAYERS = {
    "residual": jc.layers.ResidualMLP,
    "dense": jc.layers.Dense,
    "invertible-dense": jc.layers.InvertibleDense,
    "invertible-coupling": jc.layers.AdditiveCoupling,
    "invertible-residual": jc.layers.InvertibleResidual,
}
ENCODINGS = {"tokens": jc.TokenEncoding, "weights": jc.WeightEncoding}
SEARCHES = {
    "actor-critic": lambda args: jc.ActorCritic(encoding=ENCODINGS[args.encoding or "tokens"]()),
    "beam": lambda args: jc.BeamSearch(),
    "critic": lambda args: jc.CriticSearch(),
    "evolution": lambda args: jc.Evolution(),
    "linearized": lambda args: jc.LinearizedSearch(),
    "local": lambda args: jc.LocalSearch(),
    "mcts": lambda args: jc.MCTS(),
    "suffix-beam": lambda args: jc.SuffixBeamSearch(),
    "q-learning": lambda args: jc.QLearning(),
    "random": lambda args: jc.RandomSearch(),
    "target-propagation": lambda args: jc.TargetPropagation(),
}
UPDATES = {
    "never": jc.updates.Frozen,
    "found": jc.updates.TuneFound,
    "clones": jc.updates.CloneThenTune,
    "shared": jc.updates.SharedUpdates,
}
CLUSTER = """\
on a cluster:
  Start the same command once on every host; the bank file must be readable on each. Where JAX knows the cluster (Slurm,
  Open MPI, Kubernetes, Cloud TPU), as in
    srun --ntasks-per-node=1 jchain evaluate RESULT --all 4 --distributed
  elsewhere with the address of one host, the number of hosts and the place of each among them:
    jchain evaluate RESULT --all 4 --distributed --coordinator host0:1234 --num-processes 2 --process-id 0
    jchain evaluate RESULT --all 4 --distributed --coordinator host0:1234 --num-processes 2 --process-id 1
  Chains are spread over all devices of all hosts. Process 0 prints.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jchain", description="Search over chains of detached (frozen) layers."
    )
    parser.add_argument("--version", action="version", version=jc.__version__)
    commands = parser.add_subparsers(dest="job", required=True, metavar="COMMAND")
    _add_search(commands)
    _add_evaluate(commands)
    _add_export(commands)
    prepare = commands.add_parser(
        "prepare", help="download an image set of tensorflow-datasets and write it for jchain"
    )
    prepare.add_argument(
        "name", help="as in tensorflow-datasets: mnist, fashion_mnist, cifar10, ..."
    )
    _add_data_dir(prepare)
    return parser


def _add_data(command: argparse.ArgumentParser, default: str | None, note: str) -> None:
    known, sizes = ", ".join(sorted(LOADERS)), ", ".join(map(str, jobs.SIZES))
    command.add_argument(
        "--data",
        default=default,
        help=f"data set: {known}, or one of images that is prepared ({note})",
    )
    _add_data_dir(command)
    command.add_argument(
        "--sizes",
        type=_parse_sizes,
        metavar="N,N,N,N",
        help=f"examples of {', '.join(SPLITS)} (default: as many as there are; of checkpoints at most {sizes})",
    )


def _add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir",
        type=Path,
        help="folder of prepared sets (default: that of tensorflow-datasets)",
    )


def _add_search(commands: Any) -> None:
    search = commands.add_parser(
        "search", help="make a bank, or read one from checkpoints, and search it"
    )
    _add_data(search, None, "default: digits, but where there are checkpoints")
    _add_pretrained(search)
    search.add_argument(
        "--bank",
        choices=BANKS,
        default="routed",
        help="how the bank is made (default: %(default)s)",
    )
    search.add_argument(
        "--layer",
        choices=sorted([*LAYERS, "conv"]),
        help="module of the layers; conv: blocks of 1, 2 and 3 convolutions in turn (default: conv for images, else residual)",
    )
    search.add_argument("--channels", type=int, help=f"of convolutions (default: {CHANNELS})")
    search.add_argument(
        "--num-layers", type=int, default=12, help="layers in the bank (default: %(default)s)"
    )
    search.add_argument(
        "--num-heads",
        type=int,
        help="heads of a routed or random bank (default: 1; 2 with conv, a pooled and a dense one)",
    )
    search.add_argument(
        "--depth",
        type=int,
        default=4,
        help="layers of each net, or route, that is trained (default: %(default)s)",
    )
    search.add_argument(
        "--num-steps",
        type=int,
        default=1000,
        help="gradient steps that make the bank (default: %(default)s)",
    )
    search.add_argument(
        "--max-layers",
        type=int,
        help="most layers in a chain, beside pinned ones; embeddings of another checkpoint are one "
        "(default: depth; of checkpoints as many as a model has)",
    )
    search.add_argument(
        "--min-layers", type=int, default=0, help="fewest layers in a chain (default: %(default)s)"
    )
    search.add_argument(
        "--layer-cost",
        type=float,
        default=0.0,
        help="price of a layer in units of the loss (default: %(default)s)",
    )
    search.add_argument(
        "--search",
        choices=sorted(SEARCHES),
        help="search (default: actor-critic; of checkpoints local)",
    )
    search.add_argument(
        "--encoding",
        choices=sorted(ENCODINGS),
        help="what the actor-critic sees (default: tokens)",
    )
    search.add_argument(
        "--update",
        choices=UPDATES,
        default="never",
        help="when weights are trained on: never, those of the found chain, of clones that join the bank, or of all that the "
        "actor-critic samples (default: %(default)s)",
    )
    search.add_argument(
        "--budget",
        type=int,
        help="layer calls, those of gradient steps included (default: 20000; of checkpoints 1000)",
    )
    search.add_argument(
        "--seed", type=int, default=0, help="of splits, bank and search (default: %(default)s)"
    )
    search.add_argument(
        "--out",
        type=Path,
        help="result folder (default: results/DATA-BANK-SEARCH-SEED; of checkpoints results/A+B-SEARCH-SEED)",
    )
    search.add_argument(
        "--replace", action="store_true", help="replace a result that is in the folder"
    )
    search.add_argument(
        "--json", action="store_true", help="print the result as one JSON object in the last line"
    )


def _add_pretrained(search: argparse.ArgumentParser) -> None:
    pretrained = search.add_argument_group("pretrained transformers")
    pretrained.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="DIR",
        help="Hugging Face checkpoint folder, or several of one architecture: their blocks are the bank",
    )
    pretrained.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text that chains are judged on, by the next token",
    )
    pretrained.add_argument(
        "--choices",
        metavar="FILE",
        help='or JSON lines of {"question": ..., "choices": [...], "answer": 0}',
    )
    pretrained.add_argument(
        "--length",
        type=int,
        help="tokens of a sequence, or question (default: 128 or as many as the model takes, and the longest question)",
    )
    pretrained.add_argument(
        "--pinned",
        type=_parse_pinned,
        metavar="FIRST,LAST",
        help="blocks that every chain begins and ends with (default: 1,1)",
    )
    pretrained.add_argument(
        "--sweep",
        type=int,
        metavar="K",
        help="search chains of at most K, K + 1, ... layers beside pinned ones too, up to --max-layers, the budget for each, "
        "and compare recipes",
    )
    pretrained.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights (default: the file's)",
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score chains of a saved bank",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=CLUSTER,
    )
    evaluate.add_argument("bank", type=Path, help="a bank file, or the result folder of a search")
    evaluate.add_argument(
        "--chain",
        action="append",
        metavar="TOKENS",
        help="layer tokens and a head, as in 3,0,7,12; repeat for more (default: the chain that the search found)",
    )
    _add_data(evaluate, None, "default: that of the search, or digits")
    evaluate.add_argument(
        "--seed", type=int, help="of the splits (default: that of the search, or 0)"
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
        help="score every chain of up to so many layers and print the 10 best",
    )
    evaluate.add_argument(
        "--json", action="store_true", help="print the result as one JSON object in the last line"
    )
    evaluate.add_argument(
        "--distributed", action="store_true", help="share the work with other processes, see below"
    )
    evaluate.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    evaluate.add_argument("--num-processes", type=int, help="how many processes there are")
    evaluate.add_argument("--process-id", type=int, help="which of them this is, from 0")
    evaluate.add_argument(
        "--timeout",
        type=float,
        default=300,
        help="seconds to wait for the others (default: %(default)s)",
    )


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a chain of checkpoints as a checkpoint")
    export.add_argument("result", type=Path, help="the result folder of jchain search --checkpoint")
    export.add_argument(
        "--out", type=Path, required=True, help="folder to write, which is not there yet"
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


def _parse_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
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
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(
            f"expected a chain as tokens with commas between, 3,0,7,12, got {text!r}"
        ) from None
