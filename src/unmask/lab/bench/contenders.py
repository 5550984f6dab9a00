"""Builds each row's contender (a model with its optimizer) and times one training step of it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unmask.errors import ConfigError, need
from unmask.lab.bench.models import Batch, Blueprint
from unmask.lab.bench.rows import PLANNED_STEPS, RAMP, Row, mid_run
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.tables import StepTime
from unmask.methods.presets import id3, random_mask, static_d3
from unmask.selection.select import select
from unmask.selection.selection import Selection

_RATE = 1e-4  # The learning rate of every optimizer. A step costs the same at any rate.


@dataclass
class Contender:
    """The contender of a row: its model and its optimizer, ready to train.

    Attributes:
        row: The row.
        model: The model in training mode. Its forward pass on a batch returns an object with a ``loss``.
        optimizer: The optimizer; None for the frozen row.
        trainable: The number of scalar weights that the row trains. For ID3 this is its budget.
        save: Writes what a user keeps of a training run into a folder and returns its bytes; None if there is nothing.
        used: Returns how many weights the row has trained so far; None means ``trainable``.
        selection: The selection of an unmask row.
        facts: Other facts for the record, for example the rank that was chosen.
    """

    row: Row
    model: nn.Module
    optimizer: Optimizer | None
    trainable: int
    save: Callable[[Path], int] | None = None
    used: Callable[[], int] | None = None
    selection: Selection | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Any]:
        """Returns the counts of weights and the other facts as JSON values."""
        trained = self.used() if self.used else self.trainable
        return {**self.facts, "trainable": self.trainable, "trained": trained}

    def step(self, batch: Batch, autocast: bool) -> StepTime:
        """Runs one training step and times its phases: forward with the loss, backward, ``step`` and ``zero_grad``."""
        selecting = False
        if self.selection is not None:
            t, method, budget = self.selection.step, self.selection.method, self.selection.budget
            selecting = method.cumulative(t, budget) > method.cumulative(t - 1, budget)
        device = batch["input_ids"].device
        clock = Clock(device)
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = self.model(**batch).loss
        clock.mark()
        loss.backward()
        clock.mark()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        clock.mark()
        forward, backward, optimizer = clock.seconds()
        return StepTime(0, forward, backward, optimizer if self.optimizer else 0.0, selecting)


class Clock:
    """Times the phases of a step: with CUDA events on the GPU's stream, otherwise by the wall clock.

    Events do not make the CPU wait between the phases, so the GPU is never idle only because it is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize(device)  # Work that was queued before must not count.
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Ends a phase."""
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Returns the length of each phase."""
        phases = itertools.pairwise(self._marks)
        if not self._cuda:
            return [end - start for start, end in phases]
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in phases]


