"""Tests several adapters on one base: adding, setting, deleting and combining them never changes a bit of the base."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, snapshot, travelling
from peft.utils import merge_utils
from peft_nets import OLD_NAMES, base_state, config, optimizer_of, outputs, run, wrapped

import peft
import unmask
import unmask.peft

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


def two(dtype=torch.float32):
    """Returns (a base, a PEFT model with the trained adapters default and second, their outputs by name)."""
    base, model = wrapped(dtype, modules_to_save=["head"])
    run(model, 3)
    results = {"default": outputs(model)}
    model.add_adapter("second", config(method="pafi", budget=12, target_modules=["embed", "body.0"]))
    assert torch.equal(outputs(model), results["default"])  # it is added, but not active
    model.set_adapter("second")
    assert torch.equal(outputs(model), outputs(base))  # it is untrained, and has the base's head
    run(model, 2, seed=8)
    return base, model, results | {"second": outputs(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_setting_an_adapter_swaps_the_values_exactly(dtype):
    base, model, results = two(dtype)
    for name in ("default", "second", "second", "default"):
        model.set_adapter(name)
        assert torch.equal(outputs(model), results[name])
        with model.disable_adapter():
            assert torch.equal(outputs(model), outputs(base))
            assert_same_tensors(snapshot(base), base_state(model))
        assert torch.equal(outputs(model), results[name])


def test_setting_inside_disable_adapter_takes_effect_outside():
    base, model, results = two()
    with model.disable_adapter():
        model.set_adapter("default")
        assert torch.equal(outputs(model), outputs(base))
    assert torch.equal(outputs(model), results["default"])


def test_training_goes_on_after_another_adapter_was_active():
    """With the same optimizer the run is bit for bit the uninterrupted one."""
    _, model = wrapped(budget=40, total_steps=4)
    _, alone = wrapped(budget=40, total_steps=4)
    model.add_adapter("second", config())
    optimizer, other = optimizer_of(model), optimizer_of(alone)
    for seed in range(4):
        model.set_adapter("second")
        run(model, 1, seed=20 + seed)
        model.set_adapter("default")
        run(model, 1, optimizer, seed)
        run(alone, 1, other, seed)
    assert torch.equal(
        model.base_model.deltas.adapters["default"].values, alone.base_model.deltas.adapters["default"].values
    )
    assert_same_tensors(base_state(alone), base_state(model))


def test_only_the_active_adapter_is_trainable():
    _, model, _ = two()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["base_model.deltas.unmask_values.second"]
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.deltas.unmask_values",
        "base_model.model.head.modules_to_save.default",
    }


def test_deleting_the_active_adapter_makes_the_next_one_active():
    base, model, results = two()
    with pytest.warns(UserWarning, match="second was active which is now deleted. Setting active adapter to default"):
        model.delete_adapter("second")
    assert model.active_adapter == "default"
    assert torch.equal(outputs(model), results["default"])
    assert_same_tensors(snapshot(base), snapshot(model.unload()))


def test_deleting_an_inactive_adapter_changes_nothing():
    base, model, results = two()
    model.delete_adapter("default")
    assert torch.equal(outputs(model), results["second"])
    assert "default" not in model.peft_config
    with pytest.raises(ValueError, match="default does not exist"):
        model.delete_adapter("default")
    model.delete_adapter("second")
    assert_same_tensors(snapshot(base), snapshot(model.base_model.unload()))


def test_two_active_adapters_at_once_are_refused():
    _, model, results = two()
    with pytest.raises(ValueError, match="add_weighted_adapter"):
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(outputs(model), results["second"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weighted_adapter_is_the_base_plus_the_weighted_changes(dtype):
    """The reference sums whole tensors in float64."""
    base, model, _ = two(dtype)
    states = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        masters = {}
        adapter = model.base_model.deltas.adapters[name]
        slots = adapter.slots()
        for index, flat, places in adapter.layout.split(slots.positions[: slots.used]):
            whole = base.get_parameter(adapter.layout.names[index]).detach().double().reshape(-1).clone()
            whole[flat] = slots.values[places].double()
            masters[adapter.layout.names[index]] = whole
        states[name] = masters
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    model.set_adapter("sum")
    combined = base_state(model)
    for name in {*states["default"], *states["second"]}:
        original = base.get_parameter(name).detach().double().reshape(-1)
        total = original.clone()
        for adapter, weight in (("default", 0.5), ("second", -2.0)):
            total += weight * (states[adapter].get(name, original) - original)
        expected = total.to(torch.float32).to(dtype)
        assert torch.equal(combined[name].reshape(-1), expected), name
    head = model.get_base_model().head.modules_to_save
    halfway = (base.head.weight.double() + head["default"].weight.double()) / 2
    assert torch.equal(head["sum"].weight, halfway.to(dtype))
    with model.disable_adapter():
        assert_same_tensors(snapshot(base), base_state(model))


def test_one_adapter_with_weight_one_is_itself_and_trains_no_further_weights():
    _, model, results = two()
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    assert torch.equal(outputs(model), results["default"])
    adapter = model.base_model.deltas.adapters["same"]
    before = adapter.slots().positions
    run(model, 2)
    assert torch.equal(adapter.slots().positions, before)
    assert adapter.used == adapter.budget == 30
    assert not torch.equal(outputs(model), results["default"])


def test_a_combination_of_untrained_adapters_is_the_base():
    base, model = wrapped()
    model.add_adapter("second", config(method="repeat_d3"))
    model.add_weighted_adapter(["default", "second"], [2.0, 1.0], "sum")
    model.set_adapter("sum")
    adapter = model.base_model.deltas.adapters["sum"]
    assert (adapter.used, adapter.budget) == (0, 1)
    assert torch.equal(outputs(model), outputs(base))


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "linear"])
def test_combination_types_do_what_pefts_own_functions_do(kind, majority):
    """Three adapters set the same 24 weights of one tensor, of which PEFT's functions keep half of each."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    original = base[0].weight.detach().clone()
    model = peft.get_peft_model(base, unmask.peft.SelectiveConfig(budget=24, method="pafi"))
    for name in ("second", "third"):
        model.add_adapter(name, unmask.peft.SelectiveConfig(budget=24, method="pafi"))
    changes = []
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        optimizer = torch.optim.SGD([model.base_model.deltas.adapters[name].values], lr=1.0)
        model(torch.randn(5, 6)).pow(3).sum().backward()
        optimizer.step()
        model(torch.zeros(1, 6))
        changes.append((base[0].weight - original).detach().clone())
    weights, density = [1.0, 0.5, -2.0], 0.5
    functions = {
        "ties": lambda: merge_utils.ties(changes, torch.tensor(weights), density, majority),
        "magnitude_prune": lambda: merge_utils.magnitude_prune(changes, torch.tensor(weights), density),
        "linear": lambda: merge_utils.task_arithmetic(changes, torch.tensor(weights)),
    }
    given = {} if kind == "linear" else {"density": density, "majority_sign_method": majority}
    model.add_weighted_adapter(["default", "second", "third"], weights, "sum", kind, **given)
    model.set_adapter("sum")
    torch.testing.assert_close(base[0].weight.detach() - original, functions[kind](), atol=1e-5, rtol=1e-5)
    delta = unmask.peft.delta(model, "sum")
    parts = [unmask.peft.delta(model, name) for name in ("default", "second", "third")]
    model.unload()
    options = {} if kind == "linear" else {"density": density, "majority": majority}
    combined = unmask.combine(*parts, rule=kind, weights=weights, base=base, **options)
    assert combined.sparse["0.weight"].values.equal(delta.sparse["0.weight"].values)
    assert combined.sparse["0.weight"].indices.equal(delta.sparse["0.weight"].indices)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ((["other"], [1.0], "x"), r"there are \['default', 'second'\]"),
        (([], [], "x"), "there are"),
        ((["default"], [1.0, 2.0], "x"), "1 adapters and 2 weights"),
        ((["default"], [1.0], "second"), "already exists"),
        ((["default"], [1.0], "x", "svd"), "combine by linear, magnitude_prune, ties"),
        ((["default"], [1.0], "x", "ties"), "density = None"),
    ],
)
def test_an_impossible_combination_is_refused(call, match):
    _, model, _ = two()
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(*call)


