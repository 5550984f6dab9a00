"""Holds the result of training: the changed weights as exact values, their file format, and the fingerprint of the base."""
