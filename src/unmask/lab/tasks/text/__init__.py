"""Tasks that assign a class or a number to a text, or to a pair of texts."""
