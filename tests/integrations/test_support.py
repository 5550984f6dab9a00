"""Tests the support for Trainers: an attempt that can be undone, the search for the running Trainer, clipping, DDP."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from unmask.integrations.support import Attempt, calling, clip_in, keep_unwrapped, planned_steps, running_trainer


def trainer_of(optimizer, schedule, batch=8):
    state = SimpleNamespace(train_batch_size=batch, global_step=0, max_steps=4)
    return Holder(optimizer, schedule, state)


class Holder:
    """Stands in for a Trainer with the attributes that an attempt reads."""

    def __init__(self, optimizer, lr_scheduler, state):
        self.optimizer, self.lr_scheduler, self.state = optimizer, lr_scheduler, state
        self.args = SimpleNamespace(auto_find_batch_size=True)

    def ask(self, kind, inside=None):
        return calling(kind) if inside is None else inside.ask(kind)


def halving(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


def steps(parameter, optimizer, schedule, count=2):
    for _ in range(count):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("trained", [False, True])
def test_undo_sets_parameters_optimizer_and_a_given_schedule_back(trained):
    parameter, buffer = torch.nn.Parameter(torch.arange(3.0)), torch.zeros(2)
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    schedule = halving(optimizer)
    if trained:  # an optimizer that the user has stepped before has moments to go back to
        steps(parameter, optimizer, schedule)
    trainer = trainer_of(optimizer, schedule)
    values, before = parameter.detach().clone(), copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    attempt = Attempt(trainer, [parameter, buffer], "held")
    steps(parameter, optimizer, schedule)
    buffer.add_(1)
    assert not parameter.equal(values)
    assert attempt.undo() == "held"
    assert parameter.equal(values)
    assert buffer.equal(torch.zeros(2))
    torch.testing.assert_close((optimizer.state_dict(), schedule.state_dict()), before, rtol=0, atol=0)


def test_undo_leaves_the_learning_rate_to_a_schedule_that_the_trainer_has_made_since():
    parameter = torch.nn.Parameter(torch.arange(3.0))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    first = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    trainer = trainer_of(optimizer, first)
    attempt = Attempt(trainer, [parameter], None)
    steps(parameter, optimizer, first)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25 * (step + 1))
    attempt.undo()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert not optimizer.state_dict()["state"]
    assert parameter.equal(torch.arange(3.0))


def test_an_attempt_runs_until_its_last_step_and_has_failed_once_another_batch_size_runs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    trainer = trainer_of(optimizer, None)
    attempt = Attempt(trainer, [], None)
    assert (attempt.running, attempt.failed) == (True, False)
    trainer.state.global_step = 4
    assert (attempt.running, attempt.failed) == (False, False)
    trainer.state = SimpleNamespace(train_batch_size=4, global_step=0, max_steps=8)
    assert (attempt.running, attempt.failed) == (False, True)
    trainer.args.auto_find_batch_size = False
    assert not attempt.failed


def test_the_innermost_object_whose_method_runs_is_found_and_no_other():
    outer, inside = trainer_of(None, None), trainer_of(None, None)
    assert outer.ask(Holder) is outer
    assert outer.ask(Holder, inside) is inside
    assert outer.ask(Trainer, inside) is None
    assert calling(Holder) is None
    assert running_trainer() is None
    assert planned_steps(None) is None


def test_without_a_live_selection_the_trainers_own_clipping_is_called_with_its_arguments():
    calls = []
    accelerator = SimpleNamespace(clip_grad_norm_=lambda *args: calls.append(args))
    trainer = SimpleNamespace(accelerator=accelerator)
    clip_in(trainer, lambda parameters: (None, []))
    clip_in(trainer, lambda parameters: (None, []))  # the second call replaces the first one's function
    parameter = torch.nn.Parameter(torch.zeros(1))
    accelerator.clip_grad_norm_(iter([parameter]), 0.5)
    assert calls == [([parameter], 0.5, 2)]
    assert not hasattr(accelerator.clip_grad_norm_.original, "original")


def test_a_model_is_kept_unwrapped_by_one_change_of_accelerate():
    calls = []
    accelerator = SimpleNamespace(prepare_model=lambda model, **options: calls.append(options))
    trainer = SimpleNamespace(accelerator=accelerator)
    keep_unwrapped(trainer)
    first = accelerator.prepare_model
    keep_unwrapped(trainer)
    assert accelerator.prepare_model is first
    accelerator.prepare_model("model")
    assert calls == [{"evaluation_mode": True}]
