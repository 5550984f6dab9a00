"""`QuantisedTensor`: a quantised matrix as the tensor it stands for, read in blocks and written at entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unmask.quantised.sidecar import Sidecar

aten = torch.ops.aten


class QuantisedTensor(Tensor):
    """The current weights of a quantised matrix: float32, without memory of its own.

    It stands in a selection's layout where other layers have their parameter. Runs of rows and entries at flat indices are
    read out of the payload and the sidecar, as ordinary tensors; ``put_`` writes into the sidecar. Whatever would need the
    matrix whole is refused.

    Args:
        sidecar: The matrix; shared with all aliases of this tensor.
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

    def __init__(self, sidecar: Sidecar, shape: tuple[int, ...] | None = None) -> None: ...

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        run = _OPERATIONS.get(func)
        if run is None:
            raise NotImplementedError(
                f"{func} would need the quantised matrix {tuple(args[0].shape)} whole; it is read in rows and at entries only. "
                "unmask.quantised.dequantise_and_merge makes ordinary layers."
            )
        return run(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        own = self.sidecar.flat.numel()
        return f"QuantisedTensor({self.sidecar.source.kind}, shape={tuple(self.shape)}, {own:,} entries of their own)"


def _alias(tensor: QuantisedTensor, shape: Any = None) -> QuantisedTensor:
    """The same matrix, as itself or as a vector."""
    if shape is None:
        return QuantisedTensor(tensor.sidecar, tuple(tensor.shape))
    whole = tensor.sidecar.source.shape
    sizes = list(shape)
    if -1 in sizes:
        known = -torch.Size(sizes).numel()
        sizes[sizes.index(-1)] = tensor.numel() // max(1, known)
    if sizes not in ([tensor.numel()], list(whole)):
        raise NotImplementedError(f"a quantised matrix {whole} cannot be seen as {tuple(shape)}.")
    return QuantisedTensor(tensor.sidecar, tuple(sizes))


def _strided_alias(tensor: QuantisedTensor, shape: Any, stride: Any) -> QuantisedTensor:
    return _alias(tensor, shape)


def _clone(tensor: QuantisedTensor, **_: Any) -> QuantisedTensor:
    return QuantisedTensor(tensor.sidecar.copy(), tuple(tensor.shape))


def _slice(tensor: QuantisedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    """A run of rows; of a matrix of one row, a run of entries."""
    low, high, _ = slice(start, end).indices(tensor.shape[dim])
    high = max(low, high)
    if step == 1 and tensor.ndim == 2 and dim % 2 == 0:
        return tensor.sidecar.rows(low, high)
    if step == 1 and tensor.shape[0] == 1:
        return tensor.sidecar.take(torch.arange(low, high, device=tensor.device)).view(1, -1)
    raise NotImplementedError("a quantised matrix is read in runs of whole rows, or at entries.")


def _all_rows(tensor: QuantisedTensor) -> Tensor:
    """What indexing makes of a slice that takes every row."""
    return tensor.sidecar.rows(0, tensor.sidecar.source.shape[0]).view(tensor.shape)


def _index(tensor: QuantisedTensor, indices: list[Tensor]) -> Tensor:
    if tensor.ndim != 1 or len(indices) != 1:
        raise NotImplementedError("a quantised matrix is read at flat indices.")
    return tensor.sidecar.take(indices[0])


def _put(tensor: QuantisedTensor, index: Tensor, source: Tensor, accumulate: bool = False) -> QuantisedTensor:
    if accumulate:
        raise NotImplementedError("a quantised matrix's entries are set, not added to.")
    tensor.sidecar.put(index, source)
    return tensor


def _aminmax(tensor: QuantisedTensor, **_: Any) -> tuple[Tensor, Tensor]:
    return tensor.sidecar.largest()


def _new_zeros(tensor: QuantisedTensor, size: Any, **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options.get("dtype") or tensor.dtype, device=options.get("device") or tensor.device)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _all_rows,
    aten.view.default: _alias,
    aten._reshape_alias.default: _strided_alias,
    aten.clone.default: _clone,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.put_.default: _put,
    aten.aminmax.default: _aminmax,
    aten.new_zeros.default: _new_zeros,
}
