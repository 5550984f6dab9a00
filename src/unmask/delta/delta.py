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
from unmask.delta.applying import base_name, check_model, written
from unmask.delta.provenance import Provenance
from unmask.delta.sparse import SparseTensor, check_entry, check_slots
from unmask.delta.target import Target
from unmask.errors import DeltaError
from unmask.files import write_tensors


@dataclass(frozen=True, repr=False)
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
    """

    sparse: Mapping[str, SparseTensor]
    whole: Mapping[str, Tensor]
    base: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    places: str = ""

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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the delta to one safetensors file, whole or not at all, and returns its path.

        Raises:
            DeltaError: The metadata are no JSON values, or a known entry of them has another form than a reader expects.
            WriteError: The disk is full, or the file cannot be written there; a file that was there before is kept.
        """
        return write_tensors(Path(path), *file.pack(self.sparse, self.whole, self.base, self.metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Reads a delta and checks every byte of its file.

        Raises:
            DeltaError: There is no such file, it has another format version, or it is damaged.
        """
        return cls(*file.read(Path(path)))

    def check_places(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuses a model's tensors, by name, that the delta's values do not fit.

        Raises:
            DeltaError: A tensor of the delta is missing, or has another shape or dtype.
        """
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
