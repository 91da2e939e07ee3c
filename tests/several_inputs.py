"""Banks whose activations are pytrees, and what they compute, in loops over float64 arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jchain as jc

NUM_EXAMPLES = 6
Y = np.arange(NUM_EXAMPLES) % 3


class Modulate(nn.Module):
    """A layer that maps a nested dict: a stream, a vector beside it, a mask, and positions."""

    @nn.compact
    def __call__(self, x):
        stream, (vector, mask, position) = x["stream"], x["side"]
        wave = 0.3 * jnp.sin(position).astype(stream.dtype)
        made = jnp.tanh(nn.Dense(4)(stream) + nn.Dense(4)(vector) + wave[:, None])
        side = (vector + 0.5 * made[:, :2], mask ^ (position % 2 == 0), (position + 1) % 5)
        return {"stream": stream + jnp.where(mask[:, None], made, 0), "side": side}


class Read(nn.Module):
    """A head that reads the stream, the vector, and the mask."""

    @nn.compact
    def __call__(self, x):
        vector, mask, _ = x["side"]
        rows = jnp.concatenate([x["stream"], vector], axis=1)
        return jnp.where(mask[:, None], nn.Dense(3)(rows), 0)


def mix(params, state):
    """A layer that maps a pair: a matrix and a number for each example."""
    rows, scale = state
    made = jnp.tanh(rows @ params["w"]) * scale[:, None, None]
    return rows + made, scale * 0.5 + made.mean(axis=(1, 2))


def turn(params, state):
    """A layer of another kind for the same pairs."""
    rows, scale = state
    return rows[:, ::-1] * params[None, None], scale + jnp.sin(rows[:, 0, 0])


def read_pair(params, state):
    rows, scale = state
    return rows.reshape(-1, 6) @ params + scale[:, None]


def unpack(params, x):
    """A stem that maps one array to a pair."""
    return x[:, :6].reshape(-1, 3, 2), x[:, 6] * params


def apply_reference(module, params, state):
    """Apply one layer or head to arrays of NumPy."""
    kind = getattr(module, "apply_fn", type(module)).__name__
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    if kind == "mix":
        made = np.tanh(state[0] @ params["w"]) * state[1][:, None, None]
        return state[0] + made, state[1] * 0.5 + made.mean(axis=(1, 2))
    if kind == "turn":
        return state[0][:, ::-1] * params, state[1] + np.sin(state[0][:, 0, 0])
    if kind == "read_pair":
        return state[0].reshape(-1, 6) @ params + state[1][:, None]
    stream, (vector, mask, position) = state["stream"], state["side"]
    if kind == "Read":
        rows = np.concatenate([stream, vector], axis=1)
        return np.where(mask[:, None], _dense(params["Dense_0"], rows), 0)
    assert kind == "Modulate"
    made = _dense(params["Dense_0"], stream) + _dense(params["Dense_1"], vector)
    made = np.tanh(made + 0.3 * np.sin(position)[:, None])
    side = (vector + 0.5 * made[:, :2], mask ^ (position % 2 == 0), (position + 1) % 5)
    return {"stream": stream + np.where(mask[:, None], made, 0), "side": side}


def _dense(params, x):
    return x @ params["kernel"] + params["bias"]


def start_reference(problem):
    """Return the input of the first layer."""

    def widen(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf

    x = jax.tree.map(widen, problem.data.x)
    if problem.bank.stem is None:
        return x
    return x[:, :6].reshape(-1, 3, 2), x[:, 6] * float(problem.bank.stem_params)


def walk_reference(problem, tokens, state):
    """Apply layers and perhaps a head to a state, and return all states."""
    states = [state]
    for token in tokens:
        group, index = problem.bank.find(int(token))
        params = jax.tree.map(lambda leaf, index=index: leaf[index], group.params)
        states.append(apply_reference(group.module, params, states[-1]))
    return states


def find_outputs(problem, chain):
    tokens = [token for token in chain if token >= 0]
    return walk_reference(problem, tokens, start_reference(problem))[-1]


def find_loss(outputs, y=Y):
    """Compute the mean softmax cross-entropy."""
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(y)), np.asarray(y)]
    return np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen)


def make_inputs(seed=0, num=NUM_EXAMPLES):
    rng = np.random.default_rng(seed)
    return {
        "stream": jnp.asarray(rng.normal(size=(num, 4)), jnp.float32),
        "side": (
            jnp.asarray(rng.normal(size=(num, 2)), jnp.float32),
            jnp.asarray(rng.random(num) < 0.7),
            jnp.asarray(rng.integers(0, 5, num), jnp.int32),
        ),
    }


def draw_params(module, num, seed=0):
    """Draw random params, with random biases, as `module.init` would shape them."""
    sizes = {Modulate: ((4, 4), (2, 4)), Read: ((6, 3),)}[type(module)]
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(0.7 * rng.normal(size=shape), jnp.float32)

    return [
        {
            f"Dense_{i}": {"kernel": draw(*size), "bias": draw(size[1])}
            for i, size in enumerate(sizes)
        }
        for _ in range(num)
    ]


def make_dict_problem(num_layers=3, num_heads=2, max_layers=3, seed=0):
    layer, head = Modulate(), Read()
    params = draw_params(layer, num_layers, seed), draw_params(head, num_heads, seed + 50)
    bank = jc.Bank.stack(layer, params[0], head, params[1])
    return jc.Problem(bank, jc.Batch(make_inputs(seed), jnp.asarray(Y)), max_layers)


def make_pair_problem():
    """Make a problem of two groups of layers, and a stem that maps one array to a pair."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = [{"w": draw(2, 2)}, draw(2), {"w": draw(2, 2)}]
    bank = jc.Bank.stack(
        [mix, turn, mix],
        params,
        read_pair,
        [draw(6, 3), draw(6, 3)],
        stem=unpack,
        stem_params=jnp.float32(0.8),
    )
    return jc.Problem(bank, jc.Batch(draw(NUM_EXAMPLES, 7), jnp.asarray(Y)), 3)


def pack(state):
    """Join a pair to one array."""
    return jnp.concatenate([state[0].reshape(-1, 6), state[1][:, None]], axis=1)


def _packed(fn, is_head=False):
    def apply(params, x):
        out = fn(params, (x[:, :6].reshape(-1, 3, 2), x[:, 6]))
        return out if is_head else pack(out)

    return apply


PACKED = {fn: _packed(fn, fn is read_pair) for fn in (mix, turn, read_pair)}


def make_packed_problem(problem):
    """Make a problem that computes the same as that of pairs, but on one array."""
    bank = problem.bank

    def replace(group):
        module = jc.modules.FunctionModule(PACKED[group.module.apply_fn])
        return jc.LayerGroup(group.params, module, group.tokens)

    packed = jc.Bank(tuple(map(replace, bank.layers)), tuple(map(replace, bank.heads)))
    x = pack(bank.embed(problem.data.x))
    return jc.Problem(packed, jc.Batch(x, problem.data.y), problem.max_layers)
