"""The reducer of several processes: whom a selection trains with, that all start from the same, and one gradient of all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unmask.distributed.processes import Processes
from unmask.distributed.ranking import CandidateRanking, ExactRanking
from unmask.distributed.sharding import ShardedLayout, ShardRanking, ShardTable, group_of, reshard
from unmask.errors import MethodError, SelectionError
from unmask.gradients.reducing import NewRanker, Ranking
from unmask.method import Method
from unmask.slots import Layout, SlotTable

Exchange = Literal["exact", "candidates", "none"]


def check_exchange(exchange: str, method: Method) -> None:
    """Refuses an exchange that there is not, or that does not go with the method.

    Raises:
        MethodError: Either.
    """
    if exchange not in get_args(Exchange):
        raise MethodError(f"exchange = {exchange!r}; it must be 'exact', 'candidates' or 'none'.")
    heuristic = method.heuristic
    ranks = heuristic.needs == "gradient" or method.strategy == "repeat" or method.drop > 0
    if exchange == "candidates" and ranks and not method.by_entry:
        raise MethodError(
            f"exchange = 'candidates' scores single entries by their gradient, which heuristic {heuristic.name!r} under "
            f"allocation {method.allocation!r} and normalise {method.normalise!r} does not allow; use exchange='exact'."
        )


class ProcessReducer:
    """Makes one gradient of those of several processes: those that the model is sharded over, or those of a process group.

    A process group may be made after the selection too, but before the first backward (transformers' Trainer makes it).

    Args:
        model: The model, not selected from yet.
        exchange: What travels when all rank together; ``"none"``: nothing, ever.
        group: The process group; None for all processes.

    Attributes:
        processes: Whom this process trains with; None: it is alone, or not joined to them yet.
        sharded: Whom the model is sharded over; None: it is not.

    Raises:
        MethodError: The model is sharded in another way than a selection can work on.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, group: dist.ProcessGroup | None) -> None:
        self._exchange, self._group = exchange, group
        self.processes: Processes | None = None
        reshard(model)
        self.sharded = group_of(model)
        self._device = torch.device("cpu")
        self._description = ""
        self._tensors: Callable[[], Mapping[str, Tensor]] = dict

    @property
    def several(self) -> bool:
        """Whether this process trains with others."""
        return self.processes is not None

    def share_weights(self, model: nn.Module) -> None:
        """Gives every process the first one's parameters and buffers, as DDP does; only those that differ travel."""
        processes = self._find()
        with torch._C.DisableTorchFunctionSubclass():
            detached = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
        tensors = {
            name: tensor for name, tensor in detached.items() if type(tensor) is Tensor
        }  # no shards, no quantised ones
        if processes is None or not tensors:
            return
        device = next(iter(tensors.values())).device
        _same_text(processes, repr([(name, t.shape, t.dtype) for name, t in tensors.items()]), device)
        for name in processes.differing(tensors, device):
            processes.take_first(tensors[name], device)

    def layout(self, model: nn.Module, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Layout:
        """The eligible ones of a model's tensors, wherever their weights are."""
        if self.sharded is not None and names:
            return ShardedLayout(model, names, self.sharded)
        return Layout(names, [tensors[name] for name in names])

    def expect(self, description: str, tensors: Callable[[], Mapping[str, Tensor]], device: torch.device) -> None:
        """Says what must be the same in all processes, and on which device tensors travel: that of ``values``."""
        self._description, self._tensors, self._device = description, tensors, device

    def begin(self) -> None:
        """Joins the others, once there are others: all must hold the same selection of the same weights.

        Raises:
            SelectionError: They do not.
        """
        processes = self._find() if self.processes is None else None
        if processes is None:
            return
        _same_text(processes, f"{self._description}, exchange {self._exchange}", self._device)
        differing = processes.differing(self._tensors(), self._device)
        if differing:
            raise SelectionError(
                f"{differing[0]!r} is not the same in all {processes.size} processes. If it is a weight, call unmask.select() "
                "after init_process_group() (after TrainingArguments or Accelerator), which then shares the first process's "
                "weights; if it is the order of unmasking, give every process's method the same calibration data. Processes "
                "that train apart need exchange='none'."
            )
        self.processes = processes

    def _find(self) -> Processes | None:
        if self.sharded is not None:
            return self.sharded
        if self._exchange == "none" or not (dist.is_available() and dist.is_initialized()):
            return None
        processes = Processes(self._group)
        return processes if processes.size > 1 else None

    def ranking(self, new: NewRanker, table: SlotTable) -> Ranking:
        """See `Reducer`."""
        if self.processes is None:
            return new(table)
        if isinstance(table.layout, ShardedLayout):
            ranking = ShardRanking(new(ShardTable(table, table.layout)), table.layout)
            return ExactRanking(self.processes, ranking, table)
        if self._exchange == "candidates":
            return CandidateRanking(self.processes, new, table)
        return ExactRanking(self.processes, new(table), table)

    def mean(self, tensor: Tensor) -> None:
        """See `Reducer`."""
        if self.processes is not None:
            self.processes.mean(tensor)


def _same_text(processes: Processes, text: str, device: torch.device) -> None:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little", signed=True)
    digests = processes.gather(torch.tensor([number], device=device)).squeeze(1).tolist()
    if len(set(digests)) > 1:
        other = next(rank for rank, value in enumerate(digests) if value != digests[0])
        raise SelectionError(
            f"process {other} has another model, method, budget, accumulation or exchange than process 0; give all processes the "
            f"same. Here, in process {processes.rank}: {text if len(text) <= 300 else text[:297] + '...'}"
        )
