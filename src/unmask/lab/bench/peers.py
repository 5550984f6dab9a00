"""What a user would pick instead: the frozen floor, full fine-tuning, peft's tuners, the authors' toolkit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.errors import ConfigError, need
from unmask.lab.bench.contender import RATE, Contender, adamw
from unmask.lab.bench.models import Blueprint
from unmask.lab.bench.rows import Row

_PLANNED = 1_000  # the authors' max_steps: B / 1,000 weights per step, as in our rows


def build_frozen(row: Row, plan: Blueprint) -> Contender:
    """The floor: the backward pass reaches the embeddings' output, and no weight has a gradient."""
    model = plan.build().requires_grad_(False)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return Contender(row, model, None, 0)


def build_full(row: Row, plan: Blueprint) -> Contender:
    """Every weight, AdamW as it comes or fused."""
    model = plan.build()
    parameters = list(model.parameters())
    optimizer = adamw(parameters, **({"fused": True} if row.kind == "full-fused" else {}))
    size = sum(p.numel() * p.element_size() for p in parameters)
    return Contender(row, model, optimizer, _count(parameters), save=lambda folder: size, facts={"saved": "computed"})


def build_lora(row: Row, plan: Blueprint, rank: int) -> Contender:
    """LoRA on every linear layer, no dropout of its own."""
    peft = need("peft", "bench")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear")
    return _peft(row, plan.build(), config, {"r": rank})


def build_shira(row: Row, plan: Blueprint) -> Contender:
    """SHiRA with the rank r whose r (in + out) weights per layer come nearest to the budget in all."""
    peft = need("peft", "bench")
    model = plan.build()
    layers = linear_layers(model)
    rank, names = shira_rank(layers, row.budget)
    config = peft.ShiraConfig(r=rank, random_seed=plan.seed, target_modules=names)
    return _peft(row, model, config, {"r": rank, "left_out": sorted(layers.keys() - set(names))})


def build_super(row: Row, plan: Blueprint) -> Contender:
    """Super-Tuning at the sparsity that leaves the budget's count of weights; a layer too small for one is left out."""
    peft = need("peft", "bench")
    if not hasattr(peft, "SupertuningConfig"):
        raise ConfigError(f"peft {peft.__version__} has no Super-Tuning; it came with 0.21: pip install -U peft.")
    model = plan.build()
    layers = linear_layers(model)
    density = min(1.0, row.budget / sum(a * b for a, b in layers.values()))
    names = [name for name, (a, b) in layers.items() if int(a * b * density) >= 1]
    config = peft.SupertuningConfig(sparsity=1 - density, target_modules=names)
    return _peft(row, model, config, {"sparsity": 1 - density, "left_out": sorted(layers.keys() - set(names))})


def build_authors(row: Row, plan: Blueprint) -> Contender:
    """ID3 of the authors' toolkit around torch's AdamW, without its check by a copy of all weights on the disk."""
    wrap = need("selective_optimizers.wrap", "bench")
    store = need("selective_optimizers.load_store", "bench")
    model = plan.build()
    parameters = list(model.parameters())
    options = {"budget": row.budget, "max_steps": min(_PLANNED, row.budget), "eps": 1.0, "exp": 2.0, "verify": False}
    wrapped = wrap.get_selective_optimizer(torch.optim.AdamW, "id3")
    optimizer = wrapped([{"params": parameters}], lr=RATE, **options)

    def save(folder: Path) -> int:
        store.write_summary_to_disk(str(folder / "summary.pt"), optimizer.get_summary(model))
        return (folder / "summary.pt").stat().st_size

    return Contender(row, model, optimizer, row.budget, save=save, used=optimizer.get_budget_used)


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer but the output embeddings, by name."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: (m.in_features, m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not output
    }


def shira_rank(layers: dict[str, tuple[int, int]], budget: int) -> tuple[int, list[str]]:
    """The rank nearest to a budget, and the layers that have room for it (r (in + out) at most in * out).

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


def _peft(row: Row, model: nn.Module, config: Any, facts: dict[str, Any]) -> Contender:
    import peft

    wrapped = peft.get_peft_model(model, config).train()  # type: ignore[arg-type]
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    facts["adapter_dtype"] = str(parameters[0].dtype).removeprefix("torch.")
    return Contender(row, wrapped, adamw(parameters), _count(parameters), save=_saver(wrapped), facts=facts)


def _saver(model: Any) -> Callable[[Path], int]:
    def save(folder: Path) -> int:
        model.save_pretrained(folder, save_embedding_layers=False)
        return (folder / "adapter_model.safetensors").stat().st_size

    return save


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
