"""Finds the best scalar weights of a model, and keeps which slot holds which weight."""
