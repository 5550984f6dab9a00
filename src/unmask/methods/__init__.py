"""Methods as frozen values: which weights are unmasked, and when. No module here imports torch when it is imported."""
