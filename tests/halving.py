"""Successive halving by plain loops over lists, with losses from the slow reference."""

import math
from fractions import Fraction

import numpy as np
import reference


def score(problem, chain, start, end):
    return reference.chain_loss(problem.take(slice(start, end)), np.array(chain))[0]


def halve_lists(problem, chains, rungs, rival=None, *, is_first_paid=False):
    """Return the loss of each chain with its number of examples, and the cost in layer calls.

    With `is_first_paid`, the first rung costs nothing.
    """
    rivals = [] if rival is None else [tuple(rival)]
    alive = list(dict.fromkeys(map(tuple, np.asarray(chains).tolist())))
    known, cost, start = {}, Fraction(0), 0
    for i, end in enumerate(rungs.ends):
        is_last = i == len(rungs.ends) - 1
        others = [] if is_last or not alive else rivals
        calls = reference.count_calls([*alive, *others], problem.bank.num_layers)[0]
        if i > 0 or not is_first_paid:
            cost += Fraction(int(calls) * (end - start), problem.num_examples)
        losses = {chain: score(problem, chain, 0, end) for chain in alive}
        known |= {chain: (loss, end) for chain, loss in losses.items()}
        num_kept = math.ceil(rungs.keep * len(alive))
        bar = score(problem, rivals[0], 0, end) if rivals else np.inf
        alive, start = sorted(alive, key=losses.__getitem__)[:num_kept], end
        if i == len(rungs.ends) - 2:  # the next rung is the last one
            alive = [chain for chain in alive if losses[chain] < bar]
    return known, cost
