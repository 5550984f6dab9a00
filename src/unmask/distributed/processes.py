"""Lets the processes of one group exchange tensors, agree on facts, and report a process that was lost."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.distributed.facts import checksum, difference, header
from unmask.errors import MethodError, NonFiniteGradientError, ProcessesDifferError

ROLL_CALL = 2.0  # seconds that a process which has lost the others waits for them to report the same
_STORE_TIMEOUT = datetime.timedelta(seconds=10)


def is_main() -> bool:
    """Returns True in the process that prints and writes for all: the first of the process group, or of torchrun's."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return launched() == 1 or int(os.environ["RANK"]) == 0


def launched() -> int:
    """Returns how many processes train together. Before a process group is made, torchrun's variables tell the number."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return int(numbers[1]) if all(number.isdecimal() for number in numbers) else 1


class Processes:
    """The members of one process group. All of them make the same calls, in the same order.

    Args:
        group: A process group; None for all processes.

    Attributes:
        doing: The activity that the processes share now; the error of a process that was lost names it.

    Raises:
        MethodError: This process is no member of the group.
        ProcessesDifferError: From every call: the others did not take part (they died, or the group's timeout is over);
            from `agree`: they do or hold something else.
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
        """Checks that all processes do the same and hold the same; otherwise all of them raise the same error.

        Each exchange begins with this call, so processes that are out of step meet here and find it out. Each process sends 24
        bytes, and the facts themselves only where they differ.

        Args:
            doing: The activity that this process is about to begin.
            facts: JSON values by name, which must be the same in all processes.
            device: The device on which the process group exchanges tensors.
            advice: A sentence that says what to do where the facts differ.
            held: A checksum that must be the same too: 0-d int64.

        Raises:
            ProcessesDifferError: The activities, the facts or the checksums differ.
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
        """Makes one call of ``torch.distributed``, and turns its failure into an error that says what to look at."""
        try:
            function(*args, group=self.group)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # gloo, NCCL and the store raise these, as does a destroyed group
            raise ProcessesDifferError(self._lost(error)) from error

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a contiguous tensor over all processes, in place; the result is bitwise the same in all of them."""
        self._together(dist.all_reduce, tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Averages a contiguous tensor over all processes, in place, as DDP averages gradients."""
        return self.sum(tensor).div_(self.size)

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the means of some tensors of one dtype over all processes, which exchange them as one vector."""
        means = self.mean(torch.cat([t.reshape(-1) for t in tensors])).split([t.numel() for t in tensors])
        return [mean.view(t.shape) for mean, t in zip(means, tensors, strict=True)]

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all processes, which have one shape and dtype: (processes, *shape)."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._together(dist.all_gather, parts, tensor.contiguous())
        return torch.stack(parts)

    def gather_ragged(self, tensor: Tensor, lengths: list[int]) -> list[Tensor]:
        """Returns the vectors of all processes. Their lengths may differ; every process must know all of them."""
        padded = tensor.new_zeros(max(lengths))
        padded[: tensor.numel()] = tensor
        return [part[:length] for part, length in zip(self.gather(padded), lengths, strict=True)]

    def gather_columns(self, columns: Sequence[Tensor], error: Exception | None) -> list[list[Tensor]]:
        """Returns for each column the vectors of all processes. A process's columns have one length, which the others learn.

        A process that cannot send its columns gives the error instead; then all processes raise.
        """
        count = torch.tensor([-1 if error else columns[0].numel()], device=columns[0].device)
        counts: list[int] = self.gather(count).squeeze(1).tolist()
        if min(counts) < 0:
            raise error or NonFiniteGradientError(
                f"the gradient of process {counts.index(-1)} is not finite; its own error says where"
            )
        if not max(counts):
            return [[column] * self.size for column in columns]
        return [self.gather_ragged(column, counts) for column in columns]

    def differing(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, list[int]]:
        """Finds the tensors that differ between processes, and for each the ranks whose tensor is not process 0's.

        Each process sends 8 bytes per tensor.
        """
        if not tensors:
            return {}
        sums = self.gather(torch.stack([checksum(tensor).to(device) for tensor in tensors.values()]))
        others = [column.nonzero().flatten().tolist() for column in (sums != sums[0]).unbind(1)]
        return {name: ranks for name, ranks in zip(tensors, others, strict=True) if ranks}

    def take_first(self, tensor: Tensor, device: torch.device) -> None:
        """Copies process 0's values into the tensors of all processes."""
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        values = tensor.to(device, copy=True).contiguous()
        self._together(dist.broadcast, values, source)
        tensor.copy_(values)

    def _lost(self, error: BaseException) -> str:
        """Writes the error message of a call to the others that failed."""
        said = shorten((str(error).splitlines() or [type(error).__name__])[0], 200, placeholder="...")
        if not dist.is_initialized():
            return f"the process group is gone in {self.doing}: it must live as long as the selection trains. torch says: {said}"
        silent = self._silent_ranks()
        if silent is None and self.size == 2:
            silent = [1 - self.rank]
        if silent:
            ranks = ", ".join(map(str, silent))
            who = f"process {ranks} did not take part: it has ended or died, hangs, or does something else"
        else:
            who = "another process did not take part in time" if silent is None else "all have lost each other"
        timeout = "init_process_group(timeout=...)"
        with contextlib.suppress(AttributeError, RuntimeError, TypeError, ValueError):  # if torch reveals it
            device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
            seconds = (self.group or dist.group.WORLD)._get_backend(device).options._timeout.total_seconds()  # type: ignore[union-attr]
            timeout = f"{seconds:.0f} s here; {timeout} sets it"
        return (
            f"process {self.rank} of {self.size} has lost the others in {self.doing}: {who}. Look at the output of each process: "
            "the earliest error is the cause. A process that dies is noticed at once, one that hangs when the process group's "
            f"timeout is over ({timeout}). Go on from the last checkpoint, with any number of processes. torch says: {said}"
        )

    def _silent_ranks(self) -> list[int] | None:
        """Returns the ranks that do not report a loss within `ROLL_CALL` seconds; None if the store cannot be reached."""
        found: list[list[int]] = []

        def call() -> None:
            # One of these errors comes up if the process that hosts the store has died.
            with contextlib.suppress(RuntimeError, ValueError, AttributeError):
                store, ranks = dist.distributed_c10d._get_default_store(), range(self.size)
                members = [r if self.group is None else dist.get_global_rank(self.group, r) for r in ranks]
                store.set(f"unmask/lost/{members[self.rank]}", "1")
                end = time.monotonic() + (ROLL_CALL if self.size > 2 else 0.0)  # of two processes it must be the other
                while True:
                    silent = [r for r in ranks if r != self.rank and not store.check([f"unmask/lost/{members[r]}"])]
                    if not silent or time.monotonic() >= end:
                        found.append(silent)
                        return
                    time.sleep(0.05)

        thread = threading.Thread(target=call, daemon=True)  # a store without its host may block
        thread.start()
        thread.join(ROLL_CALL + 1.0)
        return found[0] if found else None


def first_to_say(text: str) -> bool:
    """Returns True in the first process of this run that is about to print this text; the others need not print it.

    So an error that one process has is printed by that process, and an error that all have is printed once. The processes
    ask the store of torchrun or of the process group.

    Example:
        >>> first_to_say("a process that trains alone says everything")
        True
    """
    if launched() == 1:
        return True
    key = f"unmask/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{hashlib.sha256(text.encode()).hexdigest()}"
    distributed: Any = dist
    try:
        # This store exists before the process group and outlives it.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = distributed.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
        else:
            store = distributed.distributed_c10d._get_default_store()
        return int(store.add(key, 1)) == 1
    except (RuntimeError, ValueError, KeyError):
        return True  # There is no store, or its host is gone. To print twice is better than never.
