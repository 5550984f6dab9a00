"""Picks the cheapest way to the wanted entries of a weight gradient, by what the parts of a product cost on this machine.

Costs differ between machines by factors, and a processor's flags do not tell them: one CPU with bfloat16 instructions multiplies
bfloat16 four times as fast as float32, another one at half the speed. So they are measured where the program runs, at the first
use of a device and a dtype, in well under a second. They are kept in the user's cache folder by processor, number of threads and
version of torch. So the choices, and with them the last bits of a run, are the same at the next start.
"""

from __future__ import annotations

import functools
import math
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from unmask.files import cache_folder, write_json
from unmask.gradients.backend import backend_of
from unmask.gradients.entries import Entries
from unmask.gradients.sampled import PIECE, Product, last_blocks, sampled_product
from unmask.reading import Malformed, read_json

_TOKENS = 512  # The tokens of a measured product: one piece of a sampled product on a CPU.
_SIDES = {"cpu": (64, 768)}  # The widths of a small and a large weight that are measured; on other devices _WIDE.
_WIDE = (256, 4096)
_THIN = 16  # The rows of a compact product that is measured.
_REPEATS = 20  # The calls of which the fastest counts, at most.
_ENOUGH = 3e7  # The nanoseconds of such calls after which no other is made.
_HALVES = 0.5  # The share of the float32 product's time, at which a product in bfloat16 pays for what comes after it.


@dataclass(frozen=True)
class Cost:
    """The nanoseconds that the parts of a product cost, all threads together.

    Attributes:
        call: A dense product of any size.
        dense: One multiplication in a dense product.
        select: One scalar that is gathered for a dense product.
        start: A sampled product of any size; on a CPU, each piece of one.
        transpose: One scalar that is transposed for a sampled product.
        dot: One multiplication in a sampled product.
    """

    call: float
    dense: float
    select: float
    start: float
    transpose: float
    dot: float


# An NVIDIA H200, which computes as an H100 does: torch 2.11, Triton 3.6, products of 768 to 11,008 columns and 2,048 tokens.
_H100 = {
    torch.float32: Cost(call=2e4, dense=3.8e-5, select=5e-3, start=1.4e5, transpose=1e-3, dot=2e-4),
    torch.bfloat16: Cost(call=1.5e4, dense=2.7e-6, select=3e-3, start=1.4e5, transpose=1e-3, dot=1.8e-4),
}


def choose(entries: Entries, tokens: int, dtype: torch.dtype, device: torch.device, dense: bool = True) -> Product:
    """Returns the name of the cheapest product.

    Args:
        entries: The entries of the weight that are wanted.
        tokens: The number of tokens T that the product sums over.
        dtype: The dtype of the activations.
        device: The device of the activations.
        dense: Allows the dense product as an answer.

    Returns:
        ``"dense"``: the whole product; ``"compact"``: the dense product of the rows and columns that hold entries, which the
        host must count; ``"sampled"``: the entries alone. An answer is remembered with the entries.
    """
    key = (tokens, dtype, device, dense)
    if key not in entries.chosen:
        entries.chosen[key] = _cheapest(entries, tokens, dtype, device, dense)
    return entries.chosen[key]


def _cheapest(entries: Entries, tokens: int, dtype: torch.dtype, device: torch.device, dense: bool) -> Product:
    costs = costs_of(device, dtype)
    rows, columns = entries.shape
    offers: dict[Product, float] = {"dense": costs.call + tokens * (costs.dense * (rows * columns))} if dense else {}
    a_token = costs.transpose * (rows + columns) + costs.dot * entries.flat.numel()
    if backend_of(device).asks:
        some_rows, some_columns = spread(entries)
        gathered = some_rows * (some_rows < rows) + some_columns * (some_columns < columns)
        offers["compact"] = costs.call + tokens * (costs.select * gathered + costs.dense * (some_rows * some_columns))
        # A part of a piece costs as much as a whole one.
        offers["sampled"] = max(1.0, tokens / PIECE) * (costs.start + PIECE * a_token)
    else:
        offers["sampled"] = costs.start + tokens * a_token
    return min(offers, key=offers.__getitem__)


def spread(entries: Entries) -> tuple[int, int]:
    """Returns the number of rows and the number of columns that hold entries."""
    return entries.used_rows.numel(), entries.used_columns.numel()


