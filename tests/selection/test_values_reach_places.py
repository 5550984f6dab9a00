"""Tests that writes into ``values`` also reach the model inside PEFT, a Trainer, a quantised base and a sharded model."""

from __future__ import annotations

import copy

import distributed_runs as runs
import processes
import pytest
import torch
from helpers import batches, mean_square
from peft_nets import optimizer_of, run, wrapped
from quantised_nets import as_float, data, quantised
from trainers import bert, frozen_garbage, selective  # noqa: F401  # a fixture
from value_wrappers import Free, ScheduleFree

import peft
import unmask
import unmask.peft
from unmask.errors import SelectionError
from unmask.integrations.trainer import STATE_FILE
from unmask.methods.scopes import Scope
from unmask.peft.model import tuner_of
from unmask.selection.state import read_state


def adapter_of(model: peft.PeftModel):
    return tuner_of(model).deltas.adapters["default"]


def in_place(model: peft.PeftModel) -> torch.Tensor:
    """Returns the weights of the base's tensors at the adapter's slots."""
    adapter = adapter_of(model)
    slots = adapter.slots()
    return adapter.layout.read(slots.positions[: slots.used], torch.float32)


@pytest.mark.parametrize("live", [True, False])
def test_a_write_into_an_adapter_is_in_its_forward_and_its_file(live, tmp_path):
    base, model = wrapped(method="random_mask", total_steps=None)
    run(model, 2)
    if not live:
        tuner_of(model).deltas.active.stop()
    adapter, new, x = adapter_of(model), torch.randn(30), batches(1)[0]
    assert (adapter.selection is not None) == live
    adapter.values.data.copy_(new)
    with torch.no_grad():
        model.eval()(x)
    assert torch.equal(in_place(model), new)
    adapter.values.data.copy_(new + 1)
    model.save_pretrained(tmp_path)
    assert torch.equal(in_place(model), new + 1)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(x), model(x))


def test_a_write_while_the_adapter_is_disabled_waits():
    base, model = wrapped(method="random_mask", total_steps=None)
    run(model, 2)
    x = batches(1)[0]
    model.eval()
    with model.disable_adapter():
        adapter_of(model).values.data.fill_(1.0)
        for name, tensor in base.eval().named_parameters():
            assert torch.equal(dict(tuner_of(model).model.named_parameters())[name], tensor)
        model(x)
    model(x)
    assert torch.equal(in_place(model), torch.ones(30))


def test_a_write_before_the_merge_is_merged():
    _, model = wrapped(method="random_mask", total_steps=None)
    run(model, 2)
    adapter = adapter_of(model)
    adapter.values.data.fill_(1.0)
    model.merge_and_unload()
    assert torch.equal(adapter.layout.read(adapter.slots().positions, torch.float32), torch.ones(30))


@pytest.mark.parametrize("method", ["pafi", "random_mask"])
def test_an_adapters_values_are_right_before_its_first_forward(method):
    """An averager is made when the optimizer is, before any forward."""
    _, model = wrapped(method=method, total_steps=None)
    before = adapter_of(model).values.detach().clone()
    model(batches(1)[0])
    assert before.all()
    assert torch.equal(adapter_of(model).values, before)


def test_a_stale_copy_of_a_growing_adapter_is_refused():
    _, model = wrapped()
    optimizer, stored = optimizer_of(model), adapter_of(model).values.detach().clone()
    run(model, 2, optimizer)
    adapter_of(model).values.data.copy_(stored)
    for use in (lambda: model(batches(1)[0]), lambda: unmask.peft.delta(model), lambda: adapter_of(model).stop()):
        with pytest.raises(SelectionError, match="written to outside"):
            use()


def test_schedule_free_with_a_growing_adapter_is_refused_at_its_first_step():
    _, model = wrapped()
    free = ScheduleFree([adapter_of(model).values])
    mean_square(model, batches(1)[0]).backward()
    with pytest.raises(SelectionError, match="keeps a copy"):
        free.step()


def test_a_copied_adapter_sees_the_writes_into_its_values():
    _, model = wrapped(method="random_mask", total_steps=None)
    run(model, 2)
    twin, x = copy.deepcopy(model).eval(), batches(1)[0]
    adapter_of(twin).values.data.fill_(1.0)
    twin(x)
    assert torch.equal(in_place(twin), torch.ones(30))
    assert not torch.equal(in_place(model), in_place(twin))


def test_a_trainers_checkpoint_and_model_hold_the_average_that_was_evaluated(tmp_path):
    model = bert()
    selection = unmask.select(model, unmask.random_mask(60))
    free = ScheduleFree(selection.parameters(), lr=0.05)
    trainer, _ = selective(
        tmp_path, selection, model, given={"optimizers": (free, None)}, max_steps=2, save_strategy="no"
    )
    trainer.train()
    before = selection.values.detach().clone()
    free.train() if not free.param_groups[0]["train_mode"] else free.eval()
    assert not torch.equal(selection.values, before)
    wanted = selection.values.detach().clone()
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(selection.weights_of(selection.model), wanted)
    saved = type(selection.model).from_pretrained(tmp_path / "model")
    assert torch.equal(selection.weights_of(saved), wanted)
    trainer._save_checkpoint(trainer.model, trial=None)
    assert torch.equal(read_state(tmp_path / "checkpoint-2" / STATE_FILE)["values"], wanted)


def test_a_quantised_layer_computes_with_what_was_written():
    net = quantised("int8")
    selection = unmask.select(net, unmask.random_mask(100).but(scope=Scope.patterns(r"up\.weight")))
    selection.values.data.copy_(torch.randn(100))
    with torch.no_grad():
        out = net(data(0))
    assert torch.allclose(out, as_float(net)(data(0)), atol=1e-5)
    selection.values.data.mul_(2.0)
    with torch.no_grad():
        assert not torch.equal(net(data(0)), out)
    assert torch.allclose(net(data(0)), as_float(net)(data(0)), atol=1e-5)


def sharded_average() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output of a schedule-free run on shards in evaluation mode, and that of a whole model with its weights."""
    model = runs.shard(runs.blocks())
    selection = unmask.select(model, unmask.random_mask(40))
    free = Free(selection.values)
    for step in range(3):
        free.step(lambda step=step: runs.nets.loss(model, runs.part(runs.fsdp_batch(step))))
    with torch.no_grad():
        model(runs.fsdp_batch(0))  # this forward leaves the root unsharded
        selection.values.data.mul_(2.0)
        given = model(runs.fsdp_batch(0))
    whole = runs.blocks()
    selection.delta().apply(whole)
    with torch.no_grad():
        return given, whole(runs.fsdp_batch(0))


def test_a_sharded_model_computes_with_what_was_written(tmp_path):
    for given, wanted in processes.run(2, tmp_path, sharded_average):
        torch.testing.assert_close(given, wanted)
