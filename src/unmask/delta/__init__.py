"""The result of training: the changed weights as exact values."""
