"""Checks that a delta between two checkpoints gives the tuned one bit for bit, in files and in a live model."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, snapshot
from models import bert_classifier, bert_config, llama_writer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

import unmask
from unmask import DeltaError, SparseDelta
from unmask.delta import weight_files
from unmask.delta.base import base_tensors
from unmask.delta.between import index_bits
from unmask.delta.fingerprint import digest, fingerprint
from unmask.delta.rebuild import write_tuned
from unmask.delta.renaming import Renaming, renaming
from unmask.files import tensor_bytes

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool]
INDEX = weight_files.INDEX


def raw(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """Returns the dtype, shape and bytes of each tensor."""
    return {name: (t.dtype, tuple(t.shape), bytes(tensor_bytes(t))) for name, t in tensors.items()}


def stored(folder: Path) -> dict[str, tuple]:
    """Returns the tensors of a folder as the safetensors library reads them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        read = load_file(path)
        assert not found.keys() & read.keys()
        found |= read
    return raw(found)


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Writes a checkpoint of some files, with a configuration."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"from": "{folder.name}"}}')
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    places = {
        name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for place in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == place}, folder / place, metadata={"format": "pt"})
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 0, "total_parameters": 0}, "weight_map": places})
    )
    return folder


def there_and_back(base: Path, tuned: Path, tmp_path: Path) -> SparseDelta:
    """Checks that base + delta, through its file, has the tensors of the tuned folder; returns the delta."""
    delta = SparseDelta.load(SparseDelta.between(base, tuned).save(tmp_path / "delta.safetensors"))
    write_tuned(delta, str(base), tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tuned)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {"from": base.name}
    return delta


