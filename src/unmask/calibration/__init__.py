"""Estimates scores from example batches, or from the weights alone, before training."""
