"""Pinned blocks, and banks of several models."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc


@pytest.mark.parametrize("pinned", [(0, 0), (1, 1), (1, 0), (0, 1)])
def test_pinned_blocks_are_in_every_chain(tmp_path, pinned):
    folder = write(tmp_path / "model", config={"n_layer": 4}, tensors=make_tensors(4))
    whole, bank = jc.hub.load(folder), jc.hub.load(folder, pinned=pinned)
    first, last = pinned
    assert bank.names[:-1] == tuple(f"model/{i}" for i in range(first, 4 - last))
    chain = [1, 0, 0, bank.num_layers]
    same = [*range(first), first + 1, first, first, *range(4 - last, 4), 4]
    ids = jnp.array([[1, 2, 3, 4]])
    expected = np.asarray(jc.apply_chain(whole, np.array(same), ids))
    np.testing.assert_allclose(
        jc.apply_chain(bank, np.array(chain), ids), expected, rtol=1e-5, atol=1e-5
    )
    out = jc.hub.export(bank, chain, folder, tmp_path / "out")
    again = jc.hub.load(out)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5
    )
    bank.save(tmp_path / "bank.safetensors")
    kept = jc.Bank.load(tmp_path / "bank.safetensors")
    np.testing.assert_array_equal(
        jc.apply_chain(kept, np.array(chain), ids), jc.apply_chain(bank, np.array(chain), ids)
    )


def test_at_least_one_block_is_not_pinned(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"expected fewer pinned blocks than the 2 of the model, at least 0, got \(1, 1\)",
    ):
        jc.hub.load(write(tmp_path / "model"), pinned=(1, 1))


@pytest.mark.parametrize(
    ("pinned", "is_stem_shared"),
    [
        ((1, 1), False),
        pytest.param((0, 0), True, marks=pytest.mark.slow),
        pytest.param((0, 0), False, marks=pytest.mark.slow),
        pytest.param((1, 1), True, marks=pytest.mark.slow),
    ],
)
def test_fine_tunes_of_one_model_are_one_bank(tmp_path, pinned, is_stem_shared):
    models = [make_tensors(4, seed) for seed in range(3)]
    if is_stem_shared:
        for tensors in models[1:]:
            tensors |= {
                name: models[0][name]
                for name in models[0]
                if "h.0." in name or "wte" in name or "wpe" in name
            }
    folders = [
        write(tmp_path / f"m{i}", config={"n_layer": 4}, tensors=tensors)
        for i, tensors in enumerate(models)
    ]
    bank = jc.hub.load_many(folders, pinned=pinned)
    first, last = pinned
    middle = 4 - first - last
    names = [f"m{m}/{i}" for m in range(3) for i in range(first, 4 - last)]
    names += [] if is_stem_shared else ["m1/embeddings", "m2/embeddings"]
    assert bank.names == (*names, "m0/head", "m1/head", "m2/head")
    ids = jnp.array([[1, 2, 3, 4]])
    singles = [jc.hub.load(folder) for folder in folders]
    for single, parent in zip(singles, bank.parents, strict=True):
        expected = jc.apply_chain(single, np.arange(5), ids)
        np.testing.assert_allclose(
            jc.apply_chain(bank, np.array(parent), ids), expected, rtol=1e-5, atol=1e-5
        )
    # The embeddings are those of the last model, and the blocks and head those of the second one.
    # Layer 0 has no effect.
    start = [] if is_stem_shared else [0, 3 * middle + 1]
    chain = [*start, middle, middle + 1, bank.num_layers + 1]
    paths = dict(zip(("m0", "m1", "m2"), map(str, folders), strict=True))
    out = jc.hub.export(bank, chain, paths, tmp_path / "out")
    again = jc.hub.load(out)
    expected = jc.apply_chain(bank, np.array(chain), ids)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5
    )
    assert "output layer of `m1`" in (out / "README.md").read_text()
    assert str(folders[1]) in (out / "mergekit.yaml").read_text()
    problem = jc.Problem(bank, jc.Batch(ids, ids), max_layers=len(chain) - 1)
    loss = jc.evaluate(problem, jc.chain.pad([chain])).loss[0]
    scores = jc.gradient.score_edits(problem, np.array(chain))
    assert float(scores.loss) == pytest.approx(float(loss), rel=1e-5)
    bank.save(tmp_path / "bank.safetensors")
    kept = jc.Bank.load(tmp_path / "bank.safetensors")
    np.testing.assert_array_equal(jc.apply_chain(kept, np.array(chain), ids), expected)
