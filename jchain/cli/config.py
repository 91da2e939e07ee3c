"""The configuration of `jchain search`, which is parsed and resolved once and never changes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from jchain.chain import check_max_layers, check_min_layers
from jchain.engine.successive_halving import check_fractions
from jchain.search.moves import KINDS
from jchain.train import BankKind

DEFAULT_DATA = "digits"
DEFAULT_TASK = "repair"
# Defaults for a bank that is trained.
DEFAULT_BANK: BankKind = "routed"
DEFAULT_NUM_LAYERS, DEFAULT_DEPTH, DEFAULT_NUM_STEPS = 12, 4, 1000
# Default number of seeds and default budget, in layer calls, of a task.
TASK_SEEDS, TASK_BUDGET = 5, 40_000
CHECKPOINT_BUDGET = 600
QUICK_SEEDS = 1
# The searches that take `--moves`.
_MOVING = ("local", "evolution")
# Options that apply only to a bank that is trained, and only to a bank of checkpoints.
_TRAINED_ONLY = ("bank", "layer", "channels", "num_layers", "num_heads", "depth", "num_steps")
_CHECKPOINT_ONLY = (
    "text", "field", "choices", "length", "pinned", "sublayers", "alternate", "dtype", "sweep",
)  # fmt: skip
# Options that change how a search runs but not what it computes; result.json does not record them.
_NOT_RECORDED = ("json", "replace", "quick", "max_seconds", "num_workers")
# The endings of files of data, which `data` may name in place of a data set.
DATA_FILES = (".npz", ".csv")
PATH_OPTIONS = ("data_dir", "bank_file", "modules", "out")
# The values of `update` in results of jchain 0.1.0.
_OLD_UPDATES = {
    "never": "frozen",
    "found": "tune-found",
    "clones": "clone-then-tune",
    "shared": "shared-updates",
}

T = TypeVar("T")


@dataclass(frozen=True)
class SearchConfig:
    """Options of `jchain search`, named as on the command line.

    None means that an option was not given. `result.json` stores the options, so fields may be
    added but not renamed.

    Attributes:
      task: name of the task, which provides its own data and bank.
      data: name of the data set, or a file of data.
      target: column of a file of data that holds the labels.
      data_dir: folder that holds prepared data sets.
      sizes: number of examples in train, search, select, and test.
      checkpoint: checkpoints whose blocks form the bank: folders, names on the Hugging Face hub,
        GGUF files, or LoRA adapters.
      text: text files on which chains of checkpoints are scored.
      field: field or column of the text files that holds the text.
      choices: file of questions on which chains of checkpoints are scored.
      length: number of tokens in a sequence or a question.
      pinned: numbers of blocks to pin at the beginning and at the end of every chain.
      sublayers: whether attention and MLP of each block are layers of their own.
      alternate: whether attention and MLP must alternate in a chain.
      sweep: smallest `max_layers` of a sweep, which also searches with every larger value up to
        `max_layers`; None for no sweep.
      dtype: dtype of the weights of checkpoints.
      bank_file: file of the bank, instead of a bank that is trained.
      modules: Python file that defines the modules of the bank.
      bank: name of the method that makes the bank.
      layer: name of the module of the layers.
      channels: number of channels of the convolutions.
      num_layers: number of layers in the bank.
      num_heads: number of heads in a routed or random bank.
      depth: number of layers in each net or route that is trained.
      num_steps: number of gradient steps that make the bank.
      max_layers: maximum number of layers in a chain.
      min_layers: minimum number of layers in a chain.
      layer_cost: penalty for each layer of a chain, in units of the loss.
      space: chains that the search may make, `"chains"` or `"subset"` (`jchain.Problem`); None for
        the default.
      search: name of the search.
      moves: kinds of moves of local search and evolution; None for edits alone, or for all kinds
        if there are checkpoints.
      fractions: fractions of the examples on which chains are scored one after the other, the worst
        ones on the first only (`jc.Staged`); None to score all chains on all examples.
      encoding: name of the encoding that the actor-critic uses for prefixes.
      update: name of the policy that decides when weights are trained.
      budget: number of layer calls, including the cost of gradient steps.
      max_seconds: seconds after which the search stops; None for no limit.
      seed: seed of the splits, the bank, and the search; the first one if there are several.
      num_seeds: number of seeds.
      num_workers: number of seeds that run at the same time.
      quick: whether to run one seed, unless more are requested, and to score fewer controls.
      out: folder to write the result to.
      command: the command line, as text.
      replace: whether to replace a result that is already in the folder.
      json: whether to print the result as JSON.
    """

    task: str | None = None
    data: str | None = None
    target: str | None = None
    data_dir: Path | None = None
    sizes: Sequence[int] | None = None
    checkpoint: Sequence[str] | None = None
    text: Sequence[str] | None = None
    field: str | None = None
    choices: str | None = None
    length: int | None = None
    pinned: Sequence[int] | None = None
    sublayers: bool = False
    alternate: bool = False
    sweep: int | None = None
    dtype: str | None = None
    bank_file: Path | None = None
    modules: Path | None = None
    bank: BankKind | None = None
    layer: str | None = None
    channels: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    depth: int | None = None
    num_steps: int | None = None
    max_layers: int | None = None
    min_layers: int = 0
    layer_cost: float = 0.0
    space: str | None = None
    search: str | None = None
    moves: Sequence[str] | None = None
    fractions: Sequence[float] | None = None
    encoding: str | None = None
    update: str = "frozen"
    budget: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    num_seeds: int | None = None
    num_workers: int = 1
    quick: bool = False
    out: Path | None = None
    command: str = ""
    replace: bool = False
    json: bool = False

    @staticmethod
    def load(values: Mapping[str, object]) -> "SearchConfig":
        """Make a configuration from parsed arguments or from the `config` of a `result.json`.

        Args:
          values: options by name; names that are not options are ignored.
        """
        names = {field.name for field in fields(SearchConfig)}
        known = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name in names
        }
        update = known.get("update", "frozen")
        known["update"] = _OLD_UPDATES.get(str(update), update)
        paths = {
            name: Path(str(known[name])) for name in PATH_OPTIONS if known.get(name) is not None
        }
        return SearchConfig(**{**known, **paths})  # pyright: ignore[reportArgumentType]

    def dump(self) -> dict[str, object]:
        """Convert the options to JSON values for `result.json`."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if name not in _NOT_RECORDED
        }

    @property
    def is_frozen(self) -> bool:
        """Whether the weights of the bank are never updated."""
        return self.update == "frozen"


