"""Tests that writes into ``values`` outside an optimizer's step reach the model or are refused, also those of wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import batches, mean_square, mlp
from sequence import Sequence
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from value_wrappers import SAM, Averaged, Ema, Free, Lookahead, ScheduleFree

import unmask
from unmask import Selection
from unmask.errors import SelectionError

STEPS = 6


def selected(model: nn.Module, selection: Selection) -> Tensor:
    """Returns the model's weights at the slots, in slot order."""
    weights = torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())])
    return weights[selection.ledger.positions[: selection.used]]


def holds(selection: Selection, wanted: Tensor) -> None:
    """Asserts that a forward, the delta and the state have these values."""
    selection.model(batches(1)[0])
    assert torch.equal(selected(selection.model, selection), wanted)
    assert torch.equal(selection.state_dict()["values"], wanted)
    fresh = mlp()
    fresh.load_state_dict({n: p.clone() for n, p in BASE.items()})
    selection.delta().apply(fresh)
    assert torch.equal(selected(fresh, selection), wanted)


torch.manual_seed(5)
BASE = {n: p.detach().clone() for n, p in mlp().named_parameters()}


def based() -> nn.Module:
    model = mlp()
    model.load_state_dict(BASE)
    return model


def started(method: unmask.Method | None = None) -> Selection:
    selection = unmask.select(based(), method or unmask.random_mask(20))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    mean_square(selection.model, batches(1)[0]).backward()
    optimizer.step()
    return selection


WRITES: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "copy_": lambda values, new: values.copy_(new),
    "data.copy_": lambda values, new: values.data.copy_(new),
    "detach.copy_": lambda values, new: values.detach().copy_(new),
    "data=": lambda values, new: setattr(values, "data", new.clone()),
    "foreach": lambda values, new: torch._foreach_copy_([values.data], [new]),
    "vector_to_parameters": lambda values, new: vector_to_parameters(new.clone(), [values]),
    "one entry after another": lambda values, new: [values.__setitem__(i, x) for i, x in enumerate(new)],
    "inference mode": lambda values, new: torch.inference_mode()(values.copy_)(new),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_kind_of_write_is_in_the_model_the_delta_and_the_state(name):
    selection = started()
    new = torch.randn(20)
    with torch.no_grad():
        WRITES[name](selection.values, new)
    holds(selection, new)


READS: dict[str, Callable[[Selection], Tensor]] = {
    "a forward in no_grad": lambda s: (torch.no_grad()(s.model)(batches(1)[0]), None)[1],
    "a forward in inference mode": lambda s: (torch.inference_mode()(s.model)(batches(1)[0]), None)[1],
    "the model's state_dict": lambda s: (s.model.state_dict(), None)[1],
    "deepcopy": lambda s: selected(copy.deepcopy(s.model), s),
    "delta": lambda s: (s.delta(), None)[1],
    "state_dict": lambda s: (s.state_dict(), None)[1],
    "release": lambda s: (s.release(), None)[1],
    "catch_up": lambda s: (s.catch_up(), None)[1],
}


@pytest.mark.parametrize("name", READS)
def test_each_way_to_read_the_model_sees_the_write(name):
    selection = started()
    new = torch.randn(20)
    selection.values.data.copy_(new)
    seen = READS[name](selection)
    if seen is None:
        with torch._C.DisableTorchFunctionSubclass():  # so that reading the tensors brings no write to them
            weights = torch.cat([p.detach().reshape(-1) for _, p in sorted(selection.model.named_parameters())])
        seen = weights[selection.ledger.positions[:20]]
    assert torch.equal(seen, new)


def test_a_submodule_alone_and_a_functional_use_see_the_write():
    selection = started(unmask.random_mask(126))  # the budget is every weight
    selection.values.data.zero_()
    layer = selection.model[2]
    assert not layer(torch.ones(6)).any()
    selection.values.data.fill_(1.0)
    assert torch.equal(nn.functional.linear(torch.ones(6), layer.weight), torch.full((6,), 6.0))


