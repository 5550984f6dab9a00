"""Measures a step's time, memory and size on disk for ``unmask bench``, for unmask and for other methods."""
