"""Compares what a ranking gets from factors with what it gets from the dense product."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import as_lists
from layer_nets import ALL_CASES, build, loss_of, run, weights
from nets import loss, mixed, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import unmask
from unmask.gradients import factors
from unmask.gradients.factors import Factors, PendingGradient
from unmask.methods.heuristics import heuristic
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.ranker import Ranker

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["bands", "halves", "as it decides"])
def always(request, monkeypatch):
    """Forces bands of a few rows, or bfloat16 first; these products are too small for the choice to differ."""
    if request.param != "as it decides":
        monkeypatch.setattr(factors, "_MOST", 2.0)
        monkeypatch.setattr(factors, "BAND", 64)
        monkeypatch.setattr(factors, "_GATHER", 1.0)
        monkeypatch.setattr(factors, "_SOME", 2.0 if request.param == "bands" else 0.0)
        monkeypatch.setattr(factors, "_FEW", 1.0)
        monkeypatch.setattr(factors, "_halves_pay", lambda x: request.param == "halves")


def uneven(tokens, rows, columns, dtype=torch.float32, seed=0):
    """Makes factors whose rows and columns differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(tokens, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    left *= 10 ** (-3 * torch.rand(rows, generator=generator, dtype=torch.float64))
    right *= 10 ** (-3 * torch.rand(columns, generator=generator, dtype=torch.float64))
    return Factors(left.to(dtype), right.to(dtype), dtype)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(30, 24, 40), (130, 40, 24), (1, 16, 16), (257, 100, 12)])
@pytest.mark.parametrize("share", [0.5, 0.05, 0.001])
def test_every_entry_above_is_found(dtype, shape, share):
    given = uneven(*shape, dtype)
    exact = (given.left.double().t() @ given.right.double()).reshape(-1)
    least = exact.abs().quantile(1 - share).item()
    pieces = given.above(lambda: least)
    if pieces is None:  # This is right only where the norms rule out too little.
        rows, columns = (x.double().norm(dim=0) for x in (given.left, given.right))
        some, near = rows * columns.max() >= 0.5 * least, columns * rows.max() >= 0.5 * least
        assert some.double().mean() * near.double().mean() > factors._SOME
        return
    pieces = list(pieces)
    flat, values = (torch.cat([piece[i] for piece in pieces]) for i in (0, 1))
    assert flat.unique().numel() == flat.numel()
    found = torch.zeros_like(exact, dtype=torch.bool).index_fill(0, flat, True)
    assert found[exact.abs() >= least].all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        values.double(), exact[flat], rtol=8 * eps, atol=shape[0] * eps * exact.abs().max().item()
    )
    if not factors._halves_pay(given.left):  # Its error is bounded by the largest norm.
        assert exact[flat].abs().min() >= 0.5 * least  # Little more was found than was asked for.


@pytest.fixture
def plain(monkeypatch):
    """Forbids the product in bfloat16 on every CPU."""
    monkeypatch.setattr(factors, "_halves_pay", lambda x: False)


@pytest.mark.usefixtures("plain")
def test_a_cut_that_grows_meanwhile_rules_out_more(monkeypatch):
    monkeypatch.setattr(factors, "BAND", 64)
    given = uneven(60, 200, 16)
    least = [given.dense().abs().quantile(0.99).item()]
    still = sum(flat.numel() for flat, _ in given.above(lambda: least[0]))
    pieces = given.above(lambda: least[0])
    first, _ = next(pieces)
    least[0] = given.dense().abs().max().item()
    assert first.numel() + sum(flat.numel() for flat, _ in pieces) < still


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_factors_that_are_not_finite_are_formed_whole(spoilt):
    for side in (0, 1):
        given = uneven(20, 8, 8)
        (given.left, given.right)[side][3, 2] = spoilt
        assert given.above(lambda: 1e30) is None


def test_a_product_in_bfloat16_that_rules_out_too_little_is_given_up(monkeypatch):
    monkeypatch.setattr(factors, "_halves_pay", lambda x: True)
    given = uneven(200, 64, 64)
    given.left, given.right = given.left.sign(), given.right.sign()
    ordered = given.dense().abs().flatten().sort().values
    assert given.above(lambda: ordered[-2048].item()) is None
    ((flat, values),) = given.above(lambda: ordered[-20].item())
    found = dict(zip(flat.tolist(), values.tolist(), strict=True))
    assert {
        i: v for i, v in enumerate(given.dense().flatten().tolist()) if abs(v) >= ordered[-20]
    }.items() <= found.items()
    assert len(found) < 128


