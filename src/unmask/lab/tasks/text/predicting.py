"""Scores of a model for examples, batch by batch."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.lab.tasks.text.data import Examples


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    max_length: int,
    batch_size: int = 64,
) -> np.ndarray:
    """The model's scores, float32 of shape (n, labels), in the examples' order; the model should be in evaluation mode."""
    order = sorted(range(len(examples)), key=lambda i: len(examples.texts[i]))  # like lengths together: little padding
    scores: torch.Tensor | None = None
    for low in range(0, len(order), batch_size):
        rows = order[low : low + batch_size]
        texts = [examples.texts[i] for i in rows]
        pairs = None if examples.pairs is None else [examples.pairs[i] for i in rows]
        inputs = tokenizer(texts, pairs, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        logits = model(**inputs.to(model.device)).logits.float().cpu()
        if scores is None:
            scores = logits.new_empty(len(examples), logits.shape[1])
        scores[rows] = logits
    return np.empty((0, 0), dtype=np.float32) if scores is None else scores.numpy()
