"""The commands: `jchain search`, `evaluate`, `compare`, `report`, `export`, and `prepare`."""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypedDict, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jchain import chain as chain_lib
from jchain import images
from jchain.bank import Bank
from jchain.cli import card_facts, checkpoints, compare, result_folder
from jchain.cli.checkpoints import EvalData
from jchain.cli.choices import LAYERS
from jchain.cli.config import SearchConfig, check_search, require, resolve
from jchain.cli.interruption import Stopped
from jchain.cli.loading import load_bank_and_data
from jchain.cli.progress import print_progress
from jchain.cli.records import ResultRecord, Summary, finite_or_none, format_loss
from jchain.cli.report import write_report
from jchain.cli.search_options import find_given
from jchain.cli.seed_runs import run_seeds
from jchain.cli.tables import print_summary, print_table, print_text_table
from jchain.cli.values import parse_chain
from jchain.cli.work_folder import open_work
from jchain.engine import distributed
from jchain.engine.evaluation import evaluate, evaluate_all
from jchain.hub.export_folder import check_out
from jchain.hub.exporting import export
from jchain.hub.locating import choose_names, locate
from jchain.problem import Problem

# Number of chains, best first, that `--all` prints.
_NUM_SHOWN = 10


class _ChainRow(TypedDict):
    """One chain in the output of `jchain evaluate --json`."""

    chain: list[int]
    layers: list[str]
    loss: float | None
    accuracy: float


def run_search(args: argparse.Namespace) -> None:
    """Run `jchain search`: make a bank, or read one from checkpoints, and search it."""
    config = resolve(SearchConfig.load(_merge_config(args)))
    # With --json, standard output has nothing but the JSON.
    with redirect_stdout(sys.stderr if config.json else sys.stdout):
        report = _run_config(config)
    if config.json:
        print(json.dumps(report))


def _merge_config(args: argparse.Namespace) -> dict[str, object]:
    """Return the options: those of an earlier result, if one is given, under the given ones."""
    given = vars(args)
    if args.config is None:
        return given
    names = find_given(shlex.split(args.command)[1:])
    return result_folder.read_options(args.config, is_trusted=args.trust) | {
        name: given[name] for name in names
    }


def _run_config(config: SearchConfig) -> ResultRecord | Summary:
    out = require(config.out)
    check_search(config, [name for name, layer in LAYERS.items() if hasattr(layer, "invert")])
    if config.num_workers > 1:
        # On a GPU, processes share its memory, so none of them takes most of it in advance.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    deadline = None if config.max_seconds is None else time.monotonic() + config.max_seconds
    with open_work(config) as work:
        try:
            record = result_folder.read_record(out) if work.is_finished else None
            record = record or run_seeds(config, work, deadline)
            _print_result(out, record, is_new=not work.is_finished)
            if stopped_by := record.get("stopped_by"):
                raise Stopped(str(stopped_by))
        except result_folder.UnwrittenError as error:
            _print_tables(error.record)
            raise
        except KeyboardInterrupt:
            if work.is_worth_keeping:
                print_progress(f"The same command continues this search, from {work.path}")
            raise
    return record


def _print_tables(record: ResultRecord | Summary) -> None:
    if "seeds" in record:
        print_summary(cast(Summary, record))
    else:
        print_table(cast(ResultRecord, record))


def _print_result(out: Path, record: ResultRecord | Summary, *, is_new: bool) -> None:
    _print_tables(record)
    files = f"{out}: {', '.join(result_folder.list_files(out))}"
    if is_new:
        print(f"Wrote {files}")
    else:
        print(
            f"Read {files}. To extend the search, pass a larger --budget; to repeat it, --replace"
        )


def run_compare(args: argparse.Namespace) -> None:
    """Run `jchain compare`: print one table of several results."""
    rows = [compare.summarize(group) for group in compare.group_results(args.results)]
    if args.json:
        print(json.dumps(compare.to_json(rows)))
    else:
        print_text_table(compare.tabulate(rows))


def run_report(args: argparse.Namespace) -> None:
    """Run `jchain report`: write an HTML page about results."""
    write_report(args.out, args.results, with_maps=not args.no_maps, is_trusted=args.trust)
    print(f"Wrote {args.out}")


def run_prepare(args: argparse.Namespace) -> None:
    """Run `jchain prepare`: download an image set and write it in the format of jchain."""
    print(f"Prepared in {images.prepare(args.name, args.data_dir)}")