def require(value: T | None) -> T:
    """Return the value of an option that `resolve` has filled in, which is never None.

    Args:
      value: a field of a resolved configuration.
    """
    assert value is not None
    return value


def resolve(config: SearchConfig) -> SearchConfig:
    """Fill in the defaults of options that were not given.

    If checkpoints are given, the paths that the search reads are also made absolute. If neither
    checkpoints, nor a data set, nor options of a bank that is trained are given, a task is
    searched. `jchain.cli.setup` fills in the options that depend on the data: `layer`, `channels`,
    and `num_heads`.

    Args:
      config: the options as they were given.

    Raises:
      ValueError: if two options exclude each other or a value is out of range.
    """
    if config.num_seeds is not None and config.num_seeds < 1:
        raise ValueError(f"expected --seeds to be at least 1, got {config.num_seeds}")
    if config.num_workers < 1:
        raise ValueError(f"expected --workers to be at least 1, got {config.num_workers}")
    if config.quick:
        config = replace(config, num_seeds=config.num_seeds or QUICK_SEEDS)
    if config.modules is not None and config.bank_file is None:
        raise ValueError("expected --bank-file with --modules")
    own = ("data", "data_dir", "target", "bank_file", *_TRAINED_ONLY)
    given = [name for name in own if _is_given(config, name)]
    if config.checkpoint:
        config = _resolve_checkpoint(config)
    elif config.task is not None or not given:
        config = _resolve_task(config, given)
    elif config.bank_file is not None:
        config = _resolve_bank_file(config)
    else:
        config = _resolve_trained(config)
    config = replace(config, num_seeds=config.num_seeds or 1)
    return config if config.out is not None else replace(config, out=_choose_out(config))


