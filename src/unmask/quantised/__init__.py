"""Selects from quantised models: bitsandbytes' 8-bit and 4-bit linear layers, and torchao's int8 weights.

``unmask.select`` and ``SparseDelta.apply`` use this package by themselves. A user may also call `dequantise_and_merge` and
`detach`.
"""

from unmask.quantised.layers import detach
from unmask.quantised.merge import dequantise_and_merge

__all__ = ["dequantise_and_merge", "detach"]
