"""The options of `jchain search`, and those that commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from jchain.cli import config as config_lib
from jchain.cli.checkpoints import SIZES
from jchain.cli.choices import BANKS, CHANNELS, ENCODINGS, LAYERS, SEARCHES, UPDATES
from jchain.cli.config import SearchConfig
from jchain.cli.values import parse_fractions, parse_moves, parse_pinned, parse_sizes
from jchain.data import LOADERS, SPLITS
from jchain.tasks import TASKS

_DEFAULT = SearchConfig()
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def find_given(argv: Sequence[str]) -> set[str]:
    """Return the names of the options of `jchain search` that a command line sets.

    Args:
      argv: the arguments after the program's name.
    """
    parser = argparse.ArgumentParser()
    for action in add_search(parser.add_subparsers())._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv))) - {"config"} | {"command"}


def add_search(commands: Commands) -> argparse.ArgumentParser:
    """Add `jchain search`.

    Args:
      commands: the commands of the parser.
    """
    search = commands.add_parser(
        "search", help="make a bank, or load one from checkpoints, and search for its best chain"
    )
    search.add_argument(
        "--task",
        help=f"task to run, with its own data and bank: {', '.join(TASKS)} (default: "
        f"{config_lib.DEFAULT_TASK}, unless --data, --bank, --bank-file, or --checkpoint is given)",
    )
    add_data(search, "default: digits if a bank is trained")
    _add_pretrained(search)
    _add_bank(search)
    _add_chains(search)
    _add_run(search)
    return search


def add_data(command: argparse.ArgumentParser, note: str) -> None:
    """Add the options that choose the data.

    Args:
      command: the parser of the command.
      note: the default, for the help.
    """
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
    add_data_dir(command)
    command.add_argument(
        "--sizes",
        type=parse_sizes,
        metavar="N,N,N,N",
        help=f"number of examples in {', '.join(SPLITS)} (default: all; at most {sizes} with "
        "checkpoints)",
    )


def add_trust(command: argparse._ActionsContainer) -> None:
    """Add the option that lets a result of somebody else name files.

    Args:
      command: the parser of the command.
    """
    command.add_argument(
        "--trust",
        action="store_true",
        help="read the files that the result names, also if it was made elsewhere, and run those "
        "that define modules",
    )


def add_data_dir(command: argparse.ArgumentParser) -> None:
    """Add `--data-dir`.

    Args:
      command: the parser of the command.
    """
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
    add_modules(group)
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


def add_modules(command: argparse._ActionsContainer) -> None:
    """Add `--modules`.

    Args:
      command: the parser of the command, or a group of it.
    """
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
        "--space",
        choices=("chains", "subset"),
        help="chains: layers in any order, also several times; subset: some of the layers of the "
        "models, in their order (default: subset if --max-layers is below the number of layers of "
        "a checkpoint, otherwise chains)",
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
        "--moves",
        type=parse_moves,
        metavar="KIND,KIND,...",
        help="how local search and evolution change a chain. edits: swap, insert, or drop a layer; "
        "switches: drop a layer and put another one at its own place; runs: drop or repeat a run "
        "of layers (default: edits; all with checkpoints)",
    )
    group.add_argument(
        "--fractions",
        type=parse_fractions,
        metavar="F,F,...",
        help="score the chains of each step on these fractions of the examples, one after the "
        "other, and only the best quarter goes on to the next, as in 1/16,1/4,1 (default: all "
        "chains on all examples)",
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
        f"(default: {config_lib.TASK_BUDGET} for a task, 20000 for a bank to train, "
        f"{config_lib.CHECKPOINT_BUDGET} for checkpoints)",
    )
    group.add_argument(
        "--max-seconds",
        type=float,
        metavar="SECONDS",
        help="stop after this time, with the best chain so far; the same command continues",
    )
    _add_seeds(group)
    _add_output(group)


def _add_seeds(group: argparse._ArgumentGroup) -> None:
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
        "--workers",
        type=int,
        dest="num_workers",
        default=_DEFAULT.num_workers,
        metavar="N",
        help="number of seeds to run at the same time, each in a process of its own (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help="run one seed, unless --seeds is given, and only the fast controls",
    )


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
    add_trust(group)
    add_json(group)


def add_json(command: argparse._ActionsContainer) -> None:
    """Add `--json`.

    Args:
      command: the parser of the command, or a group of it.
    """
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
        metavar="MODEL",
        help="checkpoint whose blocks become the bank: a folder, owner/name[@revision] of the "
        "Hugging Face hub, a GGUF file, or a LoRA adapter; several must have the same architecture",
    )
    group.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="files of text, plain or as .jsonl, .json, .csv, or .parquet: chains are scored by "
        "the loss of predicting the next token, on sequences drawn at random from all files",
    )
    group.add_argument(
        "--field",
        metavar="NAME",
        help="field or column of --text that holds the text (default: text)",
    )
    group.add_argument(
        "--choices",
        metavar="FILE",
        help="instead of text, a file of multiple-choice questions, as MMLU, ARC, HellaSwag, PIQA, "
        "and others store them",
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
        "--sublayers",
        action="store_true",
        help="make the attention and the MLP of each block layers of their own",
    )
    group.add_argument(
        "--alternate",
        action="store_true",
        help="with --sublayers, chains in which attention and MLP alternate",
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
