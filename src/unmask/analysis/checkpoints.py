"""What fine-tuning changed between two checkpoints, whoever made them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unmask.analysis.mask import Mask, mask_over
from unmask.delta.base import base_tensors
from unmask.errors import DeltaError
from unmask.reading import fields, mapping, read_json, refusing, text

Checkpoint = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Tensors:
    """Tensors by name, each read when it is asked for."""

    def __init__(self, names: list[str], get: Callable[[str], Tensor]) -> None:
        self.names, self.get = names, get


def changed(base: Checkpoint, tuned: Checkpoint) -> Mask:
    """The weights that two checkpoints differ in, bit for bit, over the floating-point tensors that both have.

    A prefix that all of the one's names have and the other's lack (``"bert."`` of a model with a head) is looked through.
    Tensors that only one of them has (a new head) are left out. Tensors are read one at a time.

    Args:
        base: A folder with safetensors files, one such file, tensors by name, or a module.
        tuned: The other one. The mask has its names.

    Returns:
        The mask: works with every function of `unmask.analysis`.

    Raises:
        DeltaError: A file is missing or damaged, no name is in both, or shapes or dtypes differ.

    Example:
        >>> base = {"w": torch.zeros(2, 3)}
        >>> changed(base, {"model.w": torch.tensor([[0.0, 0, 1], [0, 0, -0.0]])}).indices
        {'model.w': tensor([2, 5])}
    """
    one, two = _read(base), _read(tuned)
    pairs = _pairs(one.names, two.names)
    if not pairs:
        raise DeltaError(
            f"the two checkpoints share no tensor name ({_some(one.names)}; {_some(two.names)}); give a base and what was "
            "fine-tuned from it."
        )
    indices, shapes = {}, {}
    for name, other in sorted(pairs.items()):
        before, after = one.get(name).detach().cpu(), two.get(other).detach().cpu()
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise DeltaError(
                f"{other!r} is {before.dtype} of shape {tuple(before.shape)} in the base and {after.dtype} of shape "
                f"{tuple(after.shape)} in the other; give both in one dtype."
            )
        if after.is_floating_point():
            shapes[other] = tuple(after.shape)
            indices[other] = (_bits(before) != _bits(after)).nonzero().squeeze(1)
    return mask_over(indices, shapes)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])


def _pairs(base: list[str], tuned: list[str]) -> dict[str, str]:
    """Names of the base by names of the other, through a prefix of either."""
    known, longest = set(tuned), max(base, key=len, default="")
    prefixes = {name[: -len(longest)] for name in tuned if longest and name.endswith(f".{longest}")}
    added = [{name: p + name for name in base if p + name in known} for p in ("", *sorted(prefixes))]
    own = {name: name.partition(".")[2] for name in base}
    added.append({name: short for name, short in own.items() if short in known})
    return max(added, key=len)


def _read(source: Checkpoint) -> _Tensors:
    if isinstance(source, nn.Module):
        source = base_tensors(source)
    if isinstance(source, Mapping):
        return _Tensors(list(source), source.__getitem__)
    path = Path(source)
    files = _files(path)
    return _Tensors(list(files), lambda name: _load(files[name], name))


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        with refusing(DeltaError, repr(str(index)), "Take another copy."):
            found = fields({"weight_map": mapping(text)})(read_json(index), "the index")
        return {name: path / file for name, file in found["weight_map"].items()}
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise DeltaError(
            f"there is no checkpoint at {str(path)!r}; give a folder that holds model.safetensors, or a file."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except Exception as error:  # of the library, of many classes, and always of the file
        raise DeltaError(f"{str(file)!r} cannot be read as safetensors ({error}); take another copy.") from error


def _load(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except Exception as error:  # of the library, of many classes, and always of the file
        raise DeltaError(f"{str(file)!r} cannot be read as safetensors ({error}); take another copy.") from error


def _some(names: list[str]) -> str:
    return f"{names[0]!r} and {len(names) - 1} more" if names else "none"
