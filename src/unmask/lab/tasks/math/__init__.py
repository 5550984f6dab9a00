"""Word problems that a language model solves by writing out a solution."""
