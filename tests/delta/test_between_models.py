"""Checks deltas between checkpoints of models: live ones, tied tensors, prefixes, heads and buffers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from checkpoints import FLOATS, INDEX, change, raw, save, stored, there_and_back, values
from helpers import assert_same_tensors, snapshot
from models import bert_classifier, bert_config, llama_writer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

from unmask import DeltaError, SparseDelta
from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import digest, fingerprint
from unmask.delta.rebuild import write_tuned
from unmask.delta.renaming import Renaming, renaming


@pytest.fixture
def llamas(tmp_path):
    """Returns folders of a tiny Llama with tied embeddings and of the same model tuned."""
    model = llama_writer(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    change(model)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def with_output_layer(folder: Path) -> None:
    """Stores the tied output layer too, as some toolkits do."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("twice", [(), ("base",), ("tuned",), ("base", "tuned")], ids=str)
def test_tied_tensors_are_held_once_and_the_delta_fits_the_live_base(twice, llamas, tmp_path):
    base, tuned = llamas
    for folder in (base, tuned):
        if folder.name in twice:
            with_output_layer(folder)
    delta = SparseDelta.between(base, tuned)
    assert "model.embed_tokens.weight" in delta.sparse
    assert "lm_head.weight" not in {**delta.sparse, **delta.whole}
    made = delta.provenance.between
    assert made["tied"] == ({"lm_head.weight": "model.embed_tokens.weight"} if "tuned" in twice else {})
    assert made["removed"] == (["lm_head.weight"] if twice == ("base",) else [])
    write_tuned(delta, str(base), tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tuned)
    live, expected = (AutoModelForCausalLM.from_pretrained(folder) for folder in llamas)
    before = snapshot(live)
    assert delta.base == fingerprint({name: digest(t) for name, t in base_tensors(live).items()})
    displaced = delta.apply(live)
    assert_same_tensors(snapshot(live), snapshot(expected))
    displaced.apply(live)
    assert_same_tensors(snapshot(live), before)


