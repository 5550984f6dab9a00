"""Presents a quantised matrix as a float32 tensor that is read in blocks and written at entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unmask.quantised.sidecar import Sidecar

aten = torch.ops.aten


class QuantisedTensor(Tensor):
    """The current weights of a quantised matrix, as a float32 tensor that holds no memory.

    It takes the place of a parameter in a selection's layout. Runs of rows, and entries at flat indices, are read from the
    payload and the sidecar as ordinary tensors. ``put_`` writes into the sidecar. An operation that needs the matrix whole is
    refused.

    Args:
        sidecar: The matrix. All aliases of this tensor share it.
        shape: The shape of this alias; None for that of the matrix.
    """

    sidecar: Sidecar

    @staticmethod
    def __new__(cls, sidecar: Sidecar, shape: tuple[int, ...] | None = None) -> QuantisedTensor:
        source = sidecar.source
        tensor: QuantisedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, source.shape if shape is None else shape, dtype=torch.float32, device=source.device
        )
        tensor.sidecar = sidecar
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        run = _OPERATIONS.get(func)
        if run is None:
            raise NotImplementedError(
                f"{func} needs the quantised matrix {tuple(args[0].shape)} whole, and it is read in rows and at entries only. "
                "unmask.quantised.dequantise_and_merge makes ordinary layers."
            )
        return run(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        own = self.sidecar.flat.numel()
        return f"QuantisedTensor({self.sidecar.source.kind}, shape={tuple(self.shape)}, {own:,} entries changed)"


def _alias(tensor: QuantisedTensor, shape: Any = None) -> QuantisedTensor:
    """Returns the same matrix, with its own shape or as a vector."""
    shape = tensor.shape if shape is None else shape
    for own in ((tensor.numel(),), tensor.sidecar.source.shape):
        if len(shape) == len(own) and all(asked in (-1, size) for asked, size in zip(shape, own, strict=True)):
            return QuantisedTensor(tensor.sidecar, own)
    raise NotImplementedError(
        f"a quantised matrix {tensor.sidecar.source.shape} cannot be seen as {tuple(shape)}, only as itself or as a vector."
    )


def _slice(tensor: QuantisedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    """Reads a run of rows; of a matrix of one row, a run of entries."""
    low, high, _ = slice(start, end).indices(tensor.shape[dim])
    high = max(low, high)
    if step == 1 and tensor.ndim == 2 and dim % 2 == 0:
        return tensor.sidecar.rows(low, high)
    if step == 1 and tensor.shape[0] == 1:
        return tensor.sidecar.take(torch.arange(low, high, device=tensor.device)).view(1, -1)
    raise NotImplementedError("a quantised matrix is read in runs of whole rows, or at flat indices.")


def _index(tensor: QuantisedTensor, indices: list[Tensor]) -> Tensor:
    if tensor.ndim != 1 or len(indices) != 1:
        raise NotImplementedError("a quantised matrix is read at flat indices.")
    return tensor.sidecar.take(indices[0])


def _put(tensor: QuantisedTensor, index: Tensor, source: Tensor, accumulate: bool = False) -> QuantisedTensor:
    if accumulate:
        raise NotImplementedError("a quantised matrix's entries are set, not added to.")
    tensor.sidecar.put(index, source)
    return tensor


def _new_zeros(tensor: QuantisedTensor, size: Any, **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options.get("dtype") or tensor.dtype, device=options.get("device") or tensor.device)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    # Indexing with a slice that takes every row ends here.
    aten.alias.default: lambda tensor: tensor.sidecar.rows(0, tensor.sidecar.source.shape[0]).view(tensor.shape),
    aten.view.default: _alias,
    aten._reshape_alias.default: lambda tensor, shape, stride: _alias(tensor, shape),
    aten.clone.default: lambda tensor, **_: QuantisedTensor(tensor.sidecar.copy(), tuple(tensor.shape)),
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.put_.default: _put,
    aten.aminmax.default: lambda tensor, **_: tensor.sidecar.largest(),
    aten.new_zeros.default: _new_zeros,
}
