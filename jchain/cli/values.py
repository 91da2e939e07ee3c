"""Values of options that are written as numbers with commas."""

import argparse
from fractions import Fraction

from jchain.search.moves import read_kinds


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parse the sizes of the splits.

    Args:
      text: numbers separated by commas.

    Raises:
      argparse.ArgumentTypeError: if the text has another form.
    """
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected four sizes, as in 5000,1000,1000,1000, got {text!r}"
        ) from None


def parse_fractions(text: str) -> tuple[float, ...]:
    """Parse fractions of the examples.

    Args:
      text: fractions separated by commas, as in 1/16,1/4,1 or 0.1,1.

    Raises:
      argparse.ArgumentTypeError: if the text has another form.
    """
    try:
        return tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ArithmeticError):
        raise argparse.ArgumentTypeError(
            f"expected fractions, as in 1/16,1/4,1, got {text!r}"
        ) from None


def parse_moves(text: str) -> tuple[str, ...]:
    """Parse kinds of moves.

    Args:
      text: kinds separated by commas, as in edits,runs.

    Raises:
      argparse.ArgumentTypeError: if one is not known, or is there twice.
    """
    try:
        return read_kinds(tuple(part.strip() for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_pinned(text: str) -> tuple[int, int]:
    """Parse the numbers of first and last blocks that every chain keeps.

    Args:
      text: two numbers separated by a comma.

    Raises:
      argparse.ArgumentTypeError: if the text has another form.
    """
    try:
        first, last = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers, as in 1,1, got {text!r}") from None
    return first, last


def parse_chain(text: str) -> list[int]:
    """Parse the tokens of a chain.

    Args:
      text: tokens separated by commas.

    Raises:
      ValueError: if the text has another form.
    """
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(
            f"expected a chain as comma-separated tokens, as in 3,0,7,12, got {text!r}"
        ) from None
