"""ChainBench: problems of which every chain is scored, so that a search is judged by its distance to the best one.

Each of 36 problems is a bank of 12 residual MLPs and one to three heads, made from one of three data sets in one of four
ways; chains have up to 4 layers. All their losses and accuracies on `search`, `select` and `test` are kept in a folder, made
once by `build` (the weights differ from machine to machine in their last bits, so a table belongs to its own bank, which
lies beside it). In the manner of NAS-Bench-201 (Dong and Yang 2020, arXiv:2001.00326).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain import train
from jchain._typing import Array, Float, Int
from jchain.agent import pretrain
from jchain.agent.observations import NUM_FEATURES
from jchain.bank import Bank
from jchain.chainbench import tabular
from jchain.data import EVALUATION_SPLITS, Batch, Dataset
from jchain.data import load as load_data
from jchain.engine.evaluate import evaluate_all
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
# Gradient steps: the small sets are learned by heart in fewer.
_NUM_STEPS = {"digits": 1000, "wine": 200, "breast_cancer": 200}


class Solved(NamedTuple):
    """A problem with all its chains, in the order of `jchain.chain.enumerate_all`."""

    name: str
    bank: Bank
    data: Dataset
    loss: dict[str, Float[np.ndarray, "C"]]  # by split, [C]; +inf where it was not finite
    accuracy: dict[str, Float[np.ndarray, "C"]]
    features: Float[
        np.ndarray, "V F"
    ]  # `jchain.agent.observations.observe` on `search` of the prefixes with room for a layer

    @property
    def chains(self) -> Int[np.ndarray, "C L"]:
        """Every chain, `[C, L]`."""
        return chain_lib.enumerate_all(self.bank.num_layers, self.bank.num_heads, MAX_LAYERS)

    @property
    def problem(self) -> Problem:
        """What a search may see: the `search` split."""
        return self.problem_on("search")

    def lookup(self) -> Problem:
        """The same as `problem`, with losses and features that are looked up (`jchain.chainbench.tabular.make_problem`)."""
        return tabular.make_problem(self.bank, self.loss["search"], MAX_LAYERS, self.features)

    def problem_on(self, split: str) -> Problem:
        """The same bank on another split."""
        return Problem(self.bank, getattr(self.data, split), MAX_LAYERS)

    def regret(self, loss: Any) -> np.ndarray:
        """How far losses on `search` are from the best, in units of that of the median chain: 0 the best, 1 a random one."""
        best, middle = self.loss["search"].min(), np.median(self.loss["search"])
        return (np.asarray(loss) - best) / (middle - best)


def make_bank(
    name: str, *, num_layers: int = NUM_LAYERS, depth: int = MAX_LAYERS
) -> tuple[Bank, Dataset]:
    """Bank and data of a problem; with other sizes, of one that is larger than those of ChainBench.

    Args:
      name: one of `NAMES`, or of the same form with another seed.
      num_layers: layers in the bank; a multiple of depth for independent nets and snapshots.
      depth: layers of the nets, or routes, that are trained.

    Raises:
      ValueError: the name is none, or the sizes do not fit.
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


def build(folder: str | os.PathLike[str], names: Sequence[str] = NAMES) -> list[str]:
    """Make and solve the problems that are not in the folder yet; those that are there are checked, and stay.

    Returns:
      The names of those that were made.

    Raises:
      ValueError: a name is none, or a file in the folder is damaged or belongs to another bank.
    """
    for name in names:
        _parse(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
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
        # The table last: where it is, the problem is whole.
        write_arrays(
            _table_path(folder, name), {"name": name, "solves": _digest(bank, data)}, arrays
        )
        made.append(name)
    return made


def load(folder: str | os.PathLike[str], name: str) -> Solved:
    """A solved problem of a folder.

    Raises:
      FileNotFoundError: it was not built there.
      ValueError: the name is none, a file is damaged or truncated, or the table was solved for another bank or data.
    """
    data_name, _, seed = _parse(name)
    path = _table_path(folder, name)
    if not path.exists():
        raise FileNotFoundError(
            f"expected a solved problem at {path}: build it with jchain.chainbench.build({str(folder)!r})"
        )
    header, arrays = read_arrays(path)
    bank, data = Bank.load(_bank_path(folder, name)), load_data(data_name, seed)
    num_chains = chain_lib.count(bank.num_layers, bank.num_heads, MAX_LAYERS)
    shape = (len(EVALUATION_SPLITS), num_chains)
    num_prefixes = chain_lib.count(bank.num_layers, 1, MAX_LAYERS - 1)
    expected = {"loss": shape, "accuracy": shape, "features": (num_prefixes, NUM_FEATURES)}
    found = {key: array.shape for key, array in arrays.items()}
    if found != expected:
        raise ValueError(
            f"{path}: expected arrays {expected}, got {found}: delete it and build it again"
        )
    if (header.get("name"), header.get("solves")) != (name, _digest(bank, data)):
        raise ValueError(
            f"{path} was solved for another bank or data than those of {name}: delete it and build it again"
        )
    by_split: list[dict[str, Any]] = [
        dict(zip(EVALUATION_SPLITS, np.asarray(arrays[key]), strict=True))
        for key in ("loss", "accuracy")
    ]
    loss, accuracy = by_split
    return Solved(name, bank, data, loss, accuracy, np.asarray(arrays["features"]))


def describe(solved: Solved) -> dict[str, Any]:
    """What makes a problem hard.

    Returns:
      chains: how many there are; best: their lowest loss; within_1_percent, within_5_percent, within_10_percent: the share
      of chains whose loss is at most so much above it; local_optima: the share of chains without a better neighbor
      (`jchain.chain.neighbors`); search_to_test: Spearman's rank correlation of losses; best_on_test: test loss of the
      chain that is best on search, over the lowest test loss.
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


def find_local_optima(solved: Solved) -> np.ndarray:
    """Whether each chain has no better neighbor on `search`, `[C]`."""
    sizes = (solved.bank.num_layers, solved.bank.num_heads)
    loss = jnp.asarray(solved.loss["search"])

    @jax.jit
    def is_optimum(chains: Array, own: Array) -> Array:
        def one(chain: Array, own: Array) -> Array:
            rows, is_neighbor = chain_lib.neighbors(chain, *sizes)
            place = chain_lib.index(jnp.where(is_neighbor[:, None], rows, chain[None]), *sizes)
            return jnp.all(loss[place] >= own)

        return jax.lax.map(lambda pair: one(*pair), (chains, own), batch_size=1024)

    return np.asarray(is_optimum(jnp.asarray(solved.chains), loss))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    result: Any = spearmanr(a, b)
    return float(result.statistic)


def _parse(name: str) -> tuple[str, str, int]:
    data, kind, seed = (*name.split("-"), "", "")[:3]
    if (
        data not in DATA
        or kind not in KINDS
        or not seed.isdigit()
        or name != f"{data}-{kind}-{int(seed)}"
    ):
        raise ValueError(
            f"expected a problem DATA-KIND-SEED of data {', '.join(DATA)} and kinds {', '.join(KINDS)}, got {name!r}"
        )
    return data, kind, int(seed)


def _table_path(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}.table.safetensors"


def _bank_path(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}.bank.safetensors"


def _digest(bank: Bank, data: Dataset) -> str:
    """Of the weights and of the splits on which chains are scored."""
    batches: list[Batch] = [getattr(data, split) for split in EVALUATION_SPLITS]
    leaves = jax.tree.leaves((bank.layers, bank.heads, bank.stem_params, batches))
    return checksum({}, {str(i): leaf for i, leaf in enumerate(leaves)})
