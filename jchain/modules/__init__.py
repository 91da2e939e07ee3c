"""Modules of every kind: Flax linen and nnx modules, and pure functions.

Banks apply every module in one way, `module.apply(variables, x)`, where `variables` is a dict of
collections, as in linen. `convert` wraps modules that are not linen modules.
"""

from jchain.modules.checks import (
    check_is_array,
    check_layer,
    check_mean_over_examples,
    check_output_function,
    check_rows,
    check_same_shapes,
    check_stem,
    describe_input,
    infer_output,
)
from jchain.modules.convert import (
    Converted,
    Module,
    ModuleLike,
    apply_module,
    apply_stem,
    convert,
    convert_stem,
    describe_module,
    name_function,
    split_variables,
)
from jchain.modules.functions import FunctionModule
from jchain.modules.nnx import NnxModule, is_nnx
from jchain.modules.output_map import OutputMap, read_output_map, squash
from jchain.modules.staged import StagedModule, unwrap

__all__ = [
    "Converted",
    "FunctionModule",
    "Module",
    "ModuleLike",
    "NnxModule",
    "OutputMap",
    "StagedModule",
    "apply_module",
    "apply_stem",
    "check_is_array",
    "check_layer",
    "check_mean_over_examples",
    "check_output_function",
    "check_rows",
    "check_same_shapes",
    "check_stem",
    "convert",
    "convert_stem",
    "describe_input",
    "describe_module",
    "infer_output",
    "is_nnx",
    "name_function",
    "read_output_map",
    "split_variables",
    "squash",
    "unwrap",
]
