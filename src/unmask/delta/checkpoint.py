"""Opens a checkpoint, in files or in memory, as tensors by name that are read one at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unmask.delta.base import base_tensors, name_or_path
from unmask.delta.renaming import Renaming
from unmask.delta.tensor_file import LazyTensor, read_layout
from unmask.delta.weight_files import find_weights, is_index, parts
from unmask.errors import DeltaError
from unmask.gradients.wrappers import bare, memory_of, named_parameters, plain_names
from unmask.reading import Malformed, refusing

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]
"""A folder, a safetensors file, the index of several, a hub id, a module, or tensors by name."""


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file of a checkpoint.

    Attributes:
        path: The file.
        names: The names of its tensors.
        metadata: The file's own metadata.
    """

    path: Path
    names: tuple[str, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, unread.

    Attributes:
        label: The checkpoint's name in messages.
        source: The folder, file or hub id; of a module, the one it was loaded from, if it says so.
        tensors: The tensors.
        aliases: Further names of tied tensors, by each the name in ``tensors``.
        is_module: True for a module, all of whose tied tensors are known.
        weights: The safetensors file, or the index of several; None for a checkpoint in memory.
        files: The safetensors files.
    """

    label: str
    source: str | None
    tensors: Mapping[str, LazyTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    is_module: bool = False
    weights: Path | None = None
    files: tuple[WeightFile, ...] = ()

    def renamed(self, rename: Renaming) -> Checkpoint:
        """Returns the same checkpoint with other names."""
        tensors = {rename(name): tensor for name, tensor in self.tensors.items()}
        files = tuple(replace(file, names=tuple(map(rename, file.names))) for file in self.files)
        aliases = {rename(alias): rename(name) for alias, name in self.aliases.items()}
        return replace(self, tensors=tensors, aliases=aliases, files=files)

    def known_as(self, names: Collection[str]) -> Checkpoint:
        """Returns the same checkpoint, in which those of the names that are aliases are names of tensors too."""
        more = {alias: self.tensors[name] for alias, name in self.aliases.items() if alias in names}
        return replace(self, tensors={**self.tensors, **more})


def open_checkpoint(source: Source) -> Checkpoint:
    """Opens a checkpoint; only the headers of its files are read.

    Raises:
        DeltaError: There is no such checkpoint, its files are damaged, incomplete or pickled, or a tensor of a module cannot be
            compared: it is on the meta device, sharded or quantised.
        MissingExtraError: The source is a hub id, and `huggingface_hub` is not installed.
    """
    if isinstance(source, nn.Module):
        return _of_module(source)
    if isinstance(source, Mapping):
        return Checkpoint("the tensors", None, {name: _in_memory(name, tensor) for name, tensor in source.items()})
    weights, label = find_weights(os.fspath(source)), repr(os.fspath(source))
    placed: dict[str, set[str]] = defaultdict(set)  # by file, the names that an index places in it
    if is_index(weights):
        with refusing(DeltaError, repr(str(weights)), "Take another copy."):
            for name, file in parts(weights).items():
                placed[file].add(name)
    tensors: dict[str, LazyTensor] = {}
    aliases: dict[str, str] = {}
    files = []
    for path in sorted(weights.parent / file for file in placed) or [weights]:
        with refusing(DeltaError, repr(str(path)), "Take another copy."):
            held, metadata = read_layout(path)
            wanted = placed[path.name] if is_index(weights) else held.keys()
            for name in sorted(wanted - held.keys()):
                raise Malformed(f"it lacks the tensor {name!r}, which {weights.name} places in it")
        names = tuple(name for name in held if name in wanted)
        tensors |= {name: held[name] for name in names}
        files.append(WeightFile(path, names, metadata))
        # safetensors.torch.save_model notes each name of a tied tensor that it leaves out.
        aliases |= {name: kept for name, kept in metadata.items() if kept in names and name not in held}
    if not tensors:
        raise DeltaError(f"{label} is no checkpoint: its files hold no tensor.")
    return Checkpoint(label, os.fspath(source), tensors, aliases, False, weights, tuple(files))


def _of_module(model: nn.Module) -> Checkpoint:
    """Opens a module: its parameters and persistent buffers."""
    label = f"the {type(bare(model)).__name__}"
    plain, named = plain_names(bare(model)), named_parameters(model)
    tensors = {name: _in_memory(name, tensor) for name, tensor in base_tensors(model).items()}
    by_memory = {memory_of(parameter): name for name, parameter in named.items()}
    every = {plain(name): p for name, p in bare(model).named_parameters(remove_duplicate=False)}
    aliases = {name: by_memory[memory_of(p)] for name, p in every.items() if name not in tensors}
    return Checkpoint(label, name_or_path(bare(model)), tensors, aliases, is_module=True)


def _in_memory(name: str, tensor: Tensor) -> LazyTensor:
    """Wraps a tensor that is in memory, or refuses it."""
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} ({tensor.layout})"
        raise DeltaError(
            f"{name!r} is {kind}, and only ordinary tensors can be compared; give a folder with the whole checkpoint."
        )
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().cpu())