def test_a_compiled_model_sees_the_write():
    selection = started()
    compiled = torch.compile(selection.model, backend="eager")
    x = batches(1)[0]
    with torch.no_grad():
        before = compiled(x)
        selection.values.mul_(3.0)
        after = compiled(x)
    assert not torch.equal(before, after)
    twin = based()
    selection.delta().apply(twin)
    assert torch.allclose(after, twin(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_write_into_a_float32_master_reaches_the_model(dtype):
    model = mlp(dtype=dtype)
    selection = unmask.select(model, unmask.random_mask(10), dense="4.weight")
    master = selection.dense[0].master
    new = torch.randn(6, 6)
    for read in (
        lambda: model(batches(1, dtype=dtype)[0]),
        lambda: model[4](batches(1, dtype=dtype)[0]),
        lambda: selection.delta(),
        lambda: selection.state_dict(),
        lambda: selection.release(),
    ):
        new = new + 1
        with torch.no_grad():
            master.data.copy_(new)
            read()
        assert torch.equal(model[4].weight, new.to(dtype))
    assert not model._forward_pre_hooks
    assert not model[4]._forward_pre_hooks


def test_a_copy_of_a_model_with_masters_is_an_ordinary_model():
    model = mlp(dtype=torch.bfloat16)
    selection = unmask.select(model, unmask.random_mask(10), dense="4.weight")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        selection.dense[0].master.zero_()
    twin(batches(1, dtype=torch.bfloat16)[0])
    assert twin[4].weight.any()


def test_half_precision_weights_hold_the_rounding_of_what_was_written():
    model = mlp(dtype=torch.bfloat16)
    selection = unmask.select(model, unmask.random_mask(20))
    new = torch.randn(20)
    selection.values.data.copy_(new)
    model(batches(1, dtype=torch.bfloat16)[0])
    assert torch.equal(selected(model, selection), new.bfloat16())
    assert torch.equal(selection.state_dict()["values"], new)


def test_a_write_that_torch_does_not_count_is_refused_where_something_is_saved():
    selection = started()
    selection.values.detach().numpy()[:] = 1.0
    for save in (selection.delta, selection.state_dict):
        with pytest.raises(SelectionError, match="hold different numbers"):
            save()
    with selection.writing():
        selection.values.data = selection.values.detach().clone()  # the error gives this advice
    holds(selection, torch.ones(20))


def test_a_write_into_the_models_tensor_is_refused_where_something_is_saved():
    selection = started(unmask.random_mask(126))
    with torch.no_grad():
        selection.model[0].weight.mul_(2.0)
    with pytest.raises(SelectionError, match=r"'0\.weight' were written to.*write to selection\.values"):
        selection.delta()


def test_without_a_write_no_tensor_is_touched():
    selection = started()
    versions = [p._version for p in selection.model.parameters()]
    for _ in range(2):
        selection.model(batches(1)[0])
        selection.delta()
    assert [p._version for p in selection.model.parameters()] == versions


# Wrappers. The reference is the same wrapper around all weights, with a masked gradient and a masked update.


class Dense:
    """Masks by indexing, and takes the gradient by ordinary autograd through the dense weights, without unmask."""

    def __init__(self, selection: Selection) -> None:
        self.model = based().requires_grad_(False)
        self.names = sorted(n for n, _ in self.model.named_parameters())
        self.base = torch.cat([p.reshape(-1) for _, p in sorted(self.model.named_parameters())])
        self.positions = selection.ledger.positions.clone()
        self.values = nn.Parameter(self.base[self.positions].clone())

    def loss(self, x: Tensor) -> Tensor:
        flat = self.base.clone().index_put((self.positions,), self.values)
        tensors, start = {}, 0
        for name, p in sorted(self.model.named_parameters()):
            tensors[name] = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        return torch.func.functional_call(self.model, tensors, (x,)).square().mean()


WRAPPERS = [SAM, Lookahead, Free, Ema, Averaged]


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", [unmask.random_mask(20), unmask.pafi(20)], ids=lambda m: m.name)
def test_wrappers_of_a_static_method_are_those_of_a_dense_masked_run(wrapper, method):
    selection = unmask.select(based(), method, gradients="dense")
    dense = Dense(selection)
    ours, theirs = wrapper(selection.values), wrapper(dense.values)
    for x in batches(STEPS):
        ours.step(lambda x=x: mean_square(selection.model, x))
        theirs.step(lambda x=x: dense.loss(x))
        assert torch.equal(selection.values, dense.values)
        assert torch.equal(mean_square(selection.model, x), dense.loss(x))
        if hasattr(ours, "evaluated"):
            assert torch.equal(ours.evaluated, theirs.evaluated)
    assert torch.equal(selected(selection.model, selection), dense.values)
    selection.delta()


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "method",
    [unmask.id3(60, steps=3), unmask.repeat_d3(60)],
    ids=lambda m: m.name,
)
def test_wrappers_are_refused_where_weights_are_unmasked_later(wrapper, method):
    selection = unmask.select(based(), method)
    ours = wrapper(selection.values)

    def train() -> None:
        for x in batches(STEPS):
            ours.step(lambda x=x: mean_square(selection.model, x))

    with pytest.raises(SelectionError, match=r"random_mask.*AveragedModel"):
        train()
    base = torch.cat([p.reshape(-1) for _, p in sorted(BASE.items())])
    with torch._C.DisableTorchFunctionSubclass():
        now = torch.cat([p.detach().reshape(-1) for _, p in sorted(selection.model.named_parameters())])
    assert int((now != base).sum()) <= selection.used  # only the earlier steps have moved weights


def test_a_refused_optimizer_leaves_a_selection_that_another_can_train():
    selection = unmask.select(based(), unmask.id3(60, steps=3))
    mean_square(selection.model, batches(1)[0]).backward()
    with pytest.raises(SelectionError, match="ScheduleFree keeps a copy of selection"):
        ScheduleFree([selection.values]).step()
    torch.optim.SGD([selection.values], lr=0.1).step()
    assert (selection.step, selection.used) == (1, 20)


class Anchored(torch.optim.Optimizer):
    """Pulls towards an average of the past, under a name that unmask does not know."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            past = self.state[p].setdefault("past", p.clone())
            p.sub_(0.01 * p.grad).lerp_(past, 0.1)
            past.lerp_(p, 0.5)


def test_a_copy_is_known_by_what_it_holds():
    selection = unmask.select(based(), unmask.id3(60, steps=3))
    mean_square(selection.model, batches(1)[0]).backward()
    with pytest.raises(SelectionError, match=r"Anchored keeps a copy of selection.values \('past'\)"):
        Anchored([selection.values]).step()


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Adam, torch.optim.Adadelta, torch.optim.Rprop])
def test_torchs_optimizers_go_with_growing_methods(kind):
    selection = unmask.select(based(), unmask.id3(60, steps=3))
    optimizer = kind(selection.parameters(), lr=1.0)
    for x in batches(3):
        mean_square(selection.model, x).backward()
        optimizer.step()
    assert selection.used == 60


def test_schedule_free_keeps_to_the_weights_of_a_static_gradient_method():
    """All slots have their weights when the copy is made, also after a resume."""
    selection = unmask.select(based(), unmask.static_d3(60))
    ours = Free(selection.values)
    ours.optimizer.param_groups[0]["lr"] = 1e-12
    for x in batches(3):
        ours.step(lambda x=x: mean_square(selection.model, x))
    base = torch.cat([p.reshape(-1) for _, p in sorted(BASE.items())])[selection.ledger.positions]
    assert torch.allclose(selection.values, base, atol=1e-6)
    again = unmask.select(based(), unmask.static_d3(60))
    again.load_state_dict(selection.state_dict())
    resumed = Free(again.values)
    resumed.optimizer.load_state_dict(ours.optimizer.state_dict())
    resumed.step(lambda: mean_square(again.model, batches(1)[0]))
    ours.step(lambda: mean_square(selection.model, batches(1)[0]))
    assert torch.equal(selection.values, again.values)


def test_writing_says_that_a_write_is_no_stale_copy():
    selection = started(unmask.id3(60, steps=3))
    new = torch.randn(20)
    with selection.writing():
        selection.values.data[:20] = new
    holds_prefix = selected(selection.model, selection)
    assert torch.equal(holds_prefix, new)
    mean_square(selection.model, batches(1)[0]).backward()
    with pytest.raises(SelectionError, match=r"after optimizer\.step"), selection.writing():
        pass


def test_a_stored_copy_that_is_restored_before_the_next_forward_is_no_write():
    selection = started(unmask.id3(60, steps=3))
    stored = selection.values.detach().clone()
    selection.values.data.zero_()
    with pytest.raises(SelectionError, match="written to outside"):
        selection.model(batches(1)[0])
    selection.values.data.copy_(stored)
    selection.model(batches(1)[0])
    assert len(selection.delta()) == 20


def test_the_average_of_the_model_itself_is_right_for_a_growing_method():
    """Before a weight was unmasked, its average is its base weight. The documentation gives this way."""
    selection = unmask.select(based(), unmask.id3(60, steps=3))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.5)
    average = torch.optim.swa_utils.AveragedModel(
        selection.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    shadow = {n: p.clone() for n, p in BASE.items()}
    for step, x in enumerate(batches(4)):
        mean_square(selection.model, x).backward()
        optimizer.step()
        average.update_parameters(selection.model)
        for n, p in selection.model.state_dict().items():  # the first update makes a copy
            shadow[n] = shadow[n].lerp(p, 0.5) if step else p.clone()
    for n, p in average.module.named_parameters():
        assert torch.equal(p, shadow[n])
    moved = sum(int((p != BASE[n]).sum()) for n, p in average.module.named_parameters())
    assert 0 < moved <= 60
    wanted = selection.weights_of(average.module)
    with selection.writing(), torch.no_grad():
        selection.values.copy_(wanted)
    fresh = based()
    selection.delta().apply(fresh)
    for n, p in fresh.named_parameters():
        assert torch.equal(p, shadow[n])


def test_weights_of_another_model_are_refused():
    selection = started(unmask.random_mask(126))
    for other, reason in ((nn.Linear(2, 2), r"lacks it"), (mlp(width=5), r"shape \(5,\)")):
        with pytest.raises(SelectionError, match=rf"'0\.bias'.*{reason}.*AveragedModel"):
            selection.weights_of(other)


def test_schedulefrees_own_optimizer():
    schedulefree = pytest.importorskip("schedulefree")
    for method, refused in ((unmask.random_mask(20), False), (unmask.id3(60, steps=3), True)):
        selection = unmask.select(based(), method)
        optimizer = schedulefree.AdamWScheduleFree(selection.parameters(), lr=0.1)
        optimizer.train()
        mean_square(selection.model, batches(1)[0]).backward()
        if refused:
            with pytest.raises(SelectionError, match="AdamWScheduleFree keeps a copy"):
                optimizer.step()
            continue
        optimizer.step()
        optimizer.eval()
        holds(selection, selection.values.detach().clone())


@torch.no_grad()
def operations(model: nn.Module) -> list[object]:
    with Sequence() as made:
        model(batches(1)[0])
    return made.seen


def test_a_forward_that_finds_nothing_new_costs_no_operation():
    selection = started()
    assert operations(selection.model) == operations(based())
    with torch.no_grad():
        selection.values.mul_(2)
    assert len(operations(selection.model)) > len(operations(based()))
    assert operations(selection.model) == operations(based())
