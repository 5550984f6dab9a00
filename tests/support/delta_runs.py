"""Applies and swaps deltas in several processes, on a model that FSDP2 has sharded."""

from __future__ import annotations

from typing import Any

import distributed_runs as runs
import torch
from torch import Tensor, nn

import unmask
import unmask.delta.exchange as exchange_module
from unmask import DeltaError, SparseDelta


def made(seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> SparseDelta:
    """Returns a delta of the base ``blocks(dtype)``; it does not depend on the number of processes."""
    model = runs.blocks(dtype)
    selection = unmask.select(model, unmask.random_mask(60, seed=seed), **options)
    with torch.no_grad(), selection.writing():
        selection.values.add_(torch.randn(selection.values.shape, generator=torch.Generator().manual_seed(seed)))
        for parameter in selection.parameters()[1:]:
            parameter.add_(1)
    return selection.delta()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in model.state_dict().items()}


def swapped(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the whole tensors, and what was displaced, after each step of apply, swap and undoing."""
    first, second = made(1, dtype, **options), made(2, dtype, **options)
    model = runs.blocks(dtype)
    if runs.place()[1] > 1:
        runs.shard(model)
    with torch.no_grad():
        model(runs.fsdp_batch(0))  # leaves the root unsharded
    steps, deltas = [], []
    for step in ("places", "swap", "undo", "full", "undo in full"):
        if step in ("places", "full"):
            deltas.append(first.apply(model, verify=step))
        elif step == "swap":
            deltas.append(unmask.swap(model, deltas[-1], second))
        else:
            deltas.append(deltas[-1].apply(model, verify="full" if step == "undo in full" else "places"))
        steps.append(whole(model))
    return {"steps": steps, "deltas": deltas}


def refused() -> list[str]:
    """Returns the errors of this process: another base, a tensor that cannot be written, a failure in one process."""
    delta, model = made(1), runs.shard(runs.blocks())
    last, put = runs.place()[1] - 1, exchange_module.put
    other = runs.shard(runs.blocks())
    entry = delta.sparse["blocks.0.0.weight"]
    with torch.no_grad():  # the other base differs at one place, which one process holds
        shard = other.blocks[0][0].weight.to_local()
        row = int(entry.indices[0]) // 10
        if runs.place()[0] == row // 4:
            shard[row % 4, int(entry.indices[0]) % 10] += 1

    def failing(tensor: Tensor, *args: Any) -> None:
        put(tensor, *args)
        if runs.place()[0] == last:
            raise RuntimeError("out of memory")

    said = []
    for target, broken in ((other, False), (model, True)):
        exchange_module.put = failing if broken else put
        before = whole(target)
        try:
            delta.apply(target)
            said.append("applied")
        except DeltaError as error:
            said.append(str(error))
        exchange_module.put = put
        after = whole(target)
        assert all(torch.equal(after[name], before[name]) for name in before)
    delta.apply(model)
    return said


def columns() -> str:
    """Returns the error for a tensor that is sharded by columns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, model = init_device_mesh("cpu", (runs.place()[1],)), runs.blocks()
    model.blocks[0][0].weight = nn.Parameter(distribute_tensor(model.blocks[0][0].weight, mesh, [Shard(1)]))
    try:
        made(1).apply(model)
    except DeltaError as error:
        return str(error)
    return "applied"
