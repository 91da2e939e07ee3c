"""Policies, searches, and a runner that the tests of update policies share."""

import jax
import numpy as np
import optax
from conftest import make_batch

import jchain as jc
from jchain import updates

SEARCH = jc.LocalSearch(num_chains=3)
AGENT = jc.ActorCritic(encoding=jc.TokenEncoding(features=8), num_chains=6, num_elites=4)
ADAM = optax.adam(0.01)
POLICIES = {
    "Frozen": updates.Frozen(),
    "TuneFound": updates.TuneFound(num_steps=5, optimizer=ADAM),
    "CloneThenTune": updates.CloneThenTune(num_rounds=3, num_steps=5, optimizer=ADAM),
    "SharedUpdates": updates.SharedUpdates(num_updates=2, optimizer=ADAM),
}
BUDGET = 1200
TRAIN = make_batch(20, seed=7)


def run(policy, problem, search=None, seed=0, budget=BUDGET, **kwargs):
    """Run a policy, by default with an agent if the policy changes weights during the search."""
    if search is None:
        needs_agent = isinstance(policy, (updates.SharedUpdates, updates.CloneThenTune))
        search = AGENT if needs_agent else SEARCH
    return policy.run(jax.random.key(seed), search, problem, TRAIN, budget=budget, **kwargs)


def is_equal(a, b):
    """Return whether all leaves of two trees are equal."""
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
