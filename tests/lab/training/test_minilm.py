"""Compares ID3's losses on the real MiniLM and real text with those of a plain masked-dense implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import unmask
from unmask.errors import DataError
from unmask.lab.models import load_base
from unmask.lab.training.demo_data import fetch_demo_model, fetch_demo_texts, load_demo_task

STEPS, BUDGET, LR = 100, 20_000, 1e-3


@pytest.mark.slow
def test_id3_equals_masked_dense_over_100_steps_on_minilm() -> None:
    try:
        texts, _ = fetch_demo_texts(), fetch_demo_model()
    except DataError as error:
        pytest.skip(f"the real model cannot be fetched: {error}")
    data = load_demo_task(texts).train
    ours = _losses(data, _id3_losses)
    dense = _losses(data, _dense_losses)
    assert ours == pytest.approx(dense, rel=1e-4)
    assert ours[:20] == pytest.approx(dense[:20], rel=1e-6)


def _losses(data: object, train: object) -> list[float]:
    model, tokenizer, _ = load_base(str(fetch_demo_model()), num_labels=2, seed=0)
    model.eval()  # without dropout the two runs train the same function
    batches = []
    for step in range(STEPS):
        rows = slice(4 * step, 4 * step + 4)
        batch = tokenizer(data.texts[rows], padding=True, truncation=True, max_length=24, return_tensors="pt")
        batches.append(dict(batch) | {"labels": torch.tensor(data.labels[rows])})
    return train(model, batches)


def _id3_losses(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    selection = unmask.select(model, unmask.id3(BUDGET, STEPS), exclude="classifier")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _dense_losses(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    """Trains with a dense optimizer and a masked gradient: every weight has a gradient, a mask and Adam's moments."""
    tensors = [p for name, p in sorted(model.named_parameters()) if "classifier" not in name]
    model.classifier.requires_grad_(False)
    masks = [torch.zeros_like(p, dtype=torch.bool) for p in tensors]
    optimizer = torch.optim.AdamW(tensors, lr=LR, weight_decay=0.0)
    losses = []
    for t, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        due = BUDGET * (t + 1) // STEPS - BUDGET * t // STEPS
        scores = [p.grad.abs() / (p.detach().abs() + 1.0) ** 2 for p in tensors]
        for score, mask in zip(scores, masks, strict=True):
            score[mask] = -1.0
        best = torch.cat([score.reshape(-1).topk(min(due, score.numel())).values for score in scores]).topk(due).values
        new = [score >= best[-1] for score in scores]
        assert sum(int(n.sum()) for n in new) == due, "no ties at the cut-off on real gradients"
        for p, mask, n in zip(tensors, masks, new, strict=True):
            mask |= n
            p.grad[~mask] = 0.0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
