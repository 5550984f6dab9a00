"""Counts where the budget went, by layer and module kind, and takes snapshots of that in the course of a run."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from unmask.analysis.mask import mask_of, mask_over
from unmask.analysis.measures import Source, sparsity_entropy, tensor_sparsity
from unmask.delta.delta import SparseDelta
from unmask.errors import MethodError
from unmask.methods.naming import KINDS, OTHER, kinds_of, layer_labels
from unmask.selection.selection import Selection


def allocation(source: Source) -> list[dict[str, Any]]:
    """Counts unmasked weights by layer and module kind.

    A module's bias counts with its weight. GPT-2's joint query, key and value tensor is counted in its three parts.
    Tensors outside the layers, and those of no kind, have rows with ``"other"``: ``unmasked`` sums to the mask's length.

    Returns:
        Plain rows, ``{"layer": "0", "kind": "query", "unmasked": 12, "of": 147456}``, by layer, in the order of
        `unmask.methods.naming.KINDS`. For a delta without ``like(model)``, only tensors that hold unmasked weights are known
        and counted in ``of``.

    Example:
        >>> import torch
        >>> from unmask.analysis import mask_over
        >>> shapes = {"encoder.layer.0.attention.self.query.weight": (4, 4), "embeddings.weight": (9, 4)}
        >>> mask = mask_over({name: torch.arange(2) for name in shapes}, shapes)
        >>> [(row["layer"], row["kind"], row["unmasked"], row["of"]) for row in allocation(mask)]
        [('0', 'query', 2, 16), ('other', 'other', 2, 36)]
    """
    mask = mask_of(source)
    labels = layer_labels(mask.shapes)
    cells: dict[tuple[str, str], list[int]] = {}
    for name, shape in mask.shapes.items():
        weight = mask.shapes.get(f"{name.removesuffix('bias')}weight") if name.endswith("bias") else None
        kinds = kinds_of(name, shape, weight)
        counts = [len(mask.indices.get(name, ()))] * len(kinds)
        if name in mask.indices and len(kinds) > 1:  # equal parts along the last dimension
            parts = (mask.indices[name] % shape[-1]).div(shape[-1] // len(kinds), rounding_mode="floor")
            counts = parts.bincount(minlength=len(kinds)).tolist()
        for kind, count in zip(kinds, counts, strict=True):
            cell = cells.setdefault((labels[name], kind), [0, 0])
            cell[0] += count
            cell[1] += prod(shape) // len(kinds)
    rows = sorted(cells.items(), key=lambda cell: _place(*cell[0]))
    return [{"layer": layer, "kind": kind, "unmasked": n, "of": of} for (layer, kind), (n, of) in rows]


def grouped(source: Source, key: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """Counts the unmasked weights of the tensors that hold some, by any key of their names.

    Returns:
        ``{group: {"changed": unmasked weights, "of": weights, "density": share}}``.

    Example:
        >>> import torch
        >>> from unmask.analysis import mask_over
        >>> mask = mask_over({"a.weight": torch.arange(2)}, {"a.weight": (8,), "b.weight": (8,)})
        >>> grouped(mask, lambda name: name[0])
        {'a': {'changed': 2, 'of': 8, 'density': 0.25}}
    """
    groups: dict[str, list[int]] = {}
    for name, (count, size) in mask_of(source).counts().items():
        if count:
            group = groups.setdefault(key(name), [0, 0])
            group[0] += count
            group[1] += size
    return {group: {"changed": n, "of": of, "density": n / of} for group, (n, of) in groups.items()}


def snapshot(source: Source, step: int | None = None) -> dict[str, Any]:
    """Returns the allocation and its measures at one moment, as JSON values: an `unmask.lab.figures.Snapshot`.

    ``sparsity_entropy`` is that of the tensors' densities, as in the paper, and ``sparsity_entropy_share`` that of the tensors'
    shares of the mask; both are in nats. The mask of repeat-S that keeps the weights that leave holds all weights that were ever
    tuned; its snapshot has ``picked`` too: the rows of the B weights that the last step picked.

    Args:
        source: A selection while it trains, a delta, or a mask.
        step: How many optimizer steps were taken. None takes a selection's own number, and no step for a delta or a mask.

    Raises:
        DeltaError: The delta does not say among how many tensors it was selected.

    Example:
        >>> import unmask
        >>> from torch import nn
        >>> shot = snapshot(unmask.select(nn.Linear(4, 2), unmask.pafi(budget=3)))
        >>> shot["step"], shot["used"], shot["rows"]
        (0, 3, [{'layer': 'other', 'kind': 'other', 'unmasked': 3, 'of': 10}])
    """
    if step is None and isinstance(source, Selection):
        step = source.step
    mask = mask_of(source)
    picked = source.picked if isinstance(source, Selection) and source.method.leaving == "kept" else None
    return {
        **({} if step is None else {"step": step}),
        "used": len(mask),
        "tensor_sparsity": tensor_sparsity(mask),
        "sparsity_entropy": sparsity_entropy(mask),
        "sparsity_entropy_share": sparsity_entropy(mask, of="share"),
        "tensors": mask.tensors,
        "rows": allocation(mask),
        **({} if picked is None else {"picked": allocation(mask_over(picked, mask.shapes))}),
    }


def snapshots(source: Selection | SparseDelta, points: int = 10) -> list[dict[str, Any]]:
    """Returns snapshots along the slots. The first slots are the mask of a smaller budget, so a finished run shows its course.

    Args:
        source: A selection, or a delta of ``selection.delta(order=True)``.
        points: The number of snapshots, in equal steps of the count of unmasked weights.

    Raises:
        MethodError: ``points`` is below 1.
        SelectionError: The selection has no order of unmasking (repeat-S): take a `snapshot` in the course of the run.
        DeltaError: The delta does not carry its order.
    """
    if points < 1:
        raise MethodError(f"points = {points}; it must be at least 1.")
    total = len(mask_of(source))
    counts = dict.fromkeys(-(-total * i // points) for i in range(1, points + 1))
    return [snapshot(mask_of(source, used)) for used in counts]


def _place(layer: str, kind: str) -> tuple[bool, str, int, int]:
    """Returns a sort key: layers by stack and number, kinds in their own order, ``"other"`` last."""
    stack, _, number = layer.rpartition(" ")
    column = KINDS.index(kind) if kind in KINDS else len(KINDS)
    return layer == OTHER, stack, int(number) if number.isdigit() else 0, column
