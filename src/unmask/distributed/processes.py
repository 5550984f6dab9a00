"""The processes that train together, and what they do as one."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.distributed.agreeing import difference, header
from unmask.distributed.losing import lost
from unmask.errors import MethodError, ProcessesDifferError


def is_main() -> bool:
    """Whether this process prints and writes for all: the first of a process group, or of those that torchrun starts."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return launched() == 1 or int(os.environ["RANK"]) == 0


def launched() -> int:
    """How many processes train together: those of the process group, or of torchrun, which makes the group later."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return int(numbers[1]) if all(number.isdecimal() for number in numbers) else 1


class Processes:
    """The members of one process group. Every call is made by all of them, in the same order.

    Args:
        group: A process group; None for all processes.

    Attributes:
        doing: What this process and the others do together, for the error of a process that is lost.

    Raises:
        MethodError: This process is no member.
        ProcessesDifferError: From every call: the others did not take part (they died, or the group's timeout is over), or,
            from `agree`, they do or hold something else.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.doing = "its first exchange"
        if self.rank < 0:
            raise MethodError(
                "this process is no member of the given group; give it its own group, or exchange='none' to train by itself."
            )

    @torch.no_grad()
    def agree(
        self, doing: str, facts: Mapping[str, Any], device: torch.device, advice: str, held: Tensor | None = None
    ) -> None:
        """All processes say what they do and what they hold; where these are not the same, all raise the same error.

        Calls of any kind meet each other here, so processes that are out of step meet too: 24 bytes travel per process, and
        the facts themselves only where they differ.

        Args:
            doing: What this process is about to do.
            facts: JSON values by name, which must be the same in all processes.
            device: Where tensors must be for the process group.
            advice: What to do where the facts differ.
            held: 0-d int64, a checksum that must be the same too.

        Raises:
            ProcessesDifferError: They are not.
        """
        self.doing = doing
        text, (digest, length) = header(doing, facts)
        checksum = torch.zeros((), dtype=torch.int64, device=device) if held is None else held.to(device)
        rows = self.gather(torch.cat([torch.tensor([digest, length], device=device), checksum.view(1)])).tolist()
        if all(row == rows[0] for row in rows):
            return
        texts = [text] * self.size
        if any(row[:2] != rows[0][:2] for row in rows):
            lengths = [row[1] for row in rows]
            own = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
            texts = [bytes(part.tolist()) for part in self.gather_ragged(own, lengths)]
        raise ProcessesDifferError(difference(texts, [row[2] for row in rows], advice))

    def _together(self, function: Callable[..., Any], *args: Any) -> None:
        """One call of ``torch.distributed``; its failure as an error that says what to look at."""
        try:
            function(*args, group=self.group)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # of gloo, NCCL, the store; a group that was destroyed
            raise ProcessesDifferError(lost(self.group, self.doing, error)) from error

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place (a contiguous tensor's memory); bitwise the same in all of them."""
        self._together(dist.all_reduce, tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean, likewise: what DDP makes of gradients."""
        return self.sum(tensor).div_(self.size)

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors, of one shape and dtype: (processes, *shape)."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._together(dist.all_gather, parts, tensor.contiguous())
        return torch.stack(parts)

    def gather_ragged(self, tensor: Tensor, lengths: list[int]) -> list[Tensor]:
        """All processes' vectors, of different lengths, which all of them know."""
        padded = tensor.new_zeros(max(lengths))
        padded[: tensor.numel()] = tensor
        return [part[:length] for part, length in zip(self.gather(padded), lengths, strict=True)]

    def differing(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, list[int]]:
        """Of the tensors that are not the same in all processes, the processes that have another than the first.

        8 bytes travel per tensor.
        """
        if not tensors:
            return {}
        sums = self.gather(torch.stack([checksum(tensor).to(device) for tensor in tensors.values()]))
        others = [column.nonzero().flatten().tolist() for column in (sums != sums[0]).unbind(1)]
        return {name: ranks for name, ranks in zip(tensors, others, strict=True) if ranks}

    def take_first(self, tensor: Tensor, device: torch.device) -> None:
        """Gives all processes the first one's values."""
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        values = tensor.to(device, copy=True).contiguous()
        self._together(dist.broadcast, values, source)
        tensor.copy_(values)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, of the same shape (of a complex one: real and imaginary parts)."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.view(_BITS[tensor.element_size()])


def checksum(tensor: Tensor) -> Tensor:
    """A sum of the tensor's bits, modulo 2^64: 0-d int64, whatever the device sums first.

    Example:
        >>> checksum(torch.zeros(3)).item(), checksum(torch.tensor([1.0])).item()
        (0, 1065353216)
    """
    return bits(tensor).sum(dtype=torch.int64)


_WAIT = datetime.timedelta(seconds=10)  # for the store


def first_to_say(text: str) -> bool:
    """Whether no other process of this run has said the same yet: the store of torchrun or of the process group knows.

    An error that only one process has is said by that process, whichever it is; one that all have is said by the first.

    Example:
        >>> first_to_say("a process that trains alone says everything")
        True
    """
    if launched() == 1:
        return True
    key = f"unmask/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        return int(_store().add(key, 1)) == 1
    except (RuntimeError, ValueError, KeyError):  # no store, or its host is gone: better twice than never
        return True


def _store() -> Any:
    distributed: Any = dist
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # there before the process group, and after it
        return distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_WAIT
        )
    return distributed.distributed_c10d._get_default_store()
