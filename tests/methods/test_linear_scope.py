"""Tests that the scope "linear" has the weights of the layers that peft's "all-linear" takes, for many kinds of models."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

import peft
import unmask

SMALL = {"vocab_size": 60, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 16, "pad_token_id": 0}
T5 = {"vocab_size": 60, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": 60,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 16,
}
CAUSAL, MASKED = transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM
SEQ2SEQ, CLASSIFIER = transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForSequenceClassification

# The model's class, its configuration, and how many weights the linear layers without the output embedding have.
LLAMA_LINEAR = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16)
FAMILIES = {
    "llama": (CAUSAL, transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False), LLAMA_LINEAR),
    "llama-tied": (CAUSAL, transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True), LLAMA_LINEAR),
    "qwen2-tied": (CAUSAL, transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True), LLAMA_LINEAR),
    "gemma3-tied": (CAUSAL, transformers.Gemma3TextConfig(**LLAMA, tie_word_embeddings=True), LLAMA_LINEAR),
    "gpt2-tied": (CAUSAL, transformers.GPT2Config(vocab_size=60, n_embd=8, n_layer=2, n_head=2), 2 * 12 * 8 * 8),
    "t5-tied": (SEQ2SEQ, transformers.T5Config(**T5, tie_word_embeddings=True), 12 * 8 * 8 + 4 * 8 * 16),
    "bart-tied": (SEQ2SEQ, transformers.BartConfig(**BART), 12 * 8 * 8 + 4 * 8 * 16),
    "bert-mlm-tied": (MASKED, transformers.BertConfig(**SMALL), 2 * (4 * 8 * 8 + 2 * 8 * 16) + 8 * 8),
    "bert-mlm": (MASKED, transformers.BertConfig(**SMALL, tie_word_embeddings=False), 2 * (4 * 64 + 2 * 128) + 64),
    "bert": (CLASSIFIER, transformers.BertConfig(**SMALL), 2 * (4 * 8 * 8 + 2 * 8 * 16) + 8 * 8 + 2 * 8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_has_the_layers_of_pefts_all_linear(family):
    kind, config, count = FAMILIES[family]
    model = kind.from_config(config)
    parameters = dict(model.named_parameters())
    names = unmask.Scope("linear").names(model)
    assert sum(parameters[name].numel() for name in names) == count
    if hasattr(config, "tie_word_embeddings") and model.get_output_embeddings() is not None:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == ("tied" in family), "the case is not what it says"
    chosen = _maybe_include_all_linear_layers(peft.LoraConfig(target_modules="all-linear"), model).target_modules
    assert set(names) == {f"{name}.weight" for name in chosen}


def test_it_is_the_same_inside_wrappers():
    model = CAUSAL.from_config(FAMILIES["llama-tied"][1])
    names = unmask.Scope("linear").names(model)
    assert unmask.Scope("linear").names(nn.DataParallel(model)) == names
    held = nn.ModuleDict({"inner": model, "own": nn.Linear(2, 2)})
    assert unmask.Scope("linear").names(held) == [*(f"inner.{name}" for name in names), "own.weight"]


def test_a_layer_that_is_tied_to_an_embedding_is_left_out():
    model = nn.ModuleDict({"words": nn.Embedding(5, 2), "body": nn.Linear(2, 2), "out": nn.Linear(2, 5)})
    assert unmask.Scope("linear").names(model) == ["body.weight", "out.weight"]
    model["out"].weight = model["words"].weight
    assert unmask.Scope("linear").names(model) == ["body.weight"]


def test_the_recipe_draws_no_weight_from_a_tied_vocabulary():
    torch.manual_seed(0)
    model = CAUSAL.from_config(FAMILIES["gemma3-tied"][1])
    method = unmask.random_mask("50% of eligible").but(scope=unmask.Scope("linear"))
    selection = unmask.select(model, method)
    assert selection.used == LLAMA_LINEAR // 2
    assert not any("embed" in name or "lm_head" in name for name in selection.indices)
