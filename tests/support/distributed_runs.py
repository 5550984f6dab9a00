"""Holds the functions that the processes of the distributed tests run; one process alone runs each on the whole batch."""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import torch
import torch.distributed as dist
from helpers import mlp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unmask
from unmask import MethodError, NonFiniteGradientError, SelectionError
from unmask.distributed import processes
from unmask.distributed import ranking as rounds


def place() -> tuple[int, int]:
    """Returns (rank, processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def part(batch: Tensor) -> Tensor:
    """Returns this process's rows of the global batch."""
    rank, count = place()
    rows = batch.shape[0] // count
    return batch[rank * rows : (rank + 1) * rows]


FISH_DATA = [{"batch": nets.tokens(77)}]

METHODS: dict[str, Callable[[], unmask.Method]] = {
    "id3": lambda: unmask.id3(60, steps=6),
    "id3_strided": lambda: unmask.id3(60, steps=6, stride=3),
    "id3_rows": lambda: unmask.id3(60, steps=6).but(allocation="row"),
    "snip": lambda: unmask.id3(60, steps=6).but(heuristic=unmask.heuristic("snip")),
    "repeat_d3": lambda: unmask.repeat_d3(60, stride=2),
    "repeat_d3_kept": lambda: unmask.repeat_d3(60, stride=2, leaving="kept"),
    "static_d3": lambda: unmask.static_d3(60),
    "most": lambda: unmask.id3(1_400, steps=3),  # of 1,440, more than have a gradient
    "random_mask": lambda: unmask.random_mask(60, seed=3),
    "random_increment": lambda: unmask.random_mask(60).but(strategy="increment", schedule=unmask.Schedule.of("uniform", 6)),
    "random_repeat": lambda: unmask.random_mask(60).but(strategy="repeat"),
    "pafi": lambda: unmask.pafi(60),
    "bitfit": lambda: unmask.bitfit(),
    "fish": lambda: unmask.fish(60, FISH_DATA, loss=lambda model, batch: nets.loss(model, batch["batch"])),
}  # fmt: skip