def _is_given(config: SearchConfig, name: str) -> bool:
    return getattr(config, name) not in (None, False)


def _choose_search(config: SearchConfig) -> str:
    """Choose the search if none was given."""
    needs_agent = config.encoding is not None or config.update == "shared-updates"
    return "actor-critic" if needs_agent else "critic"


def _choose_out(config: SearchConfig) -> Path:
    """Choose the result folder if none was given."""
    names = [Path(path).resolve().name for path in config.checkpoint or ()]
    source = config.bank if config.bank_file is None else config.bank_file.stem
    name = config.task or "+".join(names) or f"{Path(config.data or '').stem}-{source}"
    last = config.seed + require(config.num_seeds) - 1
    seeds = f"{config.seed}" if last == config.seed else f"{config.seed}-{last}"
    return Path("results") / f"{name}-{config.search}-{seeds}"


def _resolve_task(config: SearchConfig, given: Sequence[str]) -> SearchConfig:
    _check_no_checkpoint_options(config)
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"expected no --{option} with --task, which has its own data and bank")
    if not config.is_frozen:
        raise ValueError(
            f"expected --data or --bank with --update {config.update}: the layers of a task are "
            "never updated"
        )
    if config.search == "suffix-beam":
        raise ValueError("suffix-beam needs invertible layers, which this task does not have")
    if config.max_layers is not None:
        check_max_layers(config.max_layers)
    return replace(
        config,
        task=config.task or DEFAULT_TASK,
        search=config.search or _choose_search(config),
        budget=TASK_BUDGET if config.budget is None else config.budget,
        num_seeds=config.num_seeds or TASK_SEEDS,
    )


def _check_no_checkpoint_options(config: SearchConfig) -> None:
    for name in _CHECKPOINT_ONLY:
        if _is_given(config, name):
            raise ValueError(f"expected --checkpoint with --{name}")


def _resolve_trained(config: SearchConfig) -> SearchConfig:
    _check_no_checkpoint_options(config)
    depth = DEFAULT_DEPTH if config.depth is None else config.depth
    max_layers = depth if config.max_layers is None else config.max_layers
    return replace(
        config,
        data=config.data or DEFAULT_DATA,
        bank=config.bank or DEFAULT_BANK,
        num_layers=DEFAULT_NUM_LAYERS if config.num_layers is None else config.num_layers,
        depth=depth,
        num_steps=DEFAULT_NUM_STEPS if config.num_steps is None else config.num_steps,
        max_layers=check_max_layers(max_layers),
        search=config.search or _choose_search(config),
        budget=20_000 if config.budget is None else config.budget,
    )


def _resolve_bank_file(config: SearchConfig) -> SearchConfig:
    _check_no_checkpoint_options(config)
    for name in _TRAINED_ONLY:
        if _is_given(config, name):
            option = name.replace("_", "-")
            raise ValueError(f"expected no --{option} with --bank-file, which has its layers")
    if config.max_layers is not None:
        check_max_layers(config.max_layers)
    return replace(
        config,
        data=config.data or DEFAULT_DATA,
        bank_file=require(config.bank_file).resolve(),
        modules=config.modules and config.modules.resolve(),
        search=config.search or _choose_search(config),
        budget=20_000 if config.budget is None else config.budget,
    )


