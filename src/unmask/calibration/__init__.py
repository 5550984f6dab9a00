"""Estimates that are made from example batches before training."""
