"""Runs of searches: the driver, its results, and the files that a run can be continued from."""
