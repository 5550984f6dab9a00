"""Selects a budget of scalar weights as one trainable vector, and keeps the model right while it trains."""
