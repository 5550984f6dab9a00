"""Tests that training goes on from a saved adapter as in the uninterrupted run, bit for bit; only the config is given."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, snapshot, travelling
from peft_nets import NO_BASE_FILE, OLD_NAMES, base_state, config, optimizer_of, run, wrapped
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from trainers import (  # noqa: F401
    Ordered,
    Scaled,
    Tokens,
    arguments,
    bert,
    frozen_garbage,
    half_precision,
    recomputing,
    run_out_of_memory,
)
from transformers import AutoModelForSequenceClassification, Trainer

import peft
import unmask
import unmask.peft
from unmask.errors import DeltaError

pytestmark = [pytest.mark.filterwarnings(OLD_NAMES), pytest.mark.filterwarnings(NO_BASE_FILE)]


def peft_trainer(folder, model=None, kind: type[Trainer] = Trainer, given=None, data=None, **changes) -> Trainer:
    given = {"task_type": "SEQ_CLS", "budget": 60, "target_modules": "all-linear", **(given or {})}
    model = peft.get_peft_model(model or bert(), unmask.peft.SelectiveConfig(**given))
    return kind(model=model, args=arguments(folder, **changes), train_dataset=data or Tokens())


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Returns every tensor in which two equal runs must agree bit for bit."""
    adapter = trainer.model.base_model.deltas.active
    moments = [v for state in trainer.optimizer.state.values() for v in state.values()]
    return {
        **snapshot(trainer.model),
        **{f"moment {i}": torch.as_tensor(v) for i, v in enumerate(moments)},
        **{name: t for name, t in vars(adapter.slots()).items() if isinstance(t, torch.Tensor)},
        "lr": torch.tensor(trainer.lr_scheduler.get_last_lr()),
        "rng": torch.get_rng_state(),
    }


def test_a_checkpoint_has_o_of_b_bytes(tmp_path):
    sizes = {}
    for width, budget in ((16, 60), (64, 60), (64, 10_060)):
        folder = tmp_path / f"{width}-{budget}"
        given = {"budget": budget, "task_type": None, "target_modules": ["query", "key", "value", "dense"]}
        peft_trainer(folder, bert(width), given=given, save_strategy="epoch").train()
        kept = [p for p in (folder / "checkpoint-5").rglob("*") if p.name not in ("trainer_state.json", "README.md")]
        sizes[width, budget] = sum(path.stat().st_size for path in kept)
    assert abs(sizes[64, 60] - sizes[16, 60]) < 5_000, sizes  # the tensors' names; there are 16 times as many weights
    # After half of the steps there are indices, values and order of 4 bytes each for half of the budget; the optimizer holds
    # two moments of 4 bytes for each entry of the budget.
    assert sizes[64, 10_060] - sizes[64, 60] == pytest.approx(5_000 * 3 * 4 + 10_000 * 2 * 4, rel=0.1)


