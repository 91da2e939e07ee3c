import itertools
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.agent.observations import NUM_FEATURES, observe
from jchain.chain import ChainSpace
from jchain.chainbench import problems as chainbench
from jchain.data import EVALUATION_SPLITS
from jchain.files import read_arrays, write_arrays

NAME = "wine-random-0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chainbench")
    assert chainbench.build(path, [NAME]) == [NAME]
    return path


def make_solved(loss):
    """Make a solved problem of two layers and one head, which has 31 chains."""
    data = jc.Dataset(*[make_batch()] * 4, name="data", num_classes=3)
    losses = {split: np.asarray(loss, np.float32) for split in EVALUATION_SPLITS}
    return chainbench.SolvedProblem(
        "toy", make_bank(2, 1), data, losses, losses, np.zeros((15, NUM_FEATURES))
    )


def test_there_are_36_problems():
    assert len(set(chainbench.NAMES)) == 36


@pytest.mark.slow
def test_a_solved_problem_has_the_losses_of_evaluate(folder):
    solved = chainbench.load(folder, NAME)
    assert len(solved.chains) == ChainSpace(12, 1, 4).num_chains == 22_621
    rows = np.random.default_rng(0).integers(0, len(solved.chains), 50)
    for split in EVALUATION_SPLITS:
        out = jc.evaluate(solved.problem_on(split), solved.chains[rows])
        np.testing.assert_allclose(solved.loss[split][rows], out.loss, rtol=1e-5)
        np.testing.assert_allclose(solved.accuracy[split][rows], out.accuracy)
    np.testing.assert_array_equal(
        jc.evaluate(solved.tabular_problem(), solved.chains[rows]).loss, solved.loss["search"][rows]
    )
    x, layers = solved.problem.data.x, solved.bank.layers[0]
    assert solved.features.shape == (1 + 12 + 144 + 1728, NUM_FEATURES)
    hidden = layers.apply(5, layers.apply(2, x))
    expected = observe(solved.problem, hidden, layers.apply(2, x)).features
    np.testing.assert_allclose(solved.features[1 + 12 + 2 * 12 + 5], expected, rtol=1e-3, atol=1e-4)
    result = chainbench.describe(solved)
    assert result["best"] == pytest.approx(float(solved.loss["search"].min()))
    assert (
        0
        < result["within_1_percent"]
        <= result["within_5_percent"]
        <= result["within_10_percent"]
        < 1
    )
    assert result["best_on_test"] >= 1


def test_a_built_problem_is_not_built_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert chainbench.build(folder, [NAME]) == []
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_bad_folders_and_names_raise(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a solved problem at .*wine-random-0"):
        chainbench.load(tmp_path, NAME)
    for name in (
        "wine-random",
        "wine-random-x",
        "wine-random-01",
        "iris-random-0",
        "wine-trained-0",
        "wine-random-0-0",
    ):
        with pytest.raises(ValueError, match="expected a problem DATA-KIND-SEED"):
            chainbench.build(tmp_path, [name])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected num_layers to be a multiple of depth"):
        chainbench.make_bank("wine-independent-0", num_layers=10)


def test_a_damaged_table_or_one_of_another_bank_raises(folder, tmp_path):
    table, bank = f"{NAME}.table.safetensors", f"{NAME}.bank.safetensors"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    loaded = jc.Bank.load(tmp_path / bank)
    chainbench.load(tmp_path, NAME)
    loaded.take([1, 0, *range(2, 12)]).save(tmp_path / bank)
    for use in (chainbench.load, lambda path, name: chainbench.build(path, [name])):
        with pytest.raises(ValueError, match="was solved for another bank or data"):
            use(tmp_path, NAME)
    shutil.copy(folder / bank, tmp_path / bank)
    whole = (tmp_path / table).read_bytes()
    (tmp_path / table).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged, truncated"):
        chainbench.load(tmp_path, NAME)
    header, arrays = read_arrays(folder / table)
    shorter = {name: np.asarray(array)[:, :-1] for name, array in arrays.items()}
    write_arrays(tmp_path / table, {key: header[key] for key in ("name", "solves")}, shorter)
    with pytest.raises(ValueError, match="expected arrays .*delete it and build it again"):
        chainbench.load(tmp_path, NAME)


def test_local_optima_equal_brute_force():
    loss = np.random.default_rng(0).permutation(31) + 1
    solved = make_solved(loss)
    chains = [tuple(t for t in chain if t in (0, 1)) for chain in solved.chains.tolist()]
    loss_of = dict(zip(chains, loss, strict=True))

    def neighbors(chain):
        for i, token in itertools.product(range(len(chain)), (0, 1)):
            yield (*chain[:i], token, *chain[i + 1 :])
        for i, token in itertools.product(range(len(chain) + 1), (0, 1)):
            if len(chain) < 4:
                yield (*chain[:i], token, *chain[i:])
        for i in range(len(chain)):
            yield (*chain[:i], *chain[i + 1 :])

    expected = [all(loss_of[n] >= loss_of[chain] for n in neighbors(chain)) for chain in chains]
    assert 0 < sum(expected) < 31
    np.testing.assert_array_equal(chainbench.find_local_optima(solved), expected)
    described = chainbench.describe(solved)
    assert described["local_optima"] == pytest.approx(np.mean(expected))
    assert described["search_to_test"] == pytest.approx(1)


def test_regret_by_hand():
    solved = make_solved(np.arange(31) + 2.0)
    np.testing.assert_allclose(solved.regret([2.0, 17.0, 32.0]), [0, 1, 2])


def test_index_is_the_place_in_enumerate():
    for sizes in ((3, 2, 3), (1, 3, 2), (12, 1, 2), (2, 1, 0)):
        space = ChainSpace(*sizes)
        chains = space.enumerate()
        np.testing.assert_array_equal(space.index(jnp.asarray(chains)), np.arange(len(chains)))
    with pytest.raises(ValueError, match=r"expected fewer than 2\^31 chains, got"):
        ChainSpace(48, 1, 12).index(jnp.zeros(13, int))
