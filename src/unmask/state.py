"""A selection's state as plain values and O(B) tensors (as many as were ever tuned), and back: exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from unmask.distributed.sharding import reshard
from unmask.errors import SelectionError
from unmask.slots import take
from unmask.wrappers import persistent_buffers

if TYPE_CHECKING:
    from unmask.selection import Selection

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
        "buffers": {n: b.detach().clone() for n, b in current.items() if not torch.equal(b, selection._buffers[n])},
    }


@torch.no_grad()
def restore(selection: Selection, state: Mapping[str, Any]) -> None:
    """See `Selection.load_state_dict`."""
    selection._identity.check_structure()
    _check_identity(selection, state)
    reshard(selection.model)
    table, layout = selection._table, selection._layout
    layout.write(table.positions[: selection.used], table.base[: selection.used])
    try:
        _check_base(selection, state)
    except SelectionError:
        table.scatter(selection.values, selection.used)
        raise
    selection.used, selection.step = int(state["used"]), int(state["step"])
    table.load(state["positions"], state["base"])
    selection.values.zero_()
    selection.values[: state["values"].numel()] = state["values"]
    if selection._picked is not None:
        selection._picked = state["picked"].to(selection.values.device)
    table.scatter(selection.values, selection.used)
    buffers = persistent_buffers(selection.model)
    for name, original in selection._buffers.items():
        buffers[name].copy_(state["buffers"].get(name, original))
    for tensor in selection.dense:
        tensor.load(state["dense"][tensor.name])
    selection._identity.renew()


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
    needed = [*mine, "step", "used", "values", "base", "positions", "buffers"]
    needed += [] if selection._picked is None else ["picked"]
    missing = [key for key in needed if key not in state]
    if missing:
        raise SelectionError(f"this is no selection state: it lacks {', '.join(missing)}.")
    for key, own in mine.items():
        given = sorted(state[key]) if key == "dense" else state[key]
        if given != own:
            raise SelectionError(
                f"the saved selection has another {key}: {_short(given)} where this one has {_short(own)}. Build the same "
                "selection (same model, method and patterns) before load_state_dict."
            )


def _check_base(selection: Selection, state: Mapping[str, Any]) -> None:
    """The model's weights at the saved positions must be the saved base's, or the trained ones."""
    used, layout = int(state["used"]), selection._layout
    device = selection.values.device
    positions, base, values = (state[key][:used].to(device) for key in ("positions", "base", "values"))
    for index, flat, places in layout.split(positions):
        weights = take(layout.plain(index), flat)
        base_here, trained = base[places].to(weights), values[places].to(weights)
        if not ((weights == base_here) | (weights == trained)).all():
            raise SelectionError(
                f"{layout.names[index]!r} holds other weights than those the saved selection started from; load the same "
                "base model before load_state_dict."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
