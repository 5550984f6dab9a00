"""Lets a selection see the gradients of frozen tensors, one tensor at a time, without changing any module."""
