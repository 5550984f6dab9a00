"""Checks that files written one tensor at a time are those of the safetensors library, and are read as it reads them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.delta.tensor_file import DTYPES, LazyTensor, read_layout, write_file
from unmask.files import tensor_bytes
from unmask.reading import Malformed


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    """Returns a tensor of each dtype with random bits, an empty one and a scalar."""
    draw = torch.Generator().manual_seed(3)
    found = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    for code, dtype in DTYPES.items():
        data = torch.randint(0, 2, (3, 5 * dtype.itemsize), generator=draw, dtype=torch.uint8)
        found[f"of {code}"] = data.view(dtype)
    return found


def written(path, tensors, metadata):
    layout = {name: LazyTensor(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    write_file(path, layout, tensors.__getitem__, metadata)
    return path


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_a_file_is_the_librarys_byte_for_byte_and_read_alike(metadata, tmp_path):
    tensors = tensors_of_every_dtype()
    path = written(tmp_path / "ours.safetensors", tensors, metadata)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata=metadata or None)
    assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    layout, found = read_layout(path)
    assert found == metadata
    expected = load_file(path)
    assert layout.keys() == expected.keys()
    for name, lazy in layout.items():
        tensor = lazy.read()
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert (lazy.dtype, lazy.shape, lazy.nbytes) == (tensor.dtype, tuple(tensor.shape), len(tensor_bytes(tensor)))
        assert tensor_bytes(tensor) == tensor_bytes(expected[name])


def test_a_machine_of_the_other_byte_order_swaps_both_ways(tmp_path, monkeypatch):
    """Pretends that this machine is big-endian: numbers are then swapped on their way, and come back as they were."""
    tensors = tensors_of_every_dtype()
    plain = written(tmp_path / "a.safetensors", tensors, {}).read_bytes()
    monkeypatch.setattr(sys, "byteorder", "big")
    path = written(tmp_path / "b.safetensors", tensors, {})
    assert path.read_bytes() != plain
    for name, lazy in read_layout(path)[0].items():
        assert bytes(lazy.read().reshape(-1).view(torch.uint8).tolist()) == bytes(
            tensors[name].reshape(-1).view(torch.uint8).tolist()
        )


@pytest.mark.parametrize(
    "shape",
    [[2**62, 2**62, 0], [0, 2**62, 2**62], [2**62, 4], [-1], [1.0], "x", [1] * 65, [2**62] * 100_000],
    ids=lambda shape: f"{shape!r:.30}",
)
def test_a_shape_that_no_tensor_has_is_refused(shape, tmp_path):
    head = json.dumps({"w": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(Malformed, match=r"'w'.*shape"):
        read_layout(path)
