"""The decorator that checks arguments against annotations."""

import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_argument import INVALID, LEFT_OUT, find_function, make_calls, make_world
from jaxtyping import Array, Float, Int, Key
from stopping import ENVIRONMENT
from test_signatures import CALLABLES, EXPORTED

import jchain as jc
from jchain._typing import Activations
from jchain.arguments import check_fields, checked

SCRIPT = Path(__file__).parent / "every_argument.py"


@checked
def sample(
    number: float = 1.0,
    count: int = 1,
    flag: bool = True,
    kind: Literal["a", "b"] = "a",
    words: Sequence[str] = (),
    rows: Sequence[Sequence[int]] = (),
    pair: tuple[int, int] = (0, 0),
    many: tuple[float, ...] = (),
    table: Mapping[str, int] | None = None,
    path: str | os.PathLike[str] = "",
    fn: Callable[[int], int] | None = None,
    key: Key[Array, ""] | None = None,
    keys: Key[Array, "S"] | None = None,
    floats: Float[Array, "B F"] | None = None,
    tokens: Int[Array, "*P L"] | Int[np.ndarray, "*P L"] | None = None,
    labels: Int[Array, "B ..."] | None = None,
    x: Activations | None = None,
    problem: jc.Problem | None = None,
) -> str:
    return "called"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("number", "1", "expected number to be a number, got '1'"),
        ("number", np.nan, "expected number to be a number, got nan"),
        ("number", True, "got True"),
        ("count", 1.0, "expected count to be an integer, got 1.0"),
        ("count", True, "an integer, got True"),
        ("flag", 1, "expected flag to be True or False, got 1"),
        ("kind", "c", "expected kind to be one of 'a', 'b', got 'c'"),
        ("words", "ab", "expected words to be a sequence, each item a string, got 'ab'"),
        ("words", ["a", 1], "each item a string, got list of 2"),
        ("words", None, "got None"),
        ("rows", [[1], [2.5]], "each item a sequence, each item an integer"),
        ("rows", np.array([1, 2]), "got an array int64[2]"),
        ("pair", (1,), "expected pair to be a tuple of an integer, an integer, got tuple of 1"),
        ("pair", [1, 2], "got list of 2"),
        ("many", (1.0, "a"), "expected many to be a tuple, each item a number"),
        ("table", {"a": "b"}, "expected table to be a dict, each value an integer or None"),
        ("path", 3, "expected path to be a string or a path, got 3"),
        ("fn", dict, "expected fn to be a function of 1 argument or None, got the class dict"),
        ("key", jax.random.PRNGKey(0), "expected key to be one key of jax.random.key"),
        ("key", jax.random.split(jax.random.key(0)), "one key of jax.random.key"),
        ("keys", jax.random.key(0), "keys of jax.random.key of shape [S]"),
        ("floats", jnp.zeros(2), "an array of floats of shape [B, F] or None, got an array fl"),
        ("floats", jnp.zeros((2, 2), int), "got an array int32[2, 2]"),
        ("floats", [[1.0]], "got list of 1"),
        ("tokens", jnp.array(1), "an array of integers of shape [*P, L] or None"),
        ("x", {"a": jnp.ones(2), "b": 1.0}, "a pytree of arrays, with examples on axis 0"),
        ("x", jnp.ones((0, 2)), "with examples on axis 0"),
        ("problem", "p", "expected problem to be a jc.Problem or None, got 'p'"),
    ],
)
def test_what_an_annotation_does_not_allow_is_named(name, value, words):
    with pytest.raises(ValueError, match=f"^expected {name} to be ") as error:
        sample(**{name: value})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"number": 1, "count": np.int64(2), "flag": np.bool_(True), "kind": "b"},
        {"number": np.inf, "words": ["a"], "rows": [np.array([1, 2]), (3,)], "pair": (1, 2)},
        {"table": {"a": 1}, "path": Path("a"), "fn": len, "key": jax.random.key(0)},
        {"keys": jax.random.split(jax.random.key(0)), "many": (1, 2.5)},
        {"floats": np.zeros((2, 3)), "labels": jnp.zeros((2, 5), int), "x": jnp.ones((4, 2))},
        {"tokens": np.zeros((4, 2, 3), np.int8)},
        {"tokens": jnp.zeros(3, jnp.uint8), "x": {"a": np.ones((2, 3)), "b": np.ones(2, bool)}},
    ],
)
def test_what_an_annotation_allows_is_passed_on(arguments):
    assert sample(**arguments) == "called"


