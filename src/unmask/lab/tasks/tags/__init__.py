"""Tasks that give each word of a sentence a tag."""
