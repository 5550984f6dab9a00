"""Tests clipping by the norm of the selected gradient, and by that of the whole gradient."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same_tensors, batches, dense_gradients, gradient_at_slots, mean_square, mlp, snapshot, train
from torch import nn

import unmask
from unmask import MethodError, NonFiniteGradientError, SelectionError

METHODS = {
    "id3": unmask.id3(24, steps=4),
    "strided": unmask.id3(24, steps=4, stride=2),
    "sparse schedule": unmask.id3(2, steps=4),
    "repeat": unmask.repeat_d3(24),
    "pafi": unmask.pafi(24),
}


def norm_of(gradients):
    return torch.cat([g.flatten().double() for g in gradients.values()]).norm().item()


def total(model, data):
    return sum(mean_square(model, x) for x in data)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dense", [None, "^4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_all_is_that_of_the_whole_gradient_at_every_step(method, parts, dense, dtype):
    model = mlp(dtype=dtype)
    accumulation = "exact" if parts > 1 else "candidates"
    selection = unmask.select(model, METHODS[method], dense=dense, accumulation=accumulation, clip_scope="all")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    for i in range(5):
        data = batches(5 * parts, dtype=dtype)[i * parts : (i + 1) * parts]
        expected = norm_of(dense_gradients(model, lambda m, data=data: total(m, data)))
        for x in data:
            mean_square(model, x).backward()
        norm = unmask.clip_grad_norm_(selection, 1e9)
        assert norm.item() == pytest.approx(expected, rel=2e-2 if dtype == torch.bfloat16 else 1e-5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ["id3", "strided", "pafi"])
def test_clipping_by_all_scales_the_selected_gradient_by_what_a_masked_dense_run_would(method):
    model, twin, x = mlp(), mlp(), 50 * batches(1)[0]
    twin.load_state_dict(model.state_dict())
    selection = unmask.select(model, METHODS[method], clip_scope="all")
    mean_square(model, x).backward()
    mean_square(twin, x).backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    assert norm > 0.05
    assert unmask.clip_grad_norm_(selection, 0.05).item() == pytest.approx(norm.item(), rel=1e-5)
    masked = gradient_at_slots(selection, {name: p.grad for name, p in twin.named_parameters()})
    masked[selection.in_use :] = 0
    torch.testing.assert_close(selection.values.grad, masked)


def test_clipping_by_the_selected_norm_is_torchs():
    model = mlp()
    selection = unmask.select(model, METHODS["id3"], dense="^4")
    mean_square(model, 50 * batches(1)[0]).backward()
    before = [p.grad.clone() for p in selection.parameters()]
    norm = unmask.clip_grad_norm_(selection, 1e-3)
    ours = [p.grad.clone() for p in selection.parameters()]
    for p, gradient in zip(selection.parameters(), before, strict=True):
        p.grad = gradient
    assert nn.utils.clip_grad_norm_(selection.parameters(), 1e-3) == norm
    assert all(torch.equal(a, p.grad) for a, p in zip(ours, selection.parameters(), strict=True))


def test_measuring_changes_no_bit_of_a_run_with_dense_gradients():
    results = []
    for scope in ("selected", "all"):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, METHODS["strided"], gradients="dense", clip_scope=scope)
        train(model, torch.optim.AdamW(selection.parameters(), lr=0.1), batches(5))
        results.append(snapshot(model))
    assert_same_tensors(*results)


def test_under_a_scaler_the_norm_is_that_of_the_unscaled_gradient():
    norms = []
    for scale in (None, 2.0**10):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, METHODS["id3"], dense="^4", clip_scope="all")
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        scaler.scale(mean_square(model, batches(1)[0])).backward()
        scaler.unscale_(optimizer)
        norms.append(unmask.clip_grad_norm_(selection, 1e-3, loss_scale=scaler.get_scale()))
        norms.append(torch.cat([p.grad.flatten() for p in selection.parameters()]).norm())
    assert norms[0] == norms[2]
    assert norms[1] == norms[3]


def test_an_overflow_outside_the_selection_counts_where_the_norm_is_that_of_all():
    """A scaler skips the step, as in full fine-tuning; without a scaler, the step is refused."""
    for scope in ("selected", "all"):
        model = mlp()
        selection = unmask.select(model, unmask.random_mask(1), clip_scope=scope, gradients="dense")
        (held,) = selection.indices
        other = next(p for name, p in model.named_parameters() if name != held)
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        (mean_square(model, batches(1)[0]) + math.inf * other.sum()).backward()
        if scope == "selected":
            optimizer.step()
            continue
        with pytest.raises(NonFiniteGradientError, match="norm of the whole gradient"):
            optimizer.step()


def test_several_micro_batches_need_their_sum():
    model = mlp()
    selection = unmask.select(model, METHODS["id3"], clip_scope="all")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    mean_square(model, batches(1)[0]).backward()
    with pytest.raises(SelectionError, match="accumulation='exact'"):
        mean_square(model, batches(1)[0]).backward()
    optimizer.zero_grad()
    train(model, optimizer, batches(2))
    assert selection.step == 2


def test_no_gradient_to_clip_is_an_error():
    selection = unmask.select(mlp(), METHODS["id3"], clip_scope="all")
    with pytest.raises(SelectionError, match=r"loss\.backward\(\)"):
        unmask.clip_grad_norm_(selection, 1.0)


@pytest.mark.parametrize(("options", "match"), [({"clip_scope": "whole"}, "whole"), ({"gradients": "sampled"}, "auto")])
def test_what_cannot_work_is_refused(options, match):
    with pytest.raises(MethodError, match=match):
        unmask.select(mlp(), METHODS["id3"], **{"clip_scope": "all", **options})


def test_full_fine_tuning_clips_by_everything_under_either_scope():
    norms = []
    for scope in ("selected", "all"):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, unmask.full(), clip_scope=scope)
        mean_square(model, batches(1)[0]).backward()
        norms.append(unmask.clip_grad_norm_(selection, 1e-3))
    assert norms[0] == norms[1] > 1e-3