def test_running_statistics_belong_to_their_adapter():
    base, model, _ = two()
    model.set_adapter("default")
    mean = model.get_base_model().norm.running_mean.clone()
    assert not torch.equal(mean, base.norm.running_mean)
    model.set_adapter("second")
    assert not torch.equal(model.get_base_model().norm.running_mean, mean)
    model.set_adapter("default")
    assert torch.equal(model.get_base_model().norm.running_mean, mean)
    assert_same_tensors(snapshot(travelling()), snapshot(model.unload()))


def test_a_switch_between_forward_and_backward_changes_neither_graph_nor_gradient():
    """Preference optimization does this with a reference adapter, under gradient accumulation too."""
    results = []
    for switch in (False, True):
        _, model = wrapped()
        model.add_adapter("ref", config(method="pafi"))
        run(model, 1)
        optimizer = optimizer_of(model)
        for x in (batches(2)[0], batches(2)[1]):
            loss = mean_square(model, x)
            if switch:
                with torch.no_grad():
                    model.set_adapter("ref")
                    assert torch.equal(model.get_base_model().body[0].weight, travelling().body[0].weight)
                    model(x)
                    model.set_adapter("default")
            loss.backward()
        optimizer.step()
        results.append(snapshot(model.get_base_model()))
    assert_same_tensors(*results)


@pytest.mark.parametrize("then", ["step", "train", "save", "copy", "delete", "unload", "load", "move"])
def test_a_paused_adapter_is_like_any_inactive_one(then, tmp_path):
    _, model = wrapped()
    run(model, 2)
    expected = vars(model.base_model.deltas.active.slots())
    optimizer = optimizer_of(model)
    model.add_adapter("other", config(budget=5))
    mean_square(model, batches(1)[0]).backward()  # a gradient that no step has used
    model.set_adapter("other")
    adapter = model.base_model.deltas.adapters["default"]
    if then == "step":  # this optimizer holds the paused adapter's values
        optimizer.step()
    elif then == "train":
        run(model, 1)
    elif then == "save":
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(travelling(), tmp_path)
        adapter = again.base_model.deltas.adapters["default"]
    elif then == "copy":
        adapter = copy.deepcopy(model).base_model.deltas.adapters["default"]
    elif then == "delete":
        model.delete_adapter("default")
        assert_same_tensors(snapshot(travelling()), base_state(model))
        return
    elif then == "unload":
        assert_same_tensors(snapshot(travelling()), snapshot(model.unload()))
        return
    elif then == "load":
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "default", is_trainable=True)
    else:
        model.to(torch.float64).to(torch.float32)
    for name, tensor in expected.items():
        now = getattr(adapter.slots(), name)
        assert torch.equal(now, tensor) if isinstance(tensor, torch.Tensor) else now == tensor, name
