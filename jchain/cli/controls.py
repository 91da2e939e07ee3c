"""Controls: the nets, edits, ensembles, and searches to compare with the chain that was found."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Array, Key
from jchain.bank import Bank
from jchain.cli.config import require
from jchain.cli.context import Context, strip
from jchain.cli.interruption import get_name, raise_if_stopped
from jchain.cli.progress import print_progress, show_phase
from jchain.cli.records import Controls, RandomChains, ScoredChain, Scores, finite_or_none
from jchain.cli.scores import ExampleScores, score_ensemble
from jchain.engine.evaluation import evaluate, evaluate_all
from jchain.problem import Problem
from jchain.runs.driver import run
from jchain.runs.result import BudgetError
from jchain.search.actor_critic import ActorCritic
from jchain.search.local_search import LocalSearch
from jchain.search.protocol import Search
from jchain.updates import tune

# The plain net is tuned on `search` for each of these numbers of gradient steps, and the loss on
# `select` decides which of them is used.
TUNING_STEPS = (30, 100, 300)
# Searches that are run for comparison, with the same budget as the requested search.
RIVALS: dict[str, type[Search]] = {"local_search": LocalSearch, "actor_critic": ActorCritic}

_Scored = TypeVar("_Scored", Scores, ScoredChain)


class Net(NamedTuple):
    """A net, given as a bank and a chain of its tokens."""

    bank: Bank
    tokens: list[int]


class ReferenceLoss(NamedTuple):
    """A loss on `search` without layer penalty, and the layer penalty to add to it."""

    loss: float | None
    penalty: float


class ControlScores(NamedTuple):
    """Scores of the controls, and the losses that are drawn next to the search's curve."""

    controls: Controls
    optimum: ReferenceLoss
    reference_losses: dict[str, ReferenceLoss]
    stopped_by: str | None = None  # the signal that stopped the scoring; later ones are missing


def score_controls(
    key: Key[Array, ""],
    context: Context,
    found: ExampleScores,
    finalists: tuple[Bank, Sequence[Sequence[int]]],
    search: Search,
) -> ControlScores:
    """Score every control that applies.

    Controls that are chains of the bank use it as it was before any update, except for the ensemble
    of the finalists. If scoring is interrupted, the controls that were scored so far are returned,
    so that the result of the search is not lost.

    Args:
      key: the PRNG key for the plain net, the random chains, and the searches to compare with.
      context: the state that all steps share.
      found: scores of the chain that was found.
      finalists: the bank after updates, and the finalists of the search.
      search: the search whose result is compared with the controls.
    """
    scored = ControlScores({"recipes": {}}, ReferenceLoss(None, 0.0), {})
    try:
        optimum = _score_all(scored, key, context, found, finalists, search)
    except KeyboardInterrupt as error:
        print_progress("Interrupted: the remaining controls are not scored")
        return scored._replace(stopped_by=get_name(error))
    return scored._replace(
        optimum=optimum, reference_losses=scored.reference_losses | {"optimum": optimum}
    )


def _score_all(
    scored: ControlScores,
    key: Key[Array, ""],
    context: Context,
    found: ExampleScores,
    finalists: tuple[Bank, Sequence[Sequence[int]]],
    search: Search,
) -> ReferenceLoss:
    """Add the controls to `scored` one by one, and return the optimum."""
    net_key, tune_key, chain_key, search_key = jax.random.split(key, 4)
    controls, reference_losses = scored.controls, scored.reference_losses
    if reference := context.setup.reference:
        scores = _compare(context, found, Net(context.original_bank, [*reference]))
        controls["reference"] = {"chain": [*reference], **scores}
    if context.original_bank.parents:
        parent = Net(
            context.original_bank,
            context.pick(context.original_bank, context.original_bank.parents),
        )
        scores = _compare(context, found, parent)
        controls["best_parent"] = scores
        reference_losses["best parent"] = _find_reference_loss(context, parent, scores)
        if context.setup.has_slow_controls:
            _score_parents(controls, context, found, parent)
    if context.setup.make_plain_net is not None:
        num_steps = context.original_bank.num_steps
        net = _train_plain_net(net_key, context.setup.make_plain_net, num_steps)
        controls["plain_net"] = _compare(context, found, net)
        if context.setup.has_slow_controls:
            controls["tuned_plain_net"] = _compare(context, found, _tune(tune_key, context, net))
        reference_losses["plain net"] = _find_reference_loss(context, net, controls["plain_net"])
    controls["random_chains"] = _score_random_chains(chain_key, context)
    if context.setup.has_slow_controls:
        ensemble = score_ensemble(context.setup, *finalists, context.padded_layers)
        if ensemble is not None:
            controls["finalist_ensemble"] = _add_difference(ensemble.summarize(), found, ensemble)
        for name, rival in RIVALS.items():
            if not isinstance(search, rival):
                scores = _run_rival(search_key, context, found, name, rival())
                if scores is not None:
                    controls[name] = scores
    return _find_optimum(context)


def _score_parents(controls: Controls, context: Context, found: ExampleScores, parent: Net) -> None:
    """Score the best edit of the best parent, and the ensemble of all parents."""
    edit = _find_best_edit(context, parent.tokens)
    if edit is not None:
        scores = _compare(context, found, Net(context.original_bank, edit))
        controls["best_edit"] = {"chain": edit, **scores}
    ensemble = score_ensemble(
        context.setup, context.original_bank, context.original_bank.parents, context.padded_layers
    )
    if ensemble is not None and len(context.original_bank.parents) > 1:
        controls["parent_ensemble"] = _add_difference(ensemble.summarize(), found, ensemble)


