"""Checks that a receiver's model is the trainer's, bit for bit, after every message of every kind of method and model."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, snapshot, travelling
from torch import nn

import unmask
from unmask.sync import InProcess, Publisher, Receiver

METHODS = {
    "pafi": (unmask.pafi(60), 0),
    "static_d3": (unmask.static_d3(60), 0),
    "id3": (unmask.id3(60, steps=4), 3),
    "id3_strided": (unmask.id3(60, steps=6, stride=3), 1),
    "repeat_d3": (unmask.repeat_d3(60, stride=2), 2),
    "repeat_d3_kept": (unmask.repeat_d3(60, stride=2, leaving="kept"), 2),
    "random_increment": (
        unmask.random_mask(60).but(strategy="increment", schedule=unmask.Schedule.of("uniform", 4)),
        3,
    ),
    "bitfit": (unmask.bitfit(), 0),
    "full": (unmask.full(), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_receivers_model_is_the_trainers_after_every_step(name, dtype):
    method, least_epochs = METHODS[name]
    model, transport = nets.mixed(dtype), InProcess()
    rollout = copy.deepcopy(model)
    selection = unmask.select(model, method)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    publisher, receiver = Publisher(selection, transport), Receiver(rollout, transport)
    kinds = []
    for step in range(6):
        nets.loss(model, nets.tokens(step)).backward()
        optimizer.step()
        sent = publisher.publish()
        kinds.append(sent.kind)
        assert receiver.receive(timeout=0) == sent.version == step + 1
        assert receiver.epoch == sent.epoch
        assert_same_tensors(snapshot(rollout), snapshot(model))
    assert kinds[0] == "full"
    assert kinds.count("epoch") >= least_epochs
    assert kinds.count("step") == 5 - kinds.count("epoch")
