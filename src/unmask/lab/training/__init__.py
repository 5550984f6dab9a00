"""Runs ``unmask train``: configuration, setup, training, the output folder, and series of deltas."""