def trained(
    method: str,
    exchange: str = "exact",
    accumulation: str = "candidates",
    micro: int = 1,
    bucket: int = 1 << 22,
    steps: int = 6,
    **options: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns (positions, values, the model's tensors) after steps; every process starts from other weights."""
    rounds.BUCKET = bucket
    model = nets.mixed(seed=place()[0])
    selection = unmask.select(model, METHODS[method](), exchange=exchange, accumulation=accumulation, **options)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(steps):
        for batch in nets.tokens(step, 8 * micro).chunk(micro):
            (nets.loss(model, part(batch)) / micro).backward()
        optimizer.step()
    return selection.ledger.positions.clone(), selection.values.detach().clone(), model.state_dict()


def masked(model: nn.Module, seed: int, budget: int = 300) -> unmask.SparseDelta:
    """Returns the delta of a random mask that was not trained."""
    selection = unmask.select(model, unmask.random_mask(budget, seed=seed), exchange="none")
    delta = selection.delta()
    selection.release()
    return delta


def avoiding_differently() -> str:
    """Returns the error of a selection that avoids other weights in each process."""
    try:
        unmask.select(nets.mixed(), METHODS["id3"](), avoid=masked(nets.mixed(), seed=place()[0]))
    except SelectionError as error:
        return str(error)
    return "no error"


def grid(cases: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    return [trained(**case) for case in cases]


class Branches(nn.Module):
    """The model of branches and a table: each process reaches others, and none reaches the last: N = 594."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(mlp(depth=2) for _ in range(3))
        self.trunk = mlp(depth=1)
        self.table = nn.Embedding(50, 6)

    def forward(self, x: Tensor, ranks: range) -> Tensor:
        return sum(self._branch(x, i) for i in ranks) / len(ranks)

    def _branch(self, x: Tensor, i: int) -> Tensor:
        return self.branches[i](self.trunk(x) + self.table(torch.arange(5) + 4 * i)).square().mean()


def branches(exchange: str, bucket: int, budget: int) -> tuple[Tensor, Tensor]:
    rounds.BUCKET = bucket
    rank, count = place()
    model = Branches()
    selection = unmask.select(model, unmask.id3(budget, steps=4), exchange=exchange)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(4):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(x, range(2) if count == 1 else range(rank, rank + 1)).backward()
        optimizer.step()
    return selection.ledger.positions.clone(), selection.values.detach().clone()


class Cancelling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t()).mean()


def cancelling(exchange: str) -> list[int]:
    """Makes five entries with large gradients that cancel over the processes, and one with a small gradient in all of them."""
    model = Cancelling()
    selection = unmask.select(model, unmask.id3(1, steps=1), exchange=exchange)
    sign = 1.0 if place()[0] == 0 else -1.0
    model(torch.tensor([[*[10.0 * sign] * 5, 1.0]])).backward()
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    return selection.ledger.positions[: selection.used].tolist()


def nonfinite(exchange: str) -> tuple[list[str], Tensor, Tensor]:
    """Poisons the last process's third batch; returns the answers of all processes, and the result without that batch."""
    rank, count = place()
    torch.manual_seed(0)
    model, outcomes = mlp(), []
    selection = unmask.select(model, unmask.id3(12, steps=4, stride=2), exchange=exchange)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step, poisoned in enumerate([False, True, False, True, False, False]):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        mine = part(x) * (torch.nan if poisoned and rank == count - 1 else 1.0)
        model(mine).square().mean().backward()
        try:
            optimizer.step()
            outcomes.append(f"step {selection.step}")
        except NonFiniteGradientError:
            outcomes.append("refused")
        optimizer.zero_grad()
    return outcomes, selection.ledger.positions.clone(), selection.values.detach().clone()


def scaled() -> tuple[list[int], Tensor]:
    """Trains under a GradScaler: a step that overflows in one process is skipped in all."""
    rank, count = place()
    torch.manual_seed(0)
    model = mlp()
    selection = unmask.select(model, unmask.id3(12, steps=4))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    scaler, taken = torch.amp.GradScaler("cpu", init_scale=8.0), []
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        mine = part(x) * (torch.inf if step == 1 and rank == count - 1 else 1.0)
        scaler.scale(model(mine).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(selection.step)
    return taken, selection.ledger.positions.clone()


def with_head(dtype: torch.dtype, wrap: bool, full: bool = False) -> dict[str, Tensor]:
    """Trains a head whole, with or without DDP around the model."""
    torch.manual_seed(0)
    model = mlp(depth=2).append(nn.Linear(6, 2)).to(dtype)
    selection = unmask.select(model, unmask.full() if full else unmask.id3(12, steps=4), dense=None if full else "4")
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if wrap and dist.is_initialized() else model
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.5)
    for step in range(4):
        for micro in range(2):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + micro)).to(dtype)
            (wrapped(part(x)).float().square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def refused() -> list[str]:
    """Returns the refusals of another method, of other calibration data, and of other weights that are found late."""
    rank, _ = place()
    refusals = []
    for method in (
        lambda: unmask.id3(10 + rank, steps=3),
        lambda: unmask.fish(10, [torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))], loss=_squares),
    ):
        torch.manual_seed(0)
        model = mlp()
        refusals.append(_refusal(lambda model=model, method=method: unmask.select(model, method())))
        assert all(type(p) is nn.Parameter for p in model.parameters())
    unmask.select(model, unmask.id3(5, steps=2))
    refusals.append(_refusal(lambda: DistributedDataParallel(model)))
    for member in (0, 1):
        group = dist.new_group([member])
        refusals.append(_refusal(lambda group=group: unmask.select(mlp(), unmask.id3(5, steps=2), group=group)))
    return refusals