def continued(tmp_path, model, optimizer, fresh: torch.nn.Module, **given) -> peft.PeftModel:
    """Returns the model that a new process loads from two files (adapter and optimizer), after one more training step."""
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True).train()
    other = optimizer_of(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return run(again, 1, other, seed=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_users_own_loop_goes_on_from_save_pretrained(dtype, tmp_path):
    _, model = wrapped(dtype, modules_to_save=["head"])
    optimizer = optimizer_of(model)
    run(model, 2, optimizer)
    again = continued(tmp_path, model, optimizer, travelling(dtype))
    run(model, 1, optimizer, seed=9)
    assert_same_tensors(snapshot(model), snapshot(again))
    assert torch.equal(model.base_model.deltas.active.values, again.base_model.deltas.active.values)


def test_training_state_false_saves_values_alone_and_a_loaded_adapter_is_saved_unchanged(tmp_path):
    _, model = wrapped(torch.bfloat16)
    run(model, 2)
    for name, training_state in (("with", True), ("without", False)):
        model.peft_config["default"].training_state = training_state
        model.save_pretrained(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(travelling(torch.bfloat16), tmp_path / name)
        loaded.save_pretrained(tmp_path / f"{name} again")
    kept = {path.name: load_file(path / "adapter_model.safetensors") for path in tmp_path.iterdir()}
    more = {"base_model.unmask_order", "base_model.unmask_masters"}
    assert kept["with"].keys() - kept["without"].keys() == more
    for name in ("with", "without"):
        assert_same_tensors(kept[name], kept[f"{name} again"])
    assert sum(kept["with"][key].numel() * kept["with"][key].element_size() for key in more) == 20 * 8


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [("order", lambda t: t * 0, "order of unmasking"), ("masters", lambda t: t * 2, "do not round to its values")],
)
def test_an_altered_training_state_is_refused(key, change, match, tmp_path):
    _, model = wrapped(torch.bfloat16)
    run(model, 2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.unmask_{key}"] = change(tensors[f"base_model.unmask_{key}"])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DeltaError, match=match):
        peft.PeftModel.from_pretrained(travelling(torch.bfloat16), tmp_path)


def headless(folder: Path) -> torch.nn.Module:
    """Returns a base whose head the checkpoint lacks, so that each call draws another one."""
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


@pytest.mark.parametrize("active", [True, False])
def test_a_budget_in_a_head_that_the_checkpoint_lacks_is_saved_and_goes_on(active, tmp_path):
    folder = tiny_model(tmp_path / "base")
    torch.manual_seed(1)
    given = unmask.peft.SelectiveConfig(budget=50, target_modules=["classifier", "query"], total_steps=4)
    model = peft.get_peft_model(headless(folder), given).train()
    optimizer = optimizer_of(model)

    def train(model, optimizer, steps):
        for _ in range(steps):
            model(input_ids=torch.arange(12).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()  # this turns dropout off
    head = model.get_base_model().classifier.weight.detach().clone()
    train(model, optimizer, 3)
    expected = snapshot(model.get_base_model())
    if not active:
        model.add_adapter("other", unmask.peft.SelectiveConfig(budget=5, target_modules=["query"], total_steps=1))
        model.set_adapter("other")
    model.save_pretrained(tmp_path / "adapter")
    model.set_adapter("default")
    torch.manual_seed(2)
    again = peft.PeftModel.from_pretrained(headless(folder), tmp_path / "adapter", is_trainable=True).eval()
    assert_same_tensors(expected, snapshot(again.get_base_model()))
    other = optimizer_of(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)
    train(again, other, 1)
    assert_same_tensors(snapshot(model.get_base_model()), snapshot(again.get_base_model()))
    assert again.base_model.deltas.active.used == 50
    for each in (
        model,
        again,
    ):  # the head is stored as it was before training; the adapter's entries are applied over it
        assert torch.equal(unmask.peft.delta(each).whole["classifier.weight"], head)
    bases = [each.base_model.deltas.active.slots().base for each in (model, again)]
    assert torch.equal(*bases)
    plain = headless(folder)
    unmask.peft.delta(again).apply(plain)
    assert_same_tensors(snapshot(plain), snapshot(again.get_base_model()))


# Further features of the Trainer.


@pytest.mark.parametrize("batches", [1, 3])
def test_an_attempt_that_ran_out_of_memory_leaves_nothing_behind(batches, tmp_path):
    """The run equals that of a Trainer that has the smaller batch from the start."""
    fresh = peft_trainer(tmp_path / "fresh", bert(dropout=0.0), kind=Ordered, per_device_train_batch_size=7)
    fresh.train()
    settings = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    trainer = peft_trainer(tmp_path / "found", bert(dropout=0.0), kind=Ordered, **settings)
    run_out_of_memory(trainer, batches, limit=7)
    trainer.train()
    assert trainer.state.max_steps == fresh.state.max_steps == trainer.model.base_model.deltas.active.step
    expected, found = state_of(fresh), state_of(trainer)
    assert_same_tensors(
        {k: v for k, v in expected.items() if k != "rng"}, {k: v for k, v in found.items() if k != "rng"}
    )


def test_a_second_train_goes_on_as_with_any_peft_model(tmp_path):
    trainer = peft_trainer(tmp_path, kind=Ordered, max_steps=3)
    trainer.train()
    values = trainer.model.base_model.deltas.active.values.detach().clone()
    trainer.train()
    adapter = trainer.model.base_model.deltas.active
    assert (adapter.step, adapter.used) == (6, 60)
    assert not torch.equal(adapter.values, values)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_makes_the_same_run(reentrant, tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = peft_trainer(tmp_path, kind=Ordered, given={"stride": 2}, **recomputing(checkpointing, reentrant))
        trainer.model.enable_input_require_grads()
        trainer.train()
        assert trainer.model.base_model.deltas.active.used == 60
        results.append(base_state(trainer.model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("half_precision")
def test_a_step_that_the_scaler_skips_consumes_nothing(tmp_path, monkeypatch):
    results = []
    for overflows in ((), (0, 1, 5)):
        monkeypatch.setattr(Scaled, "overflows", overflows)
        trainer = peft_trainer(
            tmp_path,
            bert(dropout=0.0),
            kind=Scaled,
            given={"total_steps": 6},
            max_steps=6 + len(overflows),
            lr_scheduler_type="constant",
            learning_rate=1e-4,
            data=[Tokens()[i] for i in range(4)],  # always the same batch
        )
        trainer.train()
        adapter = trainer.model.base_model.deltas.active
        assert (adapter.step, adapter.used) == (6, 60)
        results.append(snapshot(trainer.model))
    assert_same_tensors(*results)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_clip_scope_all_is_the_norm_that_full_fine_tuning_logs(accumulation, tmp_path):
    """The norm is of all eligible weights and of modules_to_save, which are the whole model here."""
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.05}
    full = Ordered(model=bert(dropout=0.0), args=arguments(tmp_path, **settings), train_dataset=Tokens())
    full.train()
    given = {"clip_scope": "all", "target_modules": None, "accumulation": "exact" if accumulation > 1 else "candidates"}
    trainer = peft_trainer(tmp_path, bert(dropout=0.0), kind=Ordered, given=given, **settings)
    trainer.train()
    norms = [[row["grad_norm"] for row in each.state.log_history[:-1]] for each in (trainer, full)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("scope", ["selected", "all"])
def test_clipping_in_a_users_own_loop(scope):
    _, model = wrapped(modules_to_save=["head"], clip_scope=scope)
    run(model, 1)
    with pytest.raises(unmask.ScheduleNotRunError, match="no adapter is being trained"):
        unmask.peft.clip_grad_norm_(wrapped()[1], 1.0)
    mean_square(model, batches(1)[0]).backward()
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    before = torch.stack([p.grad.norm() for p in trained]).norm().item()
    norm = unmask.peft.clip_grad_norm_(model, 1e-3).item()
    after = torch.stack([p.grad.norm() for p in trained]).norm().item()
    assert len(trained) == 3
    assert norm == pytest.approx(before) if scope == "selected" else norm > before
    assert after == pytest.approx(1e-3 * before / norm, rel=1e-2)


def test_two_adapters_of_one_config_object_have_records_of_their_own(tmp_path):
    given = config(method="pafi")
    model = peft.get_peft_model(travelling(), given).train()
    model.add_adapter("other", given)
    run(model, 2)
    model.save_pretrained(tmp_path)
    steps = [peft.PeftConfig.from_pretrained(path).record["step"] for path in (tmp_path, tmp_path / "other")]
    assert steps == [2, 0]
