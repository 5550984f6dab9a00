"""Checks layers and module kinds on the names that transformers' own models have."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

from unmask.analysis import allocation, mask_over
from unmask.methods.naming import KINDS, kind_of, kinds_of, layer_labels, layer_of, without_layer

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
DISTIL = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "vocab_size": 20}
OPT = {
    "hidden_size": 8,
    "word_embed_proj_dim": 8,
    "ffn_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 20,
}

# How many matrices of each kind a layer has; fused ones count for none of the three.
FAMILIES = {
    "Bert": (SMALL, {}),
    "Roberta": (SMALL, {}),
    "MPNet": (SMALL, {}),
    "DebertaV2": (SMALL, {}),
    "DistilBert": (DISTIL, {}),
    "Llama": (SMALL | {"num_key_value_heads": 1}, {"ffn1": 2}),
    "OPT": (OPT, {}),
    "GPT2": (GPT2, {"query": 0, "key": 0, "value": 0}),
    "ModernBert": (SMALL, {"query": 0, "key": 0, "value": 0}),
}


def shapes_of(family: str, settings: dict) -> dict[str, tuple[int, ...]]:
    config = getattr(transformers, f"{family}Config")(**settings, pad_token_id=0)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_every_kind(family):
    settings, other = FAMILIES[family]
    shapes = shapes_of(family, settings)
    for layer in ("0", "1"):
        matrices = [n for n, s in shapes.items() if layer_of(n) == layer and len(s) == 2]
        expected = Counter({kind: n for kind in KINDS if (n := other.get(kind, 1))})
        assert Counter(kind_of(n) for n in matrices if kind_of(n) != "other") == expected
    for name in shapes:
        assert "norm" not in name.lower() or kind_of(name) == "other", name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_counts_every_weight_once(family):
    shapes = shapes_of(family, FAMILIES[family][0])
    generator = torch.Generator().manual_seed(0)
    indices = {
        name: torch.randperm(size, generator=generator)[: size // 3 + 1].sort().values
        for name, shape in shapes.items()
        for size in [torch.Size(shape).numel()]
    }
    mask = mask_over(indices, shapes)
    rows = allocation(mask)
    assert sum(row["unmasked"] for row in rows) == len(mask)
    assert sum(row["of"] for row in rows) == mask.weights
    assert {row["layer"] for row in rows} == {"0", "1", "other"}
    if family != "ModernBert":  # Its query, key and value are in one matrix.
        assert {row["kind"] for row in rows if row["layer"] == "0"} == {*KINDS, "other"}


def test_gpt2s_joint_tensor_is_counted_in_its_three_parts():
    name = "transformer.h.1.attn.c_attn"
    shapes = {f"{name}.weight": (2, 6), f"{name}.bias": (6,)}
    flat = torch.tensor([0, 1, 3, 5, 7, 10])  # columns 0, 1 | 3, 5 then 1 | 4: query, query, key, value, query, value
    rows = allocation(mask_over({f"{name}.weight": flat, f"{name}.bias": torch.tensor([2])}, shapes))
    found = {row["kind"]: (row["unmasked"], row["of"]) for row in rows}
    assert found == {"query": (3, 6), "key": (2, 6), "value": (2, 6)}


def test_a_joint_tensor_in_another_order_is_not_split():
    assert kinds_of("transformer.h.0.attn.c_attn.bias", (12,), weight=(12, 4)) == ("other",)
    assert kinds_of("transformer.h.0.attn.c_attn.bias", (12,)) == ("query", "key", "value")
    assert kind_of("gpt_neox.layers.0.attention.query_key_value.weight") == "other"


def test_t5s_two_stacks_keep_their_layers_apart():
    labels = layer_labels(shapes_of("T5", T5))
    assert set(labels.values()) == {"encoder 0", "encoder 1", "decoder 0", "decoder 1", "other"}
    kinds = {kind_of(name) for name in labels if labels[name] == "decoder 1"}
    assert kinds == {*KINDS, "other"}


def test_a_lora_counts_with_its_module():
    name = "base_model.model.bert.encoder.layer.3.attention.self.query.lora_A.default.weight"
    assert (layer_of(name), kind_of(name)) == ("3", "query")
    assert without_layer(name) == "attention.self.query.lora_A.default.weight"


@pytest.mark.parametrize(
    "name", ["classifier.out_proj.weight", "bert.pooler.dense.weight", "embeddings.value.weight", "0.weight"]
)
def test_a_tensor_outside_the_layers_is_other(name):
    assert (layer_of(name), kind_of(name)) == (None, "other")