def in_pairs() -> tuple[Tensor, Tensor]:
    """Trains two groups of two, each from other weights."""
    rank, _ = place()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank)
    model = mlp()
    selection = unmask.select(model, unmask.id3(12, steps=4), dense="4", group=groups[rank // 2])
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        optimizer.step()
    return selection.ledger.positions.clone(), torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (SelectionError, MethodError, RuntimeError) as error:
        return str(error)
    return "nothing"


def late(folder: str, seed: int | None) -> tuple[str, Tensor]:
    """Makes the process group after the selection, from the same weights or (for the ``seed`` None) from others."""
    rank, count = place()
    dist.destroy_process_group()
    torch.manual_seed(rank if seed is None else seed)
    model = mlp()
    selection = unmask.select(model, unmask.id3(12, steps=4))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/late", rank=rank, world_size=count)

    def steps() -> None:
        for step in range(4):
            model(part(torch.randn(8, 6, generator=torch.Generator().manual_seed(step)))).square().mean().backward()
            optimizer.step()

    return _refusal(steps), selection.values.detach().clone()


def apart() -> tuple[str, Tensor]:
    """Trains each process by itself, for another number of steps."""
    torch.manual_seed(0)
    model = mlp()
    selection = unmask.select(model, unmask.id3(12, steps=4), exchange="none")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(2 + place()[0]):
        model(part(torch.randn(8, 6, generator=torch.Generator().manual_seed(step)))).square().mean().backward()
        optimizer.step()
    return f"{selection.step} steps", selection.ledger.positions.clone()


# Bytes.

WIDE = 512


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 8))


