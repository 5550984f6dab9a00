"""Makes fingerprints, which say bit for bit to which tensors a delta belongs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unmask.delta.sparse import SparseTensor
from unmask.files import tensor_bytes
from unmask.gradients.entries import bits
from unmask.quantised.tensor import QuantisedTensor


def digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of one tensor's dtype, shape and bytes, in hex. A quantised or sparse tensor counts as all its parts.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.zeros(1, 2))
        (True, False)
    """
    parts: Mapping[str, Tensor] | None = None  # of a tensor that is stored as several
    if isinstance(tensor, QuantisedTensor):
        flat, values = tensor.sidecar.deviating()
        parts = {**tensor.sidecar.source.stored(), "sidecar indices": flat, "sidecar values": values}
    elif is_traceable_wrapper_subclass(tensor):
        parts = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    elif tensor.layout != torch.strided:
        coordinates = tensor.detach().to_sparse_coo().coalesce()
        size = torch.tensor(tensor.shape)
        parts = {"indices": coordinates.indices(), "values": coordinates.values(), "size": size}
    if parts is not None:
        return fingerprint({name: digest(part) for name, part in parts.items()})
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Returns one SHA-256 over named tensor digests, in any order: ``"sha256:..."``."""
    sha = hashlib.sha256()
    for name in sorted(digests):
        sha.update(f"{name} {digests[name]}\n".encode())
    return f"sha256:{sha.hexdigest()}"


def fingerprint_at(entries: Mapping[str, SparseTensor]) -> str:
    """Returns one SHA-256 over some entries of named tensors: ``"sha256:..."``; ``""`` if there is no entry.

    Names, dtypes, shapes, indices and values enter.

    Example:
        >>> entry = SparseTensor(torch.tensor([1]), torch.tensor([0.5]), (3,))
        >>> fingerprint_at({"w": entry}) == fingerprint_at({"v": entry}), fingerprint_at({})
        (False, '')
    """
    if not any(entry.numel for entry in entries.values()):
        return ""
    return fingerprint({name: entry.digest for name, entry in entries.items()})


def same_entries(left: Tensor, right: Tensor) -> Tensor:
    """Tells which entries of two tensors of one shape and real dtype have the same bits: bool, of that shape.

    Example:
        >>> same_entries(torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, -0.0])).tolist()
        [True, False]
    """
    return bits(left.contiguous()) == bits(right.contiguous())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Returns True if two tensors have the same dtype, shape and bits; the second may be on another device.

    Example:
        >>> same_bits(torch.tensor(torch.nan), torch.tensor(torch.nan)), same_bits(torch.zeros(1), torch.zeros(1).neg())
        (True, False)
    """
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if any(type(t) is not Tensor or t.layout != torch.strided or t.is_complex() for t in (left, right)):
        return digest(left) == digest(right)
    return bool(same_entries(left, right.to(left.device)).all())
