"""A tiny BERT with a word-level tokenizer, on disk, and a toy sentiment data set: a whole run takes seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

GOOD, BAD = ("fine", "lovely", "great", "warm"), ("dull", "awful", "cold", "poor")
FILLER = ("the", "film", "is", "a", "plot", "with", "actor", "scene", "and", "very")


def tiny_model(folder: Path) -> Path:
    """A base checkpoint without a head."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.4,  # random features that a head can use
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def toy_rows(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [*draw.choices(FILLER, k=5), draw.choice(GOOD if i % 2 else BAD)]
        draw.shuffle(words)
        rows.append((" ".join(words), "good" if i % 2 else "bad"))
    return rows


def toy_csv(path: Path, count: int = 64, seed: int = 0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict"])
        writer.writerows(toy_rows(count, seed))
    return path
