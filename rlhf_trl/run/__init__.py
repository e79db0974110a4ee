"""A run directory: its paths, files, locks, states, and the processes that fill it."""
