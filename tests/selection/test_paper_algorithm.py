"""Tests that unmask trains bit for bit as the paper's Algorithm 1 (ID3) and its repeat-S, which are dense plain torch here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers import as_lists, assert_same_tensors, batches, dense_gradients, mean_square, mlp, snapshot, train
from nets import loss, mixed, tokens
from torch import Tensor, nn

import unmask
from unmask import ConfigError, MethodError, SelectionError, SelectiveAdamW, SparseDelta
from unmask.analysis import densities, gradient_updates, mask_of, tensor_sparsity
from unmask.analysis import snapshot as shot_of
from unmask.lab.training.config import TrainConfig
from unmask.selection.state import read_state, write_state

BUDGET, STEPS = 100, 15  # 15 does not divide 100
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
}


class Paper:
    """Trains one flat vector of all weights by an ordinary optimizer, with a mask over the gradient.

    Weight decay, momentum and moments act only on the weights that were ever tuned; all others stay as they were.

    Attributes:
        theta: All N weights, in the order of tensor names.
        mask: True for the weights with a gradient in this step: Lambda_t of increment-S, the B picked of repeat-S.
        tuned: True for the weights that ever had one: Lambda_T.
    """

    def __init__(
        self, model: nn.Module, optimizer: str, strategy: str, eps: float, exp: float, stride: int = 1
    ) -> None:
        self.model, self.tensors = model, [p for _, p in sorted(model.named_parameters())]
        self.strategy, self.eps, self.exp, self.stride, self.t = strategy, eps, exp, stride, 0
        self.theta = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self.tensors]))
        self.base = self.theta.detach().clone()
        self.mask, self.tuned = (torch.zeros_like(self.base, dtype=torch.bool) for _ in range(2))
        self.optimizer = OPTIMIZERS[optimizer]([self.theta])

    def step(self, batch: Tensor) -> float:
        value = loss(self.model, batch)
        gradients = torch.autograd.grad(value, self.tensors)
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        importance = gradient.abs() / (self.theta.detach().abs() + self.eps) ** self.exp  # Eq. 1
        if self.strategy == "increment":
            due = BUDGET if self.t >= STEPS else BUDGET * (self.t + 1) // STEPS
            # It picks u_t of the other weights.
            self._pick(importance.masked_fill(self.mask, -math.inf), due - int(self.mask.sum()))
        elif self.t % self.stride == 0:
            self.mask.zero_()
            self._pick(importance, BUDGET)
        self.tuned |= self.mask
        self.theta.grad = torch.where(self.mask, gradient, 0.0)  # Eq. 3
        self.optimizer.step()
        self._leave_untouched()
        self.t += 1
        return value.item()

    def _pick(self, importance: Tensor, count: int) -> None:
        """Picks by Eq. 2; of weights of equal importance, it takes the first in the order of names."""
        self.mask[importance.argsort(descending=True, stable=True)[:count]] = True

    @torch.no_grad()
    def _leave_untouched(self) -> None:
        self.theta.copy_(torch.where(self.tuned, self.theta, self.base))
        for state in self.optimizer.state[self.theta].values():
            if isinstance(state, Tensor) and state.shape == self.theta.shape:
                state[~self.tuned] = 0
        for p, part in zip(self.tensors, self.theta.split([p.numel() for p in self.tensors]), strict=True):
            p.copy_(part.view_as(p))


def flat(indices: dict[str, Tensor], model: nn.Module) -> Tensor:
    """Returns the mask over all weights, in the order of tensor names."""
    masks = []
    for name, p in sorted(model.named_parameters()):
        masks.append(torch.zeros(p.numel(), dtype=torch.bool))
        masks[-1][indices.get(name, torch.empty(0, dtype=torch.int64))] = True
    return torch.cat(masks)


def method_of(strategy: str, eps: float = 1.0, exp: float = 2.0, stride: int = 1) -> unmask.Method:
    if strategy == "increment":
        return unmask.id3(BUDGET, STEPS, eps, exp)
    return unmask.repeat_d3(BUDGET, eps, exp, stride, leaving="kept")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("eps", "exp"), [(1.0, 2.0), (1.0, 0.0), (0.5, -1.0)])
@pytest.mark.parametrize(("strategy", "stride"), [("increment", 1), ("repeat", 1), ("repeat", 3)])
def test_the_paper_s_algorithm_step_by_step_and_bit_for_bit(strategy, stride, eps, exp, optimizer):
    model = mixed()
    paper = Paper(mixed(), optimizer, strategy, eps, exp, stride)
    selection = unmask.select(model, method_of(strategy, eps, exp, stride), gradients="dense")
    ours = OPTIMIZERS[optimizer](selection.parameters())
    for t in range(STEPS + 5):
        value = loss(model, tokens(t))
        value.backward()
        ours.step()
        ours.zero_grad()
        assert value.item() == paper.step(tokens(t))
        assert torch.equal(flat(selection.picked, model), paper.mask)
        assert torch.equal(flat(selection.indices, model), paper.tuned)
        assert selection.used == paper.tuned.sum()
        assert paper.mask.sum() == method_of(strategy).cumulative(t, BUDGET)
        for (name, p), q in zip(sorted(model.named_parameters()), paper.tensors, strict=True):
            assert torch.equal(p, q), (t, name)
    positions = selection.ledger.positions[: selection.used]
    assert torch.equal(selection.values[: selection.used], paper.theta[positions])
    assert not selection.values[selection.used :].any()
    if strategy == "repeat":
        assert BUDGET < selection.used < selection.values.numel() == paper.theta.numel()


# Repeat-S that keeps the weights that leave.


def kept(stride: int = 1, budget: int = BUDGET, **changes) -> unmask.Method:
    return unmask.repeat_d3(budget, stride=stride, leaving="kept").but(**changes)


def begin(stride: int = 1, seed: int = 0, make=OPTIMIZERS["adamw"], **options):
    model = mixed(seed=seed)
    selection = unmask.select(model, kept(stride), **options)
    return model, selection, make(selection.parameters())


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    train(model, optimizer, [tokens(t) for t in steps], loss)


def test_slots_are_in_order_of_first_pick_and_untouched_weights_are_the_base_s():
    model, selection, optimizer = begin()
    base, seen = snapshot(model), 0
    for t in range(8):
        before = selection.ledger.positions.clone()
        run(model, optimizer, [t])
        assert torch.equal(selection.ledger.positions[:seen], before[:seen])
        assert selection.used > seen
        seen = selection.used
    changed = {name: (p != base[name]).reshape(-1) for name, p in model.named_parameters()}
    tuned = flat(selection.indices, model)
    assert not (torch.cat([changed[name] for name in sorted(changed)]) & ~tuned).any()
    assert torch.equal(selection.ledger.positions.sort().values.unique()[1:], tuned.nonzero().squeeze(1))


@pytest.mark.parametrize("stop", [0, 3, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one_also_between_two_selections(stop, tmp_path):
    straight, whole, optimizer = begin(stride=3)
    run(straight, optimizer, range(9))
    model, selection, optimizer = begin(stride=3)
    run(model, optimizer, range(stop))
    picked = as_lists(selection.picked)
    loss(model, tokens(99)).backward()  # no step follows this backward
    assert selection.state_dict()["values"].shape == (selection.used,)
    path = write_state(selection.state_dict(), tmp_path / "state.safetensors")
    torch.save({"selection": selection.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for state in (saved["selection"], read_state(path)):
        again, resumed, optimizer = begin(stride=3)
        resumed.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        assert as_lists(resumed.picked) == picked
        run(again, optimizer, range(stop, 9))
        assert_same_tensors(snapshot(again), snapshot(straight))
        assert torch.equal(resumed.values, whole.values)
        assert as_lists(resumed.picked) == as_lists(whole.picked)


def test_a_state_goes_back_over_a_selection_that_has_trained():
    model, selection, optimizer = begin()
    run(model, optimizer, range(2))
    state, early = selection.state_dict(), snapshot(model)
    run(model, optimizer, range(2, 6))
    assert selection.used > state["used"]
    selection.load_state_dict(state)
    assert_same_tensors(snapshot(model), early)
    assert not selection.values[state["used"] :].any()
    with pytest.raises(SelectionError, match="lacks picked"):
        selection.load_state_dict({key: value for key, value in state.items() if key != "picked"})
    with pytest.raises(SelectionError, match="another method"):
        unmask.select(mixed(), unmask.repeat_d3(BUDGET)).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_delta_holds_all_that_was_tuned(dtype, tmp_path):
    model, base = mixed(dtype), mixed(dtype)
    selection = unmask.select(model, kept())
    run(model, OPTIMIZERS["adamw"](selection.parameters()), range(6))
    delta = SparseDelta.load(selection.delta().save(tmp_path / "delta.safetensors"))
    assert len(delta) == selection.used > BUDGET
    delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(model))
    with pytest.raises(SelectionError, match="no order of unmasking"):
        selection.delta(order=True)
    with pytest.raises(SelectionError, match="picks again"):
        mask_of(selection, used=5)


def test_a_backward_that_no_step_follows_leaves_no_trace():
    model, selection, optimizer = begin()
    twin, _, other = begin()
    for t in range(4):
        loss(model, tokens(50 + t)).backward()  # this backward is dropped, as by a GradScaler or a user
        optimizer.zero_grad()
        run(model, optimizer, [t])
        run(twin, other, [t])
    assert_same_tensors(snapshot(model), snapshot(twin))
    assert selection.step == 4


@pytest.mark.parametrize("accumulation", ["exact", "candidates"])
@pytest.mark.parametrize("stride", [1, 3])
def test_micro_batches_pick_by_their_sum(accumulation, stride):
    """All weights, or the 4 B best by the first micro-batch, may be picked; in both cases their gradient is the sum."""
    model = mixed(torch.float64)
    selection = unmask.select(model, kept(stride), accumulation=accumulation)
    optimizer, expected = torch.optim.SGD(selection.parameters(), lr=0.1, momentum=0.9), torch.empty(0)
    for t in range(7):
        parts = [tokens(t, 4), tokens(50 + t, 4), tokens(90 + t, 4)]
        gradients = [dense_gradients(model, lambda m, part=part: loss(m, part)) for part in parts]
        first, total = (
            torch.cat([sum(g[name] for g in some).reshape(-1) for name in sorted(some[0])])
            for some in (gradients[:1], gradients)
        )
        factor = 1 / (torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())]).abs() + 1) ** 2
        for part in parts:
            loss(model, part).backward()
        if t % stride == 0:
            expected = torch.zeros_like(total, dtype=torch.bool)
            seen = (first.abs() * factor).argsort(descending=True, stable=True)
            seen = seen[: 4 * BUDGET] if accumulation == "candidates" else seen
            expected[seen[(total.abs() * factor)[seen].argsort(descending=True)[:BUDGET]]] = True
        torch.testing.assert_close(dense_gradient(selection), torch.where(expected, total, 0.0), rtol=1e-4, atol=1e-7)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(flat(selection.picked, model), expected)
    assert selection.used > BUDGET


def dense_gradient(selection: unmask.Selection) -> Tensor:
    """Returns the gradient of ``values``, each entry at its place among all weights."""
    positions, tentative = selection.ledger.positions.clone(), selection.ledger.tentative
    if tentative is not None:
        positions[tentative.slots] = tentative.positions
    gradient = torch.zeros_like(selection.values)
    gradient[positions[positions >= 0]] = selection.values.grad[positions >= 0]
    assert not selection.values.grad[positions < 0].any()
    return gradient


@pytest.mark.parametrize("gradients", ["auto", "sampled"])
def test_gradients_at_the_picked_entries_alone_are_the_dense_ones(gradients):
    runs = [begin(stride=3, gradients=how) for how in (gradients, "dense")]
    for t in range(9):
        for model, _, optimizer in runs:
            run(model, optimizer, [t])
        assert as_lists(runs[0][1].picked) == as_lists(runs[1][1].picked)
    torch.testing.assert_close(snapshot(runs[0][0]), snapshot(runs[1][0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("allocation", ["tensor", "row", "column"])
def test_an_allocation_bounds_what_a_step_picks(allocation):
    model = mixed()
    selection = unmask.select(model, kept(allocation=allocation))
    run(model, OPTIMIZERS["sgd"](selection.parameters()), range(5))
    total = selection.values.numel()
    assert selection.used > BUDGET == sum(len(flat) for flat in selection.picked.values())
    for name, picked in selection.picked.items():
        shape = model.get_parameter(name).shape
        columns = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
        line = {"tensor": picked * 0, "row": picked // columns, "column": picked % columns}[allocation]
        if allocation == "column" and len(shape) == 1:  # a vector counts as one column
            line, size = picked * 0, shape[0]
        else:
            size = {"tensor": math.prod(shape), "row": columns, "column": shape[0]}[allocation]
        assert line.bincount().max() <= math.ceil(BUDGET * size / total), name


# Optimizers and clipping.


@pytest.mark.parametrize("stride", [1, 3])
def test_selective_adamw_is_torch_s_fused_adamw(stride):
    settings = {"lr": 3e-3, "weight_decay": 0.1}
    runs = [
        begin(stride, make=lambda p: torch.optim.AdamW(p, fused=True, **settings)),
        begin(stride, make=lambda p: SelectiveAdamW(p, **settings)),
    ]
    for model, _, optimizer in runs:
        run(model, optimizer, range(10))
    assert_same_tensors(snapshot(runs[0][0]), snapshot(runs[1][0]))


@pytest.mark.parametrize("stride", [1, 3])
def test_an_age_per_weight_counts_from_its_first_pick(stride):
    """The reference is dense Adam in float64, which corrects each weight by its own count of steps."""
    torch.manual_seed(0)
    model = mlp(dtype=torch.float64)
    theta = torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())]).clone()
    selection = unmask.select(model, kept(stride, 20))
    optimizer = SelectiveAdamW(selection.parameters(), lr=0.01, weight_decay=0.1, bias_correction="entry")
    age, m, v = (torch.zeros_like(theta) for _ in range(3))
    for x in batches(8, dtype=torch.float64):
        mean_square(model, x).backward()
        gradient = dense_gradient(selection)
        optimizer.step()
        tuned = flat(selection.indices, model)
        assert selection.in_use == selection.used
        assert torch.equal(gradient != 0, flat(selection.picked, model))
        age += tuned
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        move = (m / (1 - 0.9**age)) / ((v / (1 - 0.999**age)).sqrt() + 1e-8) + 0.1 * theta
        theta = torch.where(tuned, theta - 0.01 * move, theta)
        optimizer.zero_grad()
        found = torch.cat([p.reshape(-1) for _, p in sorted(model.named_parameters())])
        torch.testing.assert_close(found, theta, rtol=1e-10, atol=1e-12)
    assert age.unique().numel() > 3


@pytest.mark.parametrize("scope", ["selected", "all"])
def test_clipping_is_by_the_masked_or_the_whole_gradient(scope):
    model, selection, optimizer = begin(make=OPTIMIZERS["sgd"], clip_scope=scope)
    paper = Paper(mixed(), "sgd", "repeat", 1.0, 2.0)
    for t in range(4):
        whole = torch.autograd.grad(loss(paper.model, tokens(t)), paper.tensors)
        loss(model, tokens(t)).backward()
        measured = unmask.clip_grad_norm_(selection, math.inf)
        paper.step(tokens(t))
        expected = paper.theta.grad if scope == "selected" else torch.cat([g.reshape(-1) for g in whole])
        assert measured.item() == pytest.approx(expected.norm().item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()


def test_no_slot_gets_another_weight_so_that_quantised_optimizer_state_does_no_harm():
    for leaving, refused in (("restored", True), ("kept", False)):
        model = mixed()
        selection = unmask.select(model, unmask.repeat_d3(BUDGET, leaving=leaving))
        optimizer = OPTIMIZERS["adamw"](selection.parameters())
        run(model, optimizer, [0])
        optimizer.state[selection.values]["codes"] = torch.ones_like(selection.values, dtype=torch.uint8)
        if refused:
            with pytest.raises(SelectionError, match="leaving='kept'"):
                run(model, optimizer, [1])
        else:
            run(model, optimizer, [1])
            assert optimizer.state[selection.values]["codes"].all()


def test_a_grad_scaler_that_skips_a_step_picks_nothing():
    model, selection, optimizer = begin()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    steps = []
    for t in range(4):
        scaler.scale(loss(model, tokens(t)) * (math.inf if t == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps.append((selection.step, selection.used))
    assert [step for step, _ in steps] == [1, 1, 2, 3]
    assert steps[0][1] == steps[1][1] == BUDGET


# Analysis, settings and refusals.


def test_measures_are_over_all_that_was_tuned_and_a_snapshot_holds_the_picks_too():
    model, selection, optimizer = begin()
    run(model, optimizer, range(6))
    tuned = flat(selection.indices, model)
    assert len(mask_of(selection)) == tuned.sum() == selection.used
    assert tensor_sparsity(selection) == sum(d == 0 for d in densities(selection).values()) / len(densities(selection))
    shot = shot_of(selection)
    assert (shot["step"], shot["used"]) == (6, selection.used)
    assert sum(row["unmasked"] for row in shot["rows"]) == selection.used
    assert sum(row["unmasked"] for row in shot["picked"]) == BUDGET
    assert [(r["layer"], r["kind"], r["of"]) for r in shot["picked"]] == [
        (r["layer"], r["kind"], r["of"]) for r in shot["rows"]
    ]
    assert "picked" not in shot_of(unmask.select(mixed(), unmask.repeat_d3(BUDGET)))
    assert gradient_updates(selection.method, BUDGET, steps=6) == 6 * BUDGET


def test_picked_is_all_of_the_selection_for_other_methods():
    for method in (unmask.id3(10, 2), unmask.repeat_d3(10), unmask.pafi(10), unmask.full()):
        model = mlp()
        selection = unmask.select(model, method)
        train(model, torch.optim.SGD(selection.parameters(), lr=0.1), batches(1))
        assert as_lists(selection.picked) == as_lists(selection.indices) != {}
    assert unmask.select(mlp(), kept(budget=10)).picked == {}


def test_the_whole_of_the_model_may_be_the_budget():
    """The run is then full fine-tuning, in every step."""
    torch.manual_seed(0)
    model = mlp()
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    selection = unmask.select(model, unmask.repeat_d3("100%", leaving="kept"), gradients="dense")
    train(model, torch.optim.AdamW(selection.parameters(), lr=0.01), batches(5))
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), batches(5))
    assert_same_tensors(snapshot(model), snapshot(twin))
    assert selection.used == selection.budget


def test_kept_is_refused_where_nothing_leaves():
    for make in (unmask.id3(5, 2), unmask.static_d3(5), unmask.pafi(5)):
        with pytest.raises(MethodError, match="leaving = 'kept' is for strategy='repeat'"):
            make.but(leaving="kept")
    with pytest.raises(MethodError, match="must be one of restored, kept"):
        unmask.repeat_d3(5, leaving="reset")
    assert kept().describe()["leaving"] == "kept"
    assert "leaving" not in unmask.repeat_d3(5).describe()


def test_the_setting_goes_with_repeat_d3_alone():
    base = {"model": "m", "output": "o", "task": "rte", "budget": "30"}
    for leaving in ("restored", "kept"):
        method = TrainConfig(**base, method="repeat_d3", stride=2, leaving=leaving).build_method(9)
        assert method == unmask.repeat_d3("30", stride=2, leaving=leaving)
    with pytest.raises(ConfigError, match="goes with method repeat_d3"):
        TrainConfig(**base, leaving="kept")
    with pytest.raises(ConfigError, match="must be one of restored, kept"):
        TrainConfig(**base, method="repeat_d3", leaving="reset")


# Counts and Theorem 1.


def test_the_updates_of_increments_and_of_a_static_mask():
    budget, steps = 60, 15
    assert gradient_updates(unmask.id3(budget, steps), budget) == budget * (steps + 1) // 2
    assert gradient_updates(unmask.static_d3(budget), budget, steps) == steps * budget


def sides_of_theorem_1(theta: Tensor, x: Tensor, eps: float, exp: float) -> tuple[Tensor, Tensor]:
    """Returns (sqrt(I(theta)), E[H(theta)]) per entry for p(y = 1 | x) = sigmoid(theta x), by sums over y."""
    p = torch.sigmoid(theta * x)
    scores = [(1 - p) * x, -p * x]  # d/dtheta ln p(y | x), y = 1 and y = 0
    mean = p * scores[0] + (1 - p) * scores[1]
    torch.testing.assert_close(mean, torch.zeros_like(mean))  # this is the first step of the proof
    d3 = unmask.heuristic("d3", eps=eps, exp=exp)
    fisher = p * scores[0] ** 2 + (1 - p) * scores[1] ** 2
    return fisher.sqrt(), p * d3.score(theta, scores[0]) + (1 - p) * d3.score(theta, scores[1])


@pytest.mark.parametrize("eps", [1.0, 2.0])
@pytest.mark.parametrize("exp", [0.0, 1.0, 2.0])
def test_theorem_1_holds_where_the_exponent_is_not_negative(exp, eps):
    draw = torch.Generator().manual_seed(0)
    theta, x = (3 * torch.randn(2_000, generator=draw, dtype=torch.float64) for _ in range(2))
    root, mean = sides_of_theorem_1(theta, x, eps, exp)
    assert (root >= mean - 1e-12).all()


def test_theorem_1_fails_for_an_exponent_of_minus_one():
    one = torch.ones(1, dtype=torch.float64)
    root, mean = sides_of_theorem_1(one, one, eps=1.0, exp=-1.0)
    p = 1 / (1 + math.exp(-1))
    assert root.item() == pytest.approx(math.sqrt(p * (1 - p)))
    assert mean.item() == pytest.approx(4 * p * (1 - p))  # E|g| = 2 p (1 - p), times |theta| + eps = 2
    assert mean > root