def values(dtype: torch.dtype, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Returns a tensor of any dtype and random bits, but finite if its dtype is one of `FLOATS`."""
    if dtype in FLOATS:
        return torch.randn(shape, generator=draw).to(dtype)
    if dtype is torch.bool:
        return torch.rand(shape, generator=draw) < 0.5
    data = torch.randint(0, 256, (*shape, dtype.itemsize), generator=draw, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_changed_entries_of_floats_are_held_one_by_one_by_their_bits(dtype, tmp_path):
    base = torch.randn(40, 50).to(dtype)
    base[0, 1], base[2, 0] = 0.0, torch.nan
    tuned = base.clone()
    tuned[0, 1] = -0.0  # another sign is a change
    tuned[2, 0] = 1.5
    tuned[39, 49] = 3
    for name, tensor in (("base", base), ("tuned", tuned)):
        save(tmp_path / name, {"w": tensor, "same": torch.full((3,), torch.nan)})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert delta.whole == {}
    assert delta.sparse["w"].indices.tolist() == [1, 100, 1999]
    made = delta.provenance.between
    assert made["weights"] == 2003
    assert made["bytes"] == 2000 * dtype.itemsize + 12


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_tensor_with_a_new_value_that_is_not_finite_is_held_whole(dtype, value, tmp_path):
    base = torch.randn(40, 50).to(dtype)
    tuned = base.clone()
    tuned[3, 4] = value
    save(tmp_path / "base", {"w": base})
    save(tmp_path / "tuned", {"w": tuned})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert list(delta.whole) == ["w"]
    assert not delta.sparse


def test_another_payload_of_a_nan_is_a_change(tmp_path):
    bits = torch.full((100,), 0x7FC00000, dtype=torch.int32)
    other = bits.clone()
    other[7] += 1
    save(tmp_path / "base", {"w": bits.view(torch.float32)})
    save(tmp_path / "tuned", {"w": other.view(torch.float32)})
    assert list(there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path).whole) == ["w"]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_dtypes_are_held_whole_if_a_bit_differs(dtype, tmp_path):
    draw = torch.Generator().manual_seed(1)
    base, same = values(dtype, (64, 8), draw), values(dtype, (4,), draw)
    tuned = base.clone()
    tuned[5] = values(dtype, (8,), draw)
    save(tmp_path / "base", {"w": base, "same": same, "f": torch.zeros(2)})
    save(tmp_path / "tuned", {"w": tuned, "same": same, "f": torch.zeros(2)})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert list(delta.whole) == ["w"]


def test_a_tensor_goes_whole_where_its_entries_would_take_more_than_three_quarters_of_it():
    """The bits of an index are those of the best Golomb-Rice code of random gaps, counted here by coding drawn gaps."""
    draw = random.Random(0)
    for density in (0.002, 0.05, 0.3, 0.8):
        gaps = [0] * 20_000
        for i in range(len(gaps)):
            while draw.random() > density:
                gaps[i] += 1
        coded = min(sum(k + 1 + (gap >> k) for gap in gaps) / len(gaps) for k in range(14))
        assert index_bits(density) == pytest.approx(coded, rel=0.02)
    base = torch.zeros(1000, dtype=torch.bfloat16)
    held = {}
    for changed in range(1, 1001, 9):
        tuned = base.clone()
        tuned[:changed] = 1
        delta = SparseDelta.between({"w": base}, {"w": tuned})
        assert len(delta) == (changed if delta.sparse else 0)
        held[changed] = bool(delta.sparse)
        assert held[changed] == (changed * (16 + index_bits(changed / 1000)) <= 0.75 * 16_000)
    assert set(held.values()) == {True, False}


def random_pair(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[str]]]:
    """Returns a base, a tuned checkpoint, and the names of the tensors that were added, removed and replaced."""
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    prefix = draw.choice(["", "net.", "a.b."])
    base, tuned = {}, {}
    kinds: dict[str, list[str]] = {"added": [], "removed": [], "replaced": []}
    for i in range(draw.randrange(3, 14)):
        dtype = draw.choice([*FLOATS, *FLOATS, *OTHERS])
        shape = draw.choice([(), (0,), (1,), (7,), (5, 9), (3, 4, 5), (64, 32)])
        name, value = f"layer.{i}.weight", values(dtype, shape, torch_draw)
        kind = (
            draw.choice(["same", "same", "few", "few", "many", "added", "removed", "shape", "dtype"]) if i else "same"
        )
        if kind != "added":
            base[name] = value
        if kind == "added":
            kinds["added"].append(prefix + name)
        if kind == "removed":
            kinds["removed"].append(prefix + name)
            continue
        if kind in ("few", "many"):
            other = values(dtype, shape, torch_draw)
            where = torch.rand(shape, generator=torch_draw) < (0.05 if kind == "few" else 0.95)
            value = torch.where(where, other, value) if dtype in FLOATS else other
        if kind == "shape":
            value = values(dtype, (2, 3), torch_draw)
            kinds["replaced"].append(prefix + name)
        if kind == "dtype":
            value = values(torch.float16 if dtype is torch.float32 else torch.float32, shape, torch_draw)
            kinds["replaced"].append(prefix + name)
            if value.dtype == dtype:
                kinds["replaced"].pop()
        tuned[prefix + name] = value
    return base, tuned, kinds


@pytest.mark.parametrize("seed", range(40))
def test_a_random_pair_of_checkpoints_comes_back_bit_for_bit(seed, tmp_path):
    base, tuned, kinds = random_pair(seed)
    shards = 1 + seed % 3 if len(base) >= 3 else 1
    save(tmp_path / "base", base, shards)
    save(tmp_path / "tuned", tuned, 1 + seed % 2)
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    made = delta.provenance.between
    assert {kind: made[kind] for kind in kinds} == {kind: sorted(names) for kind, names in kinds.items()}
    assert made["weights"] == sum(tensor.numel() for tensor in tuned.values())
    assert made["bytes"] == sum(len(tensor_bytes(tensor)) for tensor in tuned.values())
    if shards > 1:
        index = json.loads((tmp_path / "again" / INDEX).read_text())
        assert index["metadata"] == {"total_size": made["bytes"], "total_parameters": made["weights"]}
        for name, place in index["weight_map"].items():
            with safe_open(tmp_path / "again" / place, framework="pt") as file:
                assert name in file.keys()  # noqa: SIM118 (not a dict)
                assert file.metadata() == {"format": "pt"}
        assert index["weight_map"].keys() == tuned.keys()
    forms = {name: (tuple(t.shape), t.dtype) for name, t in tuned.items()}
    kept = {name: t for name, t in base.items() if forms.get(name) == (tuple(t.shape), t.dtype)}
    if kept == base and base.keys() == tuned.keys():  # the delta fits tensors in memory too
        assert fingerprint({n: digest(t) for n, t in base.items() if n not in delta.whole}) == delta.base


# Live models.


@pytest.fixture
def llamas(tmp_path):
    """Returns folders of a tiny Llama with tied embeddings and of the same model tuned."""
    model = llama_writer(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    change(model)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Changes some entries of every other parameter."""
    for i, p in enumerate(model.parameters()):
        if i % 2 == 0:
            p.view(-1)[:: 7 + i] += 0.5


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


# Refusals.


def refused(match: str, base: object, tuned: object) -> None:
    with pytest.raises(DeltaError, match=match):
        SparseDelta.between(base, tuned)


def test_what_is_no_pair_of_checkpoints_is_refused(tmp_path):
    one, two = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    good = save(tmp_path / "good", one)
    (tmp_path / "empty").mkdir()
    refused("holds no safetensors file", tmp_path / "empty", good)
    refused("no checkpoint at", tmp_path / "absent", good)
    refused("no checkpoint at", str(tmp_path / "absent.safetensors"), good)
    (tmp_path / "note.txt").write_text("hello")
    refused("is no checkpoint; give a folder", tmp_path / "note.txt", good)
    torch.save(one, tmp_path / "empty" / "pytorch_model.bin")
    refused(r"pickled.*save_pretrained", good, tmp_path / "empty")
    refused(r"pickled.*save_pretrained", good, tmp_path / "empty" / "pytorch_model.bin")
    refused("give two", good, tmp_path / "good" / "model.safetensors")
    model = nn.Linear(2, 2)
    refused("give two", model, model)
    refused("no tensor of one name and shape", one, {"v": torch.zeros(3)})
    refused("no tensor of one name and shape", one, {"w": torch.zeros(4)})
    refused("meta device", nn.Linear(2, 2, device="meta"), model)
    refused("only ordinary tensors", {"w": torch.zeros(3).to_sparse()}, two)
    selection = unmask.select(model, unmask.random_mask(2))
    refused("live selection", nn.Linear(2, 2), model)
    selection.release()


def test_incomplete_and_damaged_files_are_refused(tmp_path):
    tensors = {f"w{i}": torch.randn(4) for i in range(6)}
    good, cut = save(tmp_path / "good", tensors), save(tmp_path / "cut", tensors, shards=3)
    (cut / "model-00002-of-00003.safetensors").unlink()
    refused(r"lacks 1 of the 3 files.*model-00002", good, cut)
    index = json.loads((cut / INDEX).read_text())
    index["weight_map"] = {"w0": "model-00001-of-00003.safetensors", "x": "model-00001-of-00003.safetensors"}
    (cut / INDEX).write_text(json.dumps(index))
    refused(r"lacks the tensor 'x'", good, cut)
    (cut / INDEX).write_text('{"weight_map": {"w0": "../good/model.safetensors"}}')
    refused(r"no safetensors file in its folder", good, cut)
    save_file(tensors, cut / "model.safetensors")  # transformers reads this one, if there are both
    assert len(SparseDelta.between(good, cut)) == 0
    (cut / "model.safetensors").unlink()
    (cut / INDEX).unlink()
    refused(r"has 2 safetensors files .* no model\.safetensors\.index\.json", good, cut)
    data = (good / "model.safetensors").read_bytes()
    short = save(tmp_path / "short", tensors)
    (short / "model.safetensors").write_bytes(data[:-3])
    refused(r"do not fit its shape or the file", short, good)
    (short / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F99"'))
    refused(r"dtype 'F99'", short, good)


def test_another_base_is_refused_and_nothing_is_written(tmp_path):
    base = {"a.weight": torch.randn(30, 4), "b.weight": torch.randn(8)}
    tuned = {**base, "a.weight": base["a.weight"].clone()}
    tuned["a.weight"][3, 2] = 9
    for name, tensors in (("base", base), ("tuned", tuned)):
        save(tmp_path / name, tensors)
    delta = SparseDelta.between(tmp_path / "base", tmp_path / "tuned")
    others = {
        "fingerprint": {**base, "b.weight": base["b.weight"] + 1},
        "has no tensor 'a.weight'": {"b.weight": base["b.weight"]},
        "of shape": {**base, "a.weight": torch.zeros(4, 4)},
        "bfloat16": {name: tensor.bfloat16() for name, tensor in base.items()},
    }
    for i, (words, tensors) in enumerate(others.items()):
        other = save(tmp_path / f"other{i}", tensors)
        with pytest.raises(DeltaError, match=words):
            write_tuned(delta, str(other), tmp_path / "out")
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["base", "other0", "other1", "other2", "other3", "tuned"]


# The Hub.


def test_a_hub_id_is_read_from_the_cache_and_else_downloaded(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    base = save(tmp_path / "snapshot", {f"w{i}": torch.randn(50) for i in range(4)}, shards=2)
    cached = save(tmp_path / "cached", {f"w{i}": torch.zeros(50) for i in range(4)}, shards=2)
    calls: list[tuple[str, bool]] = []
    broken: list[str] = []

    def download(model: str, local_files_only: bool = False, **wanted: object) -> str:
        calls.append((model, local_files_only))
        assert "*.safetensors" in wanted["allow_patterns"]
        if model in broken and not local_files_only:
            raise ConnectionError("no way to the Hub")
        if model == "some/cached":
            return str(cached)
        if local_files_only or model != "some/base":
            raise LocalEntryNotFoundError(f"no {model} here")
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    delta = SparseDelta.between("some/base", "some/cached")
    assert calls == [("some/base", True), ("some/base", False), ("some/cached", True)]
    assert delta.metadata["base_id"] == "some/base"
    assert len(delta.whole) == 4
    write_tuned(delta, "some/base", tmp_path / "out")
    assert stored(tmp_path / "out") == stored(cached)
    assert (tmp_path / "out" / "config.json").is_file()
    next(cached.glob("*.safetensors")).unlink()  # half of it is in the cache
    refused("lacks 1 of the 2 files", "some/base", "some/cached")
    assert calls[-2:] == [("some/cached", True), ("some/cached", False)]
    broken.append("some/cached")  # and the Hub cannot be reached: the cache's fault is named
    refused("lacks 1 of the 2 files", "some/base", "some/cached")
    refused(r"no such model was found on the Hub: no some/other here", "some/other", base)


# Memory.


def most_memory(work: Callable[[], object]) -> int:
    """Returns the most bytes that tensors on the CPU had at one moment of some work, as torch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    found = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())))


def test_the_memory_needed_follows_the_largest_tensor(tmp_path):
    """Each checkpoint has 60 tensors of 256 KB, 15 MB in all."""
    size = 256 * 2**10
    tensors = {f"layers.{i}.weight": torch.randn(256, 256) for i in range(60)}
    save(tmp_path / "base", tensors)
    for tensor in tensors.values():
        tensor[::16, 5] += 1
    save(tmp_path / "tuned", tensors)
    made = []
    most = most_memory(lambda: made.append(SparseDelta.between(tmp_path / "base", tmp_path / "tuned")))
    assert len(made[0]) == 60 * 16
    assert 2 * size <= most < 3 * size
    most = most_memory(lambda: write_tuned(made[0], str(tmp_path / "base"), tmp_path / "again"))
    assert size <= most < 2 * size
    assert stored(tmp_path / "again") == stored(tmp_path / "tuned")
