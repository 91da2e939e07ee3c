"""The bank and the data of a result, to score its chains again."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jchain import tasks
from jchain.bank import Bank
from jchain.cli import checkpoints, own_files
from jchain.cli.checkpoints import EvalData
from jchain.cli.config import SearchConfig
from jchain.cli.result_folder import BANK_FILE


def load_bank_and_data(
    path: Path,
    config: SearchConfig | None,
    *,
    data: str | None = None,
    modules: Path | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Bank, EvalData]:
    """Load a bank, and the data and the loss that score its chains.

    Args:
      path: a result folder or a bank file.
      config: the options of the search that made it; None if they are unknown.
      data: another data set to score chains on; None for that of the search, or the default.
      modules: the Python file that defines the modules of the bank; None for that of the search.
      given: other options that override those of the search.

    Raises:
      ValueError, OSError, ImportError: if the bank or the data cannot be loaded.
    """
    path = path / BANK_FILE if path.is_dir() else path
    if config is not None and config.checkpoint:
        if data:
            raise ValueError(
                "expected no --data: chains of checkpoints are scored on the data of their search"
            )
        eval_data = checkpoints.load_data(replace(config, **given))
        bank = Bank.load(path) if path.exists() else checkpoints.load_bank(config)
        return bank, eval_data
    config = config or SearchConfig()
    # If another data set is requested, only the seed of the search's options still applies.
    if data not in (None, config.data):
        config = SearchConfig(data=data, seed=config.seed, modules=config.modules)
    config = replace(config, **given)
    if config.task:
        splits = tasks.make(config.task, config.seed, sizes=config.sizes).data
        return Bank.load(path), EvalData(splits)
    classes = own_files.load_modules(modules or config.modules)
    return Bank.load(path, classes), EvalData(own_files.load_data(config))
