"""Searches, one per file, which follow the protocol in `jchain.search.protocol`."""
