import jax
import reference
from conftest import make_bank, make_batch

import jchain as jc


def test_cost_is_the_start_the_backward_pass_and_new_chains():
    bank = make_bank(4, 2, layer=jc.layers.ResidualMLP(5))
    problem = jc.Problem(bank, make_batch(), max_layers=4)
    search = jc.TargetPropagation(num_chains=3, num_candidates=2)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    seen = set()
    for seed in range(12):
        before = state
        state, info = step(jax.random.key(seed), state, problem)
        rows = [tuple(int(token) for token in chain if token >= 0) for chain in info.chains]
        expected = 0
        if before.is_new:
            length = len(rows[0]) - 1
            expected = 4 * int(before.is_start) + length + 12 * length + 2 * min(length + 1, 4)
        rows = rows[1:]
        expected += reference.count_calls([row for row in rows if row not in seen], 4)[0]
        seen.update(rows)
        assert info.layer_calls == expected
