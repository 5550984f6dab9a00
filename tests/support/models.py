"""Makes tiny transformers models: a test changes what it needs in the configuration of each architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_config(vocabulary: int = 50, **changes: Any) -> BertConfig:
    """Returns two layers of width 16 without dropout; the random features are large enough for a head to use them."""
    settings = {**SIZES, **STILL, "max_position_embeddings": 32, "initializer_range": 0.4}
    return BertConfig(vocab_size=vocabulary, **(settings | changes))


def bert_classifier(vocabulary: int = 50, seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config(vocabulary, **changes))


def llama_config(vocabulary: int = 50, **changes: Any) -> LlamaConfig:
    """Returns two layers of width 16, with weights large enough that its outputs have some variety."""
    settings = {**SIZES, "max_position_embeddings": 64, "initializer_range": 0.3}
    return LlamaConfig(vocab_size=vocabulary, **(settings | changes))


def llama_writer(vocabulary: int = 50, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(vocabulary, **changes))