@pytest.mark.parametrize("seed", range(20))
def test_rounding_to_bfloat16_loses_no_entry(seed, monkeypatch):
    """Takes the largest entry's own magnitude as the cut-off, and factors that round as badly as they can."""
    monkeypatch.setattr(factors, "_halves_pay", lambda x: True)
    monkeypatch.setattr(factors, "_SOME", 0.0)
    generator = torch.Generator().manual_seed(seed)
    left, right = ((1 + 2.0**-8 * (0.5 - 1e-4)) * torch.randn(64, 32, generator=generator).sign() for _ in "12")
    left[:, 3] = right[:, 5] = left[:, 3].abs()  # No terms cancel.
    given = Factors(left, right, torch.float32)
    largest = given.dense().abs().max().item()
    pieces = given.above(lambda: largest)
    assert pieces is not None
    assert 3 * 32 + 5 in torch.cat([flat for flat, _ in pieces]).tolist()


def test_factors_that_are_large_everywhere_are_formed_whole():
    given = Factors(torch.ones(5, 8), torch.ones(5, 8), torch.float32)
    assert given.above(lambda: 1.0) is None
    assert list(given.above(lambda: 6.0)) == []


@pytest.mark.usefixtures("plain")
def test_an_input_that_has_changed_gets_new_norms():
    left, right = torch.ones(4, 3), torch.ones(4, 3)
    for _ in range(2):
        assert list(Factors(left, right, torch.float32).above(lambda: 10.0)) == []
        right[:, 0] *= 5
        (found,) = Factors(left, right, torch.float32).above(lambda: 10.0)
        assert found[0].tolist() == [0, 3, 6]
        right[:, 0] = 1
    factors.forget()
    assert factors._last_norms.x is None


@pytest.mark.parametrize("steps", range(1, 24))
def test_rounding_down_of_both_factors_and_of_the_product_loses_no_entry(steps, monkeypatch):
    """Takes two numbers just below the middle of two numbers of bfloat16: each loses nearly half a unit."""
    monkeypatch.setattr(factors, "_halves_pay", lambda x: True)
    monkeypatch.setattr(factors, "_SOME", 0.0)
    monkeypatch.setattr(factors, "_FEW", 1.0)
    number = torch.tensor([[1 + steps * 2.0**-7 + 2.0**-8 * 0.999]])
    assert number.to(torch.bfloat16).item() < number.item()
    product = (number * number).item()
    found = list(Factors(number, number, torch.float32).above(lambda: product))
    assert [flat.tolist() for flat, _ in found] == [[0]]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["d3", "gradient", "snip"])
