"""What is passed in place of something else is named in one line: what was expected, what came.

The calls run in another process, as users make them: here, the tests check types first.
"""

import subprocess
import sys

import pytest
from checkpoints import write
from stopping import ENVIRONMENT

SCRIPT = """
import sys
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, jchain as jc
data = jc.data.load("wine")
layer, head, key = jc.layers.ResidualMLP(13), jc.layers.DenseHead(3), jax.random.key(0)
bank = jc.train.random(key, data.train, layer=layer, head=head, num_layers=2, num_steps=0)
problem = jc.Problem(bank, data.search, 2)
params, head_params = bank.get_params(0), bank.get_params(2)
search, chains = jc.LocalSearch(), np.array([[0, 2, -1]])
class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(13)(x), 0.0
pair = Pair().init(key, data.train.x)["params"]
class Tensor:
    dtype, shape = "torch.bfloat16", (3,)
Tensor.__module__ = "torch"
class Linear:
    def __call__(self, x):
        return x
Linear.__module__ = "torch.nn.modules.linear"
class NeedsGradient:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
NeedsGradient.__module__ = "torch"
model = sys.argv[1]
def attempt(call):
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        print("accepted")
"""
CASES = {
    "jc.evaluate(problem, chains, memory_limit=float('nan'))": "expected memory_limit to be an "
    "integer of at least 1, got nan",
    "jc.evaluate(problem, chains, memory_limit=1e9)": "an integer of at least 1, got 1000000000.0",
    "jc.LocalSearch(num_chains=2.5)": "expected num_chains to be an integer of at least 1, got 2.5",
    "jc.LocalSearch(num_chains=True)": "expected num_chains to be an i"
    "nteger of at least 1, got True",
    "jc.LocalSearch(num_chains='8')": "expected num_chains to be an integer of at least 1, got '8'",
    "jc.BeamSearch(width=4, max_width=2)": "expected max_width to be at least 4, got 2",
    "jc.ActorCritic(learning_rate=float('nan'))": "expected learning_rate to be a finite number of "
    "at least 0, got nan",
    "jc.ActorCritic(learning_rate=-1e-3)": "learning_rate to be a finite number of at least 0",
    "jc.ActorCritic(lambda_=1.5)": "a finite number of at least 0 and of at most 1, got 1.5",
    "jc.ActorCritic(clip=None)": "expected clip to be a finite number of at least 0, got None",
    "jc.CriticSearch(ridge=-1.0)": "expected ridge to be a number of at least 0, got -1.0",
    "jc.CriticSearch(ridge=float('nan'))": "expected ridge to be a number of at least 0, got nan",
    "jc.CriticSearch(epsilon=2)": "expected epsilon to be a finite number of at least 0 and of at",
    "jc.QLearning(decay=float('inf'))": "expected decay to be a finite number",
    "jc.MCTS(gumbel_scale='1')": "expected gumbel_scale to be a "
    "finite number of at least 0, got '1'",
    "jc.TargetPropagation(step_size=0)": "expected step_size to be a finite number above 0, got 0",
    "jc.SuffixBeamSearch(temperature=-1)": "expected temperature to be a finite number of at least",
    "jc.LinearizedSearch(num_best=0)": "expected num_best to be at least 1, got 0",
    "jc.updates.SharedUpdates(final_share=float('nan'))": "final_share to be a finite number above",
    "jc.train.random(0, data.train, layer=layer, head=head)": "one key of jax.random.key, got int",
    "jc.train.random(None, data.train, layer=layer, head=head)": "jax.random.key, got NoneType",
    "jc.train.random(key, data.train, layer=layer, head=head, num_layers=2.0)": "expected "
    "num_layers to be an integer of at least 1, got 2.0",
    "jc.train.random(key, (data.train.x + np.nan, data.train.y), layer=layer, head=head)": "got "
    "nan or infinity",
    "jc.train.random(key, data.train, layer=layer, head=head, depth=0)": "expected depth to be at",
    "jc.LayerGroup(bank.layers[0].params, layer, (0, 1, 2))": "expected params with 3 rows in each "
    "array, one per token, got an array of shape [2, ",
    "jc.LayerGroup(bank.layers[0].params, layer, (0, 0))": "expected different tokens of a"
    "t least 0",
    "jc.Bank(bank.layers, bank.layers)": "expected heads with the tokens 2, 3, ..., at least one, "
    "got [0, 1]",
    "jc.Bank(bank.heads, bank.heads)": "expected layers with the token"
    "s 0, 1, ..., at least one, got "
    "[2]",
    "jc.Bank(bank.layers, bank.heads, names=('a',))": "expected 3 names, one per laye"
    "r and head, got 1",
    "jc.gradient.trends.predict_swaps(None, problem, [0, 0, -1], 'after')": "expected a context of "
    "everywhere, slot, before, layer, got 'after'",
    "jc.plot.block_runs(np.zeros((2, 3)))": "expected changes of shape [D, D], got [2, 3]",
    "jc.Problem(bank, data, 2)": "expected one split of data, such as data.search or "
    "jc.Batch(x, y), got Dataset of 7",
    "jc.Problem(bank, data.search.x, 2)": "got an array float32[35, 13]",
    "jc.Problem(bank, (data.search.x, ['a'] * 35), 2)": "expected y as an array",
    "jc.Problem(bank, (Tensor(), data.search.y), 2)": "expected x as an array, got torch.Tensor",
    "jc.Problem(bank, (NeedsGradient(), data.search.y), 2)": "expected x as an array, got "
    "torch.NeedsGradient: Can't call numpy()",
    "jc.data.split(NeedsGradient(), data.train.y)": "expected x as an array",
    "jc.data.split(data.train.x, NeedsGradient())": "expected y as an array",
    "jc.Problem(data, data.search, 2)": "expected a jc.Bank, got Dataset of 7",
    "jc.run(key, search, problem, budget=9, save_every=0)": "expected save_every in seconds",
    "jc.run(key, search, problem, budget=9, max_seconds=0)": "expected max_seconds in seconds",
    "jc.run(key, search, problem, budget=9, max_seconds=np.nan)": "expected max_seconds in seconds",
    "jc.run(key, search, problem, budget=9, record='loss')": 'expected record to be "chains"',
    "jc.plot.curve([1])": "expected a jc.Result or several, got list of 1",
    "problem.with_data(data)": "expected one split of data, such as data.search or",
    "problem.with_data(data.search.x)": "got an array float32[35, 13]",
    "data.standardize(data.search.x[0])": "expected x of shape [B, 13], got [13]",
    "jc.chain.pad([0, 4])": "expected chains of integer tokens, got 0 among [0, 4]",
    "jc.chain.pad([[0.0, 4.0]])": "expected chains of integer tokens, got [0.0, 4.0] among",
    "jc.run(key, jc.LocalSearch, problem, budget=100)": "got the class LocalSearch",
    "jc.run(key, 'local', problem, budget=100)": "decorated with @jc.pytree_dataclass, got str",
    "jc.run(key, search, bank, budget=100)": "expected a jc.Problem, got Bank",
    "jc.run(0, search, problem, budget=100)": "expected one key of jax.random.key",
    "jc.run(key, search, problem, budget=100.5)": "expected budget to be an integer, got 100.5",
    "jc.run(key, search, problem, budget='9')": "expected budget to be an integer, got '9'",
    "jc.evaluate(bank, chains)": "expected a jc.Problem, got Bank",
    "jc.evaluate(problem, chains * 1.0)": "expected chains of integer tokens, got dtype float64",
    "jc.evaluate(problem, chains, dtype='float8')": "jnp.bfloat16 or jnp.float32, got 'float8'",
    "jc.evaluate(problem, chains, dtype=Tensor)": "expected a dtype of jnp.bfloat16 or",
    "jc.Bank.stack(jc.layers.Dense, [params], head, [head_params])": "got the class Dense",
    "jc.Bank.stack(Linear(), [params], head, [head_params])": "for layer 0, got torch.Linear",
    "jc.Bank.stack(layer, params, head, [head_params])": "expected a list with the params of each "
    "layer, got dict",
    "jc.Bank.stack(layer, [{'a': Tensor()}], head, [head_params])": "params of layer 0: expected "
    "an array at ['a'], got torch.Tensor",
    "jc.Problem(jc.Bank.stack(Pair(), [pair], head, [head_params]), data.search, 1)": "layer0 "
    "(Pair()), token 0, must return an array, got tuple of 2",
    "jc.Problem(jc.Bank.stack(layer, [params], Pair(), [pair]), data.search, 1)": "head0 (Pair()),"
    " token 1, must return an array, got tuple of 2",
    "jc.hub.load(model, pinned=1)": "expected pinned=(first, last), the numbers of blocks to pin "
    "at the start and at the end, got 1",
    "jc.hub.load(model, pinned=(1,))": "at the end, got (1,)",
    "jc.hub.load_many([model], pinned=(0, 0.5))": "at the end, got (0, 0.5)",
    "jc.hub.random_bank(key, model, pinned='10')": "at the end, got '10'",
    "jc.hub.load(model, dtype=Tensor)": "expected dtype to be None, for that of the file, or one "
    "of float32, bfloat16, float16, got <class",
    "jc.hub.load_many([model], dtype='auto')": "bfloat16, float16, got 'auto'",
    "jc.hub.load_many(model)": "expected a list of paths, got '/",
    "jc.hub.load_many([model], names='m')": "expected a list of names, got 'm'",
    "jc.hub.load([model])": "expected the path of one checkpoint, got list of 1; jc.hub.load_many "
    "takes several",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    model = write(tmp_path_factory.mktemp("hub") / "model")
    calls = "".join(f"attempt(lambda: {case})\n" for case in CASES)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT + calls, str(model)],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    return dict(zip(CASES, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_argument_is_named(answers, case):
    assert answers[case].startswith("ValueError: ")
    assert CASES[case] in answers[case]
