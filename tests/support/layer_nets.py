"""Makes networks that use a tensor in every way that a layer may use one, and trains them."""

from __future__ import annotations

import torch
from helpers import assert_same_tensors
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import unmask


class Twice(nn.Module):
    """Uses one tensor in two operations, one of them transposed."""

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
    """Calls one module several times."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(3):
            x = self.cell(x).tanh()
        return x


class Scalars(nn.Module):
    """Has tensors of no dimension, read by arithmetic, indexing, in-place operations and iteration."""

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
    """Has a tensor whose memory is column-major, and a permuted one of three dimensions."""

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


class Mixture(nn.Module):
    """Uses one weight in a Linear, in a plain product, and transposed in another Linear."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        x = self.layer(x).tanh() @ self.layer.weight
        return F.linear(x.tanh(), self.layer.weight.t()) * self.layer.weight.sum() + self.layer.bias


class OneBias(nn.Module):
    """Has biases that are broadcast or scaled: one number for all, and one row per example."""

    def __init__(self):
        super().__init__()
        self.weight, self.one = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(1))
        self.many, self.row = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = F.linear(x, self.weight, self.one).tanh() + F.linear(x, self.weight, self.many)
        x = torch.addmm(self.one, x, self.weight) + torch.addmm(self.many, x, self.weight, beta=0.5, alpha=2.0)
        return torch.addmm(self.row, x, self.weight, beta=0.5, alpha=2.0)


class SharedBias(nn.Module):
    """Uses one bias in two linear layers, one of them a Conv1D, and alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), Conv1D(6, 6)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.second(self.first(x).tanh()) * self.first.bias


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.child, self.table = nn.Linear(6, 5, bias=False), nn.Embedding(11, 6)

    def forward(self, x):
        x = x + F.embedding(weight=self.table.weight, input=IDS.view(-1)[:4], padding_idx=-10)
        return F.linear(bias=None, weight=self.child.weight, input=x)


class Frozen(nn.Module):
    """Stacks the layers, so that most inputs require a gradient."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True), Conv1D(8, 7), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x.view(2, 2, 6))


ALL_CASES = {
    **CASES,
    "no_bias": (lambda: nn.Linear(6, 5, bias=False), X),
    "conv1d_of_transformers": (lambda: Conv1D(5, 6), X),
    "stacked": (Frozen, X),
    "mixture": (Mixture, X),
    "one_bias": (OneBias, X),
    "shared_bias": (SharedBias, X),
    "keywords": (Keywords, X),
    "table_smaller_than_batch": (lambda: nn.Embedding(4, 6), IDS % 4),
    "small_and_sparse": (lambda: nn.Embedding(4, 6, sparse=True), IDS % 4),
    "scaled_by_frequency": (lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), IDS),
    "last_row_is_padding": (lambda: nn.Embedding(11, 6, padding_idx=-1), IDS + 1),
    "sparse_bag": (lambda: nn.EmbeddingBag(11, 6, mode="sum", sparse=True), IDS),
    "int32_ids": (lambda: nn.Embedding(11, 6), IDS.int()),
}


def build(case, dtype=torch.float32):
    make, x = ALL_CASES[case]
    torch.manual_seed(0)
    return make().to(dtype), x.to(dtype) if x.is_floating_point() else x


def batch(x, step):
    return x * (1 + 0.1 * step) if x.is_floating_point() else (x * (step + 1)) % (x.max() + 1)


def weights(model):
    """Returns every parameter once, also where it is tied."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_unselected(model, base, selection):
    """Asserts that every weight outside the selection is bitwise the base's."""
    now = weights(model)
    for name, flat in selection.indices.items():
        kept = now[name].reshape(-1).clone()
        kept[flat] = base[name].reshape(-1)[flat]
        now[name] = kept.view(base[name].shape)
    assert_same_tensors(now, base)


def run(model, x, method, gradients, steps=20):
    base = weights(model)
    selection = unmask.select(model, method, gradients=gradients)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.02, weight_decay=0.1, eps=1e-4)  # noise is no signal
    for step in range(steps):
        loss_of(model, batch(x, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_unselected(model, base, selection)
    return selection, weights(model)
