"""The commands: `jchain search`, `evaluate`, `compare`, `export`, and `prepare`."""

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jchain import chain as chain_lib
from jchain import images, tasks
from jchain.bank import Bank
from jchain.cli import checkpoints, compare, own_files, result_folder
from jchain.cli.checkpoints import EvalData
from jchain.cli.config import SearchConfig, check_search, require, resolve
from jchain.cli.interruption import Stopped
from jchain.cli.parser import LAYERS, UPDATES, find_given, make_search
from jchain.cli.pipeline import check_budget, run_pipeline
from jchain.cli.progress import print_progress
from jchain.cli.records import ResultRecord, SearchOutput, Summary, finite_or_none, format_loss
from jchain.cli.report import print_summary, print_table
from jchain.cli.seeds import summarize
from jchain.cli.setup import (
    Setup,
    choose_modules,
    set_up_bank_file,
    set_up_checkpoints,
    set_up_task,
    set_up_trained,
)
from jchain.cli.values import parse_chain
from jchain.cli.work_folder import WorkFolder, open_work
from jchain.engine import distributed
from jchain.engine.evaluation import evaluate, evaluate_all
from jchain.hub.exporting import export
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
    return result_folder.read_options(args.config) | {name: given[name] for name in names}


def _run_config(config: SearchConfig) -> ResultRecord | Summary:
    out = require(config.out)
    check_search(config, [name for name, layer in LAYERS.items() if hasattr(layer, "invert")])
    deadline = None if config.max_seconds is None else time.monotonic() + config.max_seconds
    with open_work(config) as work:
        try:
            record = result_folder.read_record(out) if work.is_finished else None
            record = record or _run_seeds(config, work, deadline)
            _print_result(out, record, is_new=not work.is_finished)
            if stopped_by := record.get("stopped_by"):
                raise Stopped(str(stopped_by))
        except KeyboardInterrupt:
            if work.is_worth_keeping:
                print_progress(f"The same command continues this search, from {work.path}")
            raise
    return record


def _print_result(out: Path, record: ResultRecord | Summary, *, is_new: bool) -> None:
    if "seeds" in record:
        print_summary(cast(Summary, record))
    else:
        print_table(cast(ResultRecord, record))
    files = f"{out}: {', '.join(result_folder.list_files(out))}"
    if is_new:
        print(f"Wrote {files}")
    else:
        print(
            f"Read {files}. To extend the search, pass a larger --budget; to repeat it, --replace"
        )