@pytest.mark.parametrize("kind", ["uneven", "ties", "zeros"])
def test_the_ranking_is_that_of_the_dense_product(name, kind):
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 12), (40, 30), (24, 50), (8, 8)]
    layout = Layout(
        [f"w{i}" for i in range(len(shapes))],
        [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes],
    )
    gradients = []
    for i, (rows, columns) in enumerate(shapes):
        given = uneven(20, rows, columns, torch.float64, seed=i)
        if kind == "ties":
            given = Factors(given.left[:, :1].expand(-1, rows).sign(), given.right.sign(), torch.float64)
            given.left[:, : rows // 2] *= 0.5
        elif kind == "zeros":
            given.left[:, 2:], given.right[:, 3:] = 0, 0
        gradients.append(given)
    results = []
    for dense in (True, False):
        table = Ledger(layout, torch.nn.Parameter(torch.zeros(50, dtype=torch.float64)), 50)
        table.assign(torch.arange(20), torch.arange(0, 2000, 100), torch.zeros(20, dtype=torch.float64))
        ranker = Ranker(heuristic(name), table, "global", 40, 0, exclude_members=True)
        for index, given in enumerate(gradients):
            ranker.rank(index, given.dense() if dense else Factors(given.left, given.right, torch.float64))
        results.append(ranker.result())
    assert results[0].positions.tolist() == results[1].positions.tolist()
    torch.testing.assert_close(results[0].payload, results[1].payload, rtol=1e-12, atol=1e-14)


METHODS = {
    "id3": unmask.id3("30%", steps=12),
    "gradient": unmask.id3("20%", steps=10, exp=0.0),
    "repeat_d3": unmask.repeat_d3("20%", stride=3),
    "per_row": unmask.id3("30%", steps=12).but(allocation="row"),
}


@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")  # rows that no token has seen
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("method", METHODS)
def test_selecting_at_every_step_is_as_with_dense_gradients(case, method):
    model, x = build(case, torch.float64)
    (dense, expected), (sampled, result) = (
        run(copy.deepcopy(model), x, METHODS[method], gradients, 14) for gradients in ("dense", "sampled")
    )
    assert as_lists(dense.indices) == as_lists(sampled.indices)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("accumulation", ["candidates", "exact"])
def test_accumulated_gradients_are_as_with_dense_ones(accumulation):
    results = []
    for gradients in ("dense", "sampled"):
        model = mixed(torch.float64)
        method = unmask.id3("30%", steps=10)
        selection = unmask.select(model, method, accumulation=accumulation, gradients=gradients)
        optimizer = torch.optim.AdamW(selection.parameters(), lr=3e-3, eps=1e-4)
        for step in range(10):
            for part in range(3):
                loss(model, tokens(3 * step + part)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((as_lists(selection.indices), weights(model)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-7, atol=1e-9)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 6), nn.Linear(6, 8), Conv1D(5, 8)
        self.again = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.up(self.table(ids)).tanh()
        x = self.again(self.again(x).tanh())  # One weight is used twice.
        return self.down(x.view(-1, 8))


IDS = torch.tensor([[1, 5, 5], [49, 0, 7]])


def assert_factors_train_as_dense(backward):
    """Compares two steps with dense gradients and with factors; ``backward(model)`` runs each step's backward."""
    results = []
    for gradients in ("dense", "sampled"):
        torch.manual_seed(0)
        model = Net().double()
        selection = unmask.select(model, unmask.id3(60, steps=2), gradients=gradients)
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        for _ in range(2):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
        results.append((as_lists(selection.indices), weights(model)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-12)


def test_a_gradient_for_the_inputs_alone_leaves_nothing_behind():
    def backward(model):
        hidden = model.table(IDS).detach().requires_grad_()
        x = model.up(hidden).tanh()
        probe = torch.autograd.grad(model.again(x).square().sum(), hidden, retain_graph=True)[0]
        assert probe.abs().sum() > 0
        loss_of(model, IDS).backward()

    assert_factors_train_as_dense(backward)


def test_one_graph_backward_twice():
    def backward(model):
        value = loss_of(model, IDS)
        value.backward(retain_graph=True)
        value.backward()

    assert_factors_train_as_dense(backward)


def test_a_gradient_penalty():
    def backward(model):
        hidden = model.table(IDS).detach().requires_grad_()
        out = model.down(model.again(model.up(hidden).tanh()).view(-1, 8))
        (gradient,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
        (out.sum() + gradient.square().sum()).backward()

    assert_factors_train_as_dense(backward)


def test_a_backward_that_dies_leaves_nothing_behind():
    class Dies(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("on purpose")

    def backward(model):
        x = Dies.apply(model.up(model.table(IDS)))
        with pytest.raises(ValueError, match="on purpose"):
            (3 * model.again(x)).sum().backward()
        loss_of(model, IDS).backward()

    assert_factors_train_as_dense(backward)


def test_an_overflow_is_refused_when_the_optimizer_steps():
    model = Net()
    selection = unmask.select(model, unmask.id3(60, steps=2), gradients="sampled")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    (loss_of(model, IDS) * torch.inf).backward()
    with pytest.raises(unmask.NonFiniteGradientError):
        optimizer.step()
    assert selection.used == 0


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__ and isinstance(out, torch.Tensor):
            self.products.append(out.numel())
        return out


def test_a_layer_that_cannot_reach_the_cut_is_not_formed():
    """Checks it where the second layer, whose backward runs first, sets a cut-off that few rows of the first one reach."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    with torch.no_grad():
        model[1].weight[:, 3:] *= 1e-4  # Now three rows of the first layer's gradient are large.
    selection = unmask.select(model, unmask.id3(4, steps=1), gradients="auto")
    value = model(torch.randn(20, 128)).sum()
    with Largest() as seen:
        value.backward()
    assert sum(count >= 128 * 128 for count in seen.products) == 1
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    assert selection.used == 4


def test_pending_sums_what_one_backward_brings():
    pending = PendingGradient()
    pending.uses = 2
    part = uneven(5, 3, 4)
    pending.put(part)
    pending.put(torch.ones(3, 4))
    torch.testing.assert_close(pending.take(), part.dense() + 1)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 4), (3, 4), check_invariants=True).coalesce()
    pending.put(sparse)
    pending.put(sparse)
    total = pending.take()
    assert total.is_sparse
    assert total.to_dense()[2].tolist() == [2] * 4
