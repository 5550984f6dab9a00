"""A selection's state as plain values and O(B) tensors (as many as were ever tuned), and back: exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.delta.fingerprint import same_bits, same_entries
from unmask.distributed.sharding import reshard
from unmask.errors import SelectionError
from unmask.gradients.entries import take
from unmask.gradients.wrappers import persistent_buffers
from unmask.reading import Malformed, count, fields, items, mapping, plain, refusing, text

if TYPE_CHECKING:
    from unmask.selection.selection import Selection
from pathlib import Path

from unmask.files import checksum, read_tensors, write_tensors

VERSION = 1


def state_of(selection: Selection) -> dict[str, Any]:
    """See `Selection.state_dict`."""
    selection._identity.check_dense()
    window, table = selection._window, selection._table
    current = persistent_buffers(selection.model)
    picked = selection._picked
    end = None if picked is None else selection.used  # of slots for all weights, those in use
    values = selection.values.detach()[:end].clone()
    if window.tentative is not None and picked is None:  # made in a backward that no step has followed
        values[window.tentative.slots] = window.tentative.displaced
    values[selection.used :] = 0
    return {
        **_identity(selection),
        "step": selection.step,
        "used": selection.used,
        "values": values,
        "base": table.base[:end].clone(),
        "positions": table.positions[:end].clone(),
        **({} if picked is None else {"picked": picked.clone()}),
        "dense": {d.name: d.master.detach().clone() for d in selection.dense},
        "buffers": {n: b.detach().clone() for n, b in current.items() if not same_bits(b, selection._buffers[n])},
    }


@torch.no_grad()
def restore(selection: Selection, state: Mapping[str, Any]) -> None:
    """See `Selection.load_state_dict`."""
    selection._identity.check_structure()
    with refusing(SelectionError, "this selection state", "Nothing was changed; take another copy of the state."):
        saved = _checked(selection, state)
    reshard(selection.model)
    _check_base(selection, saved)
    table, layout = selection._table, selection._layout
    layout.write(table.positions[: selection.used], table.base[: selection.used])
    selection.used, selection.step = saved.used, saved.step
    table.load(saved.positions, saved.base)
    selection.values.zero_()
    selection.values[: saved.used] = saved.values[: saved.used]
    selection._picked = None if saved.picked is None else saved.picked.clone()
    table.scatter(selection.values, selection.used)
    buffers = persistent_buffers(selection.model)
    for name, original in selection._buffers.items():
        buffers[name].copy_(saved.buffers.get(name, original))
    for tensor in selection.dense:
        tensor.load(saved.dense[tensor.name])
    selection._identity.renew()


@dataclass(frozen=True)
class _Saved:
    """A state that fits a selection: every entry is checked, and every tensor is on its device."""

    step: int
    used: int
    values: Tensor
    base: Tensor
    positions: Tensor
    picked: Tensor | None
    dense: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


def _checked(selection: Selection, state: Mapping[str, Any]) -> _Saved:
    """The state, if it is one of this selection.

    Raises:
        Malformed: An entry is missing, or is not what a selection could have saved.
        SelectionError: The state is of another method, budget or model.
    """
    form = {"version": count, "method": mapping(plain), "budget": count, "names": items(text)}
    form |= {"shapes": items(items(count)), "dense": mapping(plain), "buffers": mapping(plain)}
    form |= {"step": count, "used": count, **dict.fromkeys(("values", "base", "positions"), plain)}
    form |= {} if selection._picked is None else {"picked": plain}
    fields(form)(state, "the state")
    _check_identity(selection, state)
    step, used = state["step"], state["used"]
    device, room, kept = selection.values.device, selection.values.numel(), selection._picked is not None
    most = selection.budget if selection.method.whole else room
    if used > most or (selection.method.whole and used != most):
        raise Malformed(f"used = {used:,} must be a count of slots in use, of {most:,}")
    length = used if kept else room
    dtype = selection.values.dtype
    values, base = (_tensor(state[key], key, (length,), dtype, device, finite=True) for key in ("values", "base"))
    positions = _tensor(state["positions"], "positions", (length,), torch.int64, device)
    slots = 0 if selection.method.whole else used
    _check_positions(positions, slots, selection._layout.total, filled=kept or selection._ordered)
    if values[slots:].any():
        raise Malformed(f"values holds weights behind its {slots:,} slots in use")
    picked = None if not kept else _checked_picked(state["picked"], selection, used, device)
    masters = {tensor.name: tensor.master for tensor in selection.dense}
    dense = {n: _tensor(state["dense"][n], f"dense.{n}", m.shape, m.dtype, m.device, True) for n, m in masters.items()}
    own = selection._buffers
    fields({}, dict.fromkeys(own, plain), closed=True)(state["buffers"], "buffers")
    given = state["buffers"].items()
    buffers = {n: _tensor(b, f"buffers.{n}", own[n].shape, own[n].dtype, own[n].device) for n, b in given}
    return _Saved(step, used, values, base, positions, picked, dense, buffers)


def _tensor(
    value: Any, where: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, finite: bool = False
) -> Tensor:
    """A tensor of a shape and dtype, on a device."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise Malformed(f"{where} must be a tensor with values, not {type(value).__name__}")
    if (tuple(value.shape), value.dtype) != (tuple(shape), dtype):
        raise Malformed(
            f"{where} is {value.dtype} of shape {tuple(value.shape)} and must be {dtype} of shape {tuple(shape)}"
        )
    if finite and not torch.isfinite(value).all():
        raise Malformed(f"{where} holds NaN or infinite values")
    return value.detach().to(device)


