"""One run of ``unmask train``."""
