import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.gradient.layer_report import report_layers


def test_reports_equal_a_loop_over_examples(two_group_problem):
    """Layers have two modules, and the 9 examples are a chunk of 8 and a remainder of 1."""
    problem, chain = two_group_problem, np.array([1, 4, 2, 6])
    reports = report_layers(problem, chain)
    assert [report.name for report in reports] == [problem.bank.names[token] for token in chain[:3]]
    found = [problem.bank.layers[0], problem.bank.layers[1], problem.bank.layers[0]]
    places = [group.tokens.index(token) for group, token in zip(found, chain, strict=False)]
    owns = [
        jax.tree.map(lambda leaf, i=i: leaf[i], group.params)
        for group, i in zip(found, places, strict=True)
    ]
    head = problem.bank.heads[0]

    def loss(owns, i):
        hidden = problem.data.x[i : i + 1]
        for group, params in zip(found, owns, strict=True):
            hidden = group.module.apply({"params": params}, hidden)
        return problem.loss_fn(head.apply(head.tokens.index(6), hidden), problem.data.y[i : i + 1])[
            0
        ]

    each = [jax.grad(loss)(owns, i) for i in range(9)]
    gradient = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *each)
    fisher = jax.tree.map(lambda *leaves: np.mean(np.square(leaves), axis=0), *each)
    for report, own, g, f in zip(reports, owns, gradient, fisher, strict=True):
        for module, tensors in own.items():
            for name, weights in tensors.items():
                tensor = report.tensors[f"{module}/{name}"]
                np.testing.assert_array_equal(tensor.weights, weights)
                np.testing.assert_allclose(tensor.gradient, g[module][name], rtol=1e-4, atol=1e-7)
                np.testing.assert_allclose(tensor.fisher, f[module][name], rtol=1e-4, atol=1e-9)
                np.testing.assert_allclose(
                    tensor.importance, np.abs(weights * g[module][name]), rtol=1e-4, atol=1e-7
                )
    total = reports[0].reduce()
    assert total[""]["fisher"] == pytest.approx(
        sum(part["fisher"] for path, part in total.items() if path)
    )
    kernel = reports[0].tensors["Dense_0/kernel"]
    assert total["Dense_0/kernel"]["gradient"] == pytest.approx(
        np.sqrt(np.mean(kernel.gradient**2))
    )


def test_report_layers_rejects_bad_input(problem):
    with pytest.raises(ValueError, match=r"expected one chain of shape \[4\], got \[1, 4\]"):
        report_layers(problem, np.array([[2, 0, 3, 5]]))
    with pytest.raises(ValueError, match="has no head token"):
        report_layers(problem, np.array([2, 0, 3, 1]))
    broken = jc.Problem(
        problem.bank, problem.data, 3, loss_fn=lambda outputs, y: jnp.log(outputs[:, 0] * 0 - 1)
    )
    with pytest.raises(ValueError, match="expected a chain of finite loss, got nan"):
        report_layers(broken, np.array([2, 0, 3, 5]))
