"""Hashes a model's tensors, and remembers each hash for as long as the tensor stays as it is."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from unmask.delta.fingerprint import digest
from unmask.files import tensor_bytes
from unmask.gradients.wrappers import bare

_SAMPLED = 256  # entries of a tensor that are read to see a write that torch does not count
_HASHES: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[_State, str]]] = weakref.WeakKeyDictionary()


def digests(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the SHA-256 of each tensor of a model; see `unmask.delta.fingerprint.digest`.

    A tensor is not hashed again if it has the same memory, the same shape and the same version as before: torch counts every
    write into a tensor as a new version, except those through ``.data``, numpy or a pointer. Some evenly spaced entries are
    compared too, so that such a write into all of a tensor (peft merges a LoRA by one) is noticed. A tensor that is not
    stored as plain numbers is hashed every time.

    Args:
        model: The model; what is remembered goes when it goes.
        tensors: Its tensors by name, detached.
    """
    known = _HASHES.setdefault(bare(model), {})
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        state = _State(tensor) if _State.fits(tensor) else None
        before = known.get(name)
        if state is not None and before is not None and before[0] == state:
            found[name] = before[1]
            continue
        found[name] = digest(tensor)
        if state is not None:
            known[name] = state, found[name]
    return found


def forget(model: nn.Module) -> None:
    """Forgets a model's hashes: some of its tensors have got an old version back, which their next write would repeat."""
    _HASHES.pop(bare(model), None)


class _State:
    """The state of a tensor, as far as it can be seen without reading all of it."""

    def __init__(self, tensor: Tensor) -> None:
        # The weak reference keeps the storage's own address from being used again for another one.
        self._storage = StorageWeakRef(tensor.untyped_storage())
        place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_neg()
        self._facts: tuple[Any, ...] = (
            *place,
            tensor.data_ptr(),
            tensor._version,
            bytes(tensor_bytes(_sample(tensor))),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _State) or self._storage.expired():
            return False
        return self._storage.cdata == other._storage.cdata and self._facts == other._facts

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def fits(tensor: Tensor) -> bool:
        """Returns True if the tensor is stored as plain numbers, and torch counts its versions."""
        return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_inference()


def _sample(tensor: Tensor) -> Tensor:
    """Returns the first, the last and evenly spaced entries of a tensor, in row-major order."""
    flat = torch.linspace(0, max(0, tensor.numel() - 1), min(_SAMPLED, tensor.numel()), dtype=torch.float64).long()
    places = torch.unravel_index(flat.to(tensor.device), tensor.shape) if tensor.ndim else ()
    return tensor[places] if tensor.ndim else tensor
