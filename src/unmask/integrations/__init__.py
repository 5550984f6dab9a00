"""Connects unmask with the libraries that users train with."""
