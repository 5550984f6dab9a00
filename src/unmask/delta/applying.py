"""Checks that a model is a delta's base, and writes the delta into it: all of it, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from unmask.delta.contents import DeltaFields, Fields
from unmask.delta.exchange import Exchange
from unmask.delta.fingerprint import fingerprint_at
from unmask.delta.sparse import SparseTensor
from unmask.delta.target import Target
from unmask.delta.writable import find_unwritable
from unmask.errors import DeltaError
from unmask.quantised.tensor import QuantisedTensor

_LOAD = (
    "Load that base, unmodified and in the same dtype. (A delta that is already applied changes it, too: give unmask.swap what "
    "apply returned.)"
)


class Delta(DeltaFields, Protocol):
    """The parts of an `unmask.SparseDelta` that it is applied by."""

    def check_places(self, tensors: Mapping[str, Tensor]) -> None: ...


def check_model(delta: Delta, target: Target) -> None:
    """Refuses a model whose tensors the delta does not fit, or that cannot be written. Values are not read.

    Raises:
        DeltaError: In all processes of a sharded model, if one of them refuses.
    """
    error: DeltaError | None = None
    try:
        delta.check_places(target.tensors)
        for name in delta.whole:
            if isinstance(target.tensors[name], QuantisedTensor):
                raise DeltaError(
                    f"{name!r} is quantised in this model and stored whole in the delta; load it unquantised."
                )
        stuck = find_unwritable({name: target.tensors[name] for name in sorted({*delta.sparse, *delta.whole})})
        if stuck is not None:
            raise DeltaError(f"{stuck[0]!r} cannot be written: it {stuck[1]}. Nothing was changed.")
    except DeltaError as refused:
        error = refused
    target.together(error, "the checks of a delta")


@contextlib.contextmanager
def written(
    delta: Delta,
    target: Target,
    full: bool = False,
    instead: Mapping[str, SparseTensor] | None = None,
    done: Mapping[str, SparseTensor] | None = None,
) -> Iterator[Fields]:
    """Writes a delta, and yields the fields of the delta that undoes it. An error in the block, or another base, undoes it.

    Args:
        delta: The delta.
        target: A model's tensors, after `check_model`.
        full: True for the full check, before anything is written. A delta without ``places`` gets it in any case.
        instead: Entries by tensor name that are written in place of the delta's, at the same places.
        done: The base's entries by tensor name, for tensors that hold the delta's values already.

    Raises:
        DeltaError: The model is not the base, or a tensor could not be written.
    """
    full, done = full or not delta.places, done or {}
    if full:
        _check_base(delta, target.fingerprint(without=delta.whole))
    new = {name: entry for name, entry in {**delta.sparse, **(instead or {})}.items() if name not in done}
    exchange = Exchange(target, new, delta.whole)
    try:
        _write(exchange, target)
        old = exchange.displaced() | dict(done)
        if not full:
            _check_places(delta, fingerprint_at(old))
        base = target.fingerprint(without=delta.whole) if full else ""
        places = fingerprint_at({name: delta.sparse[name] for name in old})
        yield old, exchange.whole, base, {"displaced_by": delta.base}, places
    except BaseException:  # also KeyboardInterrupt
        exchange.undo()
        raise


def _write(exchange: Exchange, target: Target) -> None:
    """Writes, and says which tensor could not be written."""
    error: Exception | None = None
    try:
        exchange.write()
    except Exception as raised:
        error = DeltaError(f"{exchange.failed!r} could not be written: {raised}. The model is as it was before.")
        error.__cause__ = raised
    target.together(error, "writing a delta")


def _check_base(delta: Delta, actual: str) -> None:
    """Refuses the fingerprint of a model that is not the base."""
    if not delta.base:
        raise DeltaError(
            "this delta does not say which base it belongs to, so verify='full' cannot check it: it is what another delta "
            "displaced without a full check. Apply it with verify='places', or that other delta with verify='full'."
        )
    if actual != delta.base:
        raise DeltaError(
            f"this model is not the delta's base: its fingerprint is {actual[:23]}..., the delta was made on "
            f"{base_name(delta)} with {delta.base[:23]}... Nothing was changed. {_LOAD}"
        )


def _check_places(delta: Delta, actual: str) -> None:
    """Refuses the hash of a model's values at the delta's places, if it is not the base's."""
    if actual != delta.places:
        count = sum(entry.numel for entry in delta.sparse.values())
        raise DeltaError(
            f"this model is not the delta's base, {base_name(delta)}: at the {count:,} places that the delta sets, it "
            f"holds other values (their hash is {actual[:23]}..., the base's {delta.places[:23]}...). The model is as it "
            f"was before. {_LOAD}"
        )


def base_name(delta: Delta) -> str:
    """Returns the name of a delta's base, for an error text."""
    return repr(delta.metadata.get("base_id") or "another base")
