"""Selects from a model that FSDP2 has sharded: each process holds some rows of every tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unmask.distributed.processes import Processes
from unmask.errors import MethodError, NonFiniteGradientError
from unmask.gradients.entries import Entries, bits, put, take
from unmask.gradients.factors import Factors, as_dense
from unmask.gradients.wrappers import named_parameters
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.plan import Groups
from unmask.ranking.ranker import Ranker
from unmask.ranking.topk import Ranked, StreamingTopK


def is_sharded(tensor: Tensor) -> bool:
    """Returns True if a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # before it is imported there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """Returns a tensor with all its rows, on the CPU if they had to be gathered; all processes call it together."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def group_of(model: nn.Module) -> Processes | None:
    """Returns the processes over which a model is sharded; None if it is not sharded.

    Raises:
        MethodError: It is sharded in another way than by rows over one dimension of processes.
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
    """A layout whose tensors ``fully_shard`` has sharded by rows; all processes must call `read` and `plain` together.

    The model has ``DTensor``s as parameters. While a module runs, FSDP puts a plain parameter, always the same object, in the
    place of each. It is this one that is tapped, and that receives the whole gradient of this process's part of the batch.
    Every process holds all B trained values, and writes those that lie in its own rows.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], processes: Processes) -> None:
        parameters = named_parameters(model)
        unsharded: dict[str, nn.Parameter] = {}
        for module in _fsdp_modules(model):  # while a module runs, FSDP puts plain parameters into it
            module.unshard()
            unsharded |= {name: p for name, p in named_parameters(model).items() if not is_sharded(p)}
            module.reshard()
        super().__init__(names, [unsharded[name] for name in names])
        self.processes = processes
        self._sharded = [parameters[name] for name in names]
        self._ids = {id(p) for p in self._sharded}

    def holds(self, parameter: Tensor) -> bool:
        """Returns True if ``parameter`` is the DTensor of one of the tensors; see `Layout.holds`."""
        return id(parameter) in self._ids

    def plain(self, index: int) -> Tensor:
        """Returns a copy of the whole tensor, gathered from all processes."""
        with torch.no_grad():
            return self._sharded[index].full_tensor()  # type: ignore[attr-defined]

    def shard(self, index: int) -> Tensor:
        """Returns the rows that this process holds; they share storage with the parameter."""
        return self._sharded[index].detach().to_local()  # type: ignore[attr-defined]

    def first_row(self, index: int) -> int:
        """Returns the first row that this process holds. All processes hold equally many rows, except for the last ones."""
        rows = self._sharded[index].shape[0]
        return min(rows, self.processes.rank * -(-rows // self.processes.size))

    def offset(self, index: int) -> int:
        """Returns the flat index of the first entry that this process holds."""
        tensor = self.tensors[index]
        return self.first_row(index) * (tensor.numel() // tensor.shape[0])

    def read(self, positions: Tensor | Groups, dtype: torch.dtype) -> Tensor:
        """Reads weights as `Layout.read` does; each process contributes those that it holds, bit for bit."""
        groups = positions if isinstance(positions, Groups) else self.groups(positions)
        values = torch.zeros(groups.places.shape, dtype=dtype, device=groups.places.device)
        for index, flat, places in self.split(groups):
            own, mine = self.own(index, flat)
            values[places[mine]] = take(self.shard(index), own).to(values.device, dtype)
        self.processes.sum(bits(values))
        return values

    def put(self, index: int, flat: Tensor, values: Tensor) -> None:
        """Writes those entries of a tensor that this process holds; see `Layout.put`."""
        own, mine = self.own(index, flat)
        put(self.shard(index), own, values[mine.to(values.device)])

    def own(self, index: int, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Returns those of the flat indices that this process holds, counted from its first entry, and where they are."""
        local = flat - self.offset(index)
        mine = (local >= 0) & (local < self.shard(index).numel())
        return local[mine], mine


class ShardTable(Ledger):
    """The part of a table that belongs to this process's rows, at their positions in the whole model, for a `Ranker`."""

    def __init__(self, table: Ledger, layout: ShardedLayout) -> None:
        self._table, self._whole = table, layout
        self.layout = _Shards(layout)
        self.positions, self.base, self.held, self.budget = table.positions, table.base, table.held, table.budget

    def members(self, index: int) -> Entries | None:
        """Returns the entries of this process that hold a slot, by their flat indices in the shard."""
        members = self._table.members(index)
        if members is None:
            return None
        return Entries(members.shape, self._whole.own(index, members.flat)[0], members.slots)


class _Shards(Layout):
    """A layout whose tensors are this process's shards."""

    def __init__(self, layout: ShardedLayout) -> None:
        self._layout = layout
        self.names, self.total, self.free = layout.names, layout.total, layout.free
        self.starts = [start + layout.offset(index) for index, start in enumerate(layout.starts)]

    def plain(self, index: int) -> Tensor:
        return self._layout.shard(index)

    def avoided(self, index: int) -> Tensor | None:
        flat = self._layout.avoided(index)
        return None if flat is None else self._layout.own(index, flat)[0]


class ShardRanking:
    """A `Ranking` in which each process ranks its own rows by the averaged gradient; `result` merges the best of all."""

    def __init__(self, ranker: Ranker, layout: ShardedLayout) -> None:
        self._ranker, self._layout = ranker, layout
        self._error: NonFiniteGradientError | None = None

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """Implements `Ranking.rank`. If a gradient is not finite, `result` raises in all processes."""
        rows = self._layout.shard(index).shape[0]
        if rows and self._error is None:
            try:
                self._ranker.rank(index, as_dense(gradient).narrow(0, self._layout.first_row(index), rows))
            except NonFiniteGradientError as error:
                self._error = error

    def rank_zero(self, index: int) -> None:
        if self._layout.shard(index).shape[0]:
            self._ranker.rank_zero(index)

    def result(self) -> Ranked:
        own, processes, base = self._ranker.result(), self._layout.processes, self._ranker.table.base
        dtypes = (base.dtype, torch.int64, base.dtype)
        columns = [column.to(base.device, dtype) for column, dtype in zip(own, dtypes, strict=True)]
        top = StreamingTopK(self._ranker.top.k)
        for scores, positions, payload in zip(*processes.gather_columns(columns, self._error), strict=True):
            top.merge(Ranked(scores, positions, payload))
        return top.result()


def reshard(model: nn.Module) -> None:
    """Frees the plain parameters that a forward without a backward has left, so that the parameters are the shards again."""
    for module in _fsdp_modules(model):
        module.reshard()


def catch_up_before_gather(model: nn.Module, catch_up: Callable[[], None]) -> list[RemovableHandle]:
    """Registers hooks that call ``catch_up`` before a module's shards are gathered for its forward.

    Returns:
        The hooks; the selection calls their ``remove()`` when it ends.
    """
    return [
        module.register_forward_pre_hook(lambda module, args: catch_up(), prepend=True)
        for module in _fsdp_modules(model)
    ]


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)  # it exists since torch 2.6
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
