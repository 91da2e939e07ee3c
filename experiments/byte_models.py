"""GPT-2 models of bytes, trained on Python's standard library: a base model and two fine-tunes.

The fine-tunes are trained on two parts of the library that the base model does not see: concurrency
(A: asyncio, multiprocessing, ...) and the web (B: email, http, ...). A fourth checkpoint holds the
mean of the fine-tunes' weights.
"""

import dataclasses
import json
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jchain as jc

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_positions": 128,
    "n_embd": 128,
    "n_layer": 8,
    "n_head": 4,
    "tie_word_embeddings": False,
}
PARTS = {
    "a": (
        "asyncio",
        "multiprocessing",
        "concurrent",
        "threading.py",
        "queue.py",
        "selectors.py",
        "socket.py",
        "subprocess.py",
        "signal.py",
    ),
    "b": (
        "email",
        "http",
        "urllib",
        "html",
        "xml",
        "json",
        "wsgiref",
        "mimetypes.py",
        "imaplib.py",
        "smtplib.py",
        "ftplib.py",
    ),
}
# Text that is generated, or that some machines lack.
LEFT_OUT = (
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "encodings",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
    "turtledemo",
)
# Shares of the files for training, search, select, and test.
SHARES = (0.7, 0.1, 0.1, 0.1)
LENGTH, BATCH = 128, 16
LEARNING_RATE, TUNE_RATE = 2e-3, 5e-4


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of the models, and their numbers of training steps."""

    depth: int = 8
    width: int = 128
    num_steps: int = 600
    num_tune_steps: int = 150


def find_files() -> dict[str, list[Path]]:
    """Find the files of the standard library for the base model, for A, and for B."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Path]] = {"base": [], "a": [], "b": []}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in LEFT_OUT for part in parts):
            part = next((name for name, tops in PARTS.items() if parts[0] in tops), "base")
            found[part].append(path)
    return found


def load_text(seed: int) -> dict[str, list[np.ndarray]]:
    """Load the bytes of the training, search, select, and test split of each part.

    No file is in two splits.
    """
    rng, text = np.random.default_rng(seed), {}
    for part, paths in find_files().items():
        order = [paths[i] for i in rng.permutation(len(paths))]
        cuts = np.round(np.cumsum(SHARES)[:-1] * len(order)).astype(int)
        pieces = np.split(np.array(order, object), cuts)
        text[part] = [
            np.frombuffer(b"".join(path.read_bytes() for path in piece), np.uint8)
            for piece in pieces
        ]
    return text


def take(text: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Take sequences of `LENGTH` bytes, each with its next byte, `[num, LENGTH + 1]`."""
    starts = rng.choice((len(text) - 1) // LENGTH, num, replace=False) * LENGTH
    return text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)


def make_batch(rows: np.ndarray) -> jc.Batch:
    return jc.Batch(jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:]))


def make_splits(
    text: dict[str, list[np.ndarray]], parts: tuple[str, ...], seed: int, sizes: tuple[int, ...]
) -> list[jc.Batch]:
    """Make search, select, and test splits of these numbers of sequences.

    Each part of the library contributes an equal share.
    """
    rng = np.random.default_rng(1000 + seed)
    return [
        make_batch(
            np.concatenate([take(text[part][1 + i], num // len(parts), rng) for part in parts])
        )
        for i, num in enumerate(sizes)
    ]


def write_config(folder: Path, model: Model) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"n_layer": model.depth, "n_embd": model.width})
    )
    return folder


def train_models(
    seed: int, model: Model, text: dict[str, list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the weights of the base model and of its fine-tunes, by model and path."""
    with tempfile.TemporaryDirectory() as folder:
        new = jc.hub.random_bank(jax.random.key(seed), write_config(Path(folder) / "new", model))
    base = fit(new, text["base"][0], seed, model.num_steps, LEARNING_RATE)
    tuned = {
        part: fit(base, text[part][0], seed, model.num_tune_steps, TUNE_RATE) for part in PARTS
    }
    return {
        f"{name}/{i}": np.asarray(leaf)
        for name, bank in {"base": base, **tuned}.items()
        for i, leaf in enumerate(jax.tree.leaves(bank))
    }


def run_blocks(bank: jc.Bank, x: jax.Array) -> jax.Array:
    """Apply all blocks of the model in order, unrolled, to differentiate through them."""
    hidden = bank.embed(x)
    for i in range(bank.num_layers):
        hidden = bank.layers[0].apply(i, hidden)
    return bank.heads[0].apply(0, hidden)


def fit(
    bank: jc.Bank, text: np.ndarray, seed: int, num_steps: int, learning_rate: float
) -> jc.Bank:
    """Return the bank after `num_steps` of AdamW."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, num_steps // 10 + 1, num_steps, learning_rate / 20
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    )
    rng = np.random.default_rng(seed)

    def find_loss(bank: jc.Bank, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(run_blocks(bank, x), y).mean()

    @partial(
        jax.jit,
        donate_argnums=(0, 1),
        compiler_options=jc.engine.compiler_options(jax.default_backend()),
    )
    def step(
        bank: jc.Bank, state: Any, x: jax.Array, y: jax.Array
    ) -> tuple[jc.Bank, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(find_loss)(bank, x, y)
        step = optimizer.update
        updates, state = step(gradient, state, bank)  # pyright: ignore[reportArgumentType]
        new: Any = optax.apply_updates(bank, updates)  # pyright: ignore[reportArgumentType]
        return new, state, loss

    bank = jax.tree.map(jnp.array, bank.without_names())
    state = optimizer.init(bank)  # pyright: ignore[reportArgumentType]
    for i in range(num_steps):
        starts = rng.integers(0, len(text) - LENGTH - 1, BATCH)
        rows = text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
        bank, state, loss = step(bank, state, *make_batch(rows))
        if i % 100 == 0 or i == num_steps - 1:
            print(f"step {i}: {float(loss):.3f}", flush=True)
    return bank


def write_checkpoints(
    folder: Path, weights: dict[str, np.ndarray], model: Model
) -> dict[str, Path]:
    """Write the models and the mean of the fine-tunes, and return their folders."""
    source = write_config(folder / "new", model)
    bank = jc.hub.random_bank(jax.random.key(0), source)
    num = len(jax.tree.leaves(bank))
    models = {name: [weights[f"{name}/{i}"] for i in range(num)] for name in ("base", *PARTS)}
    models["soup"] = [
        np.mean(leaves, axis=0) for leaves in zip(*(models[part] for part in PARTS), strict=True)
    ]
    structure = jax.tree.structure(bank)
    return {
        name: jc.hub.export(
            jax.tree.unflatten(structure, leaves), bank.parents[0], source, folder / name
        )
        for name, leaves in models.items()
    }
