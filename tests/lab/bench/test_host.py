"""The host's costs of a step: what waits is counted, and no step of a method waits more than four times."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unmask
from unmask.gradients.backend import backend_of, gathered_product, portable
from unmask.gradients.embedding import embedding_gradient, embedding_gradient_at
from unmask.gradients.entries import Entries, take_gradient
from unmask.lab.bench import host
from unmask.lab.bench.host import Operations, measure, run_host
from unmask.lab.bench.settings import BenchSettings


class Net(nn.Module):
    """Has an embedding, linear layers with and without a bias, and a normalisation."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 16, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=i % 2 == 0) for i in range(depth))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.norm(x)


METHODS = {
    "static": (unmask.random_mask(200), {}),
    "static, dense": (unmask.random_mask(200), {"gradients": "dense"}),
    "static, sampled": (unmask.random_mask(200), {"gradients": "sampled"}),
    "pafi": (unmask.pafi(200), {}),
    **{
        f"id3 by {name}": (unmask.id3(200, 40).but(heuristic=unmask.heuristic(name)), {})
        for name in ("d3", "gradient", "snip")
    },
    "id3 by exp 0": (unmask.id3(200, 40, exp=0.0), {}),
    "id3 by exp -1": (unmask.id3(200, 40, exp=-1.0), {}),
    "id3, stride 10": (unmask.id3(200, 40, schedule=lambda t, T, B: min(B, 50 * (t // 10 + 1))), {}),
    "static by gradient": (unmask.static_d3(200), {}),
}


@pytest.mark.parametrize("depth", [2, 9])
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_more_than_four_times(name, depth):
    method, options = METHODS[name]
    ids = torch.randint(0, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    with portable():
        model = Net(depth)
        selection = unmask.select(model, method, **options)
        optimizer = torch.optim.SGD(selection.parameters(), lr=1e-3)  # it has no state to read
        for step in range(14):
            with Operations() as operations:
                model(ids).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            if step:  # at the first step products are chosen
                assert operations.waiting.total() <= 4, (step, operations.waiting)
    assert selection.used > 10


@pytest.mark.parametrize("name", METHODS)
def test_the_portable_backend_trains_as_the_cpu_does(name):
    """The same weights are selected, and the trained ones agree up to the rounding of their gradients' sums."""
    method, options = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 300, (4, 9), generator=generator) for _ in range(6)]
    first = Net(3)

    def trained() -> tuple[unmask.Selection, nn.Module]:
        model = copy.deepcopy(first)
        selection = unmask.select(model, method, **options)
        optimizer = torch.optim.SGD(selection.parameters(), lr=1e-2)
        for ids in batches:
            model(ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return selection, model

    expected, there = trained()
    with portable():
        found, here = trained()
    assert torch.equal(found.ledger.positions, expected.ledger.positions)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_waiting_operation_is_counted_wherever_it_is():
    x = torch.ones(3, requires_grad=True)
    y = x * 1.0
    y.register_hook(lambda gradient: gradient.tolist() and None)
    with Operations() as operations:
        y.sum().backward()
        x.detach()[x.detach() > 0].sum().item()
        x.detach().nonzero()
        x.detach()[torch.tensor([0, 1])] = 2.0
    assert operations.waiting == {"tolist": 1, "index": 1, "_local_scalar_dense": 1, "nonzero": 1}
    assert operations.counts["sum"] == 2
    assert torch.ones(1).tolist() == [1.0]  # the method is put back


def test_backends():
    assert backend_of(torch.device("cpu")).asks
    assert backend_of(torch.device("meta")).name == "portable"
    with portable(), portable():
        assert backend_of(torch.device("cpu")).sampled is gathered_product
    assert backend_of(torch.device("cpu")).sampled is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_gathered_product_is_the_dense_one(dtype, tokens, monkeypatch):
    monkeypatch.setattr("unmask.gradients.backend._CHUNK", 700)
    g, x = torch.randn(tokens, 9).to(dtype), torch.randn(tokens, 7).to(dtype)
    flat = torch.randperm(63)[:40].sort().values
    found = gathered_product(g, x, flat // 7, flat % 7)
    exact = (g.double().t() @ x.double()).view(-1)[flat]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_an_embeddings_entries_are_those_of_its_rows(tokens, padding):
    g, ids = torch.randn(tokens, 5), torch.randint(0, 12, (tokens,))
    flat = torch.randperm(60)[:33].sort().values
    entries = Entries((12, 5), flat, torch.arange(33))
    rows = embedding_gradient(g, ids, torch.Size((12, 5)), padding)
    torch.testing.assert_close(embedding_gradient_at(g, ids, entries, padding), take_gradient(rows, entries))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of transformers, as peft calls it
def test_the_record_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "measure", lambda: measure(layers=1, rows=("frozen", "static", "id3")))
    record = run_host(BenchSettings(host=True, output=str(tmp_path)), "unmask bench --host")
    assert json.loads((tmp_path / "host.json").read_text()) == record
    assert [row["row"] for row in record["rows"]] == ["frozen", "static", "id3"]
    for row in record["rows"]:
        assert row["seconds"] > 0
        assert row["operations"] > 50
        assert row["waiting"] <= 8  # the model's, AdamW's and ours
    assert record["machine"]["threads"] == 1
