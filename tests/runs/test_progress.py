import jax

import jchain as jc


def test_the_progress_line_shows_calls_and_loss(problem, capsys):
    result = jc.run(
        jax.random.key(0), jc.RandomSearch(num_chains=2), problem, budget=30, progress=True
    )
    shown = capsys.readouterr()
    assert " of 30 layer calls" in shown.err
    assert f"best loss {result.best_loss:.4f}" in shown.err
    assert shown.out == ""