def halves_pay(x: Tensor) -> bool:
    """Returns True if a float32 product on a CPU is much slower than one in bfloat16 that is summed in float32."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return costs_of(x.device, torch.bfloat16).dense <= _HALVES * costs_of(x.device, torch.float32).dense


def costs_of(device: torch.device, dtype: torch.dtype) -> Cost:
    """Returns the costs on a device; at the first use of a device and a dtype they are read from the cache, or measured."""
    return _costs(device.type, device.index, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache  # also within a process, where two measurements would differ
def _costs(kind: str, index: int | None, dtype: torch.dtype, threads: int) -> Cost:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    if kind == "meta":
        return _H100[torch.bfloat16]  # nothing can be measured there, and nothing costs anything
    if dtype in _H100 and re.search("H100|H200", _name(device)):
        return _H100[dtype]
    return _read(cache_file(device, dtype)) or calibrate(device, dtype)


def calibrate(device: torch.device, dtype: torch.dtype) -> Cost:
    """Measures the costs on a device, and keeps them in the user's cache folder if it can be written to."""
    # A measurement must see none of the caller's modes: fake tensors, counters, another default device, autocast.
    with _disable_current_modes(), torch.device(device), torch.autocast(device.type, enabled=False), torch.no_grad():
        cost = _measure(device, dtype)
    with suppress(OSError):  # then the next process measures again
        write_json(cache_file(device, dtype), asdict(cost))
    return cost


def cache_file(device: torch.device, dtype: torch.dtype, threads: int | None = None) -> Path:
    """Returns the file, in the user's cache folder, that keeps a device's costs for a dtype.

    On a CPU the costs are those of so many threads; None stands for torch's number of them.
    """
    machine = (
        f"{threads or torch.get_num_threads()} threads of {processor()}" if device.type == "cpu" else _name(device)
    )
    name = re.sub(r"[^\w.]+", "-", f"{str(dtype)[6:]} on {machine} torch {torch.__version__}")
    return cache_folder() / "costs" / f"{name}.json"


@functools.cache
def processor() -> str:
    """Returns the name of the CPU."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(path: Path) -> Cost | None:
    """Reads kept costs; returns None if the file is not there or was damaged."""
    try:
        kept = read_json(path)
        values = [float(kept[field.name]) for field in fields(Cost)]
    except (Malformed, KeyError, TypeError, ValueError):
        return None
    return Cost(*values) if all(0 <= value < math.inf for value in values) else None


def _measure(device: torch.device, dtype: torch.dtype) -> Cost:
    """Times products of a small and a large weight, on operands of random numbers."""
    small, large = _SIDES.get(device.type, _WIDE)
    generator = torch.Generator().manual_seed(0)

    def operands(side: int) -> list[Tensor]:
        return [torch.randn(_TOKENS, side, generator=generator, device="cpu").to(device, dtype) for _ in range(2)]

    def some(count: int, rows: int, side: int) -> Entries:
        """Returns random entries of the first rows of a square weight."""
        flat = torch.randperm(rows * side, generator=generator, device="cpu")[:count].sort().values.to(device)
        return Entries((side, side), flat, flat)

    def fastest(call: Callable[[], Tensor]) -> float:
        """Returns the shortest time of some calls, after one that does not count; fewer of calls that take long."""
        times: list[int] = []
        while len(times) < 3 or (len(times) < _REPEATS and sum(times) < _ENOUGH):
            start = time.perf_counter_ns()
            call()[:1].to("cpu")  # waits for the device
            times.append(time.perf_counter_ns() - start)
        return min(times[1:])

    (g, x), (little_g, little_x) = operands(large), operands(small)
    call = fastest(lambda: little_g.t() @ little_x)
    dense = (fastest(lambda: g.t() @ x) - call) / (_TOKENS * (large**2 - small**2))
    thin = some(large // 2, _THIN, large)  # of which the gathering is the most, in few rows and many columns
    gathered = fastest(lambda: sampled_product(g, x, thin, "compact"))
    rows, columns = spread(thin)
    select = (gathered - call) / _TOKENS - dense * rows * columns
    few, many, tiny = (
        some(large // 8, large, large),
        some(large * large // 64, large, large),
        some(small // 8, small, small),
    )
    start = fastest(lambda: sampled_product(little_g, little_x, tiny, "sampled"))
    one, all_of_them = (fastest(lambda e=e: sampled_product(g, x, e, "sampled")) for e in (few, many))  # type: ignore[misc]
    transpose = (one - start) / (_TOKENS * (large - small))  # of g; x stays transposed from one call to the next
    dot = (all_of_them - one) / (_TOKENS * (many.flat.numel() - few.flat.numel()))
    last_blocks.forget()
    return Cost(*(max(cost, 0.0) for cost in (call, dense, select / (rows + columns), start, transpose, dot)))
