"""A selection: a budget of scalar weights as one trainable vector, and all that keeps it right while training runs."""
