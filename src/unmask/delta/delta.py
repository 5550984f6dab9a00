"""SparseDelta: what fine-tuning changed, exactly, as values (not differences) by tensor name.

To apply a delta writes values, so a bfloat16 base is reproduced bit for bit. The overwritten values are returned as another
delta, so undoing is exact too. The file is safetensors (see `unmask.delta.file`); nothing is ever pickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmask.delta import file
from unmask.delta.algebra import add, subtract
from unmask.delta.applying import base_name, check_model, written
from unmask.delta.between import between, refuse_other_class
from unmask.delta.checkpoint import Source
from unmask.delta.drawn import Draw
from unmask.delta.fingerprint import same_bits
from unmask.delta.provenance import Provenance
from unmask.delta.rules import Rule
from unmask.delta.sparse import SparseTensor, check_entry, check_slots
from unmask.delta.target import Target
from unmask.errors import DeltaError
from unmask.files import write_tensors


@dataclass(frozen=True, repr=False, eq=False)
class SparseDelta:
    """An exact change to a base model. Frozen; get one from ``selection.delta()`` or `SparseDelta.load`.

    Attributes:
        sparse: Changed entries by tensor name.
        whole: Tensors that are stored whole: those trained densely, and those that the base checkpoint lacks. A tensor that is
            in ``sparse`` too is stored as it was before training; its changed entries replace entries of it. A tensor that
            training did not change may hold NaN.
        base: The fingerprint of all the base's tensors that are not in ``whole``: ``"sha256:..."``.
        metadata: JSON values: method, budget, step, base id, versions. `provenance` gives them with their meaning.
        places: The hash of the base's values at the places that ``sparse`` sets (tensors that are in ``whole`` left out):
            ``"sha256:..."``, as `unmask.delta.fingerprint.fingerprint_at` makes it; ``""`` where it is not known, or there
            is no place.
        draw: The draw that a random mask's indices are from, so that a file need not store them; None for any other delta.
    """

    sparse: Mapping[str, SparseTensor]
    whole: Mapping[str, Tensor]
    base: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    places: str = ""
    draw: Draw | None = None

    def __post_init__(self) -> None:
        for name, entry in self.sparse.items():
            check_entry(name, entry)
        check_slots(self.sparse)
        for name in self.overlaid:
            part, whole = self.sparse[name], self.whole[name]
            if (part.shape, part.values.dtype) != (tuple(whole.shape), whole.dtype):
                raise DeltaError(
                    f"{name!r} is {whole.dtype} of shape {tuple(whole.shape)} as a whole and {part.values.dtype} of shape "
                    f"{part.shape} in part; the delta is damaged."
                )

    def __len__(self) -> int:
        """Returns how many scalar weights the delta sets in tensors that it stores in part."""
        return sum(entry.numel for entry in self.sparse.values())

    @property
    def overlaid(self) -> list[str]:
        """The names of the tensors that are stored whole, as they were before training, and in part, as they are now."""
        return sorted(self.sparse.keys() & self.whole.keys())

    @property
    def whole_numel(self) -> int:
        """The number of scalars that are stored in whole tensors."""
        return sum(tensor.numel() for tensor in self.whole.values())

    @property
    def provenance(self) -> Provenance:
        """The metadata with their meaning: the method, the budget, the base and the versions.

        Raises:
            DeltaError: A known entry of the metadata has another form than `Provenance` has.
        """
        return Provenance.from_json(self.metadata)

    def __repr__(self) -> str:
        """Returns one short line, such as ``SparseDelta(320,000 weights in 74 tensors, base 'bert-base')``."""
        whole = f", {len(self.whole):,} stored whole" if self.whole else ""
        base = self.metadata.get("base_id") or self.base[:23]
        return f"SparseDelta({len(self):,} weights in {len(self.sparse):,} tensors{whole}, base {base!r})"

    def __eq__(self, other: object) -> bool:
        """Returns True if two deltas are the same, tensors bit for bit. ``draw``, which a file can do without, does not count."""
        if not isinstance(other, SparseDelta):
            return NotImplemented
        facts = [(d.base, d.places, dict(d.metadata), d.sparse.keys(), d.whole.keys()) for d in (self, other)]
        return facts[0] == facts[1] and all(
            same_bits(mine, theirs)
            for name in {*self.sparse, *self.whole}
            for mine, theirs in zip(self._tensors(name), other._tensors(name), strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.base, len(self)))

    def _tensors(self, name: str) -> list[Tensor]:
        """Returns all that is stored of one tensor."""
        entry, whole = self.sparse.get(name), self.whole.get(name)
        held = [] if entry is None else [torch.tensor(entry.shape), entry.indices.long(), entry.values, entry.slots]
        return [torch.empty(0) if tensor is None else tensor for tensor in [*held, whole]]

    def __or__(self, other: SparseDelta) -> SparseDelta:
        """Adds two deltas of one base, exactly and in any order, which must not set the same weights.

        `unmask.combine` adds more of them, says whose head is kept, and has rules for weights that both set.

        Raises:
            DeltaError: They overlap, store a tensor whole with other values in each, or belong to several bases.

        Example:
            >>> def tuned(at):
            ...     return SparseDelta({"w": SparseTensor(torch.tensor([at]), torch.ones(1), (4,))}, {}, "sha256:0")
            >>> a, b = tuned(0), tuned(2)
            >>> (a | b) == (b | a), (a | b) - a == b
            (True, True)
        """
        if not isinstance(other, SparseDelta):
            return NotImplemented
        return SparseDelta(*add([self, other], Rule(), [1.0, 1.0]))

    def __sub__(self, other: SparseDelta) -> SparseDelta:
        """Takes a delta out of a sum that it is a part of; the rest is bit for bit what it was. The order of unmasking is lost.

        Raises:
            DeltaError: The delta is no part of the sum, or the sum's rule has mixed its weights with others'.
        """
        if not isinstance(other, SparseDelta):
            return NotImplemented
        return SparseDelta(*subtract(self, other))

    def with_metadata(self, **more: Any) -> SparseDelta:
        """Returns a copy whose metadata holds ``more`` (JSON values) too."""
        return replace(self, metadata={**self.metadata, **more})

    def apply(self, model: nn.Module, verify: Literal["places", "full"] = "places") -> SparseDelta:
        """Writes the delta into a model that holds the base, in place. A quantised weight gets it as a sidecar.

        Args:
            model: The base model, in the dtype it had in training. If FSDP2 has sharded it, all processes call this together.
            verify: ``"places"`` compares the hash of the base's values at the delta's places, in O(B). It cannot see what the
                base holds elsewhere. ``"full"`` hashes the whole base; the hash of each tensor is remembered until the tensor
                changes. A delta without ``places`` gets the full check in any case.

        Returns:
            The values that were overwritten, as a delta: ``displaced.apply(model)`` restores the base exactly. `unmask.swap`
            takes it to go over to another delta.

        Raises:
            DeltaError: The model is not the base (its names, shapes, dtypes or values differ), or a tensor cannot be written
                (it is expanded, in read-only memory, or an inference tensor). The model is as it was then.

        Example:
            >>> import unmask
            >>> base, tuned = nn.Linear(2, 2), nn.Linear(2, 2)
            >>> _ = tuned.load_state_dict(base.state_dict())
            >>> selection = unmask.select(tuned, unmask.pafi(budget=2))
            >>> tuned(torch.ones(1, 2)).sum().backward()
            >>> torch.optim.SGD(selection.parameters(), lr=0.1).step()
            >>> displaced = selection.delta().apply(base)
            >>> len(displaced)
            2
        """
        if verify not in ("places", "full"):
            raise DeltaError(f"verify = {verify!r}; it must be 'places' or 'full'.")
        target = Target(model)
        check_model(self, target)
        with written(self, target, full=verify == "full") as displaced:
            return SparseDelta(*displaced)

    def save(self, path: str | os.PathLike[str], compress: bool = True) -> Path:
        """Writes the delta to one safetensors file, whole or not at all, and returns its path.

        Args:
            path: The file.
            compress: False writes each tensor's indices and values as plain tensors, for tools that read safetensors. The file
                has two to three times the bytes, and does not keep ``draw``.

        Raises:
            DeltaError: The metadata are no JSON values, or a known entry of them has another form than a reader expects.
            WriteError: The disk is full, or the file cannot be written there; a file that was there before is kept.

        Example:
            >>> import tempfile
            >>> entry = SparseTensor(torch.tensor([2, 9, 11]), torch.ones(3), (4, 5))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = SparseDelta({"weight": entry}, {}, "sha256:0").save(Path(folder, "delta.safetensors"))
            ...     SparseDelta.load(path).sparse["weight"].indices.tolist()
            [2, 9, 11]
        """
        fields = (self.sparse, self.whole, self.base, self.metadata, self.places, self.draw)
        return write_tensors(Path(path), *file.pack(*fields, compress=compress))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Reads a delta and checks every byte of its file.

        Raises:
            DeltaError: There is no such file, it has another format version, or it is damaged.
        """
        return cls(*file.read(Path(path)))

    @classmethod
    def between(cls, base: Source, tuned: Source) -> SparseDelta:
        """Finds the delta that turns one checkpoint into another, bit for bit, in memory of the delta and the largest tensor.

        A tensor of floats is held in part, or whole where that is better: where most of it changed, or where it has NaN or
        infinite values now. Tensors of other dtypes, those that the base lacks, and those that have another shape or dtype in
        the base are held whole. Tied tensors are held once. ``provenance.between`` names what was added, removed or replaced.

        Args:
            base: A folder, a safetensors file, a hub id, a module, or tensors by name.
            tuned: The other checkpoint, in one of the same forms. The delta has its names, or those of ``base`` if only that
                is a module. A prefix that the names of one of them lack does not matter.

        Raises:
            DeltaError: A checkpoint is not there, incomplete, damaged or pickled; both are the same; or they have no tensor
                of one name and shape.

        Example:
            >>> base, tuned = nn.Linear(8, 4), nn.Linear(8, 4)
            >>> _ = tuned.load_state_dict(base.state_dict())
            >>> with torch.no_grad():
            ...     tuned.weight[2, 3] = 7
            >>> delta = SparseDelta.between(base, tuned)
            >>> delta.sparse["weight"].indices.tolist(), delta.provenance.between["bytes"]
            ([19], 144)
        """
        return cls(*between(base, tuned))

    def check_places(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuses a model's tensors, by name, that the delta's values do not fit.

        Raises:
            DeltaError: A tensor of the delta is missing, or has another shape or dtype.
        """
        if "between" in self.metadata and (made := self.provenance.between) is not None:
            refuse_other_class(made, self.whole, tensors)
        whole = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.whole.items()}
        expected = {name: (entry.shape, entry.values.dtype) for name, entry in self.sparse.items()} | whole
        absent = [name for name in expected if name not in tensors]
        if absent:
            raise DeltaError(
                f"the model has no tensor {absent[0]!r}"
                + (f" (nor {len(absent) - 1} more)" if absent[1:] else "")
                + f"; the delta was made on {base_name(self)}. Load that model, with the same head."
            )
        for name, (shape, dtype) in expected.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise DeltaError(
                    f"{name!r} has shape {tuple(tensor.shape)} in this model and {shape} in the delta's base."
                )
            if tensor.dtype != dtype:
                raise DeltaError(
                    f"{name!r} is {tensor.dtype} in this model and {dtype} in the delta's base; load the base with "
                    f"dtype={dtype}, apply, and cast afterwards."
                )


def refuse_diverged(trained: Mapping[str, Tensor]) -> None:
    """Refuses tensors that training has made NaN or infinite.

    Raises:
        DeltaError: One of them holds NaN or infinity.
    """
    for name, tensor in trained.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DeltaError(f"the tensor {name!r} holds NaN or infinite values: training has diverged.")
