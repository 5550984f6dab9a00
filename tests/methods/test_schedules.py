"""Checks that every schedule spends exactly the budget, and that an invalid one is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import batches, mlp, train

import unmask
from unmask import MethodError
from unmask.methods.schedules import SCHEDULES, Schedule

SIZES = [1, 2, 3, 7, 64, 1000]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("T", "B"), list(itertools.product(SIZES, SIZES)))
def test_every_schedule_spends_exactly_the_budget_and_never_takes_back(name, T, B):
    for stride in (1, 2, 5, T, T + 3):
        plan = Schedule.of(name, T, stride)
        counts = [plan.cumulative(t, B) for t in range(-1, T + 5)]
        assert counts[0] == 0
        assert counts[T] == B == counts[-1]  # b(T - 1), and b(t) of every later step
        assert all(later - earlier >= 0 for earlier, later in itertools.pairwise(counts))


@pytest.mark.parametrize(("T", "B"), [(1, 5), (4, 20), (10, 10), (25, 1000)])
def test_uniform_sum_over_steps_is_that_of_the_paper(T, B):
    plan = Schedule.of("uniform", T)
    assert sum(plan.cumulative(t, B) for t in range(T)) == B * (T + 1) // 2


def test_uniform_is_the_papers_floor_where_t_does_not_divide_b():
    plan = Schedule.of("uniform", 7)
    assert [plan.cumulative(t, 10) for t in range(7)] == [math.floor(10 * (t + 1) / 7) for t in range(7)]


def test_a_budget_below_the_steps_unmasks_one_weight_now_and_then():
    plan = Schedule.of("uniform", 10)
    counts = [plan.cumulative(t, 3) for t in range(-1, 10)]
    assert {later - earlier for earlier, later in itertools.pairwise(counts)} == {0, 1}


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_a_stride_unmasks_on_every_kth_step_only_and_never_less_than_the_plain_schedule(stride):
    plain, strided = Schedule.of("uniform", 12), Schedule.of("uniform", 12, stride)
    for t in range(12):
        grown = strided.cumulative(t, 100) - strided.cumulative(t - 1, 100)
        assert (grown > 0) == (t % stride == 0)
        assert strided.cumulative(t, 100) >= plain.cumulative(t, 100)


def test_a_callable_is_met_exactly_even_if_it_never_reaches_the_budget():
    plan = Schedule.of(lambda t, T, B: B // 3, steps=4)
    assert [plan.cumulative(t, 9) for t in range(6)] == [3, 3, 3, 9, 9, 9]


def test_a_schedule_that_goes_down_is_refused():
    with pytest.raises(MethodError, match=r"goes down: b\(2\) = 4 after 5"):
        Schedule.of(lambda t, T, B: [1, 5, 4, 6, 10][t], steps=5).check(10)


@pytest.mark.parametrize("value", [-1, 11, 2.5, math.nan, math.inf, None, "many"])
def test_a_value_that_is_no_count_is_refused(value):
    with pytest.raises(MethodError, match="whole number from 0 to B"):
        Schedule.of(lambda t, T, B: value, steps=3).check(10)


def test_a_bad_callable_is_refused_when_selecting_not_in_training():
    with pytest.raises(MethodError, match="goes down"):
        unmask.select(mlp(), unmask.id3(budget=10, steps=5, schedule=lambda t, T, B: 5 - t))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_steps_and_strides_are_whole_numbers_from_one(steps):
    with pytest.raises(MethodError, match="steps ="):
        Schedule.of("uniform", steps)
    with pytest.raises(MethodError, match="stride ="):
        Schedule.of("uniform", 5, steps)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(MethodError, match="uniform, cosine, front-loaded"):
        Schedule.of("linear", 5)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_follows_its_schedule_and_keeps_training_after_the_last_planned_step(name, stride):
    model, plan = mlp(), Schedule(SCHEDULES[name], steps=5, stride=stride)
    selection = unmask.select(model, unmask.id3(budget=13, steps=5, schedule=name, stride=stride))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    for t, x in enumerate(batches(8)):
        train(model, optimizer, [x])
        assert selection.used == plan.cumulative(t, 13) == sum(i.numel() for i in selection.indices.values())
    before = selection.values.detach().clone()
    train(model, optimizer, batches(1))
    assert selection.used == 13
    assert not torch.equal(before, selection.values)