@pytest.mark.parametrize("forms", [("live", "live"), ("live", "files"), ("files", "live")], ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_a_live_model_is_as_good_as_its_files(forms, twice, llamas):
    if twice:
        for folder in llamas:
            with_output_layer(folder)
    given = [
        AutoModelForCausalLM.from_pretrained(folder) if form == "live" else folder
        for form, folder in zip(forms, llamas, strict=True)
    ]
    found, expected = SparseDelta.between(*given), SparseDelta.between(*llamas)
    assert found.base == expected.base
    assert found.sparse.keys() == expected.sparse.keys()
    for name, entry in expected.sparse.items():
        assert torch.equal(found.sparse[name].indices, entry.indices)
        assert torch.equal(found.sparse[name].values, entry.values)


def test_transformers_loads_the_shards_that_are_written(llamas, tmp_path):
    base, tuned = (AutoModelForCausalLM.from_pretrained(folder) for folder in llamas)
    base.save_pretrained(tmp_path / "parts", max_shard_size="6KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    delta = SparseDelta.between(tmp_path / "parts", llamas[1])
    write_tuned(delta, str(tmp_path / "parts"), tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    assert_same_tensors(snapshot(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), snapshot(tuned))
    indices = [json.loads((tmp_path / folder / INDEX).read_text()) for folder in ("parts", "again")]
    assert indices[0] == indices[1]


def test_an_untied_output_layer_is_added_whole_and_a_tied_model_refuses_it(llamas, tmp_path):
    base, tuned = llamas
    with_output_layer(tuned)
    path = tuned / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    delta = SparseDelta.between(base, tuned)
    assert delta.provenance.between["added"] == ["lm_head.weight"]
    write_tuned(delta, str(base), tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tuned)
    live = AutoModelForCausalLM.from_pretrained(base)
    before = snapshot(live)
    with pytest.raises(DeltaError, match=r"tuned checkpoint has a tensor 'lm_head\.weight', which this model lacks"):
        delta.apply(live)
    assert_same_tensors(snapshot(live), before)


def test_an_output_layer_that_is_tied_in_the_tuned_checkpoint_only_is_compared_by_itself(tmp_path):
    embedding, output = torch.randn(50, 8), torch.randn(50, 8)
    save(tmp_path / "base", {"embed.weight": embedding, "lm_head.weight": output})
    save(tmp_path / "tuned", {"embed.weight": embedding, "lm_head.weight": embedding})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert delta.provenance.between["tied"] == {}
    assert list(delta.whole) == ["lm_head.weight"]


def test_a_task_models_prefix_and_new_head(tmp_path):
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    change(model)
    model.save_pretrained(tmp_path / "tuned")
    delta = SparseDelta.between(tmp_path / "base", tmp_path / "tuned")
    made = delta.provenance.between
    assert made["renamed"] == {"off": "", "on": "bert."}
    assert made["added"] == ["classifier.bias", "classifier.weight"]
    assert made["removed"] == made["replaced"] == []
    torch.manual_seed(5)
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))
    write_tuned(delta, str(tmp_path / "base"), tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "tuned")
    back = SparseDelta.between(tmp_path / "tuned", tmp_path / "base")
    assert back.provenance.between["removed"] == ["classifier.bias", "classifier.weight"]
    write_tuned(back, str(tmp_path / "tuned"), tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "base")


def test_a_live_base_gives_its_names_and_the_delta_fits_the_bases_files(tmp_path):
    torch.manual_seed(0)
    encoder = BertModel(bert_config())
    encoder.save_pretrained(tmp_path / "base")
    change(encoder)
    encoder.save_pretrained(tmp_path / "tuned")
    live = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    delta = SparseDelta.between(live, tmp_path / "tuned")
    assert delta.sparse
    assert all(name.startswith("bert.") for name in delta.sparse)
    assert delta.provenance.between["removed"] == ["classifier.bias", "classifier.weight"]
    with pytest.raises(DeltaError, match=r"tuned checkpoint has no tensor 'classifier\.bias', and this model has one"):
        delta.apply(live)
    write_tuned(delta, str(tmp_path / "base"), tmp_path / "again")
    assert stored(tmp_path / "again") == {f"bert.{n}": tensor for n, tensor in stored(tmp_path / "tuned").items()}


def test_a_new_head_alone_keeps_the_prefix(tmp_path):
    """No tensor of the base is in the delta, so only its metadata say which prefix the names get."""
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "tuned")
    delta = SparseDelta.between(tmp_path / "base", tmp_path / "tuned")
    assert not delta.sparse
    write_tuned(delta, str(tmp_path / "base"), tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "tuned")


def test_a_prefix_that_would_give_two_tensors_one_name_is_kept():
    """Of equals the default is taken."""
    names = {"net.w", "net.b", "w"}
    assert renaming(names, {"w", "b"}) == Renaming()
    assert renaming(names - {"w"}, {"w", "b"}) == Renaming(off="net.")
    assert renaming({"w"}, {"w", "x.w"}, Renaming(on="x.")) == Renaming(on="x.")
    made = SparseDelta.between({name: torch.ones(2) for name in names}, {"w": torch.ones(2), "b": torch.ones(2)})
    assert made.provenance.between["removed"] == ["net.b", "net.w"]


def test_a_live_model_that_is_trained_on_does_not_change_the_delta():
    tuned = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    base = {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(3)}
    delta = SparseDelta.between(base, tuned)
    assert len(delta.whole) == 4  # of changed values, of another shape, and added
    expected = raw(dict(delta.whole))
    with torch.no_grad():
        for p in tuned.parameters():
            p.zero_()
    assert raw(dict(delta.whole)) == expected


def test_buffers_are_compared_and_applied(tmp_path):
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save(tmp_path / "base", base.state_dict())
    tuned = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tuned.load_state_dict(base.state_dict())
    tuned(torch.randn(8, 3))
    save(tmp_path / "tuned", tuned.state_dict())
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert {*delta.whole, *delta.sparse} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    delta.apply(base)
    assert_same_tensors(dict(base.state_dict()), dict(tuned.state_dict()))


