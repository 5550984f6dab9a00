"""Whatever module a tensor stands in, the selection sees the gradient that autograd would have given it."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import as_lists, d3_scores, dense_gradients, first_k, gradient_at_slots, mean_square, mlp
from torch import nn
from torch.nn import functional as F

import unmask


class Twice(nn.Module):
    """One tensor in two operations, one of them transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return torch.tanh(x @ self.weight.T) @ self.weight


class Parent(nn.Module):
    """Reads its child's tensors itself."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(6, 5)

    def forward(self, x):
        return F.linear(x, weight=self.child.weight, bias=self.child.bias).tanh()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids).tanh())


class Called(nn.Module):
    """One module called several times."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(3):
            x = self.cell(x).tanh()
        return x


class Scalars(nn.Module):
    """Tensors of no dimension, read by arithmetic, indexing, in-place operations and iteration."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.2))
        self.rows = nn.Parameter(torch.randn(3, 6))
        self.factors = nn.ParameterList([torch.randn(6), torch.randn(6)])

    def forward(self, x):
        h = self.scale * x.clone()
        h += self.shift
        h.mul_(self.factors[0]).add_(torch.stack(list(self.factors)).sum(0))
        h[0] = self.rows[2]
        first, *_ = self.rows
        return h + first.tanh() + self.rows.t().mean(1) + torch.cat([self.rows, h]).sum(0)


class Transposed(nn.Module):
    """A tensor whose memory is column-major, and a permuted one of three dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4).t())
        self.cube = nn.Parameter(torch.randn(2, 3, 4).permute(2, 0, 1))

    def forward(self, x):
        return torch.einsum("bi,ijk->bjk", F.linear(x, self.weight).tanh(), self.cube)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.lstm(x.view(2, 2, 6))[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(*[x.view(2, 2, 6)] * 3)[0]


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 2, 0], [2, 9, 1]])
CASES = {
    "linear": (lambda: nn.Linear(6, 5), X),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), X.view(2, 2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 2, groups=2), X.view(1, 2, 3, 4)),
    "channels_last": (lambda: nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last), X.view(1, 2, 3, 4)),
    "conv_transpose": (lambda: nn.ConvTranspose1d(2, 3, 2), X.view(2, 2, 6)),
    "embedding": (lambda: nn.Embedding(11, 6), IDS),
    "padding": (lambda: nn.Embedding(11, 6, padding_idx=0), IDS),
    "sparse": (lambda: nn.Embedding(11, 6, sparse=True), IDS),
    "bag": (lambda: nn.EmbeddingBag(11, 6, mode="mean"), IDS),
    "layer_norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), X),
    "rms_norm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 2)), X),
    "batch_norm": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)), X),
    "group_norm": (lambda: nn.GroupNorm(2, 6), X),
    "prelu": (lambda: nn.PReLU(6), X),
    "lstm": (Recurrent, X),
    "attention": (Attention, X),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), X.view(2, 2, 6)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), X),
    "twice": (Twice, X),
    "parent": (Parent, X),
    "tied": (Tied, IDS),
    "called": (Called, X),
    "scalars": (Scalars, X),
    "transposed": (Transposed, X),
}


