"""Writes and reads a delta's file: safetensors, with a checksum over everything.

Format 3 is compressed (`unmask.delta.coded`) unless plain tensors are asked for (`unmask.delta.plain`). Files of formats 1 and 2,
which are plain, are read for good. The safetensors metadata hold one entry, ``unmask``: JSON with the format version and the
checksum, and with everything else that is no tensor where the tensors are plain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.delta import coded, plain
from unmask.delta.drawn import Draw
from unmask.delta.plain import Contents
from unmask.delta.provenance import METADATA
from unmask.delta.sparse import SparseTensor
from unmask.errors import DeltaError
from unmask.files import checksum, read_tensors
from unmask.reading import Malformed, bounded, count, fields, refusing, text

FORMAT_VERSION = 3


def read(path: Path) -> Contents:
    """Reads a delta and checks every byte of it; see `unpack`."""
    if not path.is_file():
        raise DeltaError(f"there is no delta at {str(path)!r}; give the path of a .safetensors file that unmask wrote.")
    with refusing(DeltaError, f"{str(path)!r} is no readable unmask delta: it", _ANOTHER):
        tensors, header = read_tensors(path)
    return unpack(tensors, header, repr(str(path)))


def pack(
    sparse: Mapping[str, SparseTensor],
    whole: Mapping[str, Tensor],
    base: str,
    metadata: Mapping[str, Any],
    places: str = "",
    draw: Draw | None = None,
    compress: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the header of the file of a delta with these fields. Plain tensors do not keep the draw.

    Raises:
        DeltaError: The metadata are no JSON values, or a known entry of them has another form than a reader expects.
    """
    with refusing(DeltaError, "the delta's metadata", "Give JSON values."):
        METADATA(bounded(dict(metadata)), "metadata")
        try:
            json.dumps(dict(metadata), sort_keys=True)
        except (TypeError, ValueError) as error:  # a tensor among the metadata, say
            raise Malformed(str(error)) from error
    if compress:
        tensors, header = coded.pack(sparse, whole, base, metadata, places, draw)
    else:
        tensors, header = plain.pack(sparse, whole, base, metadata, places)
    return tensors, header | {"checksum": checksum(header, tensors)}


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any], source: str) -> Contents:
    """Returns what `pack` got. Error texts name the ``source`` of the file's content.

    Raises:
        DeltaError: The file has another format version, was altered, or is not of the form that `pack` makes.
    """
    with refusing(DeltaError, f"{source} is no readable unmask delta: it", _ANOTHER):
        fields({"format_version": count, "checksum": text})(header, "the header")
        if header["format_version"] not in range(1, FORMAT_VERSION + 1):
            raise DeltaError(
                f"{source} has format version {header['format_version']}; this unmask reads up to {FORMAT_VERSION}. Update "
                "unmask."
            )
        if checksum(header, tensors) != header["checksum"]:
            raise DeltaError(f"{source} fails its checksum: it was altered after unmask wrote it. Take another copy.")
        is_coded = header["format_version"] == 3 and coded.HEADER in tensors
        return coded.unpack(tensors, header) if is_coded else plain.unpack(tensors, header)


def parts_of(path: Path) -> tuple[int, dict[str, int]]:
    """Returns the format version of a delta's file that can be read, and the bytes of its parts.

    The parts are ``"indices"``, ``"values"``, ``"slots"``, ``"whole"``, and ``"header"`` for all the rest.
    """
    with path.open("rb") as file:
        layout = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    version = json.loads(layout.pop("__metadata__")["unmask"])["format_version"]
    parts = dict.fromkeys(("indices", "values", "slots", "whole"), 0)
    for key, entry in layout.items():
        kind = key.rpartition("::")[2].partition(".")[0]  # of "NAME::values" as of "values.float32"
        if kind in parts:
            parts[kind] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return version, parts | {"header": path.stat().st_size - sum(parts.values())}


_ANOTHER = "Take another copy."
