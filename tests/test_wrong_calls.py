"""What is passed in place of something else is named in one line: what was expected, what came.

`wrong_calls.txt` lists the calls. They run in another process, as users make them: here, the tests
check types first.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write
from stopping import ENVIRONMENT

CRITIC = "saved/critic.safetensors"
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
model, bank_file, critic_file = sys.argv[1:]
bank.save(bank_file)
trends = jc.gradient.trends.init(problem)
result = jc.run(key, jc.RandomSearch(4), problem, budget=20)
def attempt(call):
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        print("accepted")
"""
LINES = (Path(__file__).parent / "wrong_calls.txt").read_text().splitlines()[1:]
CASES = dict(zip(LINES[::2], map(str.strip, LINES[1::2]), strict=True))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    files = [write(folder / "model"), folder / "bank", Path(__file__).parent / CRITIC]
    calls = "".join(f"attempt(lambda: {case})\n" for case in CASES)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT + calls, *map(str, files)],
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


def test_there_are_many_cases():
    assert len(CASES) >= 220
    assert all(call.count("(") == call.count(")") for call in CASES)
