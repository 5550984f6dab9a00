"""Tests transformers' Trainer on a selection: it makes the run of a plain loop, and its checkpoints have O(B) bytes."""

from __future__ import annotations

import copy
import types
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, assert_unselected_is_base, snapshot
from models import SIZES
from torch.utils.data import Dataset
from trainers import (  # noqa: F401
    Ordered,
    Scaled,
    Tokens,
    arguments,
    bert,
    frozen_garbage,
    half_precision,
    id3,
    recomputing,
    run_out_of_memory,
    selective,
)
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

import unmask
from unmask.gradients.wrappers import bare
from unmask.integrations.trainer import SelectiveCallback

METHODS = {
    "id3": id3(),
    "strided": id3(stride=2, schedule="cosine"),
    "repeat": unmask.repeat_d3(60),
    "pafi": unmask.pafi(60),
    "full": unmask.full(),
}


def mean_over_the_step(outputs, labels, num_items_in_batch=None):
    """Returns the mean over all micro-batches of a step; versions of transformers differ in their own."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def plain_loop(method, accumulation=1, max_norm=1.0, epochs=2, dense=None):
    """Trains as the Trainer must: a plain loop over the data in order, without dropout."""
    model, data = bert(dropout=0.0), Tokens()
    batches = [[data[i] for i in range(j, j + 4)] for j in range(0, 20, 4)]
    groups = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)] * epochs
    selection = unmask.select(model, method(len(groups)) if callable(method) else method, dense=dense)
    optimizer = torch.optim.SGD(
        selection.parameters(), lr=0.3
    )  # Adam would enlarge the rounding errors of tiny gradients
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (len(groups) - t) / len(groups))
    model.train()
    for group in groups:
        for batch in group:
            inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
            (model(**inputs).loss / len(group)).backward()
        unmask.clip_grad_norm_(selection, max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, selection


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_makes_the_run_of_a_plain_loop(method, accumulation, tmp_path):
    model, expected = plain_loop(METHODS[method], accumulation, max_norm=0.3)
    trainer, callback = selective(
        tmp_path,
        METHODS[method],
        bert(dropout=0.0),
        kind=Ordered,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.3,
        optim="sgd",
        learning_rate=0.3,
        given={"compute_loss_func": mean_over_the_step},
    )
    trainer.train()
    torch.testing.assert_close(snapshot(trainer.model), snapshot(model))
    assert_same_tensors(callback.live.indices, expected.indices)
    assert callback.live.step == expected.step == trainer.state.max_steps


def test_exactly_the_budget_changes_and_the_logged_norm_is_of_what_is_trained(tmp_path):
    model = bert()
    base, norms = snapshot(model), []
    trainer, callback = selective(tmp_path, model=model, max_grad_norm=0.3, weight_decay=0.1)
    clip = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda *args: (
        norms.append(callback.live.values.grad.norm().item()) or clip(*args)
    )
    trainer.train()
    assert (callback.live.used, callback.live.budget) == (60, 60)
    assert_unselected_is_base(model, base, callback.live)
    assert len(callback.live.delta()) == 60
    assert [row["grad_norm"] for row in trainer.state.log_history[:-1]] == pytest.approx(norms)
    assert min(norms) > 0.3


def state_of(trainer, selection):
    """Returns every tensor in which two equal runs must agree bit for bit."""
    moments = dict(enumerate(trainer.optimizer.state.values()))
    return {
        **snapshot(selection.model),
        **{f"moment {i} {k}": torch.as_tensor(v) for i, state in moments.items() for k, v in state.items()},
        "values": selection.values.detach().clone(),
        "positions": selection.ledger.positions.clone(),
        "lr": torch.tensor(trainer.lr_scheduler.get_last_lr()),
        "rng": torch.get_rng_state(),
    }


def test_evaluation_during_training_changes_no_bit_of_the_run(tmp_path):
    results = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        trainer, callback = selective(tmp_path, given={"eval_dataset": Tokens(8)}, **changes)
        trainer.train()
        results.append(state_of(trainer, callback.live))
    assert_same_tensors(*results)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.name != "trainer_state.json")


def test_a_checkpoint_has_o_of_b_bytes(tmp_path):
    sizes = {}
    for width, budget in ((16, 60), (64, 60), (64, 10_060)):
        trainer, _ = selective(tmp_path / f"{width}-{budget}", id3(budget), bert(width), save_strategy="epoch")
        trainer.train()
        sizes[width, budget] = folder_bytes(tmp_path / f"{width}-{budget}" / "checkpoint-5")
    assert abs(sizes[64, 60] - sizes[16, 60]) < 300
    # Each entry has a value, a base value and two moments in float32, and a position in int64.
    assert sizes[64, 10_060] - sizes[64, 60] == pytest.approx(10_000 * (4 * 4 + 8), rel=0.01)


def test_save_model_saves_an_ordinary_model_and_the_delta_is_its_difference(tmp_path):
    model = bert()
    base = copy.deepcopy(model)
    trainer, callback = selective(tmp_path, model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "whole"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    callback.live.delta().apply(base)
    assert_same_tensors(snapshot(loaded), snapshot(model))
    assert_same_tensors(snapshot(base), snapshot(model))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer, callback = selective(
        tmp_path,
        given={"eval_dataset": Tokens(8), "callbacks": [EarlyStoppingCallback(2)]},
        learning_rate=0.3,
        num_train_epochs=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert callback.live.step == best < trainer.state.global_step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


# Precision.


def test_bf16_autocast_trains_float32_weights(tmp_path):
    trainer, callback = selective(tmp_path, bf16=True)
    trainer.train()
    assert callback.live.used == 60
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in trainer.state.log_history[:-1])


@pytest.mark.parametrize(  # a fused optimizer skips a step inside its kernel
    ("clip_scope", "optim"),
    [("selected", "adamw_torch"), ("selected", "adamw_torch_fused"), ("all", "adamw_torch_fused")],
)
@pytest.mark.usefixtures("half_precision")
def test_a_scaler_changes_nothing_and_a_step_that_it_skips_consumes_nothing(clip_scope, optim, tmp_path, monkeypatch):
    results, norms = [], []
    for kind, overflows in ((Ordered, ()), (Scaled, ()), (Scaled, (0, 1, 5))):
        monkeypatch.setattr(Scaled, "overflows", overflows)
        trainer, callback = selective(
            tmp_path,
            unmask.id3(60, steps=6),
            bert(dropout=0.0),
            kind=kind,
            options={"clip_scope": clip_scope, "dense": "classifier"},
            max_steps=6 + len(overflows),
            max_grad_norm=0.05,
            lr_scheduler_type="constant",
            optim=optim,
            learning_rate=1e-4,
            data=[Tokens()[i] for i in range(4)],  # always the same batch
        )
        trainer.train()
        assert (callback.live.step, callback.live.used) == (6, 60)
        results.append(snapshot(trainer.model))
        norms.append([row["grad_norm"] for row in trainer.state.log_history[:-1]])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)  # both are norms of the unscaled gradient; one is in float16
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-3)
    assert_same_tensors(results[1], results[2])


@pytest.mark.usefixtures("half_precision")
def test_a_run_whose_every_step_was_skipped_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Scaled, "overflows", tuple(range(10)))
    trainer, _ = selective(tmp_path, model=bert(dropout=0.0), kind=Scaled)
    with pytest.raises(unmask.ScheduleNotRunError, match="each of its 10 steps was skipped"):
        trainer.train()


# Clipping by the norm of the whole gradient.


@pytest.mark.parametrize("accumulation", [1, 2])
def test_clip_scope_all_logs_the_norm_that_full_fine_tuning_logs(accumulation, tmp_path):
    norms = []
    for method, options in (
        (unmask.full(), {}),
        (id3(), {"clip_scope": "all", "accumulation": "exact" if accumulation > 1 else "candidates"}),
    ):
        trainer, _ = selective(
            tmp_path,
            method,
            bert(dropout=0.0),
            kind=Ordered,
            options=options,
            learning_rate=0.0,  # the two runs stay at the same weights
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.05,
        )
        trainer.train()
        norms.append([row["grad_norm"] for row in trainer.state.log_history[:-1]])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_clip_scope_all_with_accumulation_asks_for_exact_accumulation(tmp_path):
    trainer, _ = selective(tmp_path, options={"clip_scope": "all"}, gradient_accumulation_steps=2)
    with pytest.raises(unmask.SelectionError, match="accumulation='exact'"):
        trainer.train()


# Gradient checkpointing.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("exclude", [None, "embeddings"])
def test_gradient_checkpointing_makes_the_same_run(reentrant, exclude, tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer, _ = selective(
            tmp_path,
            id3(stride=2),
            kind=Ordered,
            options={"exclude": exclude},
            **recomputing(checkpointing, reentrant),
        )
        trainer.train()
        results.append(snapshot(trainer.model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Patches(Dataset):
    """Holds pictures of one of two colours."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3, 8, 8), float(index % 2)), "labels": torch.tensor(index % 2)}


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))


