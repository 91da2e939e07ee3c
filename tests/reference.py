"""Slow, obvious references: one chain, layer, and NumPy operation at a time, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import init_params

import jchain as jc


def _dense(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def _norm(params, x):
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    scale, bias = (np.asarray(params[name], np.float64) for name in ("scale", "bias"))
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def _conv(params, x):
    kernel = np.asarray(params["kernel"], np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    out = np.zeros((*x.shape[:3], kernel.shape[-1])) + np.asarray(params["bias"], np.float64)
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + height, j : j + width] @ kernel[i, j]
    return out


def _transformer_block(module, params, x):
    num_heads, size = module.num_heads, module.features // module.num_heads
    normed = _norm(params["LayerNorm_0"], x)
    kernel, bias = (np.asarray(params["qkv"][name], np.float64) for name in ("kernel", "bias"))
    mixed = np.zeros_like(x)
    for n in range(len(x)):
        for h in range(num_heads):
            query, key, value = (normed[n] @ kernel[:, i, h] + bias[i, h] for i in range(3))
            scores = query @ key.T / np.sqrt(size)
            if module.is_causal:
                scores = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            mixed[n] += weights @ value @ np.asarray(params["out"]["kernel"], np.float64)[h]
    x = x + mixed + np.asarray(params["out"]["bias"], np.float64)
    hidden = _dense(params["Dense_0"], _norm(params["LayerNorm_1"], x))
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return x + _dense(params["Dense_1"], gelu)


def apply(module, params, x):
    """Apply one layer or head, written out in NumPy."""
    kind = type(module).__name__
    if kind == "ResidualMLP":
        return x + _dense(params["Dense_1"], np.maximum(_dense(params["Dense_0"], x), 0))
    if kind == "Dense":
        return np.maximum(_dense(params["Dense_0"], x), 0)
    if kind == "InvertibleDense":
        made = _dense(params, x)
        return np.where(made > 0, made, module.negative_slope * made)
    if kind == "DenseHead":
        return _dense(params["Dense_0"], x.reshape(len(x), -1))
    if kind == "ConvBlock":
        hidden = x
        for i in range(module.depth):
            hidden = _conv(params[f"Conv_{i}"], np.maximum(hidden, 0))
        return x + hidden
    if kind == "TransformerBlock":
        return _transformer_block(module, params, x)
    raise AssertionError(f"no reference for {kind}")


def _find(groups, token):
    for group in groups:
        if token in group.tokens:
            index = group.tokens.index(token)
            return group.module, jax.tree.map(
                lambda leaf, index=index: np.asarray(leaf)[index], group.params
            )
    raise AssertionError(f"token {token} is in no group")


def chain_logits(bank, chain, x):
    """Compute the logits of one chain."""
    hidden = np.asarray(x, np.float64)
    if bank.stem is not None:
        hidden = apply(bank.stem, bank.stem_params, hidden)
    for token in chain:
        if token < bank.num_layers:
            hidden = apply(*_find(bank.layers, token), hidden)
        else:
            return apply(*_find(bank.heads, token), hidden)
    raise AssertionError("no head")


def chain_loss(problem, chain):
    """Compute the mean cross-entropy and accuracy of one chain."""
    chain = [int(token) for token in chain if token >= 0]
    logits = chain_logits(problem.bank, chain, problem.data.x)
    y = np.asarray(problem.data.y)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_prob[np.arange(len(y)), y].mean() + float(problem.layer_cost) * (len(chain) - 1)
    return loss, (logits.argmax(axis=1) == y).mean()


def count_calls(chains, num_layers):
    """Count the distinct (prefix, layer) pairs and the distinct chains of a population."""
    rows = [tuple(int(token) for token in chain if token >= 0) for chain in chains]
    prefixes = {row[: i + 1] for row in rows for i, token in enumerate(row) if token < num_layers}
    return len(prefixes), len(set(rows))


def make_invertible_bank(num_layers=3, seed=0, layers=None, features=4):
    """Make a bank of well-conditioned layers of one or more modules."""
    head = jc.layers.DenseHead(2)
    banks = []
    for i, layer in enumerate(layers or [jc.layers.InvertibleDense(features)]):
        keys = jax.random.split(jax.random.key(seed + 7 * i), num_layers + 1)
        params = [layer.init(key, jnp.ones((1, features)))["params"] for key in keys[:-1]]
        banks.append(
            jc.Bank.stack(layer, params, head, init_params(head, keys[-1], 1, (features,)))
        )
    return jc.Bank.concat(banks)


def apply_layers(bank, chain, x):
    """Apply layers by the plain definition, and return float64 outputs."""
    for token in chain:
        (group,) = [group for group in bank.layers if token in group.tokens]
        x = group.apply(group.tokens.index(token), x)
    return np.asarray(x, np.float64)


def assert_plan_matches_apply_chain(problem, plan, seed, num):
    """Compare random chains of a bank of 4 layers and 2 heads with `apply_chain`."""
    rng = np.random.default_rng(seed)
    tokens = [
        [*rng.integers(0, 4, rng.integers(0, 4)).tolist(), int(rng.integers(4, 6))]
        for _ in range(num)
    ]
    chains = jc.chain.pad(tokens, 3)
    out = jc.evaluate(problem, chains, plan=plan)
    expected = [_plain_loss(problem, chain) for chain in jnp.asarray(chains)]
    np.testing.assert_allclose(out.loss, expected, rtol=2e-6)
    assert (out.layer_calls, out.head_calls) == count_calls(chains, 4)


@jax.jit
def _plain_loss(problem, chain):
    return problem.loss_and_accuracy(jc.apply_chain(problem.bank, chain, problem.data.x))[0]
