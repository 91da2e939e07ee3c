"""A package, so that pytest imports its conftest in addition to `tests/conftest.py`."""