def loss_of(model, x):
    out = model(x)
    return (out.sin() * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sum()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_gradient_at_the_slots_is_the_dense_gradient(case, training):
    build, x = CASES[case]
    model = build().train(training)
    dense = dense_gradients(model, lambda m: loss_of(m, x))
    selection = unmask.select(model, unmask.random_mask(budget="100%"))
    loss_of(model, x).backward()
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense), rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:step 0 was to select:unmask.UnmaskWarning")  # rows that no token has seen
@pytest.mark.parametrize("case", CASES)
def test_the_selection_is_a_sort_of_the_dense_scores(case):
    build, x = CASES[case]
    model = build()
    dense = dense_gradients(model, lambda m: loss_of(m, x))
    numel = sum(p.numel() for p in model.parameters())
    for budget in {1, numel // 3 or 1, numel - 1 or 1}:
        twin = copy.deepcopy(model)
        expected = first_k(d3_scores(twin, dense), budget, above=0.0)
        selection = unmask.select(twin, unmask.static_d3(budget=budget))
        loss_of(twin, x).backward()
        torch.optim.SGD(selection.parameters(), lr=0.1).step()
        assert as_lists(selection.indices) == expected


@pytest.mark.parametrize("case", CASES)
def test_selected_weights_move_by_their_own_gradient_and_no_others_move(case):
    build, x = CASES[case]
    model = build()
    dense, before = dense_gradients(model, lambda m: loss_of(m, x)), copy.deepcopy(model)
    selection = unmask.select(model, unmask.random_mask(budget="40%", seed=1))
    loss_of(model, x).backward()
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    for name, p in model.named_parameters():
        expected = before.get_parameter(name).detach().clone().contiguous()
        flat = selection.indices.get(name, torch.empty(0, dtype=torch.int64))
        expected.view(-1)[flat] -= 0.1 * dense[name].reshape(-1)[flat]
        torch.testing.assert_close(p.detach().contiguous(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["candidates", "exact"])
def test_dense_gradients_are_received_one_by_one_and_let_go(mode):
    """In every micro-batch a layer's gradients are through before the next layer's are formed."""
    model = mlp(width=16, depth=12)
    selection = unmask.select(model, unmask.id3(budget=50, steps=2), accumulation=mode)
    receive, alive, behind, most = selection._window.receive, [], set(), []

    def reach(layer):
        def hook(module, inputs, output):
            output.register_hook(lambda gradient: behind.update({f"{layer}.weight", f"{layer}.bias"}))

        return hook

    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(reach(name))

    def counting(index, gradient, entries):
        most.append(len(behind))
        behind.discard(selection.ledger.layout.names[index])
        alive.append(weakref.ref(gradient))
        receive(index, gradient, entries)
        assert sum(ref() is not None for ref in alive) == 1

    selection._window.receive = counting
    for _ in range(3):
        mean_square(model, torch.randn(3, 16)).backward()
    assert len(most) == 3 * 24
    assert max(most) <= 3  # one layer's, and what autograd has just formed of the next
    assert not behind


@pytest.mark.parametrize("mode", ["candidates", "exact"])
def test_tensors_that_the_loss_does_not_reach_have_a_zero_gradient_and_wait_for_one(mode):
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
    selection = unmask.select(model, unmask.static_d3(20), accumulation=mode)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    loss_of(model["used"], X).backward()
    with pytest.warns(unmask.UnmaskWarning, match="to select 20 weights and selected 14"):
        optimizer.step()
    assert as_lists(selection.indices) == {"used.bias": [0, 1], "used.weight": [*range(12)]}
    optimizer.zero_grad()
    loss_of(model["unused"], X).backward()
    optimizer.step()
    assert selection.used == 20
    assert sum(len(flat) for name, flat in selection.indices.items() if name.startswith("unused")) == 6


def test_a_tensor_of_several_uses_is_received_once_with_their_sum():
    model, seen = Called(), []
    selection = unmask.select(model, unmask.id3(budget=5, steps=1))
    receive = selection._window.receive
    selection._window.receive = lambda index, gradient, entries: (seen.append(index), receive(index, gradient, entries))
    loss_of(model, X).backward()
    assert sorted(seen) == [0, 1]


def test_a_step_without_newcomers_asks_for_no_gradient_of_tensors_without_slots():
    model = mlp(depth=2)
    selection = unmask.select(model, unmask.bitfit(), include=r"^0\.")
    inputs = torch.randn(2, 6)
    out = mean_square(model, inputs)
    sites = [p.__dict__["_unmask_site"] for p in selection.ledger.layout.tensors]
    assert [site.stand_in is not None for site in sites] == [True]
    out.backward()
    assert selection.values.grad.abs().sum() > 0


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight**2

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight**2, (2 * gradient * x * weight).sum(0)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return Square.apply(x, self.weight) + self.bias


def test_limitation_a_custom_autograd_function_hides_its_tensors_gradient():
    """Function.apply does not go through __torch_function__: such a tensor counts as one that the loss does not reach."""
    model = Custom()
    selection = unmask.select(model, unmask.static_d3(budget=6))
    model(X).sum().backward()
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    assert list(selection.indices) == ["bias"]


def test_a_custom_autograd_function_works_on_a_view_of_the_tensor():
    """The way round: any operation on the tensor first, such as ``weight.view_as(weight)``."""
    model = Custom()
    model.forward = lambda x: Square.apply(x, model.weight.view_as(model.weight)) + model.bias
    selection = unmask.select(model, unmask.random_mask(budget=12))
    dense = {"weight": (2 * X * model.weight.detach()).sum(0), "bias": torch.full((6,), 4.0)}
    model(X).sum().backward()
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense))
