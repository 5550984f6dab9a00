"""Tasks of arithmetic word problems: a language model writes a solution out, and its answer is read from the text."""
