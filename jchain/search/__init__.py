"""The searches, which follow one protocol, and the driver that runs them."""
