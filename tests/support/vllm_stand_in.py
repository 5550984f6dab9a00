"""Stands in for vLLM's sparse weight transfer: patches, the trainer's engine with its client, and a model that loads them.

It checks what vLLM says that it checks. It loads patches as vLLM says that it does: a tensor of the checkpoint's shape, with NaN
where nothing changes, goes through the model's own loader.
"""

from __future__ import annotations

import dataclasses
import types

import torch
from torch import nn


@dataclasses.dataclass
class Patch:
    """Has the documented fields of vLLM's ``SparseWeightPatch``."""

    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple[int, ...]


class Served:
    """Holds the weights of a model; those of q, k and v, where it has them, are rows of one tensor, as in vLLM's models.

    Attributes:
        checkpoint: The weights by their names in the checkpoint. Those of q, k and v are views of the one tensor.
    """

    def __init__(self, source: nn.Module) -> None:
        self.checkpoint = {name: p.detach().clone() for name, p in source.named_parameters()}
        fused = [name for name in ("q.weight", "k.weight", "v.weight") if name in self.checkpoint]
        if fused:
            self.qkv_proj = torch.cat([self.checkpoint[name] for name in fused])
            self.checkpoint |= zip(fused, self.qkv_proj.chunk(len(fused)), strict=True)

    def load_weights(self, weights):
        for name, loaded in weights:
            held = self.checkpoint[name]
            assert held.shape == loaded.shape
            held.copy_(torch.where(loaded.isnan(), held, loaded.to(held.dtype)))


class Engine:
    """Stands in for vLLM's trainer-side engine, its client and its worker."""

    def __init__(self, served: Served) -> None:
        self.served, self.calls, self.fails_at = served, [], None
        self.client = types.SimpleNamespace(
            start_weight_update=lambda: self.calls.append("start"),
            finish_weight_update=lambda: self.calls.append("finish"),
        )

    def send_weights(self, patches):
        self.calls.append("whole")
        self._load(patches)

    def send_weight_chunk(self, patches):
        self.calls.append("chunk")
        self._load(patches)

    def _load(self, patches):
        for patch in patches:
            check(patch)
        for patch in patches:
            if self.fails_at == 0:
                self.fails_at = None
                raise RuntimeError("a worker died")
            self.fails_at = None if self.fails_at is None else self.fails_at - 1
            whole = torch.full(patch.full_shape, torch.nan, dtype=patch.values.dtype)
            whole.view(-1).index_copy_(0, patch.indices.long(), patch.values)
            self.served.load_weights([(patch.name, whole)])


def check(patch) -> None:
    """Asserts what vLLM's sender and loader check, and that the memory is contiguous, which vLLM takes for granted."""
    numel = torch.Size(patch.full_shape).numel()
    assert patch.indices.dtype == torch.int32
    assert patch.indices.ndim == patch.values.ndim == 1
    assert 0 < patch.indices.numel() == patch.values.numel() == patch.indices.unique().numel()
    assert 0 <= patch.indices.min() <= patch.indices.max() < numel
    assert patch.values.is_floating_point()
    assert not patch.values.isnan().any()
    assert patch.indices.is_contiguous()
    assert patch.values.is_contiguous()
    assert isinstance(patch.full_shape, tuple)
