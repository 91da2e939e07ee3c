"""How long an evaluation takes, estimated by a short measurement on this machine."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array
from jchain.engine.backend import get_backend
from jchain.engine.population import Options, pad_population
from jchain.engine.prefix_sharing import count_calls
from jchain.engine.successive_halving import evaluate_rows
from jchain.problem import Problem

# The examples that are measured first, and the seconds that a measurement should take at least.
_FIRST_EXAMPLES, _SECONDS = 4, 0.25


def estimate_seconds(problem: Problem, chains: np.ndarray, options: Options) -> float:
    """Estimate how long the evaluation of a population takes, without compilation.

    One chain is timed on a few examples. If that is short, all examples are used, and then more
    chains. The estimate is proportional to the examples and to the calls.

    Args:
      problem: the bank, the split of data, and the loss, on the devices.
      chains: the tokens of the chains, `[P, L]`.
      options: the static options; see `jchain.evaluate`.
    """
    num_chains = len(chains)
    row = chains[np.argmax((chains >= 0).sum(axis=1))]
    seconds, size = _time_one(problem, row, options)
    total = _count(problem, chains)
    if seconds >= _SECONDS or num_chains == 1:
        return float(total @ _divide(problem, row, seconds, size, options))
    more = min(num_chains, 8 * math.ceil(_SECONDS / seconds))
    sample = chains[np.linspace(0, num_chains - 1, more).round().astype(int)]
    seconds = _time(problem, sample, problem.num_examples, options)
    return seconds * float(total.sum() / _count(problem, sample).sum())


def measure_calls(problem: Problem, chain: np.ndarray) -> tuple[float, float]:
    """Measure how long a layer call and a head call take, on average over a chain.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of a chain, `[L]`, padded with -1.

    Returns:
      The seconds of a layer call, and of a head call.
    """
    bare = problem.without_names()
    options = Options(None, None, None, get_backend(bare, bare.put(chain)))
    seconds, size = _time_one(bare, chain, options)
    of_layer, of_head = _divide(bare, chain, seconds, size, options)
    return float(of_layer), float(of_head)


def _time_one(problem: Problem, row: np.ndarray, options: Options) -> tuple[float, int]:
    """Time one chain, on few examples if that takes long enough; return how many they were."""
    size = min(_FIRST_EXAMPLES, problem.num_examples)
    seconds = _time(problem, row[None], size, options)
    if seconds < _SECONDS and size < problem.num_examples:
        size = problem.num_examples
        seconds = _time(problem, row[None], size, options)
    return seconds, size


def _divide(
    problem: Problem, row: np.ndarray, seconds: float, size: int, options: Options
) -> np.ndarray:
    """Divide the time of a chain between its layers and its head, which is timed alone.

    The head of a language model takes as long as several blocks.
    """
    num_layers = int(_count(problem, row[None])[0])
    head = np.where(np.arange(len(row)) == 0, row[num_layers], -1)
    of_head = _time(problem, head[None], size, options) if num_layers else seconds
    of_layer = max(0.0, seconds - of_head) / max(1, num_layers)
    return np.array([of_layer, of_head]) * problem.num_examples / size


def _count(problem: Problem, chains: np.ndarray) -> np.ndarray:
    """Count the layer calls and the head calls of a population."""
    return np.array(
        [int(calls) for calls in count_calls(jnp.asarray(chains), problem.bank.num_layers)]
    )


def _time(problem: Problem, chains: np.ndarray, num_examples: int, options: Options) -> float:
    """Time the evaluation of some chains on the first examples, after one to compile it."""
    part = problem if num_examples == problem.num_examples else problem.take(slice(num_examples))
    rows = part.put(pad_population(chains))

    def run() -> Array:
        return evaluate_rows(part, rows, options=options).loss

    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