def test_another_shape_replaces_a_tensor_and_only_a_model_with_that_shape_takes_it(tmp_path):
    for labels, name in ((2, "base"), (3, "tuned")):
        bert_classifier(num_labels=labels, seed=labels).save_pretrained(tmp_path / name)
    delta = SparseDelta.between(tmp_path / "base", tmp_path / "tuned")
    assert delta.provenance.between["replaced"] == ["classifier.bias", "classifier.weight"]
    with pytest.raises(DeltaError, match=r"'classifier.bias' is torch.float32 of shape \(2,\) in this model and"):
        delta.apply(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    delta.apply(model)
    assert_same_tensors(snapshot(model), snapshot(bert_classifier(num_labels=3, seed=3)))


def test_copies_that_no_embedding_is_part_of_are_not_tied(tmp_path):
    """Experts that start as copies are separate parameters; constants tie nothing either."""
    expert, table = torch.randn(6, 6), torch.zeros(6, 6)
    base = {"experts.0.weight": expert, "experts.1.weight": expert, "embed.weight": table, "adapter.weight": table}
    tuned = {name: tensor + 1 if "expert" in name else tensor for name, tensor in base.items()}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert delta.provenance.between["tied"] == {}
    assert {*delta.sparse, *delta.whole} == {"experts.0.weight", "experts.1.weight"}


def test_the_one_name_of_a_tied_tensor(tmp_path):
    """It is the one that the base has; of two, the first of the module, which the live model has too."""
    base, tuned = torch.randn(50, 8), torch.randn(50, 8)
    save(tmp_path / "base", {"lm_head.weight": base})
    save(tmp_path / "tuned", {"embed.weight": tuned, "lm_head.weight": tuned})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert delta.provenance.between["tied"] == {"embed.weight": "lm_head.weight"}
    live = nn.ModuleDict({"z": nn.Linear(8, 50, bias=False), "a": nn.Linear(8, 50, bias=False)})
    live["a"].weight = live["z"].weight
    delta = SparseDelta.between({"a.weight": base, "z.weight": base}, live)
    assert delta.provenance.between["tied"] == {"a.weight": "z.weight"}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.int8], ids=str)
def test_tied_tensors_of_any_dtype_are_held_once(dtype, tmp_path):
    draw = torch.Generator().manual_seed(2)
    for name in ("base", "tuned"):
        table = values(dtype, (50, 8), draw)
        save(tmp_path / name, {"lm_head.weight": table, "wte.weight": table})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert list(delta.whole) == ["wte.weight"]
    assert delta.provenance.between["tied"] == {"lm_head.weight": "wte.weight"}


def test_equal_parameters_of_a_module_are_not_tied():
    """Files would tie them, because one is an embedding; a module says that they are two."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.out.weight = nn.Parameter(self.embed.weight.detach().clone())

    base = Net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p[3, 4] += 1
    for given in ((base, tuned), (base.state_dict(), tuned), (base, tuned.state_dict())):
        delta = SparseDelta.between(*given)
        assert set(delta.sparse) == {"embed.weight", "out.weight"}
    delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


def test_a_module_in_which_one_parameter_has_two_names(tmp_path):
    """The names are tied whatever they are called, in a module; a file that notes its left-out name is read likewise."""

    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
        net[1].weight = net[0].weight
        return net

    base, tuned = tied(), tied()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned[0].weight[0, :3] += 1
    delta = SparseDelta.between(base, tuned)
    assert list(delta.sparse) == ["0.weight"]
    delta.apply(base)
    assert torch.equal(base[1].weight, tuned[1].weight)
    save_file({"1.weight": tuned[1].weight.detach()}, tmp_path / "x.safetensors", metadata={"0.weight": "1.weight"})
    assert len(SparseDelta.between(tuned, tmp_path / "x.safetensors")) == 0
