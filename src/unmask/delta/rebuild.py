"""Writes the tuned checkpoint that a base's files and a delta between checkpoints make, one tensor at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.delta.checkpoint import Checkpoint, open_checkpoint
from unmask.delta.delta import SparseDelta
from unmask.delta.fingerprint import digest, fingerprint
from unmask.delta.renaming import Renaming, renaming
from unmask.delta.tensor_file import LazyTensor, write_file
from unmask.delta.weight_files import COPIED, is_index
from unmask.errors import DeltaError
from unmask.files import making, write_json
from unmask.gradients.entries import put
from unmask.reading import fields, mapping, plain, read_json, refusing


def write_tuned(delta: SparseDelta, base: str | os.PathLike[str], folder: Path) -> Path:
    """Writes the tuned checkpoint of a delta that `SparseDelta.between` made, and returns its folder.

    The files are those of the base: each tensor stays in the file where the base has it, and what was added goes into the last
    one. Configuration and tokenizer files are copied from the base, because the delta changes tensors only.

    Args:
        delta: The delta.
        base: The base's folder, safetensors file or hub id.
        folder: The new folder, which must be empty or not there. It is whole or not there at any moment.

    Raises:
        DeltaError: The delta was not made from checkpoints, or the base is another one. Nothing is written then.
        WriteError: The disk is full, or the folder cannot be written there.

    Example:
        >>> write_tuned(SparseDelta({}, {}, ""), "base", Path("tuned"))
        Traceback (most recent call last):
        unmask.errors.DeltaError: the delta was not made from two checkpoints, so it is applied to a model: delta.apply(model).
    """
    made = delta.provenance.between
    if made is None:
        raise DeltaError(
            "the delta was not made from two checkpoints, so it is applied to a model: delta.apply(model)."
        )
    checkpoint = open_checkpoint(base)
    weights = checkpoint.weights
    assert weights is not None  # a checkpoint in files has them
    held_by_both = {*delta.sparse, *delta.whole} - {*made["added"]}
    checkpoint = checkpoint.renamed(renaming(checkpoint.tensors, held_by_both, Renaming(**made["renamed"])))
    rebuild = _Rebuild(delta, made, checkpoint.tensors)
    rebuild.check()
    files = _contents(checkpoint, rebuild)
    forms = {name: rebuild.form(name) for names, _ in files.values() for name in names}
    with making(folder) as part:
        for place, (names, metadata) in files.items():
            write_file(part / place, {name: forms[name] for name in names}, rebuild.value, metadata)
        rebuild.verify(checkpoint.label)
        if is_index(weights):
            places = {name: place for place, (names, _) in files.items() for name in names}
            _write_index(weights, part / weights.name, places, forms)
        if not Path(base).is_file():
            _copy_small_files(weights.parent, part)
    return folder


@dataclass
class _Rebuild:
    """Makes the tuned tensors from the base's, and remembers the digests of those that it has read."""

    delta: SparseDelta
    made: Mapping[str, Any]
    base: Mapping[str, LazyTensor]
    digests: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuses a base that lacks a tensor of which the delta changes a part, or has it in another shape or dtype."""
        needed = {*self.delta.sparse, *self.made["tied"].values()} - self.delta.whole.keys()
        for name in sorted(needed - self.base.keys()):
            raise DeltaError(f"this base has no tensor {name!r}, so it is not the delta's base ({self._made_on()}).")
        for name, entry in self.delta.sparse.items():
            held = self.base[name]
            if (held.shape, held.dtype) != (entry.shape, entry.values.dtype):
                raise DeltaError(
                    f"{name!r} is {held.dtype} of shape {held.shape} in this base and {entry.values.dtype} of shape "
                    f"{entry.shape} in the delta's ({self._made_on()})."
                )

    def form(self, name: str) -> LazyTensor:
        """Returns a tensor that has the dtype and shape of a tuned tensor; it need not be read."""
        name = self.made["tied"].get(name, name)
        whole = self.delta.whole.get(name)
        return self.base[name] if whole is None else LazyTensor(whole.dtype, tuple(whole.shape), lambda: whole)

    def value(self, name: str) -> Tensor:
        """Returns a tuned tensor."""
        name = self.made["tied"].get(name, name)
        if name in self.delta.whole:
            return self.delta.whole[name]
        tensor = self.base[name].read()
        if name not in self.digests:
            self.digests[name] = digest(tensor)
        if name in self.delta.sparse:
            put(tensor, self.delta.sparse[name].indices, self.delta.sparse[name].values)
        return tensor

    def verify(self, label: str) -> None:
        """Refuses a base whose values are not those of the delta's base."""
        actual = fingerprint(self.digests)
        if actual != self.delta.base:
            raise DeltaError(
                f"{label} is not the delta's base ({self._made_on()}): its fingerprint is {actual[:23]}..., the delta's is "
                f"{self.delta.base[:23]}... Nothing was written. Give that base, unmodified and in the same dtype."
            )

    def _made_on(self) -> str:
        return f"made on {self.delta.metadata.get('base_id') or 'another base'!r}"


def _contents(checkpoint: Checkpoint, rebuild: _Rebuild) -> dict[str, tuple[list[str], Mapping[str, str]]]:
    """Returns by file name the names of the tensors of each file to write, and the file's metadata."""
    removed = set(rebuild.made["removed"])
    files = {file.path.name: ([n for n in file.names if n not in removed], file.metadata) for file in checkpoint.files}
    last, _ = files[checkpoint.files[-1].path.name]
    last += sorted({*rebuild.delta.whole, *rebuild.made["tied"]} - rebuild.base.keys())
    return {place: (names, metadata) for place, (names, metadata) in files.items() if names}


def _write_index(base: Path, path: Path, places: Mapping[str, str], forms: Mapping[str, LazyTensor]) -> None:
    """Writes the index of the files, with the entries that the base's index has."""
    with refusing(DeltaError, repr(str(base)), "Take another copy."):
        metadata = dict(fields({}, {"metadata": mapping(plain)})(read_json(base), "the index").get("metadata", {}))
    metadata["total_size"] = sum(form.nbytes for form in forms.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(form.numel for form in forms.values())
    write_json(path, {"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2)


def _copy_small_files(base: Path, folder: Path) -> None:
    """Copies a base's configuration, tokenizer and code."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
