"""Holds the base with a head and statistics, and the training, that the tests of the PEFT method share."""

from __future__ import annotations

import torch
from helpers import Travelling, batches, snapshot, travelling
from torch import Tensor, nn

import peft
import unmask.peft

OLD_NAMES = "ignore:`is_gradient_checkpointing` is deprecated"  # PEFT's use of transformers
# PEFT 0.20: `name_or_path` of a model made from a config, and `return_dict`
NO_BASE_FILE = "ignore:Could not find a config file in"


def config(**changes: object) -> unmask.peft.SelectiveConfig:
    given: dict = {"budget": 30, "total_steps": 3, "target_modules": ["body.0", "body.2", "embed"], **changes}
    return unmask.peft.SelectiveConfig(**given)


def wrapped(dtype: torch.dtype = torch.float32, **changes: object) -> tuple[Travelling, peft.PeftModel]:
    """Returns (an equal base, a PEFT model in training mode)."""
    return travelling(dtype), peft.get_peft_model(travelling(dtype), config(**changes)).train()


def optimizer_of(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def run(model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None, seed: int = 7) -> nn.Module:
    optimizer = optimizer or optimizer_of(model)
    dtype = next(p.dtype for p in model.get_base_model().parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 6, generator=generator).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    training = model.training
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    dtype = next(inner.parameters()).dtype
    out = model.eval()(batches(1, dtype=dtype)[0]).clone()
    model.train(training)
    return out


def base_state(model: peft.PeftModel) -> dict[str, Tensor]:
    """Returns the base's tensors under their own names."""
    return {name: tensor.clone() for name, tensor in peft.get_base_model_state_dict(model).items()}


__all__ = ["base_state", "config", "optimizer_of", "outputs", "run", "snapshot", "wrapped"]
