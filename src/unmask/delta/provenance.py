"""Provenance: what a delta's metadata say of the training that made it. `unmask.select` and the PEFT method write the same."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import nn

from unmask import __version__
from unmask.errors import DeltaError
from unmask.methods.method import Method
from unmask.quantised.layers import weights
from unmask.quantised.tensor import QuantisedTensor
from unmask.ranking.ledger import Layout
from unmask.reading import Form, count, fields, items, mapping, number, optional, plain, refusing, text

_METHOD = {
    "name": text,
    "strategy": text,
    "leaving": text,
    "parameters": mapping(plain),
    "steps": count,
    "stride": count,
}
_INTO = {"r": count, "alpha": number, "dropout": number, "targets": items(text), "reduction": number, "seed": count}
_BETWEEN = {
    "tuned": optional(text),
    "tensors": count,
    "weights": count,
    "bytes": count,
    "added": items(text),
    "removed": items(text),
    "replaced": items(text),
    "tied": mapping(text),
    "renamed": fields({"off": text, "on": text}, closed=True),
}


def _entry(form: Form) -> Any:
    """Declares an entry of the metadata, which has this form if it is there."""
    return field(default=None, metadata={"form": form})


@dataclass(frozen=True)
class Provenance:
    """The metadata of a delta: how it was made.

    A delta of an earlier version, or a user's own, may lack any entry: it is None then.

    Attributes:
        method: The method that selected, as `unmask.Method.describe` gives it.
        budget: B; for `unmask.full` the number of weights that it trained.
        used: How many slots were in use.
        step: How many optimizer steps were taken.
        eligible: How many tensors and weights could be selected: ``{"tensors": 74, "weights": 85_000_000}``.
        dense: Names of the tensors that were trained whole.
        base_id: The base model's id or folder.
        parameters: How many weights the model has in its parameters.
        quantised: The kinds of quantised weights that the model has.
        versions: The versions of unmask, torch and Python.
        task: The task of ``unmask train``, as it describes itself.
        into: What ``unmask train`` added to the base before it selected (a LoRA, adapters).
        after: The run's evaluation at this step, by name.
        checkpoint: The checkpoint that a delta in the course of a run belongs to.
        between: What `unmask.SparseDelta.between` found in the tuned checkpoint: its folder or id (``tuned``); the number of
            its tensors, weights and bytes, tied tensors counted once; the names of the tensors that it ``added``, ``removed``
            or ``replaced`` by one of another shape or dtype; the names of tied tensors (``tied``: each with the name that the
            delta has for it); and the prefixes that were taken off and put before the base's names (``renamed``).
        combined: What a sum of deltas was made of: its rule, and each part (see `unmask.combine`).
        more: All further entries, which are the user's.
    """

    method: Mapping[str, Any] | None = _entry(fields({}, _METHOD))
    budget: int | None = _entry(count)
    used: int | None = _entry(count)
    step: int | None = _entry(count)
    eligible: Mapping[str, int] | None = _entry(fields({"tensors": count, "weights": count}))
    dense: Sequence[str] | None = _entry(items(text))
    base_id: str | None = _entry(optional(text))
    parameters: int | None = _entry(count)
    quantised: Sequence[str] | None = _entry(items(text))
    versions: Mapping[str, Any] | None = _entry(mapping(plain))
    task: Any = None
    into: Mapping[str, Any] | None = _entry(optional(fields({"kind": text}, _INTO, closed=True)))
    after: Mapping[str, float] | None = _entry(mapping(number))
    checkpoint: str | None = _entry(text)
    between: Mapping[str, Any] | None = _entry(fields(_BETWEEN, closed=True))
    combined: Mapping[str, Any] | None = _entry(fields({"parts": items(mapping(plain))}))
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> Provenance:
        """Reads the metadata of a delta.

        Raises:
            DeltaError: A known entry has another form than it is written with.

        Example:
            >>> Provenance.from_json({"budget": 3, "note": "mine"}).more
            {'note': 'mine'}
        """
        with refusing(DeltaError, "the delta's metadata", "Give JSON values."):
            METADATA(dict(metadata), "metadata")
        known = {f.name for f in fields_of(cls)} - {"more"}
        more = {key: value for key, value in metadata.items() if key not in known}
        return cls(**{key: metadata[key] for key in known & metadata.keys()}, more=more)

    def to_json(self) -> dict[str, Any]:
        """Returns the metadata as JSON values; entries that are None are left out, but ``base_id``.

        Example:
            >>> Provenance(budget=3, more={"note": "mine"}).to_json()
            {'budget': 3, 'base_id': None, 'note': 'mine'}
        """
        named = {f.name: getattr(self, f.name) for f in fields_of(self) if f.name != "more"}
        return {key: value for key, value in named.items() if value is not None or key == "base_id"} | dict(self.more)


METADATA = fields({}, {f.name: f.metadata["form"] for f in fields_of(Provenance) if f.metadata})
"""The form of the metadata: each known entry is checked if it is there. Any further entry is the user's."""


def provenance_of(
    model: nn.Module,
    method: Method,
    layout: Layout,
    *,
    budget: int,
    used: int,
    step: int,
    dense: Sequence[str],
    base_id: str | None,
    parameters: int,
) -> Provenance:
    """Returns the provenance of a delta that is recorded now. The keywords are its fields."""
    kinds = sorted({t.sidecar.source.kind for t in weights(model).values() if isinstance(t, QuantisedTensor)})
    return Provenance(
        method.describe(),
        budget,
        used,
        step,
        {"tensors": len(layout.names), "weights": layout.free},
        list(dense),
        base_id,
        parameters,
        kinds or None,
        {"unmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )
