"""Trains with checkpointing, accumulation, tied weights, autocast and torch.compile, dense and sampled alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import as_lists
from layer_nets import assert_unselected, weights
from nets import tokens
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unmask
from unmask.gradients import factors, linear

# Dynamo looks at the .grad of every tensor that it meets in a frame.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Tower(nn.Module):
    """Has two blocks behind an embedding that is tied with the output; a block can be checkpointed, or compiled."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in "12"
        )
        self.out = nn.Linear(8, 40, bias=False)
        self.out.weight = self.embed.weight
        self.reentrant = None

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            part = (
                block if self.reentrant is None else lambda x, b=block: checkpoint(b, x, use_reentrant=self.reentrant)
            )
            x = x + part(x)
        return self.out(x)


METHODS = {
    "static": unmask.random_mask("30%", seed=3),
    "id3": unmask.id3("30%", steps=8),
    "stride": unmask.id3("30%", steps=8, stride=4),
}
MODES = {
    "plain": {},
    "checkpointed": {"reentrant": False},
    "checkpointed, reentrant": {"reentrant": True},
    "accumulated": {"parts": 3},
    "autocast": {"autocast": True},
    "autocast, checkpointed": {"autocast": True, "reentrant": False},
    "autocast, accumulated": {"autocast": True, "parts": 2},
    "compiled": {"backend": "eager"},
    "compiled ahead": {"backend": "aot_eager"},
}


@pytest.fixture(params=["compact", "sampled"])
def how(request, monkeypatch):
    """Forces one of the products that are not dense."""
    monkeypatch.setattr(linear, "choose", lambda *args, **options: request.param)
    monkeypatch.setattr(factors, "choose", lambda *args, **options: request.param)
    monkeypatch.setattr(factors, "_MOST", 2.0)
    monkeypatch.setattr(factors, "BAND", 64)


def trained(method, gradients, reentrant=None, parts=1, autocast=False, backend=None):
    torch.manual_seed(0)
    model = Tower() if autocast else Tower().double()
    model.reentrant = reentrant
    base, selection = weights(model), unmask.select(model, method, gradients=gradients)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=3e-3, weight_decay=0.1, eps=1e-3)
    forward = model if backend is None else torch.compile(model, backend=backend)
    for step, part in itertools.product(range(10), range(parts)):
        batch = tokens(parts * step + part)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(forward(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        if part == parts - 1:
            optimizer.step()
            optimizer.zero_grad()
            assert_unselected(model, base, selection)
    return selection, weights(model)


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_that_of_dense_gradients(mode, method):
    torch._dynamo.reset()
    options = MODES[mode]
    (dense, expected), (sampled, result) = (trained(METHODS[method], kind, **options) for kind in ("dense", "sampled"))
    assert dense.used == sampled.used == sampled.budget
    if options.get("autocast"):  # bfloat16 may turn ties around, so most of the mask must agree.
        theirs, ours = ({(n, i) for n, flat in as_lists(s.indices).items() for i in flat} for s in (dense, sampled))
        assert len(theirs & ours) >= 0.9 * len(theirs)
        return
    assert as_lists(dense.indices) == as_lists(sampled.indices)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


def test_the_compiled_run_is_the_plain_one():
    plain, compiled = (trained(METHODS["stride"], "auto", backend=backend)[1] for backend in (None, "aot_eager"))
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-12)
