"""How unmask meets the libraries that users train with."""
