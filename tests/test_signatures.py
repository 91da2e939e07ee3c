"""Exported functions name their arguments, reject unknown ones, and document each of them."""

import importlib
import inspect
import re
from types import ModuleType

import pytest

import jchain as jc

PACKAGES = (
    "agent",
    "chainbench",
    "engine",
    "gradient",
    "hub",
    "inverse",
    "plot",
    "tasks",
    "updates",
)
MODULES = (
    "jchain.align",
    "jchain.chain",
    "jchain.data",
    "jchain.env",
    "jchain.files",
    "jchain.images",
    "jchain.train",
    "jchain.agent.observations",
    "jchain.agent.pretrain",
    "jchain.agent.rewards",
    "jchain.chainbench.stats",
    "jchain.chainbench.tabular",
    "jchain.engine.distributed",
    "jchain.engine.score_cache",
    "jchain.gradient.layer_report",
    "jchain.gradient.trends",
    "jchain.hub.recipes",
    "jchain.inverse.target_scores",
    "jchain.updates.tune",
)


def list_exported():
    """List public functions and classes by their dotted names."""
    found = {f"jc.{name}": getattr(jc, name) for name in jc.__all__}
    for package in PACKAGES:
        module = getattr(jc, package)
        found |= {f"jc.{package}.{name}": getattr(module, name) for name in module.__all__}
    for name in MODULES:
        module = importlib.import_module(name)
        found |= {
            f"{name}.{key}": value
            for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", "") == name
        }
    return {
        name: value
        for name, value in sorted(found.items())
        if callable(value) and not isinstance(value, ModuleType)
    }


EXPORTED = list_exported()
FUNCTIONS = {name: value for name, value in EXPORTED.items() if not inspect.isclass(value)}
# These accept a pytree dataclass's fields or any keyword of dataclasses.field.
OPEN = {"jc.static"}


def list_methods():
    """List public methods of exported classes, and the constructors of these classes."""
    for name, cls in EXPORTED.items():
        if not inspect.isclass(cls) or not cls.__module__.startswith("jchain"):
            continue
        for key, method in vars(cls).items():
            function = getattr(method, "__func__", method)
            if not key.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{key}", function


CALLABLES = FUNCTIONS | dict(list_methods())


@pytest.mark.parametrize("name", sorted(set(CALLABLES) - OPEN))
def test_no_function_swallows_unknown_arguments(name):
    parameters = inspect.signature(CALLABLES[name]).parameters.values()
    assert not [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - OPEN))
def test_an_unknown_argument_is_named(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    with pytest.raises(TypeError, match="misspelt"):
        FUNCTIONS[name](**dict.fromkeys(required), misspelt=1)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_argument_is_documented(name):
    function = FUNCTIONS[name]
    parameters = [p for p in inspect.signature(function).parameters if p != "self"]
    docstring = inspect.getdoc(function) or ""
    assert docstring, f"{name} has no docstring"
    section = docstring.partition("Args:\n")[2]
    documented = set(re.findall(r"^ +\*{0,2}(\w+)(?: \(.*?\))?:", section, re.MULTILINE))
    missing = [parameter for parameter in parameters if parameter not in documented]
    assert not missing, f"{name} does not document {missing}"
