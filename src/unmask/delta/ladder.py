"""Ladder: several deltas of one run in one file, each stored as its change to the one before.

A run that unmasks its budget step by step gives a series of models of growing budgets. Each *rung* of the ladder is the delta of
one of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.delta import changes
from unmask.delta.delta import SparseDelta
from unmask.errors import DeltaError
from unmask.files import checksum, read_tensors, write_tensors
from unmask.reading import Malformed, refusing

_ANOTHER = "Take another copy."


@dataclass(frozen=True)
class Ladder:
    """The deltas of one run at several steps, in the order of their budgets. Frozen.

    Attributes:
        rungs: The deltas.

    Raises:
        DeltaError: There is no rung, or one sets fewer weights than the one before it.

    Example:
        >>> import torch
        >>> from unmask import SparseTensor
        >>> def tuned(*values):
        ...     entry = SparseTensor(torch.arange(len(values)), torch.tensor(values), (4,))
        ...     return SparseDelta({"w": entry}, {}, "sha256:0")
        >>> ladder = Ladder([tuned(1.0), tuned(1.5, 2.0)])
        >>> ladder.budgets, ladder.at(1).sparse["w"].values.tolist()
        ([1, 2], [1.0])
    """

    rungs: Sequence[SparseDelta]

    def __post_init__(self) -> None:
        if not self.rungs:
            raise DeltaError("a ladder needs at least one delta.")
        for below, above in zip(self.rungs, self.rungs[1:], strict=False):
            if len(above) < len(below):
                raise DeltaError(
                    f"a rung of {len(above):,} weights comes after one of {len(below):,}; give the deltas in the order of their "
                    "budgets."
                )

    @property
    def budgets(self) -> list[int]:
        """The number of weights that each rung sets."""
        return [len(rung) for rung in self.rungs]

    def at(self, budget: int) -> SparseDelta:
        """Returns the last rung that sets so many weights: the delta of that checkpoint, bit for bit.

        Raises:
            DeltaError: No rung sets so many.
        """
        found = [rung for rung in self.rungs if len(rung) == budget]
        if not found:
            there = ", ".join(f"{each:,}" for each in sorted({*self.budgets}))
            raise DeltaError(f"budget = {budget!r:.80}; the ladder has rungs of {there} weights.")
        return found[-1]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes all rungs to one safetensors file, whole or not at all, and returns its path.

        Raises:
            DeltaError: The rungs belong to several bases, or their orders of unmasking do not fit one another.
            WriteError: The disk is full, or the file cannot be written there; a file that was there before is kept.
        """
        tensors: dict[str, Any] = {}
        header: dict[str, Any] = {"format_version": 1, "kind": "ladder", "rungs": []}
        before = SparseDelta({}, {}, "")
        for number, rung in enumerate(self.rungs):
            try:
                held, described = changes.pack(before, rung)
            except Malformed as error:
                raise DeltaError(f"rung number {number} cannot follow the one before it: {error}.") from error
            tensors |= {f"{number}.{key}": tensor for key, tensor in held.items()}
            header["rungs"].append(described)
            before = rung
        return write_tensors(Path(path), tensors, header | {"checksum": checksum(header, tensors)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ladder:
        """Reads a ladder and checks every byte of its file.

        Raises:
            DeltaError: There is no such file, it is no ladder, or it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise DeltaError(f"there is no ladder at {str(path)!r}; give the path of a file that Ladder.save wrote.")
        with refusing(DeltaError, f"{str(path)!r} is no readable ladder: it", _ANOTHER):
            tensors, header = read_tensors(path)
            changes.HEADER(header, "the header")
            if header["format_version"] != 1 or header["kind"] != "ladder":
                raise Malformed(f"has format {header['kind']!r} {header['format_version']}, and must have 'ladder' 1")
            if checksum(header, tensors) != header["checksum"]:
                raise Malformed("it fails its checksum, so it was altered after unmask wrote it")
            rungs: list[SparseDelta] = []
            for number, described in enumerate(header["rungs"]):
                start = f"{number}."
                held = {key.removeprefix(start): tensors.pop(key) for key in [*tensors] if key.startswith(start)}
                before = rungs[-1] if rungs else SparseDelta({}, {}, "")
                rungs.append(SparseDelta(*changes.unpack(before, held, described)))
            if tensors:
                raise Malformed(f"it holds a tensor {min(tensors)!r} that belongs to nothing")
        return cls(rungs)
