"""Target: the tensors of a live model that deltas are written into, and what makes them unfit for it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import digest, fingerprint
from unmask.delta.live import has_selection
from unmask.delta.remembered import digests
from unmask.distributed.sharding import gathered, group_of, is_sharded, reshard
from unmask.errors import DeltaError, MethodError
from unmask.quantised.layers import settle
from unmask.quantised.tensor import QuantisedTensor


class Target:
    """The tensors of a live model. Of a model that FSDP2 has sharded, this process reads and writes its own rows.

    All processes of a sharded model make the same calls together.

    Attributes:
        model: The model.
        tensors: Its parameters and persistent buffers by name, detached.
        processes: The processes over which it is sharded; None if it is not.

    Raises:
        DeltaError: The model has a live selection, or is sharded in another way than by rows.
    """

    def __init__(self, model: nn.Module) -> None:
        if has_selection(model):
            raise DeltaError("this model has a live selection; call its release() before applying a delta.")
        reshard(model)
        self.model, self.tensors = model, base_tensors(model)
        try:
            self.processes = group_of(model) if any(map(is_sharded, self.tensors.values())) else None
        except MethodError as error:
            raise DeltaError(f"no delta can be applied: {error}") from error

    def held(self, name: str) -> tuple[Tensor, int]:
        """Returns the part of a tensor that this process holds, and the flat index of its first entry in the tensor."""
        tensor = self.tensors[name]
        if self.processes is None or not is_sharded(tensor):
            return tensor, 0
        rows = tensor.shape[0]
        first = min(rows, self.processes.rank * -(-rows // self.processes.size))
        return tensor.to_local(), first * (tensor.numel() // max(1, rows))  # type: ignore[attr-defined]

    def fingerprint(self, without: Container[str]) -> str:
        """Returns the fingerprint of all tensors but those named; see `unmask.delta.remembered`."""
        hashed = {name: tensor for name, tensor in self.tensors.items() if name not in without}
        if self.processes is None:
            return fingerprint(digests(self.model, hashed))
        return fingerprint({name: digest(gathered(tensor)) for name, tensor in hashed.items()})

    def settle(self, names: Container[str]) -> None:
        """Hooks the quantised layers among the named tensors that now compute with changed weights."""
        if any(isinstance(tensor, QuantisedTensor) for tensor in self.tensors.values()):
            settle(self.model, [tensor for name, tensor in self.tensors.items() if name in names])

    def together(self, error: Exception | None, doing: str) -> None:
        """Raises this process's error, if it has one, or says that another process has failed.

        Raises:
            DeltaError: Another process has failed.
        """
        if self.processes is not None:
            device = next(self.held(name)[0].device for name, tensor in self.tensors.items() if is_sharded(tensor))
            failed = self.processes.gather(torch.tensor([error is not None], device=device, dtype=torch.uint8))
            ranks = failed.view(-1).nonzero().view(-1).tolist()
            if error is None and ranks:
                raise DeltaError(
                    f"process {ranks[0]} failed in {doing}; its own error says why. The model is as it was."
                )
        if error is not None:
            raise error
