"""Checks of arguments at the door. Errors name the argument, what was expected, and what came."""

from jchain.arguments.hints import check_fields, checked
from jchain.arguments.values import (
    check_at_least_one,
    check_flags,
    check_functions,
    check_instances,
    check_integers,
    check_numbers,
    is_integer,
    read_array,
    read_numbers,
)

__all__ = [
    "check_at_least_one",
    "check_fields",
    "check_flags",
    "check_functions",
    "check_instances",
    "check_integers",
    "check_numbers",
    "checked",
    "is_integer",
    "read_array",
    "read_numbers",
]
