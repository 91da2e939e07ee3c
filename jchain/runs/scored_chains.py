"""The chains that a run scored, in order: in memory, and as lines of `chains.jsonl`."""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jchain._typing import Bool, Float, Int
from jchain.chain import PADDING
from jchain.search.protocol import Info

if TYPE_CHECKING:
    import pandas as pd


_BLOCK_BYTES = 2**20


class ScoredChains(NamedTuple):
    """The chains that a run scored, in order, with repeats."""

    chains: Int[np.ndarray, "C L"]
    loss: Float[np.ndarray, "C"]
    step: Int[np.ndarray, "C"]  # the number of the step; 0 for the starts
    # The layer calls of the run after that step; float64 if the search charges fractions.
    layer_calls: Int[np.ndarray, "C"] | Float[np.ndarray, "C"]

    def to_frame(self) -> "pd.DataFrame":
        """Return a pandas data frame with one row per chain; `chain` is a tuple of tokens.

        Raises:
          ImportError: if pandas is not installed.
        """
        import pandas as pd

        rows = [tuple(row[row != PADDING].tolist()) for row in self.chains]
        return pd.DataFrame(
            {
                "chain": rows,
                "loss": self.loss,
                "step": self.step,
                "layer_calls": self.layer_calls,
            }
        )


def empty_scored(num_slots: int) -> ScoredChains:
    """Return no chains.

    Args:
      num_slots: the number of slots of a chain, L.
    """
    counts = np.zeros(0, np.int32)
    return ScoredChains(np.zeros((0, num_slots), np.int32), np.zeros(0, np.float32), counts, counts)


def select_scored(
    scored: Info,
    is_counted: Bool[np.ndarray, "T S"],
    layer_calls: Int[np.ndarray, "T S"] | Float[np.ndarray, "T S"],
    num_steps: Int[np.ndarray, "S"],
) -> list[ScoredChains]:
    """Select the chains of the counted steps of one part, for each run.

    Args:
      scored: what the steps recorded, `[T, S, P, L]`.
      is_counted: whether each step counts.
      layer_calls: the layer calls of each run after each step.
      num_steps: the number of counted steps of each run before this part.
    """
    found = []
    all_chains, all_losses = np.asarray(scored.chains), np.asarray(scored.loss)
    for run in range(is_counted.shape[1]):
        rows = np.flatnonzero(is_counted[:, run])
        chains, loss = all_chains[rows, run], all_losses[rows, run]
        t, p = np.nonzero(chains[:, :, 0] != PADDING)
        step = num_steps[run] + 1 + t
        found.append(
            ScoredChains(
                chains[t, p].astype(np.int32),
                loss[t, p].astype(np.float32),
                step.astype(np.int32),
                layer_calls[rows, run][t],
            )
        )
    return found


def concat_scored(parts: Sequence[ScoredChains]) -> ScoredChains:
    """Concatenate chains that were scored one after the other.

    Args:
      parts: the chains, at least one item.
    """
    return ScoredChains(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


class ChainLog:
    """A file with one scored chain per line.

    Lines are appended. `position` says how far the file was written, and the checksum of that part,
    so that a run that continues from an earlier point cuts the file there.

    Args:
      path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._checksum = 0, 0
        self._waiting = b""

    @property
    def position(self) -> dict[str, int]:
        """The number of bytes that were written, and their CRC-32."""
        return {"size": self._size, "crc32": self._checksum}

    def cut(self, position: dict[str, int]) -> None:
        """Cut the file at a position that was read from a checkpoint.

        Args:
          position: what `position` was when the checkpoint was written.

        Raises:
          ValueError: if the file up to there is not what was written.
        """
        size, found, checksum = position["size"], 0, 0
        if self.path.exists():
            with self.path.open("rb") as file:
                while block := file.read(min(_BLOCK_BYTES, size - found)):
                    found, checksum = found + len(block), zlib.crc32(block, checksum)
        if found < size or checksum != position["crc32"]:
            raise ValueError(
                f"expected the first {size:,} bytes of {self.path} as this run wrote them, got "
                "a file that was changed"
            )
        with self.path.open("ab") as file:
            file.truncate(size)
        self._size, self._checksum = size, position["crc32"]

    def append(self, runs: Sequence[ScoredChains]) -> None:
        """Append chains, those of earlier steps first, and of the first run first.

        Args:
          runs: the chains of each run.

        Raises:
          OSError: if the file cannot be written. The next call writes these chains, too.
        """
        lines = [line for i, scored in enumerate(runs) for line in _format_lines(i, scored)]
        if lines:
            steps = np.concatenate([scored.step for scored in runs])
            self._waiting += "".join(lines[i] for i in np.argsort(steps, kind="stable")).encode()
        if self._waiting:
            # Lines of which only a part was written, to a disk that was full, are written again.
            with self.path.open("r+b" if self._size else "wb") as file:
                file.truncate(self._size)
                file.seek(self._size)
                file.write(self._waiting)
            self._size += len(self._waiting)
            self._checksum = zlib.crc32(self._waiting, self._checksum)
            self._waiting = b""

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        if self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())


def read_log(path: str | os.PathLike[str], num_slots: int, num_runs: int) -> list[ScoredChains]:
    """Read the chains of each run from a log. A torn last line is left out.

    Args:
      path: the file.
      num_slots: the number of slots of a chain, L.
      num_runs: the number of runs, S.
    """
    text = Path(path).read_text() if Path(path).exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows: list[list[dict[str, Any]]] = [[] for _ in range(num_runs)]
    for line in lines:
        row = json.loads(line)
        rows[row["run"]].append(row)
    return [_parse(own, num_slots) for own in rows]


def _parse(rows: list[dict[str, Any]], num_slots: int) -> ScoredChains:
    if not rows:
        return empty_scored(num_slots)
    chains = np.full((len(rows), num_slots), PADDING, np.int32)
    for chain, row in zip(chains, rows, strict=True):
        chain[: len(row["chain"])] = row["chain"]
    loss = [np.inf if row["loss"] is None else row["loss"] for row in rows]
    steps, calls = ([row[name] for row in rows] for name in ("step", "layer_calls"))
    dtype = np.float64 if any(isinstance(number, float) for number in calls) else np.int32
    return ScoredChains(
        chains, np.array(loss, np.float32), np.array(steps, np.int32), np.array(calls, dtype)
    )


def _format_lines(run: int, scored: ScoredChains) -> list[str]:
    lengths = (scored.chains != PADDING).sum(axis=1).tolist()
    losses = [
        repr(value) if is_finite else "null"
        for value, is_finite in zip(
            scored.loss.tolist(), np.isfinite(scored.loss).tolist(), strict=True
        )
    ]
    columns = (
        scored.chains.tolist(),
        lengths,
        losses,
        scored.step.tolist(),
        scored.layer_calls.tolist(),
    )
    return [
        f'{{"run": {run}, "step": {step}, "layer_calls": {calls}, "chain": {chain[:length]}, '
        f'"loss": {loss}}}\n'
        for chain, length, loss, step, calls in zip(*columns, strict=True)
    ]
