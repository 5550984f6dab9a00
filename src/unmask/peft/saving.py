"""An adapter as entries of a state dict, and back: PEFT writes them to ``adapter_model.safetensors``.

The entries are the delta's tensors (see `unmask.delta.file`) under PEFT's kind of keys, for a tensor NAME of the base:
``base_model.model.NAME.unmask_indices``, ``....unmask_values``, ``....unmask_whole``, ``....unmask_slots``; and the
delta's header, as JSON in a tensor of bytes, ``base_model.unmask_header``; and, for training to go on,
``base_model.unmask_order`` and, where tensors are less than float32, ``base_model.unmask_masters``. In a model's own state
dict the adapter's name is appended to each key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

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
    """Adds a delta to a state dict.

    Args:
        delta: The adapter's.
        progress: What training needs to go on from it, or None.
        adapter: Its name.
        prefix: The tuner's place in the state dict, ``"base_model."``.
        state: Is added to.
    """
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
    """Takes a delta, and what goes with it, out of a state dict; None if it holds none of this adapter.

    Raises:
        DeltaError: Anything is missing or was altered.
    """
    tensors = {}
    for key in [key for key in state if is_entry(key, adapter)]:
        tensors[key.removeprefix(prefix).removesuffix(f".{adapter}")] = state.pop(key).cpu()
    if not tensors:
        return None
    header, order, masters = (tensors.pop(key, None) for key in (_HEADER, _ORDER, _MASTERS))
    if header is None:
        raise DeltaError(f"adapter {adapter!r} lacks its header; the file is incomplete. Take another copy.")
    named = {_delta_key(key): tensor for key, tensor in tensors.items()}
    delta = SparseDelta(*unpack(named, _read(header), f"adapter {adapter!r}"))
    return delta, None if order is None else Progress(order, masters)


def is_entry(key: str, adapter: str | None) -> bool:
    """Whether a key is of an adapter of ours: with its name in a model's state dict, with none in a file (None)."""
    if adapter is not None:
        if not key.endswith(f".{adapter}"):
            return False
        key = key.removesuffix(f".{adapter}")
    return key.endswith((*_ENDINGS.values(), f".{_HEADER}", f".{_ORDER}", f".{_MASTERS}"))


def _delta_key(key: str) -> str:
    for kind, ending in _ENDINGS.items():
        if key.endswith(ending):
            return key.removeprefix(_BASE).removesuffix(ending) + kind
    raise DeltaError(f"the adapter holds an entry {key!r} that belongs to nothing. Take another copy.")


def _read(header: Tensor) -> Mapping[str, Any]:
    with refusing(DeltaError, "the adapter's header", "Take another copy."):
        if header.dtype != torch.uint8 or header.ndim != 1:
            raise Malformed(f"it is {header.dtype} of shape {tuple(header.shape)} and must be a vector of bytes")
        return dict(fields({})(parse_json(header.numpy().tobytes(), MOST_HEADER), "the header"))
