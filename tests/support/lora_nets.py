"""Makes tiny models with a LoRA of peft's or with bottleneck adapters, and batches. They need no checkpoint."""

from __future__ import annotations

import warnings

import torch
from models import bert_classifier
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from peft import LoraConfig, PeftModel, get_peft_model

VOCABULARY = 20


def tiny_bert(seed: int = 0, attention: str = "sdpa") -> BertForSequenceClassification:
    sizes = {"intermediate_size": 24, "max_position_embeddings": 16}
    return bert_classifier(VOCABULARY, seed, **sizes, attn_implementation=attention)


def lora_bert(seed: int = 0, base: nn.Module | None = None, attention: str = "sdpa", **settings: object) -> PeftModel:
    """Makes a LoRA on a fixed base; ``seed`` sets the LoRA's random init and that of its copy of the head."""
    base = base if base is not None else tiny_bert(attention=attention)
    torch.manual_seed(100 + seed)
    defaults = {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5 for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, LoraConfig(**(defaults | settings)))  # type: ignore[arg-type]


def sentences(count: int, size: int = 8, length: int = 6) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(0, VOCABULARY, (size, length), generator=draw),
            "labels": torch.randint(0, 2, (size,), generator=draw),
        }
        for _ in range(count)
    ]


class Bottleneck(nn.Module):
    """The adapter as the `adapters` library builds one: down, ReLU, up, residual."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(width, narrow), nn.ReLU())
        self.adapter_up = nn.Linear(narrow, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.adapter_up(self.adapter_down(x))


class Adapted(nn.Module):
    """The base of two layers, each followed by a bottleneck adapter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.one, self.two = Bottleneck(6, 3), Bottleneck(6, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.tanh(self.second(self.one(torch.tanh(self.first(x)))))))


def adapted(dtype: torch.dtype = torch.float64, seed: int = 0) -> Adapted:
    torch.manual_seed(seed)
    return Adapted(dtype)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def labelled(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(n, 5, generator=draw, dtype=dtype), torch.randint(0, 3, (n,), generator=draw)) for n in sizes]
