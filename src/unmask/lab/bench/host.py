"""Measures what a training step costs the host of a GPU, on any machine: seconds, operations, and operations that wait.

A step of a small model on a GPU takes as long as the host needs to ask for it, and an operation that waits for the device costs
all of the time that the host could have been ahead. Neither needs a GPU to be seen. The model has the layers of a 7B model and is
32 wide, so that its arithmetic costs next to nothing, and the engine takes the path that it takes on a GPU
(`unmask.gradients.backend.portable`).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.errors import need
from unmask.files import write_json
from unmask.gradients.backend import portable
from unmask.lab.bench.run import describe_machine
from unmask.lab.bench.settings import BenchSettings
from unmask.methods.presets import id3, random_mask
from unmask.methods.scopes import Scope
from unmask.selection.select import select

ROWS = ("frozen", "lora", "full", "static", "static/sampled", "static/dense", "id3-10", "id3")
_BUDGET, _STEPS = 8_000, 1_000
_WARMUP, _TIMED = 5, 10  # The timed steps are a whole cycle of id3-10: one that selects and nine in between.
_SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
# The size of what these return, or what the host gets, depends on data.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_consecutive", "unique_dim", "equal",
    "is_nonzero", "repeat_interleave", "bincount",
}  # fmt: skip


def waits(function: Any, args: tuple[Any, ...]) -> bool:
    """Returns True if a dispatched operation would make the host wait for a GPU.

    Args:
        function: The operation, as a dispatch mode sees it.
        args: Its positional arguments.
    """
    name = function.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in _WAITING


class Operations:
    """Counts the operations inside its ``with`` block, the backward's too.

    Attributes:
        counts: How often each operation was dispatched.
        waiting: The same for the operations that would make the host wait.

    Example:
        >>> x = torch.ones(3)
        >>> with Operations() as operations:
        ...     _ = x[x > 0] + x.sum().item(), x.tolist()
        >>> sorted(operations.waiting.items())
        [('_local_scalar_dense', 1), ('index', 1), ('tolist', 1)]
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Operations:
        self._ending.enter_context(_Dispatched(self))
        for name in (
            "tolist",
            "numpy",
        ):  # On a CPU they are not dispatched, and torch's function modes do not see a backward.
            self._ending.enter_context(patch.object(torch.Tensor, name, self._counted(getattr(torch.Tensor, name))))
        return self

    def __exit__(self, *error: Any) -> None:
        self._ending.close()

    def _counted(self, method: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.waiting[method.__name__] += 1
            return method(tensor, *args, **options)

        return read


class _Dispatched(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self._operations.counts[name] += 1
        if waits(func, args):
            self._operations.waiting[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class HostCost:
    """The costs of one row's step for the host.

    Attributes:
        row: The name of the row.
        seconds: The median time of the steps, of one CPU thread. For id3-10 it is the mean of a cycle of 10 steps.
        ratio: The same over LoRA's.
        operations: The operations that one step dispatches; of a selecting step where there is one.
        waiting: Those of them that would make the host wait for a GPU.
    """

    row: str
    seconds: float
    ratio: float
    operations: int
    waiting: int


def measure(layers: int = 32, rows: tuple[str, ...] = ROWS) -> list[HostCost]:
    """Measures rows on the thin model; LoRA is always among them, for the others are compared with it.

    Args:
        layers: The layers of the model; 32 are those of a 7B model.
        rows: Which rows.

    Raises:
        MissingExtraError: transformers or peft is not installed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with portable():
            found = {row: _measure(row, layers) for row in dict.fromkeys(("lora", *rows))}
    finally:
        torch.set_num_threads(before)
    lora = found["lora"][0]
    return [HostCost(row, seconds, seconds / lora, *counts) for row, (seconds, *counts) in found.items() if row in rows]


def _measure(row: str, layers: int) -> tuple[float, int, int]:
    step = _stepper(row, layers)
    for _ in range(_WARMUP):
        step()
    times = []
    for _ in range(_TIMED):
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    with Operations() as operations:  # for id3-10 this is the first step of a cycle, which selects
        step()
    seconds = sum(times) / len(times) if row == "id3-10" else median(times)
    return seconds, operations.counts.total(), operations.waiting.total()


def _stepper(row: str, layers: int) -> Callable[[], None]:
    """Returns a function that runs one training step of a row."""
    transformers = need("transformers", "bench")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SHAPE, num_hidden_layers=layers, tie_word_embeddings=False, use_cache=False)
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    parameters: list[torch.nn.Parameter] = []
    if row == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    elif row == "full":
        parameters = list(model.parameters())
    elif row == "lora":
        peft = need("peft", "bench")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        name, _, gradients = row.partition("/")
        method = random_mask(_BUDGET).but(scope=Scope("linear"))
        if name != "static":
            stride = 10 if name == "id3-10" else 1
            method = id3(_BUDGET, _STEPS, exp=0.0, schedule=lambda t, T, B: _unmasked(t, B, stride))
        parameters = list(select(model, method, gradients=gradients or "auto").parameters())  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True) if parameters else None

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _unmasked(t: int, budget: int, stride: int) -> int:
    """Returns b(t): half of the budget after `_WARMUP` steps, then as much as a run of 1,000 steps unmasks."""
    if t < _WARMUP:
        return budget * (t + 1) // (2 * _WARMUP)
    return min(budget, budget // 2 + ((t - _WARMUP) // stride + 1) * stride * budget // _STEPS)


def run_host(settings: BenchSettings, command: str = "") -> dict[str, Any]:
    """Measures all rows, and writes ``host.json`` into the settings' folder; returns the same record."""
    record = {
        "kind": "host",
        "command": command,
        "machine": describe_machine(torch.device("cpu"), 1),
        "rows": [asdict(cost) for cost in measure()],
    }
    write_json(Path(settings.output, "host.json"), record)
    return record
