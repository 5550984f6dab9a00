"""Makes a tiny BERT with a word-level tokenizer, on disk, and a toy sentiment data set: a whole run takes seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from models import bert_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertModel, PreTrainedTokenizerFast

GOOD, BAD = ("fine", "lovely", "great", "warm"), ("dull", "awful", "cold", "poor")
FILLER = ("the", "film", "is", "a", "plot", "with", "actor", "scene", "and", "very")


def tiny_model(folder: Path) -> Path:
    """Writes a base checkpoint without a head."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    torch.manual_seed(0)
    BertModel(bert_config(len(vocabulary), attention_probs_dropout_prob=0.1)).save_pretrained(folder)
    _tokenizer(vocabulary).save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def toy_rows(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = draw.choices(FILLER, k=3) + draw.choices(GOOD if i % 2 else BAD, k=3)
        draw.shuffle(words)
        rows.append((" ".join(words), "good" if i % 2 else "bad"))
    return rows


def toy_csv(path: Path, count: int = 64, seed: int = 0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict"])
        writer.writerows(toy_rows(count, seed))
    return path


def tiny_world(root: Path) -> Path:
    """Makes a folder for a run on the user's own data: ``base``, ``train.csv``, ``dev.csv``."""
    tiny_model(root / "base")
    toy_csv(root / "train.csv", 64, seed=0)
    toy_csv(root / "dev.csv", 32, seed=1)
    return root
