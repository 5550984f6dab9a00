"""Holds the values that say which weights are unmasked, when and where. Importing them needs no torch."""
