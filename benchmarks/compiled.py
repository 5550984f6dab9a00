"""Measures what ``torch.compile`` takes off the host's time of a static mask, on thin BERTs.

    python benchmarks/compiled.py

It prints the least process time of 40 steps on one thread, in milliseconds, by number of layers. The engine takes the path
that it takes on a GPU (`unmask.gradients.backend.portable`).
"""

from __future__ import annotations

import time
import warnings

import peft
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import unmask
from unmask.gradients.backend import portable

ROWS = ("frozen", "lora", "static", "static, compiled by inductor")


def thin_bert(layers: int) -> nn.Module:
    """Returns a BERT that is 32 wide."""
    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BertConfig(**shape, num_hidden_layers=layers, problem_type="single_label_classification")
    return BertForSequenceClassification(config).train()


def least(row: str, layers: int, steps: int = 40) -> float:
    """Returns the least process time of a step, in milliseconds."""
    model = thin_bert(layers)
    optimizer = None
    if row == "frozen":  # the backward reaches the embeddings' output, as it does under a selection
        model.requires_grad_(False)
        model.bert.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    elif row == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    else:
        method = unmask.random_mask("1%").but(scope=unmask.Scope("linear"))
        optimizer = torch.optim.AdamW(unmask.select(model, method).parameters())
    run = torch.compile(model, fullgraph=True) if row.endswith("inductor") else model
    ids, labels, times = torch.randint(0, 1000, (4, 16)), torch.tensor([0, 1, 1, 0]), []
    for _ in range(steps + 5):
        begin = time.process_time()
        run(input_ids=ids, labels=labels).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.process_time() - begin)
    return 1e3 * min(times[5:])


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"{'layers':>6}", *(f"{row:>{max(8, len(row))}}" for row in ROWS))
    with portable():
        for layers in (6, 12):
            found = [least(row, layers) for row in ROWS]
            print(f"{layers:>6}", *(f"{ms:>{max(8, len(row))}.1f}" for row, ms in zip(ROWS, found, strict=True)))


if __name__ == "__main__":
    main()