def received_by_kernel() -> int:
    """Returns the bytes that this process received over its TCP connections, as the kernel counts them (Linux).

    In a ring of two that is what it sends. The kernel's count of bytes sent would have what was sent twice in it, and not
    yet what waits in a buffer: both come with a busy machine.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, 11, 256)  # TCP_INFO
        except OSError:
            continue
        total += struct.unpack_from("Q", info, 128)[0] if len(info) >= 136 else 0  # tcpi_bytes_received
    return total


class Counted:
    """Counts what a ring sends per process, from the tensors handed to ``torch.distributed``."""

    def __init__(self) -> None:
        self.bytes = 0.0

    def __enter__(self) -> Counted:
        self._kept = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}
        for name, function in self._kept.items():
            setattr(dist, name, functools.partial(self._call, name, function))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        count, tensor = place()[1], args[1] if name == "all_gather" else args[0]
        share = {"all_reduce": 2 * (count - 1) / count, "all_gather": count - 1, "broadcast": 1}[name]
        self.bytes += share * tensor.numel() * tensor.element_size()
        return function(*args, **kwargs)


def traffic(steps: int = 20) -> dict[str, tuple[int, float]]:
    """Returns (bytes by the kernel's count, by the calls) of each way to train ``wide``, in all steps."""
    assert processes.dist is dist
    return {
        "dense": _dense_traffic(steps),
        "exact": _selective_traffic("exact", 10, steps),
        "candidates": _selective_traffic("candidates", 10, steps),
        "none selected": _selective_traffic("exact", None, steps),
    }


def _dense_traffic(steps: int) -> tuple[int, float]:
    model = DistributedDataParallel(wide())
    optimizer, called, count = torch.optim.SGD(model.parameters(), lr=0.1), 0.0, place()[1]

    def counting(group, bucket):  # DDP reads annotations, which are strings here
        nonlocal called
        called += 2 * (count - 1) / count * bucket.buffer().numel() * 4
        future = dist.all_reduce(bucket.buffer().div_(count), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(None, counting)
    before = received_by_kernel()
    for step in range(steps):
        model(torch.randn(4, WIDE, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return received_by_kernel() - before, called


def _selective_traffic(exchange: str, stride: int | None, steps: int) -> tuple[int, float]:
    model = wide()
    budget = round(0.002 * sum(p.numel() for p in model.parameters()))
    method = unmask.pafi(budget) if stride is None else unmask.id3(budget, steps=steps, stride=stride)
    selection = unmask.select(model, method, exchange=exchange)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    before = received_by_kernel()
    with Counted() as counted:
        for step in range(steps):
            model(torch.randn(4, WIDE, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    assert selection.used == budget
    return received_by_kernel() - before, counted.bytes


# FSDP2.


class Blocks(nn.Module):
    """The model of an embedding tied with the output, and of blocks whose rows do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 7), nn.GELU(), nn.Linear(7, 10), nn.LayerNorm(10)) for _ in range(2)
        )
        self.out = nn.Linear(10, 23, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(23, 1)  # one row: the second process holds nothing of it

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits = self.out(x)
        return logits * self.head(logits)


def blocks(dtype: torch.dtype = torch.float32) -> Blocks:
    torch.manual_seed(0)
    return Blocks().to(dtype)


def shard(model: Blocks, **options: Any) -> Blocks:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (place()[1],))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


FSDP_METHODS: dict[str, Callable[[], unmask.Method]] = {
    "id3": lambda: unmask.id3(40, steps=5),
    "id3_strided": lambda: unmask.id3(40, steps=5, stride=2),
    "repeat_d3": lambda: unmask.repeat_d3(40, stride=2),
    "most": lambda: unmask.id3(540, steps=2),
    "random_mask": lambda: unmask.random_mask(40, seed=3),
    "pafi": lambda: unmask.pafi(40),
    "bitfit": lambda: unmask.bitfit(),
}


def fsdp(
    method: str, dtype: torch.dtype = torch.float32, resume: int | None = None, steps: int = 5, **options: Any
) -> dict[str, Any]:
    """Trains, sharded where there are processes; ``resume``: goes on in a fresh model after that many steps."""
    count = place()[1]

    def begin() -> tuple[nn.Module, unmask.Selection, torch.optim.Optimizer]:
        model = shard(blocks(dtype)) if count > 1 else blocks(dtype)
        selection = unmask.select(model, FSDP_METHODS[method](), **options)
        return model, selection, torch.optim.AdamW(selection.parameters(), lr=1e-2)

    model, selection, optimizer = begin()
    for step in range(steps):
        if step == resume:
            state, adam = selection.state_dict(), optimizer.state_dict()
            model, selection, optimizer = begin()
            with torch.no_grad():
                model(fsdp_batch(0))  # leaves the root unsharded: what is loaded must reach it
            selection.load_state_dict(state)
            optimizer.load_state_dict(adam)
        nets.loss(model, part(fsdp_batch(step))).backward()
        optimizer.step()
    with torch.no_grad():
        model(fsdp_batch(0))  # leaves the root unsharded
    return outcome(model, selection)


def fsdp_batch(step: int) -> Tensor:
    return torch.randint(
        0, 19, (place()[1] * 4 if place()[1] > 2 else 8, 6), generator=torch.Generator().manual_seed(step)
    )


def outcome(model: nn.Module, selection: unmask.Selection) -> dict[str, Any]:
    delta, total = selection.delta(), sum(p.numel() for p in model.parameters())
    held = sum(p.to_local().numel() if place()[1] > 1 else p.numel() for p in model.parameters())
    result = {
        "positions": selection.ledger.positions.clone(),
        "values": selection.values.detach().clone(),
        "delta": {name: entry.values for name, entry in delta.sparse.items()},
        "base": delta.base,
        "state": selection.state_dict(),
        "held": held / total,
    }
    selection.release()
    return result


def fsdp_grid(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [fsdp(**case) for case in cases]


def fsdp_full(folder: str) -> dict[str, Tensor]:
    """Saves the delta; returns the trained model's tensors."""
    model = shard(blocks())
    selection = unmask.select(model, unmask.id3(40, steps=3))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(3):
        nets.loss(model, part(fsdp_batch(step))).backward()
        optimizer.step()
    delta = selection.delta()
    if place()[0] == 0:
        delta.save(f"{folder}/delta.safetensors")
    dist.barrier()
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


def fsdp_loaded(state: dict[str, Any]) -> tuple[int, Tensor]:
    selection = unmask.select(shard(blocks()), FSDP_METHODS["id3_strided"]())
    selection.load_state_dict(state)
    return selection.step, selection.values.detach().clone()


class Checkpointed(Blocks):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        logits = self.out(x)
        return logits * self.head(logits)


def fsdp_variant(case: str) -> dict[str, Any]:
    """Trains bfloat16 weights; float32 weights that compute in bfloat16; gradient checkpointing; two micro-batches."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    torch.manual_seed(0)
    model: Any = (Checkpointed() if case == "checkpointed" else Blocks()).to(dtype)
    if place()[1] > 1:
        model = shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16 if case == "mixed" else None))
    selection = unmask.select(model, unmask.id3(40, steps=4, stride=2))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(4):
        micro = 2 if case == "accumulated" else 1
        for i in range(micro):
            (nets.loss(model, part(fsdp_batch(10 * step + i))) / micro).backward()
        optimizer.step()
    return outcome(model, selection)


def fsdp_nonfinite() -> list[str]:
    """Makes the second process's loss NaN on the first and third step."""
    outcomes, model = [], shard(blocks())
    selection = unmask.select(model, unmask.id3(40, steps=4))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(4):
        loss = nets.loss(model, part(fsdp_batch(step)))
        (loss * (torch.nan if step in (0, 2) and place()[0] == 1 else 1.0)).backward()
        try:
            optimizer.step()
            outcomes.append(f"step {selection.step}")
        except NonFiniteGradientError:
            outcomes.append("refused")
        optimizer.zero_grad()
    return outcomes


def fsdp_head() -> tuple[Tensor, Tensor, Tensor]:
    """Returns (positions, values, the head's weight); the head is dense and not sharded."""
    model = blocks()
    if place()[1] > 1:
        shard(model, ignored_params=set(model.head.parameters()))
    selection = unmask.select(model, unmask.id3(40, steps=4), dense="head")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.01)
    for step in range(4):
        nets.loss(model, part(fsdp_batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return selection.ledger.positions.clone(), selection.values.detach().clone(), model.head.weight.detach().clone()


def fsdp_refused() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    id3, mesh = unmask.id3(10, steps=3), init_device_mesh("cpu", (place()[1],))
    columns = parallelize_module(nets.mixed(), mesh, {"up": ColwiseParallel(output_layouts=None)})
    columns.down.weight = nn.Parameter(
        torch.distributed.tensor.distribute_tensor(columns.down.weight, mesh, [torch.distributed.tensor.Shard(1)])
    )
    after = blocks()
    unmask.select(after, id3)
    shard(after)
    fish = unmask.fish(10, [nets.tokens(1)], loss=nets.loss)
    held = shard(blocks())
    selection = unmask.select(held, id3)

    def foreign() -> None:
        torch.optim.SGD(held.parameters(), lr=0.1).step()

    refusals = {
        "candidates": _refusal(lambda: unmask.select(shard(blocks()), id3, exchange="candidates")),
        "dense": _refusal(lambda: unmask.select(shard(blocks()), id3, dense="head")),
        "rows": _refusal(lambda: unmask.select(shard(blocks()), id3.but(allocation="row"))),
        "kept": _refusal(lambda: unmask.select(shard(blocks()), unmask.repeat_d3(10, leaving="kept"))),
        "fisher": _refusal(lambda: unmask.select(shard(blocks()), fish)),
        "mixed": _refusal(lambda: unmask.select(_partly_sharded(), id3)),
        "tensor parallel": _refusal(lambda: unmask.select(columns, id3)),
        "sharded after": _refusal(lambda: nets.loss(after, fsdp_batch(0)).backward()),
        "optimizer": _refusal(foreign),
    }
    selection.release()
    return refusals


def _partly_sharded() -> nn.Module:
    model = blocks()
    return shard(model, ignored_params=set(model.head.parameters()))
