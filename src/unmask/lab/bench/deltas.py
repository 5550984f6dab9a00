"""Measures how long a loaded model takes to go from one task to another: by deltas, by whole checkpoints, by LoRA adapters."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unmask.delta.base import base_tensors
from unmask.delta.delta import SparseDelta
from unmask.delta.fingerprint import fingerprint, fingerprint_at
from unmask.delta.remembered import digests
from unmask.delta.sparse import SparseTensor
from unmask.delta.swap import swap
from unmask.errors import need
from unmask.files import write_json
from unmask.gradients.entries import put, take
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.run import describe_machine
from unmask.lab.bench.settings import BenchSettings
from unmask.methods.presets import random_mask
from unmask.selection.select import select

_FAST, _SLOW = 10, 2  # How often a row is timed: one of single weights, and one that goes over whole matrices.
Say = Callable[[str], None]


@dataclass(frozen=True)
class DeltaCost:
    """The time of one way to change what a loaded model does.

    Attributes:
        row: The name of the row.
        seconds: The median time by the wall clock.
        least: The least time by the wall clock.
        process: The least time of all CPU threads of this process together.
        saved_bytes: The size of the file that holds a task, in the first row of each kind; None elsewhere.
    """

    row: str
    seconds: float
    least: float
    process: float
    saved_bytes: int | None = None


class DeltaBench:
    """The rows, which all change the same model.

    Args:
        settings: The model, the budget of each delta, and the rank of LoRA.
        folder: A folder with room for a file of the model's size.
        say: Takes a line for each row.

    Attributes:
        costs: The rows that were measured.
    """

    def __init__(self, settings: BenchSettings, folder: Path, say: Say = print) -> None:
        self._settings, self._folder, self._say = settings, folder, say
        plan = blueprint(settings)
        self._device = plan.device
        self._model = plan.build().eval().requires_grad_(False)
        self.costs: list[DeltaCost] = []

    def measure_deltas(self) -> None:
        """Measures deltas at random places: loading one, applying and undoing it, and swapping it for another one."""
        model = self._model
        base = fingerprint(digests(model, base_tensors(model)))
        first, second = (random_delta(model, base, self._settings.budget, seed) for seed in (1, 2))
        values = {name: entry.holding(2 * entry.values) for name, entry in first.sparse.items()}
        self._measure_applying(first)
        self._measure_swaps("other places", first, second)
        self._measure_swaps(
            "the same places", first, replace(first, sparse=values)
        )  # as two tasks under one random mask

        def write() -> None:
            tensors = base_tensors(model)
            for delta in (first, second):
                for name, entry in delta.sparse.items():
                    put(tensors[name], entry.indices, entry.values)

        self._time("the same writes, unchecked", write)

    def _measure_applying(self, delta: SparseDelta) -> None:
        path = delta.save(self._folder / "delta.safetensors")
        loaded = displaced = delta

        def load() -> None:
            nonlocal loaded
            loaded = SparseDelta.load(path)

        def apply(**options: Any) -> None:
            nonlocal displaced
            displaced = loaded.apply(self._model, **options)

        def undo() -> None:
            displaced.apply(self._model)

        self._time("delta: load", load, size=path.stat().st_size)
        self._time("delta: apply, just loaded", apply, before=load, after=undo)
        self._time("delta: apply", apply, after=undo)
        self._time("delta: undo", undo, before=apply)
        self._time("delta: apply in full", lambda: apply(verify="full"), after=undo, repeats=_SLOW)

    def _measure_swaps(self, where: str, *deltas: SparseDelta) -> None:
        """Measures going to and fro between two deltas."""
        displaced, order = deltas[0].apply(self._model), list(deltas)

        def exchange() -> None:
            nonlocal displaced
            order.reverse()
            displaced = swap(self._model, displaced, order[0])

        self._time(f"delta: swap, {where}", exchange)
        displaced.apply(self._model)

    def measure_checkpoint(self) -> None:
        """Measures loading another whole checkpoint into the model."""
        path = self._folder / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in base_tensors(self._model).items()}, path)

        def load() -> None:
            with torch.no_grad():
                stored, tensors = load_file(path), base_tensors(self._model)
                for name, tensor in stored.items():
                    tensors[name].copy_(tensor)

        self._time("whole checkpoint: load", load, repeats=_SLOW, size=path.stat().st_size)

    def measure_lora(self) -> None:
        """Measures two LoRA adapters of peft on every linear layer: choosing the other one, and merging and unmerging one."""
        peft = need("peft", "bench")
        rank = self._settings.lora_r
        config = peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, about how peft calls it
            model = peft.get_peft_model(self._model, config)
            model.add_adapter("other", config)
        names = ["other", "default"]

        def choose() -> None:
            model.set_adapter(names[0])
            names.reverse()

        def merge() -> None:
            model.merge_adapter()
            model.unmerge_adapter()

        model.save_pretrained(self._folder, selected_adapters=["default"], save_embedding_layers=False)
        size = (self._folder / "adapter_model.safetensors").stat().st_size
        self._time(f"LoRA, r = {rank}: set_adapter", choose, size=size)
        self._time(f"LoRA, r = {rank}: merge_adapter, unmerge_adapter", merge, repeats=_SLOW)

    def _time(
        self,
        row: str,
        action: Callable[[], None],
        *,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
        repeats: int | None = None,
        size: int | None = None,
    ) -> None:
        """Times an action some times, each between two others that are not timed."""
        wall, process = [], []
        for _ in range(repeats or _FAST):
            before()
            gc.collect()
            self._wait()
            begin = time.perf_counter(), time.process_time()
            action()
            self._wait()
            wall.append(time.perf_counter() - begin[0])
            process.append(time.process_time() - begin[1])
            after()
        self.costs.append(DeltaCost(row, median(wall), min(wall), min(process), size))
        self._say(f"{row}: {1e3 * min(wall):,.1f} ms at least")

    def _wait(self) -> None:
        """Waits until a GPU has done what it was asked for."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def random_delta(model: nn.Module, base: str, budget: int, seed: int) -> SparseDelta:
    """Returns a delta of random places of a model, with the model's values there times 1.5."""
    selection = select(model, random_mask(budget, seed))
    places = selection.indices
    selection.release()
    tensors, sparse, held = base_tensors(model), {}, {}
    for name, flat in places.items():
        old = take(tensors[name], flat).cpu()
        sparse[name] = SparseTensor(flat, old * 1.5 + 0.5, tuple(tensors[name].shape))
        held[name] = sparse[name].holding(old)
    return SparseDelta(sparse, {}, base, {"budget": budget}, fingerprint_at(held))


def run_deltas(settings: BenchSettings, command: str = "", say: Say = print) -> dict[str, Any]:
    """Measures all rows, and writes ``delta.json`` into the settings' folder; returns the same record.

    Raises:
        MissingExtraError: transformers or peft is not installed.
    """
    need("peft", "bench")
    torch.set_num_threads(settings.threads)
    plan = blueprint(settings)
    with tempfile.TemporaryDirectory() as folder:
        bench = DeltaBench(settings, Path(folder), say)
        bench.measure_deltas()
        bench.measure_checkpoint()
        bench.measure_lora()
    record = {
        "kind": "delta",
        "command": command,
        "machine": describe_machine(plan.device, settings.threads),
        "model": plan.describe(),
        "dtype": settings.dtype,
        "budget": settings.budget,
        "rows": [asdict(cost) for cost in bench.costs],
    }
    write_json(Path(settings.output, "delta.json"), record)
    return record
