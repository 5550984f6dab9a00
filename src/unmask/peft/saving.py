"""Turns an adapter into entries of a state dict, and back. PEFT writes the entries to ``adapter_model.safetensors``.

The entries are the delta's tensors (see `unmask.delta.file`) under keys like PEFT's. A tensor NAME of the base has
``base_model.model.NAME.unmask_indices``, ``....unmask_values``, ``....unmask_whole`` and ``....unmask_slots``. The delta's header
is JSON in a tensor of bytes, ``base_model.unmask_header``. Training goes on from ``base_model.unmask_order`` and, where tensors
are narrower than float32, from ``base_model.unmask_masters``. In a model's own state dict the adapter's name is appended to each
key.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

import torch

from unmask.delta.delta import SparseDelta
from unmask.delta.file import INDICES, SLOTS, VALUES, WHOLE, pack, unpack
from unmask.errors import DeltaError
from unmask.files import MOST_HEADER
from unmask.peft.config import PREFIX
from unmask.peft.progress import Progress
from unmask.reading import Malformed, fields, parse_json, refusing

_HEADER, _BASE = f"{PREFIX}header", "model."
_ORDER, _MASTERS = f"{PREFIX}order", f"{PREFIX}masters"
_ENDINGS = {kind: f".{PREFIX}{kind.removeprefix('::')}" for kind in (INDICES, VALUES, WHOLE, SLOTS)}


def put_entries(
    delta: SparseDelta, progress: Progress | None, adapter: str, prefix: str, state: MutableMapping[str, Any]
) -> None:
    """Adds an adapter's delta and progress to a state dict. ``prefix`` is the tuner's place there, ``"base_model."``."""
    tensors, header = pack(delta.sparse, delta.whole, delta.base, delta.metadata)
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("::")
        state[f"{prefix}{_BASE}{name}{_ENDINGS['::' + kind]}.{adapter}"] = tensor
    text = json.dumps(header, sort_keys=True).encode()
    state[f"{prefix}{_HEADER}.{adapter}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if progress is not None:
        state[f"{prefix}{_ORDER}.{adapter}"] = progress.order
        if progress.masters is not None:
            state[f"{prefix}{_MASTERS}.{adapter}"] = progress.masters


def take_entries(
    adapter: str, prefix: str, state: MutableMapping[str, Any]
) -> tuple[SparseDelta, Progress | None] | None:
    """Takes an adapter's delta and progress out of a state dict. Returns None if it has no entry of this adapter."""
    tensors = {}
    for key in [key for key in state if is_entry(key, adapter)]:
        tensors[key.removeprefix(prefix).removesuffix(f".{adapter}")] = state.pop(key).cpu()
    if not tensors:
        return None
    header, order, masters = (tensors.pop(key, None) for key in (_HEADER, _ORDER, _MASTERS))
    if header is None:
        raise DeltaError(f"adapter {adapter!r} lacks its header; the file is incomplete. Take another copy.")
    with refusing(DeltaError, "the adapter's header", "Take another copy."):
        if header.dtype != torch.uint8 or header.ndim != 1:
            raise Malformed(f"it is {header.dtype} of shape {tuple(header.shape)} and must be a vector of bytes")
        read = dict(fields({})(parse_json(header.numpy().tobytes(), MOST_HEADER), "the header"))
    named = {_delta_key(key): tensor for key, tensor in tensors.items()}
    delta = SparseDelta(*unpack(named, read, f"adapter {adapter!r}"))
    return delta, None if order is None else Progress(order, masters)


def is_entry(key: str, adapter: str | None) -> bool:
    """Returns True if a key is an entry of the adapter of this name; None stands for a file, whose keys have no name."""
    if adapter is not None:
        if not key.endswith(f".{adapter}"):
            return False
        key = key.removesuffix(f".{adapter}")
    return key.endswith((*_ENDINGS.values(), f".{_HEADER}", f".{_ORDER}", f".{_MASTERS}"))


def _delta_key(key: str) -> str:
    """Returns the key that a tensor has in a delta's own file."""
    for kind, ending in _ENDINGS.items():
        if key.endswith(ending):
            return key.removeprefix(_BASE).removesuffix(ending) + kind
    raise DeltaError(f"the adapter holds an entry {key!r} that belongs to nothing. Take another copy.")