def test_functions_that_take_other_numbers_of_arguments_are_refused():
    for function in (lambda: 0, lambda a, b: 0, lambda *, a: 0):
        with pytest.raises(ValueError, match="expected fn to be a function of 1 argument or None"):
            sample(fn=function)
    for function in (lambda a: a, lambda *rest: 0, lambda a, b=1: 0, max):
        assert sample(fn=function) == "called"


def test_axes_of_one_name_have_one_size():
    with pytest.raises(ValueError, match=r"labels of shape \[B, \.\.\.\] with B = 2, as in floats"):
        sample(floats=jnp.zeros((2, 3)), labels=jnp.zeros((4, 3), int))

    @checked
    def add(a: Float[Array, "*P L"], b: Float[Array, "*P"]) -> None: ...

    add(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"with P = 2, 3, as in a, got \[2\]"):
        add(jnp.zeros((2, 3, 4)), jnp.zeros(2))
    with pytest.raises(ValueError, match="with P = no axes, as in a"):
        add(jnp.zeros(4), jnp.zeros(2))


def test_chains_have_as_many_slots_as_the_problem_allows(problem):
    with pytest.raises(ValueError, match=r"of shape \[L\] with L = 4, as in problem, got \[2\]"):
        jc.env.neighbors(problem, jnp.array([0, 4]))


def test_traced_arguments_are_checked_for_their_rank_and_dtype():
    @checked
    def double(x: Float[Array, "B"], scale: float = 2.0) -> Array:
        return x * scale

    np.testing.assert_array_equal(jax.jit(double)(jnp.ones(2), 3.0), [3, 3])
    np.testing.assert_array_equal(jax.vmap(double)(jnp.ones((2, 2))), 2 * np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"expected x to be an array of floats of shape \[B\]"):
        jax.jit(double)(jnp.ones((2, 2)))


def test_a_misspelt_argument_is_told_before_the_kinds_of_others():
    with pytest.raises(TypeError, match="misspelt"):
        sample("x", misspelt=1)


def test_signature_docstring_and_pickle_are_those_of_the_function():
    assert "memory_limit" in inspect.signature(jc.evaluate).parameters
    assert jc.evaluate.__doc__.startswith("Compute the loss")
    assert pickle.loads(pickle.dumps(jc.evaluate)) is jc.evaluate


def test_fields_of_a_dataclass_are_checked():
    class Point:
        x: int
        y: float | None

    point = Point()
    point.x, point.y = 1, None
    check_fields(point)
    point.y = "2"
    with pytest.raises(ValueError, match="expected y to be a number or None, got '2'"):
        check_fields(point)


def is_checked_by_name(name):
    cls = EXPORTED.get(name.rpartition(".")[0])
    is_module = inspect.isclass(cls) and issubclass(cls, jc.layers.nn.Module)
    is_protocol = getattr(cls, "_is_protocol", False)
    function = inspect.unwrap(CALLABLES[name])
    arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
    return arguments and not is_module and not is_protocol and not name.endswith(LEFT_OUT)


def test_every_public_function_has_a_call_that_is_tried(tmp_path):
    calls = make_calls(make_world(tmp_path))
    tried = {inspect.unwrap(find_function(name)) for name in calls}
    missing = [
        name
        for name, function in CALLABLES.items()
        if is_checked_by_name(name)
        and inspect.unwrap(function).__module__.startswith("jchain")
        and inspect.unwrap(function) not in tried
    ]
    assert not missing
    for name, arguments in calls.items():
        required = {
            parameter.name
            for parameter in inspect.signature(find_function(name)).parameters.values()
            if parameter.default is parameter.empty
        }
        assert required <= set(arguments), name


def run_script(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_outcomes(rows):
    assert not [row for row in rows if row[3].startswith(("raw", "unclear"))]
    assert not [row for row in rows if row[3] == "accepted" and not row[4]]


def test_no_wrong_value_of_any_argument_is_accepted_or_ends_in_a_raw_error():
    rows = run_script()
    assert len(rows) > 25_000
    check_outcomes(rows)


def test_valid_calls_are_valid(tmp_path):
    calls = make_calls(make_world(tmp_path))
    for name in ("jc.evaluate", "jc.apply_chain", "Bank.take", "Problem.penalty", "chain.pad"):
        assert not name.endswith(INVALID)
        find_function(name)(**calls[name])
