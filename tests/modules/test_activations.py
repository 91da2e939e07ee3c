import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_bits

from jchain.modules import activations

TREE = {"x": jnp.arange(6.0).reshape(3, 2), "rest": (jnp.arange(3), jnp.ones(3, jnp.bfloat16))}


def test_one_array_is_not_in_a_container():
    assert activations.is_one_array(jnp.ones(3))
    assert activations.is_one_array(jax.ShapeDtypeStruct((3,), jnp.int32))
    for tree in (TREE, (jnp.ones(3),), [jnp.ones(3)], {}, None):
        assert not activations.is_one_array(tree)


def test_errors_describe_all_arrays():
    words = r"expected near of one array, got a dict: \{'rest': \(int32\[3\], bfloat16\[3\]\), 'x'"
    with pytest.raises(ValueError, match=words):
        activations.check_one_array(outputs=jnp.ones(3), near=TREE)
    with pytest.raises(ValueError, match=r"expected outputs of one array, got a dict"):
        activations.to_one_array(TREE, "outputs")
    assert_same_bits(activations.to_one_array([[1.0], [2.0]], "x"), jnp.array([[1.0], [2.0]]))


def test_rows_of_buffers():
    buffer = activations.make_buffer((2, 4), TREE)
    assert buffer["rest"][0].shape == (2, 4, 3)
    assert buffer["rest"][0].dtype == jnp.int32
    filled = activations.put_row(buffer, (1, 2), TREE)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[1, 2], filled), TREE)
    assert all(int((leaf != 0).sum()) <= 6 for leaf in jax.tree.leaves(filled))


def test_floating_leaves_are_taken_put_back_and_joined():
    floating = activations.take_floating(TREE)
    assert floating["rest"][0] is None
    doubled = jax.tree.map(lambda leaf: 2 * leaf, floating)
    put = activations.put_floating(TREE, doubled)
    assert_same_bits(put["rest"][0], TREE["rest"][0])
    assert_same_bits([put["x"], put["rest"][1]], [2 * TREE["x"], 2 * TREE["rest"][1]])
    expected = [[1.0, 0.0, 1.0], [1.0, 2.0, 3.0], [1.0, 4.0, 5.0]]
    np.testing.assert_array_equal(activations.join_floating(TREE), expected)
    one = jnp.arange(6).reshape(3, 2)
    assert activations.join_floating(one) is one
    with pytest.raises(ValueError, match=r"floating-point activations.*\(int32\[3, 2\],\)"):
        activations.join_floating((one,))


def test_products_reach_floating_leaves_only():
    def layer(x):
        number, vector = x["rest"]
        return {"x": x["x"] * number[:, None], "rest": (number + 1, vector * x["x"][:, 0])}

    tree = TREE | {"rest": (jnp.arange(3) + 1, jnp.ones(3))}
    pull = activations.pull_back_floating(layer, tree)
    found = pull(activations.take_floating(jax.tree.map(jnp.ones_like, tree)))
    assert found["rest"][0] is None
    np.testing.assert_array_equal(found["x"], [[2.0, 1.0], [3.0, 2.0], [4.0, 3.0]])
    np.testing.assert_array_equal(found["rest"][1], tree["x"][:, 0])
