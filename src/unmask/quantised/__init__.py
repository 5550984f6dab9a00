"""Selections from quantised models: bitsandbytes' 8-bit and 4-bit linear layers, and torchao's int8 weights.

``unmask.select`` and ``SparseDelta.apply`` do all of this by themselves. What is here is what a user may call besides:
`dequantise_and_merge` and `detach`. Names are imported on first use: ``kinds`` is below everything else of unmask.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.quantised.layers import detach
    from unmask.quantised.merge import dequantise_and_merge

__all__ = ["dequantise_and_merge", "detach"]


def __getattr__(name: str) -> Any:
    if name == "detach":
        from unmask.quantised.layers import detach

        return detach
    if name == "dequantise_and_merge":
        from unmask.quantised.merge import dequantise_and_merge

        return dequantise_and_merge
    raise AttributeError(f"module 'unmask.quantised' has no attribute {name!r}")
