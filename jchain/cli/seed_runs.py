"""The searches of `jchain search` with one seed or several, and their summary."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from jchain.cli import own_files, result_folder
from jchain.cli.choices import UPDATES, make_search
from jchain.cli.config import SearchConfig, require
from jchain.cli.interruption import Stopped
from jchain.cli.pipeline import check_budget, run_pipeline
from jchain.cli.progress import print_progress
from jchain.cli.records import ResultRecord, SearchOutput, Summary
from jchain.cli.seeds import summarize
from jchain.cli.setup import (
    Setup,
    choose_modules,
    set_up_bank_file,
    set_up_checkpoints,
    set_up_task,
    set_up_trained,
)
from jchain.cli.work_folder import WorkFolder
from jchain.cli.workers import run_workers


def run_seeds(
    config: SearchConfig, work: WorkFolder, deadline: float | None
) -> ResultRecord | Summary:
    """Search with each seed that is not finished yet, and write the result.

    Args:
      config: the resolved options.
      work: the folder in which the searches are saved, and from which they continue.
      deadline: the `time.monotonic()` at which searches stop; None for no limit.

    Raises:
      Stopped: if a signal or the deadline stopped one of several seeds.
      ValueError: if the budget is smaller than one step, or another option is invalid.
    """
    start, num_seeds = time.perf_counter(), require(config.num_seeds)
    first = _set_up(config)
    _check_budget(config, first, num_seeds)
    if num_seeds == 1:
        output = _run_seed(*first, work, deadline)
        with _report_unwritten(output.record):
            result_folder.write(work.result, output)
            work.publish(is_finished=output.stopped_by is None)
        return output.record
    seeds = range(config.seed, config.seed + num_seeds)
    left = [seed for seed in seeds if _read_finished(config, work, seed) is None]
    for seed in sorted({*seeds} - {*left}):
        print_progress(f"Seed {seed} is finished")
    if config.num_workers > 1 and len(left) > 1:
        run_workers([pick_seed(config, seed) for seed in left], config.num_workers, work, deadline)
    else:
        for seed in left:
            print_progress(f"Seed {seed}, {seeds.index(seed) + 1} of {num_seeds}")
            run_one_of_several(pick_seed(config, seed), work, deadline)
    records = [require(_read_finished(config, work, seed)) for seed in seeds]
    summary = summarize(config, records, time.perf_counter() - start)
    with _report_unwritten(summary):
        result_folder.write_summary(work.result, summary)
        work.publish()
    return summary


def run_one_of_several(config: SearchConfig, work: WorkFolder, deadline: float | None) -> None:
    """Search with one seed of several, and write its result to the folder of work.

    Args:
      config: the resolved options, of one seed.
      work: as for `run_seeds`.
      deadline: as for `run_seeds`.

    Raises:
      Stopped: if a signal or the deadline stopped the search.
    """
    output = _run_seed(*_set_up(config), work, deadline)
    if output.stopped_by is not None:
        raise Stopped(output.stopped_by)
    with _report_unwritten(output.record):
        result_folder.write(work.result / f"seed-{config.seed}", output)


@contextlib.contextmanager
def _report_unwritten(record: ResultRecord | Summary) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise result_folder.UnwrittenError(record, error) from error


def pick_seed(config: SearchConfig, seed: int) -> SearchConfig:
    """Return the options of one seed of several.

    Args:
      config: the options of all seeds.
      seed: the seed.
    """
    return replace(config, seed=seed, num_seeds=1)


def _read_finished(config: SearchConfig, work: WorkFolder, seed: int) -> ResultRecord | None:
    folder = work.result / f"seed-{seed}"
    if not result_folder.has_result(folder):
        return None
    record = cast(ResultRecord, result_folder.read_record(folder))
    return record if record["config"]["budget"] == config.budget else None


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
        own, setup = _set_up(pick_seed(config, config.seed + i)) if i > 0 else first
        check_budget(own, setup, make_search(own), policy, budget)


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
    return run_pipeline(
        config,
        setup,
        make_search(config),
        UPDATES[config.update](),
        work.seed_folder(config.seed),
        deadline,
    )
