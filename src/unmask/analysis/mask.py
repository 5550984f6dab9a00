"""Describes which scalar weights are unmasked, in one form for a selection, a delta, or two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor, nn

from unmask.delta.base import base_tensors
from unmask.delta.delta import SparseDelta
from unmask.errors import DeltaError, MethodError, SelectionError
from unmask.selection.selection import Selection


@dataclass(frozen=True)
class Mask:
    """The unmasked weights of a model.

    Attributes:
        indices: The unmasked weights by tensor name: (n,) int64 flat (row-major) indices, ascending, on the CPU. Tensors
            without any are left out.
        shapes: The shapes by tensor name, of the tensors in ``indices`` and of all others that are known.
        tensors: How many tensors could hold unmasked weights; None where that is not known.
        weights: How many weights these tensors have; None where that is not known.
    """

    indices: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: int | None
    weights: int | None

    def __len__(self) -> int:
        """Returns how many weights are unmasked."""
        return sum(flat.numel() for flat in self.indices.values())

    def counts(self) -> dict[str, tuple[int, int]]:
        """Returns (unmasked weights, weights) of every known tensor, by name."""
        return {n: (len(self.indices.get(n, ())), prod(shape)) for n, shape in sorted(self.shapes.items())}

    def like(self, model: nn.Module | Mapping[str, Tensor]) -> Mask:
        """Returns the same mask, counted over all parameters of a model, which is a module or tensors by name.

        Raises:
            DeltaError: The model lacks one of the tensors, or has it in another shape.
        """
        if isinstance(model, nn.Module):
            persistent = {name for name, _ in model.named_buffers()}
            model = {name: tensor for name, tensor in base_tensors(model).items() if name not in persistent}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
        for name in self.indices:
            if shapes.get(name) != self.shapes[name]:
                raise DeltaError(
                    f"{name!r} has shape {self.shapes[name]} in the mask and {shapes.get(name, 'no counterpart')} in the "
                    "model; give the model that it was made on."
                )
        return mask_over(self.indices, shapes)


def mask_over(indices: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Mask:
    """Returns a mask whose tensors are all known.

    Example:
        >>> import torch
        >>> len(mask_over({"a": torch.tensor([0, 3])}, {"a": (2, 2), "b": (4,)}))
        2
    """
    held = {name: flat for name, flat in sorted(indices.items()) if flat.numel()}
    return Mask(held, dict(shapes), len(shapes), sum(prod(shape) for shape in shapes.values()))


def mask_of(source: Selection | SparseDelta | Mask, used: int | None = None) -> Mask:
    """Returns the mask of a selection or of a delta.

    Args:
        source: A selection (its eligible tensors), a delta (tensors stored in part), or a mask, which is returned.
        used: A count of weights: only the first ``used`` that were unmasked are taken, the nested mask of that smaller budget.
            A delta must carry its order for that: ``selection.delta(order=True)``.

    Raises:
        MethodError: ``used`` is outside 0..len(mask), or given for a mask.
        SelectionError: The selection has no order of unmasking (repeat-S).
        DeltaError: The delta does not carry its order, or holds whole tensors only.

    Example:
        >>> import unmask
        >>> selection = unmask.select(nn.Linear(4, 2), unmask.pafi(budget=3))
        >>> len(mask_of(selection)), len(mask_of(selection, used=1))
        (3, 1)
    """
    if used is not None:
        _check_used(source, used)
    if isinstance(source, Mask):
        return source
    if isinstance(source, SparseDelta):
        if source.whole and not source.sparse:
            raise DeltaError(
                "this delta holds whole tensors only, so it has no mask; compare two checkpoints instead: "
                "unmask.analysis.changed(base, tuned)."
            )
        held = {
            name: entry.indices if used is None or entry.slots is None else entry.indices[entry.slots < used]
            for name, entry in source.sparse.items()
        }
        eligible = source.provenance.eligible or {}
        mask = mask_over(held, {name: entry.shape for name, entry in source.sparse.items()})
        return replace(mask, tensors=eligible.get("tensors"), weights=eligible.get("weights"))
    layout = source.ledger.layout
    if source.method.whole:
        return mask_over(source.indices, {dense.name: tuple(dense.parameter.shape) for dense in source.dense})
    shapes = {name: tuple(t.shape) for name, t in zip(layout.names, layout.tensors, strict=True)}
    positions = source.ledger.positions[: source.used if used is None else used]
    return mask_over({layout.names[i]: flat.cpu() for i, flat, _ in layout.split(positions)}, shapes)


def orders(source: Selection | SparseDelta) -> bool:
    """Returns True if the order of unmasking is known, so that smaller budgets can be read off."""
    if isinstance(source, Selection):
        return source.method.strategy != "repeat" and not source.method.whole
    return bool(source.sparse) and all(entry.slots is not None for entry in source.sparse.values())


def _check_used(source: Selection | SparseDelta | Mask, used: int) -> None:
    """Refuses a count of weights where no order of unmasking is known, or that is out of range."""
    if isinstance(source, Mask):
        raise MethodError(
            "a mask does not know in which order its weights were unmasked; give the selection or the delta."
        )
    if not orders(source):
        if isinstance(source, Selection):
            raise SelectionError(
                f"{source.method.name} has no order of unmasking (it picks again at every selecting step, or trains whole "
                "tensors), so no smaller mask is part of it; take masks in the course of the run instead."
            )
        raise DeltaError("this delta does not carry the order of unmasking; save it with selection.delta(order=True).")
    held = source.used if isinstance(source, Selection) else len(source)
    if not 0 <= used <= held:
        raise MethodError(f"used = {used}; {held:,} weights are unmasked, so it must be from 0 to {held}.")
