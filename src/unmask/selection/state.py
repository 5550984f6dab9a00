"""Saves a selection's state as plain values and O(B) tensors, and restores it: exact resume. Reads and writes its file."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.delta.fingerprint import same_bits, same_entries
from unmask.distributed.sharding import reshard
from unmask.errors import SelectionError
from unmask.files import checksum, read_tensors, write_tensors
from unmask.gradients.entries import take
from unmask.gradients.wrappers import persistent_buffers
from unmask.ranking.ledger import Slots
from unmask.reading import Malformed, count, fields, items, mapping, plain, refusing, text
from unmask.selection.avoid import digest_of_avoided
from unmask.selection.parts import Parts

VERSION = 1
_cut = partial(textwrap.shorten, width=120, placeholder="...")


class StateKeeper:
    """Saves the state of one selection, and restores it."""

    def __init__(self, parts: Parts) -> None:
        self._facts, self._method, self._ledger, self._dense = parts.facts, parts.method, parts.ledger, parts.dense
        self._identity = {  # what must agree before a state can be loaded
            "version": VERSION,
            "method": parts.method.describe(),
            "budget": parts.facts.budget,
            "names": list(parts.ledger.layout.names),
            "shapes": [list(tensor.shape) for tensor in parts.ledger.layout.tensors],
        }
        avoided = digest_of_avoided(parts.ledger.layout)
        self._identity |= {} if avoided is None else {"avoid": avoided}

    def save(self) -> dict[str, Any]:
        """Returns the state; see `unmask.Selection.state_dict`."""
        whole = {"used": self._facts.budget} if self._method.whole else {}
        buffers, before = persistent_buffers(self._facts.model), self._facts.buffers
        return {
            **copy.deepcopy(self._identity),
            **self._ledger.snapshot().entries(),
            **whole,
            "dense": {d.name: d.master.detach().clone() for d in self._dense},
            "buffers": {n: b.detach().clone() for n, b in buffers.items() if not same_bits(b, before[n])},
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `unmask.Selection.load_state_dict`. Nothing is changed if it does not fit."""
        with refusing(SelectionError, "this selection state", "Nothing was changed; take another copy of the state."):
            slots, dense, changed = self._checked(state)
        reshard(self._facts.model)
        self._check_base(slots)
        self._ledger.restore(slots)
        buffers = persistent_buffers(self._facts.model)
        for name, original in self._facts.buffers.items():
            buffers[name].copy_(changed.get(name, original))
        for tensor in self._dense:
            tensor.load(dense[tensor.name])

    def _checked(self, state: Mapping[str, Any]) -> tuple[Slots, dict[str, Tensor], dict[str, Tensor]]:
        """Returns the slots, dense tensors and buffers, each checked and on its device, if the state is one of this selection.

        Raises:
            Malformed: An entry is missing, or is not what a selection could have saved.
            SelectionError: The state is of another method, budget or model.
        """
        ledger, kept = self._ledger, self._ledger.picked is not None
        form = {"version": count, "method": mapping(plain), "budget": count, "names": items(text)}
        form |= {"shapes": items(items(count)), "dense": mapping(plain), "buffers": mapping(plain)}
        form |= {"step": count, "used": count, **dict.fromkeys(("values", "base", "positions"), plain)}
        form |= {"picked": plain} if kept else {}
        fields(form)(state, "the state")
        for key, own in ({"avoid": None} | self._identity | {"dense": sorted(d.name for d in self._dense)}).items():
            given = sorted(state[key]) if key == "dense" else state.get(key)
            if given != own:
                raise SelectionError(
                    f"the saved selection has another {key}: {_cut(repr(given))} where this one has {_cut(repr(own))}. Build the "
                    "same selection (same model, method, patterns and deltas to avoid) before load_state_dict."
                )
        device, dtype, room = ledger.values.device, ledger.values.dtype, ledger.values.numel()
        used, most = state["used"], self._facts.budget if self._method.whole else room
        if used > most or (self._method.whole and used != most):
            raise Malformed(f"used = {used:,} must be a count of slots in use, of {most:,}")
        length = used if kept else room
        values, base = (_tensor(state[key], key, (length,), dtype, device, finite=True) for key in ("values", "base"))
        positions = _tensor(state["positions"], "positions", (length,), torch.int64, device)
        slots = 0 if self._method.whole else used
        filled = positions if kept or ledger.ordered else positions[:slots]
        _check_distinct(filled, "positions", ledger.layout.total)
        if (positions[filled.numel() :] != -1).any():
            raise Malformed(f"positions must be -1 behind the {slots:,} slots in use")
        if values[slots:].any():
            raise Malformed(f"values holds weights behind its {slots:,} slots in use")
        picked = None
        if kept:
            size = state["picked"].numel() if isinstance(state["picked"], Tensor) else 0
            picked = _tensor(state["picked"], "picked", (size,), torch.int64, device)
            if size > self._facts.budget:
                raise Malformed(f"picked must hold at most {self._facts.budget:,} slots")
            _check_distinct(picked, "picked", used)
        masters = {tensor.name: tensor.master for tensor in self._dense}
        dense = {
            n: _tensor(state["dense"][n], f"dense.{n}", m.shape, m.dtype, m.device, True) for n, m in masters.items()
        }
        own = self._facts.buffers
        fields({}, dict.fromkeys(own, plain), closed=True)(state["buffers"], "buffers")
        buffers = {
            n: _tensor(b, f"buffers.{n}", own[n].shape, own[n].dtype, own[n].device)
            for n, b in state["buffers"].items()
        }
        return Slots(positions, base, values, slots, state["step"], picked), dense, buffers

    def _check_base(self, saved: Slots) -> None:
        """Refuses a model whose weights at the saved positions are neither the saved base's nor the trained ones."""
        layout, ledger = self._ledger.layout, self._ledger
        positions = saved.positions[: saved.used]
        holding = ledger.find(positions)
        for index, flat, places in layout.split(positions):
            weights, slot = take(layout.plain(index), flat), holding[places]
            in_use = ((slot >= 0) & (slot < ledger.used)).to(weights.device)  # there the model holds trained weights
            base_here, trained = saved.base[places].to(weights), saved.values[places].to(weights)
            if len(ledger.base):
                weights = torch.where(in_use, ledger.base[slot.clamp(min=0)].to(weights), weights)
            if not (same_entries(weights, base_here) | same_entries(weights, trained)).all():
                raise SelectionError(
                    f"{layout.names[index]!r} holds other weights than those the saved selection started from; load the same "
                    "base model before load_state_dict."
                )


