"""Finds what fine-tuning changed between two checkpoints of any origin."""

from __future__ import annotations

from unmask.analysis.mask import Mask, mask_over
from unmask.delta.checkpoint import Source, open_checkpoint
from unmask.delta.fingerprint import same_entries
from unmask.delta.renaming import renaming
from unmask.errors import DeltaError


def changed(base: Source, tuned: Source) -> Mask:
    """Finds the weights in which two checkpoints differ, bit for bit, over the floating-point tensors that both have.

    A prefix that all names of one checkpoint have and those of the other lack (``"bert."`` of a model with a head) is ignored.
    Tensors that only one of them has (a new head) are left out. Tensors are read one at a time.

    Args:
        base: A folder with safetensors files, one such file, a hub id, tensors by name, or a module.
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
    old, new = open_checkpoint(base), open_checkpoint(tuned)
    names, others = list(old.tensors), list(new.tensors)
    old = old.renamed(renaming(names, others))
    shared = sorted(old.tensors.keys() & new.tensors.keys())
    if not shared:
        raise DeltaError(
            f"the two checkpoints share no tensor name ({_some(names)}; {_some(others)}); give a base and what was "
            "fine-tuned from it."
        )
    indices, shapes = {}, {}
    for name in shared:
        before, after = old.tensors[name], new.tensors[name]
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise DeltaError(
                f"{name!r} is {before.dtype} of shape {before.shape} in the base and {after.dtype} of shape {after.shape} in "
                "the other; give both in one dtype."
            )
        if after.dtype.is_floating_point:
            shapes[name] = after.shape
            indices[name] = (~same_entries(before.read(), after.read())).reshape(-1).nonzero().squeeze(1)
    return mask_over(indices, shapes)


def _some(names: list[str]) -> str:
    return f"{names[0]!r} and {len(names) - 1} more" if names else "none"
