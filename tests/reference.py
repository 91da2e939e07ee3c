"""The slow, obvious way: one chain, one layer, one NumPy operation at a time, in float64."""

import numpy as np


def _dense(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def _apply(module, params, x):
    kind = type(module).__name__
    if kind == "ResidualMLP":
        return x + _dense(params["Dense_1"], np.maximum(_dense(params["Dense_0"], x), 0))
    if kind == "Dense":
        return np.maximum(_dense(params["Dense_0"], x), 0)
    if kind == "DenseHead":
        return _dense(params["Dense_0"], x.reshape(len(x), -1))
    raise AssertionError(f"no reference for {kind}")


def _find(groups, token):
    for group in groups:
        if token in group.tokens:
            index = group.tokens.index(token)
            return group.module, {
                name: {k: np.asarray(v)[index] for k, v in leaf.items()} for name, leaf in group.params.items()
            }
    raise AssertionError(f"token {token} is in no group")


def chain_logits(bank, chain, x):
    """Logits of one chain."""
    hidden = np.asarray(x, np.float64)
    for token in chain:
        if token < bank.num_layers:
            hidden = _apply(*_find(bank.layers, token), hidden)
        else:
            return _apply(*_find(bank.heads, token), hidden)
    raise AssertionError("no head")


def chain_loss(problem, chain):
    """Mean cross-entropy and accuracy of one chain."""
    chain = [int(token) for token in chain if token >= 0]
    logits = chain_logits(problem.bank, chain, problem.data.x)
    y = np.asarray(problem.data.y)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_prob[np.arange(len(y)), y].mean() + float(problem.layer_cost) * (len(chain) - 1)
    return loss, (logits.argmax(axis=1) == y).mean()


def count_calls(chains, num_layers):
    """Distinct (prefix, layer) and distinct chains of a population."""
    rows = [tuple(int(token) for token in chain if token >= 0) for chain in chains]
    prefixes = {row[: i + 1] for row in rows for i, token in enumerate(row) if token < num_layers}
    return len(prefixes), len(set(rows))
