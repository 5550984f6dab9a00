"""Writes checkpoints in files, compares them byte for byte, and takes a delta between two of them there and back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmask import SparseDelta
from unmask.delta import weight_files
from unmask.delta.rebuild import write_tuned
from unmask.files import tensor_bytes

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool]
INDEX = weight_files.INDEX


def raw(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """Returns the dtype, shape and bytes of each tensor."""
    return {name: (t.dtype, tuple(t.shape), bytes(tensor_bytes(t))) for name, t in tensors.items()}


def stored(folder: Path) -> dict[str, tuple]:
    """Returns the tensors of a folder as the safetensors library reads them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        read = load_file(path)
        assert not found.keys() & read.keys()
        found |= read
    return raw(found)


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Writes a checkpoint of some files, with a configuration."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"from": "{folder.name}"}}')
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    places = {
        name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for place in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == place}, folder / place, metadata={"format": "pt"})
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 0, "total_parameters": 0}, "weight_map": places})
    )
    return folder


def there_and_back(base: Path, tuned: Path, tmp_path: Path) -> SparseDelta:
    """Checks that base + delta, through its file, has the tensors of the tuned folder; returns the delta."""
    delta = SparseDelta.load(SparseDelta.between(base, tuned).save(tmp_path / "delta.safetensors"))
    write_tuned(delta, str(base), tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tuned)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {"from": base.name}
    return delta


def values(dtype: torch.dtype, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Returns a tensor of any dtype and random bits, but finite if its dtype is one of `FLOATS`."""
    if dtype in FLOATS:
        return torch.randn(shape, generator=draw).to(dtype)
    if dtype is torch.bool:
        return torch.rand(shape, generator=draw) < 0.5
    data = torch.randint(0, 256, (*shape, dtype.itemsize), generator=draw, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Changes some entries of every other parameter."""
    for i, p in enumerate(model.parameters()):
        if i % 2 == 0:
            p.view(-1)[:: 7 + i] += 0.5
