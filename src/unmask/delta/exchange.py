"""Writes entries and whole tensors into a model, in exchange for what it held, and can undo that exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from unmask.delta.remembered import forget
from unmask.delta.sparse import SparseTensor
from unmask.delta.target import Target
from unmask.distributed.sharding import gathered, is_sharded
from unmask.gradients.entries import put, take

_RUN = 1 << 14  # Entries of one run: the memory lines that hold them stay in a core's cache from reading to writing.
_FEW = 16  # jobs that are not worth a thread


@dataclass
class _Part:
    """The entries of one tensor that this process holds.

    Attributes:
        name: The tensor's name.
        tensor: The part of the tensor that this process holds.
        entry: The tensor's entries.
        sharded: True if other processes hold other parts.
        low: The place of the part's first entry among the tensor's.
        indices: (n,) int64: where the part's entries are in ``tensor``, on its device.
        values: (n,) their new values.
        old: (n,) their old values, on the tensor's device, as far as they were read.
        on_cpu: True if the part is ordinary memory of the CPU, which several threads may write at once.
        read: The runs (first, end) of entries whose old values were read. The others were not written.
    """

    name: str
    tensor: Tensor
    entry: SparseTensor
    sharded: bool
    low: int
    indices: Tensor
    values: Tensor
    old: Tensor
    on_cpu: bool
    read: list[tuple[int, int]] = field(default_factory=list)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yields the runs (first, end) of entries that are read and written together."""
        count = self.indices.numel()
        step = _RUN if self.on_cpu else max(1, count)
        for first in range(0, count, step):
            yield first, min(first + step, count)

    def write(self, first: int, end: int) -> None:
        """Reads a run of entries, and then writes it."""
        where, old = self.indices[first:end], self.old[first:end]
        if self.on_cpu:
            torch.index_select(self.tensor.view(-1), 0, where, out=old)  # This is twice as fast as indexing.
        else:
            old.copy_(take(self.tensor, where))
        self.read.append((first, end))
        put(self.tensor, where, self.values[first:end])

    def undo(self) -> None:
        """Writes the old values back."""
        for first, end in self.read:
            put(self.tensor, self.indices[first:end], self.old[first:end])


class Exchange:
    """One write into a model, and what it replaced.

    Args:
        target: The model's tensors.
        sparse: The new entries by tensor name.
        whole: The new tensors by name. They are written first, so entries of the same tensor lie over them.

    Attributes:
        whole: The old tensors by name, on the CPU, after `write`.
        failed: The name of the tensor whose writing has raised an error.
    """

    def __init__(self, target: Target, sparse: Mapping[str, SparseTensor], whole: Mapping[str, Tensor]) -> None:
        self._target, self._new, self._new_whole = target, sparse, whole
        self._parts: list[_Part] = []
        self._begun: list[str] = []
        self.whole: dict[str, Tensor] = {}
        self.failed: str | None = None
        written = [target.held(name)[0] for name in {*sparse, *whole}]
        counted = tuple(t for t in written if type(t) is Tensor and not t.is_inference())
        self._versions = _unsafe_preserve_version_counter(counted)

    @torch.no_grad()
    def write(self) -> None:
        """Writes everything. A run of entries is read and then written, while its memory is in the cache."""
        tensors = self._target.tensors
        self.whole = {name: gathered(tensors[name]).cpu().clone() for name in sorted(self._new_whole)}
        self._parts = self._prepare()
        jobs = [partial(self._do, part.name, part.write, *run) for part in self._parts for run in part.runs()]
        for name in self.whole:
            self._begun.append(name)
            self._do(name, self._copy, name, self._new_whole[name])
        _for_all(jobs, torch.get_num_threads() if all(part.on_cpu for part in self._parts) else 1)
        self._target.settle(self._new)

    def displaced(self) -> dict[str, SparseTensor]:
        """Returns the old entries by tensor name, on the CPU. All processes have written, and call this together.

        The entries of tensors that are replaced whole are left out.
        """
        found = {part.name: part.old for part in self._parts}
        for alike in _elsewhere(self._parts):  # each copy from a device waits, so there is one for all
            sizes = [part.entry.numel for part in alike]
            held = alike[0].old.new_zeros(sum(sizes))
            for part, whole in zip(alike, held.split(sizes), strict=True):
                whole[part.low : part.low + part.old.numel()] = part.old
            if self._target.processes is not None and alike[0].sharded:
                self._target.processes.sum(held.view(torch.uint8))  # one process gives each byte, the others give zeros
            found |= {part.name: own for part, own in zip(alike, held.cpu().split(sizes), strict=True)}
        old = {name: entry.holding(found[name]) for name, entry in self._new.items() if name not in self.whole}
        _for_all([partial(getattr, entry, "digest") for entry in old.values()], torch.get_num_threads())
        return old

    @torch.no_grad()
    def undo(self) -> None:
        """Writes back what was there. The tensors get their old versions too, for they are as they were."""
        for part in self._parts:
            with contextlib.suppress(Exception):  # a tensor that cannot be written still holds its old values
                part.undo()
        for name in self._begun:
            with contextlib.suppress(Exception):
                self._copy(name, self.whole[name])
        self._target.settle(self._new)
        self._versions.__exit__()
        forget(self._target.model)

    def _prepare(self) -> list[_Part]:
        """Finds the entries that this process holds, and copies the new values to their device."""
        parts = []
        for name in sorted(self._new):
            entry, (held, offset) = self._new[name], self._target.held(name)
            low, high, indices = entry.part(held.device, offset, held.numel())
            old = torch.empty(high - low, dtype=held.dtype, device=held.device)
            sharded = is_sharded(self._target.tensors[name])
            on_cpu = type(held) is Tensor and held.device.type == "cpu" and held.is_contiguous()
            parts.append(_Part(name, held, entry, sharded, low, indices, entry.values[low:high], old, on_cpu))
        for alike in _elsewhere(parts):  # each copy to a device may wait, so there is one for all
            values = torch.cat([part.values for part in alike]).to(alike[0].old.device)
            for part, own in zip(alike, values.split([part.values.numel() for part in alike]), strict=True):
                part.values = own
        return parts

    def _do(self, name: str, write: Callable[..., None], *args: Any) -> None:
        """Writes into one tensor, and keeps its name if that fails."""
        try:
            write(*args)
        except BaseException:
            self.failed = name
            raise

    def _copy(self, name: str, whole: Tensor) -> None:
        """Writes those rows of a whole tensor that this process holds."""
        held, offset = self._target.held(name)
        if held.numel() < whole.numel():
            whole = whole.reshape(-1)[offset : offset + held.numel()].view(held.shape)
        held.copy_(whole)


def _elsewhere(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Groups the parts that are not on the CPU, or not the only ones of their tensor, by device, dtype and sharding."""
    groups: dict[tuple[torch.device, torch.dtype, bool], list[_Part]] = {}
    for part in parts:
        if part.sharded or part.old.device.type != "cpu":
            groups.setdefault((part.old.device, part.old.dtype, part.sharded), []).append(part)
    return list(groups.values())


def _for_all(jobs: Sequence[Callable[[], Any]], threads: int) -> None:
    """Calls all jobs, on several threads if they are many: torch's own loops over single entries use one thread."""
    if threads == 1 or len(jobs) < _FEW:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: job(), jobs))