def _tensor(
    value: Any, where: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, finite: bool = False
) -> Tensor:
    """Returns a saved tensor on a device, if it has the shape and dtype that it must have."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise Malformed(f"{where} must be a tensor with values, not {type(value).__name__}")
    if (tuple(value.shape), value.dtype) != (tuple(shape), dtype):
        raise Malformed(
            f"{where} is {value.dtype} of shape {tuple(value.shape)} and must be {dtype} of shape {tuple(shape)}"
        )
    if finite and not torch.isfinite(value).all():
        raise Malformed(f"{where} holds NaN or infinite values")
    return value.detach().to(device)


def _check_distinct(numbers: Tensor, where: str, end: int) -> None:
    """Refuses whole numbers that are negative, not below ``end``, or there twice."""
    if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= end):
        raise Malformed(f"{where} must hold whole numbers below {end:,} in its {numbers.numel():,} entries in use")
    if numbers.unique().numel() < numbers.numel():
        raise Malformed(f"{where} holds a number twice")


_GROUPS = ("dense", "buffers")  # mappings of tensors inside the state
_VALUES = ("version", "method", "budget", "names", "shapes", "step", "used")
_TENSORS = ("values", "base", "positions", "picked")


def write_state(state: Mapping[str, Any], path: str | Path) -> Path:
    """Writes ``selection.state_dict()`` to one file, whole or not at all, with a checksum over all of it.

    Raises:
        WriteError: The disk is full, or the file cannot be written there; a file that was there before is kept.
    """
    tensors = {key: value.cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    for group in _GROUPS:
        tensors |= {f"{group}::{name}": value.cpu().contiguous() for name, value in state[group].items()}
    header = {key: value for key, value in state.items() if key not in tensors and key not in _GROUPS}
    return write_tensors(Path(path), tensors, header | {"checksum": checksum(header, tensors)})


def read_state(path: str | Path) -> dict[str, Any]:
    """Reads a file of `write_state`, for ``selection.load_state_dict``.

    A file of an earlier version, which has no checksum, is read too.

    Raises:
        SelectionError: There is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise SelectionError(f"there is no selection state at {str(path)!r}.")
    with refusing(SelectionError, f"{str(path)!r} is no readable selection state: it", "Take another checkpoint."):
        tensors, header = read_tensors(path)
        fields({}, {"checksum": text})(header, "the header")
        if "checksum" not in header:  # a version that wrote none wrote these entries alone
            fields(dict.fromkeys(_VALUES, plain), closed=True)(header, "the header")
            for key in sorted({key for key in tensors if "::" not in key} - {*_TENSORS}):
                raise Malformed(f"it holds a tensor {key!r} that belongs to nothing")
        elif checksum(header, tensors) != header["checksum"]:
            raise Malformed("it fails its checksum, so it was altered after unmask wrote it")
        state: dict[str, Any] = {key: value for key, value in header.items() if key != "checksum"}
        state |= {group: {} for group in _GROUPS}
        for key, tensor in tensors.items():
            group, sign, name = key.partition("::")
            if sign and group in _GROUPS:
                state[group][name] = tensor
            elif key in header or key in _GROUPS or sign:
                raise Malformed(f"it holds a tensor {key!r} that belongs to nothing")
            else:
                state[key] = tensor
    return state
