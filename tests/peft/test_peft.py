"""Tests the PEFT method with one adapter on one base, through PEFT's own functions. Every comparison is exact."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, snapshot, train, travelling
from peft_nets import OLD_NAMES, base_state, config, optimizer_of, outputs, run, wrapped
from quantised_nets import quantised
from torch import nn

import peft
import unmask
import unmask.analysis
import unmask.peft
from unmask.delta.live import has_selection
from unmask.errors import MethodError, ScheduleNotRunError

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


def adapter_of(model, name="default"):
    return model.base_model.deltas.adapters[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["id3", "repeat_d3", "static_d3", "pafi", "random_mask"])
def test_training_makes_the_run_of_a_plain_selection(method, dtype):
    """The reference is `unmask.select` on the same tensors."""
    plain, wrapped_model = wrapped(dtype, method=method)
    included = r"^(body\.0|body\.2|embed)\."
    selection = unmask.select(plain, config(method=method).build(30), include=included, new=[])
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
    run(wrapped_model, 5)
    generator = torch.Generator().manual_seed(7)
    data = [torch.randn(4, 6, generator=generator).to(dtype) for _ in range(5)]
    train(plain, optimizer, data)
    assert_same_tensors(snapshot(plain), base_state(wrapped_model))
    assert torch.equal(selection.values, adapter_of(wrapped_model).values)


@pytest.mark.parametrize("heuristic", ["snip", "large_magnitude", "of_mine"])
def test_a_heuristic_and_a_scope_make_the_run_of_a_plain_selection(heuristic, registry, tmp_path):
    """The heuristic may be one that the user registers. A saved adapter keeps both settings."""
    unmask.register_heuristic("of_mine", lambda weight, gradient: gradient.abs() * (1 + weight.abs()))
    settings = {"method": "static_d3", "heuristic": heuristic, "scope": "linear"}
    plain, model = wrapped(torch.float32, **settings)
    method = unmask.static_d3(30).but(heuristic=unmask.heuristic(heuristic), scope=unmask.Scope("linear"))
    selection = unmask.select(plain, method, include=r"^(body\.0|body\.2|embed)\.", new=[])
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
    run(model, 3)
    generator = torch.Generator().manual_seed(7)
    train(plain, optimizer, [torch.randn(4, 6, generator=generator) for _ in range(3)])
    assert_same_tensors(snapshot(plain), base_state(model))
    assert all(name.endswith("weight") for name in selection.indices)
    model.save_pretrained(tmp_path)
    loaded = unmask.peft.SelectiveConfig.from_pretrained(tmp_path)
    assert (loaded.heuristic, loaded.scope) == (heuristic, "linear")


def test_the_budget_and_modules_to_save_are_trainable(capsys):
    base, model = wrapped(modules_to_save=["head"])
    head, total = sum(p.numel() for p in base.head.parameters()), sum(p.numel() for p in base.parameters())
    assert model.get_nb_trainable_parameters() == (30 + head, 30 + head + total)
    run(model, 1)
    line = f"default (id3): 10 weights selected of a budget of 30, step 1 of 3; {head} numbers trained whole in modules_to_save"
    assert unmask.peft.status(model) == line
    model.print_trainable_parameters()
    peft_line, ours = capsys.readouterr().out.splitlines()
    assert peft_line.startswith(f"trainable params: {30 + head} || all params: {30 + head + total} || trainable%: ")
    assert ours == line


def test_a_model_prints_its_own_state_and_not_that_of_a_copy(capsys, tmp_path):
    _, model = wrapped()
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    run(model, 1).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(travelling(), tmp_path)
    run(model, 2)
    for each in (model, twin, pickled, loaded):
        each.print_trainable_parameters()
    lines = [line.split(" weights")[0] for line in capsys.readouterr().out.splitlines() if "selected" in line]
    assert lines == [f"default (id3): {count}" for count in (30, 0, 0, 10)]
    for name in list(model.peft_config):
        model.delete_adapter(name)
    model.print_trainable_parameters()
    assert "selected" not in capsys.readouterr().out


def test_exactly_the_budget_changes_and_every_other_weight_is_the_bases():
    base, model = wrapped()
    before = snapshot(base)
    run(model, 2)
    changed = {n: (t != before[n]).sum().item() for n, t in base_state(model).items() if "norm" not in n}
    assert adapter_of(model).used == 20
    assert 0 < sum(changed.values()) <= 2 * 20  # the tied tensor has two names
    assert {name.rpartition(".")[0] for name, count in changed.items() if count} <= {"body.0", "body.2", "embed", "out"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_disabled_adapter_gives_the_base_bit_for_bit_and_does_not_disturb_training(dtype):
    base, model = wrapped(dtype, modules_to_save=["head"])
    _, undisturbed = wrapped(dtype, modules_to_save=["head"])
    optimizers = optimizer_of(model), optimizer_of(undisturbed)
    for seed in range(4):
        with model.disable_adapter():
            assert torch.equal(outputs(model), outputs(base))
            assert_same_tensors(snapshot(base), base_state(model))
        run(model, 1, optimizers[0], seed)
        run(undisturbed, 1, optimizers[1], seed)
    assert_same_tensors(snapshot(undisturbed), snapshot(model))


def test_disabling_between_forward_and_backward_does_not_change_the_gradient():
    """Preference optimization does this: a forward of the policy, one of the base without the adapter, then the backward."""
    _, model = wrapped()
    _, twin = wrapped()
    run(model, 1), run(twin, 1)
    x = batches(1)[0]
    loss = mean_square(model, x)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    assert not model.base_model.deltas.active.selection._taps._pieces  # the disabled forward buffers nothing
    loss.backward()
    mean_square(twin, x).backward()
    assert torch.equal(adapter_of(model).values.grad, adapter_of(twin).values.grad)


def test_a_backward_inside_disable_adapter_is_refused_by_autograd():
    _, model = wrapped()
    run(model, 1)
    loss = mean_square(model, batches(1)[0])
    with model.disable_adapter(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merge_and_unload_gives_an_ordinary_model_and_unload_the_base():
    base, model = wrapped(modules_to_save=["head"])
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    run(model)
    twin, expected = copy.deepcopy(model), outputs(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.equal(outputs(merged), expected)
    unloaded = twin.unload()
    assert_same_tensors(snapshot(base), snapshot(unloaded))
    for plain in (merged, unloaded):
        assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
        assert {type(p) for p in plain.parameters()} == {nn.Parameter}
        assert {name: p.requires_grad for name, p in plain.named_parameters()} == flags
        assert plain.out.weight is plain.embed.weight
        assert not plain._forward_pre_hooks
        assert not hasattr(plain, "peft_config")
        assert not has_selection(plain)
    again = peft.get_peft_model(unloaded, config(method="pafi"))
    assert run(again.train()).base_model.deltas.active.used == 30


def test_merge_adapter_leaves_the_values_where_they_are():
    _, model = wrapped()
    expected = outputs(run(model))
    model.merge_adapter()
    assert torch.equal(outputs(model), expected)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_goes_on_from_where_the_model_was(way):
    _, model = wrapped()
    run(model, 2)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    before = snapshot(model)
    assert_same_tensors(before, snapshot(twin))
    run(twin.train(), 1)
    assert adapter_of(twin).used == 30
    assert adapter_of(twin).layout.tensors[0] is twin.get_base_model().body[0].bias
    assert_same_tensors(before, snapshot(model))
    assert_same_tensors(snapshot(travelling()), snapshot(twin.unload()))


def test_target_modules_may_be_all_linear_a_list_a_regex_or_nothing():
    def targets(**given):
        model = peft.get_peft_model(travelling(), unmask.peft.SelectiveConfig(budget=5, total_steps=1, **given))
        return adapter_of(model).layout.names

    linear = ["body.0.bias", "body.0.weight", "body.2.bias", "body.2.weight"]
    head = ["head.bias", "head.weight"]
    assert targets(target_modules="all-linear") == [*linear, "embed.weight", *head]  # `out` is tied to the embedding
    assert targets(target_modules=["body"]) == linear
    assert targets(target_modules=r"body\.\d+", exclude_modules=["body.2"]) == linear[:2]
    assert targets(target_modules=["head", "body.0"], modules_to_save=["head"]) == linear[:2]
    assert targets() == sorted(name for name, _ in travelling().named_parameters())
    assert targets(exclude_modules=["out", "norm", "head", "body"]) == ["scale", "turned"]
    assert targets(method="bitfit", target_modules=["body", "norm"]) == ["body.0.bias", "body.2.bias", "norm.bias"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "id4"}, "method = 'id4'; there are id3"),
        ({"method": "fish"}, "loader"),
        ({"method": "full"}, "modules_to_save"),
        ({"budget": None}, "budget is missing"),
        ({"budget": -3}, "at least 1"),
        ({"total_steps": 0}, "steps = 0"),
        ({"accumulation": "some"}, "accumulation = 'some'"),
        ({"gradients": "none"}, "gradients = 'none'"),
        ({"clip_scope": "none"}, "clip_scope = 'none'"),
        ({"clip_scope": "all", "gradients": "sampled"}, "needs the whole gradient"),
        ({"exchange": "some"}, "exchange = 'some'"),
        ({"exchange": "candidates", "allocation": "row"}, "exchange='exact'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_once(given, match):
    with pytest.raises(MethodError, match=match):
        config(**given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"target_modules": ["query"]}, r"leave no tensor .* like embed, body, body.0"),
        ({"exclude_modules": ["query"]}, "excludes nothing"),
        ({"budget": 10_000}, "only 138 are eligible"),
    ],
)
def test_a_configuration_that_does_not_fit_the_base_leaves_the_base_alone(given, match):
    base = travelling()
    with pytest.raises(MethodError, match=match):
        peft.get_peft_model(base, config(**given))
    assert all(p.requires_grad for p in base.parameters())
    assert not base._forward_pre_hooks
    assert peft.get_peft_model(base, config())


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_quantised_layer_is_refused_and_the_others_are_trained(kind):
    with pytest.raises(MethodError, match=r"'up.weight' is quantised.*unmask.select"):
        peft.get_peft_model(quantised(kind), config(target_modules=["up", "head"]))
    model = peft.get_peft_model(quantised(kind), config(target_modules=["head"], method="pafi"))
    assert adapter_of(model).layout.names == ["head.bias", "head.weight"]


def test_a_base_takes_one_tuner_at_a_time():
    _, model = wrapped()
    with pytest.raises(MethodError, match="add_adapter"):
        peft.get_peft_model(model.get_base_model(), config())
    base = travelling()
    selection = unmask.select(base, unmask.pafi(3))
    with pytest.raises(MethodError, match="release"):
        peft.get_peft_model(base, config())
    selection.release()


def test_direct_injection_is_refused():
    base = travelling()
    with pytest.raises(ValueError, match=r"shared? state.*get_peft_model"):
        peft.inject_adapter_in_model(config(), base)
    assert not base._forward_pre_hooks


def test_a_step_without_a_forward_through_the_model_is_an_error():
    _, model = wrapped()
    optimizer = optimizer_of(model)
    adapter_of(model).values.grad = torch.zeros(30)
    with pytest.raises(ScheduleNotRunError, match="gone through the PEFT model"):
        optimizer.step()
    run(model, 1, optimizer)
    assert adapter_of(model).step == 1


def test_the_first_training_step_without_total_steps_is_an_error():
    _, model = wrapped(total_steps=None)
    outputs(model)  # a forward without training needs no total_steps
    with pytest.raises(MethodError, match=r"total_steps.*peft_config\['default'\].total_steps"):
        run(model, 1)
    model.peft_config["default"].total_steps = 3
    run(model, 1)
    assert adapter_of(model).used == 10


def test_a_cast_of_the_model_keeps_float32_masters():
    _, model = wrapped()
    model.to(torch.bfloat16)
    run(model, 2)
    model.to(torch.float32)
    run(model, 1)
    adapter = adapter_of(model)
    assert adapter.values.dtype == torch.float32
    assert adapter.used == 30


def test_a_model_frozen_by_hand_is_not_trained():
    base, model = wrapped()
    run(model, 1)
    model.requires_grad_(False)
    x = batches(1)[0].requires_grad_()
    mean_square(model, x).backward()
    assert adapter_of(model).selection is None
    assert adapter_of(model).values.grad is None
    with model.disable_adapter():
        assert_same_tensors(snapshot(base), base_state(model))


def test_selective_adamw_trains_an_adapter():
    _, model = wrapped()
    optimizer = unmask.SelectiveAdamW([adapter_of(model).values], lr=0.05, bias_correction="entry")
    assert adapter_of(run(model, 3, optimizer)).used == 30


def test_an_adapters_delta_has_the_metadata_of_a_selections():
    base, model = wrapped(target_modules=None)
    run(model)
    selection = unmask.select(base, unmask.id3(30, steps=3))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
    for _ in range(3):
        base(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert unmask.peft.delta(model).metadata == selection.delta().metadata
    assert unmask.analysis.tensor_sparsity(unmask.peft.delta(model)) < 1
