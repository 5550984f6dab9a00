"""Counts the bytes of messages next to those of the whole model and of a LoRA."""

from __future__ import annotations

import nets
import pytest
import torch
from models import llama_config
from sync_runs import Pair
from torch import nn
from transformers import LlamaForCausalLM

import unmask
from unmask.sync import InProcess, Publisher
from unmask.sync.header import HEADER


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4), (torch.float64, 8)]
)
@pytest.mark.parametrize("budget", [1, 60, 601])
def test_a_step_has_the_bytes_of_its_values_and_a_header(dtype, size, budget):
    pair = Pair(unmask.pafi(budget), nets.mixed(dtype))
    pair.step()
    steps = [pair.step() for _ in range(3)]
    assert HEADER.size == 128
    assert {sent.bytes for sent in steps} == {128 + -(-budget * size // 8) * 8}
    assert [len(data) for data in pair.tape.messages[1:]] == [sent.bytes for sent in steps]


@pytest.mark.parametrize("method", [unmask.id3(400, steps=4), unmask.repeat_d3(400)], ids=["id3", "repeat_d3"])
def test_an_epoch_has_the_positions_of_what_joins_and_leaves_only(method):
    pair = Pair(method, nets.mixed(torch.bfloat16))
    pair.step()
    before = pair.selection.indices
    sent = pair.step()
    after = pair.selection.indices
    sets = [{(name, i) for name, flat in each.items() for i in flat.tolist()} for each in (before, after)]
    joined, left = len(sets[1] - sets[0]), len(sets[0] - sets[1])
    assert joined > 0
    assert sent.kind == "epoch"
    values = 128 + 2 * joined + 2 * len(sets[1])  # base values, and values
    rows = 20 * len(after) * 2 + 64  # four numbers in JSON for each tensor
    assert values + (joined + left) // 2 <= sent.bytes <= values + 2 * (joined + left) + rows


def test_bytes_next_to_the_whole_model_and_a_lora_of_rank_32():
    """A model of SmolLM2-135M's shape in bfloat16, of which 0.2% are trained; nothing is trained, so it takes no time."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = llama_config(49_152, **sizes, num_key_value_heads=3, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.zero_()
    numbers = sum(p.numel() for p in model.parameters())
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    lora = 2 * sum(32 * (m.in_features + m.out_features) for m in linear)
    rank_one = lora // 32
    selection = unmask.select(model, unmask.random_mask("0.2%"))
    publisher = Publisher(selection, InProcess())
    full, step = publisher.publish(), publisher.publish()
    assert numbers == 134_515_008
    assert selection.budget == 269_030
    assert step.bytes == 128 + 538_064  # 2 bytes a weight, to a multiple of 8
    assert 2 * numbers // step.bytes == 499
    assert lora // step.bytes == 36
    assert rank_one // step.bytes == 1
    assert full.bytes < 5.4 * selection.budget + 100 * 300  # 10.5 bits of an index, base value and value; the names
