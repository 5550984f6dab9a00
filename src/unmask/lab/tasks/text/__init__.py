"""Tasks that give a text, or a pair of texts, a class or a number."""
