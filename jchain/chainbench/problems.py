"""ChainBench: problems whose chains have all been scored, so that a search has a known regret.

Each of the 36 problems is a bank of 12 residual MLPs and one to three heads, made from one of three
data sets in one of four ways. Chains have up to 4 layers. `build` scores all of them once on
`search`, `select`, and `test` and writes the losses and accuracies to a folder. It saves the bank
next to its table, because the last bits of weights differ from machine to machine. ChainBench is
similar to NAS-Bench-201 (Dong and Yang 2020, arXiv:2001.00326).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain import train
from jchain._typing import Array, Float, Int
from jchain.agent import pretrain
from jchain.agent.observations import NUM_FEATURES
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import ChainSpace
from jchain.chainbench import tabular
from jchain.data import EVALUATION_SPLITS, Batch, Dataset
from jchain.data import load as load_data
from jchain.engine.evaluation import evaluate_all
from jchain.files import checksum, read_arrays, write_arrays
from jchain.layers import DenseHead, ResidualMLP
from jchain.problem import Problem

DATA = ("digits", "wine", "breast_cancer")
KINDS = ("independent", "routed", "snapshots", "random")
NUM_SEEDS = 3
NUM_LAYERS, MAX_LAYERS = 12, 4
NAMES = tuple(
    f"{data}-{kind}-{seed}" for data in DATA for kind in KINDS for seed in range(NUM_SEEDS)
)
# The number of gradient steps. Fewer steps are enough to overfit the small data sets.
_NUM_STEPS = {"digits": 1000, "wine": 200, "breast_cancer": 200}


class SolvedProblem(NamedTuple):
    """A problem with the losses of all its chains, in the order of `ChainSpace.enumerate`."""

    name: str
    bank: Bank
    data: Dataset
    loss: dict[str, Float[np.ndarray, "C"]]  # by split, [C]; +inf if not finite
    accuracy: dict[str, Float[np.ndarray, "C"]]
    # [V, F], observations on `search` of the prefixes with room for one more layer
    features: Float[np.ndarray, "V F"]

    @property
    def chains(self) -> Int[np.ndarray, "C L"]:
        """All chains, `[C, L]`."""
        return _make_space(self.bank).enumerate()

    @property
    def problem(self) -> Problem:
        """The problem on `search`, the only split that a search may see."""
        return self.problem_on("search")

    def tabular_problem(self) -> Problem:
        """Return `problem` in tabular form, with losses and features looked up (`tabular`)."""
        return tabular.make_problem(self.bank, self.loss["search"], MAX_LAYERS, self.features)

    @checked
    def problem_on(self, split: str) -> Problem:
        """Return the problem on a split.

        Args:
          split: `search`, `select`, or `test`.
        """
        if split not in EVALUATION_SPLITS:
            names = ", ".join(EVALUATION_SPLITS)
            raise ValueError(f"expected split to be one of {names}, got {split!r}")
        return Problem(self.bank, getattr(self.data, split), MAX_LAYERS)

    @checked
    def regret(self, loss: ArrayLike | Sequence[float]) -> np.ndarray | np.floating:
        """Compute the regret of losses: `(loss - best) / (median - best)` over all chains.

        The regret is 0 for the best chain and 1 for the median chain.

        Args:
          loss: the losses on `search`, of any shape.
        """
        best, middle = self.loss["search"].min(), np.median(self.loss["search"])
        return (np.asarray(loss) - best) / (middle - best)


@checked
def make_bank(
    name: str, *, num_layers: int = NUM_LAYERS, depth: int = MAX_LAYERS
) -> tuple[Bank, Dataset]:
    """Make the bank and load the data of a problem.

    Sizes other than the defaults make problems that are not in ChainBench.

    Args:
      name: the name of the problem: one of `NAMES`, or a name of that form with another seed.
      num_layers: the number of layers in the bank; a multiple of `depth` for the kinds
        `independent` and `snapshots`.
      depth: the number of layers of the nets or routes that are trained.

    Raises:
      ValueError: if the name has another form, or `num_layers` is not a multiple of `depth` for a
        kind that requires it.
    """
    data_name, kind, seed = _parse(name)
    data = load_data(data_name, seed)
    bank = train.make_bank(
        jax.random.key(seed),
        data.train,
        kind,
        layer=ResidualMLP(int(data.train.x.shape[-1])),
        head=DenseHead(data.num_classes),
        num_layers=num_layers,
        depth=depth,
        num_heads=1 + seed % NUM_SEEDS if kind in ("routed", "random") else 1,
        num_steps=_NUM_STEPS[data_name],
    )
    return bank, data


@checked
def build(folder: str | os.PathLike[str], names: Sequence[str] = NAMES) -> list[str]:
    """Make and solve the problems that are not in the folder yet, and check those that are.

    Args:
      folder: the folder to write to; made if it does not exist.
      names: the names of the problems.

    Returns:
      The names of the problems that were made.

    Raises:
      ValueError: if a name has another form, or a file in the folder is damaged or belongs to
        another bank.
    """
    for name in names:
        _parse(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    solved = []
    for name in names:
        if _table_path(folder, name).exists():
            load(folder, name)
            continue
        bank, data = make_bank(name)
        features = [
            level.features
            for level in pretrain.observe_prefixes(Problem(bank, data.search, MAX_LAYERS))
        ]
        outs = [
            evaluate_all(Problem(bank, getattr(data, split), MAX_LAYERS))[1]
            for split in EVALUATION_SPLITS
        ]
        arrays = {
            "loss": np.stack([out.loss for out in outs]),
            "accuracy": np.stack([out.accuracy for out in outs]),
        }
        arrays["features"] = np.concatenate(features)
        bank.save(_bank_path(folder, name))
        # Write the table last, so that the problem is complete if its table exists.
        write_arrays(
            _table_path(folder, name), {"name": name, "solves": _digest(bank, data)}, arrays
        )
        solved.append(name)
    return solved


@checked
def load(folder: str | os.PathLike[str], name: str) -> SolvedProblem:
    """Read a solved problem.

    Args:
      folder: the folder that `build` wrote to.
      name: the name of the problem.

    Raises:
      FileNotFoundError: if the problem was not built in this folder.
      ValueError: if the name has another form, a file is damaged or truncated, or the table belongs
        to another bank or other data.
    """
    data_name, _, seed = _parse(name)
    path = _table_path(folder, name)
    if not path.exists():
        raise FileNotFoundError(
            f"expected a solved problem at {path}: build it with "
            f"jchain.chainbench.build({str(folder)!r})"
        )
    header, arrays = read_arrays(path)
    bank, data = Bank.load(_bank_path(folder, name)), load_data(data_name, seed)
    shape = (len(EVALUATION_SPLITS), _make_space(bank).num_chains)
    num_prefixes = ChainSpace(bank.num_layers, 1, MAX_LAYERS - 1).num_chains
    expected = {"loss": shape, "accuracy": shape, "features": (num_prefixes, NUM_FEATURES)}
    found = {key: array.shape for key, array in arrays.items()}
    if found != expected:
        raise ValueError(
            f"{path}: expected arrays {expected}, got {found}: delete it and build it again"
        )
    if (header.get("name"), header.get("solves")) != (name, _digest(bank, data)):
        raise ValueError(
            f"{path} was solved for another bank or data than {name}'s: delete it "
            "and build it again"
        )
    loss, accuracy = (
        dict[str, np.ndarray](zip(EVALUATION_SPLITS, np.asarray(arrays[key]), strict=True))
        for key in ("loss", "accuracy")
    )
    return SolvedProblem(name, bank, data, loss, accuracy, np.asarray(arrays["features"]))


@checked
def describe(solved: SolvedProblem) -> dict[str, str | int | float]:
    """Compute statistics that describe how hard a problem is.

    Args:
      solved: the problem.

    Returns:
      A dict with these keys:

      - name: the name of the problem.
      - chains, heads: the numbers of chains and heads.
      - best: the lowest loss.
      - within_1_percent, within_5_percent, within_10_percent: the share of chains whose loss is at
        most that much above the lowest loss.
      - local_optima: the share of chains without a better neighbor (`ChainSpace.neighbors`).
      - search_to_test: the Spearman correlation between the losses on `search` and on `test`.
      - best_on_test: the test loss of the best chain on `search`, divided by the lowest test loss.
    """
    loss, test = solved.loss["search"], solved.loss["test"]
    best = float(loss.min())
    within = {
        f"within_{n}_percent": float(np.mean(loss <= best * (1 + n / 100))) for n in (1, 5, 10)
    }
    return {
        "name": solved.name,
        "chains": len(loss),
        "heads": solved.bank.num_heads,
        "best": best,
        **within,
        "local_optima": float(np.mean(find_local_optima(solved))),
        "search_to_test": _spearman(loss, test),
        "best_on_test": float(test[np.argmin(loss)] / test.min()),
    }


@checked
def find_local_optima(solved: SolvedProblem) -> np.ndarray:
    """Find the chains without a better neighbor on `search`, as a mask, `[C]`.

    Args:
      solved: the problem.
    """
    space = _make_space(solved.bank)
    loss = jnp.asarray(solved.loss["search"])

    @jax.jit
    def is_optimum(chains: Array, own: Array) -> Array:
        def one(chain: Array, own: Array) -> Array:
            rows, is_neighbor = space.neighbors(chain)
            index = space.index(jnp.where(is_neighbor[:, None], rows, chain[None]))
            return jnp.all(loss[index] >= own)

        return jax.lax.map(lambda pair: one(*pair), (chains, own), batch_size=1024)

    return np.asarray(is_optimum(jnp.asarray(solved.chains), loss))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def _parse(name: str) -> tuple[str, train.BankKind, int]:
    data, kind, seed = (*name.split("-"), "", "")[:3]
    if (
        data not in DATA
        or kind not in KINDS
        or not seed.isdigit()
        or name != f"{data}-{kind}-{int(seed)}"
    ):
        raise ValueError(
            f"expected a problem DATA-KIND-SEED of data {', '.join(DATA)} and kinds "
            f"{', '.join(KINDS)}, got {name!r}"
        )
    return data, kind, int(seed)


def _make_space(bank: Bank) -> ChainSpace:
    return ChainSpace(bank.num_layers, bank.num_heads, MAX_LAYERS)


def _table_path(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}.table.safetensors"


def _bank_path(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}.bank.safetensors"


def _digest(bank: Bank, data: Dataset) -> str:
    """Compute a digest of the weights and of the splits that chains are scored on."""
    batches: list[Batch] = [getattr(data, split) for split in EVALUATION_SPLITS]
    leaves = jax.tree.leaves((bank.layers, bank.heads, bank.stem_params, batches))
    return checksum({}, {str(i): leaf for i, leaf in enumerate(leaves)})
