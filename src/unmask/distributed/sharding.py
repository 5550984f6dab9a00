"""FSDP2: tensors of which each process holds some rows.

``fully_shard`` makes of every parameter a ``DTensor``, and puts a plain parameter, always the same object, in its place while its
module runs. That one is tapped, and brings the whole gradient of this process's part of the batch. What is kept lives in
the shards: a process scores the rows it holds by the reduced gradient, and the best of all processes are merged; the trained
values, B numbers, are held by every process, which writes those of its own rows. So the budget is global, and the selection that
of the unsharded model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unmask.distributed.processes import Processes, bits
from unmask.errors import MethodError, NonFiniteGradientError
from unmask.gradients.entries import Entries, put, take
from unmask.gradients.factors import Factors, as_dense
from unmask.gradients.wrappers import named_parameters
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.ranker import Ranker
from unmask.ranking.topk import Ranked, StreamingTopK


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all its rows, on the CPU if they had to be gathered; all processes call it together."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def group_of(model: nn.Module) -> Processes | None:
    """The processes that a model is sharded over; None: it is not.

    Raises:
        MethodError: It is sharded otherwise than by rows over one dimension of processes.
    """
    sharded = {name: p for name, p in named_parameters(model).items() if is_sharded(p)}
    if not sharded:
        return None
    for name, parameter in sharded.items():
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise MethodError(
                f"{name!r} is placed as {placements} on a mesh of {mesh.ndim} dimensions; a selection works on models that "
                "fully_shard shards by rows over one mesh dimension (no HSDP, no tensor parallelism)."
            )
    return Processes(next(iter(sharded.values())).device_mesh.get_group())  # type: ignore[attr-defined]


class ShardedLayout(Layout):
    """A layout whose tensors are sharded by rows; `read` and `plain` are calls of all processes together.

    Args:
        model: The model, after ``fully_shard``.
        names: Of the eligible tensors, all of them sharded.
        processes: Who holds the shards.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], processes: Processes) -> None:
        parameters, unsharded = named_parameters(model), _unsharded(model)
        super().__init__(names, [unsharded[name] for name in names])
        self.processes = processes
        self._sharded = [parameters[name] for name in names]
        self._ids = {id(p) for p in self._sharded}

    def holds(self, parameter: Tensor) -> bool:
        """See `Layout.holds`."""
        return id(parameter) in self._ids

    def plain(self, index: int) -> Tensor:
        """The whole tensor: a copy, gathered from all processes."""
        with torch.no_grad():
            return self._sharded[index].full_tensor()  # type: ignore[attr-defined]

    def shard(self, index: int) -> Tensor:
        """The rows that this process holds: shares storage with the parameter."""
        return self._sharded[index].detach().to_local()  # type: ignore[attr-defined]

    def first_row(self, index: int) -> int:
        """The first row that this process holds: all but the last processes hold equally many."""
        rows = self._sharded[index].shape[0]
        return min(rows, self.processes.rank * -(-rows // self.processes.size))

    def offset(self, index: int) -> int:
        """The flat index of the first entry that this process holds."""
        tensor = self.tensors[index]
        return self.first_row(index) * (tensor.numel() // tensor.shape[0])

    def read(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Layout.read`: every process gives what it holds, bit for bit."""
        values = torch.zeros(positions.shape, dtype=dtype, device=positions.device)
        for index, flat, places in self.split(positions):
            own, mine = self._own(index, flat)
            values[places[mine]] = take(self.shard(index), own).to(values.device, dtype)
        self.processes.sum(bits(values))
        return values

    def write(self, positions: Tensor, values: Tensor) -> None:
        """See `Layout.write`."""
        for index, flat, places in self.split(positions):
            self.put(index, flat, values[places])

    def put(self, index: int, flat: Tensor, values: Tensor) -> None:
        """See `Layout.put`."""
        own, mine = self._own(index, flat)
        put(self.shard(index), own, values[mine.to(values.device)])

    def own(self, index: int, flat: Tensor) -> Tensor:
        """Of flat indices, those that this process holds, counted from the first that it holds."""
        return self._own(index, flat)[0]

    def _own(self, index: int, flat: Tensor) -> tuple[Tensor, Tensor]:
        local = flat - self.offset(index)
        mine = (local >= 0) & (local < self.shard(index).numel())
        return local[mine], mine


class ShardTable(Ledger):
    """What a `Ranker` sees of a table: this process's rows alone, at their places in the whole model."""

    def __init__(self, table: Ledger, layout: ShardedLayout) -> None:
        self._table, self._whole = table, layout
        self.layout = _Shards(layout)
        self.positions, self.base, self.held, self.budget = table.positions, table.base, table.held, table.budget

    def members(self, index: int) -> Entries | None:
        """This process's entries that hold a slot, by their flat indices in the shard."""
        members = self._table.members(index)
        if members is None:
            return None
        return Entries(members.shape, self._whole.own(index, members.flat), members.slots)


class _Shards(Layout):
    """The shards as tensors of their own."""

    def __init__(self, layout: ShardedLayout) -> None:
        self._layout = layout
        self.names, self.total = layout.names, layout.total
        self.starts = [start + layout.offset(index) for index, start in enumerate(layout.starts)]

    def plain(self, index: int) -> Tensor:
        return self._layout.shard(index)


class ShardRanking:
    """Ranks reduced gradients, each process its own rows, and merges the best of all."""

    def __init__(self, ranker: Ranker, layout: ShardedLayout) -> None:
        self._ranker, self._layout = ranker, layout
        self._error: NonFiniteGradientError | None = None

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """See `Ranking`; what is not finite is told by `result`, to all processes."""
        rows = self._layout.shard(index).shape[0]
        if rows and self._error is None:
            try:
                self._ranker.rank(index, as_dense(gradient).narrow(0, self._layout.first_row(index), rows))
            except NonFiniteGradientError as error:
                self._error = error

    def rank_zero(self, index: int) -> None:
        """See `Ranking`."""
        if self._layout.shard(index).shape[0]:
            self._ranker.rank_zero(index)

    def result(self) -> Ranked:
        """See `Ranking`."""
        own, processes, base = self._ranker.result(), self._layout.processes, self._ranker.table.base
        count = torch.tensor([-1 if self._error else own.positions.numel()], device=base.device)
        counts: list[int] = processes.gather(count).squeeze(1).tolist()
        if min(counts) < 0:
            raise self._error or NonFiniteGradientError(
                f"a gradient that process {counts.index(-1)} holds is not finite"
            )
        top = StreamingTopK(self._ranker.top.k)
        if max(counts):
            dtypes = (base.dtype, torch.int64, base.dtype)
            columns = [
                processes.gather_ragged(column.to(base.device, dtype), counts)
                for column, dtype in zip(own, dtypes, strict=True)
            ]
            for scores, positions, payload in zip(*columns, strict=True):
                top.merge(Ranked(scores, positions, payload))
        return top.result()


def reshard(model: nn.Module) -> None:
    """Frees what a forward without a backward has left unsharded, so that the parameters are the shards."""
    for module in _fsdp_modules(model):
        module.reshard()


def catch_up_before_gather(model: nn.Module, catch_up: Callable[[], None]) -> list[RemovableHandle]:
    """Hooks that run before a module's shards are gathered for its forward; ``remove()`` them when the selection ends."""

    def before(module: nn.Module, args: Any) -> None:
        catch_up()

    return [module.register_forward_pre_hook(before, prepend=True) for module in _fsdp_modules(model)]


def _unsharded(model: nn.Module) -> dict[str, nn.Parameter]:
    """The plain parameters that stand in the modules while they run, by name."""
    found: dict[str, nn.Parameter] = {}
    for module in _fsdp_modules(model):
        module.unshard()
        found |= {name: p for name, p in named_parameters(model).items() if not is_sharded(p)}
        module.reshard()
    return found


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)  # torch 2.6 and later
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
