"""A package, so that pytest imports its conftest beside `tests/conftest.py`, not instead of it."""
