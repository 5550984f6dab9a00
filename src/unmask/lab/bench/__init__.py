"""`unmask bench` measures the time, memory and disk space of a training step, for unmask and for its alternatives."""