def _check_budget(config: SearchConfig, first: tuple[SearchConfig, Setup], num_seeds: int) -> None:
    """Check that the budget pays for the first step with each seed, before anything is trained.

    The cost of a step differs little between seeds, so one seed is enough for a larger budget.
    """
    budget, policy = require(config.budget), UPDATES[config.update]()
    if num_seeds > 1:
        with contextlib.suppress(ValueError):
            check_budget(*first, make_search(first[0]), policy, budget // 2)
            return
    for i in range(num_seeds):
        own, setup = _set_up(_pick_seed(config, i)) if i > 0 else first
        check_budget(own, setup, make_search(own), policy, budget)


def _pick_seed(config: SearchConfig, i: int) -> SearchConfig:
    return replace(config, seed=config.seed + i, num_seeds=1)


def _run_seeds(
    config: SearchConfig, work: WorkFolder, deadline: float | None
) -> ResultRecord | Summary:
    """Search with each seed that is not finished yet, and write the result."""
    start, num_seeds = time.perf_counter(), require(config.num_seeds)
    first = _set_up(config)
    _check_budget(config, first, num_seeds)
    if num_seeds == 1:
        output = _run_seed(*first, work, deadline)
        result_folder.write(work.result, output)
        work.publish(is_finished=output.stopped_by is None)
        return output.record
    records = []
    for i in range(num_seeds):
        seed = config.seed + i
        folder = work.result / f"seed-{seed}"
        if result_folder.has_result(folder):
            record = cast(ResultRecord, result_folder.read_record(folder))
            if record["config"]["budget"] == config.budget:
                print_progress(f"Seed {seed}, {i + 1} of {num_seeds}, is finished")
                records.append(record)
                continue
        print_progress(f"Seed {seed}, {i + 1} of {num_seeds}")
        own, setup = _set_up(_pick_seed(config, i)) if i > 0 else first
        output = _run_seed(replace(own, num_seeds=1), setup, work, deadline)
        if output.stopped_by is not None:
            raise Stopped(output.stopped_by)
        result_folder.write(folder, output)
        records.append(output.record)
    summary = summarize(config, records, time.perf_counter() - start)
    result_folder.write_summary(work.result, summary)
    work.publish()
    return summary


def _set_up(config: SearchConfig) -> tuple[SearchConfig, Setup]:
    """Set up the search with one seed, and fill in the options that depend on its data."""
    if config.checkpoint:
        return config, set_up_checkpoints(config)
    if config.task:
        return set_up_task(config)
    if config.bank_file:
        return set_up_bank_file(config)
    data = own_files.load_data(config)
    config, modules = choose_modules(config, data)
    return config, set_up_trained(config, data, modules)


def _run_seed(
    config: SearchConfig, setup: Setup, work: WorkFolder, deadline: float | None
) -> SearchOutput:
    left = None if deadline is None else max(1e-3, deadline - time.monotonic())
    return run_pipeline(
        config,
        setup,
        make_search(config),
        UPDATES[config.update](),
        work.seed_folder(config.seed),
        left,
    )


def run_compare(args: argparse.Namespace) -> None:
    """Run `jchain compare`: print one table of several results."""
    rows = compare.compare(args.results)
    if args.json:
        print(json.dumps(compare.to_json(rows)))
    else:
        compare.print_comparison(rows)


def run_prepare(args: argparse.Namespace) -> None:
    """Run `jchain prepare`: download an image set and write it in the format of jchain."""
    print(f"Prepared in {images.prepare(args.name, args.data_dir)}")


def run_evaluate(args: argparse.Namespace) -> None:
    """Run `jchain evaluate`: score chains of a saved bank."""
    mesh = _join_processes(args)
    config, found = result_folder.read_config(args.bank)
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
        chains = chain_lib.pad(tokens)
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


def run_export(args: argparse.Namespace) -> None:
    """Run `jchain export`: write a chain of pretrained blocks as a checkpoint folder."""
    config, found = result_folder.read_config(args.result)
    if config is None or not config.checkpoint:
        raise ValueError(f"expected the result of jchain search --checkpoint, got {args.result}")
    if args.out.exists():
        raise FileExistsError(f"{args.out} already exists; choose another output folder")
    path = args.result / result_folder.BANK_FILE
    bank = Bank.load(path) if path.exists() else checkpoints.load_bank(config)
    tokens = parse_chain(args.chain) if args.chain else found[0]
    facts = {"checkpoints": ", ".join(config.checkpoint)}
    if not args.chain:
        facts |= result_folder.describe(args.result)
    names = checkpoints.name_models(config.checkpoint)
    sources = dict(zip(names, config.checkpoint, strict=True))
    out = export(bank, tokens, sources, args.out, facts=facts, max_shard_size=args.max_shard_size)
    print(f"Wrote {out}")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "search": run_search,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "export": run_export,
    "prepare": run_prepare,
}


def _load_result(args: argparse.Namespace, config: SearchConfig | None) -> tuple[Bank, EvalData]:
    """Load a bank, and the data and the loss that score its chains."""
    path = args.bank / result_folder.BANK_FILE if args.bank.is_dir() else args.bank
    given = {name: getattr(args, name) for name in ("seed", "sizes", "data_dir", "target")}
    given = {name: value for name, value in given.items() if value is not None}
    if config is not None and config.checkpoint:
        if args.data:
            raise ValueError(
                "expected no --data: chains of checkpoints are scored on the data of their search"
            )
        eval_data = checkpoints.load_data(replace(config, **given))
        bank = Bank.load(path) if path.exists() else checkpoints.load_bank(config)
        return bank, eval_data
    config = config or SearchConfig()
    # If another data set is requested, only the seed of the search's options still applies.
    if args.data not in (None, config.data):
        config = SearchConfig(data=args.data, seed=config.seed, modules=config.modules)
    config = replace(config, **given)
    if config.task:
        return Bank.load(path), EvalData(
            tasks.make(config.task, config.seed, sizes=config.sizes).data
        )
    modules = own_files.load_modules(args.modules or config.modules)
    return Bank.load(path, modules), EvalData(own_files.load_data(config))


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
