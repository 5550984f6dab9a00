"""The values that say what to unmask, when and where. Importing them needs no torch."""
