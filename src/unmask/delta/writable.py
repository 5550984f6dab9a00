"""Finds tensors that cannot be written in place, before anything is written."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def find_unwritable(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Returns the name of the first tensor that cannot be written in place, and why; None if all can be written.

    The tensors are detached. Those that are not stored as plain numbers are taken for writable.

    Example:
        >>> find_unwritable({"a": torch.zeros(2), "b": torch.zeros(1).expand(2)})
        ('b', 'has several entries in one place of memory (it was expanded); replace it by its clone()')
    """
    mapped: dict[str, int] = {}
    for name, tensor in tensors.items():
        reason = _reason(tensor)
        if reason is not None:
            return name, reason
        # Memory that torch has allocated can be resized, and written; that of a file or of another library perhaps not.
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if plain and not tensor.untyped_storage().resizable():
            mapped[name] = tensor.data_ptr()
    read_only = sorted(_read_only_memory()) if mapped else []
    for name, place in mapped.items():
        at = bisect.bisect(read_only, (place, sys.maxsize)) - 1
        if at >= 0 and place < read_only[at][1]:
            return name, "lies in memory that may only be read (a memory map); replace it by its clone()"
    return None


def _reason(tensor: Tensor) -> str | None:
    """Says why a tensor cannot be written, as far as its strides and its kind tell; None if it can."""
    if tensor.is_meta:
        return "is on the meta device, without values; load the weights first"
    if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.numel():
        return None
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode(); load the model outside it, or apply inside it"
    if _overlaps(tensor):
        return "has several entries in one place of memory (it was expanded); replace it by its clone()"
    return None


def _overlaps(tensor: Tensor) -> bool:
    """Returns True if two entries share a place in memory. Only strides that interleave cost a pass over the tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:  # strides that interleave get here too, without an overlap
                offsets = torch.arange(1 + sum(t * (s - 1) for t, s in zip(tensor.stride(), tensor.shape, strict=True)))
                return offsets.as_strided(tensor.shape, tensor.stride()).unique().numel() < tensor.numel()
            reach += stride * (size - 1)
    return False


def _read_only_memory() -> list[tuple[int, int]]:
    """Returns the address ranges in which a write would end this process; none where the system does not tell them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    spans = [line.split(maxsplit=2)[:2] for line in lines]
    edges = [span.split("-") for span, rights in spans if "w" not in rights]
    return [(int(low, 16), int(high, 16)) for low, high in edges]
