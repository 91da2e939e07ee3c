import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import apply_layers, make_invertible_bank

from jchain.inverse import enumerate_halves as halves

FEATURES = 4


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("level", [1, 3 * 3 * 8, 10**6])
def test_a_half_holds_every_sequence_in_the_order_of_decode_sequences(
    num_layers, level, monkeypatch
):
    monkeypatch.setattr(halves, "_MAX_LEVEL", level)
    bank = make_invertible_bank(num_layers=3)
    hidden = jax.random.normal(jax.random.key(3), (2, FEATURES))
    half = halves.Half(bank.layers, hidden, num_layers)
    # This is not jitted because a compiled program would not see another size.
    table = halves._sketch.__wrapped__(half.layers, half.hidden, jnp.eye(8), num_layers)
    sequences = halves.decode_sequences(half, np.arange(half.num_sequences))
    assert len({tuple(row) for row in sequences}) == half.num_sequences == 3**num_layers
    wanted = [apply_layers(bank, row, hidden).reshape(-1) for row in sequences]
    np.testing.assert_allclose(table, wanted, rtol=1e-5, atol=1e-6)
