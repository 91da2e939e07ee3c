"""Searches under one contract, and the driver that runs them."""
