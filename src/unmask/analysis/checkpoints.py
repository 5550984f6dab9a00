"""Finds what fine-tuning changed between two checkpoints of any origin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from unmask.analysis.mask import Mask, mask_over
from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import same_entries
from unmask.errors import DeltaError
from unmask.reading import fields, mapping, read_json, refusing, text

Checkpoint = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module


def changed(base: Checkpoint, tuned: Checkpoint) -> Mask:
    """Finds the weights in which two checkpoints differ, bit for bit, over the floating-point tensors that both have.

    A prefix that all names of one checkpoint have and those of the other lack (``"bert."`` of a model with a head) is ignored.
    Tensors that only one of them has (a new head) are left out. Tensors are read one at a time.

    Args:
        base: A folder with safetensors files, one such file, tensors by name, or a module.
        tuned: The other checkpoint, in one of the same forms. The mask has its names.

    Returns:
        The mask, which every function of `unmask.analysis` takes.

    Raises:
        DeltaError: A file is missing or damaged, no name is in both, or shapes or dtypes differ.

    Example:
        >>> import torch
        >>> base = {"w": torch.zeros(2, 3)}
        >>> changed(base, {"model.w": torch.tensor([[0.0, 0, 1], [0, 0, -0.0]])}).indices
        {'model.w': tensor([2, 5])}
    """
    (names, one), (others, two) = _read(base), _read(tuned)
    pairs = _pairs(names, others)
    if not pairs:
        raise DeltaError(
            f"the two checkpoints share no tensor name ({_some(names)}; {_some(others)}); give a base and what was "
            "fine-tuned from it."
        )
    indices, shapes = {}, {}
    for name, other in sorted(pairs.items()):
        before, after = one(name).detach().cpu(), two(other).detach().cpu()
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise DeltaError(
                f"{other!r} is {before.dtype} of shape {tuple(before.shape)} in the base and {after.dtype} of shape "
                f"{tuple(after.shape)} in the other; give both in one dtype."
            )
        if after.is_floating_point():
            shapes[other] = tuple(after.shape)
            indices[other] = (~same_entries(before, after)).reshape(-1).nonzero().squeeze(1)
    return mask_over(indices, shapes)


def _pairs(base: list[str], tuned: list[str]) -> dict[str, str]:
    """Returns the names of the base by the names of the other checkpoint, with or without a prefix of either."""
    known, longest = set(tuned), max(base, key=len, default="")
    prefixes = {name[: -len(longest)] for name in tuned if longest and name.endswith(f".{longest}")}
    added = [{name: p + name for name in base if p + name in known} for p in ("", *sorted(prefixes))]
    own = {name: name.partition(".")[2] for name in base}
    added.append({name: short for name, short in own.items() if short in known})
    return max(added, key=len)


def _read(source: Checkpoint) -> tuple[list[str], Callable[[str], Tensor]]:
    """Returns the tensors' names of a checkpoint of any form, and a function that reads one of them."""
    if isinstance(source, nn.Module):
        source = base_tensors(source)
    if isinstance(source, Mapping):
        return list(source), source.__getitem__
    path = Path(source)
    index, file = path / "model.safetensors.index.json", path / "model.safetensors" if path.is_dir() else path
    if index.is_file():
        with refusing(DeltaError, repr(str(index)), "Take another copy."):
            found = fields({"weight_map": mapping(text)})(read_json(index), "the index")
        files = {name: path / part for name, part in found["weight_map"].items()}
    elif file.is_file():
        with _opened(file) as opened:
            files = dict.fromkeys(opened.keys(), file)
    else:
        raise DeltaError(
            f"there is no checkpoint at {str(path)!r}; give a folder that holds model.safetensors, or a file."
        )

    def load(name: str) -> Tensor:
        with _opened(files[name]) as opened:
            return opened.get_tensor(name)

    return list(files), load


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file, and refuses one that cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except Exception as error:  # safetensors raises errors of many classes, and all are about the file
        raise DeltaError(f"{str(file)!r} cannot be read as safetensors ({error}); take another copy.") from error


def _some(names: list[str]) -> str:
    return f"{names[0]!r} and {len(names) - 1} more" if names else "none"
