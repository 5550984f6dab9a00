"""The processes that train together, and what they do as one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.errors import MethodError


class Processes:
    """The members of one process group. Every call is made by all of them, in the same order.

    Args:
        group: A process group; None for all processes.

    Raises:
        MethodError: This process is no member.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise MethodError(
                "this process is no member of the given group; give it its own group, or exchange='none' to train by itself."
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place (a contiguous tensor's memory); bitwise the same in all of them."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean, likewise: what DDP makes of gradients."""
        return self.sum(tensor).div_(self.size)

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors, of one shape and dtype: (processes, *shape)."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)

    def gather_ragged(self, tensor: Tensor, lengths: list[int]) -> list[Tensor]:
        """All processes' vectors, of different lengths, which all of them know."""
        padded = tensor.new_zeros(max(lengths))
        padded[: tensor.numel()] = tensor
        return [part[:length] for part, length in zip(self.gather(padded), lengths, strict=True)]

    def differing(self, tensors: Mapping[str, Tensor], device: torch.device) -> list[str]:
        """Names of the tensors that are not the same in all processes; 8 bytes travel per tensor."""
        if not tensors:
            return []
        sums = self.gather(torch.stack([checksum(tensor).to(device) for tensor in tensors.values()]))
        same = (sums == sums[0]).all(0).tolist()
        return [name for name, alike in zip(tensors, same, strict=True) if not alike]

    def take_first(self, tensor: Tensor, device: torch.device) -> None:
        """Gives all processes the first one's values."""
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        values = tensor.to(device, copy=True).contiguous()
        dist.broadcast(values, source, group=self.group)
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
