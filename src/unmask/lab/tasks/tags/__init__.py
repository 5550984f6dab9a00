"""Tasks that assign a tag to each word of a sentence."""