def _check_positions(positions: Tensor, used: int, total: int, filled: bool) -> None:
    """The slots in use hold positions, each another one; the slots after them hold none, or all do where the order is known."""
    held = positions if filled else positions[:used]
    if held.numel() and (int(held.min()) < 0 or int(held.max()) >= total):
        raise Malformed(
            f"positions must lie in 0..{total - 1} in the slots in use, of which there are {held.numel():,}"
        )
    if held.unique().numel() < held.numel():
        raise Malformed("positions holds a weight twice")
    if (positions[held.numel() :] != -1).any():
        raise Malformed(f"positions must be -1 behind the {used:,} slots in use")


def _checked_picked(value: Any, selection: Selection, used: int, device: torch.device) -> Tensor:
    """The slots that the last step picked."""
    size = value.numel() if isinstance(value, Tensor) else 0
    picked = _tensor(value, "picked", (size,), torch.int64, device)
    if size > selection.budget or picked.unique().numel() < size:
        raise Malformed(f"picked must hold at most {selection.budget:,} slots, each once")
    if size and (int(picked.min()) < 0 or int(picked.max()) >= used):
        raise Malformed(f"picked must hold slots in use, of which there are {used:,}")
    return picked


def _identity(selection: Selection) -> dict[str, Any]:
    """What must agree before a state can be loaded."""
    return {
        "version": VERSION,
        "method": selection.method.describe(),
        "budget": selection.budget,
        "names": list(selection._layout.names),
        "shapes": selection._identity.shapes,
    }


def _check_identity(selection: Selection, state: Mapping[str, Any]) -> None:
    mine = _identity(selection) | {"dense": sorted(d.name for d in selection.dense)}
    for key, own in mine.items():
        given = sorted(state[key]) if key == "dense" else state[key]
        if given != own:
            raise SelectionError(
                f"the saved selection has another {key}: {_short(given)} where this one has {_short(own)}. Build the same "
                "selection (same model, method and patterns) before load_state_dict."
            )


def _check_base(selection: Selection, saved: _Saved) -> None:
    """The model's base weights at the saved positions must be the saved base's, or the trained ones; nothing is written."""
    layout, table = selection._layout, selection._table
    slots = 0 if selection.method.whole else saved.used
    positions = saved.positions[:slots]
    holding = table.find(positions)
    for index, flat, places in layout.split(positions):
        weights, slot = take(layout.plain(index), flat), holding[places]
        in_use = ((slot >= 0) & (slot < selection.used)).to(weights.device)  # there the model holds trained weights
        base_here, trained = saved.base[places].to(weights), saved.values[places].to(weights)
        weights = (
            torch.where(in_use, table.base[slot.clamp(min=0)].to(weights), weights) if len(table.base) else weights
        )
        if not (same_entries(weights, base_here) | same_entries(weights, trained)).all():
            raise SelectionError(
                f"{layout.names[index]!r} holds other weights than those the saved selection started from; load the same "
                "base model before load_state_dict."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


_GROUPS = ("dense", "buffers")  # mappings of tensors inside the state
_VALUES = ("version", "method", "budget", "names", "shapes", "step", "used")
_TENSORS = ("values", "base", "positions", "picked")


def write_state(state: Mapping[str, Any], path: str | Path) -> Path:
    """Writes ``selection.state_dict()`` to one file, atomically, with a checksum over all of it.

    Raises:
        WriteError: The disk is full, or the file cannot be written there; what was there before is kept.
    """
    tensors = {key: value.cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    for group in _GROUPS:
        tensors |= {f"{group}::{name}": value.cpu().contiguous() for name, value in state[group].items()}
    header = {key: value for key, value in state.items() if key not in tensors and key not in _GROUPS}
    return write_tensors(Path(path), tensors, header | {"checksum": checksum(header, tensors)})


def read_state(path: str | Path) -> dict[str, Any]:
    """Reads what `write_state` wrote, for ``selection.load_state_dict``.

    A file of an earlier version, which has no checksum, is read too.

    Raises:
        SelectionError: No such file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise SelectionError(f"there is no selection state at {str(path)!r}.")
    with refusing(SelectionError, f"{str(path)!r} is no readable selection state: it", "Take another checkpoint."):
        tensors, header = read_tensors(path)
        _check(fields({}, {"checksum": text})(header, "the header"), tensors)
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


def _check(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if "checksum" in header:
        if checksum(header, tensors) != header["checksum"]:
            raise Malformed("it fails its checksum, so it was altered after unmask wrote it")
        return
    # of a version that wrote none, and these entries alone
    fields(dict.fromkeys(_VALUES, plain), closed=True)(header, "the header")
    alone = {key for key in tensors if "::" not in key}
    for key in sorted(alone - {*_TENSORS}):
        raise Malformed(f"it holds a tensor {key!r} that belongs to nothing")
