"""Checks the metadata of a delta: they describe the selection, and are read back as they were written."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp
from torch import nn

import unmask
from unmask import DeltaError, SparseDelta, SparseTensor
from unmask.delta.provenance import Provenance


def trained(method: unmask.Method, model: nn.Module | None = None) -> unmask.Selection:
    model = mlp() if model is None else model
    selection = unmask.select(model, method)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    for seed in range(2):
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return selection


@pytest.mark.parametrize(
    "method", [unmask.id3(12, steps=2), unmask.repeat_d3(5, leaving="kept"), unmask.full()], ids=lambda m: m.name
)
def test_a_delta_says_what_the_selection_was(method):
    selection = trained(method)
    found = selection.delta("some/base").provenance
    assert found.method == selection.method.describe()
    assert (found.budget, found.used, found.step) == (selection.budget, selection.used, 2)
    assert found.eligible == {"tensors": len(selection.ledger.layout.names), "weights": selection.ledger.layout.total}
    assert found.dense == [d.name for d in selection.dense]
    assert (found.base_id, found.quantised) == ("some/base", None)
    assert found.parameters == sum(p.numel() for p in mlp().parameters())
    assert found.versions["torch"] == torch.__version__


def test_metadata_come_back_as_they_went_in(tmp_path):
    delta = trained(unmask.id3(12, steps=2)).delta().with_metadata(task={"kind": "token"}, into=None, note=[1, "a"])
    read = SparseDelta.load(delta.save(tmp_path / "d.safetensors"))
    assert read.metadata == delta.metadata
    assert read.provenance.to_json() == {key: value for key, value in delta.metadata.items() if key != "into"}
    assert (read.provenance.task, read.provenance.more) == ({"kind": "token"}, {"note": [1, "a"]})


def test_a_known_entry_of_another_form_is_refused():
    with pytest.raises(DeltaError, match=r"metadata\.budget"):
        _ = SparseDelta({}, {}, "", {"budget": "many"}).provenance
    assert Provenance.from_json({}) == Provenance()  # of an earlier version, or of a user's own


def test_repr_is_one_short_line():
    n = 100_000
    entries = {name: SparseTensor(torch.arange(n), torch.ones(n), (n,)) for name in ("a", "b")}
    delta = SparseDelta(entries, {"head": torch.zeros(3)}, "sha256:0", {"base_id": "bert-base"})
    assert repr(delta) == "SparseDelta(200,000 weights in 2 tensors, 1 stored whole, base 'bert-base')"
    assert repr(SparseDelta({}, {}, "sha256:0")) == "SparseDelta(0 weights in 0 tensors, base 'sha256:0')"


def test_a_name_in_the_place_of_a_method_is_refused_with_a_call_to_copy():
    with pytest.raises(unmask.MethodError, match=r"the name 'id3'; give .* unmask\.id3\(budget=1000, steps=100\)"):
        unmask.select(mlp(), "id3")
