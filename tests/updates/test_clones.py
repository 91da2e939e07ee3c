import jax
import jax.numpy as jnp
import numpy as np
from policy_cases import ADAM

import jchain as jc
from jchain.updates.clones import CloneBank


def test_free_tokens_are_replaced_by_the_layers_they_copy(two_group_problem):
    clone_bank = CloneBank.reserve(two_group_problem.bank, 4)
    chains = np.array([[5, 8, 13, -1], [4, 12, 14, -1]])
    renamed = clone_bank.replace_free_tokens(jnp.asarray(chains))
    np.testing.assert_array_equal(renamed, [[0, 0, 13, -1], [4, 4, 14, -1]])
    grown = two_group_problem.with_bank(clone_bank.bank)
    np.testing.assert_array_equal(jc.evaluate(grown, chains).loss, jc.evaluate(grown, renamed).loss)


def test_banks_without_names_can_be_cloned(two_group_problem):
    clone_bank = CloneBank.reserve(two_group_problem.bank.without_names(), 4)
    chain = np.array([0, 13, -1, -1])
    clone_bank, clones = clone_bank.tune_clones(
        jax.random.key(0), two_group_problem.without_names(), chain, num_steps=1, optimizer=ADAM
    )
    assert clones[0] != 0
    assert not clone_bank.bank.names