def run_evaluate(args: argparse.Namespace) -> None:
    """Run `jchain evaluate`: score chains of a saved bank."""
    mesh = _join_processes(args)
    config, found = result_folder.read_config(args.bank, is_trusted=args.trust)
    with _name_result(args.bank):
        bank, eval_data = _load_result(args, config)
    batch = getattr(eval_data.data, args.split)

    def make_problem(max_layers: int) -> Problem:
        loss_fn, accuracy_fn = eval_data.loss_fn, eval_data.accuracy_fn
        return Problem(bank, batch, max_layers, loss_fn=loss_fn, accuracy_fn=accuracy_fn)

    if args.all is not None:
        if args.chain:
            raise ValueError("expected --all or --chain, got both")
        chains, out = evaluate_all(make_problem(args.all), mesh=mesh)
        shown = np.argsort(out.loss, kind="stable")[:_NUM_SHOWN]
    else:
        tokens = [parse_chain(text) for text in args.chain] if args.chain else found
        if not tokens:
            raise ValueError("expected --all, or at least one --chain, as in --chain 3,0,7,12")
        with _name_result(args.bank):
            chains = bank.validate(tokens)
            out = evaluate(make_problem(chains.shape[1] - 1), chains, mesh=mesh)
        shown = np.arange(len(chains))
    rows = [
        _describe_chain(bank, chains[i], float(out.loss[i]), float(out.accuracy[i])) for i in shown
    ]
    if jax.process_index() > 0:
        return
    for row in rows:
        loss, names = format_loss(row["loss"], 4), " -> ".join(row["layers"])
        line = f"loss {loss}  accuracy {row['accuracy']:.3f}  {names}"
        print(line, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        report = {"split": args.split, "layer_calls": int(out.layer_calls), "chains": rows}
        print(json.dumps(report))


@contextlib.contextmanager
def _name_result(path: Path) -> Iterator[None]:
    """Name a result in an error, which may come from what the result says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from None


def run_export(args: argparse.Namespace) -> None:
    """Run `jchain export`: write a chain of pretrained blocks as a checkpoint folder."""
    config, found = result_folder.read_config(args.result, is_trusted=args.trust)
    if config is None or not config.checkpoint:
        raise ValueError(f"expected the result of jchain search --checkpoint, got {args.result}")
    check_out(args.out)
    path = args.result / result_folder.BANK_FILE
    bank = Bank.load(path) if path.exists() else checkpoints.load_bank(config)
    tokens = parse_chain(args.chain) if args.chain else found[0]
    # Nothing is known about the loss of another chain.
    facts, scores = ({}, {}) if args.chain else card_facts.describe(args.result)
    names = choose_names([locate(path) for path in config.checkpoint])
    sources = dict(zip(names, config.checkpoint, strict=True))
    size = args.max_shard_size
    out = export(bank, tokens, sources, args.out, facts=facts, scores=scores, max_shard_size=size)
    print(f"Wrote {out}")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "search": run_search,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "report": run_report,
    "export": run_export,
    "prepare": run_prepare,
}


def _load_result(args: argparse.Namespace, config: SearchConfig | None) -> tuple[Bank, EvalData]:
    """Load a bank, and the data and the loss that score its chains."""
    given = {name: getattr(args, name) for name in ("seed", "sizes", "data_dir", "target")}
    given = {name: value for name, value in given.items() if value is not None}
    return load_bank_and_data(args.bank, config, data=args.data, modules=args.modules, given=given)


def _join_processes(args: argparse.Namespace) -> Mesh | None:
    """Join the other processes and return the mesh of all devices, or None without others."""
    cluster_args = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed:
        distributed.initialize(*cluster_args, timeout=args.timeout)
        return distributed.make_mesh()
    if cluster_args != (None, None, None):
        raise ValueError(
            "expected --distributed with --coordinator, --num-processes, and --process-id"
        )
    return None


def _describe_chain(bank: Bank, chain: np.ndarray, loss: float, accuracy: float) -> _ChainRow:
    tokens = [int(token) for token in chain if token != chain_lib.PADDING]
    return {
        "chain": tokens,
        "layers": [bank.names[token] for token in tokens],
        "loss": finite_or_none(loss),
        "accuracy": accuracy,
    }
