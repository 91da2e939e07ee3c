"""Files with a right checksum and a header that jchain did not write."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import make_bank

import jchain as jc
from jchain.agent.critic import NUM_INPUTS, Network
from jchain.files import read_arrays, write_arrays


def change(value, path, new):
    """Replace a part of a nested value; `path` holds keys and indices."""
    value = json.loads(json.dumps(value))
    node = value
    for key in path[:-1]:
        node = node[key]
    if new is None:
        del node[path[-1]]
    else:
        node[path[-1]] = new
    return value


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (["layers"], None, "cannot read the layers in its header: Field required"),
        (["layers"], {}, "cannot read the layers in its header: Input should be a valid list"),
        (["layers", 0], 7, "cannot read the layers.0 in its header"),
        (["layers", 0, "tokens"], [0, 7, 1, 2], "expected layers with the tokens 0, 1, ..."),
        (["layers", 0, "tokens"], [0, 0, 1, 2], "expected different tokens of at least 0"),
        (["layers", 0, "tokens"], [-1, 0, 1, 2], "cannot read the layers.0.tokens.0"),
        (["layers", 0, "tokens"], [0, 1, 2], "expected params with 3 rows in each array"),
        (["layers", 0, "tokens"], [0, 1, 2, 2.5], "cannot read the layers.0.tokens.3"),
        (["heads", 0, "tokens"], [3, 4], "expected heads with the tokens 4, 5, ..."),
        (["layers", 0, "module"], "os.system", "unknown module 'os.system'"),
        (["layers", 0, "module"], None, "expected a module and its fields"),
        (["layers", 0, "fields"], {"x": 1}, "does not have the fields that were saved"),
        (["layers", 0, "fields", "hidden"], {"jax.nn": "__getattr__"}, "a function of jax.nn"),
        (["layers", 0, "fields", "hidden"], {"jax.nn": "initializers"}, "a function of jax.nn"),
        (["layers", 0, "fields", "hidden"], {"dtype": "object"}, "expected a tuple, a module"),
        (["layers", 0, "fields", "hidden"], {"a": 1, "b": 2}, "expected one kind of value"),
        (["layers", 0, "stages"], [0], "cannot read the layers.0.stages"),
        (["names"], ["a"], "expected 6 names, one per layer and head, got 1"),
        (["names", 0], 3, "cannot read the names.0"),
        (["parents"], [[0, 99]], "token 99 at slot 1 is out of range"),
        (["num_steps"], -1, "cannot read the num_steps"),
        (["more"], 1, "cannot read the more in its header: Extra inputs are not permitted"),
        (["stem"], {"module": "flax.linen.Dense"}, "expected a module and its fields"),
    ],
)
def test_a_header_that_is_not_of_a_bank_is_named(tmp_path, path, new, message):
    file = tmp_path / "bank.safetensors"
    make_bank().save(file)
    header, arrays = read_arrays(file)
    write_arrays(file, change(header, path, new), arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        jc.Bank.load(file)
    assert str(error.value).startswith(f"{file}: ")


def test_a_deep_header_is_refused(tmp_path):
    deep = {"tuple": []}
    for _ in range(300):
        deep = {"tuple": [deep]}
    file = tmp_path / "bank.safetensors"
    make_bank().save(file)
    header, arrays = read_arrays(file)
    write_arrays(file, change(header, ["layers", 0, "fields", "hidden"], deep), arrays)
    with pytest.raises(ValueError, match="does not have the fields|nested too deeply"):
        jc.Bank.load(file)


def make_critic(width=4):
    params = Network(width).init(jax.random.key(0), jnp.zeros(NUM_INPUTS))["params"]
    return jc.Critic(params, jnp.zeros(NUM_INPUTS), jnp.ones(NUM_INPUTS), width)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", 10**9, "cannot read the width in its header"),
        ("width", "4", "cannot read the width in its header"),
        ("width", 5, "expected the arrays of a network of width 5"),
        ("more", 5, "cannot read the more in its header"),
    ],
)
def test_a_header_that_is_not_of_a_critic_is_named(tmp_path, name, value, message):
    file = tmp_path / "critic.safetensors"
    make_critic().save(file)
    header, arrays = read_arrays(file)
    write_arrays(file, header | {name: value}, arrays)
    with pytest.raises(ValueError, match=message):
        jc.Critic.load(file)


def test_files_of_another_kind_are_named(tmp_path):
    make_critic().save(tmp_path / "critic")
    make_bank().save(tmp_path / "bank")
    with pytest.raises(ValueError, match="expected a bank, got a critic of prefixes"):
        jc.Bank.load(tmp_path / "critic")
    with pytest.raises(ValueError, match="expected a .*critic"):
        jc.Critic.load(tmp_path / "bank")


def test_weights_of_integers_are_no_critic(tmp_path):
    file = tmp_path / "critic.safetensors"
    make_critic().save(file)
    header, arrays = read_arrays(file)
    write_arrays(file, header, {name: array.astype("int32") for name, array in arrays.items()})
    with pytest.raises(ValueError, match="got other shapes or dtypes"):
        jc.Critic.load(file)
