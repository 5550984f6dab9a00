"""Checks that a receiver's model is the trainer's, bit for bit, after every message, for every kind of method and model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import nets
import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, snapshot, travelling
from models import bert_classifier
from sync_runs import Pair, PlainReader, as_bits
from torch import nn

import unmask
from unmask.sync import Receiver

GROWING = unmask.Schedule.of("uniform", 4)
METHODS: dict[
    str, tuple[Callable[[], unmask.Method], int]
] = {  # with the least number of epochs after the first message
    "pafi": (lambda: unmask.pafi(60), 0),
    "static_d3": (lambda: unmask.static_d3(60), 0),
    "id3": (lambda: unmask.id3(60, steps=4), 3),
    "id3_strided": (lambda: unmask.id3(60, steps=6, stride=3), 1),
    "repeat_d3": (lambda: unmask.repeat_d3(60, stride=2), 2),
    "repeat_d3_kept": (lambda: unmask.repeat_d3(60, stride=2, leaving="kept"), 2),
    "random_increment": (lambda: unmask.random_mask(60).but(strategy="increment", schedule=GROWING), 3),
    "bitfit": (lambda: unmask.bitfit(), 0),
    "full": (lambda: unmask.full(), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_receivers_model_is_the_trainers_after_every_step(name, dtype):
    method, least_epochs = METHODS[name]
    pair = Pair(method(), nets.mixed(dtype))
    kinds = [pair.step().kind for _ in range(6)]
    assert (pair.receiver.version, pair.receiver.epoch) == (6, pair.publisher.epoch)
    assert kinds[0] == "full"
    assert kinds.count("epoch") >= least_epochs
    assert kinds.count("step") == 5 - kinds.count("epoch")


@pytest.mark.parametrize("name", METHODS)
def test_a_reader_that_shares_no_code_gets_the_trainers_model_too(name):
    pair = Pair(METHODS[name][0](), nets.mixed(torch.bfloat16))
    reader = PlainReader({name: bits for name, bits in as_bits(pair.base).items() if name != "out.weight"})
    for version in range(1, 7):
        pair.step()
        reader.read(pair.tape.messages[-1])
        assert reader.version == version
        held = as_bits(snapshot(pair.model))
        assert all((reader.tensors[name] == held[name]).all() for name in reader.tensors)


def travelling_loss(model: nn.Module, step: int) -> torch.Tensor:
    return mean_square(model, batches(step + 1, dtype=model.turned.dtype)[step])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "patterns", [{"dense": "head"}, {"new": "head"}, {"dense": "head", "new": "head"}, {}], ids=str
)
@pytest.mark.parametrize("name", ["id3", "repeat_d3", "pafi"])
def test_heads_buffers_and_turned_tensors(name, patterns, dtype):
    """Trains a model with running statistics, a tied output, a column-major tensor and a head that may be new."""
    model = travelling(dtype)
    rollout = copy.deepcopy(model)
    if "new" in patterns:
        nn.init.normal_(rollout.head.weight)  # the receiver's own random head
        nn.init.normal_(rollout.head.bias)
    pair = Pair(METHODS[name][0](), model, travelling_loss, rollout=rollout, **patterns)
    assert not rollout.turned.is_contiguous()
    for _ in range(5):
        pair.step()
    late = Receiver(copy.deepcopy(rollout.load_state_dict(pair.base) and rollout), pair.tape)
    pair.publisher.resync()
    late.receive(timeout=5)
    assert_same_tensors(snapshot(late._targets._model), snapshot(model))


def test_bytes_of_a_dense_head_are_those_of_its_values():
    small, large = (Pair(unmask.pafi(60), travelling(), travelling_loss, **p) for p in ({}, {"dense": "head"}))
    for pair in (small, large):
        pair.step()
    less, more = small.step().bytes, large.step().bytes
    head = sum(p.numel() for p in large.model.head.parameters()) * 4
    assert 0 <= more - less - head < 16  # padding


def test_an_untied_receiver_gets_both_copies():
    model = nets.mixed()
    rollout = copy.deepcopy(model)
    rollout.out.weight = nn.Parameter(rollout.out.weight.detach().clone())
    pair = Pair(unmask.pafi(300), model, rollout=rollout, include="embed")
    for _ in range(3):
        pair.step()
    assert torch.equal(rollout.out.weight, model.embed.weight)
    assert not torch.equal(rollout.out.weight, pair.base["out.weight"])


@pytest.mark.parametrize("wrapped", ["trainer", "receiver"])
def test_wrappers_do_not_change_names(wrapped):
    model = nets.mixed()
    rollout = copy.deepcopy(model)
    if wrapped == "trainer":
        model.up = nn.DataParallel(model.up)
    else:
        rollout = torch.compile(rollout, backend="eager")
        rollout.up = nn.DataParallel(rollout.up)
    pair = Pair(unmask.id3(60, steps=3), model, rollout=rollout, include="up")
    pair.tape.passing = False
    for _ in range(4):
        pair.step()
        pair.tape.deliver(pair.tape.messages[-1])
        pair.receiver.receive(timeout=0)
    inner = getattr(rollout, "_orig_mod", rollout)
    held, tuned = ({n.replace("up.module", "up"): t for n, t in snapshot(m).items()} for m in (inner, model))
    assert_same_tensors(held, tuned)
    assert "up.weight" in pair.selection.indices


def test_a_transformers_model_with_a_new_head():
    model = bert_classifier()
    rollout = bert_classifier()
    nn.init.zeros_(rollout.classifier.weight)
    data = torch.randint(5, 40, (4, 8))

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        return model(input_ids=data, labels=torch.tensor([0, 1, 0, 1])).loss

    pair = Pair(unmask.id3(200, steps=3), model, loss, rollout=rollout, new="classifier")
    for _ in range(4):
        pair.step()


def test_a_receiver_that_is_moved_to_other_memory_is_followed():
    pair = Pair(unmask.id3(60, steps=9), nets.mixed(torch.bfloat16))
    for step in range(4):
        pair.step()
        if step % 2 == 0:
            for parameter in pair.rollout.parameters():
                parameter.data = parameter.data.clone()
    pair.rollout.norm.weight = nn.Parameter(pair.rollout.norm.weight.detach().clone())
    pair.step()


def test_a_receiver_whose_weights_were_replaced_is_refused():
    pair = Pair(unmask.pafi(60))
    pair.step()
    pair.step()
    pair.rollout.load_state_dict({n: t.clone() for n, t in pair.base.items()}, assign=True)
    pair.train()
    pair.publisher.publish()
    with pytest.raises(unmask.SyncError, match="other weights than those of version 2"):
        pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), pair.base)
    pair.train()
    pair.publisher.publish()
    with pytest.raises(unmask.SyncError, match="other weights than those of version 2"):
        pair.receiver.receive(timeout=0)


@pytest.mark.parametrize("same", [True, False])
def test_a_receiver_whose_module_is_replaced_is_followed_if_its_weights_are_the_same(same):
    pair = Pair(unmask.pafi(60))
    pair.step()
    pair.rollout.up = copy.deepcopy(pair.rollout.up)
    if same:
        pair.step()
        return
    with torch.no_grad():
        pair.rollout.up.weight.mul_(2)
    pair.train()
    pair.publisher.publish()
    with pytest.raises(unmask.SyncError, match="other weights than those of version 1"):
        pair.receiver.receive(timeout=0)


def test_a_receiver_that_ties_what_the_trainer_has_apart_is_refused():
    model = nets.mixed()
    model.out.weight = nn.Parameter(model.embed.weight.detach().clone())
    pair = Pair(unmask.pafi(300), model, rollout=nets.mixed(), include="embed")
    pair.train()
    pair.publisher.publish()
    with pytest.raises(unmask.SyncError, match=r"'out.weight' is tied in the receiver's model"):
        pair.receiver.receive(timeout=0)


def test_a_tied_tensor_under_another_first_name():
    model = nets.mixed()
    rollout = nets.mixed()
    rollout.own = rollout.out.weight  # a name that the trainer's model lacks, and the first one here
    assert next(n for n, p in rollout.named_parameters() if p is rollout.own) == "own"
    pair = Pair(unmask.pafi(300), model, rollout=rollout, include="embed")
    pair.train()
    pair.publisher.publish()
    assert pair.receiver.receive(timeout=0) == 1
    assert torch.equal(rollout.own, model.embed.weight)


def test_parts_are_the_trained_weights():
    pair = Pair(unmask.id3(60, steps=3), travelling(torch.bfloat16), travelling_loss, dense="head")
    pair.step()
    pair.step()
    delta = pair.selection.delta()
    parts = {part.spec.name: part for part in pair.publisher.parts()}
    assert {n for n, p in parts.items() if p.indices is None} == set(delta.whole)
    for name, entry in delta.sparse.items():
        assert torch.equal(parts[name].indices, entry.indices)
        assert torch.equal(parts[name].values, entry.values)
        assert parts[name].spec.shape == entry.shape
    for name, whole in delta.whole.items():
        assert torch.equal(parts[name].values, whole)
    assert pair.publisher.version == 2
