"""Fingerprints: which tensors a delta belongs to, bit for bit."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unmask.quantised.tensor import QuantisedTensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's raw bytes in row-major order, any dtype (bfloat16 too), each number's least significant byte first.

    Example:
        >>> tensor_bytes(torch.tensor([1, 258], dtype=torch.int16)).hex()
        '01000201'
    """
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy()
    size = flat.element_size() // (2 if flat.is_complex() else 1)
    if sys.byteorder == "big" and size > 1:
        data = np.ascontiguousarray(data.reshape(-1, size)[:, ::-1]).reshape(-1)
    return memoryview(data)  # type: ignore[arg-type]


def digest(tensor: Tensor) -> str:
    """SHA-256 of one tensor's dtype, shape and bytes, in hex; of a quantised or sparse one, of all that it is stored as.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.zeros(1, 2))
        (True, False)
    """
    parts = _parts(tensor)
    if parts is not None:
        return fingerprint({name: digest(part) for name, part in parts.items()})
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def _parts(tensor: Tensor) -> Mapping[str, Tensor] | None:
    """What a tensor without bytes of its own consists of."""
    if isinstance(tensor, QuantisedTensor):
        flat, values = tensor.sidecar.deviating()
        return {**tensor.sidecar.source.stored(), "sidecar indices": flat, "sidecar values": values}
    if is_traceable_wrapper_subclass(tensor):
        return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    if tensor.layout != torch.strided:
        coordinates = tensor.detach().to_sparse_coo().coalesce()
        size = torch.tensor(tensor.shape)
        return {"indices": coordinates.indices(), "values": coordinates.values(), "size": size}
    return None


def fingerprint(digests: Mapping[str, str]) -> str:
    """One SHA-256 over named tensor digests, whatever their order; ``"sha256:..."``."""
    sha = hashlib.sha256()
    for name in sorted(digests):
        sha.update(f"{name} {digests[name]}\n".encode())
    return f"sha256:{sha.hexdigest()}"
