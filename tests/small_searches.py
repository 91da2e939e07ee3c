"""Every search, with sizes that suit tiny problems."""

import jchain as jc

# These need a bank of invertible layers.
INVERTIBLE = ("SuffixBeamSearch",)
# These find only chains that keep the order of the parents.
ORDERED = ("RemovalSearch",)

SEARCHES = {
    "RandomSearch": jc.RandomSearch(num_chains=6),
    "LocalSearch": jc.LocalSearch(num_chains=3),
    "Evolution": jc.Evolution(population_size=12, tournament_size=4, num_chains=6),
    "RemovalSearch": jc.RemovalSearch(width=2, max_width=4, num_chains=3),
    "LocalSearch-moves": jc.LocalSearch(moves=("edits", "runs")),
    "Evolution-moves": jc.Evolution(
        population_size=12, tournament_size=4, num_chains=6, moves=("edits", "runs")
    ),
    "BeamSearch": jc.BeamSearch(max_width=16),
    "CriticSearch": jc.CriticSearch(width=8, epsilon=0.5),
    "LinearizedSearch": jc.LinearizedSearch(),
    "TargetPropagation": jc.TargetPropagation(num_chains=4),
    "SuffixBeamSearch": jc.SuffixBeamSearch(width=4, num_candidates=3, num_probes=5),
    "QLearning": jc.QLearning(num_chains=6, num_replays=8),
    "MCTS": jc.MCTS(num_simulations=6),
    "ActorCritic": jc.ActorCritic(encoding=jc.TokenEncoding(features=8), num_chains=6),
    "ActorCritic-scores": jc.ActorCritic(
        encoding=jc.TokenEncoding(features=8), num_chains=6, score_kind="linearized"
    ),
    "ActorCritic-replay": jc.ActorCritic(
        encoding=jc.TokenEncoding(features=8), num_chains=6, num_replays=4, replay_size=10
    ),
    "ActorCritic-observing": jc.ActorCritic(
        encoding=jc.JointEncoding(
            (
                jc.WeightEncoding(8),
                jc.ObservedEncoding(jc.agent.observations.observe_activations, 8),
            )
        ),
        num_chains=6,
    ),
    "ActorCritic-weights": jc.ActorCritic(encoding=jc.WeightEncoding(features=8), num_chains=6),
}