def test_reentrant_checkpointing_of_a_model_whose_inputs_are_no_tokens(tmp_path):
    """transformers itself lets gradients through the inputs of token models only."""
    results = []
    for checkpointing in (False, True):
        trainer, callback = selective(
            tmp_path,
            model=vit(),
            data=Patches(),
            kind=Ordered,
            options={"include": "layer"},
            **recomputing(checkpointing, reentrant=True),
        )
        trainer.train()
        assert callback.live.used == 60
        callback.live.release()
        assert not any(module._forward_hooks for module in trainer.model.modules())
        results.append(snapshot(trainer.model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# auto_find_batch_size.


@pytest.mark.parametrize("how", ["method", "selection"])
@pytest.mark.parametrize("batches", [1, 3])
def test_an_attempt_that_ran_out_of_memory_leaves_nothing_behind(how, batches, tmp_path):
    def build(size, **changes):
        model = bert(dropout=0.0)
        settings = {"kind": Ordered, "options": {"dense": "classifier"}, "per_device_train_batch_size": size}
        if how == "method":
            return selective(tmp_path, model=model, **settings, **changes)
        selection = unmask.select(model, unmask.id3(60, steps=6), dense="classifier")
        optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
        settings |= {"options": {}, "given": {"optimizers": (optimizer, None)}}
        return selective(tmp_path, selection, model, **settings, **changes)

    fresh, expected = build(7)
    fresh.train()
    trainer, callback = build(8, auto_find_batch_size=True)
    base = snapshot(trainer.model)
    run_out_of_memory(trainer, batches, limit=7)
    trainer.train()
    assert trainer._train_batch_size == 7
    assert_same_tensors(state_of(fresh, expected.live), state_of(trainer, callback.live))
    assert callback.live.step == trainer.state.max_steps == 6
    trained_whole = {name: tensor for name, tensor in snapshot(trainer.model).items() if "classifier" in name}
    assert_unselected_is_base(trainer.model, base | trained_whole, callback.live)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch._dynamo causes this warning
def test_an_attempt_on_a_compiled_model_of_model_init_is_undone_too(tmp_path):
    def build(size, **changes):
        trainer = Ordered(
            model_init=lambda: torch.compile(bert(dropout=0.0), backend="eager"),
            args=arguments(tmp_path, per_device_train_batch_size=size, remove_unused_columns=False, **changes),
            train_dataset=Tokens(),
        )
        callback = SelectiveCallback(trainer, id3())
        trainer.add_callback(callback)
        return trainer, callback

    fresh, expected = build(7)
    fresh.train()
    trainer, callback = build(8, auto_find_batch_size=True)
    run_out_of_memory(trainer, 3, limit=7)
    trainer.train()
    assert callback.live.model is bare(trainer.model) is not trainer.model
    assert_same_tensors(state_of(fresh, expected.live), state_of(trainer, callback.live))


def test_a_run_that_died_starts_from_the_base_again(tmp_path):
    fresh, expected = selective(tmp_path, model=bert(dropout=0.0), kind=Ordered)
    fresh.train()
    trainer, callback = selective(tmp_path, model=bert(dropout=0.0), kind=Ordered)
    step = trainer.training_step
    run_out_of_memory(trainer, 3, limit=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.training_step = step
    trainer.train()
    assert_same_tensors(state_of(fresh, expected.live), state_of(trainer, callback.live))


# 8-bit optimizers.


@pytest.mark.parametrize("method", ["id3", "repeat"])
def test_8_bit_adamw_trains_exactly_the_budget(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    budget = 5_000  # bitsandbytes keeps 8-bit state for tensors of 4,096 entries or more
    methods = {"id3": id3(budget), "repeat": unmask.repeat_d3(budget)}
    settings = {"optim": "adamw_bnb_8bit", "learning_rate": 1e-3}
    straight, callback = selective(tmp_path, methods[method], bert(32), **settings)
    base = snapshot(straight.model)
    straight.train()
    assert straight.optimizer.state[callback.live.values]["state1"].dtype == torch.uint8
    assert_unselected_is_base(straight.model, base, callback.live)


# A Trainer that gets only the optimizer of a selection.


def plain(folder, model, selection, optimizer=None, **changes):
    optimizer = optimizer or torch.optim.AdamW(selection.parameters(), lr=1e-2)
    return Trainer(model=model, args=arguments(folder, **changes), train_dataset=Tokens(), optimizers=(optimizer, None))


def test_a_plain_trainer_with_a_selections_optimizer_makes_the_same_run_but_clips_nothing(tmp_path):
    model = bert()
    selection = unmask.select(model, unmask.id3(60, steps=10))
    trainer = plain(tmp_path, model, selection, max_grad_norm=1e-6)
    trainer.train()
    again = bert()
    other = unmask.select(again, unmask.id3(60, steps=10))
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    reference, callback = selective(tmp_path, other, again, given={"optimizers": (optimizer, None)}, max_grad_norm=0.0)
    reference.train()
    assert_same_tensors(state_of(reference, callback.live), state_of(trainer, selection))


def test_a_plain_trainer_without_an_optimizer_is_refused_at_its_first_step(tmp_path):
    model = bert()
    selection = unmask.select(model, unmask.id3(60, steps=10))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Tokens())
    with pytest.raises(unmask.ScheduleNotRunError, match="holds no parameter"):
        trainer.train()
    assert selection.step == 0


def test_a_plain_trainer_that_trains_the_head_alone_is_refused(tmp_path):
    model = bert()
    selection = unmask.select(model, unmask.id3(60, steps=10), dense="classifier")
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Tokens())
    with pytest.raises(unmask.ScheduleNotRunError, match="holds the dense tensors alone"):
        trainer.train()
    assert (selection.step, trainer.state.global_step) == (0, 1)


def test_a_plain_trainer_that_resumes_without_the_mask_is_refused(tmp_path):
    model, again = bert(), bert()
    trainer = plain(
        tmp_path, model, unmask.select(model, unmask.id3(60, steps=10)), save_strategy="steps", save_steps=4
    )
    trainer.train()
    resumed = plain(tmp_path, again, unmask.select(again, unmask.id3(60, steps=10)))
    with pytest.raises(unmask.ScheduleNotRunError, match=r"has taken 4 steps .* the selection 0.*SelectiveCallback"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# Uses that are refused.


def test_an_optimizer_built_before_the_selection_is_refused_before_the_first_step(tmp_path):
    model = bert()
    before = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selection = unmask.select(model, unmask.id3(60, steps=10))
    trainer, _ = selective(tmp_path, selection, model, given={"optimizers": (before, None)})
    with pytest.raises(unmask.ScheduleNotRunError, match=r"built before unmask\.select"):
        trainer.train()


def test_a_schedule_of_another_optimizer_is_refused(tmp_path):
    model = bert()
    selection = unmask.select(model, unmask.id3(60, steps=10))
    mine, other = (torch.optim.SGD(selection.parameters(), lr=1e-2) for _ in range(2))
    schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda t: 1.0)
    trainer, _ = selective(tmp_path, selection, model, given={"optimizers": (mine, schedule)})
    with pytest.raises(unmask.ScheduleNotRunError, match="drives another optimizer"):
        trainer.train()


def test_a_callback_that_was_not_added_is_an_error(tmp_path):
    trainer = Trainer(model=bert(), args=arguments(tmp_path), train_dataset=Tokens())
    SelectiveCallback(trainer, id3())
    with pytest.raises(unmask.ScheduleNotRunError, match=r"trainer\.add_callback\(SelectiveCallback"):
        trainer.train()


@pytest.mark.parametrize("stride", [1, 4])
def test_a_run_shorter_than_its_schedule_is_refused_and_a_longer_one_is_not(stride, tmp_path):
    trainer, _ = selective(tmp_path, unmask.id3(60, steps=20, stride=stride))
    with pytest.raises(
        unmask.ScheduleNotRunError, match=r"over 20 steps, and this Trainer ends after 10.*lambda steps"
    ):
        trainer.train()
    trainer, callback = selective(tmp_path, unmask.id3(60, steps=5, stride=stride))
    trainer.train()
    assert (callback.live.used, callback.live.step) == (60, 10)


def test_an_optimizer_that_does_not_step_is_an_error_at_once(tmp_path):
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    model = bert()
    selection = unmask.select(model, unmask.id3(60, steps=10))
    optimizer = Idle(selection.parameters(), lr=0.1)
    trainer, _ = selective(tmp_path, selection, model, given={"optimizers": (optimizer, None)})
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)  # then not even torch's hooks run
    with pytest.raises(unmask.ScheduleNotRunError, match="step 1 of the Trainer did not reach the selection"):
        trainer.train()


def test_a_model_other_than_the_selections_is_refused(tmp_path):
    selection = unmask.select(bert(), unmask.id3(60, steps=10))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    trainer, _ = selective(tmp_path, selection, bert(), given={"optimizers": (optimizer, None)})
    with pytest.raises(unmask.SelectionError, match="not the one that was selected from"):
        trainer.train()


def test_a_second_train_is_refused(tmp_path):
    trainer, _ = selective(tmp_path)
    trainer.train()
    with pytest.raises(unmask.SelectionError, match="trained to the end"):
        trainer.train()


def test_model_init_makes_a_new_model_and_the_callback_a_new_selection(tmp_path):
    trainer = Trainer(model_init=lambda: bert(), args=arguments(tmp_path), train_dataset=Tokens())
    callback = SelectiveCallback(trainer, id3())
    trainer.add_callback(callback)
    models = []
    for _ in range(2):  # a hyperparameter search does this
        trainer.train()
        assert callback.live.model is trainer.model
        assert callback.live.used == 60
        models.append(trainer.model)
    assert models[0] is not models[1]
    assert_same_tensors(*map(snapshot, models))


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo"])
def test_an_optimizer_that_takes_its_parameters_from_the_model_is_refused(optim, tmp_path, monkeypatch):
    trainer, _ = selective(tmp_path)
    chosen = (torch.optim.SGD, {"params": []}) if optim == "galore_adamw" else (object, {})
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda args: chosen)
    with pytest.raises(unmask.ConfigError, match=r"selection\.parameters\(\)"):
        trainer.train()


@pytest.mark.parametrize("what", ["id3", 5, lambda steps: steps])
def test_a_value_that_is_no_method_is_refused(what, tmp_path):
    trainer, _ = selective(tmp_path, what)
    with pytest.raises(unmask.MethodError, match="give a method"):
        trainer.train()


def test_options_together_with_a_selection_are_refused(tmp_path):
    model = bert()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Tokens())
    with pytest.raises(unmask.ConfigError, match=r"give dense to unmask\.select"):
        SelectiveCallback(trainer, unmask.select(model, unmask.pafi(5)), dense="classifier")


def test_a_folder_that_holds_no_selection_is_refused(tmp_path):
    trainer, _ = selective(tmp_path)
    with pytest.raises(unmask.SelectionError, match="no selection state"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
