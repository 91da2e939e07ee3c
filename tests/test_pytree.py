import jax
import optax

from jchain.pytree import get_first_line


def test_a_problem_is_a_pytree_that_jit_does_not_check_again(problem):
    again = jax.jit(lambda p: p)(problem)
    assert jax.tree.structure(again) == jax.tree.structure(problem)
    assert again.loss_fn is optax.softmax_cross_entropy_with_integer_labels


def test_what_jit_and_tree_functions_put_into_leaves_can_be_printed(problem):
    printed = []

    @jax.jit
    def trace(problem):
        printed.append(repr(problem))
        return problem.data.y.sum()

    trace(problem)
    assert printed == [repr(problem)]
    leaves, structure = jax.tree.flatten(problem)
    assert repr(structure.unflatten([object()] * len(leaves))).startswith("Problem(Bank(4 layers")
    children = jax.tree.map(lambda _: None, problem, is_leaf=lambda node: node is not problem)
    assert repr(children) == "Problem(None, ..., max_layers=3, min_layers=0)"
    groups = jax.tree.map(lambda _: 0, problem.bank, is_leaf=lambda node: node is not problem.bank)
    assert repr(groups) == "Bank(...; ...)"


def test_the_first_line_of_an_error_without_text_is_its_type():
    assert get_first_line(ValueError("one\ntwo")) == "one"
    assert get_first_line(AssertionError()) == "AssertionError"