def build(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    """Builds a row's model and optimizer.

    Raises:
        MissingExtraError: The row's package is not installed. `Row.missing` tells this beforehand.
        ConfigError: The row cannot be built for this model.
    """
    return _BUILDERS.get(row.kind, _unmask)(row, plan, settings)


def _unmask(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    model = plan.build()
    if row.kind == "static":
        method = random_mask(row.budget, plan.seed)
    elif row.kind == "static-d3":
        method = static_d3(row.budget)
    else:
        schedule = mid_run(row, settings.warmup, settings.steps)
        # The run ends before the last of these steps, at which ID3 would unmask the rest of the budget.
        method = id3(row.budget, RAMP + settings.warmup + row.cycle * (schedule.cycles + 2), schedule=schedule)
    selection = select(model, method)

    def save(folder: Path) -> int:
        return selection.delta().save(folder / "delta.safetensors").stat().st_size

    optimizer = _adamw(selection.parameters())
    return Contender(row, model, optimizer, selection.budget, save, lambda: selection.used, selection)


def _frozen(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    """Builds the floor: the backward pass reaches the output of the embeddings, and no weight gets a gradient."""
    model = plan.build().requires_grad_(False)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return Contender(row, model, None, 0)


def _full(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    model = plan.build()
    parameters = list(model.parameters())
    optimizer = _adamw(parameters, **({"fused": True} if row.kind == "full-fused" else {}))
    size = sum(p.numel() * p.element_size() for p in parameters)
    return Contender(row, model, optimizer, _count(parameters), lambda folder: size, facts={"saved": "computed"})


def _lora(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    """Builds LoRA on every linear layer, without dropout of its adapters."""
    rank = settings.lora_r
    config = need("peft", "bench").LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear")
    return _peft(row, plan.build(), config, {"r": rank}, in_float32=row.kind == "lora")


def _shira(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    """Builds SHiRA with the rank r whose r (in + out) weights per layer come nearest to the budget in all."""
    peft = need("peft", "bench")
    model = plan.build()
    layers = linear_layers(model)
    rank, names = shira_rank(layers, row.budget)
    config = peft.ShiraConfig(r=rank, random_seed=plan.seed, target_modules=names)
    return _peft(row, model, config, {"r": rank, "left_out": sorted(layers.keys() - set(names))})


def _super(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    """Builds Super-Tuning at the sparsity that trains as many weights as the budget says.

    A layer that is too small for one weight is left out.
    """
    peft = need("peft", "bench")
    if not hasattr(peft, "SupertuningConfig"):
        raise ConfigError(f"peft {peft.__version__} has no Super-Tuning; it came with 0.21: pip install -U peft.")
    model = plan.build()
    layers = linear_layers(model)
    density = min(1.0, row.budget / sum(a * b for a, b in layers.values()))
    names = [name for name, (a, b) in layers.items() if int(a * b * density) >= 1]
    config = peft.SupertuningConfig(sparsity=1 - density, target_modules=names)
    return _peft(row, model, config, {"sparsity": 1 - density, "left_out": sorted(layers.keys() - set(names))})


def _authors(row: Row, plan: Blueprint, settings: BenchSettings) -> Contender:
    """Builds ID3 of the authors' toolkit around torch's AdamW, without its check by a copy of all weights on the disk."""
    wrap = need("selective_optimizers.wrap", "bench")
    store = need("selective_optimizers.load_store", "bench")
    model = plan.build()
    parameters = list(model.parameters())
    options = {"budget": row.budget, "max_steps": min(PLANNED_STEPS, row.budget), "eps": 1.0, "exp": 2.0}
    wrapped = wrap.get_selective_optimizer(torch.optim.AdamW, "id3")
    optimizer = wrapped([{"params": parameters}], lr=_RATE, verify=False, **options)

    def save(folder: Path) -> int:
        store.write_summary_to_disk(str(folder / "summary.pt"), optimizer.get_summary(model))
        return (folder / "summary.pt").stat().st_size

    return Contender(row, model, optimizer, row.budget, save, optimizer.get_budget_used)


_BUILDERS: dict[str, Callable[[Row, Blueprint, BenchSettings], Contender]] = {
    "frozen": _frozen,
    "full": _full,
    "full-fused": _full,
    "lora": _lora,
    "lora-cast": _lora,
    "shira": _shira,
    "super": _super,
    "authors": _authors,
}


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns (in, out) of every linear layer except the output embeddings, by the layer's name."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: (m.in_features, m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not output
    }


def shira_rank(layers: dict[str, tuple[int, int]], budget: int) -> tuple[int, list[str]]:
    """Returns the rank nearest to a budget, and the layers with room for it (r (in + out) is at most in * out).

    Raises:
        ConfigError: No layer has room for rank 1.

    Example:
        >>> shira_rank({"a": (8, 8), "b": (8, 2)}, budget=50)
        (3, ['a'])
    """
    best: tuple[int, int, list[str]] | None = None
    for rank in itertools.count(1):
        names = [name for name, (a, b) in layers.items() if rank * (a + b) <= a * b]
        count = sum(rank * sum(layers[name]) for name in names)
        if names and (best is None or abs(count - budget) < best[0]):
            best = abs(count - budget), rank, names
        if not names or count > budget:
            break
    if best is None:
        raise ConfigError("SHiRA: no linear layer of this model has room for rank 1; leave the row out.")
    return best[1:]


def _peft(row: Row, model: nn.Module, config: Any, facts: dict[str, Any], in_float32: bool = True) -> Contender:
    """Wraps a model; its adapters are in float32, as peft makes those of a model in half precision, or in the model's dtype."""
    wrapped = need("peft", "bench").get_peft_model(model, config, autocast_adapter_dtype=in_float32).train()
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    facts["adapter_dtype"] = str(parameters[0].dtype).removeprefix("torch.")

    def save(folder: Path) -> int:
        wrapped.save_pretrained(folder, save_embedding_layers=False)
        return (folder / "adapter_model.safetensors").stat().st_size

    return Contender(row, wrapped, _adamw(parameters), _count(parameters), save, facts=facts)


def _adamw(parameters: list[nn.Parameter], **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=_RATE, **options)


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def state_bytes(optimizer: Optimizer | None) -> int:
    """Returns the bytes of an optimizer's tensors: its state, and the masks that it keeps in its parameter groups."""
    if optimizer is None:
        return 0
    kept = [value for state in optimizer.state.values() for value in state.values()]
    for value in [group[key] for group in optimizer.param_groups for key in group if key != "params"]:
        kept.extend(value if isinstance(value, (list, tuple)) else [value])
    return sum(t.numel() * t.element_size() for t in kept if isinstance(t, torch.Tensor))