def _compare(context: Context, found: ExampleScores, net: Net) -> Scores:
    scores = context.score(net.bank, net.tokens)
    return _add_difference(scores.summarize(), found, scores)


def _add_difference(scores: _Scored, found: ExampleScores, own: ExampleScores) -> _Scored:
    scores["difference"] = found.subtract(own)
    return scores


def _find_reference_loss(context: Context, net: Net, scores: Scores) -> ReferenceLoss:
    problem = context.setup.make_problem(net.bank, "search", context.padded_layers)
    padded = jnp.asarray(chain_lib.pad([net.tokens], context.padded_layers))
    return ReferenceLoss(scores["loss"]["search"], float(problem.penalty(padded)[0]))


def _find_best_edit(context: Context, tokens: list[int]) -> list[int] | None:
    """Find the edit of a chain that has the lowest loss on `search`.

    An edit is a swap, insertion, or deletion of one layer, or a swap of the head, as in
    `ChainSpace.neighbors`. The result is None if the chain is too long or short for the problem.
    """
    problem = context.problem
    if not problem.min_layers < len(tokens) <= problem.max_layers + 1:
        return None
    chain = jnp.asarray(chain_lib.pad([tokens], problem.max_layers)[0])
    rows, is_neighbor = problem.space.neighbors(chain)
    # Rows that are not neighbors hold the chain itself, so that the number of rows never changes.
    rows = jnp.where(is_neighbor[:, None], rows, chain)
    edits, mask = np.asarray(rows), np.asarray(is_neighbor)
    losses = np.asarray(evaluate(problem, edits).loss)
    return strip(edits[int(np.argmin(np.where(mask, losses, np.inf)))])


def _train_plain_net(
    key: Key[Array, ""], make: Callable[[Key[Array, ""], int], Bank], num_steps: int
) -> Net:
    """Train one net for `num_steps`, the total number of steps that the bank was trained for."""
    with show_phase(f"Training a plain net for {num_steps:,} steps"):
        bank = jax.block_until_ready(make(key, num_steps))
    return Net(bank, list(bank.parents[0]))


def _tune(key: Key[Array, ""], context: Context, net: Net) -> Net:
    """Train the plain net further on `search`; the loss on `select` decides how many steps."""
    problem = Problem(
        net.bank, context.setup.data.search, context.padded_layers, loss_fn=context.setup.loss_fn
    )
    chain = chain_lib.pad([net.tokens], context.padded_layers)
    banks = [net.bank]
    with show_phase(f"Training it further on the {len(problem.data.y):,} examples of search"):
        for num_steps in TUNING_STEPS:
            banks.append(tune.tune_chain(key, problem, chain[0], num_steps=num_steps))
    losses = []
    for bank in banks:
        on_select = context.setup.make_problem(
            bank, "select", context.padded_layers, is_penalized=False
        )
        losses.append(float(evaluate(on_select, chain).loss[0]))
    return Net(banks[int(np.argmin(losses))], net.tokens)


def _score_random_chains(key: Key[Array, ""], context: Context) -> RandomChains:
    """Compute the median and the quartiles on `test` of chains that are drawn uniformly."""
    chains = np.asarray(context.problem.space.sample(key, context.setup.num_random_chains))
    if context.config.checkpoint:
        rows = [strip(row) for row in chains]
        scores = context.scorer.score(context.original_bank, rows, ("test",))
        loss, accuracy = (
            np.array([getattr(one, field)["test"].mean() for one in scores])
            for field in ("loss", "accuracy")
        )
        loss = np.where(np.isfinite(loss), loss, np.inf)
    else:
        problem = context.setup.make_problem(
            context.original_bank, "test", context.max_layers, is_penalized=False
        )
        out = evaluate(problem, chains)
        loss, accuracy = np.asarray(out.loss), np.asarray(out.accuracy)
    return {
        "num_chains": len(chains),
        "loss": {"test": finite_or_none(np.median(loss))},
        "accuracy": {"test": float(np.median(accuracy))},
        "quartiles": [finite_or_none(q) for q in np.quantile(loss, (0.25, 0.75))],
    }


def _run_rival(
    key: Key[Array, ""], context: Context, found: ExampleScores, name: str, search: Search
) -> ScoredChain | None:
    """Run another search with the same budget, and re-rank its finalists in the same way.

    The result is None if the budget is too small, or if no chain that was scored has a finite loss.
    """
    title = name.replace("_", " ")
    print_progress(f"Searching with {title} ...")
    budget = require(context.config.budget)
    try:
        result = run(
            key, search, context.problem, budget=budget, progress=True, starts=context.starts
        )
    except BudgetError as error:
        print_progress(f"No {title} to compare with: {error}")
        return None
    raise_if_stopped(result)
    if len(result.finalists) == 0:
        print_progress(f"No {title} to compare with: none of its chains has a finite loss")
        return None
    tokens = context.pick(context.original_bank, [strip(row) for row in result.finalists])
    return {"chain": tokens, **_compare(context, found, Net(context.original_bank, tokens))}


def _find_optimum(context: Context) -> ReferenceLoss:
    """Find the lowest loss of all chains on `search`; it is None if there are too many chains."""
    num_chains = context.problem.space.num_chains
    if num_chains > context.setup.max_optimum_chains:
        return ReferenceLoss(None, 0.0)
    with show_phase(f"Evaluating all {num_chains:,} chains for the optimum"):
        chains, out = evaluate_all(context.problem)
    best = int(out.loss.argmin())
    penalty = float(context.problem.penalty(jnp.asarray(chains[best])))
    return ReferenceLoss(finite_or_none(out.loss[best] - penalty), penalty)
