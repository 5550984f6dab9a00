"""Tests that a model changed after `select` trains as a user would expect, or is refused by the next forward, step or delta."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from helpers import assert_same_tensors, batches, id3_run, mean_square, mlp, snapshot, train
from models import llama_writer
from torch import nn

import unmask
from unmask.errors import MethodError, SelectionError


def body(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(depth=3, dtype=dtype)


def started(steps: int = 2, **patterns) -> tuple[nn.Sequential, unmask.Selection, torch.optim.Optimizer]:
    """Returns a model in the middle of its run, where 6 of 12 weights are unmasked."""
    model = body()
    selection = unmask.select(model, unmask.id3(12, steps=4), **patterns)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
    train(model, optimizer, batches(steps))
    return model, selection, optimizer


def assert_continues(selection: unmask.Selection, optimizer: torch.optim.Optimizer) -> None:
    """Asserts that the state of a refused selection continues the run on a fresh base as before the change."""
    fresh = unmask.select(body(), unmask.id3(12, steps=4))
    fresh.load_state_dict(selection.state_dict())
    other = torch.optim.AdamW(fresh.parameters(), lr=0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(fresh.model, other, batches(4)[2:])
    straight, reference, _ = started(steps=4)
    assert_same_tensors(snapshot(fresh.model), snapshot(straight))
    assert fresh.delta().base == reference.delta().base


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def replace_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 6)


def replace_parameter(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.ones(6, 6))


def resize(model: nn.Sequential) -> None:
    model[2].weight.data = torch.ones(8, 6)


def weight_norm(model: nn.Sequential) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[2])


CHANGES = [assign, replace_layer, replace_parameter, resize, weight_norm]


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_forward_refuses_and_the_state_goes_on(change):
    model, selection, optimizer = started()
    change(model)
    with pytest.raises(SelectionError, match=r"(was replaced|has shape) .*after|at unmask.select\(\)"):
        mean_square(model, batches(1)[0])
    with pytest.raises(SelectionError, match="state_dict"):
        selection.delta()
    assert_continues(selection, optimizer)


@pytest.mark.parametrize("change", CHANGES)
def test_the_step_refuses_a_change_after_the_backward(change):
    model, selection, optimizer = started()
    mean_square(model, batches(1)[0]).backward()
    before = selection.values.detach().clone()
    change(model)
    with pytest.raises(SelectionError, match=r"unmask.select\(\)"):
        optimizer.step()
    assert torch.equal(selection.values, before)
    assert selection.step == 2


def test_torch_refuses_a_new_parametrization_and_the_run_goes_on():
    model, _, optimizer = started()
    with pytest.raises(RuntimeError, match="Creating a Parameter"):
        nn.utils.parametrizations.weight_norm(model[2])
    train(model, optimizer, batches(4)[2:])
    straight, _, _ = started(steps=4)
    assert_same_tensors(snapshot(model), snapshot(straight))


def test_a_selection_that_only_the_model_holds_refuses_too():
    model = body()
    optimizer = torch.optim.SGD(unmask.select(model, unmask.id3(12, steps=4)).parameters(), lr=0.1)
    train(model, optimizer, batches(1))
    assign(model)
    gc.collect()
    with pytest.raises(SelectionError, match="was replaced"):
        mean_square(model, batches(1)[0])


def test_a_forward_past_the_model_itself_is_refused_too():
    model, _, _ = started()
    resize(model)
    with pytest.raises(SelectionError, match="has shape"):
        model[0](batches(1)[0])


@pytest.mark.parametrize("patterns", [{"dense": r"^2\."}, {"exclude": r"^2\."}])
def test_a_tensor_that_is_dense_or_frozen_must_stay_too(patterns):
    model, _, _ = started(**patterns)
    replace_layer(model)
    with pytest.raises(SelectionError, match=r"'2.bias' \(and 1 more\) was replaced"):
        mean_square(model, batches(1)[0])


def test_what_was_put_back_trains_on():
    model, selection, optimizer = started()
    layer, data = model[2], model[0].weight.data
    replace_layer(model)
    resized = torch.zeros(9, 6)
    resized[:6] = data
    model[0].weight.data = resized
    with pytest.raises(SelectionError, match="was replaced"):
        mean_square(model, batches(1)[0])
    model[2] = layer
    with pytest.raises(SelectionError, match="Resized back"):
        mean_square(model, batches(1)[0])
    model[0].weight.data = resized[:6].clone()
    train(model, optimizer, batches(4)[2:])
    straight, _, _ = started(steps=4)
    assert_same_tensors(snapshot(model), snapshot(straight))
    assert len(selection.delta()) == 12


def test_resized_token_embeddings_move_no_other_weight():
    model = llama_writer(20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, tie_word_embeddings=True)
    selection = unmask.select(model, unmask.id3(30, steps=2))
    torch.optim.AdamW(selection.parameters(), lr=0.05)
    model.resize_token_embeddings(30)
    before = snapshot(model)
    ids = torch.arange(20, 28)[None]
    with pytest.raises(SelectionError, match=r"embed_tokens.weight' has shape \(30, 8\), and had \(20, 8\)"):
        model(input_ids=ids, labels=ids)
    assert_same_tensors(snapshot(model), before)


# Wrappers that are put around modules. They do not replace the parameters.


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo reads it
def test_a_module_that_is_wrapped_later_trains_on():
    model, selection, optimizer = started()
    model[2] = torch.compile(model[2], backend="eager")
    model[4] = nn.DataParallel(model[4])
    train(model, optimizer, batches(4)[2:])
    _straight, reference, _ = started(steps=4)
    delta, expected = selection.delta(), reference.delta()
    assert delta.base == expected.base
    assert delta.sparse.keys() == expected.sparse.keys()
    assert all(torch.equal(delta.sparse[n].values, expected.sparse[n].values) for n in delta.sparse)
    torch.compiler.reset()


def test_a_tensor_that_was_added_is_in_no_base():
    model, selection, optimizer = started()
    model.add_module("head", nn.Linear(6, 2))
    train(model, optimizer, batches(1))
    with pytest.raises(SelectionError, match=r"'head.bias' that it did not have"):
        selection.delta()
    del model.head
    assert len(selection.delta()) == 9


# Conversions.


def test_a_converted_model_has_the_delta_of_the_converted_base():
    model, selection, optimizer = started()
    model.bfloat16()
    x = batches(1)[0].bfloat16()
    loss = mean_square(model, x)  # this rounds the masters into the tensors again
    for name, flat in selection.indices.items():
        entries = selection.ledger.members(selection.ledger.layout.names.index(name))
        expected = selection.values.detach()[entries.slots].bfloat16()
        assert torch.equal(model.get_parameter(name).detach().reshape(-1)[flat], expected)
    loss.backward()
    optimizer.step()
    assert selection.values.dtype == torch.float32
    base = body().bfloat16()
    selection.delta().apply(base)
    assert_same_tensors(snapshot(base), snapshot(model))


def test_a_model_that_was_trained_with_less_precision_stays_there():
    model, selection, optimizer = started()
    model.half()
    x = batches(1)[0]
    train(model, optimizer, [x.half()])
    model.float()
    for act in (lambda: mean_square(model, x), selection.delta):
        with pytest.raises(SelectionError, match=r"Convert the model back to torch.float16"):
            act()
    model.half()
    train(model, optimizer, [x.half()])
    base = body().half()
    selection.delta().apply(base)
    assert_same_tensors(snapshot(base), snapshot(model))


def test_there_and_back_between_two_steps_is_seen_by_the_selected_weights():
    model, selection, optimizer = started()
    model.half().float()
    with pytest.raises(SelectionError, match="fewer bits and back"):
        mean_square(model, batches(1)[0])
    assert_continues(selection, optimizer)


def test_there_and_back_without_loss_trains_on():
    model, _, optimizer = started()
    model.double().float()
    train(model, optimizer, batches(4)[2:])
    straight, _, _ = started(steps=4)
    assert_same_tensors(snapshot(model), snapshot(straight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_float32_head_that_is_converted_is_refused(dtype):
    model, selection, _ = started(dense=r"^4\.")
    model.to(dtype)
    for act in (lambda: mean_square(model, batches(1)[0].to(dtype)), selection.delta, selection.state_dict):
        with pytest.raises(SelectionError, match=r"'4.bias' is trained whole as torch.float32, and was converted"):
            act()


def test_a_half_precision_head_keeps_its_master():
    model = body(torch.bfloat16)
    selection = unmask.select(model, unmask.id3(12, steps=4), dense=r"^4\.")
    optimizer = torch.optim.SGD(selection.parameters(), lr=1e-4)
    train(model, optimizer, batches(2, dtype=torch.bfloat16))
    model.float()
    train(model, optimizer, batches(1))
    for dense in selection.dense:
        assert torch.equal(dense.parameter, dense.master)
        # The master holds more digits than bfloat16.
        assert not torch.equal(dense.master, dense.master.bfloat16().float())


# Writes in place.


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_loaded_after_a_fixed_selection_are_refused(through_data):
    model, other = body(), mlp(depth=3)
    selection = unmask.select(model, unmask.pafi(12))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    if through_data:
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs.data)
    else:
        model.load_state_dict(other.state_dict())
    with pytest.raises(SelectionError, match=r"do so before unmask.select\(\)"):
        train(model, optimizer, batches(1))


def test_weights_loaded_before_anything_is_unmasked_are_the_base():
    other = mlp(depth=3)
    model = body()
    selection, optimizer = id3_run(model)
    model.load_state_dict(other.state_dict())
    train(model, optimizer, batches(3))
    expected = copy.deepcopy(other)
    reference, plain = id3_run(expected)
    train(expected, plain, batches(3))
    assert_same_tensors(snapshot(model), snapshot(expected))
    selection.delta().apply(other)
    assert_same_tensors(snapshot(other), snapshot(model))
    assert selection.delta().base == reference.delta().base


def test_weights_loaded_in_the_middle_of_a_run():
    model, selection, optimizer = started()
    trained = snapshot(model)
    model.load_state_dict(body().state_dict())
    with pytest.raises(SelectionError, match=r"write to selection.values"):
        mean_square(model, batches(1)[0])
    with pytest.raises(SelectionError, match=r"write to selection.values"):
        selection.delta()
    selection.load_state_dict(selection.state_dict())
    assert_same_tensors(snapshot(model), trained)
    model.load_state_dict(trained)  # these are the same values
    train(model, optimizer, batches(4)[2:])
    straight, reference, _ = started(steps=4)
    assert_same_tensors(snapshot(model), snapshot(straight))
    assert selection.delta().base == reference.delta().base


def test_a_state_may_be_loaded_onto_loaded_weights():
    model, selection, optimizer = started()
    state, trained = selection.state_dict(), snapshot(model)
    train(model, optimizer, batches(4)[2:])
    model.load_state_dict(trained)
    selection.load_state_dict(state)
    mean_square(model, batches(1)[0])
    assert_same_tensors(snapshot(model), trained)
    assert len(selection.delta()) == 6


def test_an_unselected_weight_that_is_set_is_the_bases():
    model, selection, optimizer = started(include=r"^[02]\.")
    with torch.no_grad():
        model[4].weight.fill_(0.5)
        model[0].weight.data = model[0].weight.data.clone()  # this is other memory with the same values
    train(model, optimizer, batches(1))
    base = body()
    with torch.no_grad():
        base[4].weight.fill_(0.5)
    selection.delta().apply(base)
    assert_same_tensors(snapshot(base), snapshot(model))


def test_limitation_writes_through_data_in_the_middle_of_a_run_are_overwritten_by_the_step():
    model, selection, optimizer = started()
    name = next(iter(selection.indices))
    model.get_parameter(name).data.reshape(-1)[selection.indices[name]] = 7.0
    with pytest.raises(SelectionError, match="no counted write explains it"):
        selection.delta()
    train(model, optimizer, batches(1))
    assert not (model.get_parameter(name).detach() == 7.0).any()
    selection.delta().apply(body())  # the delta is one of the base that was selected from


def test_a_head_whose_master_holds_other_values_is_refused():
    model = body(torch.bfloat16)
    selection = unmask.select(model, unmask.id3(12, steps=4), dense=r"^4\.")
    assert len(selection.dense) == 2
    with torch.no_grad():
        model[4].bias.add_(1.0)
    with pytest.raises(SelectionError, match=r"'4.bias' were written to"):
        mean_square(model, batches(1, dtype=torch.bfloat16)[0])


# Weights that share memory.


def tied(how: str) -> nn.Sequential:
    model = body()
    if how == "object":
        model[4].weight = model[0].weight
    else:
        model[4].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize(
    ("method", "patterns"),
    [
        (unmask.id3(12, steps=3), {}),
        (unmask.pafi(12), {}),
        (unmask.id3(12, steps=3), {"dense": r"^0\."}),
        (unmask.full(), {}),
    ],
)
def test_weights_tied_by_storage_are_one_tensor(method, patterns):
    results = []
    for how in ("object", "storage"):
        model = tied(how)
        own = model[4].weight
        selection = unmask.select(model, method, **patterns)
        optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
        train(model, optimizer, batches(3))
        delta = selection.delta()
        results.append((selection.budget, delta, snapshot(model)))
        selection.release()
        assert model[4].weight is own
        assert model[4].weight.data_ptr() == model[0].weight.data_ptr()
        assert torch.equal(model[4].weight, model[0].weight)
        for fresh in (tied("object"), tied("storage")):
            delta.apply(fresh)
            assert_same_tensors(snapshot(fresh), snapshot(model))
    (budget, one, reference), (other_budget, other, result) = results
    assert budget == other_budget
    assert one.base == other.base
    assert_same_tensors(reference, result)
    assert sum(len(i.indices) for i in one.sparse.values()) == len(other)


def test_a_refusal_leaves_tied_weights_as_they_were():
    model = tied("storage")
    own = model[4].weight
    with pytest.raises(MethodError, match="eligible"):
        unmask.select(model, unmask.id3(10_000, steps=3))
    assert model[4].weight is own


def expanded(model: nn.Sequential) -> None:
    model[0].bias = nn.Parameter(torch.zeros(1).expand(6))


def shifted(model: nn.Sequential) -> None:
    storage = torch.randn(60)
    model[0].weight.data, model[2].weight.data = storage[:36].view(6, 6), storage[24:].view(6, 6)


def transposed(model: nn.Sequential) -> None:
    model[2].weight.data = model[0].weight.data.t()


def part(model: nn.Sequential) -> None:
    model[0].bias.data = model[2].weight.data[0]


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (expanded, "'0.bias' is expanded"),
        (shifted, "'0.weight' and '2.weight'"),
        (transposed, "overlap"),
        (part, "overlap"),
    ],
)
def test_weights_that_share_a_part_of_their_memory_are_refused(share, names):
    model = body()
    share(model)
    before = snapshot(model)
    with pytest.raises(MethodError, match=names):
        unmask.select(model, unmask.id3(12, steps=3))
    assert_same_tensors(snapshot(model), before)
    assert all(p.requires_grad for p in model.parameters())
    unmask.select(model, unmask.id3(12, steps=3), include=r"^4\.").release()  # none of the sharing tensors is trained


def test_weights_that_lie_between_each_other_train():
    results = []
    for packed in (False, True):
        model = body()
        if packed:  # query, key and value may be columns of one matrix
            matrix = torch.cat([model[0].weight.data, model[2].weight.data], 1)
            model[0].weight.data, model[2].weight.data = matrix[:, :6], matrix[:, 6:]
        _, optimizer = id3_run(model)
        train(model, optimizer, batches(3))
        results.append(snapshot(model))
    assert_same_tensors(*results)


# Copies.


def test_copies_and_pickles_of_a_model_in_training_are_ordinary():
    model, selection, _ = started()
    pickled = pickle.dumps(model)
    assert b"unmask" not in pickled
    for copied in (copy.deepcopy(model), pickle.loads(pickled)):
        assert_same_tensors(snapshot(copied), snapshot(model))
        replace_layer(copied)  # the selection must not see this
        copied.requires_grad_(True)
        mean_square(copied, batches(1)[0]).backward()
        assert copied[0].weight.grad is not None
    selection.release()
    assert not model._forward_pre_hooks
