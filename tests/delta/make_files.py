"""Makes the files of `test_delta_formats.py`: ``python tests/delta/make_files.py FOLDER``. Those in the tests are in `FILES`.

Its formats 1 and 2 are byte for byte what the releases before format 3 wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from unmask import SparseDelta, SparseTensor
from unmask.delta.drawn import Draw
from unmask.delta.file import pack
from unmask.files import write_tensors
from unmask.methods.draw import draw

FILES = Path(__file__).parent / "files"


def entry(
    indices: list[int], dtype: torch.dtype, shape: tuple[int, ...], first_slot: int | None = None
) -> SparseTensor:
    """Returns a tensor's entries, with values that differ."""
    flat = torch.tensor(indices, dtype=torch.int64)
    slots = None if first_slot is None else first_slot + torch.arange(flat.numel()).flip(0)
    return SparseTensor(flat, (0.75 - flat / 64).to(dtype), shape, slots)


def deltas() -> dict[str, SparseDelta]:
    """Returns the deltas by their files' names."""
    whole = {"head.weight": torch.tensor([[1.5, -2.0], [0.0, 3.0]]), "steps": torch.tensor(7)}
    sparse = {
        "body.bias": entry([0, 1, 2, 3], torch.float32, (4,), 8),  # all of it
        "body.weight": entry([3, 17, 40, 41, 333, 599], torch.bfloat16, (20, 30), 2),
        "norm.weight": entry([0, 2, 3, 4, 6], torch.bfloat16, (7,), 12),  # more than half of it
        "scale": entry([4, 2**33 + 9], torch.float32, (2**34,), 0),
        "none": entry([], torch.float32, (5, 5), 0),
    }
    metadata = {"base_id": "some/base", "budget": 17, "step": 4}
    plain = {name: sparse[name] for name in ("body.bias", "body.weight")}
    plain = {name: SparseTensor(each.indices, each.values, each.shape) for name, each in plain.items()}
    overlaid = {"body.weight": torch.zeros(20, 30, dtype=torch.bfloat16)}
    positions = sorted(draw(24, 700, seed=-29).tolist())
    # Tensors in which nothing was drawn have the 20 weights before d, and the 80 behind it.
    starts = {"a": 0, "b": 300, "d": 420}
    sizes = {"a": (300,), "b": (10, 10), "d": (4, 50)}
    drawn = {}
    for name, start in starts.items():
        inside = [p - start for p in positions if 0 <= p - start < torch.Size(sizes[name]).numel()]
        drawn[name] = entry(inside, torch.bfloat16, sizes[name])
    return {
        "format1": SparseDelta(plain, whole, "sha256:1", metadata),
        "format2": SparseDelta(plain, overlaid, "sha256:2", metadata),
        "format3_coded": SparseDelta(sparse, whole, "sha256:3", metadata, places="sha256:4"),
        "format3_drawn": SparseDelta(drawn, whole, "sha256:3", metadata, draw=Draw(-29, 700, starts)),
    }


def main(folder: Path) -> None:
    """Writes the files."""
    for name, delta in deltas().items():
        fields = (delta.sparse, delta.whole, delta.base, delta.metadata, delta.places, delta.draw)
        write_tensors(folder / f"{name}.safetensors", *pack(*fields, compress=name.startswith("format3")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
