"""Makes a tiny tagger with a tokenizer of single letters, similar to BERT's, and tagged sentences it can learn."""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from models import bert_config
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertModel, PreTrainedTokenizerFast

from unmask.lab.tasks import Sentences

LENGTH = 24  # the tiny model's positions


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Splits every word into pieces of one letter, as BERT's tokenizer would with a vocabulary of letters."""
    letters = [*string.ascii_lowercase, *string.punctuation]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces = Tokenizer(WordPiece({p: i for i, p in enumerate(vocabulary)}, unk_token="[UNK]"))
    pieces.normalizer = BertNormalizer()
    pieces.pre_tokenizer = BertPreTokenizer()
    pieces.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def toy(count: int, seed: int, longest: int = 7) -> Sentences:
    """Labels words that begin with p as persons, with l as places; after a person, with q as the last name."""
    draw, words, tags = random.Random(seed), [], []
    for _ in range(count):
        sentence, labels = [], []
        for _ in range(draw.randint(1, longest)):
            kind = draw.choice(("", "", "", "p", "pq", "l"))
            for place, first in enumerate(kind or draw.choice("abcd")):
                sentence.append(first + "".join(draw.choices("xyz", k=draw.randint(0, 3))))
                labels.append("O" if not kind else f"{'BI'[place]}-{'LOC' if kind == 'l' else 'PER'}")
        words.append(sentence)
        tags.append(labels)
    return Sentences(words, tags)


def as_columns(path: Path, sentences: Sentences) -> Path:
    blocks = (
        "\n".join(f"{w} X {t}" for w, t in zip(*both, strict=True))
        for both in zip(sentences.words, sentences.tags, strict=True)
    )
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path


def tiny_tagger(folder: Path) -> Path:
    tokenizer = letters_tokenizer()
    torch.manual_seed(0)
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    BertModel(bert_config(len(tokenizer), max_position_embeddings=LENGTH, **drops)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tagger_world(root: Path) -> Path:
    """Makes a folder for a run on tagged sentences: ``base``, and ``data`` with three splits."""
    tiny_tagger(root / "base")
    (root / "data").mkdir()
    for split, count in (("train", 64), ("dev", 24), ("test", 16)):
        as_columns(root / "data" / f"{split}.conll", toy(count, seed=len(split) + count))
    return root


def tagger_words(output: str, *more: object) -> tuple[object, ...]:
    return (
        "train", "--model", "base", "--method", "id3", "--task", "ner", "--data-dir", "data", "--budget", 150, "--lr", 0.05,
        "--max-steps", 24, "--batch-size", 8, "--output", output, "--set", "eval_steps=8", *more,
    )  # fmt: skip
