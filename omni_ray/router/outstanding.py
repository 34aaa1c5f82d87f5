"""What the router and `balance.py` tell each other, within the router's process.

A module of its own: Ray Serve pickles the module of a request router by value, so that what it held itself would be
there twice.
"""

remaining_s: dict[str, float] = {}
"""Device seconds that each dispatched job still needs, by job id. The router writes it as jobs are sent, make steps and
end."""

num_replicas: dict[str, int] = {}
"""Replicas that run now, by deployment name."""