def _resolve_checkpoint(config: SearchConfig) -> SearchConfig:
    if config.task is not None:
        raise ValueError(f"expected --task or --checkpoint, got both: {config.task}")
    for name in ("target", "bank_file", *_TRAINED_ONLY):
        if _is_given(config, name):
            option = name.replace("_", "-")
            raise ValueError(
                f"expected no --{option} with --checkpoint, whose blocks are the layers"
            )
    if config.search == "suffix-beam":
        raise ValueError(
            "suffix-beam needs invertible layers, but the blocks of a checkpoint cannot be inverted"
        )
    if config.max_layers is not None:
        check_max_layers(config.max_layers)
    if config.alternate and not config.sublayers:
        raise ValueError("expected --sublayers with --alternate")
    if config.sweep is not None:
        if config.sweep < 0:
            raise ValueError(f"expected --sweep to be at least 0, got {config.sweep}")
        if config.max_layers is not None:
            check_sweep(config.sweep, config.max_layers)
        if not config.is_frozen:
            raise ValueError(f"expected --update frozen with --sweep, got {config.update}")
    search = config.search or "local"
    return replace(
        config,
        search=search,
        moves=config.moves or (KINDS if search in _MOVING else None),
        budget=CHECKPOINT_BUDGET if config.budget is None else config.budget,
        pinned=config.pinned or (1, 1),
        checkpoint=tuple(
            # What does not exist here may be the name of a model on the hub.
            str(Path(path).resolve()) if Path(path).exists() else path
            for path in require(config.checkpoint)
        ),
        data_dir=config.data_dir and config.data_dir.resolve(),
        text=config.text and tuple(str(Path(path).resolve()) for path in config.text),
        choices=config.choices and str(Path(config.choices).resolve()),
    )


def check_search(config: SearchConfig, invertible_layers: Sequence[str]) -> None:
    """Check that the options fit the search, before anything is loaded.

    Args:
      config: the resolved options.
      invertible_layers: names of the layers that can be inverted.

    Raises:
      ValueError: if a value is out of range or does not fit the search.
    """
    is_unknown = config.bank_file is not None  # the search itself checks the layers
    if config.search == "suffix-beam" and not is_unknown and config.layer not in invertible_layers:
        raise ValueError(
            "suffix-beam needs invertible layers: expected --layer of "
            f"{', '.join(invertible_layers)}, got {config.layer or 'the default'}"
        )
    if config.max_seconds is not None and not config.max_seconds > 0:
        raise ValueError(f"expected --max-seconds above 0, got {config.max_seconds}")
    if require(config.budget) < 1:
        raise ValueError(f"expected a budget of at least 1, got {config.budget}")
    if config.max_layers is not None:
        check_min_layers(config.min_layers, config.max_layers)
    if not 0 <= config.layer_cost < float("inf"):
        raise ValueError(f"expected a finite --layer-cost of at least 0, got {config.layer_cost}")
    if config.moves is not None and config.search not in _MOVING:
        raise ValueError(
            f"expected --search {' or '.join(_MOVING)} with --moves, got {config.search}"
        )
    if config.fractions is not None:
        check_fractions(config.fractions)
        if config.update in ("clone-then-tune", "shared-updates"):
            raise ValueError(
                f"expected --update frozen or tune-found with --fractions, got {config.update}"
            )
    if config.search != "actor-critic":
        is_shared = config.update == "shared-updates"
        needs_agent = {"--encoding": config.encoding, "--update shared-updates": is_shared}
        for option, is_given in needs_agent.items():
            if is_given:
                raise ValueError(
                    f"expected --search actor-critic with {option}, got {config.search}"
                )


def check_sweep(sweep: int | None, max_layers: int) -> None:
    """Check that a sweep starts below the maximum number of layers.

    Args:
      sweep: smallest `max_layers` of the sweep; None for no sweep.
      max_layers: maximum number of layers in a chain.

    Raises:
      ValueError: if `sweep` is not less than `max_layers`.
    """
    if sweep is not None and sweep >= max_layers:
        raise ValueError(
            f"expected --sweep below {max_layers}, the maximum number of layers, got {sweep}"
        )
